"""TRL, transformers, Unsloth, Axolotl: our names are theirs, so only old and odd ones stand here.

Not translated on purpose: `clip_ratio` (before 0.17), which compared the other way round or without regard to the
advantage's sign; `objective/kl` and `objective/entropy` (PPO), which are sums over a sequence, whose length is not
logged; Axolotl's `memory/device_reserved (GiB)`, which is no peak.
"""

from outspoken.diagnostics.sources.names import Family

# What the Trainer's table in a notebook calls an evaluation's metrics: `eval_` is cut off and each word capitalised.
_NOTEBOOK = {
    **{
        f"{part.capitalize()}/{which}": f"eval_{part}/{which}"
        for part in ("rewards", "logps", "logits")
        for which in ("chosen", "rejected")
    },
    "Rewards/accuracies": "eval_rewards/accuracies",
    "Rewards/margins": "eval_rewards/margins",
    "Entropy": "eval_entropy",
    "Mean Token Accuracy": "eval_mean_token_accuracy",
    "Accuracy": "eval_accuracy",
    "Margin": "eval_margin",
}

TRL = Family(
    "trl",
    title="TRL",
    signs=(
        *("grad_norm", "learning_rate", "completion_length", "frac_reward_zero_std", "train_runtime"),
        *("completions/", "clip_ratio/", "eval_loss", "eval_runtime", "eval_samples_per_second"),
        *("eval_steps_per_second", "eval_rewards/", "eval_logps/", "mean_token_accuracy", "num_input_tokens_seen"),
        *("objective/kl", "objective/entropy", "objective/scores", "objective/rlhf_reward", "policy/approxkl_avg"),
        *("objective/non_score_reward", "val/clipfrac_avg", "val/num_eos_tokens", "Training Loss", "Validation Loss"),
        *("memory/max_active (GiB)", "memory/max_allocated (GiB)", "memory/device_reserved (GiB)"),
    ),
    aliases={
        "completion_length": "completions/mean_length",  # before 0.17, and Unsloth
        "Training Loss": "loss",  # the table that a notebook shows
        "Validation Loss": "eval_loss",
        **_NOTEBOOK,
        "num_input_tokens_seen": "num_tokens",
        # PPO
        "objective/scores": "reward",
        "policy/entropy_avg": "entropy",
        "policy/approxkl_avg": "policy/approx_kl",
        "policy/clipfrac_avg": "clip_ratio/region_mean",
        "lr": "learning_rate",
        # Axolotl
        "memory/max_allocated (GiB)": "memory/peak_allocated",
        "memory/max_mem_allocated(gib)": "memory/peak_allocated",
    },
    meanings={
        "clip_ratio": "clip_ratio of TRL before 0.17 counts other tokens than clip_ratio/region_mean does, so it keeps its own name.",
        "objective/kl": "objective/kl is a sum over each sequence, whose length is not logged, so it was not read as kl per token.",
        "objective/entropy": "objective/entropy is a sum over each sequence; entropy was taken from policy/entropy_avg.",
        "policy/entropy_avg": "policy/entropy_avg is a mean over all positions, padding included.",
        "policy/approxkl_avg": "policy/approxkl_avg is half the mean squared difference (k2) over all positions, padding included: smaller than policy/approx_kl of the tokens alone.",
        "memory/max_alloc": "the unit of memory/max_alloc is not known, so it keeps its own name.",
        "memory/max_reserved": "the unit of memory/max_reserved is not known, so it keeps its own name.",
    },
    clocks=frozenset({"episode", "eps"}),
    known=(
        *("objective/", "policy/", "loss/policy_avg", "loss/value_avg", "val/", "sampling/", "cispo_clip_ratio"),
        *("completion_length", "nll_loss", "log_odds_chosen", "log_odds_ratio", "clip_ratio", "predict_", "eval_"),
        *("memory/max_active (GiB)", "memory/device_reserved (GiB)", "memory/max_mem_active(gib)", "memory/max_alloc"),
        *("memory/device_mem_reserved(gib)", "memory/max_reserved", "tokens/", "ppl", "ebft/", "Num Tokens"),
        *("Runtime", "Samples Per Second", "Steps Per Second", "No Log", "tools/"),
    ),
)  # fmt: skip
