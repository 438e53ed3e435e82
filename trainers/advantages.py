"""From rewards to advantages: how much better a completion is than others of the same prompt, or of the batch.

Axes: `B` prompts (groups), `G` completions a group, `N = B * G`, `K` reward functions, `T` completion tokens. The
completions of a group stand next to each other. A reward of NaN means "this function does not apply to this
completion"; a completion to which none applies is not scorable: it stays out of every mean and gets advantage 0. A
method that compares within the group alone gives 0 to a completion that is the only scorable one.

Means over the batch are over what a function is given: the completions of all processes, gathered.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# Added to standard deviations, so that a group of nearly equal rewards is not blown up without bound.
STD_EPSILON = 1e-4


def nan_std(x: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
    """Standard deviation with Bessel's correction over the values that are not NaN; NaN where fewer than two are."""
    if dim is None:
        return nan_std(x.flatten(), 0)
    n = (~torch.isnan(x)).sum(dim=dim, keepdim=True)
    squares = ((x - torch.nanmean(x, dim=dim, keepdim=True)) ** 2).nansum(dim=dim, keepdim=True)
    std = torch.where(n > 1, squares / (n - 1).clamp(min=1), torch.nan).sqrt()
    return std if keepdim else std.squeeze(dim)


class GroupAdvantages(NamedTuple):
    """Advantages and what they came from, each (N,).

    `rewards` is the weighted sum over the reward functions, NaN where not scorable; `std` the deviation that the
    advantages were (or with `scale="none"` would have been) divided by.
    """

    advantages: Tensor
    rewards: Tensor
    std: Tensor


def weighted_sum(rewards_per_func: Tensor, weights: Tensor) -> Tensor:
    """(N, K) and (K,) to (N,): the sum over the functions that apply; NaN where none does."""
    total = (rewards_per_func * weights).nansum(dim=1)
    return total.masked_fill(torch.isnan(rewards_per_func).all(dim=1), torch.nan)


def sum_then_normalize(rewards_per_func: Tensor, weights: Tensor, group_size: int, scale: str) -> GroupAdvantages:
    """GRPO's advantages (arXiv 2402.03300): the rewards are summed, then compared within the group.

    `(r - mean_group) / (std + 1e-4)`, with the std of the group (`scale="group"`), of the whole batch
    (`scale="batch"`, arXiv 2508.08221), or no division (`scale="none"`, arXiv 2503.20783).

    Args:
        rewards_per_func: (N, K), NaN where a function does not apply; groups are contiguous.
        weights: (K,).
        group_size: G.
    """
    rewards = weighted_sum(rewards_per_func, weights)
    groups = rewards.view(-1, group_size)
    centred = (groups - torch.nanmean(groups, dim=1, keepdim=True)).flatten()
    if scale == "batch":
        std = _std_or_zero(rewards).expand_as(rewards)
    elif scale in ("group", "none"):
        std = _std_or_zero(groups, dim=1).repeat_interleave(group_size)
    else:
        raise ValueError(f"scale_rewards is {scale!r}; use 'group', 'batch' or 'none'.")
    advantages = centred if scale == "none" else centred / (std + STD_EPSILON)
    return GroupAdvantages(torch.nan_to_num(advantages, nan=0.0), rewards, std)


def normalize_then_sum(rewards_per_func: Tensor, weights: Tensor, group_size: int) -> GroupAdvantages:
    """GDPO's advantages (arXiv 2601.05242): each function's rewards are normalised within the group, then weighted,
    summed, and normalised over the batch, so that no function drowns the others by its scale.

    Shapes as in `sum_then_normalize`.
    """
    n, k = rewards_per_func.shape
    groups = rewards_per_func.view(-1, group_size, k)
    centred = groups - torch.nanmean(groups, dim=1, keepdim=True)
    z_scores = (centred / (_std_or_zero(groups, dim=1, keepdim=True) + STD_EPSILON)).view(n, k)
    # A lone scorable reward in its group has no z-score; it then counts as "does not apply", like its neighbours.
    combined = (z_scores * weights).nansum(dim=1)
    combined = combined.masked_fill(torch.isnan(rewards_per_func).all(dim=1), torch.nan)
    std = _std_or_zero(combined).expand_as(combined)
    advantages = (combined - torch.nanmean(combined)) / (std + STD_EPSILON)
    return GroupAdvantages(torch.nan_to_num(advantages, nan=0.0), weighted_sum(rewards_per_func, weights), std)


