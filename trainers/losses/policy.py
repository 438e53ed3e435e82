"""Policy-gradient losses on sampled completions: pure functions of log-probabilities, advantages and masks.

Axes: `N` completions, `T` completion tokens. A mask is 1 on the tokens that the loss may use and 0 elsewhere. Where the
importance ratio is one number per completion, the tensors are (N, 1) and broadcast over `T`. Advantages are (N, 1), or
(N, T) where each token has its own. Log-probabilities, divergences and entropies are in nats.

A policy loss has three parts, chosen apart from each other: the importance weights, the loss of each token, and how the
token losses become one number (`POLICY_LOSSES`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Importance weights

IMPORTANCE_LEVELS = ("token", "sequence", "sequence_token")


def importance_log_weights(log_ratio: Tensor, mask: Tensor, level: str = "token") -> Tensor:
    """Log of the importance weights from per-token log-ratios `log pi_theta - log pi_old`, (N, T).

    `"token"`: one weight a token, (N, T): PPO and GRPO. `"sequence"`: the mean log-ratio over the completion's tokens,
    i.e. the length-normalised sequence ratio `s_i` of GSPO (arXiv 2507.18071), (N, 1). `"sequence_token"`: GSPO-token
    of the same paper, `sg[s_i] pi_t / sg[pi_t]`, (N, T): in value the sequence's weight, in gradient the token's own,
    so that tokens may have advantages of their own (`sg` stops the gradient).

    Raises:
        ValueError: another level.
    """
    if level == "token":
        return log_ratio
    if level not in IMPORTANCE_LEVELS:
        raise ValueError(f"importance_sampling_level is {level!r}; use 'token', 'sequence' or 'sequence_token'.")
    sequence = _mean_by_sequence(log_ratio, mask)
    if level == "sequence":
        return sequence
    # The gradient of log_ratio is that of log pi_theta.
    return sequence.detach() + (log_ratio - log_ratio.detach())


# The loss of a token


def clipped_surrogate(
    ratio: Tensor,
    advantages: Tensor,
    epsilon_low: float,
    epsilon_high: float,
    delta: float | None = None,
    dual_clip: float | None = None,
) -> Tensor:
    """`-min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A)`, elementwise: PPO's clip (arXiv 1707.06347), with the upper
    bound raised on its own in DAPO (arXiv 2503.14476).

    For A < 0 this is without bound as rho grows. Two methods bound it, by the same values where both numbers are equal
    and larger than `1 + epsilon_high`: `delta` replaces the unclipped branch by `min(rho, delta) A` (two-sided
    clipping, arXiv 2505.07291), `dual_clip` takes `max(. , c A)` of the objective where A < 0 (dual-clip PPO, arXiv
    1912.09729).

    Args:
        ratio: importance weights, (N, T) or (N, 1).
        advantages: (N, 1) or (N, T).
    """
    clipped = ratio.clamp(1 - epsilon_low, 1 + epsilon_high)
    if delta is not None:
        ratio = ratio.clamp(max=delta)
    objective = torch.min(ratio * advantages, clipped * advantages)
    if dual_clip is not None:
        objective = torch.where(advantages < 0, torch.max(objective, dual_clip * advantages), objective)
    return -objective


def reinforce(logps: Tensor, advantages: Tensor) -> Tensor:
    """`-A log pi`, (N, T): the policy gradient itself (Williams 1992), for data of the current policy. What GPG
    (arXiv 2504.02546), ReMax (arXiv 2310.10505), OPO (arXiv 2505.23585) and RLOO as published (arXiv 2402.14740) use.
    """
    return -advantages * logps


def cispo(ratio: Tensor, logps: Tensor, advantages: Tensor, epsilon_high: float) -> Tensor:
    """`-sg[min(rho, eps_high)] A log pi`, (N, T): the weight is capped, no token loses its gradient (CISPO, arXiv
    2506.13585).

    `epsilon_high` is the cap itself (as in ScaleRL, arXiv 2510.13786, which takes 5), not its distance from 1: a
    cap below 1 only scales every gradient down.
    """
    return -ratio.detach().clamp(max=epsilon_high) * advantages * logps


def sapo(ratio: Tensor, advantages: Tensor, temperature_pos: float = 1.0, temperature_neg: float = 1.05) -> Tensor:
    """`-(4 / tau) sigmoid(tau (rho - 1)) A`: a soft gate in place of the clip (SAPO, arXiv 2511.20347).

    `tau` is `temperature_pos` where A > 0 and `temperature_neg` elsewhere. At rho = 1 the gradient is that of `-rho A`;
    the further from it and the higher `tau`, the weaker.
    """
    tau = _by_sign(advantages > 0, temperature_pos, temperature_neg, advantages)
    return -torch.sigmoid(tau * (ratio - 1)) * 4 / tau * advantages


def vespo(
    log_ratio: Tensor,
    logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    sampler_weights: Tensor | None = None,
    k_pos: float = 2.0,
    lambda_pos: float = 3.0,
    k_neg: float = 3.0,
    lambda_neg: float = 2.0,
) -> tuple[Tensor, Tensor]:
    """`-sg[phi(W)] A log pi` with `phi(W) = e^lambda W^k e^(-lambda W)`, and phi: (N, T) and the shape of `advantages`
    (VESPO, arXiv 2602.10693).

    `W` is the sequence's ratio, the product over its tokens without normalisation by length. `k` and `lambda` go by
    the sign of the advantage; phi(1) = 1. phi's mean is the metric `vespo/phi_seq_mean`.

    Args:
        log_ratio: `log pi_theta - log pi_old`, (N, T).
        sampler_weights: what `sampler_importance_weights` returned, (N, T) or (N, 1), where the sampler is not
            `pi_old`; they enter W, and must not multiply the loss again.
    """
    # Bounds of the published code, in logs: nothing of W is lost that phi would not make 0 anyway.
    lowest, highest = math.log(1e-8), 20.0
    with torch.no_grad():
        log_w = (log_ratio.clamp(-highest, highest) * mask).sum(-1, keepdim=True)
        if sampler_weights is not None:
            log_weights = sampler_weights.log().clamp(lowest, highest)
            log_w = log_w + (log_weights if log_weights.shape[1] == 1 else (log_weights * mask).sum(-1, keepdim=True))
        log_w = log_w.clamp(lowest, highest)
        k = _by_sign(advantages >= 0, k_pos, k_neg, advantages)
        lam = _by_sign(advantages >= 0, lambda_pos, lambda_neg, advantages).clamp(min=1e-4)
        phi = torch.exp(lam + k * log_w - lam * log_w.exp())
    return -phi * advantages * logps, phi


def gmpo(
    log_ratio: Tensor, advantages: Tensor, mask: Tensor, epsilon_low: float = 0.4, epsilon_high: float = 0.4
) -> Tensor:
    """`-A exp(mean_t x_t)`, (N, 1): the geometric mean of the clipped ratios (GMPO, arXiv 2507.20673).

    `x_t` is the log-ratio, at most `epsilon_high` where A > 0 and at least `-epsilon_low` where A < 0: PPO's clip, in
    logs and before the mean. Tokens that the mean is to leave out (low entropy) have to be 0 in `mask`; multiplying
    the result by a token mask would scale it down instead.

    Args:
        log_ratio: (N, T).
        advantages: (N, 1).
    """
    clipped = torch.where(advantages > 0, log_ratio.clamp(max=epsilon_high), log_ratio.clamp(min=-epsilon_low))
    return -_mean_by_sequence(clipped, mask).exp() * advantages


# Divergence from the reference model


def k1(ref_logps: Tensor, logps: Tensor) -> Tensor:
    """Per-token estimate of KL(pi_theta || pi_ref) at tokens drawn from pi_theta: `log pi_theta - log pi_ref`.

    Unbiased in value, of either sign. As a term of the loss its expected gradient is 0: use it in the reward, or
    multiplied by the importance ratio (`unbiased_kl`).
    """
    return logps - ref_logps


def k2(ref_logps: Tensor, logps: Tensor) -> Tensor:
    """`(log pi_theta - log pi_ref)^2 / 2`: never negative, biased in value; as a term of the loss, its expected gradient
    is that of KL(pi_theta || pi_ref) (Schulman, "Approximating KL divergence", 2020; REINFORCE++, arXiv 2501.03262).
    """
    return 0.5 * (logps - ref_logps) ** 2


def k3(ref_logps: Tensor, logps: Tensor) -> Tensor:
    """Per-token estimate of KL(pi_theta || pi_ref) at tokens drawn from pi_theta: `e^d - d - 1`, `d = ref - logps`.

    Never negative, unbiased in value (Schulman, "Approximating KL divergence", 2020). As a term of the loss, its
    expected gradient is that of the other direction, KL(pi_ref || pi_theta).
    """
    d = ref_logps - logps
    return torch.exp(d) - d - 1


KL_ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}


def unbiased_kl(kl: Tensor, ratio: Tensor) -> Tensor:
    """`rho k`: for k1 and k3 unbiased in value and gradient, also for tokens of an earlier policy (DeepSeek-V3.2, arXiv
    2512.02556). The ratio keeps its gradient.
    """
    return kl * ratio


# Which completions and tokens count


def on_policy_sequences(advantages: Tensor, log_ratio: Tensor, mask: Tensor, threshold: float) -> Tensor:
    """1 for the completions to keep, shaped like `advantages`: those with A >= 0, or whose mean `log pi_old - log
    pi_theta` is at most `threshold`. Drops failures that the policy has already moved away from (DeepSeek-V3.2, arXiv
    2512.02556, eq. 9). Tokens whose log-ratio is NaN, because the sampler gave no log-probability, count as 0.
    """
    drift = _mean_by_sequence(-torch.nan_to_num(log_ratio.detach(), nan=0.0), mask)
    return ((advantages >= 0) | (drift <= threshold)).to(mask.dtype)


def entropy_limit(entropies: Tensor, top_quantile: float) -> Tensor:
    """The entropy that the `top_quantile` share of the given ones reach, a scalar: their `1 - top_quantile` quantile,
    linearly interpolated; infinite if there are none.

    Args:
        entropies: of masked-in tokens, flat, gathered from all processes.
    """
    values = entropies.flatten().float()
    if values.numel() == 0:
        return values.new_tensor(math.inf)
    # torch.quantile refuses more than 2^24 values.
    values = values.sort().values
    position = (1 - top_quantile) * (values.numel() - 1)
    low, high = values[math.floor(position)], values[math.ceil(position)]
    return torch.lerp(low, high, position - math.floor(position))


def high_entropy_tokens(
    entropies: Tensor, mask: Tensor, top_quantile: float, limit: Tensor | float | None = None
) -> Tensor:
    """1 on the `top_quantile` share of tokens with the highest entropy, (N, T) (arXiv 2506.01939).

    `limit` is the entropy to reach, where it was found over more than these tokens (`entropy_limit`).
    """
    used = mask.bool()
    if limit is None:
        limit = entropy_limit(entropies[used], top_quantile)
    return ((entropies >= limit) & used).to(mask.dtype)


def clip_cov(
    logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clipped: Tensor | None = None,
    share: float = 2e-4,
    low: float = 1.0,
    high: float = 5.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """1 on the tokens to keep and 0 on those to leave without gradient, (N, T): Clip-Cov (arXiv 2505.22617).

    A likely token with a high advantage is what makes entropy fall. Of the tokens whose covariance `(log pi - mean) (A -
    mean)` lies between `low` and `high`, a random `share` of all masked-in tokens is dropped, at least one. Means are
    over the tokens given. Defaults are those of the published code, which sets the clip of the ratio wide (epsilon 1).

    Args:
        clipped: 1 on tokens that clipping has left without gradient already; they are not drawn.
        generator: draws the tokens; default: torch's global one.
    """
    covariance, used = _covariance(logps, advantages, mask)
    candidates = used & (covariance > low) & (covariance < high)
    if clipped is not None:
        candidates &= ~clipped.bool()
    rows, columns = candidates.nonzero(as_tuple=True)
    number = max(int(share * int(used.sum())), 1)
    drawn = torch.randperm(len(rows), generator=generator)[:number].to(rows.device)
    keep = torch.ones_like(mask)
    keep[rows[drawn], columns[drawn]] = 0
    return keep


def kl_cov(
    log_ratio: Tensor, logps: Tensor, advantages: Tensor, mask: Tensor, share: float = 2e-3, coef: float = 1.0
) -> Tensor:
    """A penalty to add to the token losses, (N, T): `coef |log pi_theta - log pi_old|` on the `share` of tokens with the
    highest covariance `(log pi - mean) (A - mean)`, at least one, and 0 elsewhere: KL-Cov (arXiv 2505.22617).

    The paper adds it to the unclipped `-rho A` (`clipped_surrogate` with infinite epsilons); it takes 2e-3 of the tokens
    for a 7B model and 2e-4 for 32B. Without gradient where log_ratio is 0, as in the first step on a batch.
    """
    covariance, used = _covariance(logps, advantages, mask)
    tokens = int(used.sum())
    selected = torch.zeros_like(covariance)
    if tokens:
        number = max(int(share * tokens), 1)
        top = covariance.masked_fill(~used, -math.inf).flatten().topk(number).indices
        selected.view(-1)[top] = 1.0
    return coef * log_ratio.abs() * selected


def _covariance(logps: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(centred log-probability times centred advantage, whether masked in), both (N, T)."""
    used = mask.bool()
    count = used.sum().clamp(min=1)
    logps, advantages = logps.detach(), advantages.detach().expand(mask.shape)
    mean_logp, mean_advantage = (torch.where(used, x, 0.0).sum() / count for x in (logps, advantages))
    return (logps - mean_logp) * (advantages - mean_advantage), used


