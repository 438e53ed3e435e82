"""Rows of any log within bounds, so that no file takes more memory or time than its size.

What no log of metrics has is refused (too many names) or cut short (texts, lists and names longer than a sentence).
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from outspoken.diagnostics.records import MAX_TEXT, Observation, as_number
from outspoken.diagnostics.sources.files import Row, UnreadableLog, count_of
from outspoken.diagnostics.sources.own import is_record

MAX_NAMES = 20_000
MAX_LONG_NAMES = 10 * 1024 * 1024  # characters of all names that are cut
TEXT_A_CELL = 64  # characters of a text that take the memory of a number

_PLAIN = frozenset((float, int, bool, type(None)))


def bounded(rows: Iterable[Row], path: Path, notes: list[str]) -> Iterator[Row]:
    """The rows, with names and values of at most MAX_TEXT characters. Records of our own pass as they are.

    Raises:
        UnreadableLog: they have more than MAX_NAMES names, or more than MAX_LONG_NAMES characters in long ones.
    """
    names = _Names(path)
    for row in rows:
        if is_record(row):
            yield row
            continue
        if not row.keys() <= names.called.keys():
            names.add(row)
        long = any(type(value) not in _PLAIN and _is_long(value) for value in row.values())
        yield {names.called[name]: _short(value) for name, value in row.items()} if long or names.cut else row
    if names.cut:
        were = "was" if names.cut == 1 else "were"
        notes.append(f"{count_of(names.cut, 'name')} longer than {MAX_TEXT} characters {were} cut.")


class _Names:
    """Names of a log. called: as it stands there -> as it is called here. cut: how many are cut."""

    def __init__(self, path: Path):
        self.path = path
        self.called: dict[str, str] = {}
        self.cut = self._characters = 0

    def add(self, row: Row) -> None:
        for name in row:
            if name in self.called:
                continue
            self.called[name] = name
            if len(name) > MAX_TEXT:
                self.cut += 1
                self._characters += len(name)
                end = f"… ({len(self.called)})"
                self.called[name] = name[: MAX_TEXT - len(end)] + end
            if len(self.called) > MAX_NAMES:
                raise UnreadableLog(f"{self.path}: holds more than {MAX_NAMES} names, which no log of metrics does.")
            if self._characters > MAX_LONG_NAMES:
                raise UnreadableLog(
                    f"{self.path}: holds names of millions of characters, which no log of metrics does."
                )


def _is_long(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) > MAX_TEXT
    return not isinstance(value, int | float) and len(repr(value)) > MAX_TEXT


def _short(value: Any) -> Any:
    """A value of bounded size; what is cut is no number any more."""
    if type(value) in _PLAIN or not _is_long(value):
        return value
    text = value if isinstance(value, str) else repr(value)
    number = as_number(text) if isinstance(value, str) and len(text) < 10_000 else None
    return number if number is not None else text[: MAX_TEXT - 1] + "…"


def weight(row: Row) -> int:
    """How many numbers take the memory of a row."""
    cells = len(row)
    for value in row.values():
        if isinstance(value, str):
            cells += len(value) // TEXT_A_CELL
        elif isinstance(value, dict | list):
            cells += len(value)
    return cells


def weight_of(observation: Observation) -> int:
    """How many numbers take the memory of an observation."""
    texts = MAX_TEXT // TEXT_A_CELL * len(observation.unreadable)
    return len(observation.signals) + len(observation.nonfinite) + texts + 4
