"""tinker-cookbook: `metrics.jsonl` of its RL, SFT, DPO and distillation recipes.

`optim/entropy` is the negative mean log-probability of the sampled tokens, an estimate of the entropy;
`num_tokens` counts the tokens of one step, where our `num_tokens` counts all since the start.
"""

from outspoken.diagnostics.sources.names import Derived, Family

TINKER = Family(
    "tinker",
    title="Tinker",
    signs=(
        "env/all/",
        "optim/",
        "progress/batch",
        "progress/done_frac",
        "train_mean_nll",
        "num_loss_tokens",
        "num_sequences",
        "teacher_kl",
        "dpo_loss",
    ),
    aliases={
        "env/all/reward/total": "reward",
        "optim/entropy": "entropy",
        "optim/lr": "learning_rate",
        "kl_policy_base": "kl",  # k1
        "env/all/total_episodes": "num_completions",
        "env/all/by_group/frac_all_good": "groups/all_passed",
        "env/all/by_group/frac_all_bad": "groups/all_failed",
        "train_mean_nll": "loss",
        "test/nll": "eval_loss",
        "dpo_loss": "loss",
        "accuracy": "rewards/accuracies",
        "margin": "rewards/margins",
        "chosen_reward": "rewards/chosen",
        "rejected_reward": "rewards/rejected",
        "num_tokens": "num_tokens_of_step",
        "time/total": "time/step",
        "time/sample": "time/generate",
        "time/run_evals": "time/eval",
        "time/save_checkpoint": "time/save",
    },
    clocks=frozenset({"progress/batch", "progress/done_frac"}),
    known=(
        "env/",
        "optim/",
        "teacher_kl",
        "teacher_kl/",
        "time/",
        "num_",
        "test/",
        "sampling_client/",
        "training_client/",
    ),
    derived={
        "groups/zero_std": Derived(("groups/all_passed", "groups/all_failed"), lambda good, bad: min(1.0, good + bad)),
        "completions/mean_length": Derived(
            ("env/all/total_ac_tokens", "num_completions"), lambda tokens, n: tokens / n if n else float("nan")
        ),
    },
)
