"""What several rules read off a run: pooled shares, how the reward moves, and what a signal is compared with."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from outspoken.diagnostics import signals as signal_table
from outspoken.diagnostics import stats
from outspoken.diagnostics.records import Evidence, Unknown
from outspoken.diagnostics.view import Array, PooledWindow, RunView, pool_newest

SIGNIFICANT = 3.5  # |T| of a two-window comparison, and |z| of a trend, that counts as a change
HINT = 2.0  # a |T| that is no proof, but enough to hold back an alarm about a reward that does not move
REWARD = "reward"
Direction = Literal["above", "below"]
NEWEST = 128  # points looked at when pooling: more than any rule needs
ENOUGH_STEPS = 50  # steps that are enough to pool, however few trials they hold


def pool(
    run: RunView,
    name: str,
    min_n: float,
    *,
    min_steps: int = 1,
    enough_steps: int = ENOUGH_STEPS,
    values: Array | None = None,
) -> PooledWindow | Unknown:
    """A share pooled over the newest steps until `min_n` trials, or `enough_steps` steps, and `min_steps` are in.

    `values` replaces the signal's own newest values by a combination of shares, as long and with the same trials.
    Where the number of trials is not known (a log without its config), each step counts as one trial: there is at
    least one, so the evidence is understated, never overstated.
    """
    points = NEWEST if values is None else len(values)
    window = run.window(name, points)
    if window is None:
        return Unknown(f"{name} is not measured")
    shares = window.values if values is None else values
    points = len(shares)
    trials = run.trials(name, points)
    if trials is None:
        trials = np.ones(points)
    total = np.cumsum(trials[::-1])
    enough = min(int(total.searchsorted(min_n)) + 1, enough_steps)
    take = max(enough, min_steps)
    if take > points:
        have = f"{total[-1]:.0f} of {min_n:.0f}" if enough > points else f"{points} of {min_steps} steps"
        return Unknown(f"too little data for {name} so far: {have}")
    pooled = pool_newest(window, shares, trials, take)
    if pooled is None:
        hits, counted = float(shares[-take:] @ trials[-take:]), float(trials[-take:].sum())
        return Unknown(f"{name} is no share of the trials counted beside it: {hits:.3g} of {counted:.3g}")
    return pooled


def median_evidence(
    run: RunView,
    name: str,
    value: float,
    baseline: float | None = None,
    threshold: float | None = None,
    direction: Direction | None = None,
) -> Evidence:
    """Evidence that a signal's median over its newest 10 points is `value`."""
    return Evidence(name, "median", value, 10, span(run, name, 10), baseline, threshold, direction)


def trend_evidence(run: RunView, name: str, z: float, threshold: float) -> Evidence:
    """Evidence of a Mann-Kendall trend over a signal's newest 50 points; its sign is the threshold's."""
    direction: Direction = "above" if threshold > 0 else "below"
    return Evidence(name, "trend_z", z, 50, span(run, name, 50), None, threshold, direction)


def keeps_moving(run: RunView, name: str, limit: float, log: bool = False) -> Evidence | Unknown | None:
    """Evidence that a signal rises (`limit` > 0) or falls (`limit` < 0) over its newest 50 points; None if it does not.

    A trend by Mann-Kendall with z beyond `limit`; or the newest 10 points all lie beyond the first 25. The second,
    because a curve that bends, as in every collapse, leaves residuals that the trend test takes for serial correlation.
    """
    trend, window = run.trend(name, 50, log=log), run.window(name, 50, min_n=50)
    if trend is None or window is None:
        return Unknown(f"{name} has fewer than 50 points in this segment")
    sign = math.copysign(1.0, limit)
    if sign * trend.z > abs(limit):
        return trend_evidence(run, name, trend.z, limit)
    newest, first = sign * window.values[-10:], sign * window.values[:25]
    if newest.min() <= first.max():
        return None
    direction: Direction = "above" if limit > 0 else "below"
    return window.evidence("newest_10", sign * newest.min(), threshold=sign * first.max(), direction=direction)


def held_out_unchecked(run: RunView) -> tuple[str, ...]:
    return () if run.has("eval_reward") else ("reward on held-out prompts: not measured",)


def span(run: RunView, name: str, n: int) -> tuple[int, int]:
    """First and last step of a signal's newest n points."""
    window = run.window(name, n)
    return (run.step, run.step) if window is None else window.span


def trials_known(run: RunView, name: str) -> bool:
    return run.trials(name, 1) is not None


def over(run: RunView, pooled: PooledWindow, unit: str) -> str:
    """ "the last 512 completions", or the steps where the number of completions a step is not known."""
    if trials_known(run, pooled.name):
        return f"the last {pooled.n} {unit}"
    return f"{unit} of the last {pooled.n} logged steps"


