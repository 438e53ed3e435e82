"""Logs as veRL writes them: JSON lines of its file logger and lines of its console logger, of one and the same run.

Made with the modules of verl 0.9.1, loaded from its unpacked wheel because the package itself wants Ray and more:

    pip download --no-deps verl==0.9.1 && unzip -d LIB verl-0.9.1-*.whl && pip install --target LIB orjson
    PYTHONPATH=LIB python tests/peer_logs/make_verl.py LIB tests/peer_logs/verl

The numbers are arithmetic, not training. Ray puts `(TaskRunner pid=…)`, in colour, before lines of the console; that is
added here to the second half of them. Metrics of the actor are numpy's numbers, as `reduce_metrics` makes them.
"""

import argparse
import contextlib
import importlib.util
import io
import os
from pathlib import Path
from types import ModuleType

import numpy as np

PREFIX = "\x1b[36m(TaskRunner pid=222265)\x1b[0m "


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(step: int) -> dict:
    return {
        "actor/entropy": np.float64(1 - step / 32),
        "actor/pg_loss": np.float64(-1 / 512),
        "actor/kl_loss": np.float64(step / 1024),
        "actor/kl_coef": np.float64(0.001),
        "actor/pg_clipfrac": np.float64(1 / 64),
        "actor/pg_clipfrac_lower": np.float64(0.0),
        "actor/ppo_kl": np.float64(-1 / 4096),
        "actor/grad_norm": np.float64("nan") if step == 5 else np.float64(1 / step),
        "actor/lr": np.float64(1e-6),
        "perf/mfu/actor": 0.25,
        "perf/max_memory_allocated_gb": 40.5,
        "perf/max_memory_reserved_gb": 48.0,
        "perf/throughput": 2048.0,
        "perf/time_per_step": 12.0,
        "training/global_step": step,
        "training/epoch": 0,
        "critic/score/mean": step / 16,
        "critic/score/max": 1.0,
        "critic/score/min": 0.0,
        "critic/rewards/mean": step / 16 - 1 / 64,
        "critic/rewards/max": 1.0,
        "critic/rewards/min": -0.0625,
        "critic/advantages/mean": 0.0,
        "critic/advantages/max": 1.5,
        "critic/advantages/min": -1.5,
        "response_length/mean": 100.0 + step,
        "response_length/max": 256.0,
        "response_length/min": 8.0,
        "response_length/clip_ratio": step / 64,
        "response/aborted_ratio": 0.0,
        "prompt_length/mean": 64.0,
        "timing_s/gen": 5.0,
        "timing_s/update_actor": 3.0,
        "timing_s/step": 12.0,
    }


def metrics(step: int) -> dict:
    if step == 0:
        return {"val-core/gsm8k/reward/mean@1": 0.125}
    return {**row(step), **({"val-core/gsm8k/reward/mean@1": 0.5} if step == 10 else {})}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("lib", type=Path, help="where the wheel of verl was unpacked")
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    folder = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    tracking = load(arguments.lib / "verl" / "utils" / "tracking.py")
    console = load(arguments.lib / "verl" / "utils" / "logger" / "aggregate_logger.py").LocalLogger()

    os.environ["VERL_FILE_LOGGER_PATH"] = str(folder / "gsm8k.jsonl")
    with contextlib.redirect_stdout(io.StringIO()):
        log = tracking.FileLogger("project", "gsm8k")
    for step in range(13):
        log.log(metrics(step), step)
    log.finish()

    with open(folder / "console.log", "w") as out:
        out.write("2026-08-23 10:00:00,000\tINFO worker.py:1843 -- Started a local Ray instance.\n")
        for step in range(13):
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                console.log(metrics(step), step)
            prefix = PREFIX if step > 6 else ""
            out.write(f"{prefix}Training Progress: {step}/12\n{prefix}{printed.getvalue()}")


if __name__ == "__main__":
    main()
