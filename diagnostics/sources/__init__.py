"""Read anybody's log of a training run.

`read(path)` takes what training leaves behind: a Hugging Face `trainer_state.json`, JSON lines, CSV, the text of a
console or a notebook, event files of TensorBoard, runs of W&B and MLflow, or a run directory of ours. Containers and
systems are told apart by content; the result is observations under one set of names. No value is dropped without a
trace: `LoggedRun.account` says what became of each cell, `LoggedRun.notes` what a reader should know.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from outspoken.diagnostics import rundir
from outspoken.diagnostics.records import Observation
from outspoken.diagnostics.rules.registry import GROUPED_RL, ONLINE_RL
from outspoken.diagnostics.signals import PREFERENCE
from outspoken.diagnostics.sources import beside, own
from outspoken.diagnostics.sources.again import Again
from outspoken.diagnostics.sources.assemble import Account, Assembled, Segment, assemble, scan
from outspoken.diagnostics.sources.beside import Beside
from outspoken.diagnostics.sources.bounded import MAX_NAMES, weight_of
from outspoken.diagnostics.sources.config import (
    config_of_state,
    infer_method,
    points_per_log,
    read_config,
    total_steps_of,
)
from outspoken.diagnostics.sources.discover import find_log
from outspoken.diagnostics.sources.files import Row, UnreadableLog, count_of, listed
from outspoken.diagnostics.sources.formats import CONTAINERS, KEPT_CELLS, RawLog, read_raw
from outspoken.diagnostics.sources.llama_factory import LLAMA_FACTORY
from outspoken.diagnostics.sources.names import Column, Family, choose_family
from outspoken.diagnostics.sources.nemo_rl import NEMO_RL
from outspoken.diagnostics.sources.oat import OAT
from outspoken.diagnostics.sources.open_instruct import OPEN_INSTRUCT
from outspoken.diagnostics.sources.openrlhf import OPENRLHF, OPENRLHF_REWARD
from outspoken.diagnostics.sources.pipeline_rl import PIPELINE_RL
from outspoken.diagnostics.sources.prime_rl import PRIME_RL
from outspoken.diagnostics.sources.tinker import TINKER
from outspoken.diagnostics.sources.torchtune import TORCHTUNE
from outspoken.diagnostics.sources.trials import bounds_of_trials, with_trials
from outspoken.diagnostics.sources.trl import TRL
from outspoken.diagnostics.sources.verl import VERL

__all__ = ["FORMATS", "Account", "LoggedRun", "Segment", "UnreadableLog", "read", "read_config"]

# TRL last: where as many of its signs stand as of another's, the other's are the rarer ones.
FAMILIES = (
    *(VERL, OPENRLHF, OPENRLHF_REWARD, PRIME_RL, PIPELINE_RL, OAT, TINKER, LLAMA_FACTORY, TORCHTUNE, NEMO_RL),
    *(OPEN_INSTRUCT, TRL),
)
OTHER = Family("other")
FORMATS = (*CONTAINERS, *(family.name for family in FAMILIES))


@dataclass
class LoggedRun:
    """A run as its log tells it.

    Attributes:
        path: what was read. format: the container, one of `formats.CONTAINERS`, or "run_directory".
        family: whose names it uses: one of FAMILIES, "outspoken" or "other".
        rows: the raw rows in the order of the file, nested names joined by "/".
        observations: one per step, under our names, in order; those of a long log are made anew for each pass.
        signals: our names of the signals that were read, in order of appearance.
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
    rows: Again[Row]
    observations: Again[Observation]
    segments: list[Segment]
    account: Account
    columns: dict[str, Column]
    signals: list[str]
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


def read(
    path: str | Path,
    format: str | None = None,
    config: str | Path | Mapping[str, Any] | None = None,
    method: str | None = None,
) -> LoggedRun:
    """Read a log.

    Args:
        path: a file, a run directory of ours, or a directory with a log of a usual name (a checkpoint, an output
            directory, a run of W&B, MLflow or TensorBoard).
        format: one of `FORMATS`, to override what the content says: a container ("csv"), or the system whose names
            are used ("verl").
        config: the run's settings by field name, or a YAML or JSON file of them; they win over what the log holds.
        method: the training method, to override what the signals say.

    Raises:
        UnreadableLog: there is nothing to read; its message is one sentence that names the file, and the line if any.
    """
    try:
        return _read(Path(path), format, config, method)
    except OSError as error:
        raise UnreadableLog(f"{path}: cannot be read ({error.strerror or error}).") from None


