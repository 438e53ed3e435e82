"""From raw rows to observations: one per step, in order, with every cell accounted for."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

from outspoken.diagnostics.records import Observation, as_number
from outspoken.diagnostics.sources.files import Row, _count
from outspoken.diagnostics.sources.names import CLOCKS, STEPS, SUMMARY, Column, Family, is_known, plan, tidy

MAX_RESTARTS = 0.2  # share of rows; with more, the step column does not count steps
NAMES_SHOWN = 12
REPEAT_SHARE = 0.3  # share of rows that repeat the measurements of the row before, for a log that was filled forward


@dataclass
class Account:
    """What became of each cell of the file: `cells` is the sum of all the others.

    Attributes:
        cells: cells in the file (a cell is a name with a value in a row; empty CSV cells count).
        value, nonfinite, unreadable: kept in an observation, in that state.
        empty: null or an empty CSV cell: not emitted.
        clock: step, epoch, time and progress.
        text: columns that never hold a number and that no table knows, and rows that describe the run before its first step.
        summary: the Trainer's closing row.
        duplicate: equal to what was already read for the step.
        superseded: an earlier value at the same step, logged again with another one.
    """

    cells: int = 0
    value: int = 0
    nonfinite: int = 0
    unreadable: int = 0
    empty: int = 0
    clock: int = 0
    text: int = 0
    summary: int = 0
    duplicate: int = 0
    superseded: int = 0

    @property
    def balanced(self) -> bool:
        parts = asdict(self)
        return bool(parts.pop("cells") == sum(parts.values()))


@dataclass(frozen=True)
class Segment:
    """Where a stretch of the log begins: index of its first observation, its step, and why it begins there."""

    first: int
    step: int
    reason: str


@dataclass
class Assembled:
    observations: list[Observation]
    segments: list[Segment]
    account: Account
    columns: dict[str, Column]
    step_axis: str
    summary: dict[str, Any]
    notes: list[str]
    cells: list[int]  # of the file, behind each observation


@dataclass
class _Point:
    """One step being put together."""

    step: int
    cells: dict[str, Any] = field(default_factory=dict)  # our name -> raw value
    time: float | None = None
    epoch: float | None = None


def assemble(rows: Sequence[Row], family: Family) -> Assembled:
    """Merge rows into observations.

    Rows of one step become one observation (an evaluation joins the training row of its step). A step that goes back,
    or comes again with other training values, is a restart and opens a segment. Identical rows count once.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    axis = _step_axis(rows, family)
    notes: list[str] = []
    if axis is not None:
        rows = _oldest_first(rows, axis, notes)
        made = _merge(rows, names, family, axis)
        if len(made.segments) - 1 > max(3, MAX_RESTARTS * len(made.observations)):
            notes.append(f"{axis!r} goes back or repeats in many rows, so rows were numbered instead.")
            axis = None
            made = _merge(rows, names, family, None)
    else:
        notes.append("No column counts steps, so rows were numbered: a step is a row here.")
        made = _merge(rows, names, family, None)
    _filled_forward(made)
    made.notes[:0] = notes
    return made


# ---------------------------------------------------------------------- the step axis


def _step_axis(rows: Sequence[Row], family: Family) -> str | None:
    """The raw name whose values count steps; None if there is none in at least half of the rows."""
    order = {name: i for i, name in enumerate(dict.fromkeys((*family.steps, *STEPS)))}
    names = dict.fromkeys(name for row in rows for name in row)
    named = [raw for raw in names if raw in order or tidy(raw).lower() in order]
    present = {raw: sum(_step_of(row.get(raw)) is not None for row in rows) for raw in named}
    enough = [raw for raw in named if present[raw] >= 0.5 * len(rows)]
    if not enough:
        return None
    return min(enough, key=lambda raw: min(order.get(raw, 999), order.get(tidy(raw).lower(), 999)))


def _step_of(value: Any) -> int | None:
    if isinstance(value, bool):
        return None
    number = as_number(value)
    if number is None or not math.isfinite(number) or not 0 <= number < 2**53:
        return None
    return round(number)


def _oldest_first(rows: Sequence[Row], axis: str, notes: list[str]) -> Sequence[Row]:
    steps = [s for s in (_step_of(row.get(axis)) for row in rows) if s is not None]
    falls = sum(b < a for a, b in pairwise(steps))
    if len(steps) >= 3 and falls > 0.9 * (len(steps) - 1):
        notes.append("The newest row stood first; the rows were turned round.")
        return rows[::-1]
    return rows


# ---------------------------------------------------------------------- merging


