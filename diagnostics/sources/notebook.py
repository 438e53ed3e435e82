"""Rows out of the outputs of a Jupyter notebook, nbformat 3 and 4: tables that a Trainer showed, and printed metrics.

transformers shows one HTML table a run (`Step`, `Training Loss`, `Validation Loss`, …); other loops print lines, which
are read as `console` reads them. Code of the notebook is never looked at.
"""

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from html import unescape
from pathlib import Path
from typing import Any

from outspoken.diagnostics.sources import console
from outspoken.diagnostics.sources.files import Row, UnreadableLog, count_of, open_bytes
from outspoken.diagnostics.sources.json_rows import loads

MAX_BYTES = 128 * 1024**2  # of a notebook: it is read whole
MAX_HTML = 32 * 1024**2  # characters of one output

_BEGINS = re.compile(r'^\ufeff?\s*\{\s*"(?:cells|worksheets|metadata|nbformat|nbformat_minor)"\s*:')


@dataclass
class _Run:
    """Metrics of one run: the cell they stand under, the names of their columns, the rows, and what to say of them."""

    cell: int
    names: tuple[str, ...]
    rows: list[Row]
    remarks: tuple[str, ...] = ()

    @property
    def last_step(self) -> Any:
        return self.rows[-1].get(self.clock)

    @property
    def clock(self) -> str:
        return next((n for n in self.names if n.lower() in ("step", "epoch")), "")

    @property
    def cells(self) -> int:
        return sum(map(len, self.rows))


def is_notebook(head_text: str) -> bool:
    """Whether the beginning of a text file is that of a notebook."""
    if _BEGINS.match(head_text) is None:
        return False
    return '"cell_type"' in head_text or ('"nbformat"' in head_text and '"cells"' in head_text)


def rows(path: Path, notes: list[str]) -> Iterator[Row]:
    """The rows of the longest run that a notebook shows; `notes` gets a sentence on what else it holds.

    Tables of the same columns whose steps go on are one run.

    Raises:
        UnreadableLog: it is no notebook, or none of its outputs holds metrics.
    """
    found: list[_Run] = []
    for number, outputs in _outputs(path):
        for run in _runs(number, outputs, path):
            before = found[-1] if found else None
            if before is not None and _continues(before, run):
                before.rows.extend(run.rows)
            else:
                found.append(run)
    if not found:
        raise UnreadableLog(
            f"{path}: no output of the notebook holds metrics; run its cells and save it, or give a log file."
        )
    best = max(found, key=lambda run: (len(run.rows), run.cells))
    if len(found) > 1:
        others = ", ".join(str(run.cell) for run in found if run is not best)
        many = count_of(len(found) - 1, "other run was", "other runs were")
        notes.append(
            f"The notebook shows {len(found)} runs; the longest one, at cell {best.cell}, was read, and {many} left out"
            f" (at cells {others})."
            if len(found) > 2
            else f"The notebook shows 2 runs; the longer one, at cell {best.cell}, was read, and the one at cell {others}"
            " was left out."
        )
    notes.extend(best.remarks)
    yield from best.rows


def _continues(before: _Run, run: _Run) -> bool:
    """Whether a table goes on where another one ended."""
    if before.names != run.names or not before.clock:
        return False
    last, first = before.last_step, run.rows[0].get(run.clock)
    return isinstance(last, int | float) and isinstance(first, int | float) and first > last


# ---------------------------------------------------------------------- outputs


def _outputs(path: Path) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """(number of the cell, its outputs); cells count from 1."""
    with open_bytes(path) as handle:
        try:
            data = handle.read(MAX_BYTES + 1)
        except (EOFError, OSError, zlib.error):
            raise UnreadableLog(f"{path}: is a damaged gzip file.") from None
    if len(data) > MAX_BYTES:
        raise UnreadableLog(
            f"{path}: is a notebook of more than {MAX_BYTES // 2**20} MiB; clear outputs that are images."
        )
    try:
        book = loads(data.decode("utf-8-sig", errors="replace"))
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", None)
        where = f" at line {line}" if line else ""
        raise UnreadableLog(f"{path}: is no complete notebook: its JSON breaks off{where}.") from None
    if not isinstance(book, dict):
        raise UnreadableLog(f"{path}: is no notebook.")
    sheets = [book, *_dicts_in(book.get("worksheets"))]
    cells = [cell for sheet in sheets for cell in _dicts_in(sheet.get("cells"))]
    for number, cell in enumerate(cells, 1):
        yield number, _dicts_in(cell.get("outputs"))


