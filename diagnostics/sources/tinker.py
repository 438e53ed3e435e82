"""tinker-cookbook: `metrics.jsonl` of its RL, SFT, DPO and distillation recipes.

Not translated on purpose: `optim/kl_sample_train_v2` (half the mean squared difference of log-probabilities, k2, which
is k3 only while the difference is small), `kl_pre_post_*` (the same before and after the update), `num_tokens` (of one
step; ours counts all since the start), `teacher_kl` (k1, so it may be negative).
"""

from collections.abc import Collection

from outspoken.diagnostics.sources.names import Derived, Family


def method_of(names: Collection[str]) -> tuple[str, str] | None:
    if any(name == "teacher_kl" or name.startswith(("teacher_kl/", "sdft/")) for name in names):
        return "distillation", "it logs the divergence from a teacher"
    if "dpo_loss" in names:
        return "dpo", "it logs dpo_loss"
    if any(name.startswith("env/") for name in names):
        return "grpo", "it logs rewards of groups of episodes (Tinker names its policy losses alike)"
    if "train_mean_nll" in names:
        return "sft", "it logs train_mean_nll"
    return None


TINKER = Family(
    "tinker",
    title="Tinker",
    signs=(
        *("env/all/", "optim/kl_sample_train_v1", "optim/kl_sample_train_v2", "optim/entropy", "kl_policy_base"),
        *("progress/batch", "progress/done_frac", "train_mean_nll", "train_mean_bpb", "num_loss_tokens"),
        *("num_sequences", "num_pairs", "teacher_kl", "teacher_kl/", "dpo_loss", "kl_pre_post_v1", "kl_pre_post_v2"),
        *("sampling_client/", "training_client/step", "time/assemble_training_data", "time/compute_kl_sample_train"),
        *("test/nll", "test/env/all/"),
    ),
    aliases={
        "env/all/reward/total": "reward",
        "test/env/all/reward/total": "eval_reward",
        "optim/entropy": "entropy",
        "optim/lr": "learning_rate",
        "kl_policy_base": "kl",
        "optim/kl_sample_train_v1": "sampling/k1",
        "env/all/total_episodes": "num_completions",
        "env/all/by_group/frac_all_good": "groups/all_passed",
        "env/all/by_group/frac_all_bad": "groups/all_failed",
        "async/staleness_mean": "sample/staleness_mean",
        "async/staleness_max": "sample/staleness_max",
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
    meanings={
        "optim/entropy": "optim/entropy is the mean of -log p of the sampled tokens, an estimate of the entropy: compare it within a run only.",
        "optim/kl_sample_train_v1": "optim/kl_sample_train_v1 is k1 of the sampler against the trainer, not of the policy against a reference.",
        "optim/kl_sample_train_v2": "optim/kl_sample_train_v2 is half the mean squared difference (k2), near k3 only while it is small, so it keeps its own name.",
        "kl_policy_base": "kl_policy_base is k1 (mean difference of log-probabilities to the base model), which may be negative.",
        "env/all/by_group/frac_all_bad": "a group whose rewards are all equal is bad below 0.5 and good from there on, whatever the scale of the rewards.",
        "num_tokens": "num_tokens counts the tokens of one step, not all since the start.",
        "sampling_client/step_mean": "staleness is training_client/step minus sampling_client/step.",
    },
    clocks=frozenset({"progress/batch", "progress/done_frac"}),
    known=(
        *("env/", "optim/", "teacher_kl", "teacher_kl/", "sdft/", "time/", "num_", "test/", "sampling_client/"),
        *("training_client/", "async/", "rollout_errors/", "kl_pre_post_v1", "kl_pre_post_v2", "train_mean_bpb"),
        *("loss:sum", "clock_cycle:unique"),
    ),
    derived={
        "groups/zero_std": Derived(("groups/all_passed", "groups/all_failed"), lambda good, bad: min(1.0, good + bad)),
        "completions/mean_length": Derived(
            ("env/all/total_ac_tokens", "num_completions"), lambda tokens, n: tokens / n if n else float("nan")
        ),
        "sample/staleness_mean": Derived(
            ("training_client/step", "sampling_client/step_mean"), lambda step, sampled: step - sampled
        ),
        "sample/staleness_max": Derived(
            ("training_client/step", "sampling_client/step_min"), lambda step, oldest: step - oldest
        ),
    },
    method_of=method_of,
    settings={
        "learning_rate": "learning_rate",
        "max_tokens": "max_completion_length",
        "temperature": "temperature",
        "kl_penalty_coef": "beta",
        "dpo_beta": "beta",
        "dataset_builder.group_size": "num_generations",
        "num_epochs": "num_train_epochs",
        "lr_schedule": "lr_scheduler_type",
        "max_steps": "max_steps",
        "eval_every": "eval_steps",
        "save_every": "save_steps",
    },
)  # fmt: skip
