"""The engine: observations in, transitions of diagnostics out.

It owns all that is not a rule's business: bounded windows, warm-up, cadence, the life cycle of a diagnostic,
inhibition (a cause is named before its effects), the budget of lines shown, segments, and the verdict. A rule that
raises is reported once and never stops a run.
"""

import difflib
import hashlib
import json
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from outspoken.diagnostics import verdict as verdicts
from outspoken.diagnostics.records import (
    MAX_TEXT,
    SEVERITIES,
    Finding,
    Observation,
    RuleResult,
    Severity,
    State,
    Unknown,
)
from outspoken.diagnostics.rules.registry import Rule, all_rules, parameters
from outspoken.diagnostics.view import Ring, RunView

DIAGNOSTIC_SCHEMA = "outspoken.diagnostic/1"
DOC = "docs/rules/{code}.md"
MAX_MESSAGE = 2000

HOLD = 20  # evaluations that a finding waits, beyond its own `for`, while its cause is pending or named by itself
GRACE = 20  # points of a new segment in which a firing diagnostic is not called unknown for want of data
SHOWN_PER_SEVERITY = 3  # lines shown per severity within BUDGET_STEPS; errors are always shown
BUDGET_STEPS = 100
REMINDER_STEPS = 100  # first reminder of a firing diagnostic; the gap doubles each time
MAX_SIGNALS = 2000  # names kept; a run that invents names does not grow memory
NONFINITE_KEPT = 64
RAISES_BEFORE_OFF = 3
VERDICT_EVERY = 5  # observations between two verdicts


@dataclass(frozen=True)
class Transition:
    """One change of a diagnostic's state, or a reminder that it still fires.

    `record` is the whole diagnostic as written to disk. `shown` says whether a person sees a line for it.
    """

    record: dict[str, Any]
    shown: bool
    kind: Literal["transition", "reminder"] = "transition"


@dataclass
class _Life:
    """The life of one rule's diagnostic in one run."""

    state: State | None = None
    hits: int = 0
    misses: int = 0
    unknowns: int = 0
    count: int = 0
    episode: int = 0
    first_step: int = 0
    fired_step: int | None = None
    last_step: int = 0
    onset_step: int | None = None
    finding: Finding | None = None
    severity: Severity = "info"
    shown: bool = False
    causes: list[str] = field(default_factory=list)
    remind_at: int = 0
    remind_gap: int = REMINDER_STEPS
    reason: str = ""  # why it cannot be judged now
    recorded_segment: int = 0  # of the newest record
    fresh: bool = False  # whether the newest evaluation found it


def config_revision(config: Mapping[str, Any]) -> str:
    """A short name of a configuration: equal configurations have equal names."""
    text = json.dumps(config, sort_keys=True, default=repr)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()[:16]


