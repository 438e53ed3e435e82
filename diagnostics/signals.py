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
SUPERVISED = ("sft", "reward", "pretrain")
PREFERENCE = ("dpo", "kto", "orpo", "cpo", "simpo", "bco")
REFERENCED = ("dpo", "kto", "bco")  # preference losses with a reference policy
PAIRED = ("dpo", "orpo", "cpo", "simpo")  # a chosen and a rejected answer to each prompt
LABELLED = ("sft", "pretrain", *PREFERENCE)  # single tokens carry the loss
REWARD = ("reward",)
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
    Signal("num_completions", "completions", "completions scored in the step", RL, 0),
    Signal("completions/mean_length", "tokens", "mean completion length", RL, 0),
    Signal("completions/min_length", "tokens", "shortest completion", RL, 0),
    Signal("completions/max_length", "tokens", "longest completion; sits at the cap in healthy runs", RL, 0),
    Signal(
        "completions/clipped_ratio",
        "share of completions",
        "completions that did not end with an end token: cut by max_completion_length",
        RL,
        0,
        1,
        weight="num_completions",
    ),
    Signal("completions/at_cap", "share of completions", "completions as long as the cap", RL, 0, 1, "num_completions"),
    Signal("completions/mean_terminated_length", "tokens", "mean length of those that ended; 0 when none did", RL, 0),
    Signal("completions/min_terminated_length", "tokens", "shortest of those that ended", RL, 0),
    Signal("completions/max_terminated_length", "tokens", "longest of those that ended", RL, 0),
    Signal("completions/p50_terminated_length", "tokens", "median length of those that ended", RL, 0),
    Signal("completions/p99_terminated_length", "tokens", "99th percentile length of those that ended", RL, 0),
    Signal("completions/truncated_reward", "reward", "mean reward of cut completions", RL),
    Signal("completions/terminated_reward", "reward", "mean reward of completions that ended", RL),
    Signal("completions/duplicate_share", "share of completions", "completions equal to another of their group", RL, 0, 1, "num_completions"),
    Signal("prompts/p95_length", "tokens", "95th percentile prompt length", RL, 0),
    # online RL: the update
    Signal("kl", "nats/token", "k3 estimate of the divergence from the reference", RL, impossible=_no_reference, impossible_when="beta=0: no reference model is loaded"),
    Signal("policy/approx_kl", "nats/token", "k3 estimate of the divergence of the new from the sampling policy", RL),
    Signal("clip_ratio/low_mean", "share of tokens", "tokens clipped at 1-epsilon with negative advantage", RL, 0, 1),
    Signal("clip_ratio/high_mean", "share of tokens", "tokens clipped at 1+epsilon_high with positive advantage", RL, 0, 1),
    Signal("clip_ratio/region_mean", "share of tokens", "tokens clipped at either side; 0 when on-policy", RL, 0, 1),
    Signal("clip_ratio/low_min", "share of tokens", "least clipped sequence, low side", RL, 0, 1),
    Signal("clip_ratio/high_max", "share of tokens", "most clipped sequence, high side", RL, 0, 1),
    Signal("log_ratio/p01", "nats", "1st percentile of the token log-ratio new/old", RL),
    Signal("log_ratio/p99", "nats", "99th percentile of the token log-ratio new/old", RL),
    Signal("log_ratio/abs_mean", "nats", "mean absolute token log-ratio new/old", RL, 0),
    Signal("ratio/ess", "1", "effective sample size of the token ratios, as a share", RL, 0, 1),
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
    Signal("time/generate", "s", "sampling completions", RL, 0),
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

# Names with a variable part: prefix, suffix, the row that stands for all of them.
PATTERNS: list[tuple[str, str, Signal]] = [
    ("rewards/", "/mean", Signal("rewards/<function>/mean", "reward", "mean of one reward function", RL)),
    ("rewards/", "/std", Signal("rewards/<function>/std", "reward", "its standard deviation over the batch", RL, 0)),
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