def uncounted(run: RunView, name: str, unit: str) -> tuple[str, ...]:
    return () if trials_known(run, name) else (f"how many {unit} a step holds is not known: each step counted as one",)


def steps_for(run: RunView, name: str, trials: float, least: int = 10) -> int:
    """Steps in which about so many trials of a share come in; `least` if that cannot be known."""
    per_step = run.trials(name, 1)
    return max(least, math.ceil(trials / float(per_step[0]))) if per_step is not None and per_step[0] > 0 else 50


# ----------------------------------------------------------------------------------------- how rewards move


@dataclass(frozen=True)
class Progress:
    """The reward's newest 25 points against the 25 before, and 50 against 50 where there are as many.

    `state` is "up" (significant), "rising" (a hint of it), "down", "flat" (a change as large as `share` of the reward
    range would have shown) or "unclear" (too noisy or too short to say).
    """

    state: str
    two: stats.TwoWindow | None
    t: float

    def evidence(self, run: RunView) -> tuple[Evidence, ...]:
        if self.two is None:
            return ()
        window = run.window(REWARD, self.two.n1 + self.two.n2)
        assert window is not None
        return (window.evidence("two_window_t", self.two.t, threshold=SIGNIFICANT),)

    @property
    def words(self) -> str:
        if self.two is None:
            return "too few rewards to compare"
        return f"reward {self.two.mean1:.3g} -> {self.two.mean2:.3g} over {self.two.n1} + {self.two.n2} steps"


def reward_progress(run: RunView, share: float = 0.10) -> Progress:
    """How the reward moves now. A held-out reward that rises counts as "up" too."""
    return _progress(run, [w for w in (run.two(REWARD, 25), run.two(REWARD, 50)) if w is not None], share)


def reward_since(run: RunView, step: int, share: float = 0.10) -> Progress:
    """How the reward moved since a step: the newest 25 points against the 25 up to that step.

    Where the step lies further back than the window, the oldest 25 points that are left stand for it.
    """
    window = run.window(REWARD, min_n=50)
    if window is None:
        return Progress("unclear", None, 0.0)
    end = min(max(int(window.steps.searchsorted(step, side="right")), 25), len(window) - 25)
    two = stats.two_window(window.values[end - 25 : end], window.values[-25:])
    return _progress(run, [two] if two is not None else [], share)


def _progress(run: RunView, comparisons: list[stats.TwoWindow], share: float) -> Progress:
    """`comparisons` begins with the most recent one."""
    if not comparisons:
        return Progress("unclear", None, 0.0)
    recent = comparisons[0]
    highest = max(comparisons, key=lambda w: w.t)
    lowest = min(comparisons, key=lambda w: w.t)
    if highest.t > SIGNIFICANT or held_out_rises(run):
        return Progress("up", highest, highest.t)
    if recent.t < -SIGNIFICANT:
        return Progress("down", recent, recent.t)
    if highest.t > HINT:
        return Progress("rising", highest, highest.t)
    if lowest.t < -SIGNIFICANT:
        return Progress("down", lowest, lowest.t)
    finest = min(comparisons, key=lambda w: w.mde)
    spread = reward_range(run)
    flat = spread is not None and finest.mde <= share * spread
    return Progress("flat" if flat else "unclear", finest, finest.t)


@dataclass(frozen=True)
class Flat:
    """A reward that did not move over `steps` points: `halves` compares the earlier half with the later one.

    `mde` is the change from the first to the last of these points that would have shown: 2 * 2.8 standard errors of
    the difference of the halves, which is half of what a straight line gains.
    """

    steps: int
    halves: stats.TwoWindow
    mde: float
    level: float
    spread: float


