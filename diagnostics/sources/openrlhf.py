"""OpenRLHF: PPO, GRPO and its kin, DPO, SFT and reward models, as it logs them to W&B, TensorBoard or the console.

The trackers put `train/` or `eval/` before each name; the console writes `Global step N: {…}` without, and its progress
bars short names (`act_loss`, `gen_len`). Two tables, for its reward models log the same names as its DPO: what they
add are the mean and spread of the scores of an evaluation.

Not translated on purpose: `ppo_kl` (k1, where ours is k3); `loss_mean` and `acc_mean` (the mean of a step, in older
versions a running mean that begins at 0); `timing/*` but the whole step, for the parts overlap where it trains
asynchronously; `dynamic_filtering_pass_rate` (between 0 and 100, or up to 100 times the samples of a prompt).
"""

from collections.abc import Collection
from dataclasses import replace

from outspoken.diagnostics.sources.names import Derived, Family

_BOTH = ("", "train/")  # the console has no prefix


def _known(*names: str) -> tuple[str, ...]:
    return (*(prefix + name for prefix in _BOTH for name in names), "eval_")


def _bare(names: Collection[str]) -> set[str]:
    return {name.removeprefix("train/") for name in names}


def _method(names: Collection[str]) -> tuple[str, str] | None:
    bare = _bare(names)
    if bare & {"critic_loss", "critic_lr", "values", "cri", "cri_lr"}:
        return "ppo", "it logs a critic's loss"
    if "group_reward_std" in bare:
        return "grpo", "it logs the spread of rewards within groups, and no critic"
    if bare & {"policy_loss", "act_loss", "actor_lr", "act_lr", "pg", "rollout/reward_mean"}:
        return (
            "grpo",
            "it logs a policy's loss and no critic: a group's or REINFORCE's baseline, the log does not tell",
        )
    if bare & {"gpt_loss"}:
        return "sft", "it logs gpt_loss"
    if "reject_reward" in bare:
        if "nll_loss" in bare or {"eval/eval_loss", "eval/acc_mean"} & set(names):
            return "dpo", "it logs rewards of chosen and rejected answers, and no mean score in an evaluation"
        return (
            "unknown",
            "OpenRLHF logs the same names for DPO and for reward models; the method can be given (--method)",
        )
    return None


_PPO_SIGNS = (
    *("actor_lr", "actor_grad_norm", "critic_lr", "critic_grad_norm", "ppo_clip_ratio", "ppo_kl", "vllm_kl"),
    *("group_reward_std", "response_clip_ratio", "dynamic_filtering_pass_rate", "rollout/reward_mean"),
    *("rollout/reward_std", "rollout/response_length_mean", "rollout/truncated_rate", "rollout/num_samples"),
    *("timing/make_experience", "timing/ppo_train", "timing/broadcast", "response_length", "total_length"),
    *("act_loss", "act_lr", "gen_len", "tot_len", "ent_loss", "cri_lr", "glen", "tlen"),
)
_PAIR_SIGNS = ("reject_reward", "loss_mean", "acc_mean", "gpt_loss")

# its name of a setting, today's dotted one and the flat one before 0.10 -> ours
_SETTINGS = {
    "train.micro_batch_size": "per_device_train_batch_size",
    "micro_train_batch_size": "per_device_train_batch_size",
    "rollout.n_samples_per_prompt": "num_generations",
    "n_samples_per_prompt": "num_generations",
    "rollout.max_new_tokens": "max_completion_length",
    "generate_max_len": "max_completion_length",
    "rollout.temperature": "temperature",
    "temperature": "temperature",
    "rollout.top_p": "top_p",
    "top_p": "top_p",
    "actor.adam.lr": "learning_rate",
    "adam.lr": "learning_rate",
    "actor_learning_rate": "learning_rate",
    "learning_rate": "learning_rate",
    "algo.kl.init_coef": "beta",
    "init_kl_coef": "beta",
    "beta": "beta",
    "eps_clip": "epsilon",
    "actor.max_norm": "max_grad_norm",
    "max_norm": "max_grad_norm",
    "actor.lr_scheduler": "lr_scheduler_type",
    "lr_scheduler": "lr_scheduler_type",
    "lr_warmup_ratio": "warmup_ratio",
    "logger.logging_steps": "logging_steps",
    "logging_steps": "logging_steps",
    "train.num_episodes": "num_train_epochs",
    "num_episodes": "num_train_epochs",
    "actor.entropy_coef": "entropy_coef",
    "entropy_loss_coef": "entropy_coef",
    "aux_loss_coef": "router_aux_loss_coef",
}

