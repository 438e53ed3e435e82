"""The recorder of a training loop that has no hooks of its own: each step's metrics are handed over, and judged at once.

It writes the same run directory as the callback inside `transformers.Trainer`, so everything that reads a run reads this
one. It needs no torch. Nothing in it may stop a training run: what fails here is told once, and training goes on.
"""

import atexit
import dataclasses
import os
import platform
import threading
import time as clock
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from outspoken.diagnostics import changes, live
from outspoken.diagnostics.engine import Engine, Transition
from outspoken.diagnostics.journal import (
    RUN_FOLDER,
    Harmless,
    Journal,
    guarded,
    make_sinks,
    new_run_id,
    previous_run,
    replay,
    run_record,
)
from outspoken.diagnostics.patches import PatchRefused, check_patch, same_value
from outspoken.diagnostics.records import as_number, change_field
from outspoken.diagnostics.rules.registry import ANY_METHOD, GROUPED_RL, ONLINE_RL
from outspoken.diagnostics.rundir import METRICS, RunDirectory, read_jsonl
from outspoken.diagnostics.sources import FAMILIES, settings
from outspoken.diagnostics.sources.config import points_per_log
from outspoken.diagnostics.sources.files import Row
from outspoken.diagnostics.sources.names import Family
from outspoken.diagnostics.sources.translate import Translator, flat
from outspoken.diagnostics.sources.trials import bounds_of_trials, with_trials

Status = Literal["finished", "failed", "interrupted"]
Resume = bool | int | Literal["auto"]

PLAIN = Family("other")  # a loop of somebody's own: our names, and those that any loop may use


@dataclasses.dataclass
class _Step:
    """What was logged for one step and is not yet judged."""

    step: int
    row: Row
    time: float | None
    epoch: float | None


