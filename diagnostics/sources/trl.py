"""TRL, transformers, Unsloth, Axolotl: our names are theirs, so only old and odd ones stand here.

Not translated on purpose: `clip_ratio` (before 0.17) compared the other way round than today's `clip_ratio/*`;
`objective/kl` and `objective/entropy` (PPO) are sums over a sequence, not per token.
"""

from outspoken.diagnostics.sources.names import Family

TRL = Family(
    "trl",
    title="TRL",
    signs=(
        "grad_norm",
        "learning_rate",
        "completion_length",
        "frac_reward_zero_std",
        "completions/",
        "rewards/",
        "objective/",
        "eval_",
        "train_runtime",
    ),
    aliases={
        "completion_length": "completions/mean_length",  # before 0.17
        "Training Loss": "loss",  # the table that a notebook shows
        "Validation Loss": "eval_loss",
        "num_input_tokens_seen": "num_tokens",
        # PPO
        "objective/scores": "reward",
        "policy/entropy_avg": "entropy",  # mean over all positions, padding included
        "policy/approxkl_avg": "policy/approx_kl",  # k2; near k3 where both are small
        "policy/clipfrac_avg": "clip_ratio/region_mean",
        "lr": "learning_rate",
    },
    clocks=frozenset({"episode", "eps"}),
    known=(
        "objective/",
        "policy/",
        "loss/policy_avg",
        "loss/value_avg",
        "val/",
        "sampling/",
        "cispo_clip_ratio",
        "completion_length",
        "nll_loss",
        "log_odds_chosen",
        "log_odds_ratio",
        "clip_ratio",
        "predict_",
        "eval_",
    ),
)