def flat_reward(run: RunView, share: float, flat_t: float) -> Flat | Unknown | None:
    """Whether the reward was flat where a change of `share` of its range would have shown; None if it moved.

    Of 100, 200, 400 and 512 points the shortest span is taken over which such a change would show. No two neighbouring
    quarters of it may differ significantly, and the change over all of it must be below that, with 95 % confidence.
    """
    window, spread = run.window(REWARD), reward_range(run)
    if window is None or len(window) < 100:
        return Unknown("a flat reward takes at least 100 steps in this segment to show")
    if spread is None:
        return Unknown("the range of the reward is not known: neither rewards/range nor reward_std is measured")
    margin = share * spread
    for steps in (s for s in (100, 200, 400, 512) if s <= len(window)):
        values = window.values[-steps:]
        halves = stats.two_window(values[: steps // 2], values[steps // 2 :])
        if halves is None:
            return Unknown("too few rewards to compare")
        mde = 2 * halves.mde
        if mde <= margin:
            break
    else:
        need = math.ceil(steps * min(mde / margin, 1e4) ** 2)
        return Unknown(
            f"insufficient evidence: over {steps} steps only a change of {mde:.2g} would show, {mde / spread:.1%} of the "
            f"reward range (needed: {share:.1%}); {need} steps would do"
        )
    if abs(halves.t) >= flat_t or 2 * abs(halves.diff) + 4 * halves.se > margin:
        return None
    width = steps // 4
    for i in (0, width, 2 * width):
        two = stats.two_window(values[i : i + width], values[i + width : i + 2 * width])
        if two is None or abs(two.t) >= SIGNIFICANT:
            return None
    return Flat(steps, halves, mde, float(values[-width:].mean()), spread)


def held_out_rises(run: RunView) -> bool:
    """Whether the reward on held-out prompts rises: the later half of at least six evaluations above the earlier."""
    window = run.window("eval_reward", min_n=6)
    if window is None:
        return False
    half = len(window) // 2
    two = stats.two_window(window.values[:half], window.values[-half:])
    return two is not None and two.t > HINT


def reward_range(run: RunView) -> float | None:
    """Largest minus smallest reward of the run; where it is not measured, a lower bound of it: a standard deviation is
    at most half the range (Popoviciu). None if neither can be known."""
    width = run.last("rewards/range")
    if width is not None:
        return width if width > 0 else None
    window = run.window("reward_std", 100, min_n=20)
    if window is None:
        return None
    bound = 2 * stats.median(window.values)
    return bound if bound > 0 else None


def reference(run: RunView, name: str) -> float | None:
    """What a signal is compared with: its median at points 3 to 22 of the segment; None until they are there.

    A finding that already stands is compared with the beginning of the run: a change of the configuration must not
    make the damage the new normal.
    """
    if run.is_firing:
        first = run.first(name, 22)
        return stats.median(first[2:]) if len(first) == 22 else None
    base = run.base(name)
    return None if base is None else base.median


def scaling(run: RunView) -> str | None:
    """`scale_rewards` as "group", "batch" or "none" (TRL once wrote it True or False); None if not known."""
    value = run.config.get("scale_rewards")
    if isinstance(value, bool):
        return "group" if value else "none"
    return value if value in ("group", "batch", "none") else None


@dataclass(frozen=True)
class DeadGroups:
    """Share of groups without an advantage at each of the newest points, and why."""

    name: str  # the signal that stands for it
    shares: Array
    why: str


def dead_groups(run: RunView) -> DeadGroups | Unknown:
    """Groups that the loss learns nothing from, by the meaning of `scale_rewards`.

    group: the share of the advantage that the normalisation s/(s + 1e-4) does not keep; ties keep nothing.
    batch, none: ties, and groups whose spread is below 2 % of the reward range.
    """
    zero = run.window("groups/zero_std", NEWEST)
    if run.config.get("dynamic_sampling") is True:
        return _groups_left(run)
    if zero is not None:
        extra, n = scaling(run), len(zero)
        if extra == "group":
            kept = run.window("groups/attenuation", n, min_n=n)
            if kept is not None and float(np.mean(1 - kept.values - zero.values)) > 0.05:
                why = "had so small a spread of rewards that normalisation (std + 1e-4) left no advantage"
                return DeadGroups(zero.name, np.maximum(1 - kept.values, zero.values), why)
        elif extra in ("batch", "none"):
            tiny = run.window("groups/tiny_std", n, min_n=n)
            if tiny is not None and float(np.mean(tiny.values)) > 0.05:
                why = (
                    f"had rewards equal or within 2% of the reward range, which scale_rewards='{extra}' leaves next "
                    "to no advantage"
                )
                return DeadGroups(zero.name, np.minimum(zero.values + tiny.values, 1.0), why)
        return DeadGroups(zero.name, zero.values, "had equal rewards, so no advantage")
    return _logged_dead_groups(run)


def _groups_left(run: RunView) -> DeadGroups | Unknown:
    name = "dynamic_sampling/left_share"
    left = run.window(name, NEWEST)
    if left is None:
        return Unknown(f"dynamic_sampling replaces groups without spread, and {name} is not measured")
    return DeadGroups(name, left.values, "had equal rewards even after dynamic_sampling had replaced such groups")


def _logged_dead_groups(run: RunView) -> DeadGroups | Unknown:
    name = "frac_reward_zero_std"
    if signal_table.impossible(name, run.method, run.config):
        return Unknown(
            f"{name} speaks of the batch, not the groups, under this configuration; groups/zero_std is needed"
        )
    window = run.window(name, NEWEST)
    if window is None:
        return Unknown(f"neither groups/zero_std nor {name} is measured")
    if run.method == "rloo" and run.config.get("beta") != 0:
        return Unknown(f"{name} is blind in RLOO with beta > 0: the KL term is taken from the rewards first")
    return DeadGroups(name, window.values, "had equal rewards, so no advantage")