def _read(
    path: Path, format: str | None, config: str | Path | Mapping[str, Any] | None, method: str | None
) -> LoggedRun:
    if format is not None and format not in FORMATS:
        raise UnreadableLog(f"{path}: format {format!r} is not known; choose one of {', '.join(FORMATS)}.")
    container = format if format in CONTAINERS else None
    card: dict[str, Any] = {}
    notes: list[str] = []
    if path.is_dir():
        directory = own.find_run_directory(path)
        if directory is not None and (directory / rundir.METRICS).is_file():
            path, card = directory / rundir.METRICS, own.read_card(directory)
        elif container is None:
            path = find_log(path, notes)
    elif path.name == rundir.METRICS and (path.parent / rundir.RUN).is_file():
        card = own.read_card(path.parent)
    raw = read_raw(path, container)
    seen = scan(raw.rows, FAMILIES)
    if not seen.rows:
        raise UnreadableLog(f"{path}: holds no logged row.")
    if own.is_record(raw.rows[0]):
        return _own_run(path, raw, card, read_config(config), method)

    family = _family(format, seen.names, raw.style)
    if not raw.met.wrapped:
        family = replace(family, null_is_nan=False)
    made = assemble(raw.rows, family, seen)
    if not len(made.observations):
        raise UnreadableLog(
            f"{path}: no row holds a metric, which is a name with a number for it, as in `loss: 2.31`."
        )
    logged = config_of_state(raw.extra)
    told, reason = _method(family, seen.names, made)
    if told == "unknown" and raw.named is not None:
        told, reason = raw.named, "the text around the metrics names it"
    header = dict(cell for row in islice(raw.rows, made.headers) for cell in row.items())
    found = beside.find(path, family, header)
    why = beside.contradiction(found.settings, logged, made.top_rate) or _of_other_kind(found.method, told, reason)
    if why is not None:
        found.notes.append(f"Settings beside the log ({', '.join(found.sources)}) are not of this run: {why}.")
        found = Beside(notes=found.notes)
    given = beside.given(read_config(config), family)
    settings = {**logged, **found.settings, **given.settings}
    total_steps = total_steps_of(settings, seen.last)
    for stated, by in (
        (method, "given"),
        (given.method, "the settings say so"),
        (found.method, "its settings say so"),
    ):
        if stated is not None:
            told, reason = stated, by
            break
    notes += [*raw.notes, *made.notes, *found.notes, *given.notes]
    if header and "." not in found.sources:
        notes.append(
            f"Before the first step stood {count_of(made.headers, 'row')} without a setting that is known here."
        )
    if found.sources:
        places = ["the log itself" if source == "." else source for source in found.sources]
        notes.append(f"Settings were read from {', '.join(places)}.")
    if reason != "given":
        notes.append(_on_method(told, reason))
    if "points_per_log" not in settings and (points := points_per_log(settings)) is not None:
        settings["points_per_log"] = points
    if made.step_axis == "row number":
        total_steps = None  # planned steps are not rows
    observations = _with_trials(made, told, settings, notes)
    notes += made.on_names
    return LoggedRun(
        path=str(path),
        format=raw.format,
        family=family.name,
        rows=raw.rows,
        observations=observations,
        segments=made.segments,
        account=made.account,
        columns=made.columns,
        signals=made.signals,
        step_axis=made.step_axis,
        method=told,
        method_reason=reason,
        config=settings,
        config_known=given.complete or found.complete,
        total_steps=total_steps,
        summary=made.summary,
        notes=notes,
    )


def _family(format: str | None, names: Mapping[str, Any], style: str | None) -> Family:
    """The system whose names are used: as the user says, as the names say, or as the form of a console's lines does."""
    by_name = {family.name: family for family in FAMILIES}
    return by_name.get(str(format)) or choose_family(names, FAMILIES) or by_name.get(str(style)) or OTHER