class Engine:
    """Watches one run.

    Args:
        method: "sft", "grpo", "dpo" …; "unknown" evaluates the rules that make sense for any run.
        config: the run's settings by field name, as far as known.
        facts: what else is known of the run (see `RunView.facts`).
        params: overrides of rule parameters: code -> {parameter: number}.
        ignore: codes of rules that are switched off.
        total_steps: planned optimizer steps.
        source: "trainer" (live) or "log" (read after the fact).

    Raises:
        ValueError: `params` or `ignore` name a rule or parameter that does not exist.
    """

    def __init__(
        self,
        *,
        method: str,
        config: Mapping[str, Any],
        facts: Mapping[str, Any] | None = None,
        params: Mapping[str, Mapping[str, Any]] | None = None,
        ignore: Iterable[str] = (),
        total_steps: int | None = None,
        run_id: str = "run",
        source: Literal["trainer", "log"] = "trainer",
        rules: Mapping[str, Rule] | None = None,
        clock: Callable[[], float] = time.time,
    ):
        known = dict(all_rules() if rules is None else rules)
        for where, codes in (("diagnostics_params", params or {}), ("diagnostics_ignore", ignore)):
            for code in codes:
                if code not in known:
                    near = difflib.get_close_matches(str(code), known, n=1)
                    hint = f"; did you mean {near[0]}?" if near else "; `outspoken rules` lists them"
                    raise ValueError(f"{where} names {code!r}, which is no rule{hint}")
        self.run_id = run_id
        self.view = RunView(method, config, facts or {}, source)
        self.view.total_steps = total_steps
        self.config_rev = config_revision(self.view.config)
        self._clock = clock
        self._ignored = set(ignore)
        self._rules = [
            r
            for code, r in known.items()
            if code not in self._ignored and method in r.methods and not (r.live_only and source == "log")
        ]
        self._params = {r.code: parameters(r, (params or {}).get(r.code)) for r in self._rules}
        self._phase = {r.code: zlib.crc32(r.code.encode()) % max(1, r.every) for r in self._rules}
        self._lives = {r.code: _Life() for r in self._rules}
        self._by_code = {r.code: r for r in self._rules}
        self._raised: dict[str, int] = {}
        self._verdict_failure = ""
        self._shown_at: dict[str, list[int]] = {}
        self._hidden: list[str] = []
        self._last_digest = 0
        self._finished = False
        self.tracker = verdicts.VerdictTracker()
        self._verdict: dict[str, Any] = self._stamp_verdict(verdicts.nothing_yet())

    # ------------------------------------------------------------------ input

    def begin(self) -> list[Transition]:
        """Before the first step: evaluate the rules that need no signal, on the facts and settings alone."""
        transitions: list[Transition] = []
        for r in self._rules:
            if not r.needs and not r.warm_up:
                transitions.extend(self._evaluate(r))
        return transitions

    def observe(self, observation: Observation) -> list[Transition]:
        """Take one step's signals, evaluate the rules that are due, and return what changed."""
        view = self.view
        if view.points and observation.step < view.step:
            self.open_segment(observation.step, "the step counter went back")
        self._ingest(observation)
        transitions: list[Transition] = []
        for r in self._rules:
            if r.every == 1 or (view.segment_points + self._phase[r.code]) % r.every == 0:
                transitions.extend(self._evaluate(r))
        transitions.extend(self._reminders())
        if transitions or view.points % VERDICT_EVERY == 0:
            self._judge(final=False)
        return transitions

    def open_segment(self, step: int, reason: str, config: Mapping[str, Any] | None = None) -> None:
        """Begin a segment: the configuration changed or the run was resumed. Baselines start anew, lives go on."""
        view = self.view
        if config is not None:
            view.config = dict(config)
            self.config_rev = config_revision(view.config)
        for ring in view.rings.values():
            ring.start_segment()
        view.segment += 1
        view.segment_start = step
        view.segment_points = 0
        view.step = step
        for life in self._lives.values():
            if life.state == "pending":
                life.state, life.hits = None, 0

    def finish(self) -> list[Transition]:
        """The run is over: evaluate every rule once more, whatever its cadence, and give the final verdict."""
        if self._finished:
            return []
        self._finished = True
        transitions: list[Transition] = []
        if self.view.points:
            for r in self._rules:
                transitions.extend(self._evaluate(r))
        self._judge(final=True)
        return transitions

    def _ingest(self, observation: Observation) -> None:
        view = self.view
        view.step = step = observation.step
        view.points += 1
        view.segment_points += 1
        rings = view.rings
        if observation.epoch is not None and "epoch" not in observation.signals:
            rings.setdefault("epoch", Ring()).append(step, observation.epoch)
        for name, value in observation.signals.items():
            ring = rings.get(name)
            if ring is None:
                if len(rings) >= MAX_SIGNALS:
                    continue
                ring = rings[name] = Ring()
            ring.append(step, value)
        view.nonfinite_now = observation.nonfinite
        for name in observation.nonfinite:
            if name in view.nonfinite or len(view.nonfinite) < MAX_SIGNALS:
                steps = view.nonfinite.setdefault(name, [])
                steps.append(step)
                if len(steps) > NONFINITE_KEPT:  # the first of the segment stays: it tells since when
                    del steps[steps[0] >= view.segment_start]
        if observation.unreadable and len(view.unreadable) < MAX_SIGNALS:
            view.unreadable.update(observation.unreadable)

    # ------------------------------------------------------------------ rules

    def _evaluate(self, r: Rule) -> list[Transition]:
        life = self._lives[r.code]
        life.fresh = False
        if self._raised.get(r.code, 0) >= RAISES_BEFORE_OFF:
            return []
        result = self._check(r, life)
        if isinstance(result, Finding):
            return self._found(r, life, result)
        if isinstance(result, Unknown):
            return self._not_judged(r, life, result.reason)
        return self._fine(r, life)

    def _check(self, r: Rule, life: _Life) -> RuleResult:
        view = self.view
        for name in r.needs:
            if not view.has(name):
                state = view.state(name)
                if state == "impossible":
                    return Unknown(f"{name} cannot exist under this configuration")
                if state == "nonfinite":
                    return Unknown(f"{name} has had no finite value")
                return Unknown(f"{name} is not measured" if view.points >= 10 else f"{name} not seen yet")
        if r.warm_up and not view.warmed_up:
            return Unknown("too early: 20 steps, 10 points and the learning rate's warm-up have to pass first")
        view.is_firing = life.state in ("firing", "suppressed", "unknown")
        try:
            return r.check(view, self._params[r.code])
        except Exception as error:  # a rule of ours must never stop a run
            self._raised[r.code] = self._raised.get(r.code, 0) + 1
            return Unknown(f"the rule failed: {type(error).__name__}: {error}"[:MAX_TEXT])

    def _found(self, r: Rule, life: _Life, finding: Finding) -> list[Transition]:
        step = self.view.step
        life.reason, life.fresh = "", True
        life.hits += 1
        life.misses = life.unknowns = 0
        if life.state in (None, "resolved"):
            life.state = "pending"
            life.episode += 1
            life.first_step, life.fired_step, life.count = step, None, 0
            life.onset_step = step if finding.onset_step is None else finding.onset_step
            life.severity, life.causes = finding.severity or r.severity, []
        if finding.onset_step is not None and life.onset_step is not None:
            life.onset_step = min(life.onset_step, finding.onset_step)
        life.finding, life.last_step = finding, step
        life.count += 1
        severity = finding.severity or r.severity

        explained_by = dict.fromkeys([*r.inhibited_by, *finding.explained_by])
        blockers = [c for c in explained_by if self._state(c) in ("firing", "suppressed")]
        waiting = [c for c in r.inhibited_by if self._state(c) == "pending"]
        waiting += [c for c in finding.explained_by if self._state(c) in (None, "pending", "resolved")]
        if life.state == "pending":
            if life.hits < r.for_ or (waiting and not blockers and life.hits < r.for_ + HOLD):
                return []
            life.fired_step = step
            life.severity = severity
            life.causes = blockers
            return self._enter(r, life, "suppressed" if blockers else "firing")
        worse = SEVERITIES.index(severity) < SEVERITIES.index(life.severity)
        life.severity = min(severity, life.severity, key=SEVERITIES.index)
        if life.state == "firing" and blockers:
            life.causes = blockers
            return self._enter(r, life, "suppressed")
        if life.state == "suppressed" and not blockers and not waiting:
            return self._enter(r, life, "firing")
        if life.state == "unknown":
            return self._enter(r, life, "suppressed" if blockers else "firing")
        if worse and life.state == "firing":
            return self._enter(r, life, "firing")
        if self.view.segment != life.recorded_segment:  # its suggestions are for other settings than those on record
            life.recorded_segment = self.view.segment
            return [Transition(self._record(r, life), False)]
        return []

    def _fine(self, r: Rule, life: _Life) -> list[Transition]:
        life.reason = ""
        life.hits = life.unknowns = 0
        if life.state == "pending":
            life.state = None
        if life.state in ("firing", "suppressed", "unknown"):
            life.misses += 1
            if life.misses >= r.keep:
                return self._enter(r, life, "resolved")
        return []

    def _not_judged(self, r: Rule, life: _Life, reason: str) -> list[Transition]:
        life.reason = reason
        life.hits = 0
        if life.state == "pending":
            life.state = None
        if self.view.segment and self.view.segment_points <= GRACE:
            return []
        if life.state in ("firing", "suppressed"):
            life.unknowns += 1
            if life.unknowns >= r.keep:
                return self._enter(r, life, "unknown")
        return []

    def _enter(self, r: Rule, life: _Life, state: State) -> list[Transition]:
        previous = life.state
        life.state = state
        life.hits = 0 if state == "resolved" else life.hits
        life.misses = life.unknowns = 0
        shown = False
        if state == "firing":
            shown = life.shown if previous == "firing" and life.shown else self._within_budget(r, life)
            life.shown = shown
            life.remind_gap = REMINDER_STEPS
            life.remind_at = self.view.step + REMINDER_STEPS
        elif state == "resolved":
            shown = life.shown and previous == "firing"
            life.shown = False
        life.recorded_segment = self.view.segment
        self._refresh_firing()
        return [Transition(self._record(r, life), shown)]

    def _refresh_firing(self) -> None:
        self.view.firing = frozenset(c for c, life in self._lives.items() if life.state == "firing")

    def _state(self, code: str) -> State | None:
        life = self._lives.get(code)
        return life.state if life is not None else None

    # ------------------------------------------------------------------ what is shown

    def _within_budget(self, r: Rule, life: _Life) -> bool:
        if life.severity == "error":
            return True
        shown = self._shown_at.setdefault(life.severity, [])
        shown[:] = [s for s in shown if self.view.step - s < BUDGET_STEPS]
        if len(shown) >= SHOWN_PER_SEVERITY:
            self._hidden.append(r.code)
            return False
        shown.append(self.view.step)
        return True

    def _reminders(self) -> list[Transition]:
        reminders = []
        for code in self.view.firing:
            life = self._lives[code]
            if life.shown and life.fresh and self.view.step >= life.remind_at:
                life.remind_gap *= 2
                life.remind_at = self.view.step + life.remind_gap
                reminders.append(Transition(self._record(self._by_code[code], life), True, "reminder"))
        return reminders

    def take_digest(self) -> str | None:
        """One line on what the budget kept from being shown, at most once in `BUDGET_STEPS` steps."""
        if not self._hidden or self.view.step - self._last_digest < BUDGET_STEPS:
            return None
        codes = list(dict.fromkeys(self._hidden))
        self._hidden.clear()
        self._last_digest = self.view.step
        return f"{len(codes)} more diagnostics are recorded but not shown here: {', '.join(codes)}."

    # ------------------------------------------------------------------ records

    def _record(self, r: Rule, life: _Life) -> dict[str, Any]:
        finding = life.finding
        assert finding is not None  # a life without a finding has no record
        view = self.view
        causes = [
            {"code": c, "relation": "caused_by", "onset_step": self._lives[c].onset_step if c in self._lives else None}
            for c in dict.fromkeys([*life.causes, *finding.causes])
        ]
        return {
            "schema": DIAGNOSTIC_SCHEMA,
            "id": f"{self.run_id}-{r.code}-{life.episode}",
            "fingerprint": f"{r.code}|{self.run_id}",
            "code": r.code,
            "name": r.name,
            "doc": DOC.format(code=r.code),
            "severity": life.severity,
            "state": life.state,
            "confidence": finding.confidence,
            "category": r.category,
            "step": view.step,
            "first_step": life.first_step,
            "fired_step": life.fired_step,
            "onset_step": life.onset_step,
            "last_step": life.last_step,
            "count": life.count,
            "run": self.run_id,
            "segment": view.segment,
            "config_rev": self.config_rev,
            "time": self._clock(),
            "message": finding.message[:MAX_MESSAGE],
            "advice": finding.advice[:MAX_MESSAGE],
            "evidence": [e.as_dict() for e in finding.evidence],
            "not_checked": list(finding.not_checked),
            "impact": finding.impact,
            "causes": causes,
            "inhibits": sorted(
                c for c, other in self._lives.items() if other.state == "suppressed" and r.code in other.causes
            ),
            "suggestions": [s.as_dict() for s in finding.suggestions],
        }

    def diagnostics(self) -> dict[str, dict[str, Any]]:
        """Code -> latest record of every diagnostic that is pending, firing, suppressed, unknown or resolved."""
        return {
            code: self._record(self._by_code[code], life)
            for code, life in self._lives.items()
            if life.finding is not None and life.state is not None
        }

    def errors(self, *states: State) -> frozenset[str]:
        """Codes of the diagnostics with severity error that are in one of these states."""
        return frozenset(c for c, life in self._lives.items() if life.severity == "error" and life.state in states)

    def not_checked(self) -> list[dict[str, str]]:
        """The rules that could not judge at their last evaluation, and why."""
        return [
            {"code": r.code, "name": r.name, "reason": self._lives[r.code].reason}
            for r in self._rules
            if self._lives[r.code].reason
        ]

    def failed_rules(self) -> dict[str, str]:
        """Code -> reason of the rules that raised; "verdict" stands for the verdict."""
        failed = {code: self._lives[code].reason for code in self._raised}
        return failed | ({"verdict": self._verdict_failure} if self._verdict_failure else {})

    # ------------------------------------------------------------------ verdict

    def _judge(self, final: bool) -> None:
        lives = {c: life.severity for c, life in self._lives.items() if life.state == "firing"}
        held = {c: life.severity for c, life in self._lives.items() if life.state == "suppressed"}
        try:
            decided = self.tracker.update(self.view, lives, held, final)
        except Exception as error:  # as for a rule: ours must not stop a run
            self._verdict_failure = f"{type(error).__name__}: {error}"[:MAX_TEXT]
            decided = self.tracker.current
        self._verdict = self._stamp_verdict(decided)

    def _stamp_verdict(self, decided: verdicts.Verdict) -> dict[str, Any]:
        lives = self._lives.items()
        return {
            "schema": verdicts.SCHEMA,
            **decided.as_dict(),
            "step": self.view.step,
            "time": self._clock(),
            "run": self.run_id,
            "segment": self.view.segment,
            "firing": sorted(c for c, life in lives if life.state == "firing"),
            "suppressed": sorted(c for c, life in lives if life.state == "suppressed"),
            "pending": sorted(c for c, life in lives if life.state == "pending"),
        }

    def verdict(self) -> dict[str, Any]:
        """The latest verdict record."""
        return self._verdict