def rloo(rewards: Tensor, group_size: int, normalize: bool = False) -> Tensor:
    """`r_i - mean_{j != i} r_j`, (N,): each reward against the mean of the others in its group (RLOO, arXiv 2402.14740).

    `normalize` then z-scores over the batch: `(A - mean) / (std + 1e-4)`.

    Args:
        rewards: (N,); in the paper less `beta` times the sum of the completion's `log pi_theta - log pi_ref`.
    """
    groups = rewards.reshape(-1, group_size)
    others = (~torch.isnan(groups)).sum(dim=1, keepdim=True) - 1
    baseline = (groups.nansum(dim=1, keepdim=True) - groups) / others  # 0 / 0 for a lone scorable one
    advantages = (groups - baseline).flatten()
    if normalize:
        advantages = (advantages - torch.nanmean(advantages)) / (nan_std(advantages) + STD_EPSILON)
    return _known(advantages)


def reinforce_plus_plus(
    rewards: Tensor,
    kl: Tensor | None,
    mask: Tensor,
    beta: float = 0.0,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """REINFORCE++ (arXiv 2501.03262), (N, T): `A_t = r - beta sum_{s >= t} kl_s`, z-scored over all tokens of the batch.

    No group is needed: a prompt may have one completion. 0 on tokens that are masked out.

    Args:
        rewards: (N,), of the whole completion.
        kl: `log pi_old - log pi_ref` of each token, (N, T); None without a reference model.
        mask: (N, T), 1 on tokens that the policy wrote.
        reduce: sums a tensor over processes, where each holds a part of the batch (tokens are not gathered).
    """
    returns = token_returns(rewards, kl, mask, beta)
    counted = mask.bool() & ~torch.isnan(rewards).unsqueeze(1)
    moments = token_moments(returns, counted)
    return whiten(returns, counted, moments if reduce is None else reduce(moments))


def token_returns(rewards: Tensor, kl: Tensor | None, mask: Tensor, beta: float) -> Tensor:
    """`r - beta sum_{s >= t} kl_s` of each token, (N, T), undiscounted; NaN where the completion is not scorable."""
    returns = rewards.unsqueeze(1).expand(mask.shape)
    if kl is None or beta == 0.0:
        return returns
    penalty = torch.where(mask.bool(), kl, 0.0)
    return returns - beta * penalty.flip(1).cumsum(dim=1).flip(1)


def token_moments(values: Tensor, mask: Tensor) -> Tensor:
    """[sum, sum of squares, count] of the masked-in values, in double precision: what processes add up before `whiten`."""
    # Apple's GPUs know no double precision.
    dtype = torch.float32 if values.device.type == "mps" else torch.float64
    x = values[mask.bool()].to(dtype)
    return torch.stack([x.sum(), (x**2).sum(), x.new_tensor(float(x.numel()))])


def whiten(values: Tensor, mask: Tensor, moments: Tensor) -> Tensor:
    """`(x - mean) / std` where masked in and 0 elsewhere, by moments of the whole batch.

    The std is the population's, at least 1e-4, as in the code published with REINFORCE++.
    """
    mean, mean_square = moments[:2] / moments[2].clamp(min=1.0)
    std = (mean_square - mean**2).clamp(min=1e-8).sqrt()
    z = ((values.to(moments.dtype) - mean) / std).to(values.dtype)
    return torch.where(mask.bool(), z, 0.0)


def reinforce_plus_plus_baseline(rewards: Tensor, group_size: int, lengths: Tensor | None = None) -> Tensor:
    """REINFORCE++ with baseline (arXiv 2501.03262), (N,): `r - mean_group`, z-scored over all tokens of the batch.

    The divergence from the reference is then a term of the loss: the paper takes `k2`.

    Args:
        lengths: (N,), masked-in tokens of each completion; the statistics count a completion so many times, as it has
            its advantage on each token. None: once.
    """
    groups = rewards.reshape(-1, group_size)
    centred = (groups - torch.nanmean(groups, dim=1, keepdim=True)).flatten()
    weights = torch.ones_like(centred) if lengths is None else lengths.to(centred.dtype)
    weights = weights.masked_fill(torch.isnan(centred), 0.0)
    x = torch.nan_to_num(centred, nan=0.0)
    count = weights.sum().clamp(min=1.0)
    mean = (weights * x).sum() / count
    std = ((weights * (x - mean) ** 2).sum() / count).clamp(min=1e-8).sqrt()
    return _known((centred - mean) / std)


def opo(rewards: Tensor, lengths: Tensor, group_size: int) -> Tensor:
    """`r_i - sum_j |o_j| r_j / sum_j |o_j|`, (N,): against the group's mean weighted by length, the baseline of least
    variance where a completion's squared gradient grows with its length (OPO, arXiv 2505.23585).

    Args:
        lengths: (N,), masked-in tokens of each completion.
    """
    groups = rewards.reshape(-1, group_size)
    weights = lengths.to(groups.dtype).reshape(groups.shape).masked_fill(torch.isnan(groups), 0.0)
    baseline = (weights * groups).nansum(dim=1, keepdim=True) / weights.sum(dim=1, keepdim=True)
    return _known((groups - baseline).flatten())


def remax(rewards: Tensor, greedy_rewards: Tensor, group_size: int = 1) -> Tensor:
    """`r - r_greedy`, (N,): against the reward of the prompt's greedy completion (ReMax, arXiv 2310.10505).

    Args:
        greedy_rewards: (B,); NaN where not scorable.
    """
    return _known(rewards - greedy_rewards.repeat_interleave(group_size))


def gpg(rewards: Tensor, group_size: int, scale: str = "none") -> Tensor:
    """`alpha (r - mean_group) / F`, (N,): GPG (arXiv 2504.02546), for the loss `-A log pi`.

    `alpha` is the number of scorable completions over the number of those in groups whose rewards differ: it makes up
    for the groups that give no gradient. `F` is 1 (`scale="none"`), or the std of the group or batch plus 1e-4.
    """
    found = sum_then_normalize(rewards.unsqueeze(1), rewards.new_ones(1), group_size, scale)
    scorable = ~torch.isnan(rewards)
    useful = scorable & ~zero_variance_groups(rewards, group_size).repeat_interleave(group_size)
    return found.advantages * scorable.sum() / useful.sum().clamp(min=1)


def best_of_group(rewards: Tensor, group_size: int) -> Tensor:
    """The best completion of a group gets `r_1st - r_2nd`, the others 0, (N,): what each adds to the group's maximum,
    `max_j r_j - max_{j != i} r_j`, i.e. the leave-one-out gradient of pass@G (arXiv 2503.19595). 0 for all where two
    are best.
    """
    groups = rewards.reshape(-1, group_size)
    advantages = torch.zeros_like(groups)
    if group_size > 1:
        top = groups.masked_fill(torch.isnan(groups), -math.inf).topk(2, dim=1)
        gap = top.values[:, :1] - top.values[:, 1:]
        advantages.scatter_(1, top.indices[:, :1], torch.where(gap.isfinite(), gap, 0.0))
    return advantages.flatten()


def pass_at_k(rewards: Tensor, group_size: int, k: int, passed: float = 1.0) -> Tensor:
    """Advantages of pass@k in closed form, (N,) (arXiv 2508.10751).

    Every k of the group's completions are a sample that scores 1 if one of them passes. Samples are normalised by their
    mean and (population) std, and a completion's advantage is the mean over the samples that it is in: where m of n
    completions fail, and so `q = C(m, k) / C(n, k)` of the samples, `q / std` for one that passes and
    `(q - C(m - 1, k - 1) / C(n - 1, k - 1)) / std` for one that fails, `std = sqrt(q (1 - q))`; 0 where std is 0, or
    no more than k are scorable.

    Args:
        passed: the reward from which a completion passes.

    Raises:
        ValueError: k is below 1.
    """
    if k < 1:
        raise ValueError(f"k is {k}; choose at least 1 completion for pass@k.")
    groups = rewards.reshape(-1, group_size)
    scorable = ~torch.isnan(groups)
    failed = scorable & (groups < passed)
    values = [_pass_at_k(n, m, k) for n, m in zip(scorable.sum(1).tolist(), failed.sum(1).tolist())]
    on_pass, on_fail = groups.new_tensor(values).T.unsqueeze(2)
    return torch.where(scorable, torch.where(failed, on_fail, on_pass), 0.0).flatten()


def _pass_at_k(n: int, m: int, k: int) -> tuple[float, float]:
    """(advantage of a completion that passes, of one that fails) where m of n fail."""
    if m < k or m == n:  # all samples score the same
        return 0.0, 0.0
    q = math.comb(m, k) / math.comb(n, k)
    std = math.sqrt(q * (1 - q))
    return q / std, (q - math.comb(m - 1, k - 1) / math.comb(n - 1, k - 1)) / std


# What is known of a group before it is trained on


def group_std(rewards: Tensor, group_size: int) -> Tensor:
    """Bessel-corrected std of each group's scorable rewards, (B,); 0 where fewer than two are."""
    return nan_std(rewards.reshape(-1, group_size), dim=1).nan_to_num(nan=0.0)


def zero_variance_groups(rewards: Tensor, group_size: int) -> Tensor:
    """Whether a group's rewards are all equal, or fewer than two are scorable, (B,): such a group teaches nothing.

    Judged on the rewards themselves, whatever advantages are divided by. Rewards that differ by rounding (1e-6 of the
    largest) are equal. With several functions, (N, K), each has to be without spread.
    """
    groups = rewards.reshape(-1, group_size, *rewards.shape[1:])
    unknown = torch.isnan(groups)
    highest = groups.masked_fill(unknown, -math.inf).amax(dim=1)
    lowest = groups.masked_fill(unknown, math.inf).amin(dim=1)
    largest = torch.maximum(highest.abs(), lowest.abs())
    equal = unknown.all(dim=1) | (highest - lowest <= 1e-6 * largest)
    return equal if equal.ndim == 1 else equal.all(dim=1)


def variance_shares(rewards_per_func: Tensor, weights: Tensor, group_size: int) -> Tensor:
    """How much of the differences within groups each function makes, (K,): `Cov(w_k r_k, total) / Var(total)` with
    `total = sum_k w_k r_k`, averaged over the groups whose totals differ.

    The shares sum to 1; one is negative where a function works against the others. A function that does not apply to a
    completion adds 0 to its total. NaN where no group's totals differ.

    Args:
        rewards_per_func: (N, K), NaN where a function does not apply.
        weights: (K,).
    """
    k = rewards_per_func.shape[1]
    total = weighted_sum(rewards_per_func, weights)
    useful = ~zero_variance_groups(total, group_size)
    if not useful.any():
        return rewards_per_func.new_full((k,), torch.nan)
    scorable = ~torch.isnan(total).view(-1, group_size, 1)[useful]
    parts = (rewards_per_func * weights).nan_to_num(nan=0.0).view(-1, group_size, k)[useful]
    mean = (parts * scorable).sum(dim=1, keepdim=True) / scorable.sum(dim=1, keepdim=True)
    centred = (parts - mean) * scorable
    centred_total = centred.sum(dim=2, keepdim=True)
    return ((centred * centred_total).sum(dim=1) / (centred_total**2).sum(dim=1)).mean(dim=0)


def informative_score(advantages: Tensor, std: Tensor, group_size: int) -> Tensor:
    """`std sum_i |A_i|` of each group, (B,): how much a group has to teach, to choose what is replayed in place of groups
    without spread (after the selective sample replay of arXiv 2504.08837).

    Args:
        advantages: (N,).
        std: (B,), of the rewards within each group (`group_std`).
    """
    return advantages.reshape(-1, group_size).abs().sum(dim=1) * std.nan_to_num(nan=0.0)


def _known(advantages: Tensor) -> Tensor:
    """0 in place of what could not be compared."""
    return torch.nan_to_num(advantages, nan=0.0)


def _std_or_zero(x: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
    """`nan_std`, but 0 where the axis holds a single value (one completion a prompt, as evaluation allows)."""
    size = x.numel() if dim is None else x.shape[dim]
    if size > 1:
        return nan_std(x, dim, keepdim)
    return torch.zeros_like(x.sum(dim=dim, keepdim=keepdim) if dim is not None else x.sum())
