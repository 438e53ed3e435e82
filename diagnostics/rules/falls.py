"""A reward that falls below where the run began, seen early: from the scores behind each step, not from many steps."""

import math
from dataclasses import dataclass

import numpy as np

from outspoken.diagnostics.records import Unknown
from outspoken.diagnostics.view import RunView

START_POINTS = 5  # the level that the run began at: short, because a collapse may follow at once
NEWEST_POINTS = 10
WITHIN_GROUP = 0.5  # correlation of rewards within a group, for the design effect; larger means less evidence


@dataclass(frozen=True)
class Fall:
    """The reward's level at the start and now, and how many standard errors lie between."""

    start: float
    now: float
    t: float
    onset: int  # the step after the last one at which the reward was still near its start
    n: int  # completions behind the two levels


def early_fall(run: RunView, limit_t: float, share_of_start: float, share_of_range: float) -> Fall | Unknown | None:
    """Whether the newest 10 steps lie far below the run's first 5.

    The standard error of a step's mean reward comes from the spread and number of its completions:
    se^2 = reward_std^2 * deff / n, with deff = 1 + (G-1) * 0.5 for the correlation within groups of G; that of the
    newest mean is at least what the 10 steps themselves show. A fall counts when T < -limit_t and when it is at least
    `share_of_start` of the starting level and `share_of_range` of the reward range.
    """
    window = run.window("reward", NEWEST_POINTS, min_n=NEWEST_POINTS)
    first, spread = run.first("reward", START_POINTS), run.first("reward_std", START_POINTS)
    completions = run.first("num_completions", START_POINTS)
    seen = sum(n for *_, n in run.blocks("reward")) + (run.rings["reward"].pending_block[1] if window else 0)
    if window is None or len(first) < START_POINTS or seen < START_POINTS + NEWEST_POINTS:
        return Unknown("fewer than 15 rewards so far")
    if len(spread) < START_POINTS or len(completions) < START_POINTS:
        return Unknown("the number of completions behind the reward, or their spread, is not known")
    low, high = run.last("rewards/min_seen"), run.last("rewards/max_seen")
    if low is None or high is None or high <= low:
        return Unknown("the range of the reward is not known")
    group = run.number("num_generations", 1.0) or 1.0
    deff = 1.0 + (group - 1.0) * WITHIN_GROUP
    # A step whose rewards all tie says nothing of the spread between prompts: take the start's for both.
    variance = float(np.mean(spread**2)) * deff / float(np.mean(completions))
    start, now = float(first.mean()), window.mean
    se_start = math.sqrt(variance / START_POINTS)
    se_now = math.sqrt(max(variance, float(window.values.var(ddof=1))) / NEWEST_POINTS)
    se = math.hypot(se_start, se_now)
    drop = start - now
    if se == 0 or drop <= 0:
        return None
    t = -drop / se
    if t > -limit_t or drop < share_of_start * (start - low) or drop < share_of_range * (high - low):
        return None
    recent = run.window("reward")
    assert recent is not None
    near = np.flatnonzero(recent.values >= start - 0.5 * drop)
    onset = int(recent.steps[min(int(near[-1]) + 1, len(recent) - 1)]) if len(near) else run.segment_start
    return Fall(start, now, t, onset, round(float(completions.mean()) * (START_POINTS + NEWEST_POINTS)))
