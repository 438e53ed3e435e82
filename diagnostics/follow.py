"""Follow a log that grows: read what is new, judge it, and tell what changed.

Each look reads the log again, in the passes of `sources.read`, and feeds the engine what it has not seen. So a growing
log is understood exactly as a finished one. Where new rows change how the log is to be understood (a name that tells
the system, a file begun anew), everything is judged again in silence, and only what was not told before is told.
"""

import re
import time
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from outspoken.diagnostics.diagnose import engine_for
from outspoken.diagnostics.engine import Engine, Transition
from outspoken.diagnostics.records import Observation
from outspoken.diagnostics.sources import LoggedRun, UnreadableLog, read
from outspoken.diagnostics.sources.assemble import WINDOW
from outspoken.diagnostics.sources.files import stamp_of

_NUMBERS = re.compile(r"\d+")

PATIENCE = 10  # a look that took a second is followed by one ten seconds later at the earliest


class Follower:
    """A log that is looked at again and again.

    Args:
        path, format, config, method: as for `sources.read`. params, ignore: as for `Engine`.

    Attributes:
        run: the log as the last look found it; None before there is a row to read.
        engine: judges it. waiting: why there is nothing to judge yet.
        over: whether the log says that training has ended.
        notes: what the last look had to say and none before it.
    """

    def __init__(
        self,
        path: str | Path,
        format: str | None = None,
        config: str | Path | Mapping[str, Any] | None = None,
        method: str | None = None,
        params: Mapping[str, Mapping[str, Any]] | None = None,
        ignore: Iterable[str] = (),
    ):
        self.path = Path(path)
        self._how = {"format": format, "config": config, "method": method}
        self._params, self._ignore = params, tuple(ignore)
        self.run: LoggedRun | None = None
        self.engine: Engine | None = None
        self.waiting = ""
        self.over = False
        self.notes: list[str] = []
        self.seconds = 0.0  # that the last look took
        self._fed = 0  # observations
        self._latest: list[Observation] = []  # the last of them
        self._stamp: object = None
        self._told: set[tuple[object, ...]] = set()
        self._noted: set[str] = set()

    def look(self, last: bool = False) -> list[Transition]:
        """Read what is new, and return what changed.

        The newest observation waits for the look after it was written, in case its step gets further values.

        Args:
            last: nothing will come any more.

        Raises:
            UnreadableLog: the log was readable before and no longer is.
        """
        began = time.monotonic()
        stamp = self._signature()
        still = stamp == self._stamp
        if still and not last and self._fed == self._known():
            return []
        self._stamp = stamp
        try:
            run = read(self.path, **self._how) if not still or self.run is None else self.run  # type: ignore[arg-type]
        except UnreadableLog as error:
            if self.run is None:
                self.waiting = str(error)
                return []
            raise
        self.waiting = ""
        self.notes = [note for note in run.notes if _told_once(note) not in self._noted]
        self._noted.update(map(_told_once, self.notes))
        self.over = self.over or bool(run.summary)
        ready = len(run.observations) - (not (still or last or self.over))
        begins_anew = self._changed(run)
        self.run = run
        transitions: list[Transition] = []
        if begins_anew or self.engine is None:
            if self._fed:
                self.notes.insert(0, "The log reads differently now, so it was judged again from its beginning.")
            self.engine = engine_for(run, params=self._params, ignore=self._ignore)
            self._fed, self._latest = 0, []
        else:
            transitions += self._supplement()
        transitions += self._feed(ready)
        if (last or self.over) and self._fed == len(run.observations):
            transitions += self.engine.finish()
        self.seconds = time.monotonic() - began
        return [t for t in transitions if self._is_news(t)]

    def pause(self, interval: float) -> float:
        """Seconds to wait before the next look: long logs are looked at less often."""
        return max(interval, PATIENCE * self.seconds)

    # ------------------------------------------------------------------ what is new

    def _known(self) -> int:
        return len(self.run.observations) if self.run is not None else -1

    def _signature(self) -> object:
        """What changes when the log does."""
        if self.path.is_file():
            return _stamp(self.path)
        return tuple(sorted((str(p), *_stamp(p)) for p in islice(self.path.rglob("*"), 20_000) if p.is_file()))

    def _changed(self, run: LoggedRun) -> bool:
        """Whether what was fed to the engine would be understood otherwise now."""
        before = self.run
        if before is None or self._understood(before) != self._understood(run):
            return True
        names = before.columns.keys() & run.columns.keys()
        if any(before.columns[name] != run.columns[name] for name in names):
            return True
        now = list(islice(run.observations, self._fed - len(self._latest), self._fed))
        return len(now) < len(self._latest) or any(
            a.step != b.step or not _values(a).items() <= _values(b).items() for a, b in zip(self._latest, now)
        )

    @staticmethod
    def _understood(run: LoggedRun) -> tuple[object, ...]:
        starts = tuple((s.first, s.step) for s in run.segments[:1])
        return run.path, run.format, run.family, run.step_axis, run.method, run.config, run.total_steps, starts

    def _supplement(self) -> list[Transition]:
        """Feed values that came late for a step that was fed before, e.g. those of an evaluation."""
        assert self.run is not None and self.engine is not None
        transitions = []
        first = self._fed - len(self._latest)
        for i, now in enumerate(islice(self.run.observations, first, self._fed)):
            before = self._latest[i]
            signals = {k: v for k, v in now.signals.items() if k not in before.signals and not k.endswith("#n")}
            nonfinite = {k: v for k, v in now.nonfinite.items() if k not in before.nonfinite}
            if (signals or nonfinite) and now.step >= self.engine.view.segment_start:
                step = max(now.step, self.engine.view.step)  # going back would look like a restart
                transitions += self.engine.observe(Observation(step, signals, nonfinite, {}, now.time, now.epoch))
            self._latest[i] = now
        return transitions

    def _feed(self, ready: int) -> list[Transition]:
        assert self.run is not None and self.engine is not None
        starts = {segment.first: segment for segment in self.run.segments[1:]}
        transitions = []
        for i, observation in enumerate(islice(self.run.observations, self._fed, ready), start=self._fed):
            if i in starts:
                self.engine.open_segment(observation.step, starts[i].reason)
            transitions += self.engine.observe(observation)
            self._latest.append(observation)
            del self._latest[:-WINDOW]
            self._fed = i + 1
        return transitions

    def _is_news(self, transition: Transition) -> bool:
        record = transition.record
        key = (record.get("fingerprint"), record.get("state"), record.get("step"), transition.kind)
        new = key not in self._told
        self._told.add(key)
        return new


def _told_once(note: str) -> str:
    """What a note says but for its numbers, which grow with the log; where a segment begins is news each time."""
    return note if note.startswith("A new segment") else _NUMBERS.sub("#", note.partition(";")[0].rstrip("."))


def _stamp(path: Path) -> tuple[int, int]:
    try:
        return stamp_of(path)
    except UnreadableLog:  # it went away meanwhile
        return (-1, 0)


def _values(observation: Observation) -> dict[str, object]:
    values = {k: v for k, v in observation.signals.items() if not k.endswith("#n")}
    return {**values, **observation.nonfinite}