OPENRLHF = Family(
    "openrlhf",
    title="OpenRLHF",
    signs=(
        *(prefix + name for prefix in _BOTH for name in (*_PPO_SIGNS, *_PAIR_SIGNS)),
        *("eval/eval_loss", "eval/acc_mean", "eval/eval gpt_loss"),
    ),
    aliases={
        # before the batch is split up, so of all samples alike
        "rollout/reward_mean": "reward",
        "rollout/reward_std": "reward_std",
        "rollout/response_length_mean": "completions/mean_length",
        "rollout/truncated_rate": "completions/clipped_ratio",
        "rollout/num_samples": "num_completions",
        # means over the micro-batches of the training on them
        "reward": "reward",
        "rm": "reward",
        "response_length": "completions/mean_length",
        "gen_len": "completions/mean_length",
        "glen": "completions/mean_length",
        "truncated": "completions/clipped_ratio",
        "response_clip_ratio": "completions/clipped_ratio",
        "group_reward_std": "groups/std_mean",
        "policy_loss": "loss",
        "act_loss": "loss",
        "pg": "loss",
        "ppo_clip_ratio": "clip_ratio/region_mean",
        "vllm_kl": "sampling/k1",
        "entropy_loss": "entropy",
        "ent_loss": "entropy",
        "actor_grad_norm": "grad_norm",
        "actor_lr": "learning_rate",
        "act_lr": "learning_rate",
        "timing/step_total": "time/step",
        # SFT and DPO
        "gpt_loss": "loss",
        "loss": "loss",
        "lr": "learning_rate",
        "acc": "rewards/accuracies",
        "chosen_reward": "rewards/chosen",
        "reject_reward": "rewards/rejected",
        "eval/eval_loss": "eval_loss",
        "eval/eval gpt_loss": "eval_loss",
        "eval/acc_mean": "eval_rewards/accuracies",
    },
    meanings={
        "kl": "kl is OpenRLHF's estimate k1, k2 or k3, whichever --algo.kl.estimator says; it saturates at 10 nats a "
        "token, and may be negative only as k1.",
        "rollout/reward_mean": "Rewards and lengths were taken from rollout/*, the means over all samples, and not "
        "from the means over training batches.",
        "ppo_clip_ratio": "ppo_clip_ratio counts tokens whose clip is active, as clip_ratio/region_mean does.",
        "vllm_kl": "vllm_kl is the k1 estimate of trainer against sampler: it may be negative.",
        "policy_loss": "policy_loss was read as the loss; it has no KL and no entropy term.",
        "actor_grad_norm": "Learning rate and gradient norm are the last of the step, not its mean.",
        "response_clip_ratio": "response_clip_ratio counts responses as long as the cap.",
        "truncated": "truncated was read as the share of responses that the cap cut.",
        "loss_mean": "loss_mean and acc_mean keep their names: they are the mean of the step or, in older versions, a "
        "running mean that begins at 0; the loss read here is of the step's last micro-batch.",
        "dynamic_filtering_pass_rate": "dynamic_filtering_pass_rate keeps its name: newer versions count samples per "
        "prompt, so that it may exceed 100.",
    },
    zero_if_off=frozenset(prefix + name for prefix in _BOTH for name in ("kl", "logprobs_diff")),
    steps=("train/global_step", "global_step"),
    clocks=frozenset(("eval/global_step", "eval/epoch")),
    known=_known(
        *("ppo_kl", "logprobs_diff", "return", "ret", "total_length", "tot_len", "tlen", "score", "generated_samples"),
        *("critic_loss", "critic_lr", "critic_grad_norm", "values", "cri", "cri_lr", "vals", "ptx_loss", "ptx"),
        *("timing/", "rollout/", "dynamic_filtering_pass_rate", "loss_mean", "acc_mean", "nll_loss", "pg", "rm"),
        *("reward", "reward_again", "response_length", "truncated", "response_clip_ratio", "gen_len", "glen"),
    ),
    derived={
        "rewards/margins": Derived(("rewards/chosen", "rewards/rejected"), lambda chosen, rejected: chosen - rejected),
    },
    method_of=_method,
    settings=_SETTINGS,
)

OPENRLHF_REWARD = replace(
    OPENRLHF,
    name="openrlhf_reward",
    title="OpenRLHF (reward model)",
    signs=(
        *(prefix + name for prefix in _BOTH for name in _PAIR_SIGNS),
        *("eval/eval_loss", "eval/acc_mean", "eval/reward_mean", "eval/reward_std"),
    ),
    aliases={
        "loss": "loss",
        "lr": "learning_rate",
        "acc": "accuracy",
        "chosen_reward": "chosen_score",
        "reject_reward": "rejected_score",
        "eval/eval_loss": "eval_loss",
        "eval/acc_mean": "eval_accuracy",
        "eval/reward_mean": "eval_mean_reward",
        "eval/reward_std": "eval_scores/std",
    },
    meanings={"loss_mean": OPENRLHF.meanings["loss_mean"]},
    zero_if_off=frozenset(),
    known=_known("loss_mean", "acc_mean", "chosen_score", "rejected_score"),
    derived={
        "margin": Derived(("chosen_score", "rejected_score"), lambda chosen, rejected: chosen - rejected),
        "mean_reward": Derived(("chosen_score", "rejected_score"), lambda chosen, rejected: (chosen + rejected) / 2),
    },
    method_of=lambda names: (
        "reward",
        "it logs the mean and spread of scores in an evaluation, as its reward models do",
    ),
)
