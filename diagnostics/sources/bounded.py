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
TEXT_A_CELL = 64  # characters of a text that take the memory of a number

_PLAIN = frozenset((float, int, bool, type(None)))


def bounded(rows: Iterable[Row], path: Path, notes: list[str]) -> Iterator[Row]:
    """The rows, with names and values of at most MAX_TEXT characters. Records of our own pass as they are.

    Raises:
        UnreadableLog: they have more than MAX_NAMES names.
    """
    names: dict[str, str] = {}  # as it stands there -> as it is called here
    taken: set[str] = set()
    for row in rows:
        if is_record(row):
            yield row
            continue
        if not row.keys() <= names.keys():
            _add(row, names, taken, path)
        long = any(type(value) not in _PLAIN and _is_long(value) for value in row.values())
        if long or len(taken) < len(names):
            row = {names[name]: _short(value) for name, value in row.items()}
        yield row
    cut = len(names) - len(taken)
    if cut:
        notes.append(f"{count_of(cut, 'name')} longer than {MAX_TEXT} characters {'was' if cut == 1 else 'were'} cut.")


def _add(row: Row, names: dict[str, str], taken: set[str], path: Path) -> None:
    """Take in the names of a row. `taken` holds those that stay as they are."""
    for name in row:
        if name in names:
            continue
        if len(names) >= MAX_NAMES:
            raise UnreadableLog(f"{path}: holds more than {MAX_NAMES} names, which no log of metrics does.")
        if len(name) <= MAX_TEXT:
            names[name] = name
            taken.add(name)
        else:
            end = f"… ({len(names) + 1})"
            names[name] = name[: MAX_TEXT - len(end)] + end


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
