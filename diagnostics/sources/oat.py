"""OAT: its learners' and actors' metrics, as they go to W&B and, as a dict, to the console; means over the ranks.

Every name has one of the prefixes `train/`, `actor/`, `eval/` and `misc/`. Not translated on purpose:
`all_zero_rewards_count` and `all_one_rewards_count` (prompts of one rank, and how many it has is not logged),
`sampler_learner_*` and `logprobs_diff_*` (extremes over micro-batches of extremes), `misc/pi_beta_version` (how often
weights were sent, no staleness).
"""

from collections.abc import Collection

from outspoken.diagnostics.sources.names import Derived, Family


def _method(names: Collection[str]) -> tuple[str, str] | None:
    if {"train/critic_loss", "train/vf_clipfrac"} & set(names):
        return "ppo", "it logs a critic's loss"
    if "train/pg_loss" in names:
        return "grpo", "it logs a policy gradient's loss and no critic"
    if "train/rejected_reward" in names:
        return (
            "dpo",
            "it logs rewards of chosen and rejected answers; which of its losses, DPO, IPO, SimPO …, the log does not tell",
        )
    if "train/loss_mean" in names:
        return "sft", "it logs a loss and neither rewards nor pairs"
    return None


def _per(total: float, count: float) -> float:
    return total / count if count > 0 else float("nan")


OAT = Family(
    "oat",
    title="OAT",
    signs=(
        *("misc/", "train/pg_loss", "train/pg_clipfrac", "train/kl3", "train/reg_loss", "train/policy_grad_norm"),
        *("train/learning_round", "train/learn_batch_time", "train/zero_pg_loss_count", "train/sampler_learner_"),
        *("train/all_zero_rewards_count", "train/all_one_rewards_count", "train/kl_sample_train_", "train/adv_"),
        *("actor/rewards", "actor/no_eos_count", "actor/num_data", "actor/response_tok_len", "actor/sampling_"),
        *("actor/generate_time", "actor/verify_time", "eval/rm_win_rate", "eval/elapse", "eval/response_tok_len"),
    ),
    aliases={
        "actor/rewards": "reward",
        "actor/response_tok_len": "completions/mean_length",
        "actor/generate_time": "time/generate",
        "actor/verify_time": "time/score",
        "train/pg_loss": "loss",
        "train/entropy": "entropy",
        "train/policy_grad_norm": "grad_norm",
        "train/pg_clipfrac": "clip_ratio/region_mean",
        "train/kl_sample_train_v1": "sampling/k1",
        "train/kl_sample_train_v2": "sampling/k3",
        "misc/lr": "learning_rate",
        # preference learning and SFT
        "train/loss_mean": "loss",
        "train/chosen_reward": "rewards/chosen",
        "train/rejected_reward": "rewards/rejected",
        "train/reward_margin": "rewards/margins",
        "train/acc_mean": "rewards/accuracies",
        # no accuracy of a reward model
        "eval/accuracy": "eval_score_accuracy",
    },
    meanings={
        "kl3": "kl3 is the k3 estimate summed over a response, so kl was taken as kl3 / actor/response_tok_len.",
        "policy_grad_norm": "policy_grad_norm is the largest of the step's updates, not their mean.",
        "kl_sample_train_v2": "kl_sample_train_v2 (half the mean squared difference) was read as sampling/k3; they agree "
        "where both are small. Only the last pass over the batch is in it.",
        "pg_clipfrac": "pg_clipfrac counts tokens whose clip is active, averaged within each response first.",
        "pg_loss": "pg_loss, kl3 and entropy are those of the last micro-batch; pg_loss was read as the loss.",
        "actor/no_eos_count": "no_eos_count / num_data was read as the share of responses that the cap cut.",
        "all_zero_rewards_count": "all_zero_rewards_count and all_one_rewards_count keep their names: they count prompts "
        "of one rank, and how many it has is not logged.",
        "chosen_reward": "chosen_reward and rejected_reward are those of the last micro-batch; the accuracy and the margin "
        "are means over the round.",
        "misc/vram_allocated": "vram_allocated is the memory in use at that moment, not the peak; it keeps its name.",
    },
    steps=("misc/policy_sgd_step", "misc/global_step"),
    clocks=frozenset(("train/learning_round", "misc/elapse", "misc/prompt_epoch", "misc/query_step")),
    known=(
        *("misc/", "eval_", "actor/sampling_", "actor/no_eos_count", "actor/num_data", "actor/formatted"),
        *("actor/oracle_time", "actor/first_action_win_prob", "actor/init_clash", "actor/selection_time"),
        *(
            "train/kl3",
            "train/reg_loss",
            "train/critic_loss",
            "train/vf_clipfrac",
            "train/adv_",
            "train/learn_batch_time",
        ),
        *("train/all_zero_rewards_count", "train/all_one_rewards_count", "train/zero_pg_loss_count"),
        *("train/logprobs_diff_", "train/sampler_learner_", "train/get_grad_norm_time", "train/get_grad_norm_time_"),
        *("train/zero_pg_loss_count_", "train/policy_grad_norm_", "train/pg_clipfrac_"),  # …_nan, …_inf: counts
    ),
    derived={
        "kl": Derived(("train/kl3", "completions/mean_length"), _per),
        "completions/clipped_ratio": Derived(("actor/no_eos_count", "actor/num_data"), _per),
    },
    method_of=_method,
    settings={
        "learning_rate": "learning_rate",
        "num_samples": "num_generations",
        "generate_max_length": "max_completion_length",
        "temperature": "temperature",
        "top_p": "top_p",
        "beta": "beta",
        "cliprange": "epsilon",
        "num_ppo_epochs": "num_iterations",
        "max_norm": "max_grad_norm",
        "lr_scheduler": "lr_scheduler_type",
        "lr_warmup_ratio": "warmup_ratio",
        "train_batch_size_per_device": "per_device_train_batch_size",
    },
)
