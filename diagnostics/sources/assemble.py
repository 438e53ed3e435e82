"""From raw rows to observations: one per step, in order, with every cell accounted for.

Rows are gone through several times and never held together: once to see which columns there are and what they hold,
once to count, and once for each time that the observations are asked for.
"""

import math
from bisect import insort
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from outspoken.diagnostics.records import Observation, as_number
from outspoken.diagnostics.sources.again import Again
from outspoken.diagnostics.sources.bounded import weight_of
from outspoken.diagnostics.sources.files import Row, count_of, listed
from outspoken.diagnostics.sources.names import (
    CLOCKS,
    STEPS,
    SUMMARY,
    Column,
    Family,
    is_known,
    is_renamed,
    plan,
    tidy,
)
from outspoken.diagnostics.sources.translate import as_observation, meaning

MAX_RESTARTS = 0.2  # share of rows; with more, the step column does not count steps
REPEAT_SHARE = 0.3  # share of rows that repeat the measurements of the row before, for a log that was filled forward
WINDOW = 1_000  # steps within which a late evaluation finds its step
ROWS_REMEMBERED = 100_000  # rows, at least, among which a row that comes again is found
KEPT_CELLS = 2_000_000  # of observations, in memory; more are made anew for each pass
HEAD_ROWS = 100  # rows at the start that may describe the run
RANKS = ("rank", "global_rank", "process_index", "local_rank")
MAX_PROCESSES = 1024
MAX_STEPS_COMPARED = 10_000
SAME_SHARE = 0.95  # of repeated rows with an equal measurement, for rows of several processes