def _merge(rows: Sequence[Row], names: Sequence[str], family: Family, axis: str | None) -> Assembled:
    columns = plan(names, family, axis)
    texts = _text_columns(rows, columns, family)
    account = Account(cells=sum(len(row) for row in rows))
    summary: dict[str, Any] = {}
    points: list[_Point] = []
    segments: list[Segment] = [Segment(0, 0, "start")]
    at: dict[int, _Point] = {}  # step -> point, of this segment
    seen: set[int] = set()  # hashes of the rows so far
    dropped_rows = 0
    newest: int | None = None  # step of the newest training row in this segment
    # where a row without a step belongs: to the row before
    last = next((s for s in (_step_of(row.get(axis)) for row in rows) if s is not None), 0) if axis else 0

    headers = _headers(rows, axis) if axis is not None else 0
    account.text += sum(len(row) for row in rows[:headers])
    for number, row in enumerate(rows, start=1):
        if number <= headers:
            continue
        if axis is not None:
            key = hash(repr(row))
            if key in seen and row.get(axis) is not None:
                account.duplicate += len(row)
                dropped_rows += 1
                continue
            seen.add(key)
        step = number if axis is None else _step_of(row.get(axis))
        closing = "train_runtime" in row
        cells: dict[str, Any] = {}
        clock = epoch = None
        for raw, value in row.items():
            column = columns[raw]
            if column.kind == "step":
                account.clock += 1
            elif column.kind == "epoch":
                account.clock += 1
                epoch = as_number(value)
            elif column.kind == "time":
                clock = _time_of(value)
                account.clock += 1
            elif column.kind == "clock":
                account.clock += 1
            elif closing and raw in SUMMARY:
                account.summary += 1
                summary[raw] = value
            elif raw in texts:
                account.text += 1
            elif value is None:
                if family.null_is_nan:
                    cells[raw] = math.nan
                else:
                    account.empty += 1
            else:
                cells[raw] = value
        if not cells:
            continue
        if step is None:
            step = last
        last = step
        training = not closing and any(not columns[raw].evaluation for raw in cells)
        point = at.get(step)
        reason = ""
        if training and newest is not None and step < newest and axis is not None:
            reason = f"the step went back from {newest} to {step}"
        elif training and point is not None and _contradicts(point, cells, columns):
            reason = f"step {step} was logged again with other values"
        if reason:
            segments.append(Segment(len(points), step, reason))
            at, newest, point = {}, None, None
        if point is None:
            point = at[step] = _Point(step)
            points.append(point)
        for raw, value in cells.items():
            if raw in point.cells:
                same = _same(point.cells[raw], value)
                account.duplicate += same
                account.superseded += not same
            point.cells[raw] = value
        point.time = clock if clock is not None else point.time
        point.epoch = epoch if epoch is not None and math.isfinite(epoch) else point.epoch
        if training or newest is None:
            newest = step if newest is None else max(newest, step)

    observations, behind = _observe(points, segments, columns, family, account)
    segments[0] = Segment(0, observations[0].step if observations else 0, "start")
    if headers:
        columns = {raw: c for raw, c in columns.items() if any(raw in row for row in rows[headers:])}
    notes = _notes(columns, texts, family, account, segments, summary, dropped_rows)
    if headers:
        notes.append(f"{_count(headers, 'row')} before the first step describe the run and hold no metric.")
    return Assembled(observations, segments, account, columns, axis or "row number", summary, notes, behind)


def _headers(rows: Sequence[Row], axis: str) -> int:
    """How many rows at the start describe the run: they have no step, and no name in common with any later row."""
    count = next((i for i, row in enumerate(rows) if _step_of(row.get(axis)) is not None), 0)
    if count == 0:
        return 0
    later = {name for row in rows[count:] for name in row} - CLOCKS
    return count if all(later.isdisjoint(row) for row in rows[:count]) else 0


def _contradicts(point: _Point, cells: Mapping[str, Any], columns: Mapping[str, Column]) -> bool:
    """Whether a row gives other training values for a step that was already read."""
    return any(
        raw in point.cells and not columns[raw].evaluation and not _same(point.cells[raw], value)
        for raw, value in cells.items()
    )


def _same(a: Any, b: Any) -> bool:
    return bool(a == b) or (isinstance(a, float) and isinstance(b, float) and a != a and b != b)


def _text_columns(rows: Sequence[Row], columns: Mapping[str, Column], family: Family) -> set[str]:
    """Columns of words: no table knows them and they never hold a number."""
    candidates = {c.raw for c in columns.values() if c.kind == "signal" and not is_known(c, family)}
    filled: set[str] = set()
    for row in rows:
        for raw in [r for r in row if r in candidates]:
            value = row[raw]
            if value is None:
                continue
            filled.add(raw)
            if as_number(value) is not None:
                candidates.discard(raw)
    return candidates & filled


def _time_of(value: Any) -> float | None:
    """Seconds since the epoch, from seconds, milliseconds or an ISO 8601 text; None for anything else."""
    number = as_number(value)
    if number is not None:
        if not math.isfinite(number):
            return None
        if number > 1e12:
            number /= 1000
        return number if number > 1e8 else None  # below: seconds since the start
    if isinstance(value, str):
        try:
            moment = datetime.fromisoformat(value.strip())
        except ValueError:
            return None
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    return None


