"""Read anybody's log of a training run.

`read(path)` takes a Hugging Face `trainer_state.json`, JSON lines or CSV of metrics (TRL, transformers, verl,
tinker-cookbook, LLaMA-Factory, home-made), plain or gzipped, told apart by content, or a run directory of ours, and
gives observations under one set of names. No value is dropped without a trace: `LoggedRun.account` says what became
of each cell, `LoggedRun.notes` what a reader should know.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from outspoken.diagnostics import rundir
from outspoken.diagnostics.records import Observation
from outspoken.diagnostics.rules.registry import GROUPED_RL, ONLINE_RL
from outspoken.diagnostics.sources import own
from outspoken.diagnostics.sources.assemble import Account, Segment, assemble
from outspoken.diagnostics.sources.config import (
    config_of_state,
    infer_method,
    points_per_log,
    read_config,
    total_steps_of,
)
from outspoken.diagnostics.sources.files import FORMATS, RawLog, Row, UnreadableLog, read_raw
from outspoken.diagnostics.sources.llama_factory import LLAMA_FACTORY
from outspoken.diagnostics.sources.names import Column, Family, choose_family
from outspoken.diagnostics.sources.nemo_rl import NEMO_RL
from outspoken.diagnostics.sources.open_instruct import OPEN_INSTRUCT
from outspoken.diagnostics.sources.tinker import TINKER
from outspoken.diagnostics.sources.torchtune import TORCHTUNE
from outspoken.diagnostics.sources.trials import add_least_trials
from outspoken.diagnostics.sources.trl import TRL
from outspoken.diagnostics.sources.verl import VERL

__all__ = ["FORMATS", "Account", "LoggedRun", "Segment", "UnreadableLog", "read", "read_config"]

FAMILIES = (TRL, VERL, TINKER, LLAMA_FACTORY, TORCHTUNE, NEMO_RL, OPEN_INSTRUCT)
OTHER = Family("other")

# What to look for in a directory, best first.
_LOGS_IN_DIRECTORY = (
    "trainer_state.json",
    "metrics.jsonl",
    "trainer_log.jsonl",
    "log.jsonl",
    "log.jsonl.gz",
    "metrics.csv",
)
_CHECKPOINT = re.compile(r"^checkpoint-(\d+)$")


@dataclass
class LoggedRun:
    """A run as its log tells it.

    Attributes:
        path: the file that was read. format: "trainer_state", "jsonl", "json", "csv" or "run_directory".
        family: whose names it uses: "trl", "verl", "tinker", "llama_factory", "outspoken" or "other".
        rows: the raw rows in the order of the file, nested names joined by "/".
        observations: one per step, under our names, in order.
        segments: where each stretch begins, the first at observation 0; a restart begins a new one.
        summary: the Trainer's closing row.
        account: what became of each cell. columns: raw name -> what became of the column.
        notes: what a reader should know, one sentence each.
        method: "grpo", "dpo", "sft" … or "unknown". method_reason: why.
        config: settings that the log itself holds, or that were handed over. facts: see `RunView.facts`.
        config_known: whether a configuration was handed over or recorded, not only guessed from the log.
        total_steps: planned steps, if known.
        step_axis: the raw name that counts steps, or "row number".
    """

    path: str
    format: str
    family: str
    rows: list[Row]
    observations: list[Observation]
    segments: list[Segment]
    account: Account
    columns: dict[str, Column]
    step_axis: str
    method: str
    method_reason: str
    config: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    config_known: bool = False
    total_steps: int | None = None
    segment_numbers: list[int] = field(default_factory=list)  # of a run of ours: the number recorded for each segment
    summary: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def signals(self) -> list[str]:
        """Our names of the signals that were read, in order of appearance."""
        names = (n for o in self.observations for n in (*o.signals, *o.nonfinite, *o.unreadable))
        return [name for name in dict.fromkeys(names) if not name.endswith("#n")]


def read(
    path: str | Path,
    format: str | None = None,
    config: str | Path | Mapping[str, Any] | None = None,
    method: str | None = None,
) -> LoggedRun:
    """Read a log.

    Args:
        path: a file, a run directory of ours, or a directory with a log of a usual name (a checkpoint, an output
            directory).
        format: one of `FORMATS`, to override what the content says.
        config: the run's settings by field name, or a YAML or JSON file of them; they win over what the log holds.
        method: the training method, to override what the signals say.

    Raises:
        UnreadableLog: there is nothing to read; its message is one sentence that names the file, and the line if any.
    """
    path = Path(path)
    given = read_config(config)
    card: dict[str, Any] = {}
    if path.is_dir():
        directory = own.find_run_directory(path)
        if directory is not None and (directory / rundir.METRICS).is_file():
            path, card = directory / rundir.METRICS, own.read_card(directory)
        else:
            path = _find_log(path)
    elif path.name == rundir.METRICS and (path.parent / rundir.RUN).is_file():
        card = own.read_card(path.parent)
    raw = read_raw(path, format)
    if own.is_record(raw.rows[0]):
        return _own_run(path, raw, card, given, method)

    family = choose_family(dict.fromkeys(name for row in raw.rows for name in row), FAMILIES) or OTHER
    if not raw.wrapped:
        family = replace(family, null_is_nan=False)
    made = assemble(raw.rows, family)
    if not made.observations:
        raise UnreadableLog(f"{path}: no row holds a metric.")
    settings = {**config_of_state(raw.extra), **given}
    names = {n for o in made.observations for n in (*o.signals, *o.nonfinite)}
    guessed, reason = infer_method(names, made.observations)
    if family.follow is not None:
        follow = family.follow()
        for observation in made.observations:
            follow(observation)
    notes = [*raw.notes, *made.notes, *_beside(path)]
    if method is None:
        notes.append(f"Taken for {guessed}: {reason}.")
    run = LoggedRun(
        path=str(path),
        format=raw.format,
        family=family.name,
        rows=raw.rows,
        observations=made.observations,
        segments=made.segments,
        account=made.account,
        columns=made.columns,
        step_axis=made.step_axis,
        method=method or guessed,
        method_reason="given" if method else reason,
        config=settings,
        config_known=bool(given),
        total_steps=total_steps_of(settings, raw.rows),
        summary=made.summary,
        notes=notes,
    )
    _complete(run)
    return run


def _complete(run: LoggedRun) -> None:
    """What follows from the settings and the signals together."""
    if "points_per_log" not in run.config:
        points = points_per_log(run.config)
        if points is not None:
            run.config["points_per_log"] = points
    if run.step_axis == "row number":
        run.total_steps = None  # planned steps are not rows
    if run.method in ONLINE_RL:
        batch = run.config.get("per_device_train_batch_size")
        floor = max(2 if run.method in GROUPED_RL else 1, batch if isinstance(batch, int) else 1)
        for name, bound in add_least_trials(run.observations, run.config, floor).items():
            run.notes.append(f"How many trials a point of {name} stands for is not logged: at least {bound}.")


def _find_log(directory: Path) -> Path:
    for name in _LOGS_IN_DIRECTORY:
        if (directory / name).is_file():
            return directory / name
    checkpoints = [
        (int(match.group(1)), entry)
        for entry in directory.iterdir()
        if (match := _CHECKPOINT.match(entry.name)) and (entry / "trainer_state.json").is_file()
    ]
    if checkpoints:
        return max(checkpoints)[1] / "trainer_state.json"
    raise UnreadableLog(f"{directory}: holds no log of a usual name; give the file itself.")


def _beside(path: Path) -> list[str]:
    if (path.parent / "training_args.bin").is_file():
        return [
            "training_args.bin lies beside the log; it is a pickle and is never opened. Give settings by --config."
        ]
    return []


def _own_run(
    path: Path, raw: RawLog, card: Mapping[str, Any], given: Mapping[str, Any], method: str | None
) -> LoggedRun:
    """A run of ours: the observations stand in the file as they were made."""
    observations: list[Observation] = []
    segments: list[Segment] = []
    account = Account()
    last_segment: Any = None
    numbers: list[int] = []
    strange = 0
    for row in raw.rows:
        made = own.to_observation(row) if own.is_record(row) else None
        if made is None:
            strange += 1
            continue
        account.value += len(made.signals)
        account.nonfinite += len(made.nonfinite)
        account.unreadable += len(made.unreadable)
        cells = own.cells(row)
        account.cells += cells
        account.empty += cells - len(made.signals) - len(made.nonfinite) - len(made.unreadable)
        segment = row.get("segment", 0)
        if not segments or segment != last_segment:
            reason = "start" if not segments else "the run was resumed or its configuration changed"
            segments.append(Segment(len(observations), made.step, reason))
            numbers.append(segment if isinstance(segment, int) else len(numbers))
        last_segment = segment
        observations.append(made)
    if not observations:
        raise UnreadableLog(f"{path}: holds no observation.")
    notes = list(raw.notes)
    if strange:
        notes.append(f"{strange} lines are no observations and were skipped.")
    names = {n for o in observations for n in (*o.signals, *o.nonfinite)}
    guessed, reason = infer_method(names, observations)
    recorded = card.get("method")
    recorded_config = card.get("config")
    recorded_facts = card.get("facts")
    total = card.get("total_steps")
    return LoggedRun(
        path=str(path),
        format="run_directory",
        family="outspoken",
        rows=raw.rows,
        observations=observations,
        segments=segments,
        account=account,
        columns={},
        step_axis="step",
        method=method or (recorded if isinstance(recorded, str) else guessed),
        method_reason="given" if method else ("recorded in run.json" if isinstance(recorded, str) else reason),
        config={**(recorded_config if isinstance(recorded_config, dict) else {}), **given},
        facts=dict(recorded_facts) if isinstance(recorded_facts, dict) else {},
        config_known=bool(given) or isinstance(recorded_config, dict),
        segment_numbers=numbers,
        total_steps=int(total) if isinstance(total, int) and total > 0 else None,
        notes=notes,
    )