@dataclass
class Account:
    """What became of each cell of the file: `cells` is the sum of all the others.

    Attributes:
        cells: cells in the file (a cell is a name with a value in a row; empty CSV cells count).
        value, nonfinite, unreadable: kept in an observation, in that state.
        empty: null or an empty CSV cell, or what its system writes for "not available": not emitted.
        clock: step, epoch, time and progress.
        text: columns that never hold a number and that no table knows, and rows that describe the run before its first step.
        summary: the Trainer's closing row.
        duplicate: equal to what was already read for the step.
        superseded: an earlier value at the same step, logged again with another one.
        other_process: of a row that another process wrote of the same step.
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
    other_process: int = 0

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
    """A log as observations.

    Attributes:
        observations: one per step. signals: their names, in order of appearance.
        columns: raw name -> what became of the column. step_axis: the raw name that counts steps, or "row number".
        summary: the Trainer's closing row. notes: what a reader should know, one sentence each; on_names: those on what
        the names were taken for. headers: rows at the start that describe the run.
        top_rate: the highest learning rate.
    """

    observations: Again[Observation]
    segments: list[Segment]
    account: Account
    columns: dict[str, Column]
    step_axis: str
    summary: dict[str, Any]
    notes: list[str]
    on_names: list[str]
    headers: int
    signals: list[str]
    top_rate: float | None


# ---------------------------------------------------------------------- what the columns hold


@dataclass
class Scan:
    """What one pass over the rows tells of the columns.

    Attributes:
        rows: their number. names: every name, in order of appearance, with the number of the last row that has it.
        head: the names of the first rows.
        numeric, nonzero, filled: names that ever hold a number, one that is not 0, anything.
        steps: name -> how it counts steps, of the names that may.
        ranks: the values of a column that names the process.
        last: the last row.
    """

    rows: int = 0
    names: dict[str, int] = field(default_factory=dict)
    head: list[tuple[str, ...]] = field(default_factory=list)
    numeric: set[str] = field(default_factory=set)
    nonzero: set[str] = field(default_factory=set)
    filled: set[str] = field(default_factory=set)
    steps: dict[str, "_Steps"] = field(default_factory=dict)
    ranks: dict[str, set[int]] = field(default_factory=dict)
    last: Row = field(default_factory=dict)


@dataclass
class _Steps:
    present: int = 0  # rows that hold a step
    first: int = 0  # number of rows before the first of them
    opening: int = 0  # that first step
    falls: int = 0  # times that it went down
    last: int | None = None


def scan(rows: Iterable[Row], families: Iterable[Family]) -> Scan:
    """Go through the rows once; `families` tell which names may count steps."""
    steps_by_name = {*STEPS, *(name for family in families for name in family.steps)}
    seen = Scan()
    settled: set[str] = set()  # names of which nothing more is to be learnt here
    for number, row in enumerate(rows):
        seen.names.update(dict.fromkeys(row, number))
        if number < HEAD_ROWS:
            seen.head.append(tuple(row))
        for name, value in row.items():
            if name in settled:
                continue
            if name in seen.steps or name in seen.ranks:
                pass
            elif name in steps_by_name or tidy(name).lower() in steps_by_name:
                seen.steps[name] = _Steps()
            elif tidy(name).lower() in RANKS:
                seen.ranks[name] = set()
            if value is not None:
                seen.filled.add(name)
                as_float = as_number(value)
                if as_float is not None:
                    seen.numeric.add(name)
                    if as_float != 0:
                        seen.nonzero.add(name)
                        if name not in seen.steps and name not in seen.ranks:
                            settled.add(name)
        for name, steps in seen.steps.items():
            step = _step_of(row.get(name))
            if step is not None:
                if not steps.present:
                    steps.first, steps.opening = number, step
                steps.present += 1
                steps.falls += steps.last is not None and step < steps.last
                steps.last = step
        for name, ranks in seen.ranks.items():
            rank = _step_of(row.get(name))
            if rank is not None and len(ranks) < 4096:
                ranks.add(rank)
        seen.last = row
        seen.rows += 1
    return seen


def _step_axis(seen: Scan, family: Family) -> str | None:
    """The raw name whose values count steps; None if there is none in at least half of the rows."""
    order = {name: i for i, name in enumerate(dict.fromkeys((*family.steps, *STEPS)))}

    def place(raw: str) -> int:
        return min(order.get(raw, 999), order.get(tidy(raw).lower(), 999))

    enough = [raw for raw, steps in seen.steps.items() if steps.present >= 0.5 * seen.rows and place(raw) < 999]
    return min(enough, key=place) if enough else None


def _step_of(value: Any) -> int | None:
    if isinstance(value, bool):
        return None
    number = as_number(value)
    if number is None or not math.isfinite(number) or not 0 <= number < 2**53:
        return None
    return round(number)


def _headers(seen: Scan, axis: str) -> int:
    """How many rows at the start describe the run: they have no step, and no name in common with any later row."""
    count = seen.steps[axis].first
    if count == 0 or count > len(seen.head):
        return 0
    later = {name for name, last in seen.names.items() if last >= count} - CLOCKS
    return count if all(later.isdisjoint(names) for names in seen.head[:count]) else 0


# ---------------------------------------------------------------------- merging


def assemble(rows: Again[Row], family: Family, seen: Scan) -> Assembled:
    """Merge rows into observations.

    Rows of one step become one observation (an evaluation joins the training row of its step). A step that goes back,
    or comes again with other training values, is a restart and opens a segment. Identical rows count once.
    """
    notes: list[str] = []
    axis = _step_axis(seen, family)
    if axis is None:
        notes.append(
            "No column counts steps, so rows were numbered: a step is a row here, and an evaluation belongs to the row before."
        )
        made = _Merger(rows, family, seen, None).assembled()
    else:
        steps = seen.steps[axis]
        if steps.present >= 3 and steps.falls > 0.9 * (steps.present - 1):
            kept = rows.kept
            if kept is None:
                notes.append("The newest row stands first, in a log too large to be turned round here.")
            else:
                notes.append("The newest row stood first; the rows were turned round.")
                rows = Again.of(kept[::-1])
                seen = scan(rows, [family])
        merger = _Merger(rows, family, seen, axis)
        merger.rank = next(
            (name for name, ranks in seen.ranks.items() if _tells_processes(rows, name, ranks, axis)), None
        )
        made = merger.assembled()
        if len(made.segments) - 1 > max(3, MAX_RESTARTS * len(made.observations)):
            if merger.rank is None and _written_by_processes(rows, axis):
                merger = _Merger(rows, family, seen, axis)
                merger.first_only = True
            else:
                notes.append(f"{axis!r} goes back or repeats in many rows, so rows were numbered instead.")
                merger = _Merger(rows, family, seen, None)
            made = merger.assembled()
    made.notes[:0] = notes
    return made


def _tells_processes(rows: Iterable[Row], name: str, ranks: set[int], axis: str) -> bool:
    """Whether a column that is called a rank tells processes apart: they log the same steps. Other ranks change."""
    if not 1 < len(ranks) <= MAX_PROCESSES:
        return False
    lowest: set[int] = set()
    others: set[int] = set()
    for row in rows:
        rank, step = _step_of(row.get(name)), _step_of(row.get(axis))
        if rank is None or step is None:
            continue
        if rank != as_number(row[name]):
            return False
        steps = lowest if rank == min(ranks) else others
        if len(steps) < MAX_STEPS_COMPARED:
            steps.add(step)
    return 2 * len(lowest & others) > len(others)


def _written_by_processes(rows: Iterable[Row], axis: str) -> bool:
    """Whether rows that repeat a step come from several processes.

    They do where nearly all of them agree with the first row of their step in a measurement that changes from step to
    step, as a gradient norm over all processes does; the learning rate and the like do not count.
    """
    before: Row = {}
    repeats, agree, changes = 0, dict[str, int](), dict[str, int]()
    for row in rows:
        again = row.get(axis) is not None and row.get(axis) == before.get(axis) and row.keys() == before.keys()
        repeats += again
        for name, value in row.items():
            number = as_number(value)
            if name == axis or number is None or number == 0 or "learning_rate" in name or name.endswith("lr"):
                continue
            if name in before and tidy(name).lower() not in CLOCKS and not name.endswith("epoch"):
                count = agree if again else changes
                same = _same(before[name], value)
                count[name] = count.get(name, 0) + (same if again else not same)
        before = row
    return repeats >= 5 and any(
        n >= SAME_SHARE * repeats and changes.get(name, 0) >= 0.5 * n for name, n in agree.items()
    )


@dataclass
class _Point:
    """One step being put together. opens: why a segment begins with it. writers: which process wrote a cell, if told."""

    step: int
    opens: str = ""
    cells: dict[str, Any] = field(default_factory=dict)  # raw name -> raw value
    writers: dict[str, str] = field(default_factory=dict)
    time: float | None = None
    epoch: float | None = None


@dataclass
class _Seen:
    """A point as an observation. cells: of the file, behind it. opens: why a segment begins with it."""

    observation: Observation
    cells: int
    opens: str


@dataclass
class _Tally:
    """What a pass over the rows counts."""

    account: Account
    summary: dict[str, Any] = field(default_factory=dict)
    dropped_rows: int = 0
    process_rows: int = 0


class _Merger:
    """Puts the rows of a log together, step by step.

    Attributes:
        rank: a column that names the process; only the rows of the lowest count.
        first_only: of the rows of one step, only the first counts.
    """

    def __init__(self, rows: Again[Row], family: Family, seen: Scan, axis: str | None):
        self.rows, self.family, self.seen, self.axis = rows, family, seen, axis
        self.rank: str | None = None
        self.first_only = False
        self.columns = plan(seen.names, family, axis)
        known = {c.raw for c in self.columns.values() if c.kind == "signal" and is_known(c, family)}
        signals = {c.raw for c in self.columns.values() if c.kind == "signal"}
        self.texts = (signals - known - seen.numeric) & seen.filled
        self.off = {raw for raw in signals if tidy(raw) in family.zero_if_off and raw not in seen.nonzero}
        # The Trainer's closing row, also as it stands in event files and W&B.
        bare = {raw: tidy(raw).removeprefix("train/") for raw in self.columns}
        self.sums = {raw: name for raw, name in bare.items() if name in SUMMARY}
        self.closers = [raw for raw, name in self.sums.items() if name == "train_runtime"]
        self.headers = _headers(seen, axis) if axis is not None else 0
        self.sentinels = {raw: family.not_measured[tidy(raw)] for raw in signals if tidy(raw) in family.not_measured}

    def assembled(self) -> Assembled:
        """Count everything in one pass, and decide what the later passes leave out."""
        tally = _Tally(Account())
        passes = 0

        def begin() -> Iterator[_Seen]:
            nonlocal passes
            passes += 1
            return self._observations(tally if passes == 1 else _Tally(Account()))

        made = Again(begin, lambda item: weight_of(item.observation), KEPT_CELLS)
        account = tally.account
        starts: list[tuple[int, int, int, str]] = []  # index, repeats before, step, reason
        names: dict[str, None] = {}
        repeats = Account()
        count = repeated = 0
        top_rate: float | None = None
        before: Observation | None = None
        for item in made:
            observation = item.observation
            for state in (observation.signals, observation.nonfinite, observation.unreadable):
                names.update(dict.fromkeys(state))
            rate = observation.signals.get("learning_rate")
            if rate is not None and (top_rate is None or rate > top_rate):
                top_rate = rate
            if item.opens:
                starts.append((count, repeated, observation.step, item.opens))
            elif before is not None and _repeats(before, observation):
                repeated += 1
                repeats.unreadable += len(observation.unreadable)
                repeats.cells += item.cells
            before = observation
            count += 1
        filled = repeated >= max(5, REPEAT_SHARE * count)
        if filled:
            account.unreadable -= repeats.unreadable
            account.value -= repeats.cells - repeats.unreadable
            account.duplicate += repeats.cells
        segments = [Segment(i - (r if filled else 0), step, reason) for i, r, step, reason in starts]
        columns = self.columns
        if self.headers:
            later = {name for name, last in self.seen.names.items() if last >= self.headers}
            columns = {raw: column for raw, column in columns.items() if raw in later}
        notes = self._notes(tally, segments)
        if filled:
            notes.append(
                f"{count_of(repeated, 'row')} only repeat the row before (the logger wrote its last values at every "
                f"step); each measurement was counted once, which leaves {count - repeated}."
            )

        def observations() -> Iterator[Observation]:
            last: Observation | None = None
            for item in made:
                if not filled or item.opens or last is None or not _repeats(last, item.observation):
                    yield item.observation
                last = item.observation

        return Assembled(
            observations=Again(observations, weight_of, KEPT_CELLS, count - (repeated if filled else 0)),
            segments=segments,
            account=account,
            columns=columns,
            step_axis=self.axis or "row number",
            summary=tally.summary,
            notes=notes,
            on_names=self._notes_on_names(columns, tally),
            headers=self.headers,
            signals=[name for name in names if not name.endswith("#n")],
            top_rate=top_rate,
        )

    # ------------------------------------------------------------------ one pass

    def _points(self, tally: _Tally) -> Iterator[_Point]:
        """The steps in order; within a segment a late evaluation finds its step if it comes within WINDOW steps."""
        axis, columns, account = self.axis, self.columns, tally.account
        lowest_rank = min(self.seen.ranks[self.rank]) if self.rank is not None else None
        pending: list[_Point] = []  # by step
        at: dict[int, _Point] = {}  # the same
        remembered: set[int] = set()  # hashes of rows
        older: set[int] = set()  # and of those before them
        newest_epoch = -math.inf
        opens = "start"  # why the next point that is released begins a segment
        newest: dict[str, int] = {}  # writer -> step of its newest training row in this segment

        def released(points: list[_Point]) -> Iterator[_Point]:
            nonlocal opens
            for point in points:
                point.opens, opens = opens, ""
                yield point

        # where a row without a step belongs: to the row before
        last = self.seen.steps[axis].opening if axis is not None else 0
        for number, row in enumerate(self.rows, start=1):
            account.cells += len(row)
            if number <= self.headers:
                account.text += len(row)
                continue
            step = None
            if axis is not None:
                step = _step_of(row.get(axis))
                key = hash(repr(row))
                if (key in remembered or key in older) and row.get(axis) is not None:
                    account.duplicate += len(row)
                    tally.dropped_rows += 1
                    continue
                remembered.add(key)
                if len(remembered) > ROWS_REMEMBERED:
                    remembered, older = set(), remembered
                of_other = self.rank is not None and _step_of(row.get(self.rank)) not in (lowest_rank, None)
                if self.first_only and step is not None and step == last and step in at:
                    of_other = of_other or self._contradicts(at[step], row)
                if of_other:
                    account.other_process += len(row)
                    tally.process_rows += 1
                    continue
            cells, clock, epoch, closing = self._sorted(row, tally)
            if not cells:
                continue
            training = not closing and any(not columns[raw].evaluation for raw in cells)
            own_step = step is not None
            if axis is None:
                joins = not training and last in at and not any(raw in at[last].cells for raw in cells)
                step = last if joins else last + 1
            elif step is None:
                step = last
            assert step is not None
            last = step
            went_back = epoch is not None and training and epoch < newest_epoch
            if epoch is not None and training:
                newest_epoch = epoch
            writer = self.family.writer(row) if self.family.writer is not None else ""
            point = at.get(step)
            reason = ""
            if axis is None and went_back:
                reason = "the epoch went back, so the run was resumed or begun anew"
            elif axis is not None and own_step and training:
                if step < newest.get(writer, step):
                    reason = f"the step went back from {newest[writer]} to {step}"
                elif point is not None and self._contradicts(point, cells, writer):
                    reason = f"step {step} was logged again with other values"
            if reason:
                yield from released(pending)
                pending, at, newest, point, opens = [], {}, {}, None, reason
            if point is None:
                point = at[step] = _Point(step)
                insort(pending, point, key=lambda p: p.step)
            for raw, value in cells.items():
                if raw in point.cells:
                    same = _same(point.cells[raw], value)
                    account.duplicate += same
                    account.superseded += not same
                point.cells[raw] = value
                if writer:
                    point.writers[raw] = writer
            point.time = clock if clock is not None else point.time
            point.epoch = epoch if epoch is not None and math.isfinite(epoch) else point.epoch
            if training or not newest:
                newest[writer] = max(step, newest.get(writer, step))
            if len(pending) > WINDOW:
                done = pending.pop(0)
                del at[done.step]
                yield from released([done])
        yield from released(pending)

    def _sorted(self, row: Row, tally: _Tally) -> tuple[dict[str, Any], float | None, float | None, bool]:
        """A row's cells that are signals, its time and its epoch, and whether it is the Trainer's closing row."""
        account, columns, texts = tally.account, self.columns, self.texts
        closing = any(raw in row for raw in self.closers)
        cells: dict[str, Any] = {}
        clock = epoch = None
        for raw, value in row.items():
            column = columns.get(raw)
            kind = column.kind if column is not None else "clock"  # of a name that came after the file was scanned
            if kind == "signal":
                if closing and raw in self.sums:
                    account.summary += 1
                    tally.summary[self.sums[raw]] = value
                elif raw in texts:
                    account.text += 1
                elif value is None:
                    if self.family.null_is_nan:
                        cells[raw] = math.nan
                    else:
                        account.empty += 1
                elif raw in self.off or (raw in self.sentinels and as_number(value) == self.sentinels[raw]):
                    account.empty += 1
                else:
                    cells[raw] = value
                continue
            account.clock += 1
            if kind == "epoch":
                epoch = as_number(value)
            elif kind == "time":
                clock = _time_of(value)
        return cells, clock, epoch, closing

    def _contradicts(self, point: _Point, cells: Mapping[str, Any], writer: str = "") -> bool:
        """Whether a row gives other training values for a step that was already read, of the same writer."""
        return any(
            raw in point.cells
            and not self.columns[raw].evaluation
            and point.writers.get(raw, "") == writer
            and not _same(point.cells[raw], value)
            for raw, value in cells.items()
        )

    def _observations(self, tally: _Tally) -> Iterator[_Seen]:
        family, columns, account = self.family, self.columns, tally.account
        follow = family.follow() if family.follow is not None else None
        for point in self._points(tally):
            seen = as_observation(point.cells, columns, family, point.step, point.time, point.epoch)
            account.value += len(point.cells) - len(seen.nonfinite) - len(seen.unreadable)
            account.nonfinite += len(seen.nonfinite)
            account.unreadable += len(seen.unreadable)
            if follow is not None:
                follow(seen)
            yield _Seen(seen, len(point.cells), point.opens)

    # ------------------------------------------------------------------ notes

    def _notes_on_names(self, columns: Mapping[str, Column], tally: _Tally) -> list[str]:
        family = self.family
        seen = [c for c in columns.values() if c.kind == "signal" and c.raw not in self.texts]
        texts = sorted(self.texts & columns.keys())
        notes = []
        renamed = [f"{c.raw} as {c.name}" for c in seen if is_renamed(c)]
        if renamed:
            notes.append(f"Read under our names: {listed(renamed)}.")
        unknown = [c.name for c in seen if not is_known(c, family) and self.sums.get(c.raw) not in tally.summary]
        if unknown:
            notes.append(f"Kept under their own names, no rule reads them: {listed(unknown)}.")
        if texts:
            notes.append(f"Text, not metrics: {listed(texts)}.")
        judged_first = sorted(seen, key=lambda c: not is_renamed(c))
        return notes + list(dict.fromkeys(m for c in judged_first if (m := meaning(c.raw, family)) is not None))

    def _notes(self, tally: _Tally, segments: Sequence[Segment]) -> list[str]:
        family, account = self.family, tally.account
        notes = []
        for segment in segments[1:6]:
            notes.append(f"A new segment begins at step {segment.step}: {segment.reason}.")
        if len(segments) > 6:
            notes.append(f"{len(segments) - 6} more segments begin later, the same way.")
        if tally.dropped_rows:
            notes.append(f"Rows that came again just the same were dropped: {tally.dropped_rows}.")
        if tally.process_rows:
            how = f"by {self.rank!r}" if self.rank is not None else "they agree in what all processes share"
            notes.append(
                f"Rows of other processes ({how}) were left out, one row a step counts: {tally.process_rows}."
            )
        if account.superseded:
            notes.append(
                f"Values that were logged again at the same step, of which the last one counts: {account.superseded}."
            )
        if account.unreadable:
            notes.append(f"Values that are no numbers: {account.unreadable}.")
        if self.off:
            notes.append(
                f"Always 0, which {family.title or family.name} writes for what is off: {listed(sorted(self.off))}."
            )
        if family.null_is_nan:
            notes.append("This format writes NaN as null, so null was read as NaN.")
        if family.drops_nan:
            notes.append(
                f"{family.title or family.name} leaves out what is not finite: a NaN cannot be told from a gap."
            )
        return notes


def _same(a: Any, b: Any) -> bool:
    return bool(a == b) or (isinstance(a, float) and isinstance(b, float) and a != a and b != b)


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


def _repeats(a: Observation, b: Observation) -> bool:
    """Whether a row only repeats the one before, because its logger wrote its last values at every step.

    Counted as such only where many rows do so and each has a loss or gradient norm that is not zero: a training step
    does not reproduce those to the last digit, so they were not measured again.
    """
    if a.nonfinite or b.nonfinite or a.signals != b.signals or a.unreadable != b.unreadable:
        return False
    return any(b.signals.get(name) for name in ("loss", "grad_norm")) and len(b.signals) >= 3
