"""The one table of signals: name, unit, range, meaning, who emits it, and when it cannot exist.

Names are TRL's metric names where TRL has one. A signal's share is pooled over the trials that `weight` counts. Where a
method means something else by a name than the others do, `OF_METHOD` has a row of its own for it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Config = Mapping[str, Any]

GRPO = ("grpo",)
RL = ("grpo", "rloo", "ppo", "online_dpo")
SAMPLING = (*RL, "distillation")  # methods that train on what the policy samples
SUPERVISED = ("sft", "reward", "pretrain")
PREFERENCE = ("dpo", "kto", "orpo", "cpo", "simpo", "bco")
REFERENCED = ("dpo", "kto", "bco")  # preference losses with a reference policy
PAIRED = ("dpo", "orpo", "cpo", "simpo")  # a chosen and a rejected answer to each prompt
LABELLED = ("sft", "pretrain", *PREFERENCE)  # single tokens carry the loss
REWARD = ("reward",)
DISTILLATION = ("distillation",)
ALL = (*RL, *SUPERVISED, *PREFERENCE, "distillation", "unknown")
TOKENS = tuple(method for method in ALL if method != "reward")  # methods that predict tokens

PAIRS = "pairs/identical#n"  # the pairs of a step, as the count behind `pairs/identical` tells them
INF = float("inf")


@dataclass(frozen=True)
class Signal:
    """One row of the table. `low` and `high` bound the values that make sense, inclusive."""

    name: str
    unit: str
    meaning: str
    methods: tuple[str, ...] = ALL
    low: float = -INF
    high: float = INF
    weight: str | None = None  # the signal that counts the trials behind a share
    impossible: Callable[[Config], bool] | None = None  # config under which it cannot be emitted
    impossible_when: str = ""  # the same in words


def _no_reference(config: Config) -> bool:
    return config.get("beta") == 0


def _batch_scaled(config: Config) -> bool:
    return config.get("scale_rewards") == "batch" or config.get("multi_objective_aggregation") == "normalize_then_sum"


def _no_clip(config: Config) -> bool:
    return config.get("loss_type") in ("cispo", "sapo", "vespo", "gpg", "reinforce")


def _not_cispo(config: Config) -> bool:
    return config.get("loss_type") != "cispo"


def _not_vespo(config: Config) -> bool:
    return config.get("loss_type") != "vespo"


def _no_dynamic_sampling(config: Config) -> bool:
    return config.get("dynamic_sampling") is not True


def _no_replay(config: Config) -> bool:
    return not config.get("replay_buffer_size")


def _no_vllm(config: Config) -> bool:
    return config.get("use_vllm") is not True


def _no_teacher_data(config: Config) -> bool:
    return bool(config.get("lmbda", 1.0) == 1.0)


def _no_router_loss(config: Config) -> bool:
    return config.get("router_aux_loss_coef") == 0


def _no_kl_term(config: Config) -> bool:
    return config.get("loss_type") == "apo_zero_unpaired"


def _no_cut(config: Config) -> bool:
    return "max_length" in config and config["max_length"] is None


def _no_eval(config: Config) -> bool:
    return str(config.get("eval_strategy", "")) in ("no", "IntervalStrategy.NO")


def on_policy(config: Config) -> bool:
    """Whether the ratio of new to old policy is exactly 1: one pass over each rollout before it is renewed."""
    iterations = config.get("num_iterations")
    per_generation, accumulation = config.get("steps_per_generation"), config.get("gradient_accumulation_steps")
    if not isinstance(per_generation, int) or not isinstance(accumulation, int):
        return False
    return bool(iterations == 1 and per_generation <= accumulation and not config.get("use_vllm"))


_NO_CLIP = "loss_type is one without a clip of the ratio"
_NO_DYNAMIC = "dynamic_sampling=False"
_NO_REPLAY = "replay_buffer_size=0"
_OWN = "use_vllm=False: the policy itself samples"

_ROWS = [
    # every trainer
    Signal("loss", "nats or method's own", "training loss, before any filter; hovers at 0 in group-based RL"),
    Signal("eval_loss", "nats or method's own", "held-out loss", impossible=_no_eval, impossible_when="eval_strategy=no"),
    Signal("grad_norm", "1", "global gradient norm before clipping", low=0),
    Signal("grad_norm_clipped", "1", "global gradient norm after clipping", low=0),
    Signal("grad/zero_share", "share of tensors", "trainable tensors whose gradient is exactly zero", low=0, high=1),
    Signal("grad/nonfinite", "elements", "gradient elements that are not finite", low=0),
    Signal("parameters/nonfinite", "elements", "sampled parameter elements that are not finite", low=0),
    Signal("learning_rate", "1", "learning rate of the step", low=0),
    Signal("epoch", "epochs", "passes over the training data", low=0),
    Signal("num_tokens", "tokens", "tokens seen since the start of the run", low=0),
    Signal("entropy", "nats/token", "policy entropy at the sampling temperature, mean over trained tokens", TOKENS, 0),
    Signal("mean_token_accuracy", "share of tokens", "top-1 agreement with the labels; in preference methods those of the chosen answer", TOKENS, 0, 1),
    Signal("aux_loss", "1", "load-balancing loss of a mixture of experts, before its weight", low=0, impossible=_no_router_loss, impossible_when="router_aux_loss_coef=0"),
    # the labels of supervised and preference training; an answer of a pair counts as a row
    Signal("samples/no_supervised", "share of rows", "rows without one token that carries loss", LABELLED, 0, 1, "samples/no_supervised#n"),
    Signal("samples/supervised_eos", "share of rows", "of the rows with loss, those whose last token with loss ends a text or a turn", LABELLED, 0, 1, "samples/supervised_eos#n"),
    Signal("samples/truncated", "share of rows", "rows cut by max_length", (*LABELLED, "reward"), 0, 1, "samples/truncated#n", _no_cut, "max_length=None: rows are never cut"),
    Signal("tokens/supervised_share", "share of tokens", "non-padding tokens that carry loss", LABELLED, 0, 1, "tokens/supervised_share#n"),
    # online RL: rewards
    Signal("reward", "reward", "mean weighted reward of the completions", RL),
    Signal("reward_std", "reward", "standard deviation of rewards over the whole batch (not per group)", RL, 0),
    Signal(
        "frac_reward_zero_std",
        "share of groups",
        "groups whose rewards are all equal",
        RL,
        0,
        1,
        weight="groups/count",
        impossible=_batch_scaled,
        impossible_when="scale_rewards=batch or normalize_then_sum: it is then computed from the batch, not the groups",
    ),
    Signal("groups/count", "groups", "prompt groups in the step", RL, 0),
    Signal("groups/zero_std", "share of groups", "groups with equal rewards, from the raw rewards", RL, 0, 1, "groups/count"),
    Signal("groups/all_failed", "share of groups", "groups whose rewards are all at the minimum", RL, 0, 1, "groups/count"),
    Signal("groups/all_passed", "share of groups", "groups whose rewards are all at the maximum", RL, 0, 1, "groups/count"),
    Signal("groups/tiny_std", "share of groups", "groups with 0 < std < 2% of the reward range", RL, 0, 1, "groups/count"),
    Signal("groups/std_mean", "reward", "mean within-group standard deviation", RL, 0),
    Signal("groups/attenuation", "1", "mean of std/(std+1e-4): what normalisation leaves of the advantage", RL, 0, 1),
    Signal("rewards/range", "reward", "largest minus smallest reward seen in the run so far", RL, 0),
    Signal("rewards/max_seen", "reward", "largest reward seen in the run so far", RL),
    Signal("rewards/min_seen", "reward", "smallest reward seen in the run so far", RL),
    Signal("rewards/unscored", "share of completions", "completions that no function could score", RL, 0, 1, "num_completions"),
    Signal("advantages/abs_mean", "1", "mean absolute advantage", RL, 0),
    Signal("advantages/zero_share", "share of completions", "completions without advantage", RL, 0, 1, "num_completions"),
    # online RL: completions
    Signal("num_completions", "completions", "completions scored in the step", SAMPLING, 0),
    Signal("completions/mean_length", "tokens", "mean completion length", SAMPLING, 0),
    Signal("completions/min_length", "tokens", "shortest completion", SAMPLING, 0),
    Signal("completions/max_length", "tokens", "longest completion; sits at the cap in healthy runs", SAMPLING, 0),
    Signal(
        "completions/clipped_ratio",
        "share of completions",
        "completions that did not end with an end token: cut by max_completion_length",
        SAMPLING,
        0,
        1,
        weight="num_completions",
    ),
    Signal("completions/at_cap", "share of completions", "completions as long as the cap", SAMPLING, 0, 1, "num_completions"),
    Signal("completions/mean_terminated_length", "tokens", "mean length of those that ended; 0 when none did", SAMPLING, 0),
    Signal("completions/min_terminated_length", "tokens", "shortest of those that ended", SAMPLING, 0),
    Signal("completions/max_terminated_length", "tokens", "longest of those that ended", SAMPLING, 0),
    Signal("completions/p50_terminated_length", "tokens", "median length of those that ended", SAMPLING, 0),
    Signal("completions/p90_terminated_length", "tokens", "90th percentile length of those that ended", SAMPLING, 0),
    Signal("completions/p99_terminated_length", "tokens", "99th percentile length of those that ended", SAMPLING, 0),
    Signal("completions/truncated_reward", "reward", "mean reward of cut completions", RL),
    Signal("completions/terminated_reward", "reward", "mean reward of completions that ended", RL),
    Signal("completions/duplicate_share", "share of completions", "completions equal to another of their group", SAMPLING, 0, 1, "num_completions"),
    Signal("completions/repetition_share", "share of runs of 4 tokens", "runs of 4 tokens that occurred before in the same completion", SAMPLING, 0, 1, "completions/repetition_share#n"),
    Signal("num_prompts", "prompts", "prompts sampled from in the step", SAMPLING, 0),
    Signal("generate/tokens_per_second", "tokens/s", "tokens sampled per second of sampling, all processes together", SAMPLING, 0),
    Signal("sample/staleness_mean", "steps", "update steps between sampling and training on a completion, mean", SAMPLING, 0),
    Signal("sample/staleness_max", "steps", "the same, of the oldest completion", SAMPLING, 0),
    Signal("dynamic_sampling/rounds", "rounds", "how often groups without spread were replaced", GRPO, 0, impossible=_no_dynamic_sampling, impossible_when=_NO_DYNAMIC),
    Signal("dynamic_sampling/replaced_groups", "groups", "groups that were replaced by groups of further prompts", GRPO, 0, impossible=_no_dynamic_sampling, impossible_when=_NO_DYNAMIC),
    Signal("dynamic_sampling/left_share", "share of groups", "groups without spread that are trained on after all rounds", GRPO, 0, 1, "groups/count", _no_dynamic_sampling, _NO_DYNAMIC),
    Signal("dynamic_sampling/sampled_per_trained", "1", "groups sampled for each group trained on", GRPO, 1, impossible=_no_dynamic_sampling, impossible_when=_NO_DYNAMIC),
    Signal("replay/replaced_groups", "groups", "groups replaced by earlier, informative ones", GRPO, 0, impossible=_no_replay, impossible_when=_NO_REPLAY),
    Signal("replay/buffered_groups", "groups", "groups kept to be replayed, on one process", GRPO, 0, impossible=_no_replay, impossible_when=_NO_REPLAY),
    # tools and environments
    Signal("tools/call_frequency", "calls/completion", "calls of tools", SAMPLING, 0),
    Signal("tools/failure_frequency", "share of calls", "calls that answered with an error", SAMPLING, 0, 1),
    Signal("tools/timeout_frac", "share of calls", "calls that did not return in time", SAMPLING, 0, 1),
    Signal("tools/unknown_frac", "share of calls", "calls of tools that are not there", SAMPLING, 0, 1),
    Signal("tools/latency_s", "s", "mean duration of a call", SAMPLING, 0),
    Signal("tools/malformed_frac", "share of turns", "turns that could not be taken apart", SAMPLING, 0, 1),
    Signal("tools/loop_exhausted_frac", "share of completions", "ended because tools had answered as often as they may", SAMPLING, 0, 1),
    Signal("tools/overflow_frac", "share of completions", "ended because a tool's answer did not fit", SAMPLING, 0, 1),
    Signal("rollout/turns_mean", "turns", "turns of the model in a completion, mean", SAMPLING, 0),
    Signal("rollout/turns_max", "turns", "turns of the model in a completion, most", SAMPLING, 0),
    # the sampler beside the trainer
    Signal("sampling/k1", "nats/token", "k1 estimate of the divergence of the trainer's from the sampler's distribution", SAMPLING),
    Signal("sampling/k3", "nats/token", "k3 estimate of the same", SAMPLING, 0),
    Signal("sampling/abs_mean", "nats/token", "mean distance of the trainer's log-probability of a token from the sampler's", SAMPLING, 0),
    Signal("sampling/abs_max", "nats", "largest such distance", SAMPLING, 0),
    Signal("sampling/sampling_logp_difference/mean", "nats/token", "mean distance of the trainer's log-probability of a token from the sampler's", SAMPLING, 0),
    Signal("sampling/sampling_logp_difference/max", "nats", "largest such distance", SAMPLING, 0),
    Signal("sampling/importance_sampling_ratio/min", "1", "smallest importance weight of the trainer over vLLM", GRPO, 0, impossible=_no_vllm, impossible_when=_OWN),
    Signal("sampling/importance_sampling_ratio/mean", "1", "mean importance weight of the trainer over vLLM, after its bounds", GRPO, 0, impossible=_no_vllm, impossible_when=_OWN),
    Signal("sampling/importance_sampling_ratio/max", "1", "largest importance weight of the trainer over vLLM", GRPO, 0, impossible=_no_vllm, impossible_when=_OWN),
    Signal("weights/checksum", "1", "first 48 bits of the digest of the weights pushed to vLLM", SAMPLING, 0, impossible=_no_vllm, impossible_when=_OWN),
    Signal("weights/version", "steps", "update step whose weights were pushed to vLLM", SAMPLING, 0, impossible=_no_vllm, impossible_when=_OWN),
    Signal("weights/push_seconds", "s", "duration of the push of weights", SAMPLING, 0, impossible=_no_vllm, impossible_when=_OWN),
    Signal("weights/compared", "tensors", "weights read back from vLLM and compared", SAMPLING, 0, impossible=_no_vllm, impossible_when=_OWN),
    Signal("weights/differing", "tensors", "of them, those that are not the trained ones", SAMPLING, 0, impossible=_no_vllm, impossible_when=_OWN),
    Signal("prompts/p95_length", "tokens", "95th percentile prompt length", SAMPLING, 0),
    # online RL: the update
    Signal("kl", "nats/token", "k3 estimate of the divergence from the reference", RL, impossible=_no_reference, impossible_when="beta=0: no reference model is loaded"),
    Signal("policy/approx_kl", "nats/token", "k3 estimate of the divergence of the new from the sampling policy", RL),
    Signal("clip_ratio/low_mean", "share of tokens", "tokens clipped at 1-epsilon with negative advantage", RL, 0, 1, impossible=_no_clip, impossible_when=_NO_CLIP),
    Signal("clip_ratio/high_mean", "share of tokens", "tokens clipped at 1+epsilon_high with positive advantage", RL, 0, 1, impossible=_no_clip, impossible_when=_NO_CLIP),
    Signal("clip_ratio/region_mean", "share of tokens", "tokens clipped at either side; 0 when on-policy", RL, 0, 1, impossible=_no_clip, impossible_when=_NO_CLIP),
    Signal("clip_ratio/low_min", "share of tokens", "least clipped sequence, low side", RL, 0, 1, impossible=_no_clip, impossible_when=_NO_CLIP),
    Signal("clip_ratio/high_max", "share of tokens", "most clipped sequence, high side", RL, 0, 1, impossible=_no_clip, impossible_when=_NO_CLIP),
    Signal("cispo_clip_ratio", "share of tokens", "tokens with positive advantage whose weight is capped", GRPO, 0, 1, impossible=_not_cispo, impossible_when="loss_type is not cispo"),
    Signal("vespo/phi_seq_mean", "1", "mean weight of a completion's gradient", GRPO, 0, impossible=_not_vespo, impossible_when="loss_type is not vespo"),
    Signal("policy_loss", "method's own", "loss without the entropy bonus", GRPO),
    Signal("entropy_coef", "1", "weight of the entropy bonus", GRPO, 0),
    Signal("log_ratio/p01", "nats", "1st percentile of the token log-ratio new/old", RL),
    Signal("log_ratio/p99", "nats", "99th percentile of the token log-ratio new/old", RL),
    Signal("log_ratio/abs_mean", "nats", "mean absolute token log-ratio new/old", RL, 0),
    Signal("ratio/ess", "1", "effective sample size of the token ratios, as a share", RL, 0, 1),
    # distillation: a student against its teacher, at the tokens trained on
    Signal("distillation/divergence", "nats/token", "the divergence that is minimised", DISTILLATION, 0),
    Signal("distillation/reverse_kl", "nats/token", "KL(student || teacher)", DISTILLATION, 0),
    Signal("distillation/forward_kl", "nats/token", "KL(teacher || student)", DISTILLATION, 0),
    Signal("distillation/teacher_entropy", "nats/token", "entropy of the teacher", DISTILLATION, 0),
    Signal("distillation/top1_agreement", "share of tokens", "tokens whose likeliest continuation is the same for both", DISTILLATION, 0, 1),
    Signal("distillation/on_policy", "share of batches", "generation batches that the student sampled", DISTILLATION, 0, 1, impossible=_no_teacher_data, impossible_when="lmbda=1: all are"),
    # preference: a policy against its reference, on answers to the same prompts
    Signal("rewards/chosen", "nats", "beta times the log-ratio of the chosen (desirable) answer to the reference, mean over answers", PREFERENCE),
    Signal("rewards/rejected", "nats", "beta times the log-ratio of the rejected (undesirable) answer to the reference, mean over answers", PREFERENCE),
    Signal("rewards/margins", "nats", "rewards/chosen minus rewards/rejected: in units of beta, and rising also while both answers lose probability", PREFERENCE),
    Signal("rewards/accuracies", "share of pairs", "pairs with a positive margin; ties, as before the first update, count as wrong", PAIRED, 0, 1, PAIRS),
    Signal("logps/chosen", "nats/sequence", "log-probability of the chosen (desirable) answer, mean over answers", PREFERENCE),
    Signal("logps/rejected", "nats/sequence", "log-probability of the rejected (undesirable) answer, mean over answers", PREFERENCE),
    Signal("logits/chosen", "1", "mean logit over vocabulary and tokens of the chosen (desirable) answers", PREFERENCE),
    Signal("logits/rejected", "1", "mean logit over vocabulary and tokens of the rejected (undesirable) answers", PREFERENCE),
    Signal("shift/chosen", "nats/token", "log-probability that a token of the chosen answers gained since the reference, mean over tokens", REFERENCED),
    Signal("shift/rejected", "nats/token", "log-probability that a token of the rejected answers gained since the reference, mean over tokens", REFERENCED),
    Signal("reference/initial_gap", "nats/token", "largest mean per-token distance of an answer from the reference before the first update: 0 if the policy starts as its reference", REFERENCED, 0),
    Signal("rewards/length_correlation", "1", "correlation of the margin with the pair's difference in length over the last 512 pairs; in KTO of reward and length over answers", REFERENCED, -1, 1),
    Signal("samples/desirable", "share of rows", "rows whose answer is labelled desirable", ("kto", "bco"), 0, 1, "samples/desirable#n"),
    # pairs of answers, in preference training and in reward models
    Signal("lengths/chosen", "tokens", "mean length of the chosen (desirable) answers", (*PREFERENCE, "reward"), 0),
    Signal("lengths/rejected", "tokens", "mean length of the rejected (undesirable) answers", (*PREFERENCE, "reward"), 0),
    Signal("pairs/identical", "share of pairs", "pairs whose two answers are the same tokens", (*PAIRED, "reward"), 0, 1, PAIRS),
    # reward models
    Signal("accuracy", "share of pairs", "pairs whose chosen answer scores higher than the rejected one", REWARD, 0, 1, PAIRS),
    Signal("margin", "score", "score of the chosen minus the rejected answer, mean over pairs", REWARD),
    Signal("mean_reward", "score", "mean score of all answers, chosen and rejected; free to drift, for only differences are trained", REWARD),
    Signal("min_reward", "score", "lowest score of a batch; averaged over the batches of a log interval", REWARD),
    Signal("max_reward", "score", "highest score of a batch; averaged over the batches of a log interval", REWARD),
    Signal("scores/mean", "score", "mean score of the step's answers", REWARD),
    Signal("scores/std", "score", "standard deviation of the scores of the step's answers", REWARD, 0),
    Signal("scores/length_correlation", "1", "correlation of an answer's score with its length over the last 512 pairs", REWARD, -1, 1),
    # memory, in GiB
    Signal("memory/device_used", "GiB", "device memory in use by all processes (NVML)", low=0),
    Signal("memory/device_total", "GiB", "device memory in all (NVML)", low=0),
    Signal("memory/utilization", "share", "peak reserved by this process, or NVML's used, of the device's total", low=0, high=1),
    Signal("memory/peak_allocated", "GiB", "peak of tensors alive since the last step", low=0),
    Signal("memory/peak_reserved", "GiB", "peak held by torch's caching allocator", low=0),
    Signal("memory/static", "GiB", "allocated after the optimizer step: weights, gradients, optimizer state", low=0),
    Signal("memory/alloc_retries", "count", "allocations that succeeded only after the cache was flushed, so far", low=0),
    Signal("memory/host_rss", "GiB", "resident memory of this process and its children", low=0),
    Signal("memory/host_available", "GiB", "memory the host can still give", low=0),
    Signal("memory/cgroup_used", "GiB", "memory charged to the container", low=0),
    Signal("memory/cgroup_limit", "GiB", "memory limit of the container", low=0),
    # time, in seconds of the step
    Signal("step_time", "s", "forward and backward time of the step as TRL measures it", low=0),
    Signal("time/step", "s", "wall-clock of the whole step", low=0),
    Signal("time/data", "s", "waiting for the data loader", low=0),
    Signal("time/generate", "s", "sampling completions", SAMPLING, 0),
    Signal("time/score", "s", "reward functions and reward models", RL, 0),
    Signal("time/forward_backward", "s", "forward and backward passes", low=0),
    Signal("time/optimizer", "s", "clipping and optimizer step", low=0),
    Signal("time/save", "s", "writing checkpoints", low=0),
    Signal("time/eval", "s", "evaluation", low=0),
    Signal("time/diagnostics", "s", "this library's own work", low=0),
]  # fmt: skip

SIGNALS: dict[str, Signal] = {row.name: row for row in _ROWS}

# Names that a method uses for something else than the row above: (method, name) -> its row.
OF_METHOD: dict[tuple[str, str], Signal] = {
    ("kto", row.name): row
    for row in [
        Signal("kl", "nats/sequence", "mean log-ratio of unrelated answers to the reference, not below 0: the point from which KTO counts gain and loss; no divergence per token", ("kto",), 0, impossible=_no_kl_term, impossible_when="loss_type=apo_zero_unpaired: the loss has no such term, and TRL logs 0"),
    ]
}  # fmt: skip

OF_METHOD |= {
    ("rloo", row.name): row
    for row in [
        Signal("kl", "nats/token", "k1 estimate of the divergence from the reference, taken off the rewards; may be negative", ("rloo",), impossible=_no_reference, impossible_when="beta=0: no reference model is loaded"),
        *(
            Signal(f"clip_ratio/{name}", "share of completions", meaning, ("rloo",), 0, 1, impossible=_no_clip, impossible_when=_NO_CLIP)
            for name, meaning in (
                ("low_mean", "completions clipped at 1-epsilon with negative advantage"),
                ("high_mean", "completions clipped at 1+epsilon_high with positive advantage"),
                ("region_mean", "completions clipped at either side; 0 when on-policy"),
                ("low_min", "1 if all completions of a batch are clipped on the low side"),
                ("high_max", "1 if one completion of a batch is clipped on the high side"),
            )
        ),
    ]
}  # fmt: skip

# Names with a variable part: prefix, suffix, the row that stands for all of them.
PATTERNS: list[tuple[str, str, Signal]] = [
    ("rewards/", "/mean", Signal("rewards/<function>/mean", "reward", "mean of one reward function", RL)),
    ("rewards/", "/std", Signal("rewards/<function>/std", "reward", "its standard deviation over the batch", RL, 0)),
    ("rewards/", "/variance_share", Signal("rewards/<function>/variance_share", "share of variance", "of the differences within groups, those that one reward function makes; negative if it works against the others", RL)),
    ("rewards/", "/seconds", Signal("rewards/<function>/seconds", "s", "duration of its last call, repetitions included", RL, 0)),
    ("rewards/", "/failures", Signal("rewards/<function>/failures", "calls", "calls that failed for good and were left out, so far", RL, 0)),
    ("rewards/", "/none_share", Signal("rewards/<function>/none_share", "share of completions", "not scorable by it", RL, 0, 1, "num_completions")),
    ("accuracy/", "", Signal("accuracy/<score>", "share of pairs", "accuracy of one score of several", REWARD, 0, 1, PAIRS)),
    ("margin/", "", Signal("margin/<score>", "score", "margin of one score of several", REWARD)),
    ("mean_reward/", "", Signal("mean_reward/<score>", "score", "mean of one score of several", REWARD)),
    ("min_reward/", "", Signal("min_reward/<score>", "score", "lowest value of one score of several", REWARD)),
    ("max_reward/", "", Signal("max_reward/<score>", "score", "highest value of one score of several", REWARD)),
]  # fmt: skip


def lookup(name: str, method: str | None = None) -> Signal | None:
    """The table's row for a signal, as `method` means it; None if it is not ours.

    `eval_` names are found under their training name.
    """
    row = OF_METHOD.get((method, name)) if method is not None else None
    row = row or SIGNALS.get(name)
    if row is None:
        for prefix, suffix, pattern in PATTERNS:
            if name.startswith(prefix) and name.endswith(suffix) and len(name) > len(prefix) + len(suffix):
                return pattern
        if name.startswith("eval_"):
            return lookup(name.removeprefix("eval_"), method)
    return row


def impossible(name: str, method: str, config: Config) -> bool:
    """Whether a signal cannot be emitted by this method under this configuration."""
    row = lookup(name, method)
    if row is None:
        return False
    if method != "unknown" and method not in row.methods and (method in ALL or "unknown" not in row.methods):
        return True
    return row.impossible is not None and row.impossible(config)


def weight_of(name: str) -> str | None:
    """The signal that counts the trials behind a share; an evaluation's are not those of the training step."""
    if name.startswith("eval_") and name not in SIGNALS:
        weight = weight_of(name.removeprefix("eval_"))
        return None if weight is None else f"eval_{weight}"
    row = lookup(name)
    return row.weight if row is not None else None


def implied_trials(name: str, config: Config) -> float | None:
    """Trials behind one logged point of a share, as the config implies them; None if it does not."""
    weight = weight_of(name)
    batch, group = config.get("generation_batch_size"), config.get("num_generations")
    if weight == PAIRS or (batch is None and weight in ("num_completions", "groups/count")):
        size, accumulation = config.get("per_device_train_batch_size"), config.get("gradient_accumulation_steps")
        if isinstance(size, int) and isinstance(accumulation, int):
            batch = size * accumulation * int(config.get("world_size") or 1)
    if not isinstance(batch, int) or batch <= 0:
        return None
    per_log = int(config.get("points_per_log") or 1)  # steps, or generation batches, averaged in one logged point
    if weight in ("num_completions", PAIRS):
        return float(batch * per_log)
    if weight == "groups/count" and isinstance(group, int) and group > 0:
        return batch * per_log / group
    return None
