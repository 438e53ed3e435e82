"""A reward that falls below where the run began, seen early: from the scores behind each step, not from many steps."""

import math
from dataclasses import dataclass

import numpy as np

from outspoken.diagnostics.records import Unknown
from outspoken.diagnostics.view import RunView

START_POINTS = 5  # the level that the run began at: short, because a collapse may follow at once
NEWEST_POINTS = 10
# T, share of the starting level and share of the range that make a fall a collapse. T is that of every error in the
# toolbox; the shares because a small fall is no collapse, however certain. Judgement.
FALL = (4.0, 0.5, 0.1)
WITHIN_GROUP = 0.5  # correlation of rewards within a group where it is not measured; larger means less evidence


@dataclass(frozen=True)
class Fall:
    """The reward's level at the start and now, and how many standard errors lie between."""

    start: float
    now: float
    t: float
    onset: int  # about the last step at which the reward was still near its start
    n: int  # completions behind the two levels


def early_fall(run: RunView, limit_t: float, share_of_start: float, share_of_range: float) -> Fall | Unknown | None:
    """Whether the newest 10 steps lie far below the run's first 5.

    The standard error of a step's mean reward comes from the spread and number of its completions:
    se^2 = reward_std^2 * deff / n, with deff = 1 + (G-1) * rho for groups of G, where rho, the correlation within a
    group, is 1 - (within-group std / reward_std)^2 at the start. The newest mean's is at least what the 10 steps
    themselves show. A fall counts when T < -limit_t and when it is at least
    `share_of_start` of the starting level and `share_of_range` of the reward range.
    """
    window = run.window("reward", NEWEST_POINTS, min_n=NEWEST_POINTS)
    first, spread = run.first("reward", START_POINTS), run.first("reward_std", START_POINTS)
    completions = run.first("num_completions", START_POINTS)
    if window is None or run.rings["reward"].total < START_POINTS + NEWEST_POINTS:
        return Unknown("fewer than 15 rewards so far")
    if len(spread) < START_POINTS or len(completions) < START_POINTS or completions.min() <= 0:
        return Unknown("the number of completions behind the reward, or their spread, is not known")
    low, high = run.last("rewards/min_seen"), run.last("rewards/max_seen")
    if low is None or high is None or high <= low:
        return Unknown("the range of the reward is not known")
    group = run.number("num_generations", 1.0) or 1.0
    within = run.first("groups/std_mean", START_POINTS)
    rho = WITHIN_GROUP
    if len(within) == START_POINTS and spread.mean() > 0:
        rho = max(0.0, 1.0 - float(within.mean() / spread.mean()) ** 2)
    deff = 1.0 + (group - 1.0) * rho
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
    recent = run.window("reward", min_n=3)
    assert recent is not None
    # The fall began before it showed: at the middle of the last three steps that were near the start together.
    smooth = np.convolve(recent.values, np.ones(3) / 3, "valid")
    near = np.flatnonzero(smooth >= start - 0.25 * drop)
    onset = int(recent.steps[int(near[-1]) + 1]) if len(near) else run.segment_start
    return Fall(start, now, t, onset, round(float(completions.mean()) * (START_POINTS + NEWEST_POINTS)))


BEFORE_POINTS, LATEST_POINTS = 30, 3
GAPS = (0, 7, 15)  # steps between the two: the fall itself must not blur what came before it


def recent_fall(run: RunView, limit_t: float) -> Fall | None:
    """Whether the reward's newest 3 steps lie far below 30 steps that end 0, 7 or 15 steps before them.

    T = (m3 - m30) / (sd30 sqrt(1/3 + 1/30)) < -limit_t for one of them. Too few points to say that a run has
    collapsed, but enough to say that something else moved at the same time.
    """
    window = run.window("reward", BEFORE_POINTS + LATEST_POINTS + GAPS[-1], min_n=BEFORE_POINTS + LATEST_POINTS)
    if window is None:
        return None
    latest = window.values[-LATEST_POINTS:]
    for gap in GAPS:
        end = len(window) - LATEST_POINTS - gap
        before = window.values[max(0, end - BEFORE_POINTS) : end]
        if len(before) < BEFORE_POINTS:
            break
        sd = float(before.std(ddof=1))
        t = (
            float(latest.mean() - before.mean()) / (sd * math.sqrt(1 / LATEST_POINTS + 1 / BEFORE_POINTS))
            if sd
            else 0.0
        )
        if t < -limit_t:
            onset = int(window.steps[-LATEST_POINTS - gap])
            return Fall(float(before.mean()), float(latest.mean()), t, onset, BEFORE_POINTS + LATEST_POINTS)
    return None


# What a policy that changed looks like: these differ from the run's first steps by a factor, or a share by this much.
MOVED_FACTOR, MOVED_SHARE = 1.5, 0.2


def policy_moved(run: RunView) -> bool:
    """Whether the newest 10 steps' completions differ from the run's first 5 in entropy, length, or how they end.

    A reward that becomes constant while the policy is as it was points to the reward function; with a policy that
    moved it points to the policy.
    """
    for name in ("entropy", "completions/mean_length", "completions/clipped_ratio"):
        first, window = run.first(name, START_POINTS), run.window(name, NEWEST_POINTS, min_n=3)
        if len(first) < START_POINTS or window is None:
            continue
        start, now = float(first.mean()), window.median
        if name == "completions/clipped_ratio":
            if abs(now - start) > MOVED_SHARE:
                return True
        elif now > MOVED_FACTOR * start or now < start / MOVED_FACTOR:
            return True
    return False
