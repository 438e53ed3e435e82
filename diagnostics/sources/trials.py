"""How many trials stand behind a logged share, where the log does not say.

A share of n completions is a multiple of 1/n. So a share that is logged to its last digit tells a lower bound: 0.8125
needs 16 completions at least. Values that were rounded when they were printed match no fraction and tell nothing.
"""

from collections import Counter
from collections.abc import Sequence

from outspoken.diagnostics import signals
from outspoken.diagnostics.records import Observation

LARGEST = 512  # denominators tried; a random number matches one of them with a chance of 1.6 %
PRECISION = 6e-8  # of a float32 below 1
SUPPORT = 3  # points that must need the same denominator
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


def add_least_trials(observations: Sequence[Observation], config: dict[str, object], floor: int) -> dict[str, int]:
    """Write `<share>#n` beside each share whose trials neither the log nor the config counts.

    `floor` is what a point stands for at least, whatever its fractions say (the completions of a group).

    Returns:
        share -> the bound that was written.
    """
    names = {name for o in observations for name in o.signals}
    written: dict[str, int] = {}
    for name in sorted(names):
        weight = None if name.startswith("eval_") else signals.weight_of(name)
        if weight is None or weight in names or signals.implied_trials(name, config) is not None:
            continue
        bound = least_trials([o.signals[name] for o in observations if name in o.signals])
        bound = max(bound, floor if weight == "num_completions" else 1)
        if bound > 1:
            written[name] = bound
    for observation in observations:
        for name, bound in written.items():
            if name in observation.signals:
                observation.signals[f"{name}#n"] = float(bound)  # type: ignore[index]
    return written
