"""A run as an agent sees it: what it measured, what is wrong with it, and a way to ask for a change.

Everything is read from the run directory, so the run may be live or long over, and the writer is never needed.
"""

import difflib
import json
import os
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outspoken import schemas
from outspoken.diagnostics import rundir
from outspoken.diagnostics.patches import PatchRefused, check_patch
from outspoken.diagnostics.records import SEVERITIES, as_number, change_field

if TYPE_CHECKING:
    import pandas as pd

SETTLED = ("verified", "failed", "rejected", "rolled_back")  # states of a change that has run its course
POLL_SECONDS = 0.2

_NONFINITE = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}


class NotARun(ValueError):
    """The path holds no run that can be read."""


class RequestRefused(ValueError):
    """A change that cannot be asked for; the message says why and what would be right. Nothing was sent."""


class Run:
    """A run directory, read anew at every call.

    Args:
        path: the run's output directory, its `outspoken/` folder, or any run directory.

    Raises:
        NotARun: there is no run at `path`, or a newer version of outspoken wrote it.
    """

    def __init__(self, path: str | Path):
        self.path = find_run(path)
        self._stamp: tuple[int, ...] | None = None
        self._record: dict[str, Any] = {}
        self.record  # noqa: B018  a directory without a readable run is refused here

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}: {self.method}, {self.status} at step {self.step})"

    # -- the run

    @property
    def record(self) -> dict[str, Any]:
        """The whole of run.json."""
        file = self.path / rundir.RUN
        try:
            found = os.stat(file)
            stamp = (found.st_ino, found.st_mtime_ns, found.st_size)
            if stamp != self._stamp:
                record = rundir.read_json(file)
                if problem := schemas.not_readable(record, "run"):
                    raise NotARun(f"{file} {problem}")
                self._record, self._stamp = record, stamp
        except (OSError, ValueError) as error:
            raise error if isinstance(error, NotARun) else NotARun(f"{file} cannot be read: {error}") from None
        return self._record

    @property
    def id(self) -> str:
        return str(self.record.get("id"))

    @property
    def status(self) -> str:
        """ "running", "finished", "failed" or "interrupted". A run that died without a word still says "running"."""
        return str(self.record.get("status"))

    @property
    def alive(self) -> bool:
        """Whether it trains now: its process exists, or, seen from another machine, its heartbeat is fresh."""
        return rundir.is_alive(self.record)

    @property
    def method(self) -> str:
        return str(self.record.get("method"))

    @property
    def step(self) -> int:
        """The newest optimizer step on record."""
        newest = rundir.last_line(self.path / rundir.METRICS) or {}
        return max(_whole(self.record.get("step")), _whole(newest.get("step")))

    @property
    def segment(self) -> int:
        return _whole(self.record.get("segment"))

    @property
    def config(self) -> dict[str, Any]:
        return dict(self.record.get("config") or {})

    @property
    def live_fields(self) -> dict[str, dict[str, Any]]:
        """Fields that can be changed while it trains: name -> `{"minimum", "maximum", "choices"}`."""
        return dict(self.record.get("live") or {})

    # -- what it wrote

    def metrics(self, signals: str | Sequence[str] | None = None, since: int | None = None) -> "pd.DataFrame":
        """The signals by step, as floats: a frame with one row per step and one column per signal.

        A signal that was not emitted at a step is NaN there, as is one that was NaN. Where a resumed run did steps
        anew, its own values stand, not those of the steps that were thrown away.

        Args:
            signals: the names wanted (in this order); all by default. A name that never occurs is a column of NaN.
            since: the first step wanted.
        """
        import pandas as pd

        wanted = None if signals is None else [signals] if isinstance(signals, str) else list(signals)
        records, _ = rundir.read_jsonl(self.path / rundir.METRICS)
        rows: dict[int, dict[str, float]] = {}
        segment: Any = None
        for record in records:
            step = record.get("step")
            if not isinstance(step, int) or isinstance(step, bool) or abs(step) >= 2**63:
                continue
            if record.get("segment") != segment:
                segment = record.get("segment")
                if rows and step < max(rows):  # resumed from an earlier checkpoint
                    rows = {s: row for s, row in rows.items() if s < step}
            rows.setdefault(step, {}).update(_values(record))
        kept = {step: row for step, row in sorted(rows.items()) if since is None or step >= since}
        columns = wanted if wanted is not None else list(dict.fromkeys(name for row in kept.values() for name in row))
        data = {name: [row.get(name, _NONFINITE["nan"]) for row in kept.values()] for name in columns}
        return pd.DataFrame(data, index=pd.Index(list(kept), name="step", dtype="int64"), dtype="float64")

    def history(self) -> list[dict[str, Any]]:
        """Every transition of every diagnostic, oldest first."""
        return self._lines(rundir.DIAGNOSTICS)

    def diagnostics(
        self,
        state: str | Sequence[str] | None = None,
        severity: str | Sequence[str] | None = None,
        since: int | None = None,
    ) -> list[dict[str, Any]]:
        """The latest record of each diagnostic, in the order of their last transition.

        Args:
            state: only those in this state (or one of these): "firing", "resolved", "suppressed", "unknown".
            severity: only those of this severity (or one of these).
            since: only those whose last transition was at this step or later.
        """
        latest: dict[str, dict[str, Any]] = {}
        for record in self.history():
            key = str(record.get("fingerprint"))
            latest.pop(key, None)
            latest[key] = record
        return [
            record
            for record in latest.values()
            if _among(record.get("state"), state)
            and _among(record.get("severity"), severity)
            and (since is None or _whole(record.get("step")) >= since)
        ]

    def verdict(self) -> dict[str, Any] | None:
        """The latest verdict, or None before the first."""
        try:
            return rundir.read_json(self.path / rundir.VERDICT)
        except FileNotFoundError:
            return None

    def changes(self) -> list[dict[str, Any]]:
        """The latest record of each change, oldest change first."""
        latest: dict[str, dict[str, Any]] = {}
        for record in self._lines(rundir.CHANGES):
            latest[str(record.get("id"))] = record
        return list(latest.values())

    def suggestions(self, applicability: str | Sequence[str] | None = None) -> list[dict[str, Any]]:
        """The suggestions of all firing diagnostics, most urgent first: errors, then causes before their effects.

        Each has two keys beside its own: `code`, the rule's, and `diagnostic`, the diagnostic's id.
        """
        return [
            {**suggestion, "code": record.get("code"), "diagnostic": record.get("id")}
            for record in _urgent_first(self.diagnostics(state="firing"))
            for suggestion in record.get("suggestions") or ()
            if _among(suggestion.get("applicability"), applicability)
        ]

    def _lines(self, name: str) -> list[dict[str, Any]]:
        return rundir.read_jsonl(self.path / name)[0]

    # -- asking for a change

    def apply(
        self,
        change: Mapping[str, Any] | Sequence[Mapping[str, Any]] | str,
        *,
        actor: str,
        expect: Mapping[str, Any] | None = None,
        rollback_on_failure: bool = True,
    ) -> str:
        """Ask the running trainer for a change and return its id, at once. `wait_for(id)` tells what became of it.

        Args:
            change: a suggestion (or its id), an RFC 6902 patch, or simply `{field: new value}`. A suggestion that takes
                effect from an earlier checkpoint asks the trainer to go back to its newest good one first.
            actor: who asks; it stands in the record.
            expect: what the change should do, `{"signal", "direction", "value", "within_steps"}`; by default what the
                suggestion expects. The trainer judges the change by it.
            rollback_on_failure: whether the trainer takes the change back if the expected effect does not come.

        Raises:
            RequestRefused: the trainer would refuse it, or there is none.
        """
        request = self.plan(change, actor=actor, expect=expect, rollback_on_failure=rollback_on_failure)
        self._send(request)
        return str(request["id"])

    def plan(
        self,
        change: Mapping[str, Any] | Sequence[Mapping[str, Any]] | str,
        *,
        actor: str,
        expect: Mapping[str, Any] | None = None,
        rollback_on_failure: bool = True,
    ) -> dict[str, Any]:
        """The request that `apply` would send, checked as `apply` checks it. Nothing is sent."""
        suggestion = self._suggestion(change)
        if suggestion is not None:
            patch = self._patch_of(suggestion)
            expect = suggestion.get("expect") if expect is None else expect
        elif isinstance(change, Mapping):
            config = self.config
            patch = [op for name, new in change.items() for op in self._set(name, config, new)]
        else:
            patch = [dict(op) for op in change if isinstance(op, Mapping)]
            if len(patch) != len(change):
                raise RequestRefused("a patch is a list of operations like {'op', 'path', 'value'}")
        self._check(patch, str(suggestion.get("when")) if suggestion is not None else "checkpoint")
        request = {
            "schema": schemas.schema_id("request"),
            "id": _new_id(),
            "kind": "apply",
            "actor": actor,
            "patch": patch,
            "suggestion": suggestion.get("id") if suggestion is not None else None,
            "diagnostic": suggestion.get("diagnostic") if suggestion is not None else None,
            "expect": None if expect is None else dict(expect),
            "rollback_on_failure": rollback_on_failure,
            "restore": suggestion is not None and suggestion.get("when") == "earlier_checkpoint",
            "time": time.time(),
        }
        try:
            schemas.validate(request)
        except schemas.InvalidRecord as error:
            raise RequestRefused(str(error)) from None
        return request

    def _suggestion(self, change: Any) -> dict[str, Any] | None:
        """The suggestion that `change` is or names; None if it is something else."""
        if isinstance(change, str):
            open_ones = self.suggestions()
            for suggestion in open_ones:
                if suggestion.get("id") == change:
                    return suggestion
            known = ", ".join(str(s.get("id")) for s in open_ones) or "none"
            raise RequestRefused(f"no firing diagnostic suggests {change!r}; suggestions now: {known}")
        if (
            isinstance(change, Mapping)
            and isinstance(change.get("patch"), list | tuple)
            and "patch" not in self.config
        ):
            return dict(change)
        return None

    def _patch_of(self, suggestion: Mapping[str, Any]) -> list[dict[str, Any]]:
        patch = [dict(op) for op in suggestion["patch"]]
        if not patch:
            raise RequestRefused(
                f"suggestion {suggestion.get('id')} ({suggestion.get('applicability')}) has no patch to apply: "
                f"{suggestion.get('title')}"
            )
        if suggestion.get("when", "live") not in ("live", "earlier_checkpoint"):
            raise RequestRefused(
                f"suggestion {suggestion.get('id')} takes effect from {_WHEN.get(suggestion['when'], 'a restart')}, "
                "not while the run trains"
            )
        return patch

    def _set(self, name: str, config: Mapping[str, Any], new: Any) -> list[dict[str, Any]]:
        if name not in config:
            raise RequestRefused(self._unknown(name))
        return change_field(name, config[name], new)

    def _unknown(self, name: str) -> str:
        near = difflib.get_close_matches(name, self.config, n=1)
        return f"{name!r} is no field of this run's config" + (f"; did you mean {near[0]!r}?" if near else "")

    def _check(self, patch: Sequence[Mapping[str, Any]], when: str) -> None:
        """Refuse at once what the trainer would refuse."""
        record = self.record
        config, live = self.config, self.live_fields
        try:
            check_patch(patch, config, live)
        except PatchRefused as refused:
            if refused.field is None or refused.field in live:
                raise RequestRefused(str(refused)) from None
            if refused.field not in config:
                raise RequestRefused(self._unknown(refused.field)) from None
            raise RequestRefused(
                f"{refused.field} cannot be changed while the run trains; it takes effect from "
                f"{_WHEN.get(when, _WHEN['checkpoint'])}. Live fields: {', '.join(sorted(live)) or 'none'}"
            ) from None
        if not rundir.is_alive(record):
            status = "was interrupted without a word" if self.status == "running" else f"is {self.status}"
            raise RequestRefused(f"the run {status}; only a run that trains takes changes")

    def _send(self, request: Mapping[str, Any]) -> None:
        """Write it beside the inbox, then rename it in: the trainer never sees half a request."""
        data = json.dumps(request, allow_nan=False).encode()
        if len(data) > rundir.MAX_REQUEST_BYTES:
            raise RequestRefused(f"the request has {len(data)} bytes; at most {rundir.MAX_REQUEST_BYTES} are taken")
        inbox = self.path / rundir.CONTROL
        temporary = inbox / f".{request['id']}.part"
        try:
            temporary.write_bytes(data)
            os.rename(temporary, inbox / f"{request['id']}.json")
        except OSError as error:
            raise RequestRefused(f"the request cannot be put into {inbox}: {error}") from None

    # -- waiting

    def wait_for(
        self,
        change_id: str | None = None,
        states: str | Sequence[str] | None = None,
        *,
        diagnostic: str | None = None,
        step: int | None = None,
        verdict: str | Sequence[str] | None = None,
        timeout: float = 600.0,
        poll: float = POLL_SECONDS,
    ) -> dict[str, Any]:
        """Wait for one thing and return its record.

        Args:
            change_id: until that change is in one of `states`; by default verified, failed, rejected or rolled back.
            diagnostic: until the diagnostic of that code (or id) is in one of `states`; by default firing.
            step: until the run has done that step; returns the run record.
            verdict: until the verdict is that (or one of these).
            timeout: seconds.

        Raises:
            TimeoutError: it did not come in time, or cannot come any more because the run has ended; the message
                says what was seen last.
            ValueError: not exactly one thing to wait for was named.
        """
        named = [x is not None for x in (change_id, diagnostic, step, verdict)]
        if sum(named) != 1:
            raise ValueError("wait_for needs exactly one of change_id, diagnostic, step and verdict")
        look: Callable[[], tuple[dict[str, Any] | None, str]]
        if change_id is not None:
            wanted = _words(states or SETTLED)
            goal = f"change {change_id} to be {' or '.join(wanted)}"

            def look() -> tuple[dict[str, Any] | None, str]:
                found = [c for c in self.changes() if c.get("id") == change_id]
                return _seen(found, wanted)

        elif diagnostic is not None:
            wanted = _words(states or "firing")
            goal = f"diagnostic {diagnostic} to be {' or '.join(wanted)}"

            def look() -> tuple[dict[str, Any] | None, str]:
                return _seen([d for d in self.diagnostics() if diagnostic in (d.get("code"), d.get("id"))], wanted)

        elif step is not None:
            goal = f"step {step}"

            def look() -> tuple[dict[str, Any] | None, str]:
                now = self.step
                return (self.record if now >= step else None), f"step {now}"

        else:
            wanted = _words(verdict or ())
            goal = f"the verdict {' or '.join(wanted)}"

            def look() -> tuple[dict[str, Any] | None, str]:
                now = self.verdict()
                return _seen([] if now is None else [now], wanted)

        deadline = time.monotonic() + timeout
        while True:
            over = not self.alive  # asked before the look: what was written until the end is seen
            record, seen = look()
            if record is not None:
                return record
            if over:
                ended = "ended without a word" if self.status == "running" else f"is {self.status}"
                raise TimeoutError(f"waited for {goal}, but the run {ended}; last seen: {seen}")
            if time.monotonic() >= deadline:
                raise TimeoutError(f"waited {timeout:g} s for {goal}; last seen: {seen}")
            time.sleep(min(poll, max(0.0, deadline - time.monotonic())))