def _method(family: Family, names: Mapping[str, Any], made: Assembled) -> tuple[str, str]:
    """The method that the log speaks for, by its system's names or by ours, and what tells it."""
    told = family.method_of(tuple(names)) if family.method_of is not None else None
    return told or infer_method(set(made.signals), made.observations)


def _on_method(told: str, reason: str) -> str:
    if told == "unknown":
        return f"The method is not known: {reason}. Give --method."
    advice = " Give --method if it is another." if "low confidence" in reason else ""
    return f"Taken for {told}: {reason}.{advice}"


# Methods that log alike. Settings of another kind than the log's cannot be of the same run.
_KINDS = (ONLINE_RL, PREFERENCE, ("sft", "pretrain", "distillation"), ("reward",))


def _of_other_kind(stated: str | None, told: str, reason: str) -> str | None:
    kinds = [next((kind for kind in _KINDS if name in kind), None) for name in (stated, told)]
    if None in kinds or kinds[0] == kinds[1] or "low confidence" in reason:
        return None
    return f"they say {stated}, the log speaks for {told} ({reason})"


def _with_trials(made: Assembled, method: str, config: Mapping[str, Any], notes: list[str]) -> Again[Observation]:
    """The observations, with what is known of the trials behind a share that the log does not count."""
    if method not in ONLINE_RL:
        return made.observations
    batch = config.get("per_device_train_batch_size")
    floor = max(2 if method in GROUPED_RL else 1, batch if isinstance(batch, int) else 1)
    bounds = bounds_of_trials(made.observations, made.signals, dict(config), floor)
    if not bounds:
        return made.observations
    least = [f"{name} {bound}" for name, bound in bounds.items()]
    notes.append(f"How many samples stand behind a share is not logged; at least: {listed(least)}.")
    count = len(made.observations)
    return Again(lambda: with_trials(made.observations, bounds), weight_of, KEPT_CELLS, count)


def _own_run(
    path: Path, raw: RawLog, card: Mapping[str, Any], given: Mapping[str, Any], method: str | None
) -> LoggedRun:
    """A run of ours: the observations stand in the file as they were made."""
    segments: list[Segment] = []
    account = Account()
    last_segment: Any = None
    numbers: list[int] = []
    names: dict[str, None] = {}
    strange = count = 0
    for row in raw.rows:
        made = own.to_observation(row) if own.is_record(row) else None
        if made is None:
            strange += 1
            continue
        for state in (made.signals, made.nonfinite, made.unreadable):
            names.update(dict.fromkeys(state))
        if len(names) > MAX_NAMES:
            raise UnreadableLog(f"{path}: holds more than {MAX_NAMES} names, which no run has.")
        account.value += len(made.signals)
        account.nonfinite += len(made.nonfinite)
        account.unreadable += len(made.unreadable)
        cells = own.cells(row)
        account.cells += cells
        account.empty += cells - len(made.signals) - len(made.nonfinite) - len(made.unreadable)
        segment = row.get("segment", 0)
        if not segments or segment != last_segment:
            reason = "start" if not segments else "the run was resumed or its configuration changed"
            segments.append(Segment(count, made.step, reason))
            numbers.append(segment if isinstance(segment, int) else len(numbers))
        last_segment = segment
        count += 1
    if not count:
        raise UnreadableLog(f"{path}: holds no observation.")
    notes = list(raw.notes)
    if strange:
        notes.append(f"{strange} lines are no observations and were skipped.")

    def observations() -> Iterator[Observation]:
        for row in raw.rows:
            if own.is_record(row) and (made := own.to_observation(row)) is not None:
                yield made

    again = Again(observations, weight_of, KEPT_CELLS, count)
    guessed, reason = infer_method(set(names), again)
    recorded = card.get("method")
    recorded_config = card.get("config")
    recorded_facts = card.get("facts")
    total = card.get("total_steps")
    return LoggedRun(
        path=str(path),
        format="run_directory",
        family="outspoken",
        rows=raw.rows,
        observations=again,
        segments=segments,
        account=account,
        columns={},
        signals=[name for name in names if not name.endswith("#n")],
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
