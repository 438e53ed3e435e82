"""What a rule sees: bounded windows of signals, the config, the facts of the run. Rules read it and change nothing."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from outspoken.diagnostics import signals as signal_table
from outspoken.diagnostics import stats
from outspoken.diagnostics.records import Evidence, as_number

Array = NDArray[np.float64]

CAPACITY = 512  # newest points kept of each signal
BASE_SKIP, BASE_POINTS = 2, 20  # the baseline is points 3..22 of a segment
FIRST_POINTS = 50  # points kept of the run's beginning
MOST_TRIALS = 1e12  # a larger count is garbage
MAX_BLOCKS = 256  # block means kept of the whole run; their length doubles when they are full


@dataclass(frozen=True)
class Base:
    """A signal's reference in this segment: points 3 to 22 after warm-up, frozen."""

    median: float
    mean: float
    sd: float
    n: int
    window: tuple[int, int]


@dataclass(frozen=True)
class Window:
    """Points of one signal: steps and values, oldest first, finite values only."""

    name: str
    steps: Array
    values: Array

    def __len__(self) -> int:
        return len(self.values)

    @property
    def span(self) -> tuple[int, int]:
        return (int(self.steps[0]), int(self.steps[-1]))

    @property
    def median(self) -> float:
        return stats.median(self.values)

    @property
    def mean(self) -> float:
        return float(self.values.mean())

    def evidence(self, statistic: str, value: float | None = None, **more: Any) -> Evidence:
        return Evidence(self.name, statistic, self.median if value is None else value, len(self), self.span, **more)


@dataclass(frozen=True)
class PooledWindow:
    """Counts pooled over the newest steps: `k` hits in `n` trials."""

    name: str
    k: int
    n: int
    span: tuple[int, int]

    @property
    def mean(self) -> float:
        return stats.Pooled(self.k, self.n).mean

    def tail(self, p0: float) -> float:
        """P(at least k hits of n) if each had probability p0: the exact one-sided binomial p-value."""
        return stats.Pooled(self.k, self.n).p_value(p0)

    def exceeds(self, p0: float, alpha: float = 1e-3) -> bool:
        return stats.Pooled(self.k, self.n).exceeds(p0, alpha)

    def evidence(self, threshold: float, **more: Any) -> Evidence:
        p = self.tail(threshold)
        return Evidence(
            self.name, "pooled", self.mean, self.n, self.span, threshold=threshold, direction="above", p=p, **more
        )


def pool_newest(window: Window, shares: Array, trials: Array, take: int) -> PooledWindow | None:
    """Pool the newest `take` shares, each over its own number of trials; None if these are no counts.

    `shares` and `trials` are as long as the window. A share that is none (above 1, or beside a count that is zero,
    negative or absurd) is no evidence.
    """
    hits, counted = float(shares[-take:] @ trials[-take:]), float(trials[-take:].sum())
    if not 0.5 <= counted <= MOST_TRIALS or not 0 <= hits <= counted * (1 + 1e-6):
        return None
    n = round(counted)
    return PooledWindow(window.name, min(round(hits), n), n, (int(window.steps[-take]), int(window.steps[-1])))


