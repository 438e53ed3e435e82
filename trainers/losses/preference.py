"""Losses of learning from pairs of answers, the better one chosen and the worse one rejected.

Axes: `B` pairs, `A` answers (2B, the chosen ones first), `C` tokens of an answer. `chosen` and `rejected` are
log-ratios log pi(y|x) - log pi_ref(y|x) of whole answers, in nats, (B,); `beta` times a log-ratio is the answer's
implicit reward. `margin` is the difference of the two answers' scores, chosen minus rejected, (B,): plain DPO's scores
are the log-ratios, see `f_divergence_score` for others. Each loss gives one number per pair, (B,).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")

_MAX_EXPONENT = 80.0  # exp(80) is still a float32


# ---------------------------------------------------------------------- losses of the margin


def sigmoid_loss(margin: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO (arXiv 2305.18290): `-log sigmoid(beta margin)`.

    With label smoothing e, the chance that a pair is labelled the wrong way round, it is conservative DPO (Mitchell,
    "A note on DPO with noisy preferences", 2023): `-(1 - e) log sigmoid(beta margin) - e log sigmoid(-beta margin)`.
    """
    return -(1 - label_smoothing) * logsigmoid(beta * margin) - label_smoothing * logsigmoid(-beta * margin)


def hinge_loss(margin: Tensor, beta: float) -> Tensor:
    """`max(0, 1 - beta margin)`: RSO's hinge-norm (arXiv 2309.06657), which is SLiC's (2305.10425) with a reference."""
    return relu(1 - beta * margin)


def ipo_loss(mean_margin: Tensor, beta: float) -> Tensor:
    """IPO (arXiv 2310.12036): `(margin - 1 / (2 beta))^2`; beta is the paper's tau.

    Args:
        mean_margin: difference of the scores per token. The paper does not say that it divides by the length; its
            authors confirmed it to the makers of TRL.
    """
    return (mean_margin - 1 / (2 * beta)) ** 2