_WHEN = {
    "checkpoint": "a restart from a checkpoint",
    "earlier_checkpoint": "a restart from a checkpoint of before the trouble",
    "code": "a change of code or data",
}


def find_run(path: str | Path) -> Path:
    """The run directory at `path`: itself, or the `outspoken` folder in it.

    Raises:
        NotARun: there is none.
    """
    path = Path(path)
    for candidate in (path, path / "outspoken"):
        if (candidate / rundir.RUN).is_file():
            return candidate
    what = "is a file" if path.is_file() else "has no run.json" if path.is_dir() else "does not exist"
    raise NotARun(f"{path} {what}; name a run's output directory or its `outspoken` folder")


def _new_id() -> str:
    """An id that sorts by time: the trainer takes requests in that order."""
    seconds, nanoseconds = divmod(time.time_ns(), 10**9)
    return f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime(seconds))}-{nanoseconds:09d}-{uuid.uuid4().hex[:6]}"


def _urgent_first(firing: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Errors before warnings before info; within a severity causes before effects, then the one that fired first."""
    by_code = {str(record.get("code")): record for record in firing}
    causes: dict[str, set[str]] = {
        code: {str(cause.get("code")) for cause in record.get("causes") or ()} & by_code.keys() - {code}
        for code, record in by_code.items()
    }
    for code, record in by_code.items():
        for effect in record.get("inhibits") or ():
            if str(effect) in causes and effect != code:
                causes[str(effect)].add(code)

    def depth(code: str, path: tuple[str, ...] = ()) -> int:
        nearer = [depth(cause, (*path, code)) for cause in causes[code] if cause not in path]
        return 1 + max(nearer, default=-1)

    def rank(record: Mapping[str, Any]) -> tuple[int, int, int]:
        severity = record.get("severity")
        worse = SEVERITIES.index(severity) if severity in SEVERITIES else len(SEVERITIES)
        return worse, depth(str(record.get("code"))), _whole(record.get("fired_step"))

    return sorted(firing, key=rank)


def _values(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line of metrics.jsonl, non-finite ones restored, in their order there."""
    signals, nonfinite = record.get("signals"), record.get("nonfinite")
    words = nonfinite if isinstance(nonfinite, Mapping) else {}
    values: dict[str, float] = {}
    for name, value in signals.items() if isinstance(signals, Mapping) else ():
        number = value if type(value) is float else as_number(_NONFINITE.get(str(words.get(name)), value))
        if number is not None:
            values[name] = number
    for name, word in words.items():
        if name not in values and str(word) in _NONFINITE:
            values[name] = _NONFINITE[str(word)]
    return values


def _seen(records: Sequence[dict[str, Any]], wanted: Iterable[str]) -> tuple[dict[str, Any] | None, str]:
    if not records:
        return None, "nothing"
    record = records[-1]
    reason = f" ({record['reason']})" if record.get("reason") else ""
    state = str(record.get("state"))
    return (record if state in wanted else None), f"{state}{reason}"


def _words(words: str | Iterable[str]) -> list[str]:
    return [words] if isinstance(words, str) else list(words)


def _among(value: Any, wanted: str | Sequence[str] | None) -> bool:
    return wanted is None or value in _words(wanted)


def _whole(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else 0
