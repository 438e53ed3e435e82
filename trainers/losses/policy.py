"""Policy-gradient losses on sampled completions: pure functions of log-probabilities, advantages and masks.

Axes: `N` completions, `T` completion tokens. A mask is 1 on the tokens that the loss may use and 0 elsewhere. Where the
importance ratio is one number per completion, the tensors are (N, 1) and broadcast over `T`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def importance_log_weights(log_ratio: Tensor, mask: Tensor, level: str = "token") -> Tensor:
    """Log of the importance weights from per-token log-ratios `log pi_theta - log pi_old`, (N, T).

    `"token"`: one weight a token, (N, T): PPO and GRPO. `"sequence"`: the mean log-ratio over the completion's tokens,
    i.e. the length-normalised sequence ratio of GSPO (arXiv 2507.18071), (N, 1).
    """
    if level == "token":
        return log_ratio
    if level == "sequence":
        return ((log_ratio * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).unsqueeze(-1)
    raise ValueError(f"importance_sampling_level is {level!r}; use 'token' or 'sequence'.")


def clipped_surrogate(
    ratio: Tensor, advantages: Tensor, epsilon_low: float, epsilon_high: float, delta: float | None = None
) -> Tensor:
    """`-min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A)`, elementwise: PPO's clip (arXiv 1707.06347), with the upper
    bound raised on its own in DAPO (arXiv 2503.14476).

    `delta` also bounds the unclipped branch, `min(rho, delta) A`, which for A < 0 is otherwise without bound
    (two-sided clipping, arXiv 2505.07291); it should be larger than `1 + epsilon_high`.

    Args:
        ratio: importance weights, (N, T) or (N, 1).
        advantages: (N, 1).
    """
    clipped = ratio.clamp(1 - epsilon_low, 1 + epsilon_high)
    if delta is not None:
        ratio = ratio.clamp(max=delta)
    return -torch.min(ratio * advantages, clipped * advantages)


def k3(ref_logps: Tensor, logps: Tensor) -> Tensor:
    """Per-token estimate of KL(pi_theta || pi_ref) at tokens drawn from pi_theta: `e^d - d - 1`, `d = ref - logps`.

    Never negative, unbiased in value (Schulman, "Approximating KL divergence", 2020).
    """
    d = ref_logps - logps
    return torch.exp(d) - d - 1


def on_policy_sequences(advantages: Tensor, log_ratio: Tensor, mask: Tensor, threshold: float) -> Tensor:
    """1 for the completions to keep, (N, 1): those with A >= 0, or whose mean `log pi_old - log pi_theta` is at most
    `threshold`. Drops failures that the policy has already moved away from (DeepSeek-V3.2, arXiv 2512.02556, eq. 9).
    """
    drift = (-log_ratio.detach() * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1.0)
    return ((advantages >= 0) | (drift <= threshold)).to(mask.dtype)


def high_entropy_tokens(entropies: Tensor, mask: Tensor, top_quantile: float) -> Tensor:
    """1 on the `top_quantile` share of tokens with the highest entropy, (N, T) (arXiv 2506.01939)."""
    used = mask.bool()
    if not used.any():
        return torch.zeros_like(mask)
    limit = torch.quantile(entropies[used].float(), 1 - top_quantile)
    return ((entropies >= limit) & used).to(mask.dtype)


# How per-token losses become one number is what tells these methods apart. Each takes the per-token losses (N, T), the
# mask (N, T) and a `Normaliser`, and returns (loss of this micro-batch, loss to back-propagate): the second is scaled
# so that the micro-batches of one optimizer step add up to the method's objective.


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

    Short completions weigh as much as long ones, so a token of a long completion weighs less.
    """
    loss = ((token_loss * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()
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


POLICY_LOSSES: dict[str, Callable[[Tensor, Tensor, Normaliser], tuple[Tensor, Tensor]]] = {
    "grpo": grpo,
    "bnpo": bnpo,
    "dr_grpo": dr_grpo,
    "dapo": dapo,
}


def clip_fractions(
    ratio: Tensor, advantages: Tensor, epsilon_low: float, epsilon_high: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Where clipping removes the gradient: (below with A < 0, above with A > 0, either), floats shaped like `ratio`."""
    low = (ratio < 1 - epsilon_low) & (advantages < 0)
    high = (ratio > 1 + epsilon_high) & (advantages > 0)
    return low.float(), high.float(), (low | high).float()


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
