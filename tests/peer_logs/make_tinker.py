"""Logs as the Tinker cookbook writes them: `metrics.jsonl` and `config.json` of its JsonLogger.

Made with tinker-cookbook 0.6.1 (its logger and its store; the numbers are arithmetic, not training):

    pip install --target LIB --no-deps tinker-cookbook==0.6.1 chz blobfile cloudpathlib
    PYTHONPATH=LIB python tests/peer_logs/make_tinker.py tests/peer_logs/tinker

`rl/` is a run that stopped after step 9 and was resumed at step 8, in the same file; `sft/` and `dpo/` ran through.
"""

import argparse
import logging
from pathlib import Path

from tinker_cookbook.utils.ml_log import JsonLogger

logging.disable(logging.CRITICAL)

RL_CONFIG = {
    "model_name": "some/model-8B",
    "learning_rate": 1e-4,
    "max_tokens": 128,
    "loss_fn": "importance_sampling",
    "kl_penalty_coef": 0.0,
    "num_substeps": 1,
    "temperature": 1.0,
    "log_path": "runs/arithmetic",
    "eval_every": 5,
    "dataset_builder": {"batch_size": 8, "group_size": 4},
}


def rl_row(step: int, shift: float = 0.0) -> dict:
    return {
        "progress/batch": step,
        "optim/lr": 1e-4,
        "progress/done_frac": (step + 1) / 12,
        "env/all/ac_tokens_per_turn": 64.0 + step,
        "env/all/ob_tokens_per_turn": 32.0,
        "env/all/turns_per_episode": 1.0,
        "env/all/total_episodes": 32,
        "env/all/total_turns": 32,
        "env/all/total_ac_tokens": 32 * (64 + step),
        "env/all/total_ob_tokens": 1024,
        "env/all/reward/total": step / 16 + shift,
        "env/all/by_group/frac_mixed": 0.5,
        "env/all/by_group/frac_all_good": step / 32,
        "env/all/by_group/frac_all_bad": 0.5 - step / 32,
        "optim/kl_sample_train_v1": float("nan") if step == 5 else step / 1024,
        "optim/kl_sample_train_v2": step / 2048,
        "optim/entropy": 1 - step / 16,
        "time/sample": 2.0,
        "time/train": 1.0,
        "time/total": 4.0,
    }


def write_rl(folder: Path) -> None:
    log = JsonLogger(folder)
    log.log_hparams(RL_CONFIG)
    for step in range(10):
        evaluation = {"test/env/all/reward/total": step / 8} if step % 5 == 0 else {}
        log.log_metrics({**evaluation, **rl_row(step)}, step=step)
    log.close()
    again = JsonLogger(folder)
    for step in range(8, 12):
        again.log_metrics(rl_row(step, shift=1 / 64), step=step)
    again.log_summary({"cost/cumulative_usd": 1.5})
    again.close()


def write_sft(folder: Path) -> None:
    log = JsonLogger(folder)
    log.log_hparams({"model_name": "some/model-8B", "learning_rate": 2e-4, "lr_schedule": "linear", "num_epochs": 1})
    for step in range(12):
        row = {
            "num_sequences": 16,
            "num_tokens": 4096,
            "num_loss_tokens": 1024,
            "learning_rate": 2e-4 * (1 - step / 12),
            "train_mean_nll": float("nan") if step == 7 else 2 / (1 + step),
            "train_mean_bpb": 0.5,
            "progress": step / 12,
            "time/total": 3.0,
        }
        log.log_metrics({**row, **({"test/nll": 3 / (1 + step)} if step % 5 == 0 else {})}, step=step)
    log.close()


def write_dpo(folder: Path) -> None:
    log = JsonLogger(folder)
    log.log_hparams({"model_name": "some/model-8B", "learning_rate": 1e-5, "dpo_beta": 0.1, "num_epochs": 1})
    for step in range(12):
        row = {
            "dpo_loss": 0.6875 - step / 32,
            "accuracy": 0.5 + step / 32,
            "margin": step / 4,
            "chosen_reward": -step / 8,
            "rejected_reward": -step * 3 / 8,
            "num_pairs": 16,
            "num_tokens": 4096,
            "learning_rate": 1e-5,
            "progress": step / 12,
            "time/total": 3.0,
        }
        log.log_metrics(row, step=step)
    log.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    for name, write in {"rl": write_rl, "sft": write_sft, "dpo": write_dpo}.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "metrics.jsonl").unlink(missing_ok=True)
        write(folder / name)
        (folder / name / "code.diff").unlink(missing_ok=True)  # tells where this machine keeps the package


if __name__ == "__main__":
    main()
