"""Signals of the raw reward matrix: how much the groups of one generation batch leave to learn from.

Axes: `B` prompt groups, `G` completions per group. NaN marks a completion that no reward function could score.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

NORMALISER = 1e-4  # TRL divides by std + 1e-4 when scale_rewards="group"
SAME = 0.01  # rewards within this share of the range of the extreme count as being at it (judgement)
TINY = 0.02  # a std below this share of the range is tiny (judgement)
TIE_ABSOLUTE, TIE_RELATIVE = 1e-8, 1e-6  # TRL's isclose(std, 0); and the rounding of a float32 sum of rewards


@dataclass
class RewardRange:
    """The smallest and largest reward of the run so far; None before the first one."""

    minimum: float | None = None
    maximum: float | None = None

    def update(self, rewards: ArrayLike) -> None:
        """Widen the range by these rewards, of any shape. Values that are not finite are left out."""
        values = np.asarray(rewards, dtype=np.float64)
        values = values[np.isfinite(values)]
        if values.size:
            low, high = float(values.min()), float(values.max())
            self.minimum = low if self.minimum is None else min(self.minimum, low)
            self.maximum = high if self.maximum is None else max(self.maximum, high)

    @property
    def width(self) -> float:
        return 0.0 if self.minimum is None or self.maximum is None else self.maximum - self.minimum


def group_signals(
    rewards: ArrayLike | Sequence[Sequence[float]],
    per_function: Mapping[str, ArrayLike | Sequence[Sequence[float]]],
    seen: RewardRange,
) -> dict[str, float]:
    """The signals of one generation batch, by the names of the signal table.

    A group counts when at least two of its completions could be scored; shares are of the groups that count, and are
    left out if none does. Standard deviations are Bessel-corrected and skip what could not be scored, as in TRL. A
    group ties when its rewards are equal but for float32 rounding. It failed when all its rewards are within 1 % of
    the range of the smallest reward of the run so far, this batch included, and passed when they are as close to the
    largest. While the run has seen one value only, there is no range: rewards of at most 0 then count as failed and
    positive ones as passed, which is right for the common reward between 0 and 1 and for penalties.

    Args:
        rewards: (B, G), the weighted sum over the reward functions; NaN or infinite where not scorable.
        per_function: reward function name -> (B, G).
        seen: the range of the run so far; updated with this batch.

    Raises:
        ValueError: a matrix is not two-dimensional, or has another shape than `rewards`.
    """
    matrix = _matrix("rewards", rewards)
    scorable = np.isfinite(matrix)
    seen.update(matrix)
    signals: dict[str, float] = {}
    if matrix.size:
        signals["rewards/unscored"] = 1.0 - float(scorable.mean())
    if seen.minimum is not None and seen.maximum is not None:
        signals["rewards/range"] = seen.width
        signals["rewards/max_seen"] = seen.maximum
        signals["rewards/min_seen"] = seen.minimum
    for name, values in per_function.items():
        scores = _matrix(f"rewards of {name}", values)
        if scores.shape != matrix.shape:
            raise ValueError(f"rewards of {name} have shape {scores.shape}, but the total has {matrix.shape}")
        if scores.size:
            signals[f"rewards/{name}/none_share"] = float(np.isnan(scores).mean())

    counted = scorable.sum(axis=1) >= 2
    signals["groups/count"] = float(counted.sum())
    if counted.any():
        signals |= _counted_groups(np.where(scorable, matrix, np.nan)[counted], seen)
    return signals


def _counted_groups(matrix: Array, seen: RewardRange) -> dict[str, float]:
    """matrix: (B, G), at least two finite rewards in each row, NaN elsewhere."""
    assert seen.minimum is not None and seen.maximum is not None
    low, high = np.nanmin(matrix, axis=1), np.nanmax(matrix, axis=1)
    tied = high - low <= TIE_ABSOLUTE + TIE_RELATIVE * np.maximum(np.abs(low), np.abs(high))
    std = np.where(tied, 0.0, np.nanstd(matrix, axis=1, ddof=1))
    if seen.width > 0:
        failed = high <= seen.minimum + SAME * seen.width
        passed = low >= seen.maximum - SAME * seen.width
    else:
        failed, passed = high <= 0, low > 0
    return {
        "groups/zero_std": float(tied.mean()),
        "groups/all_failed": float(failed.mean()),
        "groups/all_passed": float(passed.mean()),
        "groups/tiny_std": float((~tied & (std < TINY * seen.width)).mean()),
        "groups/std_mean": float(std.mean()),
        "groups/attenuation": float((std / (std + NORMALISER)).mean()),
    }


def _matrix(what: str, values: ArrayLike | Sequence[Sequence[float]]) -> Array:
    matrix = np.asarray(values, dtype=np.float64)
    if matrix.ndim != 2:
        raise ValueError(f"{what} must be a matrix of B groups by G completions, but have shape {matrix.shape}")
    return matrix