# How per-token losses become one number is what tells these methods apart. Each takes the per-token losses (N, T), or
# (N, 1) where a completion has one, the mask (N, T) and a `Normaliser`, and returns (loss of this micro-batch, loss to
# back-propagate): the second is scaled so that the micro-batches of one optimizer step add up to the method's objective.


@dataclass(frozen=True)
class Normaliser:
    """What a loss is divided by, beyond its own micro-batch.

    Attributes:
        micro_batches: micro-batches of this optimizer step (1 in evaluation).
        active_tokens: masked-in tokens of all micro-batches of this step, per process; a scalar tensor.
        max_completion_length: cap on the completion length under which the batch was sampled.
    """

    micro_batches: float
    active_tokens: Tensor
    max_completion_length: int


def grpo(token_loss: Tensor, mask: Tensor, by: Normaliser) -> tuple[Tensor, Tensor]:
    """Mean over the completion's tokens, then over completions: `1/N sum_i 1/|o_i| sum_t l_it` (arXiv 2402.03300).

    Short completions weigh as much as long ones, so a token of a long completion weighs less. One loss per completion
    is averaged as it is; a completion that is masked out counts 0.
    """
    loss = _mean_by_sequence(token_loss, mask).mean()
    return loss.detach(), loss / by.micro_batches


