"""From rewards to advantages, relative to the group of completions sampled from the same prompt.

Axes: `B` prompts (groups), `G` completions a group, `N = B * G`, `K` reward functions. A reward of NaN means "this
function does not apply to this completion"; a completion to which none applies is not scorable: it stays out of
every mean and gets advantage 0.
"""

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


def _std_or_zero(x: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
    """`nan_std`, but 0 where the axis holds a single value (one completion a prompt, as evaluation allows)."""
    size = x.numel() if dim is None else x.shape[dim]
    if size > 1:
        return nan_std(x, dim, keepdim)
    return torch.zeros_like(x.sum(dim=dim, keepdim=keepdim) if dim is not None else x.sum())
