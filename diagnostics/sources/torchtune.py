"""torchtune: `log_<seconds>.txt` or `.jsonl` of its DiskLogger, or the trackers that its recipes write to.

Not translated on purpose: `approx_policy_kl` (k2 over all positions, padding included), `ratios` (1 by construction in
its linear GRPO loss), `num_stop_tokens` (a count of a batch whose size is not logged), percentages of its async recipe.
"""

from collections.abc import Collection

from outspoken.diagnostics.sources.names import Derived, Family

_ASYNC = ("train_worker_training/", "train_actor_training/")  # the async recipe's prefixes, new and old


def method_of(names: Collection[str]) -> tuple[str, str] | None:
    bare = {name.rpartition("/")[2] if name.startswith(_ASYNC) else name for name in names}
    if bare & {"value_loss", "rlhf_reward", "kl_reward"}:
        return "ppo", "it logs a value function's loss or a reward after the KL penalty"
    if "log_probs/chosen" in bare or "rewards/chosen" in bare:
        return "dpo", "it logs rewards or log-probabilities of chosen and rejected answers"
    if "successes" in bare or "kl_loss" in bare or any(name.startswith(_ASYNC) for name in names):
        return "grpo", "it logs rewards of sampled completions and no value function"
    if "kd_loss" in bare:
        return "distillation", "it logs the loss against a teacher"
    if "tokens_per_second_per_gpu" in bare:
        return "sft", "it logs a loss and no rewards"
    return None


TORCHTUNE = Family(
    "torchtune",
    title="torchtune",
    signs=(
        *("tokens_per_second_per_gpu", "peak_memory_active", "peak_memory_alloc", "peak_memory_reserved"),
        *("log_probs/chosen", "log_probs/rejected", "approx_policy_kl", "num_stop_tokens", "rlhf_reward", "kl_reward"),
        *("response_lengths", "successes", "queues/train_worker_policy_age_mean", "train_worker_training/"),
        *("train_worker_performance/", "postprocessing_worker_rewards/", "postprocessing_worker_performance/"),
        *("datacollector_worker_performance/", "train_actor_training/", "train_actor_performance/"),
        *("ref_actor_rewards/", "ref_actor_performance/"),
    ),
    aliases={
        "kl": "kl_of_sequence",  # a sum; per token below
        "scores": "reward",
        "rewards": "reward",
        "postprocessing_worker_rewards/rewards_mean": "reward",
        "ref_actor_rewards/rewards_mean": "reward",
        "kl_loss": "kl",
        "clipfrac": "clip_ratio/region_mean",
        "response_lengths": "completions/mean_length",
        "log_probs/chosen": "logps/chosen",
        "log_probs/rejected": "logps/rejected",
        "peak_memory_alloc": "memory/peak_allocated",
        "peak_memory_reserved": "memory/peak_reserved",
        "lr": "learning_rate",
        "val_loss": "eval_loss",
        **{
            f"{prefix}{theirs}": ours
            for prefix in _ASYNC
            for theirs, ours in (
                ("loss", "loss"),
                ("kl_loss", "kl"),
                ("grad_norm", "grad_norm"),
                ("clipfrac", "clip_ratio/region_mean"),
                ("response_lengths", "completions/mean_length"),
            )
        },
        "train_worker_performance/total_step_time (s)": "time/step",
        "train_worker_performance/memory/peak_memory_alloc": "memory/peak_allocated",
        "train_worker_performance/memory/peak_memory_reserved": "memory/peak_reserved",
        "queues/train_worker_policy_age_mean": "sample/staleness_mean",
    },
    meanings={
        "kl": "kl of torchtune's PPO is k1 summed over a response; it was divided by response_lengths, where that is logged.",
        "kl_loss": "kl_loss was taken for k3 to the reference in nats per token.",
        "clipfrac": "clipfrac is 0 by construction in torchtune's linear GRPO loss, so a column of zeros counts as not measured.",
        "ratios": "ratios is 1 by construction in torchtune's linear GRPO loss; no rule reads it.",
        "approx_policy_kl": "approx_policy_kl is k2 over all positions, padding included, so it keeps its own name.",
        "num_stop_tokens": "num_stop_tokens counts the responses that ended, of a batch whose size is not logged, so no share was made of it.",
        "peak_memory_alloc": "memory is in GiB; older versions of torchtune wrote units of 10^9 bytes, which reads 7% more.",
    },
    zero_if_off=frozenset({"clipfrac", *(f"{prefix}clipfrac" for prefix in _ASYNC)}),
    known=(
        *("tokens_per_second_per_gpu", "tokens_per_second_per_gpu_trajectory", "tokens_per_second_per_gpu_ppo"),
        *("peak_memory_active", "approx_policy_kl", "ratios", "num_stop_tokens"),
        *("rlhf_reward", "kl_reward", "value_loss", "successes", "kl_of_sequence", "clipfrac", "class_loss", "kd_loss"),
        *("train_worker_training/", "train_worker_performance/", "train_actor_training/", "train_actor_performance/"),
        *("postprocessing_worker_rewards/", "postprocessing_worker_performance/", "queues/", "ref_actor_rewards/"),
        *("datacollector_worker_performance/", "ref_actor_performance/", "rollout_worker_", "num_tokens_total"),
    ),
    derived={
        "kl": Derived(
            ("kl_of_sequence", "completions/mean_length"), lambda kl, length: kl / length if length > 0 else float("nan")
        ),
    },
    method_of=method_of,
    # Not here: batch_size, which counts rows of a device in SFT and DPO, prompts in GRPO, all rollouts in PPO.
    settings={
        "optimizer.lr": "learning_rate",
        "gradient_accumulation_steps": "gradient_accumulation_steps",
        "epochs": "num_train_epochs",
        "clip_grad_norm": "max_grad_norm",
        "tokenizer.max_seq_len": "max_length",
        "loss.beta": "beta",
        "loss.kl_coeff": "beta",
        "loss.epsilon": "epsilon",
        "log_every_n_steps": "logging_steps",
        "lr_scheduler.num_warmup_steps": "warmup_steps",
        "grpo_samples": "num_generations",
        "max_generated_tokens": "max_completion_length",
        "temperature": "temperature",
        "seed": "seed",
    },
)  # fmt: skip
