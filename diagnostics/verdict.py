"""The state of a run: one word, its evidence, and what else it might be.

The states are decided in order, first match wins; a table that can be read beats a model that cannot. What counts as
progress, and when it is believed, stands in `progress.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from outspoken.diagnostics import progress as goals
from outspoken.diagnostics.progress import SIGNIFICANT, Progress
from outspoken.diagnostics.records import Confidence, Evidence, Severity
from outspoken.diagnostics.view import RunView

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

DWELL_STEPS = 20  # a state is kept this long, unless the run breaks or collapses
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


def nothing_yet() -> Verdict:
    return Verdict("warming_up", "high", "No step was observed yet.")


def decide(
    view: RunView,
    firing: Mapping[str, Severity],
    held: Mapping[str, Severity],
    final: bool = False,
    on_new: Progress | None = None,
) -> Verdict:
    """The verdict now.

    Args:
        firing, held: the codes that fire, and those that are suppressed -> severity.
        final: the run is over.
        on_new: how the goal moved in the first pass over the data, where the view does not reach back to it.
    """
    p = goals.progress(view)
    evidence = (p.evidence(),) if p is not None else ()
    both = {**held, **firing}

    broken = [c for c, least in BROKEN.items() if c in firing and _at_least(firing[c], least)]
    if broken:
        return Verdict("broken", "high", f"{_names(broken)} fires.", evidence, None, f"{_names(broken)} resolved")

    collapse = [c for c, least in COLLAPSING.items() if c in both and _at_least(both[c], least)]
    leaders = [c for c in LEADERS if c in both]
    signal_lost = [c for c in NO_SIGNAL if c in both]
    rising = p is not None and p.up()
    doubt = goals.doubt(view, on_new or goals.first_pass(view)) if rising and goals.compares(view) else None
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
    held_out = goals.held_out_progress(view, p.sign)
    if "SFT001" in firing:
        return Verdict(
            "over_optimising", "high", "Held-out loss rises while training loss falls (SFT001).", evidence, "improving"
        )
    if rising and held_out is not None and held_out.sign * _t(held_out) < -SIGNIFICANT:
        both_evidence = (*evidence, held_out.evidence())
        return Verdict(
            "over_optimising", "high", f"{p.signal} improves, {held_out.signal} worsens.", both_evidence, "improving"
        )
    by_chance = goals.at_chance(view, final) if goals.compares(view) else None
    if by_chance is not None:
        return Verdict(
            "stalled_no_signal", "medium", by_chance[0], (*evidence, by_chance[1]), "plateauing", "more pairs are told apart"
        )  # fmt: skip
    if doubt is not None:
        return Verdict("unknown", "medium", f"{doubt}.", evidence, "improving", "held-out pairs are told apart")
    displaced = goals.displaced(view) if rising else None
    if displaced is not None:
        return Verdict(
            "drifting", "medium", f"{p.signal} rises while {displaced[0]}.", (*evidence, displaced[1]), "over_optimising",
            "chosen answers become likelier again",
        )  # fmt: skip
    drift = [c for c in DRIFT if c in firing]
    if drift and not rising:
        return Verdict(
            "drifting", "medium", f"{_names(drift)} fires while {p.signal} is flat.", evidence, "plateauing"
        )
    moving_scale = bool(view.config.get("sync_ref_model"))  # margins start anew when the reference moves
    if p.recent is not None and p.sign * p.recent.t < -SIGNIFICANT and not rising and not moving_scale:
        return Verdict("drifting", "low", f"{p.signal} worsens.", evidence, "collapsing", "the trend turns")
    if "RL031" not in firing and rising and not any(firing.get(c) in ("warning", "error") for c in LENGTH_OR_GAP):
        return Verdict(
            "improving", _how_sure(view, p, held_out), f"{p.moved()}.", evidence, "plateauing", f"{p.signal} stops improving"
        )  # fmt: skip
    if p.sign > 0 and _near_ceiling(view, p):
        return Verdict(
            "converged", "medium", f"{p.signal} is flat near the largest value seen.", evidence, "plateauing"
        )
    if "RL031" in firing or _excludes_change(view, p):
        return Verdict(
            "plateauing", "medium", f"{p.signal} is flat, and a change would have shown.", evidence, "improving"
        )
    if final and rising:
        return Verdict("improving", "low", f"{p.moved()}.", evidence, "drifting")
    mde = p.recent.mde if p.recent is not None else None
    need = f" (smallest change that would show: {mde:.3g})" if mde is not None else ""
    return Verdict(
        "unknown", "medium", f"No significant change of {p.signal} so far{need}.", evidence, "plateauing", "more steps"
    )


def _t(p: Progress) -> float:
    return p.total.t if p.total is not None else 0.0


def _at_least(severity: Severity, least: str) -> bool:
    order = ("info", "warning", "error")
    return order.index(severity) >= order.index(least)


def _names(codes: Sequence[str]) -> str:
    return ", ".join(codes)


def _how_sure(view: RunView, p: Progress, held_out: Progress | None) -> Confidence:
    """How far "improving" is to be trusted: high with held-out data, low where new and old pairs cannot be told."""
    if goals.compares(view):
        if goals.held_out_confirms(view, p.sign):
            return "high"
        return "medium" if goals.epoch_known(view) else "low"
    return "high" if held_out is not None and held_out.up() else "medium"


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
    on_new: Progress | None = None  # how the goal moved in the first pass over the data

    def update(
        self, view: RunView, firing: Mapping[str, Severity], held: Mapping[str, Severity], final: bool = False
    ) -> Verdict:
        if goals.compares(view):
            self._keep(goals.first_pass(view), goals.in_first_pass(view))
        new = decide(view, firing, held, final, self.on_new)
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

    def _keep(self, now: Progress | None, lasts: bool) -> None:
        """Remember the first pass over the data as it was last seen whole; later the view holds less and less of it."""
        before = self.on_new
        if now is not None and (before is None or now.n >= before.n or (lasts and now.total is not None)):
            self.on_new = now

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
