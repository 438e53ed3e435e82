"""LLaMA-Factory: `trainer_log.jsonl`, a fixed set of columns. Its trainer_state.json holds more and is TRL's kind."""

from outspoken.diagnostics.sources.names import Family

LLAMA_FACTORY = Family(
    "llama_factory",
    title="LLaMA-Factory",
    signs=("current_steps", "total_steps", "percentage", "elapsed_time", "remaining_time"),
    aliases={
        "lr": "learning_rate",
        "accuracy": "rewards/accuracies",  # written by its preference stages only
        "total_tokens": "num_tokens",
        "vram_allocated": "memory/peak_allocated",
        "vram_reserved": "memory/peak_reserved",
    },
    known=("throughput", "predict_loss"),
)
