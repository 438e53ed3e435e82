"""Where a trainer puts what it measures during one optimizer step, until the diagnostics take it.

The trainer measures, the engine judges. A `StepRecorder` is cheap enough to be there always: without diagnostics its
content is dropped at the next step. It imports no torch; the trainer hands over plain numbers and lists.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

# The phases of a step that are timed; their signals are `time/<phase>`, in seconds.
PHASES = ("data", "generate", "score", "forward_backward", "optimizer", "save", "eval")


@dataclass(frozen=True)
class GroupRewards:
    """The raw reward matrix of one generation batch: B groups of G completions, NaN where not scorable.

    Attributes:
        total: weighted sum over the reward functions, (B, G).
        per_function: reward function name -> (B, G).
    """

    total: Sequence[Sequence[float]]
    per_function: Mapping[str, Sequence[Sequence[float]]] = field(default_factory=dict)


@dataclass
class StepMeasurements:
    """What `StepRecorder.take` returns: signals by name, and the reward matrices seen since the last call."""

    signals: dict[str, float] = field(default_factory=dict)
    rewards: list[GroupRewards] = field(default_factory=list)


class StepRecorder:
    """Collects one rank's measurements of one optimizer step.

    >>> recorder = StepRecorder()
    >>> recorder.set("completions/p99_terminated_length", 211)
    >>> recorder.count("samples/no_supervised", k=1, n=8)
    >>> recorder.take().signals
    {'completions/p99_terminated_length': 211.0, 'samples/no_supervised': 0.125, 'samples/no_supervised#n': 8.0}
    """

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {}  # facts of the whole run, e.g. the label lint done before step 1
        self._values: dict[str, float] = {}
        self._counts: dict[str, tuple[float, float]] = {}
        self._rewards: list[GroupRewards] = []
        self._open: list[tuple[str, float]] = []

    def set(self, name: str, value: float) -> None:
        """Record a value; the last one of the step counts."""
        self._values[name] = float(value)

    def count(self, name: str, k: float, n: float) -> None:
        """Record k hits in n trials, summed over the step. The signal is k/n; `<name>#n` carries n."""
        old_k, old_n = self._counts.get(name, (0.0, 0.0))
        self._counts[name] = (old_k + float(k), old_n + float(n))

    def rewards(
        self, total: Sequence[Sequence[float]], per_function: Mapping[str, Sequence[Sequence[float]]] | None = None
    ) -> None:
        """Hand over the raw reward matrix (B groups, G completions) of a generation batch."""
        self._rewards.append(GroupRewards(total, dict(per_function or {})))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase of the step. Nested phases are not counted twice: the inner one's time is the inner one's."""
        start = time.perf_counter()
        self._open.append((name, 0.0))
        try:
            yield
        finally:
            elapsed = time.perf_counter() - start
            _, inner = self._open.pop()
            self._values[f"time/{name}"] = self._values.get(f"time/{name}", 0.0) + elapsed - inner
            if self._open:
                outer, used = self._open[-1]
                self._open[-1] = (outer, used + elapsed)

    def take(self) -> StepMeasurements:
        """Return what was recorded since the last call, and start afresh. Phases still open are not counted yet."""
        signals = dict(self._values)
        for name, (k, n) in self._counts.items():
            if n > 0:
                signals[name] = k / n
                signals[f"{name}#n"] = n
        taken = StepMeasurements(signals, self._rewards)
        self._values, self._counts, self._rewards = {}, {}, []
        return taken
