"""open-instruct: the metrics of its GRPO, supervised and preference trainers, as W&B has them.

Its estimates of the KL are counted from 0: `kl0` is k1, `kl1` is k2, `kl2` is k3, `kl3` is the ratio times k1. Before
that they were `kl`, `kl2`, `kl3`, `kl4`, so that `kl2` and `kl3` mean two things; `kl0` beside them tells which.

Not translated on purpose: `debug/vllm_local_reverse_kl` (weighted by the sampler's probability once too often),
`val/all_zero_reward_groups_ratio` (zero need not be the least reward), `val/truncated_completion_fraction`.
"""

from collections.abc import Collection

from outspoken.diagnostics.sources.names import Derived, Family


def method_of(names: Collection[str]) -> tuple[str, str] | None:
    if any(name in names for name in ("loss/value_avg", "val/clipfrac_avg", "lr_value", "value_optimizer_step")):
        return "ppo", "it logs a value function"
    if any(name.startswith(("objective/", "policy/clipfrac", "val/advantages_")) for name in names):
        return "grpo", "it logs an objective of sampled completions and no value function"
    if "rewards/margin" in names or "rewards/accuracy" in names or "logps/chosen" in names:
        return "dpo", "it logs log-probabilities of chosen and rejected answers"
    if "train_loss" in names:
        return "sft", "it logs train_loss and no rewards"
    return None


OPEN_INSTRUCT = Family(
    "open_instruct",
    title="open-instruct",
    signs=(
        *("objective/verifiable_", "objective/kl0_avg", "objective/kl1_avg", "objective/kl2_avg", "objective/kl3_avg"),
        *("objective/kl_avg", "objective/kl4_avg", "val/stop_rate", "val/sequence_lengths", "val/sequence_lengths_min"),
        *("val/sequence_lengths_max", "val/sequence_lengths_solved", "val/sequence_lengths_unsolved"),
        *("val/advantages_", "val/total_reward_groups", "debug/vllm_", "loss/total_avg", "loss/kl_avg"),
        *("real_batch_size_ratio", "unsolved_batch_size_ratio", "packed_ratio", "batch/filtered_prompts"),
        *("rewards/average", "rewards/accuracy", "rewards/margin", "per_device_tps", "total_tokens_including_padding"),
        *("per_device_tps_including_padding",),
    ),
    aliases={
        "objective/verifiable_reward": "reward",
        "scores": "reward",
        "objective/kl_avg": "kl",  # k1, before they were counted from 0
        "policy/clipfrac_avg": "clip_ratio/region_mean",
        "policy/entropy_avg": "entropy",
        "optim/grad_norm": "grad_norm",
        "loss/grad_norm": "grad_norm",
        "lr": "learning_rate",
        "loss/total_avg": "loss",
        "train_loss": "loss",
        "val/sequence_lengths": "completions/mean_length",
        "val/sequence_lengths_min": "completions/min_length",
        "val/sequence_lengths_max": "completions/max_length",
        "debug/vllm_vs_local_logprob_diff_mean": "sampling/sampling_logp_difference/mean",
        "debug/vllm_vs_local_logprob_diff_max": "sampling/sampling_logp_difference/max",
        "rewards/accuracy": "rewards/accuracies",
        "rewards/margin": "rewards/margins",
    },
    meanings={
        "objective/verifiable_reward": "objective/verifiable_reward, of all completions, was taken for the reward; scores is of the groups left after filtering.",
        "objective/kl2_avg": "objective/kl2_avg is k3 beside kl0_avg (counted from 0) and was read as kl; without kl0_avg it is k2 and keeps its own name.",
        "objective/kl_avg": "objective/kl_avg is k1, which may be negative.",
        "val/stop_rate": "completions/clipped_ratio is 1 - val/stop_rate.",
        "debug/vllm_vs_local_logprob_diff_mean": "the difference to vLLM includes how much the weights changed since sampling.",
        "policy/clipfrac_avg": "policy/clipfrac_avg counts tokens whose clip is active.",
        "debug/vllm_local_reverse_kl": "debug/vllm_local_reverse_kl is weighted by the sampler's probability and keeps its own name.",
    },
    zero_if_off=frozenset(f"objective/kl{i}_avg" for i in range(4)),  # without a reference policy
    steps=("training_step",),
    clocks=frozenset({"episode"}),
    known=(
        *("objective/", "loss/", "policy/", "val/", "debug/", "time/", "batch/", "tools/", "format/", "optim/"),
        *("real_batch_size_ratio", "unsolved_batch_size_ratio", "packed_ratio", "stale_results_dropped", "model_step_"),
        *("learner_mfu", "learner_tokens_per_second_step", "learner_tokens_per_second_overall", "num_total_tokens"),
        *("rewards/average", "per_device_tps", "per_device_tps_including_padding", "total_tokens", "scores"),
        *("total_tokens_including_padding", "reserved_mem_GiB", "allocated_mem_GiB", "policy_optimizer_step"),
        *("actor_tokens_per_second", "actor_mfu", "actor_mbu", "lr_value", "value_optimizer_step"),
    ),
    derived={
        "kl": Derived(("objective/kl0_avg", "objective/kl2_avg"), lambda _, k3: k3),
        "completions/clipped_ratio": Derived(("val/stop_rate",), lambda stopped: 1 - stopped),
    },
    method_of=method_of,
    settings={
        **{
            name: name
            for name in (
                *("learning_rate", "beta", "temperature", "per_device_train_batch_size", "gradient_accumulation_steps"),
                *("max_grad_norm", "num_train_epochs", "lr_scheduler_type", "seed", "weight_decay"),
            )
        },
        "num_samples_per_prompt_rollout": "num_generations",
        "response_length": "max_completion_length",
        "clip_lower": "epsilon",
        "clip_higher": "epsilon_high",
        "num_epochs": "num_iterations",
        "warm_up_steps": "warmup_steps",
        "max_seq_length": "max_length",
        "max_train_steps": "max_steps",
        "dpo_beta": "beta",
        "dpo_config.beta": "beta",
    },
)  # fmt: skip
