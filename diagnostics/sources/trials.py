"""How many trials stand behind a logged share, where the log does not say.

A share of n completions is a multiple of 1/n. So a share that is logged to its last digit tells a lower bound: 0.8125
needs 16 completions at least. Values that were rounded when they were printed match no fraction and tell nothing.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice

from outspoken.diagnostics import signals
from outspoken.diagnostics.records import Observation

LARGEST = 512  # denominators tried; a random number matches one of them with a chance of 1.6 %
PRECISION = 6e-8  # of a float32 below 1
SUPPORT = 3  # points that must need the same denominator
LOOKED_AT = 5_000  # points
AGREE = 0.8  # share of points whose denominator must divide it


def denominator(share: float) -> int | None:
    """The smallest n of which `share` is a multiple of 1/n; None if there is none up to LARGEST.

    >>> denominator(0.8125), denominator(0.3333)
    (16, None)
    """
    for n in range(1, LARGEST + 1):
        if abs(share * n - round(share * n)) < n * PRECISION:
            return n
    return None


def least_trials(shares: Sequence[float]) -> int:
    """A lower bound of the trials behind each of these shares of one run; 1 if they do not tell."""
    counts = Counter(shares)
    needed: Counter[int] = Counter()  # denominator -> points that need it
    for share, times in counts.items():
        n = denominator(share)
        if n is not None:
            needed[n] += times
    total = sum(counts.values())
    for n in sorted(needed, reverse=True):
        divides = sum(times for m, times in needed.items() if n % m == 0)
        if needed[n] >= SUPPORT and divides >= AGREE * total:
            return n
    return 1


def bounds_of_trials(
    observations: Iterable[Observation], names: Iterable[str], config: dict[str, object], floor: int
) -> dict[str, int]:
    """Share -> the least number of trials a point of it stands for, where neither the log nor the config counts them.

    Args:
        names: of all signals of the run.
        floor: what a point stands for at least, whatever its fractions say (the completions of a group).
    """
    names = set(names)
    shares: dict[str, list[float]] = {}
    for name in sorted(names):
        weight = None if name.startswith("eval_") else signals.weight_of(name)
        if weight is not None and weight not in names and signals.implied_trials(name, config) is None:
            shares[name] = []
    if not shares:
        return {}
    for observation in islice(observations, LOOKED_AT):
        for name, values in shares.items():
            if name in observation.signals:
                values.append(observation.signals[name])
    bounds = {}
    for name, values in shares.items():
        bound = max(least_trials(values), floor if signals.weight_of(name) == "num_completions" else 1)
        if bound > 1:
            bounds[name] = bound
    return bounds


def with_trials(observations: Iterable[Observation], bounds: Mapping[str, int]) -> Iterator[Observation]:
    """The observations, with `<share>#n` beside each share that has a bound."""
    for o in observations:
        trials = {f"{name}#n": float(bound) for name, bound in bounds.items() if name in o.signals}
        yield Observation(o.step, {**o.signals, **trials}, o.nonfinite, o.unreadable, o.time, o.epoch)