def bnpo(token_loss: Tensor, mask: Tensor, by: Normaliser) -> tuple[Tensor, Tensor]:
    """Mean over the tokens of the micro-batch (arXiv 2506.02864); equal to `grpo` for one completion."""
    loss = (token_loss * mask).sum() / mask.sum().clamp(min=1.0)
    return loss.detach(), loss / by.micro_batches


def dr_grpo(token_loss: Tensor, mask: Tensor, by: Normaliser) -> tuple[Tensor, Tensor]:
    """Sum over tokens over a constant, `N * max_completion_length`: no length bias (arXiv 2503.20783).

    The paper also leaves the advantages unscaled: set `scale_rewards="none"` with it.
    """
    loss = (token_loss * mask).sum() / (token_loss.size(0) * by.max_completion_length)
    return loss.detach(), loss / by.micro_batches


def dapo(token_loss: Tensor, mask: Tensor, by: Normaliser) -> tuple[Tensor, Tensor]:
    """Sum over tokens over the tokens of the whole optimizer step: every token weighs the same (arXiv 2503.14476)."""
    loss = (token_loss * mask).sum() / by.active_tokens
    return loss.detach(), loss


def luspo(token_loss: Tensor, mask: Tensor, by: Normaliser) -> tuple[Tensor, Tensor]:
    """Sum over the completion's tokens, mean over completions: `1/N sum_i sum_t l_it`.

    With one loss per completion this is `1/N sum_i |o_i| l_i`, which makes up for GSPO's ratio being a mean over tokens
    (LUSPO, arXiv 2602.05261). With `reinforce` it is the gradient of the completions' log-probabilities, as in RLOO.
    """
    loss = (token_loss * mask).sum(-1).mean()
    return loss.detach(), loss / by.micro_batches


