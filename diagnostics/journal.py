"""A run as it is written while it trains: what is observed goes to the engine, to disk, and to whoever listens.

The callback inside `transformers.Trainer` and the recorder of a plain loop measure in different ways. From the
observation on they do the same, and that stands here. Nothing in it may stop or corrupt a run.
"""

import functools
import os
import platform
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import outspoken
from outspoken.diagnostics import changes, live
from outspoken.diagnostics.engine import Engine, Transition
from outspoken.diagnostics.records import MAX_TEXT, Observation
from outspoken.diagnostics.rundir import METRICS, RUN, BadRequest, RunDirectory, read_json, read_jsonl
from outspoken.diagnostics.sinks import Guarded, default_sinks

RUN_SCHEMA = "outspoken.run/1"
RUN_FOLDER = "outspoken"  # the run directory is <output_dir>/outspoken
ENDED = {"finished": "finished", "failed": "failed", "interrupted": "been interrupted"}
FAILURES_BEFORE_OFF = 5
HISTORY_REPLAYED = 20_000  # observations replayed into the engine when a run is resumed
VERSIONS_OF = (  # packages whose version is recorded if they are loaded
    *("torch", "transformers", "trl", "peft", "accelerate", "vllm", "deepspeed"),
    *("lightning", "pytorch_lightning", "verl", "openrlhf", "llamafactory"),
)


# ---------------------------------------------------------------------- inside somebody else's loop


class Harmless:
    """What runs inside a training loop and must not hurt it: its hooks are `guarded`."""

    _off = False  # given up after too many failures
    _failures = 0
    _own_seconds = 0.0  # time that our own work took
    _told: set[str]  # what was said once
    _sinks: list[Guarded] | None = None  # None: before the run has begun

    def _note(self, text: str) -> None:
        if self._sinks is None:
            print(f"[outspoken] note: {text}", file=sys.stderr)
        for sink in self._sinks or ():
            sink.note(text)

    def _failed(self, where: str, error: Exception) -> None:
        if os.environ.get("OUTSPOKEN_DEBUG"):
            raise error
        self._failures += 1
        if where not in self._told:
            self._told.add(where)
            said = str(error)[:MAX_TEXT]
            self._note(f"diagnostics failed in {where} ({type(error).__name__}: {said}); training goes on")
        if self._failures == FAILURES_BEFORE_OFF:
            self._off = True
            self._note("diagnostics failed too often and are switched off for the rest of this run")


def guarded(hook: Callable[..., None]) -> Callable[..., None]:
    """Keep an error of ours from reaching the training loop: tell it once, give up after a few. Counts our time."""

    @functools.wraps(hook)
    def safe(self: Harmless, *args: Any, **kwargs: Any) -> None:
        if self._off:
            return
        started = time.perf_counter()
        try:
            hook(self, *args, **kwargs)
        except Exception as error:
            self._failed(hook.__name__.strip("_"), error)
        finally:
            self._own_seconds += time.perf_counter() - started

    return safe


# ---------------------------------------------------------------------- the start of a run


def make_sinks(given: list[Any] | None, run_id: str | None) -> list[Guarded]:
    """The sinks that were given, or those that the environment asks for; none can hurt."""
    if given is None:
        return default_sinks(os.environ, run_id)
    return [sink if isinstance(sink, Guarded) else Guarded(sink) for sink in given]


def new_run_id(method: str) -> str:
    return f"{method}-{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"


def previous_run(folder: Path) -> dict[str, Any] | None:
    """The record of the run that used the folder before, if it is one of ours."""
    try:
        record = read_json(folder / RUN)
    except (OSError, ValueError):
        return None
    return record if record.get("schema") == RUN_SCHEMA and isinstance(record.get("id"), str) else None


