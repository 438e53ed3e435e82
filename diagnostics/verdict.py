"""The state of a run: one word, its evidence, and what else it might be.

The states are decided in order, first match wins; a table that can be read beats a model that cannot. Progress is
the reward (online RL), minus the loss (supervised) or the margin (preference), compared by the two-window test.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from outspoken.diagnostics import stats
from outspoken.diagnostics.records import Confidence, Evidence, Severity
from outspoken.diagnostics.view import Array, RunView

SCHEMA = "outspoken.verdict/1"

STATES = (
    "warming_up",
    "improving",
    "converged",
    "plateauing",
    "stalled_no_signal",
    "drifting",
    "over_optimising",
    "collapsing",
    "broken",
    "unknown",
)

# Codes that by themselves decide a state, when they fire with the severity given (or worse).
BROKEN = {
    "NUM001": "warning",
    "NUM002": "warning",
    "NUM008": "error",
    "NUM015": "error",
    "RL004": "error",
    "DAT003": "error",
}
NO_SIGNAL = ("RL001", "RL003", "RL002")
COLLAPSING = {"RL033": "warning", "NUM009": "warning"}
LEADERS = ("NUM006", "RL006", "RL012", "RL027")
DRIFT = ("RL007", "RL012")
LENGTH_OR_GAP = ("RL015", "RL018", "RL019", "RL027")

SIGNIFICANT = 3.5  # |T| of the two-window test
DWELL_STEPS = 20  # a state is kept this long, unless the run breaks or collapses
MIN_POINTS = 8  # points on each side of a comparison
MAX_POINTS = 50
EARLY_POINTS = 10  # a short beginning, beside the long one
CEILING = 0.95  # share of the largest reward seen above which a flat reward means converged
SMALL_MDE = 0.05  # a change that a plateau must be able to exclude, as a share of the signal's range


@dataclass(frozen=True)
class Verdict:
    state: str
    confidence: Confidence
    reason: str
    evidence: tuple[Evidence, ...] = ()
    runner_up: str | None = None
    would_change: str = ""
    since_step: int = 0

    def as_dict(self) -> dict[str, Any]:
        return {
            "state": self.state,
            "confidence": self.confidence,
            "reason": self.reason,
            "evidence": [e.as_dict() for e in self.evidence],
            "runner_up": self.runner_up,
            "would_change": self.would_change,
            "since_step": self.since_step,
        }


@dataclass(frozen=True)
class Progress:
    """How the run's goal moved: `recent` against the window before, `total` against the run's beginning."""

    signal: str
    sign: int  # +1 where larger is better
    recent: stats.TwoWindow | None
    total: stats.TwoWindow | None
    level: float
    n: int
    window: tuple[int, int]

    def up(self) -> bool:
        recent, total = self._t(self.recent), self._t(self.total)
        return (total is not None and total > SIGNIFICANT) or (
            recent is not None and recent > SIGNIFICANT and (total is None or total > 0)
        )

    def down(self) -> bool:
        recent, total = self._t(self.recent), self._t(self.total)
        return (total is not None and total < -SIGNIFICANT) or (recent is not None and recent < -SIGNIFICANT)

    def _t(self, two: stats.TwoWindow | None) -> float | None:
        return None if two is None else self.sign * two.t

    def evidence(self) -> Evidence:
        best = self.total or self.recent
        t = best.t if best is not None else None
        return Evidence(self.signal, "two_window_t", t, self.n, self.window, threshold=SIGNIFICANT)


def goal_of(view: RunView) -> tuple[str, int] | None:
    """The signal that says how well the run does, and its sign; None if it is not there."""
    if view.method in ("grpo", "rloo", "ppo", "online_dpo"):
        candidates: tuple[tuple[str, int], ...] = (
            ("reward", 1),
            ("objective/scores", 1),
            ("objective/rlhf_reward", 1),
        )
    elif view.method in ("dpo", "kto", "orpo", "cpo", "simpo", "bco"):
        candidates = (("rewards/margins", 1), ("loss", -1))
    else:
        candidates = (("loss", -1),)
    for name, sign in candidates:
        if view.has(name):
            return name, sign
    return None


def progress(view: RunView) -> Progress | None:
    goal = goal_of(view)
    if goal is None:
        return None
    name, sign = goal
    window = view.window(name)
    if window is None:
        return None
    n = len(window)
    width = min(MAX_POINTS, max(MIN_POINTS, n // 3))
    recent = stats.two_window(window.values[-2 * width : -width], window.values[-width:]) if n >= 2 * width else None
    newest = window.values[-min(width, n) :]
    total = _since_beginning(view, name, newest, (EARLY_POINTS, width))
    return Progress(name, sign, recent, total, float(np.mean(newest)), n, window.span)


def _since_beginning(view: RunView, name: str, newest: Array, widths: tuple[int, ...]) -> stats.TwoWindow | None:
    """The newest points against the run's first ones. Of several widths of the beginning the clearest counts: a short
    one sees a gain that came at once, a long one a gain that came slowly."""
    compared = []
    for width in widths:
        first = view.first(name, width)
        if min(len(first), len(newest)) < MIN_POINTS or view.rings[name].total < len(first) + len(newest):
            continue
        compared.append(stats.two_window(first, newest))
    return max((c for c in compared if c is not None), key=lambda c: abs(c.t), default=None)


def nothing_yet() -> Verdict:
    return Verdict("warming_up", "high", "No step was observed yet.")


def decide(
    view: RunView, firing: Mapping[str, Severity], held: Mapping[str, Severity], final: bool = False
) -> Verdict:
    """The verdict now. `firing` and `held` (suppressed) map codes to severities."""
    p = progress(view)
    evidence = (p.evidence(),) if p is not None else ()
    both = {**held, **firing}

    broken = [c for c, least in BROKEN.items() if c in firing and _at_least(firing[c], least)]
    if broken:
        return Verdict("broken", "high", f"{_names(broken)} fires.", evidence, None, f"{_names(broken)} resolved")

    collapse = [c for c, least in COLLAPSING.items() if c in both and _at_least(both[c], least)]
    leaders = [c for c in LEADERS if c in both]
    signal_lost = [c for c in NO_SIGNAL if c in both]
    rising = p is not None and p.up()
    if collapse:
        return Verdict("collapsing", "high", f"{_names(collapse)} fires.", evidence, "drifting", "the goal recovers")

    if signal_lost and not rising:
        if signal_lost == ["RL002"]:
            return Verdict(
                "converged", "medium", "Almost every group is solved (RL002).", evidence, "stalled_no_signal"
            )
        cause = [c for c in ("RL016", "RL004") if c in both]
        why = f" because of {_names(cause)}" if cause else ""
        return Verdict(
            "stalled_no_signal",
            "high",
            f"Too few groups carry a learning signal ({_names(signal_lost)}){why}.",
            evidence,
            "plateauing",
            "groups with different rewards return",
        )

    if not view.warmed_up and not (final and p is not None and p.total is not None):
        if final:
            return Verdict("unknown", "high", f"Only {view.points} observations: too few to judge.", evidence)
        return Verdict("warming_up", "high", f"{view.points} observations; baselines are not known yet.", evidence)
    if p is None:
        return Verdict("unknown", "high", "Neither a reward nor a loss is logged.", ())

    if len(leaders) >= 2 and not rising:
        return Verdict(
            "collapsing", "medium", f"{_names(leaders)} fire while {p.signal} does not improve.", evidence, "drifting"
        )
    held_out = held_out_progress(view, p.sign)
    if "SFT001" in firing:
        return Verdict(
            "over_optimising", "high", "Held-out loss rises while training loss falls (SFT001).", evidence, "improving"
        )
    if rising and held_out is not None and held_out.sign * _t(held_out) < -SIGNIFICANT:
        both_evidence = (*evidence, held_out.evidence())
        return Verdict(
            "over_optimising", "high", f"{p.signal} improves, {held_out.signal} worsens.", both_evidence, "improving"
        )
    drift = [c for c in DRIFT if c in firing]
    if drift and not rising:
        return Verdict(
            "drifting", "medium", f"{_names(drift)} fires while {p.signal} is flat.", evidence, "plateauing"
        )
    if p.recent is not None and p.sign * p.recent.t < -SIGNIFICANT and not rising:
        return Verdict("drifting", "low", f"{p.signal} worsens.", evidence, "collapsing", "the trend turns")
    if "RL031" not in firing and rising and not any(firing.get(c) in ("warning", "error") for c in LENGTH_OR_GAP):
        confidence: Confidence = "high" if held_out is not None and held_out.up() else "medium"
        return Verdict("improving", confidence, _moved(p), evidence, "plateauing", f"{p.signal} stops improving")
    if p.sign > 0 and _near_ceiling(view, p):
        return Verdict(
            "converged", "medium", f"{p.signal} is flat near the largest value seen.", evidence, "plateauing"
        )
    if "RL031" in firing or _excludes_change(view, p):
        return Verdict(
            "plateauing", "medium", f"{p.signal} is flat, and a change would have shown.", evidence, "improving"
        )
    if final and rising:
        return Verdict("improving", "low", _moved(p), evidence, "drifting")
    mde = p.recent.mde if p.recent is not None else None
    need = f" (smallest change that would show: {mde:.3g})" if mde is not None else ""
    return Verdict(
        "unknown", "medium", f"No significant change of {p.signal} so far{need}.", evidence, "plateauing", "more steps"
    )


def held_out_progress(view: RunView, sign: int) -> Progress | None:
    """Progress on held-out data, from at least six evaluations (three against three)."""
    for name, direction in (("eval_reward", 1), ("eval_loss", -1)):
        if direction != sign and view.method not in ("dpo", "kto"):
            continue
        window = view.window(name, min_n=6)
        if window is not None:
            half = min(len(window) // 2, 10)
            total = stats.two_window(window.values[:half], window.values[-half:])
            return Progress(name, direction, None, total, window.values[-1], len(window), window.span)
    return None


def _t(p: Progress) -> float:
    return p.total.t if p.total is not None else 0.0


def _at_least(severity: Severity, least: str) -> bool:
    order = ("info", "warning", "error")
    return order.index(severity) >= order.index(least)


def _names(codes: Sequence[str]) -> str:
    return ", ".join(codes)


def _moved(p: Progress) -> str:
    two = p.total or p.recent
    assert two is not None
    return f"{p.signal} went from {two.mean1:.4g} to {two.mean2:.4g} (T={two.t:.1f})."


def _near_ceiling(view: RunView, p: Progress) -> bool:
    best, worst = view.last("rewards/max_seen"), view.last("rewards/min_seen")
    if best is None or worst is None or best <= worst:
        return False
    return p.level >= worst + CEILING * (best - worst)


def _excludes_change(view: RunView, p: Progress) -> bool:
    if p.recent is None or abs(p.recent.t) > SIGNIFICANT:
        return False
    spread = view.last("rewards/range")
    scale = spread if spread else abs(p.level)
    return scale > 0 and p.recent.mde <= SMALL_MDE * scale


@dataclass
class VerdictTracker:
    """Keeps a verdict from flickering: a new state must last, unless the run breaks or collapses."""

    current: Verdict = field(default_factory=nothing_yet)
    candidate: str | None = None
    candidate_since: int = 0

    def update(
        self, view: RunView, firing: Mapping[str, Severity], held: Mapping[str, Severity], final: bool = False
    ) -> Verdict:
        new = decide(view, firing, held, final)
        at_once = final or new.state in ("broken", "collapsing") or self.current.state == "warming_up"
        if new.state == self.current.state:
            self.candidate = None
            self.current = _since(new, self.current.since_step)
        elif at_once or self._lasted(new, view):
            self.candidate = None
            self.current = _since(new, view.step)
        elif self.candidate != new.state:
            self.candidate, self.candidate_since = new.state, view.step
        return self.current

    def _lasted(self, new: Verdict, view: RunView) -> bool:
        return self.candidate == new.state and view.step - self.candidate_since >= DWELL_STEPS


def _since(verdict: Verdict, step: int) -> Verdict:
    return Verdict(
        verdict.state,
        verdict.confidence,
        verdict.reason,
        verdict.evidence,
        verdict.runner_up,
        verdict.would_change,
        step,
    )
