"""A change of a live run: judged after it was applied, against the effect that was promised.

Everything here is a pure function of a `RunView` or of records; applying and rolling back are the callback's business.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from outspoken.diagnostics import signals as signal_table
from outspoken.diagnostics import stats
from outspoken.diagnostics.progress import goal_of
from outspoken.diagnostics.view import Array, RunView

SCHEMA = "outspoken.change/1"

# Settings with which a loss is another quantity, so that its values before and after do not compare.
REDEFINE_THE_LOSS = {
    *("beta", "loss_type", "loss_weights", "label_smoothing", "label_smoothing_factor", "ld_alpha", "length_alpha"),
    *("dpop_lambda", "discopop_tau", "f_alpha_divergence_coef", "desirable_weight", "undesirable_weight"),
    *("center_rewards_coefficient", "router_aux_loss_coef"),
}

# A goal that falls by this many standard errors has been harmed. Measured on changes without any effect: none is
# blamed at independent steps, 1 in 400 at a lag-1 correlation of 0.3, 1 in 40 at 0.6.
HARM_T = 4.0
HARM_POINTS = 10  # points after the change before harm is judged
GOAL_POINTS = 30  # points of the goal kept from before the change
WITHOUT_PROMISE = 30  # steps after which a change that promised nothing counts as harmless


@dataclass
class Trial:
    """A change under way: what it promised, and what the run was like before it."""

    record: dict[str, Any]
    step: int
    goal: str | None = None
    goal_sign: int = 1
    goal_before: Array = field(default_factory=lambda: np.empty(0))
    errors_before: frozenset[str] = frozenset()

    @property
    def earliest(self) -> int:
        """The first step at which the promise may count as kept.

        Weights that were just taken back to a good checkpoint are good at once; that they stay so is the effect.
        """
        expect = self.record.get("expect")
        return self.step + (int(expect["within_steps"]) // 2 if expect and self.record.get("restore") else 0)

    @property
    def deadline(self) -> int:
        expect = self.record.get("expect")
        return self.step + (int(expect["within_steps"]) if expect else WITHOUT_PROMISE)


@dataclass(frozen=True)
class Judgement:
    """Whether the change did what it promised; `observed` holds the numbers it was judged by."""

    outcome: Literal["verified", "failed"]
    reason: str
    observed: Mapping[str, Any]


def start_trial(record: dict[str, Any], view: RunView, errors: frozenset[str]) -> Trial:
    """Remember the run as it is before the change takes effect. Call it before the new segment is opened."""
    trial = Trial(record, view.step, errors_before=errors)
    goal = goal_of(view)
    if goal is not None:
        trial.goal, trial.goal_sign = goal
        window = view.window(trial.goal, GOAL_POINTS)
        if window is not None:
            trial.goal_before = window.values.copy()
        changed = record.get("fields", {})
        if trial.goal == "loss" and REDEFINE_THE_LOSS & changed.keys():
            trial.goal = None  # before and after are not the same quantity
        elif trial.goal == "rewards/margins" and "beta" in changed and changed["beta"]["old"]:
            trial.goal_before = trial.goal_before * (changed["beta"]["new"] / changed["beta"]["old"])
    return trial


def judge(trial: Trial, view: RunView, errors: frozenset[str]) -> Judgement | None:
    """Judge a trial on the steps since it was applied; None while it is too early.

    A change fails when a new error fires, when the goal falls by more than `HARM_T` standard errors, or when the
    promised effect has not come by the deadline. Without a promise it is verified once `WITHOUT_PROMISE` steps
    brought no harm.
    """
    fresh = sorted(errors - trial.errors_before)
    if fresh:
        return Judgement("failed", f"{', '.join(fresh)} fired after the change", {"errors": fresh})
    harm = _goal_moved(trial, view)
    observed: dict[str, Any] = {}
    if harm is not None:
        observed |= {"goal": trial.goal, "goal_before": harm.mean1, "goal_after": harm.mean2, "goal_t": harm.t}
        if trial.goal_sign * harm.t < -HARM_T:
            worse = f"{trial.goal} went from {harm.mean1:.4g} to {harm.mean2:.4g} after the change (T={harm.t:.1f})"
            return Judgement("failed", worse, observed)
    expect = trial.record.get("expect")
    if not expect:
        if view.step >= trial.deadline:
            return Judgement("verified", f"no harm within {WITHOUT_PROMISE} steps; no effect was promised", observed)
        return None
    value, n = _measure(expect, view)
    observed |= {"signal": expect["signal"], "value": value, "n": n}
    if value is not None and view.step >= trial.earliest:
        below = expect["direction"] == "below"
        if (value <= expect["value"]) if below else (value >= expect["value"]):
            return Judgement("verified", f"{_said(expect, value)}, as promised", observed)
    if view.step >= trial.deadline:
        if value is None:
            have = f"{expect['signal']} gave {n} of the {expect['min_n']} values needed"
            return Judgement("failed", f"{have} by step {trial.deadline}", observed)
        return Judgement("failed", f"{_said(expect, value)} at step {view.step}", observed)
    return None


def surviving(observations: Sequence[dict[str, Any]], step: int) -> list[dict[str, Any]]:
    """The observation records that led to the checkpoint of `step`, without those of steps that were thrown away.

    A run that died and was resumed from an earlier checkpoint did some steps anew; the later ones count. A step was
    done anew if it was timed again, or if the segment that opened with it begins before it.
    """
    kept: list[dict[str, Any]] = []
    for record in observations:
        at = record.get("step")
        if not isinstance(at, int) or not isinstance(record.get("signals"), Mapping):
            continue
        last = kept[-1] if kept else None
        timed = "time/step" in record["signals"]  # not an evaluation after the step
        if last and (
            at <= last["step"] if timed else at < last["step"] and record.get("segment") != last.get("segment")
        ):
            kept = [earlier for earlier in kept if earlier["step"] < at]
        if at <= step:
            kept.append(record)
    return kept


def lasting(
    records: Sequence[Mapping[str, Any]], observations: Sequence[Mapping[str, Any]], step: int
) -> dict[str, tuple[Any, Any]]:
    """Field -> (value at the start, value now) of the changes that hold at the checkpoint of `step`.

    Args:
        records: of changes.jsonl. observations: of metrics.jsonl; they tell which changes belong to steps that a
            resume from an earlier checkpoint has thrown away.
    """
    began: dict[int, int] = {}  # segment -> its first observed step
    for observation in observations:
        segment, at = observation.get("segment"), observation.get("step")
        if isinstance(segment, int) and isinstance(at, int):
            began.setdefault(segment, at)
    start: dict[str, Any] = {}
    now: dict[str, Any] = {}
    for record in records:
        if record.get("state") not in ("applied", "rolled_back") or record["step"] > step:
            continue
        if any(segment > record["segment"] and at <= record["step"] for segment, at in began.items()):
            continue
        for name, pair in record["fields"].items():
            start.setdefault(name, pair["old"])
            now[name] = pair["new"] if record["state"] == "applied" else pair["old"]
    return {name: (start[name], value) for name, value in now.items() if value != start[name]}


def _said(expect: Mapping[str, Any], value: float) -> str:
    return f"{expect['signal']} is {value:.4g} (promised: {expect['direction']} {expect['value']:.4g})"


def _goal_moved(trial: Trial, view: RunView) -> stats.TwoWindow | None:
    if trial.goal is None or len(trial.goal_before) < HARM_POINTS:
        return None
    after = view.window(trial.goal, GOAL_POINTS, min_n=HARM_POINTS)
    if after is None:
        return None
    return stats.two_window(trial.goal_before, after.values)


def _measure(expect: Mapping[str, Any], view: RunView) -> tuple[float | None, int]:
    """The promised signal's value since the change, and how many trials or points stand behind it."""
    name, min_n = expect["signal"], int(expect["min_n"])
    if signal_table.weight_of(name) is not None:
        pooled = view.pooled(name, min_n)
        if pooled is not None:
            return pooled.mean, pooled.n
        window = view.window(name)
        return None, 0 if window is None else len(window)
    window = view.window(name, min_n, min_n=min_n)
    if window is None:
        ring = view.rings.get(name)
        return None, 0 if ring is None else ring.size
    return (window.median if math.isfinite(window.median) else None), len(window)