class Ring:
    """The newest `CAPACITY` points of one signal, its segment's baseline, and block means of the whole run.

    Memory is bounded; `append` is O(1). Points lie contiguous, so a window is a view.
    """

    __slots__ = (
        "_end",
        "_steps",
        "_values",
        "base",
        "block_length",
        "blocks",
        "first",
        "last_step",
        "pending_block",
        "size",
        "total",
    )

    def __init__(self) -> None:
        self._steps = np.empty(2 * CAPACITY)
        self._values = np.empty(2 * CAPACITY)
        self._end = 0
        self.size = 0  # points of this segment within the ring, at most CAPACITY
        self.total = 0  # points of the whole run
        self.base: Base | None = None
        self.last_step = -1
        self.blocks: list[tuple[float, float, float]] = []  # (last step, mean, n) over the run, all segments
        self.block_length = 10
        self.pending_block = [0.0, 0.0]  # sum, n
        self.first: list[float] = []  # the run's first values, whatever the segment

    def append(self, step: float, value: float) -> None:
        if self._end == len(self._values):
            self._steps[:CAPACITY] = self._steps[CAPACITY:]
            self._values[:CAPACITY] = self._values[CAPACITY:]
            self._end = CAPACITY
        self._steps[self._end] = step
        self._values[self._end] = value
        self._end += 1
        self.total += 1
        self.size = min(self.size + 1, CAPACITY)
        self.last_step = int(step)
        if len(self.first) < FIRST_POINTS:
            self.first.append(value)
        if self.base is None and self.size == BASE_SKIP + BASE_POINTS:
            self._freeze_base()
        block = self.pending_block
        block[0] += value
        block[1] += 1
        if block[1] >= self.block_length:
            self._close_block(step)

    def _freeze_base(self) -> None:
        first = self._end - BASE_POINTS
        values, steps = self._values[first : self._end], self._steps[first : self._end]
        self.base = Base(
            stats.median(values),
            float(values.mean()),
            float(values.std(ddof=1)),
            BASE_POINTS,
            (int(steps[0]), int(steps[-1])),
        )

    def _close_block(self, step: float) -> None:
        total, n = self.pending_block
        self.blocks.append((step, total / n, n))
        self.pending_block = [0.0, 0.0]
        if len(self.blocks) > MAX_BLOCKS:
            pairs = zip(self.blocks[::2], self.blocks[1::2], strict=False)
            merged = [(b[0], (a[1] * a[2] + b[1] * b[2]) / (a[2] + b[2]), a[2] + b[2]) for a, b in pairs]
            self.blocks = merged + (self.blocks[-1:] if len(self.blocks) % 2 else [])
            self.block_length *= 2

    def start_segment(self) -> None:
        self.size = 0
        self.base = None

    def window(self, n: int) -> tuple[Array, Array]:
        first = self._end - min(n, self.size)
        return self._steps[first : self._end], self._values[first : self._end]