class Recorder(Harmless):
    """Records a plain training loop, and says what is wrong with it while it trains.

    >>> with Recorder("out", method="sft", config={"learning_rate": 1e-4}) as recorder:   # doctest: +SKIP
    ...     for step, batch in enumerate(batches, start=1):
    ...         loss = train_on(batch)
    ...         recorder.log({"loss": loss, "grad_norm": norm}, step=step)

    Args:
        output_dir: the run directory is `<output_dir>/outspoken`.
        method: "sft", "grpo", "dpo" …; with "unknown" only what holds for any training is judged, unless `config`
            names the method in the system's own way.
        config: the settings: a mapping, a dataclass or an `argparse.Namespace`, under TRL's field names, or under those
            of `system`.
        total_steps: planned optimizer steps.
        params: overrides of rule parameters, code -> {parameter: number}. ignore: codes of rules to switch off.
        system: whose names the metrics and settings have ("verl", "openrlhf", "tinker" …); None: TRL's, and those that
            any loop may use ("train/loss", "lr").
        sinks: where lines go; by default the console, as for `DiagnosticsCallback`.
        run_id: by default one is made up.
        resume: whether this goes on with the run that used the directory before: True (after its last step), the step
            of the checkpoint that training goes on from, or "auto" (if the first step that is logged is above 1).
        rank: of this process; only rank 0 writes. By default the environment's RANK, else 0.
        live: settings that agents may change while the loop trains: name -> (lowest, highest), None for no bound, or a
            list of choices. Each must stand in `config`.
        apply: is called with {name: new value} between two steps, in `log`, when such a change is accepted.
        trainer: what trains, for the record.

    Attributes:
        path: the run directory. run_id: the run's name. engine: what judges; both None where nothing is written.

    Raises:
        ValueError: `method`, `system`, `params`, `ignore`, `live` or `resume` name what does not exist.
        TypeError: `config` holds no names and values.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike[str],
        *,
        method: str = "unknown",
        config: Any = None,
        total_steps: int | None = None,
        params: Mapping[str, Mapping[str, Any]] | None = None,
        ignore: Iterable[str] | None = None,
        system: str | None = None,
        sinks: list[Any] | None = None,
        run_id: str | None = None,
        resume: Resume = False,
        rank: int | None = None,
        live: Mapping[str, Any] | None = None,
        apply: Callable[[dict[str, Any]], Any] | None = None,
        trainer: str | None = None,
    ):
        self.path = Path(output_dir) / RUN_FOLDER
        self.run_id: str | None = None
        self.engine: Engine | None = None
        self._told = set()
        self._family = _family(system)
        self._config, named = _settings(config, self._family)
        self._method = named if method == "unknown" and named in ANY_METHOD else method
        if self._method not in ANY_METHOD:
            raise ValueError(f"method {method!r} is not known; choose one of {', '.join(ANY_METHOD)}")
        if isinstance(resume, str) and resume != "auto":
            raise ValueError(f"resume={resume!r} is not known; give True, False, a step or 'auto'")
        self._live = _live_fields(live, apply, self._config)
        self._apply_fields = apply
        self._params, self._ignore, self._total_steps = params, list(ignore or ()), total_steps
        self._given_sinks, self._given_id, self._trainer = sinks, run_id, trainer or system
        self._translator = Translator(self._family)
        self._journal: Journal | None = None
        self._trial: changes.Trial | None = None
        self._pending: _Step | None = None
        self._step = 0  # the newest that was judged
        self._logged_last: Row = {}  # of that step
        self._in_pieces = False  # whether the loop logs one step in several calls
        self._resume = resume
        self._lock = threading.RLock()
        self._new_engine("")  # mistakes in `params` and `ignore` are told now
        self._over = (int(os.environ.get("RANK") or 0) if rank is None else rank) != 0
        if not self._over:
            atexit.register(self._at_exit)
            if resume != "auto":
                self._start(self._recorded_steps()[-1] if resume is True else int(resume))

    def _new_engine(self, run_id: str) -> Engine:
        return Engine(
            method=self._method,
            config=self._config,
            facts={
                "world_size": _world_size(self._config),
                **({"live_fields": sorted(self._live)} if self._live else {}),
            },
            params=self._params,
            ignore=self._ignore,
            total_steps=self._total_steps,
            run_id=run_id,
            source="log",  # the rules that need this library's own probes are left out, as for a log
        )

    def _recorded_steps(self) -> list[int]:
        """The steps that the run in the directory wrote, [0] if there is none."""
        records = read_jsonl(self.path / METRICS)[0] if previous_run(self.path) is not None else []
        return [record["step"] for record in records if isinstance(record.get("step"), int)] or [0]

    @guarded
    def _start(self, step: int) -> None:
        """Begin the run, or go on with the one in the directory from the checkpoint of a step above 0."""
        previous = previous_run(self.path) if step > 0 else None
        self.run_id = previous["id"] if previous is not None else self._given_id or new_run_id(self._method)
        self.engine = self._new_engine(self.run_id)
        self._sinks = sinks = make_sinks(self._given_sinks, self.run_id)
        writer = RunDirectory(self.path, resume=previous is not None, say=self._note)
        if previous is not None:
            replay(self.engine, self.path, previous, step)
            self.engine.open_segment(step, "resumed", self._config)
        record = run_record(
            self.engine,
            previous,
            trainer=self._trainer,
            step=step,
            live=self._live,
            hardware={"device": None, "cpus": os.cpu_count(), "machine": platform.machine()},
            world_size=_world_size(self._config),
            dataset=None,
        )
        self._step = step
        self._journal = Journal(self.engine, writer, sinks, record)
        self._journal.start(fresh=previous is None)
        if self._method == "unknown":
            self._note("the method is not given, so only what holds for any training is judged; give method=…")

    # ------------------------------------------------------------------ what the loop calls

    def log(
        self,
        metrics: Mapping[str, Any],
        step: int | None = None,
        time: float | None = None,
        epoch: float | None = None,
    ) -> list[Transition]:
        """Hand over what was measured at a step, as numbers or what holds one (a tensor with one element).

        Several calls for one step are put together. Metrics of an evaluation ("eval_loss", "val/…") that come when
        training went on already count at the step where training is. A step that goes back begins a new segment.

        Args:
            metrics: name -> value; nested mappings are joined by "/". None counts as not measured.
            step: optimizer steps done; by default what `metrics` holds as its step, else one more than before.
            time: seconds since the epoch; by default now.
            epoch: passes over the data.

        Returns:
            What changed: diagnostics that began or ceased to fire. Never raises.
        """
        transitions: list[Transition] = []
        with self._lock:
            if self._over:
                return transitions
            self._log(metrics, step, time, epoch, transitions)
        return transitions

    def change_config(self, fields: Mapping[str, Any]) -> None:
        """Say that the loop changed its own settings: what follows is judged by the new ones, as a segment of its own.

        Args:
            fields: name -> new value of the settings that changed, named as in `config`.
        """
        with self._lock:
            if not self._over:
                self._change_config(fields)

    def finish(self, status: Status = "finished") -> None:
        """End the run: the last judgement is made and written. Later calls do nothing.

        Args:
            status: "finished", "failed" or "interrupted".
        """
        with self._lock:
            if self._over:
                return
            atexit.unregister(self._at_exit)
            try:
                if self._journal is not None:
                    self._flush([])
                    self._journal.end(status if status in ("failed", "interrupted") else "finished")
            except Exception as error:
                self._failed("finish", error)
            self._over = True

    @property
    def verdict(self) -> dict[str, Any] | None:
        """The newest verdict on the run; None where nothing is written."""
        return self.engine.verdict() if self.engine is not None else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if kind is None:
            self.finish()
        else:
            self.finish("failed" if issubclass(kind, Exception) else "interrupted")

    def _at_exit(self) -> None:
        self.finish("interrupted")

    # ------------------------------------------------------------------ one step

    @guarded
    def _log(self, metrics: Any, step: Any, time: Any, epoch: Any, transitions: list[Transition]) -> None:
        if not isinstance(metrics, Mapping):
            raise TypeError(f"log takes a mapping of names to numbers, not {type(metrics).__name__}")
        row = flat(metrics)
        note = self._translator.learn(row)
        signals = self._translator.signals(row)
        evaluation = self._translator.is_evaluation(signals)
        at = self._step_of(row, step, evaluation)
        if self._journal is None:
            goes_on = self._resume == "auto" and at > self._recorded_steps()[0]
            self._start((at if evaluation else at - 1) if goes_on else 0)
            if self._journal is None:
                return
        if note:
            self._note(note)
        if not signals:
            return
        if evaluation:  # of earlier weights perhaps, but this is when it is known
            at = max(at, self._step, self._pending.step if self._pending is not None else 0)
        held = self._pending
        if held is not None and (at != held.step or _differs(held.row, signals)):
            self._flush(transitions)
        elif self._comes_in_pieces(at, signals) and not evaluation:
            self._in_pieces = True
            self._note("one step is logged in several calls: from here on a step is judged when the next begins")
        if self._pending is None:
            self._pending = _Step(at, {}, None, None)
        held = self._pending
        held.row |= row
        held.time = as_number(time) if time is not None else held.time
        held.epoch = as_number(epoch) if epoch is not None else held.epoch
        if not self._in_pieces:
            self._flush(transitions)

    def _comes_in_pieces(self, step: int, signals: Row) -> bool:
        """Whether this adds to a step that was judged already, as far as it was known."""
        return (
            self._pending is None
            and step == self._step
            and bool(self._logged_last)
            and not _differs(self._logged_last, signals)
        )

    def _step_of(self, row: Row, step: Any, evaluation: bool) -> int:
        if step is None:
            step = self._translator.step_of(row)
        newest = self._pending.step if self._pending is not None else self._step
        if step is None:
            return newest if evaluation else newest + 1
        number = as_number(step)
        if isinstance(step, bool) or number is None or not 0 <= number < 2**53 or number != int(number):
            raise ValueError(f"step={step!r} is no count of optimizer steps; give a whole number from 0")
        return int(number)

    def _flush(self, transitions: list[Transition]) -> None:
        """Judge what was logged for a step, write it, and see to what agents ask for."""
        held, journal = self._pending, self._journal
        self._pending = None
        if held is None or journal is None:
            return
        now = clock.time() if held.time is None else held.time
        observation = self._translator.observation(held.row, held.step, now, held.epoch)
        if self._method in ONLINE_RL:
            batch = self._config.get("per_device_train_batch_size")
            floor = max(2 if self._method in GROUPED_RL else 1, batch if isinstance(batch, int) else 1)
            bounds = bounds_of_trials([observation], observation.signals, self._config, floor)
            observation = next(with_trials([observation], bounds))
        signals = self._translator.signals(held.row)
        self._logged_last = self._logged_last | signals if held.step == self._step else signals
        journal.step = self._step = held.step
        transitions += journal.tell(observation)
        journal.writer.heartbeat(held.step)
        if not self._translator.is_evaluation(signals):
            self._see_to_requests(journal)

    # ------------------------------------------------------------------ settings that change

    @guarded
    def _change_config(self, fields: Mapping[str, Any]) -> None:
        if not isinstance(fields, Mapping):
            raise TypeError(f"change_config takes a mapping of settings, not {type(fields).__name__}")
        new, _ = _settings(fields, self._family)
        old = {name: self._config.get(name) for name in new}
        changed = {name: value for name, value in new.items() if not same_value(old[name], value)}
        if not changed:
            return
        if self._journal is None:  # nothing was logged yet
            self._config |= changed
            return
        self._flush([])
        request = {
            "id": f"own-{uuid.uuid4().hex[:12]}",
            "actor": "the training loop",
            "patch": [op for name, value in changed.items() for op in change_field(name, old[name], value)],
            "fields": {name: {"old": old[name], "new": value} for name, value in changed.items()},
        }
        self._take_effect(request, changed)
        self._journal.change(request, "applied", "the loop changed its own settings")

    def _take_effect(self, request: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
        assert self._journal is not None
        self._config = {**self._config, **fields}
        self._journal.open_segment(f"change {request['id']}", self._config)

    @guarded
    def _see_to_requests(self, journal: Journal) -> None:
        if self._trial is not None:
            trial, judgement = self._trial, journal.settle(self._trial)
            if judgement is not None:
                self._trial = None
                if judgement.outcome == "failed" and trial.record.get("rollback_on_failure"):
                    self._change(journal, trial.record, back=True)
                    return
        request = journal.take_requests(self._consider)
        if request is not None:
            self._change(journal, request)

    def _consider(self, request: dict[str, Any], accepted: dict[str, Any] | None) -> dict[str, Any] | str:
        """The request with the fields that it changes, or why it is refused."""
        if self._apply_fields is None:
            return "this run takes no requests: its recorder was given no settings that may change (live=, apply=)"
        if self._trial is not None:
            return f"change {self._trial.record['id']} is on trial until step {self._trial.deadline}"
        if accepted is not None:
            return f"change {accepted['id']} was asked for first; one change is tried at a time"
        if request.get("restore"):
            return "this run cannot go back to a checkpoint by itself; ask without restore"
        try:
            fields = check_patch(request["patch"], self._config, self._live)
        except PatchRefused as refused:
            return str(refused)
        return {**request, "fields": {name: {"old": old, "new": new} for name, (old, new) in fields.items()}}

    def _change(self, journal: Journal, request: dict[str, Any], back: bool = False) -> None:
        """Make a change, or take it back. What the loop's own function raises leaves the settings as they were."""
        assert self._apply_fields is not None
        old = {name: pair["old"] for name, pair in request["fields"].items()}
        new = {name: pair["new"] for name, pair in request["fields"].items()}
        trial = None
        if not back:
            before = journal.engine.errors("firing", "suppressed", "unknown")
            trial = changes.start_trial(request, journal.engine.view, before)
        try:
            self._apply_fields(dict(old if back else new))
        except Exception as error:
            journal.change(request, "failed", f"could not be applied: {type(error).__name__}: {error}")
            self._apply_fields(dict(new if back else old))
            return
        self._take_effect(request, old if back else new)
        self._trial = trial
        if back:
            journal.change(request, "rolled_back", "settings only: a recorder restores no checkpoint")
        else:
            journal.change(request, "applied")


