"""Write offline runs with the wandb package.

    python tests/peer_logs/make_wandb.py FOLDER

The files beside this script were made by it in folders v0_31 (wandb 0.31.0, numpy) and v0_17 (wandb 0.17.9, whose
writer is another program: it writes other fields of the same messages). Every number follows from its step: the loss is
2 / (1 + step), the gradient norm step / 8. Only the logs are kept of what wandb writes,
the long one packed.
"""

import argparse
import gzip
import math
import os
import shutil
import tempfile
import time
from pathlib import Path

os.environ.update(WANDB_MODE="offline", WANDB_SILENT="true", WANDB_CONSOLE="off", WANDB_DISABLE_GIT="true")
os.environ.update(WANDB_DISABLE_CODE="true", WANDB_HOST="host", WANDB_PROGRAM="train.py", WANDB__DISABLE_META="true")
os.environ.update(WANDB_X_DISABLE_META="true")

import numpy as np
import wandb


def loss(step: int) -> float:
    return 2 / (1 + step)


def plain(folder: Path) -> None:
    """As transformers logs: 30 calls, one each 5 steps. Loss NaN, +inf, -inf at calls 7, 8, 9; media at call 3."""
    config = {"learning_rate": 2e-05, "model": {"type": "llama", "layers": [1, 2]}, "note": None, "packed": True}
    with wandb.init(project="peer", id="plain", dir=folder, config=config) as run:
        for call in range(30):
            step = 5 * (call + 1)
            value = {7: math.nan, 8: math.inf, 9: -math.inf}.get(call, loss(step))
            row = {"train/loss": value, "train/grad_norm": step / 8, "train/global_step": step}
            if call == 3:
                row |= {"weights": wandb.Histogram([1.0, 2.0, 4.0]), "words": "some text", "empty": None}
                row |= {"nested": {"a": 1, "b": {"c": 2.5}}, "long/table": wandb.Histogram(np.arange(5.0))}
            run.log(row)
        run.config.update({"later": 3})
        run.config.update({"learning_rate": 1e-05}, allow_val_change=True)


def resumed(folder: Path) -> None:
    """Steps 1 to 20, then resumed after the checkpoint of step 10 and on to 30, in a folder of its own."""
    for first, last in ((1, 20), (11, 30)):
        with wandb.init(project="peer", id="resumed", dir=folder, resume="allow") as run:
            for step in range(first, last + 1):
                run.log({"loss": loss(step), "global_step": step})
        time.sleep(1.1)  # the folder's name holds the second


def long(folder: Path) -> None:
    """A text of 33,000 characters at call 5: a record over two blocks."""
    with wandb.init(project="peer", id="long", dir=folder) as run:
        for call in range(20):
            run.log({"loss": loss(call), **({"words": "x" * 33_000} if call == 5 else {})})


MADE = (plain, resumed, long)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    out = parser.parse_args().folder
    for make in MADE:
        shutil.rmtree(out / make.__name__, ignore_errors=True)
        with tempfile.TemporaryDirectory() as scratch:
            make(Path(scratch))
            wandb.teardown()  # waits until everything is on disk
            for log in Path(scratch).glob("wandb/*run-*/*.wandb"):
                kept = out / make.__name__ / "wandb" / log.parent.name / log.name
                kept.parent.mkdir(parents=True)
                if make is long:
                    kept.with_name(f"{log.name}.gz").write_bytes(gzip.compress(log.read_bytes(), mtime=0))
                else:
                    shutil.copy(log, kept)
