"""The gate for CI: was the run good? Exit codes 0 (nothing found), 1 (the run is bad), 2 (it cannot be judged).

It reads run.json, verdict.json and diagnostics.jsonl, never the metrics, so it answers at once for a run of any length.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from outspoken import schemas
from outspoken.agent_api.run import NotARun, Run
from outspoken.diagnostics import rundir
from outspoken.diagnostics.records import SEVERITIES

DEFAULT_FAIL_ON = ("collapsing", "broken", "error")
ALIASES = {"collapse": "collapsing"}
UNDECIDED = ("unknown", "warming_up")  # verdicts that judge nothing
VERDICT_STATES: tuple[str, ...] = tuple(schemas.schema("common")["$defs"]["verdict_state"]["enum"])

_CODE = re.compile(schemas.schema("common")["$defs"]["code"]["pattern"])


# Errors about numbers that were not finite: weights that were saved since may be damaged, whatever came after. Other
# errors that were resolved, often by a change that was verified, do not make a run bad.
LASTING = ("NUM001", "NUM002")


@dataclass(frozen=True)
class GateResult:
    """The gate's answer; `reasons` are sentences, `notes` say what could not be read and did not matter."""

    exit_code: Literal[0, 1, 2]
    reasons: list[str]
    run: str | None = None
    verdict: str | None = None
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def gate(
    path: str | Path,
    fail_on: str | Iterable[str] | None = None,
    *,
    unresolved_only: bool | None = None,
    allow_running: bool = False,
) -> GateResult:
    """Judge a run that is over.

    Args:
        path: its output directory or run directory.
        fail_on: what makes it bad: verdict states ("collapsing", "broken" …; "collapse" means collapsing), "error"
            or "warning" (a diagnostic of that severity or worse fired), codes of rules. A list, or words with commas
            between. Default: collapsing, broken, error.
        unresolved_only: which diagnostics count. None (default): those that still fired at the end; rules named by code
            and the errors of `LASTING`, whose damage stays when they fall silent, if they ever fired. True: only what still fired at the end. False: all that fired.
            What was suppressed throughout, because another diagnostic explains it, never counts.
        allow_running: judge a run that still trains by what it shows so far.

    Returns:
        Exit code 1 if anything asked for was found, or the run failed with an exception; else 2 if the run cannot be
        judged (no run, unreadable or newer records, still running, interrupted, verdict unknown or warming up while
        not asked for); else 0.
    """
    words, unknown = _words(DEFAULT_FAIL_ON if fail_on is None else fail_on)
    try:
        run = Run(path)
    except NotARun as error:
        return GateResult(2, [str(error)])
    try:
        transitions, notes = rundir.read_jsonl(run.path / rundir.DIAGNOSTICS)
        verdict = run.verdict()
        if not (run.path / rundir.DIAGNOSTICS).exists():
            raise ValueError(f"{run.path / rundir.DIAGNOSTICS} is missing, so what fired is not known")
        if verdict is not None and (problem := schemas.not_readable(verdict, "verdict")):
            raise ValueError(f"{run.path / rundir.VERDICT} {problem}")
        for record in transitions:
            if problem := schemas.not_readable(record, "diagnostic"):
                raise ValueError(f"{run.path / rundir.DIAGNOSTICS} holds a record that {problem}")
        if notes and not transitions and any("torn" not in note for note in notes):
            raise ValueError(f"no line of {run.path / rundir.DIAGNOSTICS} can be read: {notes[0]}")
    except (OSError, ValueError) as error:
        return GateResult(2, [str(error)], run.id)
    state = None if verdict is None else str(verdict.get("state"))
    unknown = [word for word in unknown if not _is_code(word, transitions)]
    if unknown or not words:
        valid = ", ".join((*VERDICT_STATES, "error", "warning"))
        said = " and ".join(repr(word) for word in unknown) or "an empty list"
        return GateResult(2, [f"--fail-on does not know {said}; valid are {valid} and codes of rules"], run.id, state)

    step = run.record.get("step")
    running = run.status == "running" and run.alive
    if running and not allow_running:
        return GateResult(2, [f"the run still trains (step {step}); wait for its end"], run.id, state, notes)
    bad = []
    if state in words:
        bad.append(f"verdict is {state}: {verdict.get('reason', '') if verdict else ''}".rstrip(": "))
    bad += _fired(transitions, words, unresolved_only)
    if run.status == "failed":
        bad.append(f"the run failed with an exception at step {step}")
    open_questions = []
    if run.status == "interrupted" or (run.status == "running" and not running):
        how = "" if run.status == "interrupted" else "; it says it is running, but nothing trains any more"
        open_questions.append(f"the run was interrupted at step {step}{how}")
    if state is None:
        open_questions.append("the run has no verdict")
    elif state in UNDECIDED and state not in words:
        open_questions.append(f"verdict is {state}: {(verdict or {}).get('reason', '')}".rstrip(": "))
    if bad:
        return GateResult(1, bad + open_questions, run.id, state, notes)
    if open_questions:
        return GateResult(2, open_questions, run.id, state, notes)
    return GateResult(0, [f"verdict is {state}; found none of {', '.join(words)}"], run.id, state, notes)


def _words(fail_on: str | Iterable[str]) -> tuple[list[str], list[str]]:
    """The words asked for, and those of them that are neither verdict nor severity."""
    given = fail_on.split(",") if isinstance(fail_on, str) else list(fail_on)
    words = [ALIASES.get(word.strip(), word.strip()) for word in given if word.strip()]
    return words, [word for word in words if word not in VERDICT_STATES and word not in ("error", "warning")]


def _is_code(word: str, transitions: Iterable[Mapping[str, Any]]) -> bool:
    """Whether it is the code of a rule: one that the run has seen, or one of the library's."""
    if not _CODE.match(word):
        return False
    if any(record.get("code") == word for record in transitions):
        return True
    from outspoken.diagnostics.rules.registry import all_rules  # loads numpy, so only when it is needed

    return word in all_rules()


def _fired(transitions: Iterable[Mapping[str, Any]], words: list[str], unresolved_only: bool | None) -> list[str]:
    """A sentence for each diagnostic that makes the run bad."""
    latest: dict[str, Mapping[str, Any]] = {}
    worst: dict[str, Mapping[str, Any]] = {}  # the worst record of a diagnostic that fired
    for record in transitions:
        key = str(record.get("fingerprint"))
        latest[key] = record
        if record.get("state") == "firing" and (key not in worst or _rank(record) < _rank(worst[key])):
            worst[key] = record
    limit = max((SEVERITIES.index(w) for w in words if w in SEVERITIES), default=-1)
    reasons = []
    for key, record in worst.items():
        named = record.get("code") in words
        if not named and _rank(record) > limit:
            continue
        at_end = latest[key].get("state") in ("firing", "unknown")  # unknown: it fired, then could not be judged
        lasting = record.get("code") in LASTING and record.get("severity") == "error"
        ever_counts = named or lasting if unresolved_only is None else not unresolved_only
        if at_end or ever_counts:
            end = "still so at the end" if at_end else f"{latest[key].get('state')} at step {latest[key].get('step')}"
            reasons.append(
                f"{record.get('severity')} {record.get('code')} at step {record.get('fired_step')}, {end}: "
                f"{record.get('message', '')}"
            )
    return reasons


def _rank(record: Mapping[str, Any]) -> int:
    severity = record.get("severity")
    return SEVERITIES.index(severity) if severity in SEVERITIES else len(SEVERITIES)
