"""Logs as torchtune writes them: text of its DiskLogger and StdoutLogger, JSON lines of its later DiskLogger.

Made with torchtune 0.6.1 (its loggers and its `save_config`; the numbers are arithmetic, not training):

    pip install --target LIB --no-deps torchtune==0.6.1 torchao==0.14.1 omegaconf antlr4-python3-runtime==4.9.3 \\
        sentencepiece tiktoken blobfile torchdata kagglehub
    PYTHONPATH=LIB python tests/peer_logs/make_torchtune.py tests/peer_logs/torchtune

The names are those that the recipes of 0.6.1 log for SFT, DPO and PPO. `sft/log_1700000000.jsonl` holds the rows of the
SFT run as the DiskLogger of 0.7 writes them (`{"step": n, …}`), which is not on PyPI; it is built from that format.
"""

import argparse
import contextlib
import json
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torchtune.training.metric_logging import DiskLogger, StdoutLogger

SFT_CONFIG = {
    "batch_size": 2,
    "gradient_accumulation_steps": 8,
    "epochs": 1,
    "max_steps_per_epoch": 12,
    "optimizer": {"_component_": "torch.optim.AdamW", "lr": 2e-5},
    "lr_scheduler": {"num_warmup_steps": 4},
    "clip_grad_norm": 1.0,
    "log_every_n_steps": 1,
    "seed": 7,
}


def sft_row(step: int) -> dict:
    return {
        "loss": float("nan") if step == 5 else 2 / (1 + step),
        "lr": 2e-5 * min(1.0, step / 4),
        "tokens_per_second_per_gpu": 1000.0 + step,
        "peak_memory_active": 6.5,
        "peak_memory_alloc": 6.25,
        "peak_memory_reserved": 8.0,
        "grad_norm": torch.tensor(1 / step),  # the recipes hand over tensors
    }


def dpo_row(step: int) -> dict:
    return {
        "loss": 0.6875 - step / 32,
        "lr": 5e-6,
        "tokens_per_second_per_gpu": 500.0,
        "rewards/chosen": torch.tensor(-step / 8),
        "rewards/rejected": torch.tensor(-step * 3 / 8),
        "rewards/accuracies": torch.tensor(0.5 + step / 32),
        "rewards/margins": torch.tensor(step / 4),
        "log_probs/rejected": torch.tensor(-200.0 - step),
        "log_probs/chosen": torch.tensor(-100.0 - step),
        "logits/rejected": torch.tensor(-1.5),
        "logits/chosen": torch.tensor(-1.25),
    }


def ppo_row(step: int) -> dict:
    return {
        "scores": torch.tensor(step / 16),
        "num_stop_tokens": torch.tensor(8),
        "rlhf_reward": torch.tensor(step / 16 - 1 / 64),
        "kl": torch.tensor(64 * step / 1024),  # summed over a sequence of 64 tokens
        "kl_reward": torch.tensor(-1 / 64),
        "loss": torch.tensor(0.25),
        "policy_loss": torch.tensor(0.125),
        "value_loss": torch.tensor(1.25),
        "clipfrac": torch.tensor(1 / 64),
        "ratios": torch.tensor(1.0),
        "approx_policy_kl": torch.tensor(1 / 256),
        "response_lengths": torch.tensor(64.0),
        "tokens_per_second_per_gpu_trajectory": 100.0,
        "tokens_per_second_per_gpu_ppo": 50.0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    for method, row in {"sft": sft_row, "dpo": dpo_row, "ppo": ppo_row}.items():
        out = folder / method
        out.mkdir(parents=True, exist_ok=True)
        (out / "log_1700000000.txt").unlink(missing_ok=True)
        log = DiskLogger(str(out), filename="log_1700000000.txt")
        if method == "sft":
            log.log_config(OmegaConf.create({**SFT_CONFIG, "output_dir": str(out)}))
            text = (out / "torchtune_config.yaml").read_text()
            (out / "torchtune_config.yaml").write_text(text.replace(str(out), "/tmp/torchtune/run"))
        for step in range(1, 13):
            log.log_dict(row(step), step=step)
            if method == "sft" and step == 10:
                log.log_dict({"val_loss": 0.375}, step=step)
        log.close()

    # resumed at step 9: it appends to the same file
    restarted = folder / "restart"
    restarted.mkdir(parents=True, exist_ok=True)
    (restarted / "log_1700000000.txt").unlink(missing_ok=True)
    for steps in (range(1, 11), range(9, 13)):
        log = DiskLogger(str(restarted), filename="log_1700000000.txt")
        for step in steps:
            row = sft_row(step)
            log.log_dict({**row, "loss": row["loss"] + (1 / 64 if steps.start == 9 else 0)}, step=step)
        log.close()

    with open(folder / "sft" / "stdout.txt", "w") as stdout, contextlib.redirect_stdout(stdout):
        print("INFO:torchtune.utils._logging:Running FullFinetuneRecipeSingleDevice with resolved config:")
        log = StdoutLogger()
        for step in range(1, 13):
            log.log_dict(sft_row(step), step=step)
        log.close()

    with open(folder / "sft" / "log_1700000000.jsonl", "w") as lines:
        for step in range(1, 13):
            row = {name: float(value) for name, value in sft_row(step).items()}
            lines.write(json.dumps({"step": step, **row}) + "\n")


if __name__ == "__main__":
    main()
