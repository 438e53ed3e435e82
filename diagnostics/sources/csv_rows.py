"""Rows of comma-, tab-, semicolon- or bar-separated text with a header."""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

from outspoken.diagnostics.records import as_number
from outspoken.diagnostics.sources.bounded import MAX_NAMES
from outspoken.diagnostics.sources.files import FORMS, Row, UnreadableLog, count_of, lines_of

LOOKED_AT = 50  # rows in which some number has to stand
LINES_SHOWN = 10


def delimiter_of(header: str) -> str | None:
    """The delimiter of a header, None if the line is no header."""
    if header.startswith(("{", "[")) or "\r" in header:
        return None
    counts = {d: header.count(d) for d in (",", "\t", ";", "|")}
    best = max(counts, key=lambda d: counts[d])
    if counts[best] == 0:
        # a single column: one bare word
        return "," if header and " " not in header and not is_number(header) and len(header) < 100 else None
    try:
        names = next(csv.reader([header], delimiter=best))
    except (csv.Error, StopIteration):
        return None
    if any(is_number(name) for name in names) or any(len(name) > 200 for name in names):
        return None
    return best


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return text.strip().lower() not in ("nan", "inf", "infinity")


@dataclass
class _Met:
    """What was met under the header: numbers of lines, of the first few, and counts.

    Attributes:
        wide: rows with more cells than names. over: rows that go over several lines.
        headers, words: lines that hold names again, and that hold words only.
    """

    wide: int = 0
    over: int = 0
    headers: list[int] = field(default_factory=list)
    words: list[int] = field(default_factory=list)
    extra: str = ""  # the first name that was made up for a cell without one

    def notes(self) -> Iterator[str]:
        if self.headers:
            times = count_of(len(self.headers), "time")
            yield f"The header stands again, {times} (at line {_listed(self.headers)}); each holds for the rows under it."
        if self.words:
            yield f"{count_of(len(self.words), 'line')} without a number were skipped: {_listed(self.words)}."
        if self.over:
            yield f"{count_of(self.over, 'row')} went over several lines, within quotes."
        if self.extra:
            yield f"Some rows have more cells than the header; the extra ones are named {self.extra} and on."


def csv_rows(path: Path, notes: list[str]) -> Iterator[Row]:
    """The rows under the header; an empty cell is None.

    A header that stands in the middle holds for the rows under it: a run went on writing into the file of another.

    Raises:
        UnreadableLog: there is no header of names, no column of numbers, or most rows have more cells than names.
    """
    met = _Met()
    rows = _rows(path, notes, met)
    first = list(islice(rows, LOOKED_AT))
    if (first or met.words) and not any(is_number(v) for row in first for v in row.values() if v):
        raise UnreadableLog(f"{path}: no line holds metrics, and as CSV it has no column of numbers; {FORMS}.")
    if met.wide > 0.5 * len(first):
        raise UnreadableLog(
            f"{path}: most rows have more cells than the header has names, as where a comma stands for the decimal "
            "point; which number belongs to which name is not known."
        )
    yield from chain(first, rows)
    notes.extend(met.notes())


def _rows(path: Path, notes: list[str], met: _Met) -> Iterator[Row]:
    number, ended = 0, True

    def texts() -> Iterator[str]:
        nonlocal number, ended
        for number, text, ended in lines_of(path, notes):  # noqa: B007
            if text.strip() and not text.startswith("#"):
                yield text + "\n"

    lines = texts()
    header_line = next(lines, "").strip()
    delimiter = delimiter_of(header_line)
    if delimiter is None:
        raise UnreadableLog(f"{path}: line 1 is no CSV header of column names ({header_line[:60]!r}).")
    names = _names(next(csv.reader([header_line], delimiter=delimiter)), path)
    width, short, lines_read = len(names), 0, 0
    held: Row | None = None  # one row is held back: the last may have been cut off
    reader = csv.reader(lines, delimiter=delimiter, strict=False)
    try:
        for cells in reader:
            met.over += reader.line_num > lines_read + 1
            lines_read = reader.line_num
            if len(cells) > width and not any(cell.strip() for cell in cells[width:]):
                del cells[width:]  # a delimiter at the end of each line
            if any(cells) and all(as_number(cell) is None for cell in cells):
                if not {cell.strip() for cell in cells}.isdisjoint(names) and all(cell.strip() for cell in cells):
                    met.headers.append(number)
                    names = _names(cells, path)
                    width = len(names)
                    continue
                if any(cell.strip() for cell in cells):
                    met.words.append(number)
                    continue
            if held is not None:
                yield held
            if len(cells) > width:
                met.wide += 1
                met.extra = met.extra or f"column_{width + 1}"
                names.extend(f"column_{i + 1}" for i in range(len(names), len(cells)))
                _refuse(len(names), path)
            short = width - len(cells)
            held = {name: (cell.strip() or None) for name, cell in zip(names, cells)}
    except csv.Error as error:
        raise UnreadableLog(f"{path}: line {number} is not CSV ({error}).") from None
    if held is not None and short > 0 and not ended:
        notes.append("The last row was cut off while it was written; it was skipped.")
    elif held is not None:
        if not ended and (cell := held.popitem()[1]) is not None:
            notes.append(f"The last line has no end, so its last cell, {cell[:40]!r}, may be cut and was left out.")
        yield held


def _names(cells: Sequence[str], path: Path) -> list[str]:
    """A name for each cell of a header, none of them twice."""
    _refuse(len(cells), path)
    names: dict[str, int] = {}  # name -> how often it was met
    for i, cell in enumerate(cells):
        name = cell.strip() or ("row_index" if i == 0 else f"column_{i + 1}")
        unique = name
        while unique in names:
            names[name] += 1
            unique = f"{name}_again" + (f"_{names[name]}" if names[name] > 1 else "")
        names[unique] = 0
    return list(names)


def _refuse(count: int, path: Path) -> None:
    if count > MAX_NAMES:
        raise UnreadableLog(f"{path}: holds more than {MAX_NAMES} columns, which no log of metrics does.")


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:LINES_SHOWN])) + (" …" if len(numbers) > LINES_SHOWN else "")
