"""Rows of comma-, tab-, semicolon- or bar-separated text with a header."""

import csv
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

from outspoken.diagnostics.sources.files import Row, UnreadableLog, lines_of

LOOKED_AT = 50  # rows in which some number has to stand


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


def csv_rows(path: Path, notes: list[str]) -> Iterator[Row]:
    """The rows under the header; an empty cell is None.

    Raises:
        UnreadableLog: there is no header of names, or no column of numbers.
    """
    rows = _rows(path, notes)
    first = list(islice(rows, LOOKED_AT))
    if first and not any(is_number(v) for row in first for v in row.values() if v):
        raise UnreadableLog(f"{path}: has no column of numbers; it is no log of metrics that is known here.")
    yield from chain(first, rows)


def _rows(path: Path, notes: list[str]) -> Iterator[Row]:
    ended = True

    def texts() -> Iterator[str]:
        nonlocal ended
        for _, text, whole in lines_of(path, notes):
            ended = whole
            if text.strip() and not text.startswith("#"):
                yield text + "\n"

    lines = texts()
    header_line = next(lines, "").strip()
    delimiter = delimiter_of(header_line)
    if delimiter is None:
        raise UnreadableLog(f"{path}: line 1 is no CSV header of column names ({header_line[:60]!r}).")
    names: list[str] = []
    for i, name in enumerate(next(csv.reader([header_line], delimiter=delimiter))):
        unique = name.strip() or ("row_index" if i == 0 else f"column_{i + 1}")
        while unique in names:
            unique += "_again"
        names.append(unique)
    width, short = len(names), 0
    held: Row | None = None  # one row is held back: the last may have been cut off
    reader = csv.reader(lines, delimiter=delimiter, strict=False)
    try:
        for cells in reader:
            if held is not None:
                yield held
            if len(cells) > len(names):
                names.extend(f"column_{i + 1}" for i in range(len(names), len(cells)))
            short = width - len(cells)
            held = {name: (cell.strip() or None) for name, cell in zip(names, cells)}
    except csv.Error as error:
        raise UnreadableLog(f"{path}: line {reader.line_num} is not CSV ({error}).") from None
    if held is not None and short > 0 and not ended:
        notes.append("The last row was cut off while it was written; it was skipped.")
    elif held is not None:
        yield held
    if len(names) > width:
        notes.append(f"Some rows have more cells than the header; the extra ones are named {names[width]} and on.")
