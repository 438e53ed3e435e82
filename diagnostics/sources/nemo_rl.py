"""NeMo-RL: what its Logger hands to TensorBoard, W&B or MLflow (under `train/`, `validation/`, `timing/`, …), and what
its console prints of it.

Not translated on purpose: `token_mult_prob_error` (mean of e^|difference|, of which the mean difference is only a bound),
`policy_kl_error` and `js_divergence_error` (other directions of the same gap), `probs_ratio*`, and the rewards of its
preference losses, which are not multiplied by beta.
"""

from collections.abc import Collection

from outspoken.diagnostics.sources.names import Derived, Family

_OWN = (
    *("probs_ratio", "probs_ratio_clamped", "probs_ratio_min", "probs_ratio_max", "probs_ratio_clamped_min"),
    *("probs_ratio_clamped_max", "token_mult_prob_error", "policy_kl_error", "js_divergence_error", "is_oob_ratio"),
    *("positive_nll_loss", "num_valid_samples", "num_unmasked_tokens", "global_valid_toks", "global_valid_seqs"),
    *("baseline_reward/pct_0", "baseline_reward/pct_1", "baseline_reward/pct_mixed", "advantages/sum", "buffer_size"),
    *("advantages/mean", "advantages/max", "advantages/min", "wd", "preference_loss", "sft_loss", "draft_loss"),
    *("rewards_chosen_mean", "rewards_rejected_mean", "filtered_reward", "natural_termination_rate", "total_turns"),
    *("avg_turns_per_sample", "max_turns_per_sample", "max_turns_reached_rate", "mean_total_tokens_per_sample"),
    *("mean_env_tokens_per_sample", "mean_prompt_length", "total_num_tokens", "max_seq_mult_prob_error"),
    *("num_masked_seqs", "dynamic_sampling_num_gen_batches", "consumed_samples", "num_mbs"),
)
_OWN_GROUPS = ("total_reward/", "turns_per_sample/", "total_tokens_per_sample/", "env_tokens_per_sample/", "critic/")


def method_of(names: Collection[str]) -> tuple[str, str] | None:
    bare = {name.removeprefix("train/") for name in names}
    if any(name.startswith("critic/") for name in bare) or "critic_loss" in bare:
        return "ppo", "it logs a critic"
    if "preference_loss" in bare:
        return "dpo", "it logs a preference loss"
    if bare & {"gen_kl_error", "baseline_reward/pct_0", "probs_ratio"}:
        return "grpo", "it logs ratios or errors of sampled tokens and no critic"
    if "rewards_chosen_mean" in bare:
        return "reward", "it logs scores of chosen and rejected answers and no preference loss"
    if "loss" in bare and bare & {"num_unmasked_tokens", "global_valid_toks", "num_valid_samples"}:
        return "sft", "it logs a loss over tokens and no rewards"
    return None


def _share(percent: float, reward: float) -> float:
    """A percentage of baselines as a share; NaN where rewards do not lie between 0 and 1, so that 0 and 1 mean nothing."""
    return percent / 100 if 0 <= reward <= 1 else float("nan")


