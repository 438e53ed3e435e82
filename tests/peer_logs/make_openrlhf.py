"""The consoles of OpenRLHF: `✨ Global step N: {…}` of its PPO trainer, without the star if asynchronous; bars of its others.

Made with `logging_utils` of openrlhf 0.11.2, loaded from its unpacked wheel because the package wants vLLM and more:

    pip download --no-deps openrlhf==0.11.2 && unzip -d LIB openrlhf-0.11.2-*.whl
    python tests/peer_logs/make_openrlhf.py LIB tests/peer_logs/openrlhf

The line's text is what `trainer/ppo_trainer.py` and `ppo_trainer_async.py` hand to that logger; the numbers are arithmetic,
not training. The asynchronous run stopped after step 9 and was resumed at step 8, into the same file. `sft.log` holds the
bars of `trainer/sft_trainer.py`: two epochs of twelve micro-batches, and a new text on the bar after every second one.
"""

import argparse
import contextlib
import importlib.util
import io
from pathlib import Path

from tqdm import tqdm


def status(step: int, shift: float = 0.0) -> dict:
    return {
        "policy_loss": -1 / 512,
        "actor_lr": 5e-7,
        "ppo_clip_ratio": 1 / 64,
        "ppo_kl": -1 / 4096,
        "kl": step / 1024,
        "logprobs_diff": step / 512,
        "reward": step / 16 + shift,
        "return": step / 16 - 1 / 64,
        "group_reward_std": 0.25,
        "response_length": 100.0 + step,
        "total_length": 164.0 + step,
        "truncated": step / 64,
        "actor_grad_norm": float("nan") if step == 5 else 1 / step,
        "rollout/reward_mean": step / 16 + shift,
        "rollout/reward_std": 0.5,
        "rollout/response_length_mean": 100.0 + step,
        "rollout/truncated_rate": step / 64,
        "rollout/num_samples": 128,
        "timing/make_experience": 2.0,
        "timing/ppo_train": 3.0,
        "timing/broadcast": 0.5,
        "timing/generation": 4.0,
        "timing/step_total": 9.5,
    }


def write_bars(out: io.TextIOBase) -> None:
    epochs = tqdm(range(2), desc="Train epoch", file=out)
    update = 0
    for epoch in range(2):
        # at the pace of training each micro-batch redraws the bar
        bar = tqdm(range(12), desc=f"Train step of epoch {epoch}", file=out, mininterval=0)
        for batch in range(12):
            bar.update()
            if batch % 2:
                update += 1
                grad_norm = float("nan") if update == 5 else 1 / update
                bar.set_postfix({"gpt_loss": 2 / (1 + update), "lr": 1e-5, "grad_norm": grad_norm})
        epochs.update()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("lib", type=Path, help="where the wheel of openrlhf was unpacked")
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    (source,) = arguments.lib.glob("**/openrlhf/utils/logging_utils.py")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):  # its handler takes the stdout of the moment of import
        spec = importlib.util.spec_from_file_location("logging_utils", source)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    logger = module.init_logger("openrlhf.trainer.ppo_trainer")

    def write(name: str, lines: list[str]) -> None:
        printed.seek(0)
        printed.truncate()
        for line in lines:
            logger.info(line)
        (arguments.folder / name).write_text(printed.getvalue())

    greeting = "Initialize Ray and the vLLM engines"
    write("console.log", [greeting, *(f"✨ Global step {step}: {status(step)}" for step in range(1, 13))])
    with open(arguments.folder / "sft.log", "w", newline="") as out:
        write_bars(out)
    before = [f"Global step {step}: {status(step)}" for step in range(1, 10)]
    after = [f"Global step {step}: {status(step, shift=1 / 64)}" for step in range(8, 13)]
    write("console_async.log", [greeting, *before, greeting, *after])


if __name__ == "__main__":
    main()