def _observe(
    points: list[_Point],
    segments: list[Segment],
    columns: Mapping[str, Column],
    family: Family,
    account: Account,
) -> tuple[list[Observation], list[int]]:
    """Points as observations, in order of step within each segment, and the cells behind each."""
    starts = [s.first for s in segments] + [len(points)]
    ordered: list[_Point] = []
    for first, end in pairwise(starts):
        ordered.extend(sorted(points[first:end], key=lambda p: p.step))  # late evaluations of an earlier step
    observations: list[Observation] = []
    behind: list[int] = []
    for point in ordered:
        cells: dict[str, Any] = {}
        for raw, value in point.cells.items():
            column = columns[raw]
            if column.scale != 1.0:
                number = as_number(value)
                value = value if number is None else number * column.scale
            cells[column.name] = value
        seen = Observation.from_raw(point.step, cells, point.time, point.epoch)
        behind.append(len(cells))
        account.value += len(seen.signals)
        account.nonfinite += len(seen.nonfinite)
        account.unreadable += len(seen.unreadable)
        for name, derived in family.derived.items():
            if name not in cells and all(i in seen.signals for i in derived.inputs):
                value = derived.formula(*(seen.signals[i] for i in derived.inputs))
                if math.isfinite(value):
                    seen.signals[name] = value  # type: ignore[index]
        observations.append(seen)
    return observations, behind


def _filled_forward(made: Assembled) -> None:
    """Drop observations that only repeat the one before, where a logger wrote its last values at every step.

    Counted as such only where many rows do so and each has a loss or gradient norm that is not zero: a training step
    does not reproduce those to the last digit, so they were not measured again.
    """
    repeats = [
        i
        for i in range(1, len(made.observations))
        if _repeats(made.observations[i - 1], made.observations[i]) and not any(s.first == i for s in made.segments)
    ]
    if len(repeats) < max(5, REPEAT_SHARE * len(made.observations)):
        return
    dropped = set(repeats)
    for i in repeats:
        unreadable = len(made.observations[i].unreadable)
        made.account.unreadable -= unreadable
        made.account.value -= made.cells[i] - unreadable
        made.account.duplicate += made.cells[i]
    before = [0]
    for i in range(len(made.observations)):
        before.append(before[-1] + (i in dropped))
    made.segments = [Segment(s.first - before[s.first], s.step, s.reason) for s in made.segments]
    made.observations = [o for i, o in enumerate(made.observations) if i not in dropped]
    made.cells = [n for i, n in enumerate(made.cells) if i not in dropped]
    made.notes.append(
        f"{_count(len(repeats), 'row')} only repeat the row before (the logger wrote its last values at every step); "
        f"each measurement was counted once, which leaves {len(made.observations)}."
    )


def _repeats(a: Observation, b: Observation) -> bool:
    if a.nonfinite or b.nonfinite or a.signals != b.signals or a.unreadable != b.unreadable:
        return False
    return any(b.signals.get(name) for name in ("loss", "grad_norm")) and len(b.signals) >= 3


# ---------------------------------------------------------------------- notes


def _notes(
    columns: Mapping[str, Column],
    texts: set[str],
    family: Family,
    account: Account,
    segments: Sequence[Segment],
    summary: Mapping[str, Any],
    dropped_rows: int,
) -> list[str]:
    notes = []
    renamed = {
        c.raw: c.name for c in columns.values() if c.kind == "signal" and c.raw != c.name and c.raw not in texts
    }
    if renamed:
        notes.append("Read under our names: " + _some([f"{raw} as {ours}" for raw, ours in renamed.items()]) + ".")
    unknown = [
        c.name
        for c in columns.values()
        if c.kind == "signal" and c.raw not in texts and not is_known(c, family) and c.raw not in summary
    ]
    if unknown:
        notes.append(f"Kept under their own names, no rule reads them: {_some(unknown)}.")
    if texts:
        notes.append(f"Text, not metrics: {_some(sorted(texts))}.")
    for segment in segments[1:6]:
        notes.append(f"A new segment begins at step {segment.step}: {segment.reason}.")
    if len(segments) > 6:
        notes.append(f"{len(segments) - 6} more segments begin later, the same way.")
    if dropped_rows:
        notes.append(f"{_count(dropped_rows, 'row')} identical to an earlier one were dropped.")
    if account.superseded:
        notes.append(f"{_count(account.superseded, 'value')} were logged again at the same step; the last one counts.")
    if account.unreadable:
        notes.append(f"{_count(account.unreadable, 'value')} are no numbers.")
    if family.null_is_nan:
        notes.append("This format writes NaN as null, so null was read as NaN.")
    if summary:
        numbers = {k: v for k, v in summary.items() if k in ("train_runtime", "train_loss")}
        notes.append(f"The closing row of the run was kept apart: {json.dumps(numbers, default=str)}.")
    return notes


def _some(names: Sequence[str]) -> str:
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
