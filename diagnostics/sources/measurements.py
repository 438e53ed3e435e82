"""From single measurements (a time, a step, a name, a number), as TensorBoard and MLflow keep them, to rows.

Each name of such a log may count its own steps: a library samples the hardware every ten seconds, an evaluation counts
epochs, Megatron writes each curve a second time over samples. Mixed into rows as they stand, these would look like a
run that restarts at every step.
"""

import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

from outspoken.diagnostics.sources.files import Row, UnreadableLog
from outspoken.diagnostics.sources.names import is_evaluation

# seconds since the epoch, step, name, value
Measurement = tuple[float, int, str, float]

MAX_NAMES = 100_000  # more are no log of metrics
MAX_WAITING = 10_000
MAX_RECORDED = 2_000_000  # measurements that are kept between two passes
NAMES_SHOWN = 5

# What a training loop measures at each of its own steps.
_TRAINING = re.compile(r"loss|reward", re.IGNORECASE)


@dataclass(frozen=True)
class Axes:
    """What the steps of a log count.

    Attributes:
        stepless: every step is 0: none was given.
        apart: names that count something other than the training steps.
        clocks: names that would be taken for a row's own step or time -> what they are called instead.
    """

    stepless: bool
    apart: frozenset[str]
    clocks: Mapping[str, str]


class Recorded:
    """Measurements of one pass, kept for the next in some 30 bytes each, where they are at most MAX_RECORDED."""

    def __init__(self) -> None:
        self.whole = False  # whether a pass was recorded to its end
        self._times, self._steps, self._values = array("d"), array("q"), array("d")
        self._names: list[str] = []  # the same few texts again and again

    def of(self, measurements: Iterable[Measurement]) -> Iterator[Measurement]:
        """The measurements, recorded as they pass."""
        times, steps, names, values = self._times.append, self._steps.append, self._names.append, self._values.append
        measured = iter(measurements)
        for each in islice(measured, MAX_RECORDED):
            times(each[0])
            steps(each[1])
            names(each[2])
            values(each[3])
            yield each
        more = next(measured, None)
        if more is None:
            self.whole = True
            return
        self.__init__()  # type: ignore[misc]
        yield more
        yield from measured

    def __iter__(self) -> Iterator[Measurement]:
        return zip(self._times, self._steps, self._names, self._values)


def survey(measurements: Callable[[], Iterable[Measurement]], source: str) -> Axes:
    """What the steps count, from one pass over the measurements, or two where several axes are mixed.

    Args:
        measurements: makes a fresh iterator, in order of time.
        source: how messages call the log.

    Raises:
        UnreadableLog: no measurement, or more than MAX_NAMES names.
    """
    counts, highest, mixed = _count(measurements(), source)
    stepless = highest == 0 and max(count for count, _ in counts.values()) > 1
    apart = _other_axes(measurements(), _leader(counts)) if mixed else set()
    return Axes(stepless, frozenset(apart), {name: f"{name} (logged)" for name in ("step", "time") if name in counts})


def to_rows(measurements: Iterable[Measurement], axes: Axes, source: str, notes: list[str]) -> Iterator[Row]:
    """Rows `{"step": …, "time": …, name: value, …}`, one for consecutive measurements of one step.

    A name that comes again at the same step opens another row of that step, and a step that goes back stays so: a
    restart is visible. Names on another axis are placed at the training step reached by then, the last value if there
    are several. Rows of a log without steps have no "step".
    """
    apart, clocks = axes.apart, axes.clocks
    row: Row = {}
    held: Row = {}  # measured before the first step
    current: int | None = None
    replaced = 0
    for time, step, name, value in measurements:
        aside = bool(apart) and name in apart
        if clocks:
            name = clocks.get(name, name)
        if aside:
            place = row or held
            replaced += name in place
            place[name] = value
            continue
        if step != current or name in row:
            if row:
                yield row
            row = {"time": time} if axes.stepless else {"step": step, "time": time}
            current = step
            if held:
                row.update(held)
                held = {}
        row[name] = value
    if row:
        yield row
    if axes.stepless:
        notes.append(f"{source}: every step is 0, so none was given when it was logged; rows have no step.")
    if apart:
        shown = ", ".join(sorted(apart)[:NAMES_SHOWN]) + (" …" if len(apart) > NAMES_SHOWN else "")
        lost = f"; of several within a step the last was kept (replaced: {replaced})" if replaced else ""
        notes.append(
            f"{source}: {shown} {'counts' if len(apart) == 1 else 'count'} something other than the training steps "
            f"and {'was' if len(apart) == 1 else 'were'} placed at the step reached by then{lost}."
        )


def _count(measurements: Iterable[Measurement], source: str) -> tuple[dict[str, list[int]], int, bool]:
    """How often each name occurs and its last step; the highest |step|; whether several axes may be mixed."""
    seen: dict[str, list[int]] = {}
    highest = current = 0
    mixed = False
    for _, step, name, _ in measurements:
        tally = seen.get(name)
        if tally is None:
            if len(seen) >= MAX_NAMES:
                raise UnreadableLog(f"{source}: holds more than {MAX_NAMES} names, which no log of metrics does.")
            seen[name] = [1, step]
            mixed = mixed or step < current
        else:
            # The step went back, but this name's own did not: no restart, but another way to count.
            mixed = mixed or tally[1] < step < current
            tally[0] += 1
            tally[1] = step
        if step != current:
            current = step
            highest = max(highest, step, -step)
    if not seen:
        raise UnreadableLog(f"{source}: holds no number that was logged at a step.")
    return seen, highest, mixed


def _leader(counts: dict[str, list[int]]) -> str:
    """The name whose steps are the training steps: a loss or reward of training, the most frequent, the least count."""
    return max(
        counts,
        key=lambda name: (
            _TRAINING.search(name) is not None and not is_evaluation(name),
            not name.startswith("system/"),
            counts[name][0],
            -counts[name][1],
        ),
    )


def _other_axes(measurements: Iterable[Measurement], leader: str) -> set[str]:
    """Names most of whose steps do not lie between the leader's steps before and after."""
    counts: dict[str, list[int]] = {}  # name -> [measurements, of them in place]
    waiting: list[tuple[str, int]] = []
    current: int | None = None
    for _, step, name, _ in measurements:
        if name == leader:
            low, high = (step, step) if current is None else sorted((current, step))
            for other, at in waiting:
                counts[other][1] += low <= at <= high
            waiting.clear()
            current = step
            continue
        tally = counts.setdefault(name, [0, 0])
        tally[0] += 1
        if step == current:
            tally[1] += 1
        elif len(waiting) < MAX_WAITING:
            waiting.append((name, step))
    for other, at in waiting:
        counts[other][1] += current is None or at >= current
    return {name for name, (total, fitting) in counts.items() if 2 * fitting < total}