def versions() -> dict[str, str]:
    """Versions of Python, of this library, and of the training stack as far as it is loaded."""
    found = {"outspoken": outspoken.__version__, "python": platform.python_version()}
    for name in VERSIONS_OF:
        version = getattr(sys.modules.get(name), "__version__", None)
        if version is not None:
            found[name] = str(version)
    return found


def run_record(engine: Engine, previous: Mapping[str, Any] | None, **known: Any) -> dict[str, Any]:
    """run.json of a run that begins or goes on. `known` holds what only the caller knows."""
    view = engine.view
    return {
        "schema": RUN_SCHEMA,
        "id": engine.run_id,
        "parent": (previous or {}).get("parent"),
        "method": view.method,
        "status": "running",
        "started": (previous or {}).get("started", time.time()),
        "heartbeat": time.time(),
        "total_steps": view.total_steps,
        "config": view.config,
        "config_rev": engine.config_rev,
        "versions": versions(),
        "facts": {k: live._plain(v) for k, v in view.facts.items()},
        "segment": view.segment,
        "verdict": None,
        **known,
    }


def replay(
    engine: Engine,
    folder: Path,
    previous: Mapping[str, Any],
    step: int,
    seen: Callable[[int], None] = lambda step: None,
) -> None:
    """Give a resumed run's engine what it had seen before the checkpoint of `step`; `seen` is called for each step."""
    records, _ = read_jsonl(folder / METRICS)
    used = [r["segment"] for r in (*records, previous) if isinstance(r.get("segment"), int)]
    segment = 0
    try:
        for record in changes.surviving(records, step)[-HISTORY_REPLAYED:]:
            if record.get("segment", 0) != segment:
                segment = record.get("segment", 0)
                engine.open_segment(record["step"], "as recorded")
            raw = {**record["signals"], **record.get("nonfinite", {})}  # "nan" and its like are read as numbers
            engine.observe(Observation.from_raw(record["step"], raw, record.get("time"), record.get("epoch")))
            seen(record["step"])
    finally:
        engine.view.segment = max(used, default=0)  # also those of steps thrown away: a number is given once


# ---------------------------------------------------------------------- the run