POLICY_LOSSES: dict[str, Callable[[Tensor, Tensor, Normaliser], tuple[Tensor, Tensor]]] = {
    "grpo": grpo,
    "dapo": dapo,
    "bnpo": bnpo,
    "dr_grpo": dr_grpo,
    "cispo": dapo,
    "sapo": grpo,
    "luspo": luspo,
    "vespo": dapo,
    "gmpo": grpo,
    "gpg": dapo,
    "reinforce": luspo,
}

_CLIP_METRICS = (
    "clip_ratio/low_mean",
    "clip_ratio/low_min",
    "clip_ratio/high_mean",
    "clip_ratio/high_max",
    "clip_ratio/region_mean",
)


def loss_metrics(loss_type: str) -> tuple[str, ...]:
    """Names of the metrics that exist under this loss alone: clip fractions only where a clip removes gradients."""
    own: dict[str, tuple[str, ...]] = {
        "cispo": ("cispo_clip_ratio",),
        "vespo": ("vespo/phi_seq_mean",),
        "sapo": (),
        "gpg": (),
        "reinforce": (),
    }
    return own.get(loss_type, _CLIP_METRICS)


# Entropy


def adaptive_entropy_coef(
    coef: float, entropy: float, target: float, delta: float, minimum: float, maximum: float
) -> float:
    """The coefficient of the entropy bonus for the next step: `delta` higher where the entropy is at most the target,
    `delta` lower elsewhere, within the bounds (Skywork-OR1, arXiv 2505.22312). NaN changes nothing.
    """
    if math.isnan(entropy):
        return coef
    return min(coef + delta, maximum) if entropy <= target else max(coef - delta, minimum)


