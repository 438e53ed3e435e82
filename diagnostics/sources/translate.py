"""One row at a time under our names, for a run that is written while it trains.

A reader of a log sees all of it before it decides what a column means. Here the names seen so far have to do: a new
name makes the plan anew, and what only a whole column tells ("0 in every row, so it is switched off") is decided
cautiously, so that such zeros count as empty until something else came.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from outspoken.diagnostics.records import Observation, as_number
from outspoken.diagnostics.sources.files import Row, listed
from outspoken.diagnostics.sources.names import STEPS, SUMMARY, Column, Family, is_known, plan, tidy

MAX_NAMES = 5000  # a run that invents names does not grow memory
MAX_DEPTH = 4  # of nested mappings that are joined by "/"


def flat(metrics: Mapping[Any, Any], depth: int = MAX_DEPTH) -> Row:
    """Metrics as one row: nested names joined by "/", whatever holds one number (a tensor, say) as a float.

    A text stays; of anything else only its type is kept, as "<list>".
    """
    row: Row = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping) and depth:
            row.update({f"{name}/{inner}": leaf for inner, leaf in flat(value, depth - 1).items()})
            continue
        number = as_number(value)
        if number is None and value is not None and not isinstance(value, str):
            value = f"<{type(value).__name__}>"
        row[str(name)] = value if number is None else number
    return row


class Translator:
    """Makes observations of a system's rows, as `flat` gives them.

    Args:
        family: whose names they are; `Family("other")` for a loop of somebody's own.

    Attributes:
        columns: raw name -> what becomes of it, of the names learnt so far.
    """

    def __init__(self, family: Family):
        self.family = family
        self.columns: dict[str, Column] = {}
        self._follow = family.follow() if family.follow is not None else None
        self._on: set[str] = set()  # of `zero_if_off`: those that were something else than 0 once

    def learn(self, row: Row) -> str:
        """Take in the names of a row. Returns what a person should know of the new ones; "" if there is nothing."""
        new = [name for name in row if name not in self.columns][: max(0, MAX_NAMES - len(self.columns))]
        if not new:
            return ""
        self.columns = plan([*self.columns, *new], self.family, None)
        columns = [self.columns[raw] for raw in new if self.columns[raw].kind == "signal"]
        texts = [c.raw for c in columns if not self._is_signal(c.raw, row[c.raw])]
        read = [c for c in columns if c.raw not in texts and not ("train_runtime" in row and c.raw in SUMMARY)]
        said = {
            "Read under our names": [f"{c.raw} as {c.name}" for c in read if c.raw != c.name],
            "Kept under their own names, no rule reads them": [c.name for c in read if not is_known(c, self.family)],
            "No numbers, so left out": texts,
        }
        parts = [f"{what}: {listed(names)}." for what, names in said.items() if names]
        return " ".join([*parts, *dict.fromkeys(m for c in read if (m := meaning(c.raw, self.family)) is not None)])

    def step_of(self, row: Row) -> Any:
        """What a row gives as its step, under the best of the names for it; None if it gives none."""
        order = {name: i for i, name in enumerate((*STEPS[::-1], *self.family.steps[::-1]))}
        named = [(order[tidy(raw).lower()], raw) for raw in row if tidy(raw).lower() in order]
        return row[max(named)[1]] if named else None

    def signals(self, row: Row) -> Row:
        """The cells of a row that are signals: no clocks, no texts, nothing that stands for "not measured"."""
        closing = "train_runtime" in row  # transformers sums the run up
        return {
            raw: value
            for raw, value in row.items()
            if self._is_signal(raw, value) and not (closing and raw in SUMMARY) and not self._is_empty(raw, value)
        }

    def is_evaluation(self, names: Iterable[str]) -> bool:
        """Whether all of these signals are of an evaluation."""
        return all(self.columns[raw].evaluation for raw in names)

    def observation(self, row: Row, step: int, time: float | None = None, epoch: float | None = None) -> Observation:
        """The observation that a row makes. Its names must have been learnt."""
        if epoch is None:
            epoch = self._epoch(row)
        seen = as_observation(self.signals(row), self.columns, self.family, step, time, epoch)
        if self._follow is not None:
            self._follow(seen)
        return seen

    def _epoch(self, row: Row) -> float | None:
        found = (as_number(value) for raw, value in row.items() if self._kind(raw) == "epoch")
        return next((number for number in found if number is not None and math.isfinite(number)), None)

    def _kind(self, raw: str) -> str:
        return self.columns[raw].kind if raw in self.columns else ""

    def _is_signal(self, raw: str, value: Any) -> bool:
        """Words count only under a name that a table knows: there a number was meant."""
        if self._kind(raw) != "signal":
            return False
        return value is None or as_number(value) is not None or is_known(self.columns[raw], self.family)

    def _is_empty(self, raw: str, value: Any) -> bool:
        name, number = tidy(raw), as_number(value)
        if value is None or (number is not None and number == self.family.not_measured.get(name)):
            return True
        if name in self.family.zero_if_off and raw not in self._on:
            if number == 0:
                return True
            self._on.add(raw)
        return False


def as_observation(
    cells: Row,
    columns: Mapping[str, Column],
    family: Family,
    step: int,
    time: float | None = None,
    epoch: float | None = None,
) -> Observation:
    """A row's signals as an observation: under our names, in our units, with what follows from them."""
    ours: dict[str, Any] = {}
    for raw, value in cells.items():
        column = columns[raw]
        if column.scale != 1.0:
            number = as_number(value)
            value = value if number is None else number * column.scale
        ours[column.name] = value
    seen = Observation.from_raw(step, ours, time, epoch)
    for name, derived in family.derived.items():
        if name not in ours and all(i in seen.signals for i in derived.inputs):
            value = derived.formula(*(seen.signals[i] for i in derived.inputs))
            if math.isfinite(value):
                seen.signals[name] = value  # type: ignore[index]
    return seen


def meaning(raw: str, family: Family) -> str | None:
    """Which of several meanings a name was taken for, where its family's table says so."""
    name = tidy(raw)
    for prefix in ("", "train/", "training/", "eval/"):
        if name.startswith(prefix) and (found := family.meanings.get(name.removeprefix(prefix))) is not None:
            return found
    return None