class RunView:
    """A run as the rules see it at one step. The engine fills it; rules only read.

    Attributes:
        method: "sft", "grpo", "dpo" …, or "unknown".
        config: the run's settings by field name. A file that was read after the fact may lack any of them: use
            `config.get`.
        facts: what is known of the run beside its config: `world_size`, `trainable_parameters`, `memory/device_total` and so on.
        step: the newest observed step. total_steps: planned steps, if known.
        segment: counts configuration changes and resumes. segment_start: its first step.
        source: "trainer" for a live run, "log" for a file.
    """

    def __init__(self, method: str, config: Mapping[str, Any], facts: Mapping[str, Any], source: str = "trainer"):
        self.method = method
        self.config: dict[str, Any] = dict(config)
        self.facts: dict[str, Any] = dict(facts)
        self.source = source
        self.step = 0
        self.points = 0  # observations so far
        self.segment = 0
        self.segment_start = 0
        self.segment_points = 0
        self.total_steps: int | None = None
        self.rings: dict[str, Ring] = {}
        self.nonfinite: dict[str, list[int]] = {}  # signal -> steps at which it was not finite: first, newest
        self.nonfinite_now: Mapping[str, str] = {}
        self.unreadable: dict[str, str] = {}
        self.is_firing = False  # whether the rule now evaluated fires already: it may use its easier, clearing limit
        self.firing: frozenset[str] = frozenset()  # codes that fire now

    # -- states of a signal

    def state(self, name: str) -> str:
        """'value', 'nonfinite', 'not_emitted' or 'impossible' at the newest observation that could carry it."""
        ring = self.rings.get(name)
        seen = ring.last_step if ring is not None else -1
        bad = self.nonfinite[name][-1] if self.nonfinite.get(name) else -1
        if seen < 0 and bad < 0:
            return "impossible" if signal_table.impossible(name, self.method, self.config) else "not_emitted"
        return "nonfinite" if bad > seen else "value"

    def has(self, name: str) -> bool:
        ring = self.rings.get(name)
        return ring is not None and ring.size > 0

    @property
    def warmed_up(self) -> bool:
        """The gate of all trend rules: 20 steps, the learning-rate warm-up and 10 points have passed."""
        return self.step >= max(20, self.warmup_steps) and self.points >= 10

    @property
    def warmup_steps(self) -> int:
        """Steps of learning-rate warm-up, from `warmup_steps` (a share of the run when below 1) or `warmup_ratio`."""
        steps = self.config.get("warmup_steps") or 0
        ratio = self.config.get("warmup_ratio") or 0
        if not isinstance(steps, int | float) or not isinstance(ratio, int | float):
            return 0
        if 0 < steps < 1:
            ratio, steps = steps, 0
        if not steps and ratio and self.total_steps:
            steps = ratio * self.total_steps
        return int(steps)

    # -- windows: the newest points of this segment

    def window(self, name: str, n: int = CAPACITY, min_n: int = 1) -> Window | None:
        """The newest n points of a signal in this segment; None if there are fewer than `min_n`."""
        ring = self.rings.get(name)
        if ring is None or ring.size < min_n or ring.size == 0:
            return None
        steps, values = ring.window(n)
        return Window(name, steps, values)

    def last(self, name: str) -> float | None:
        ring = self.rings.get(name)
        if ring is None or ring.size == 0:
            return None
        return float(ring.window(1)[1][0])

    def median(self, name: str, n: int = 10) -> float | None:
        """Median of the newest n points (`med10` of the rules); None if there are fewer than n."""
        ring = self.rings.get(name)
        if ring is None or ring.size < n:
            return None
        return stats.median(ring.window(n)[1])

    def base(self, name: str) -> Base | None:
        """The signal's frozen reference in this segment; None until it has 22 points here."""
        ring = self.rings.get(name)
        return ring.base if ring is not None else None

    def pooled(self, name: str, min_n: int) -> PooledWindow | None:
        """Counts behind a share, pooled over the newest steps until `min_n` trials are in.

        The number of trials behind each point is the signal `<name>#n`, else the signal that the table names as its
        weight, else the number that the config implies. None if it cannot be known or there are too few trials.
        """
        window = self.window(name)
        trials = self.trials(name, len(window)) if window is not None else None
        if window is None or trials is None:
            return None
        take = int(np.searchsorted(np.cumsum(trials[::-1]), min_n)) + 1
        return pool_newest(window, window.values, trials, take) if take <= len(window) else None

    def trials(self, name: str, points: int) -> Array | None:
        """How many trials stand behind each of the newest points of a share; None if that cannot be known."""
        for weight in (f"{name}#n", signal_table.weight_of(name)):
            ring = self.rings.get(weight) if weight else None
            if ring is not None and ring.size:
                _, values = ring.window(points)
                if len(values) == points:
                    return values
                return np.full(points, float(np.median(values)))
        implied = signal_table.implied_trials(name, self.config)
        return None if implied is None else np.full(points, float(implied))

    # -- statistics on windows

    def trend(self, name: str, n: int = 50, log: bool = False, min_n: int | None = None) -> stats.Trend | None:
        """Mann-Kendall trend (corrected for autocorrelation) over the newest n points; None if there are too few."""
        window = self.window(name, n, min_n=n if min_n is None else min_n)
        if window is None:
            return None
        values = window.values
        if log:
            values = values[values > 0]
            if len(values) < (min_n or n):
                return None
            values = np.log(values)
        return stats.mann_kendall(values)

    def two(self, name: str, n: int = 25) -> stats.TwoWindow | None:
        """Difference between the newest n points and the n before them, against its standard error."""
        window = self.window(name, 2 * n, min_n=2 * n)
        return None if window is None else stats.two_window(window.values[:n], window.values[n:])

    def blocks(self, name: str) -> list[tuple[float, float, float]]:
        """(last step, mean, points) of consecutive blocks over the whole run, all segments, oldest first."""
        ring = self.rings.get(name)
        return [] if ring is None else ring.blocks

    def first(self, name: str, n: int) -> Array:
        """The run's first points of a signal, at most n, whatever the segment."""
        ring = self.rings.get(name)
        return np.array(ring.first[:n] if ring is not None else [], dtype=np.float64)

    def share_nonfinite(self, name: str, n: int) -> tuple[int, int]:
        """(non-finite, all) among the newest n points at which the signal was emitted."""
        bad = self.nonfinite.get(name, [])
        ring = self.rings.get(name)
        good = list(ring.window(n)[0]) if ring is not None and ring.size else []
        newest = sorted([(s, 1) for s in bad] + [(int(s), 0) for s in good])[-n:]
        return sum(b for _, b in newest), len(newest)

    # -- config

    def number(self, name: str, default: float | None = None) -> float | None:
        """A numeric config field; `default` if it is missing or no finite number."""
        value = self.config.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return default
        number = as_number(value)  # an integer may be larger than any float
        return number if number is not None and math.isfinite(number) else default