def _differs(before: Row, now: Row) -> bool:
    """Whether a name comes again with another value."""
    return any(name in before and before[name] != value for name, value in now.items())


# ---------------------------------------------------------------------- arguments


def _family(system: str | None) -> Family:
    if system is None:
        return PLAIN
    for family in FAMILIES:
        if family.name == system:
            return family
    raise ValueError(f"system {system!r} is not known; choose one of {', '.join(f.name for f in FAMILIES)}")


def _settings(given: Any, family: Family) -> tuple[dict[str, Any], str | None]:
    """Settings by field name as JSON can hold them, and the method if a system's own setting names it."""
    if given is None:
        return {}, None
    if dataclasses.is_dataclass(given) and not isinstance(given, type):
        given = {f.name: getattr(given, f.name, None) for f in dataclasses.fields(given)}
    elif not isinstance(given, Mapping) and hasattr(given, "__dict__"):
        given = vars(given)
    if not isinstance(given, Mapping):
        raise TypeError(f"config must hold settings by name, as a mapping does, not {type(given).__name__}")
    plain = {str(name): live._plain(value) for name, value in given.items()}
    if family is PLAIN:
        return {k: "<masked>" if settings.is_secret(k) and v is not None else v for k, v in plain.items()}, None
    made = settings.understand(plain, family)
    points = points_per_log(made.settings)
    return made.settings | ({} if points is None else {"points_per_log": points}), made.method


def _live_fields(
    given: Mapping[str, Any] | None, apply: Callable[..., Any] | None, known: Mapping[str, Any]
) -> dict[str, live.Bounds]:
    if (given is None) != (apply is None):
        raise ValueError(
            "live and apply belong together: which settings may change, and the function that changes them"
        )
    fields = {}
    for name, bounds in (given or {}).items():
        if name not in known:
            raise ValueError(f"live names {name!r}, which config does not hold; give its value there")
        if isinstance(bounds, list):
            fields[name] = live._bounds(choices=bounds)
        elif isinstance(bounds, Sequence) and not isinstance(bounds, str) and len(bounds) == 2:
            fields[name] = live._bounds(bounds[0], bounds[1])
        else:
            raise ValueError(f"live[{name!r}]={bounds!r} must be (lowest, highest) or a list of choices")
    return fields


def _world_size(known: Mapping[str, Any]) -> int:
    size = known.get("world_size") or os.environ.get("WORLD_SIZE") or 1
    try:
        return max(1, int(size))
    except (TypeError, ValueError):
        return 1