def applied_entropy_coef(coef: float, entropy: float, target: float) -> float:
    """The coefficient to use: 0 while the entropy, of the step before, is above the target."""
    return coef if entropy <= target else 0.0


# The sampler beside the trainer: two programs that compute the same log-probabilities, not bit for bit

SAMPLER_CORRECTIONS = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


def sampler_importance_weights(
    logps_trainer: Tensor,
    logps_sampler: Tensor,
    mask: Tensor,
    mode: str = "sequence_mask",
    clip_max: float | None = 3.0,
    clip_min: float | None = None,
) -> Tensor:
    """Weights `pi_trainer / pi_sampler` to multiply the token losses by, without gradient: (N, T) for `token_*` modes,
    (N, 1) for `sequence_*` modes, where the ratio is the product over the completion's tokens.

    `*_truncate`: ratios are moved to the bounds (truncated importance sampling). `*_mask`: ratios outside of the bounds
    become 0 (masked importance sampling; IcePop, arXiv 2510.18855). A product over a long completion leaves the bounds
    more easily. Tokens masked out, or without a log-probability of the sampler (NaN), have ratio 1.

    Raises:
        ValueError: another mode.
    """
    if mode not in SAMPLER_CORRECTIONS:
        raise ValueError(
            f"vllm_importance_sampling_mode is {mode!r}; choose one of {', '.join(map(repr, SAMPLER_CORRECTIONS))}."
        )
    gap = (logps_trainer - logps_sampler).detach()
    gap = torch.where(mask.bool() & ~gap.isnan(), gap, 0.0)
    level, _, bounding = mode.partition("_")
    ratio = (gap.sum(-1, keepdim=True) if level == "sequence" else gap).exp()
    low = 0.0 if clip_min is None else clip_min
    high = math.inf if clip_max is None else clip_max
    if bounding == "truncate":
        return ratio.clamp(low, high)
    return ratio.masked_fill((ratio < low) | (ratio > high), 0.0)