def exo_pair_loss(margin: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """EXO for pairs (arXiv 2402.00856): KL(q || p) of two-way distributions, where q(chosen) =
    sigmoid(beta margin) is the policy's and p(chosen) = 1 - e the labels':

        q_w (log q_w - log(1 - e)) + q_l (log q_l - log e)

    Raises:
        ValueError: e is 0, for which the divergence is infinite.
    """
    if not 0 < label_smoothing < 1:
        raise ValueError(
            f"`label_smoothing` is {label_smoothing}, but 'exo_pair' needs it above 0 and below 1; the paper takes 1e-3."
        )
    chosen, rejected = logsigmoid(beta * margin), logsigmoid(-beta * margin)
    return chosen.exp() * (chosen - math.log1p(-label_smoothing)) + rejected.exp() * (
        rejected - math.log(label_smoothing)
    )


def robust_loss(margin: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Robust DPO (arXiv 2403.00409), unbiased under labels flipped with probability e < 1/2:

    `(-(1 - e) log sigmoid(beta margin) + e log sigmoid(-beta margin)) / (1 - 2e)`
    """
    e = label_smoothing
    return (-(1 - e) * logsigmoid(beta * margin) + e * logsigmoid(-beta * margin)) / (1 - 2 * e)


def discopop_loss(margin: Tensor, beta: float, tau: float) -> Tensor:
    """DiscoPOP's log-ratio modulated loss (arXiv 2406.08414), with x = beta margin and m = sigmoid(x / tau):

    `-(1 - m) log sigmoid(x) + m exp(-x)`
    """
    x = beta * margin
    modulation = torch.sigmoid(x / tau)
    # Where exp(-x) would overflow, its factor is 0 already; 0 * inf would be NaN.
    return -(1 - modulation) * logsigmoid(x) + modulation * torch.exp(-x.clamp(min=-_MAX_EXPONENT))


# ---------------------------------------------------------------------- losses of both answers


def nca_pair_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """NCA for pairs (arXiv 2402.05369): each answer is told from noise, with r = beta log-ratio:

    `-log sigmoid(r_w) - 1/2 log sigmoid(-r_w) - 1/2 log sigmoid(-r_l)`
    """
    chosen, rejected = beta * chosen, beta * rejected
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def bco_pair_loss(chosen: Tensor, rejected: Tensor, beta: float, shift: Tensor | float = 0.0) -> Tensor:
    """Binary classifier optimization on pairs (arXiv 2404.04656): `-log sigmoid(r_w - d) - log sigmoid(d - r_l)`.

    Args:
        shift: d, by the paper half the sum of the chosen and the rejected answers' mean rewards beta log-ratio.
    """
    return -logsigmoid(beta * chosen - shift) - logsigmoid(shift - beta * rejected)


def sppo_hard_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """SPPO (arXiv 2405.00675) where the chosen answer always wins: `(c - 1/(2 beta))^2 + (l + 1/(2 beta))^2`;
    beta is the paper's 1 / eta."""
    return (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2


def apo_zero_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """APO-zero (arXiv 2408.06266): `1 - sigmoid(beta c) + sigmoid(beta l)`. Chosen up, rejected down: for chosen
    answers that are better than the model's own."""
    return torch.sigmoid(-beta * chosen) + torch.sigmoid(beta * rejected)


def apo_down_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """APO-down (arXiv 2408.06266): `sigmoid(beta c) + 1 - sigmoid(beta (c - l))`. Both down, rejected further:
    for chosen answers that are worse than the model's own."""
    return torch.sigmoid(beta * chosen) + torch.sigmoid(-beta * (chosen - rejected))


# ---------------------------------------------------------------------- losses of the batch's distribution


def aot_loss(margins: Tensor, ref_margins: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """AOT for pairs (arXiv 2406.05882): the policy's margins shall dominate the reference's as distributions, so the
    i-th smallest of one is compared with the i-th smallest of the other.

    `sigmoid_loss` of the differences of the sorted values. They are sorted within the batch that is given, here and in
    TRL a micro-batch on one device; with a single pair it is DPO.

    Args:
        margins: log pi(y_w|x) - log pi(y_l|x), (B,).
        ref_margins: the same of the reference, (B,).
    """
    return sigmoid_loss(margins.sort().values - ref_margins.sort().values, beta, label_smoothing)


def aot_unpaired_loss(chosen: Tensor, rejected: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """AOT without pairs (arXiv 2406.05882): the chosen log-ratios shall dominate the rejected ones as distributions.
    Sorted and compared as in `aot_loss`."""
    return sigmoid_loss(chosen.sort().values - rejected.sort().values, beta, label_smoothing)


# ---------------------------------------------------------------------- what the losses are made of


def f_divergence_score(log_ratios: Tensor, divergence: str = "reverse_kl", alpha: float = 0.5) -> Tensor:
    """f'(u) at u = exp(log-ratio), up to a constant: what replaces the log-ratio where the policy is held to the
    reference by another divergence than KL(pi || pi_ref) (f-DPO, arXiv 2309.16240).

        reverse_kl           log u
        forward_kl           1 - 1 / u
        js_divergence        log(2 u / (1 + u))
        alpha_divergence     (u^(alpha - 1) - 1) / (alpha - 1), which is log u at alpha = 1

    Args:
        alpha: 1 - alpha of the paper, as in TRL: 0 is the forward and 1 the reverse KL.
    """
    if divergence == "alpha_divergence" and abs(alpha - 1) >= 1e-6:
        power = alpha - 1
        return torch.expm1((power * log_ratios).clamp(max=_MAX_EXPONENT)) / power
    if divergence in ("reverse_kl", "alpha_divergence"):
        return log_ratios
    if divergence == "forward_kl":
        return -torch.expm1((-log_ratios).clamp(max=_MAX_EXPONENT))
    if divergence == "js_divergence":
        return math.log(2) + logsigmoid(log_ratios)
    raise ValueError(f"`f_divergence_type` is {divergence!r}; use one of {', '.join(map(repr, F_DIVERGENCES))}.")


def length_margin(chosen_lengths: Tensor, rejected_lengths: Tensor, alpha: float, beta: float) -> Tensor:
    """What R-DPO (arXiv 2403.19159) adds to the margin, (B,): `alpha / beta (|y_w| - |y_l|)`.

    The reward is charged alpha for each token, so of two answers the longer must be better by more.

    Args:
        chosen_lengths, rejected_lengths: tokens, (B,).
    """
    return alpha / beta * (chosen_lengths - rejected_lengths)


def dpop_penalty(chosen: Tensor, weight: float) -> Tensor:
    """What DPO-Positive (arXiv 2402.13228) takes off the margin, (B,): `weight max(0, -c)`.

    It keeps the chosen answer from becoming less likely than under the reference.
    """
    return weight * relu(-chosen)


def sequence_logps(logps: Tensor, mask: Tensor, ld_alpha: float | None = None) -> Tensor:
    """Log-probabilities of whole answers, (A,), from those of their tokens, (A, C).

    LD-DPO (arXiv 2409.06411) counts only a share of the tokens by which one answer is longer than its counterpart:
    the sum of the first min(|y_w|, |y_l|) tokens, plus `ld_alpha` times the sum of the others.

    Args:
        mask: (A, C), true where an answer has a token.
        ld_alpha: in [0, 1]; None or 1 counts all tokens.
    """
    if ld_alpha is None:
        return (logps * mask).sum(1)
    lengths = mask.sum(1)
    shared = torch.minimum(*lengths.chunk(2)).repeat(2)
    beyond = mask.cumsum(1) > shared.unsqueeze(1)
    return (logps * mask * torch.where(beyond, ld_alpha, 1.0)).sum(1)


def wpo_weights(logps: Tensor, log_sum_sq_probs: Tensor, mask: Tensor) -> Tensor:
    """Weights of pairs (WPO, arXiv 2406.11827, with the paper's weight alignment), (B,), without gradient: how likely the
    policy is to write both answers, which makes old data look as if sampled from it.

    `w(y_w) w(y_l)`, with `w(y)` the exponential of the mean over tokens of `log pi(y_t) - log sum_v pi(v)^2`.

    Args:
        logps, log_sum_sq_probs, mask: (A, C), of the answers' tokens.
    """
    with torch.no_grad():
        aligned = ((logps - log_sum_sq_probs) * mask).sum(1) / mask.sum(1).clamp(min=1)
        chosen, rejected = aligned.exp().chunk(2)
        return chosen * rejected


# ---------------------------------------------------------------------- by name


@dataclass
class Pairs:
    """What the losses compare: B pairs of answers, the chosen ones in the first half of each (2B,) tensor.

    Attributes:
        logps, ref_logps: log-probabilities of the answers under policy and reference, in nats, (2B,).
        lengths: scored tokens of the answers, (2B,).
        args: the `DPOConfig`.
        shift: of the rewards, for BCO.
    """

    logps: Tensor
    ref_logps: Tensor
    lengths: Tensor
    args: Any
    shift: Tensor | float = 0.0

    @cached_property
    def log_ratios(self) -> tuple[Tensor, Tensor]:
        """log pi - log pi_ref of the chosen and of the rejected answers, each (B,)."""
        chosen, rejected = (self.logps - self.ref_logps).chunk(2)
        return chosen, rejected

    @cached_property
    def scores(self) -> Tensor:
        """What the answers are compared by, (2B,): the log-ratios, or those of another divergence than reverse KL."""
        args = self.args
        return f_divergence_score(self.logps - self.ref_logps, args.f_divergence_type, args.f_alpha_divergence_coef)

    @cached_property
    def margin(self) -> Tensor:
        """Chosen minus rejected score, (B,), with the terms of R-DPO and DPO-Positive where they are on."""
        args = self.args
        chosen, rejected = self.scores.chunk(2)
        margin = chosen - rejected
        if args.length_alpha:
            chosen_lengths, rejected_lengths = self.lengths.chunk(2)
            margin = margin + length_margin(chosen_lengths, rejected_lengths, args.length_alpha, args.beta)
        if args.dpop_lambda:
            margin = margin - dpop_penalty(self.log_ratios[0], args.dpop_lambda)
        return margin

    @cached_property
    def mean_margin(self) -> Tensor:
        """Chosen minus rejected score per token, (B,)."""
        chosen, rejected = (self.scores / self.lengths.clamp(min=1)).chunk(2)
        return chosen - rejected

    @property
    def policy_margins(self) -> tuple[Tensor, Tensor]:
        """log pi(chosen) - log pi(rejected) of policy and reference, each (B,)."""
        policy, reference = (chosen - rejected for chosen, rejected in (self.logps.chunk(2), self.ref_logps.chunk(2)))
        return policy, reference


# `loss_type` -> losses of B pairs, (B,), read from pairs and config. ("sft" is not among them: it is a sum over tokens.)
PAIR_LOSSES: dict[str, Callable[[Pairs, Any], Tensor]] = {
    "sigmoid": lambda p, args: sigmoid_loss(p.margin, args.beta, args.label_smoothing),
    "hinge": lambda p, args: hinge_loss(p.margin, args.beta),
    "ipo": lambda p, args: ipo_loss(p.mean_margin, args.beta),
    "exo_pair": lambda p, args: exo_pair_loss(p.margin, args.beta, args.label_smoothing),
    "nca_pair": lambda p, args: nca_pair_loss(*p.log_ratios, args.beta),
    "robust": lambda p, args: robust_loss(p.margin, args.beta, args.label_smoothing),
    "bco_pair": lambda p, args: bco_pair_loss(*p.log_ratios, args.beta, p.shift),
    "sppo_hard": lambda p, args: sppo_hard_loss(*p.log_ratios, args.beta),
    "aot": lambda p, args: aot_loss(*p.policy_margins, args.beta, args.label_smoothing),
    "aot_unpaired": lambda p, args: aot_unpaired_loss(*p.log_ratios, args.beta, args.label_smoothing),
    "apo_zero": lambda p, args: apo_zero_loss(*p.log_ratios, args.beta),
    "apo_down": lambda p, args: apo_down_loss(*p.log_ratios, args.beta),
    "discopop": lambda p, args: discopop_loss(p.margin, args.beta, args.discopop_tau),
    "sigmoid_norm": lambda p, args: sigmoid_loss(p.mean_margin, args.beta, args.label_smoothing),
}
