"""LLaMA-Factory: `trainer_log.jsonl`, a fixed set of columns. Its trainer_state.json holds more and is TRL's kind.

The file has no gradient norm, and it is appended to when a run is restarted. The rewrite ("v1") writes the Trainer's
own names into a file of the same name.
"""

from collections.abc import Collection

from outspoken.diagnostics.sources.names import Family


def method_of(names: Collection[str]) -> tuple[str, str] | None:
    if "current_steps" not in names:
        return None
    if "reward" in names:
        return "ppo", "it logs a reward, which LLaMA-Factory's PPO stage alone does"
    if "accuracy" in names:
        return "dpo", "it logs accuracy, as its preference stage does (DPO, ORPO and SimPO look alike in this file)"
    return None


LLAMA_FACTORY = Family(
    "llama_factory",
    title="LLaMA-Factory",
    signs=("current_steps", "total_steps", "percentage", "elapsed_time", "remaining_time"),
    aliases={
        "lr": "learning_rate",
        "accuracy": "rewards/accuracies",
        "total_tokens": "num_tokens",
        "vram_allocated": "memory/peak_allocated",
        "vram_reserved": "memory/peak_reserved",
    },
    meanings={
        "accuracy": "accuracy was taken for the share of pairs with a positive margin: its preference stage writes it, its reward-model stage does not.",
    },
    not_measured={"vram_allocated": 0.0, "vram_reserved": 0.0},  # no device that counts
    known=("throughput", "predict_loss", "sft_loss", "odds_ratio_loss", "predict_"),
    method_of=method_of,
)  # fmt: skip