def _dicts_in(value: Any) -> list[dict[str, Any]]:
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def _text(value: Any) -> str:
    """A text that nbformat may keep as a list of lines."""
    if isinstance(value, list):
        return "".join(part for part in value if isinstance(part, str))
    return value if isinstance(value, str) else ""


def _runs(number: int, outputs: list[dict[str, Any]], path: Path) -> Iterator[_Run]:
    """The runs that the outputs of one cell show."""
    printed: list[str] = []
    for output in outputs:
        data = output.get("data")
        kinds = data if isinstance(data, dict) else output  # nbformat 3 has no `data`
        page = _text(kinds.get("text/html", kinds.get("html")))
        tables = [run for header, body in _tables(page) if (run := _table(number, header, body))]
        yield from tables
        if not tables:
            printed.append(_text(kinds.get("text/plain", kinds.get("text"))))
    run = _printed(number, printed, path)
    if run is not None:
        yield run


def _printed(number: int, printed: list[str], path: Path) -> _Run | None:
    lines = "".join(text if text.endswith("\n") else text + "\n" for text in printed if text).split("\n")
    style = console.find_style(lines) if len(lines) > 1 else None
    if style is None:
        return None
    told = ((i, line, True) for i, line in enumerate(lines, 1))
    notes: list[str] = []
    found = list(console.rows(told, style, path, notes))
    remarks = tuple(note for note in notes if note == console.FRAME_REMARK or "could not be read" in note)
    names = tuple(dict.fromkeys(name for row in found for name in row))
    return _Run(number, names, found, remarks) if found else None


# ---------------------------------------------------------------------- HTML


# Tags, and what is no text: comments, scripts and styles, to the end of the page where they do not end.
_MARKUP = re.compile(
    r"<!--.*?(?:-->|\Z)|<(script|style)\b[^<>]*>.*?(?:</\1\s*>|\Z)|<(/?)([a-zA-Z][a-zA-Z0-9]*)\b[^<>]*>",
    re.DOTALL | re.IGNORECASE,
)


def _tables(page: str) -> Iterator[tuple[list[str], list[list[str]]]]:
    """(header, lines) of each table of a page."""
    if "<t" not in page or len(page) > MAX_HTML:
        return
    tables: list[list[list[str]]] = []
    cell: list[str] | None = None
    text_from = 0
    for markup in _MARKUP.finditer(page):
        if cell is not None:
            cell.append(page[text_from : markup.start()])
        text_from = markup.end()
        tag = (markup[3] or "").lower()
        if tag not in ("table", "tr", "td", "th"):
            continue
        if cell is not None:
            tables[-1][-1].append(unescape("".join(cell)).strip())
            cell = None
        if markup[2]:
            continue
        if tag == "table":
            tables.append([])
        elif tables and tag == "tr":
            tables[-1].append([])
        elif tables:
            if not tables[-1]:
                tables[-1].append([])
            cell = []
    for table in tables:
        lines = [line for line in table if line]
        if len(lines) > 1:
            yield lines[0], lines[1:]


def _table(number: int, header: list[str], body: list[list[str]]) -> _Run | None:
    """The run that a table shows; None if it shows no metrics."""
    names = header[1:] if header[0] == "" else header  # a data frame's index has no name
    if not console.is_header(names):
        return None
    found = [row for line in body if (row := console.table_row(names, line)) is not None]
    frame = any("NaN" in line and console.is_frame_line(names, line) for line in body)
    return _Run(number, tuple(names), found, (console.FRAME_REMARK,) if frame else ()) if found else None