NEMO_RL = Family(
    "nemo_rl",
    title="NeMo-RL",
    signs=(
        *(f"train/{name}" for name in _OWN if name not in ("wd", "total_num_tokens", "sft_loss", "num_mbs")),
        *("train/gen_kl_error", "train/approx_entropy", "train/kl_penalty", "train/sampling_importance_ratio"),
        *("train/mean_gen_tokens_per_sample", "train/avg_trajectory_age", "timing/train/", "timing/validation/"),
        *("gen_kl_error", "token_mult_prob_error", "policy_kl_error", "js_divergence_error", "baseline_reward/pct_0"),
        *("baseline_reward/pct_1", "baseline_reward/pct_mixed", "approx_entropy", "probs_ratio_clamped"),
        *("mean_gen_tokens_per_sample", "performance/tokens_per_sec_per_gpu", "performance/generation_tokens_per_sec"),
        *("train/avg_total_reward", "train/avg_filtered_reward"),
    ),
    aliases={
        "reward": "reward",
        "kl_penalty": "kl",
        "approx_entropy": "entropy",
        "gen_kl_error": "sampling/k3",
        "sampling_importance_ratio": "sampling/importance_sampling_ratio/mean",
        "mean_gen_tokens_per_sample": "completions/mean_length",
        "gen_tokens_per_sample/mean": "completions/mean_length",
        "gen_tokens_per_sample/min": "completions/min_length",
        "gen_tokens_per_sample/max": "completions/max_length",
        "truncation_rate": "completions/clipped_ratio",
        "avg_trajectory_age": "sample/staleness_mean",
        "lr": "learning_rate",
        "validation/val_loss": "eval_loss",
        "validation/loss": "eval_loss",
        "timing/train/total_step_time": "time/step",
        "timing/train/generation": "time/generate",
        "timing/train/checkpointing": "time/save",
        "timing/validation/total_validation_time": "time/eval",
        **{name: name for name in _OWN},  # so that `train/` is cut off and what follows from them finds them
        "avg_total_reward": "reward",  # of its console, where groups are filtered
    },
    meanings={
        "gen_kl_error": "gen_kl_error is k3 of the sampler against the trainer (reference_policy_kl_type=k3), not of the policy against a reference.",
        "kl_penalty": "kl_penalty is the divergence from the reference before its coefficient, k3 unless reference_policy_kl_type says otherwise.",
        "approx_entropy": "approx_entropy is estimated from the sampled tokens: compare it within a run only.",
        "token_mult_prob_error": "token_mult_prob_error is the mean of e to the absolute difference of log-probabilities, which no factor turns into nats.",
        "baseline_reward/pct_0": "baseline_reward/pct_0 and pct_1 are percentages of completions whose baseline is 0 or 1; they were read as groups that all failed or all passed, where the mean reward lies between 0 and 1.",
        "filtered_reward": "filtered_reward is of the groups left after filtering; reward, of all, was taken.",
        "rewards_chosen_mean": "rewards_chosen_mean is a log-ratio or a score without beta, so it keeps its own name.",
        "avg_filtered_reward": "avg_filtered_reward is of the groups left after filtering; avg_total_reward, of all, was taken.",
    },
    zero_if_off=frozenset({"kl_penalty", "train/kl_penalty", "train/positive_nll_loss", "positive_nll_loss"}),
    known=(
        *_OWN,
        *(f"train/{name}" for name in _OWN),
        *_OWN_GROUPS,
        *(f"train/{name}" for name in _OWN_GROUPS),
        *("train/vllm/", "timing/", "performance/", "validation/", "ray/", "train/histogram/", "generation_metrics/"),
        *(f"train/{name}" for name in ("avg_filtered_reward", "critic_loss", "critic_grad_norm", "critic_lr")),
        *("train/critic_clip_frac",),
    ),
    derived={
        "groups/all_failed": Derived(("baseline_reward/pct_0", "reward"), _share),
        "groups/all_passed": Derived(("baseline_reward/pct_1", "reward"), _share),
        "groups/zero_std": Derived(
            ("baseline_reward/pct_0", "baseline_reward/pct_1", "reward"),
            lambda none, all_, reward: _share(min(100.0, none + all_), reward),
        ),
        "rewards/accuracies": Derived(("preference_loss", "accuracy"), lambda _, accuracy: accuracy),
    },
    method_of=method_of,
    # Not here: num_prompts_per_step and train_global_batch_size, which count a whole step, not what a device does.
    settings={
        "grpo.num_generations_per_prompt": "num_generations",
        "ppo.num_generations_per_prompt": "num_generations",
        **{f"{method}.max_num_steps": "max_steps" for method in ("grpo", "ppo", "sft", "dpo", "rm", "distillation")},
        **{f"{method}.seed": "seed" for method in ("grpo", "ppo", "sft", "dpo", "rm", "distillation")},
        "dpo.reference_policy_kl_penalty": "beta",
        "loss_fn.reference_policy_kl_penalty": "beta",
        "loss_fn.ratio_clip_min": "epsilon",
        "loss_fn.ratio_clip_max": "epsilon_high",
        "policy.train_micro_batch_size": "per_device_train_batch_size",
        "policy.max_grad_norm": "max_grad_norm",
        "policy.optimizer.kwargs.lr": "learning_rate",
        "policy.generation.max_new_tokens": "max_completion_length",
        "policy.generation.temperature": "temperature",
        "policy.generation.top_p": "top_p",
    },
)  # fmt: skip