class Journal:
    """Judges, writes and tells what one run does.

    Args:
        engine: judges. writer: the run directory. sinks: who is told.
        record: run.json, as `run_record` makes it.

    Attributes:
        step: the newest optimizer step, which changes are recorded at.
    """

    def __init__(self, engine: Engine, writer: RunDirectory, sinks: list[Guarded], record: dict[str, Any]):
        self.engine, self.writer, self.sinks, self.record = engine, writer, sinks, record
        self.step: int = record["step"]
        self._verdict_told: str | None = None
        self._rules_told: set[str] = set()

    def start(self, fresh: bool) -> list[Transition]:
        """Write the run's first records; of a fresh run also what is wrong before a first step that may never come."""
        self.writer.write_run(self.record)
        self.writer.write_verdict(self.engine.verdict())
        transitions = self.engine.begin() if fresh else []
        if fresh:
            self.publish(transitions)
        return transitions

    def tell(self, observation: Observation) -> list[Transition]:
        """One observation to the engine, to disk, and what follows from it to everybody."""
        transitions = self.engine.observe(observation)
        segment = self.engine.view.segment
        self.writer.append_observation(observation, segment)
        if segment != self.record["segment"]:  # the step counter went back
            self.record["segment"] = segment
            self._rewrite()
        for sink in self.sinks:
            sink.observation(observation.step, observation.signals)
        self.publish(transitions)
        return transitions

    def publish(self, transitions: list[Transition]) -> None:
        for transition in transitions:
            if transition.kind == "transition":
                self.writer.append_diagnostic(transition.record)
            for sink in self.sinks:
                sink.transition(transition)
        verdict = self.engine.verdict()
        if verdict["state"] != self._verdict_told:
            self._verdict_told = verdict["state"]
            self.writer.write_verdict(verdict)
            for sink in self.sinks:
                sink.verdict(verdict)
        elif transitions or self.engine.view.points % 20 == 0:
            self.writer.write_verdict(verdict)
        digest = self.engine.take_digest()
        if digest:
            self.note(digest)
        for code, reason in self.engine.failed_rules().items():
            if code not in self._rules_told:
                self._rules_told.add(code)
                self.note(f"rule {code} cannot judge: {reason}; training goes on")

    def note(self, text: str) -> None:
        for sink in self.sinks:
            sink.note(text)

    def open_segment(self, reason: str, config: Mapping[str, Any]) -> None:
        """The settings changed: what follows is judged by the new ones."""
        self.engine.open_segment(self.step, reason, config)
        self.record |= {
            "config": dict(config),
            "config_rev": self.engine.config_rev,
            "segment": self.engine.view.segment,
        }
        self._rewrite()

    def end(self, status: str) -> list[Transition]:
        """The last judgement, and nothing is left hanging: who still asks for a change is told that it is too late."""
        transitions = self.engine.finish()
        self.publish(transitions)
        self.take_requests(lambda request, accepted: f"the run has {ENDED[status]}", asked=False)
        verdict = self.engine.verdict()
        self.writer.write_verdict(verdict)
        ended = {"status": status, "step": self.step, "heartbeat": time.time(), "verdict": verdict}
        self.writer.write_run(self.record | ended)
        self.writer.close()
        for sink in self.sinks:
            sink.close()
        return transitions

    def _rewrite(self) -> None:
        self.writer.write_run(self.record | {"step": self.step, "heartbeat": time.time()})

    # ------------------------------------------------------------------ changes

    def take_requests(
        self,
        consider: Callable[[dict[str, Any], dict[str, Any] | None], dict[str, Any] | str],
        asked: bool = True,
    ) -> dict[str, Any] | None:
        """Take what agents asked for. `consider` gives what is to be done, or why it is refused.

        Args:
            consider: is given a request, and what was accepted before it: one change is tried at a time.
            asked: whether `requested` is recorded, too.
        """
        accepted: dict[str, Any] | None = None
        for request in self.writer.requests():
            if isinstance(request, BadRequest):
                self.change({"id": request.id}, "rejected", request.reason)
                self.writer.done(request.id)
                continue
            if asked:
                self.change(request, "requested")
            found = consider(request, accepted)
            if isinstance(found, str):
                self.change(request, "rejected", found)
            else:
                accepted = found
            self.writer.done(request["id"])
        return accepted

    def settle(self, trial: changes.Trial) -> changes.Judgement | None:
        """Judge a change that is on trial, and record what came of it; None while it is too early."""
        judgement = changes.judge(trial, self.engine.view, self.engine.errors("firing"))
        if judgement is None:
            return None
        self.change(trial.record, judgement.outcome, judgement.reason, dict(judgement.observed))
        if judgement.outcome == "failed":  # rules propose something else next time
            failed = self.engine.view.facts.setdefault("failed_changes", [])
            failed.append(trial.record["fields"])
            del failed[:-20]
        return judgement

    def change(
        self, request: Mapping[str, Any], state: str, reason: str = "", observed: dict[str, Any] | None = None
    ) -> None:
        """Record that a change entered a state."""
        record = {
            "schema": changes.SCHEMA,
            "id": request["id"],
            "state": state,
            "step": self.step,
            "time": time.time(),
            "actor": request.get("actor", "unknown"),
            "patch": request.get("patch", []),
            "fields": request.get("fields", {}),
            "reason": reason[:2000],
            "suggestion": request.get("suggestion"),
            "diagnostic": request.get("diagnostic"),
            "segment": self.engine.view.segment,
            "config_rev": self.engine.config_rev,
            "expect": request.get("expect"),
            "observed": observed or {},
            "rollback_on_failure": bool(request.get("rollback_on_failure", False)),
            "run": self.engine.run_id,
        }
        self.writer.append_change(record)
        for sink in self.sinks:
            sink.change(record)