def sampler_gap(logps_trainer: Tensor, logps_sampler: Tensor, mask: Tensor) -> dict[str, float]:
    """How far the trainer's log-probabilities are from the sampler's, over the masked-in tokens that both scored.

    With `x = log pi_trainer - log pi_sampler`, in nats a token: `k1`, the mean of -x, and `k3`, the mean of `e^x - x - 1`,
    estimate KL(pi_sampler || pi_trainer); `abs_mean` and `abs_max` of |x|; `n`: tokens counted. Empty if there are none.
    """
    x = (logps_trainer - logps_sampler).detach().float()
    x = x[mask.bool() & ~x.isnan()]
    if x.numel() == 0:
        return {}
    values = torch.stack([-x.mean(), (x.exp() - x - 1).mean(), x.abs().mean(), x.abs().max()])
    return {**dict(zip(("k1", "k3", "abs_mean", "abs_max"), values.tolist())), "n": float(x.numel())}


# Statistics


def clip_fractions(
    ratio: Tensor, advantages: Tensor, epsilon_low: float, epsilon_high: float, centre: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Where clipping removes the gradient: (below with A < 0, above with A > 0, either), floats shaped like `ratio`.

    `centre` is the ratio without change: 1, or 0 where log-ratios are clipped, and given, as in `gmpo`.
    """
    low = (ratio < centre - epsilon_low) & (advantages < 0)
    high = (ratio > centre + epsilon_high) & (advantages > 0)
    return low.float(), high.float(), (low | high).float()


def cispo_clip_fraction(ratio: Tensor, advantages: Tensor, epsilon_high: float) -> Tensor:
    """Where `cispo` caps the weight of a token with A > 0: the metric `cispo_clip_ratio`, floats."""
    return ((ratio > epsilon_high) & (advantages > 0)).float()


def masked_mean(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(sum, count) of per-token values (N, T) over the mask, or of per-completion values (N, 1) over completions."""
    if values.shape[1] == 1:
        return values.sum(), values.new_tensor(float(values.shape[0]))
    return (values * mask).sum(), mask.sum().float()


def masked_mean_by_sequence(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over each completion's tokens, (N,); NaN for a completion that is masked out entirely."""
    if values.shape[1] == 1:
        return values.squeeze(1)
    return (values * mask).sum(-1) / mask.sum(-1)


def log_ratio_statistics(log_ratio: Tensor, mask: Tensor, max_tokens: int = 1_000_000) -> dict[str, float]:
    """How far the policy has moved from the one that sampled, over the masked-in tokens (at most `max_tokens` of them).

    `p01`, `p99`: quantiles of `log pi_theta - log pi_old`; `abs_mean`; `approx_kl`: mean of `e^x - x - 1`, the k3
    estimate of KL(pi_old || pi_theta); `ess`: effective sample size of the ratios `w`, `(sum w)^2 / (n sum w^2)`, in
    (0, 1]; `n`: tokens counted. Empty if no token is masked in.
    """
    x = log_ratio.detach()[mask.bool()].float()
    if x.numel() == 0:
        return {}
    x = x[:: max(1, -(-x.numel() // max_tokens))]
    w = x.exp()
    p01, p99 = torch.quantile(x, torch.tensor([0.01, 0.99], device=x.device))
    ess = w.sum() ** 2 / (x.numel() * (w**2).sum())
    names = ("p01", "p99", "abs_mean", "approx_kl", "ess", "n")
    values = torch.stack([p01, p99, x.abs().mean(), (w - x - 1).mean(), ess, x.new_tensor(float(x.numel()))])
    return dict(zip(names, values.tolist()))


def _mean_by_sequence(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over each completion's tokens, (N, 1); 0 for a completion that is masked out entirely."""
    return (values * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1.0)


def _by_sign(positive: Tensor, value_pos: float, value_neg: float, like: Tensor) -> Tensor:
    """One of two numbers per element, in the type of `like`."""
    return torch.full_like(like, value_neg).masked_fill(positive, value_pos)
