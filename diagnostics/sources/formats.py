"""From a file or directory to raw rows: which container it is, told by content, and the rows in it.

A row is a dict of what stood there, in order. Nothing is judged here.
"""

import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from outspoken.diagnostics.records import as_number
from outspoken.diagnostics.sources import console, mlflow_files, notebook, tensorboard, wandb_files
from outspoken.diagnostics.sources.again import Again
from outspoken.diagnostics.sources.bounded import bounded, weight
from outspoken.diagnostics.sources.config import method_in_text
from outspoken.diagnostics.sources.csv_rows import csv_rows, delimiter_of
from outspoken.diagnostics.sources.files import (
    FORMS,
    Row,
    UnreadableLog,
    count_of,
    head_of,
    is_packed,
    lines_of,
    listed,
    text_of,
)
from outspoken.diagnostics.sources.json_rows import Document, Lines, document_rows, line_rows, loads, scan

CONTAINERS = ("trainer_state", "jsonl", "json", "csv", "console", "notebook", "tensorboard", "wandb", "mlflow")
KEPT_CELLS = 2_000_000  # of a file's rows in memory, some 150 MB; a larger file is read again for each pass


@dataclass
class RawLog:
    """Raw rows, and what was met while they were read.

    Attributes:
        path: what was read: a file, or the directory of a run.
        format: one of CONTAINERS.
        rows: flat rows, nested names joined by "/".
        extra: what stood beside the rows, e.g. the other fields of trainer_state.json.
        style: of a console's lines. named: the method that its text names.
        notes: one sentence each; complete after the first whole pass over the rows.
        met: of JSON lines, the same.
    """

    path: Path
    format: str
    rows: Again[Row]
    extra: dict[str, Any] = field(default_factory=dict)
    style: str | None = None
    named: str | None = None
    notes: list[str] = field(default_factory=list)
    met: Lines = field(default_factory=Lines)


def read_raw(path: Path, container: str | None = None) -> RawLog:
    """A log's rows; `container` (one of CONTAINERS) overrides what its content says.

    Raises:
        UnreadableLog: missing, empty, binary, not UTF-8, too long a line, or no format that is known here. Also while
            the rows are gone through.
    """
    kind, head, style = _kind(path, container)
    if kind in ("json", "trainer_state"):
        return _document(path, kind)
    met = Lines()
    named = None
    make: Callable[[list[str]], Iterator[Row]]
    if kind == "jsonl" and path.is_dir():
        make = partial(_processes_rows, process_files(path), met=met)
    elif kind == "jsonl":
        make = partial(line_rows, path, met=met)
    elif kind == "csv":
        make = partial(csv_rows, path)
    elif kind == "console":
        lines = _lines(head)
        style, named = style or console.find_style(lines), method_in_text("\n".join(lines))
        if style is None:
            raise UnreadableLog(f"{path}: no line of it holds metrics in a form that is known here; {FORMS}.")
        make = partial(_console_rows, path, style)
    elif kind == "notebook":
        make = partial(notebook.rows, path)
    elif kind == "tensorboard":
        make = partial(tensorboard.rows, [path])
    elif kind == "wandb":
        make = partial(wandb_files.rows, path)
    else:
        make = partial(mlflow_files.rows, path)
    notes: list[str] = []
    return RawLog(path, kind, _again(path, make, notes), style=style, named=named, notes=notes, met=met)


def _console_rows(path: Path, style: str, notes: list[str]) -> Iterator[Row]:
    return console.rows(lines_of(path, notes, strict=False), style, path, notes)


def _processes_rows(paths: Sequence[Path], notes: list[str], met: Lines) -> Iterator[Row]:
    """The rows of files that the processes of one run write, in the order of their times."""
    notes.append(
        f"{listed([f'{path.parent.name}/{path.name}' for path in paths])} are of one run and were read together."
    )
    return heapq.merge(*(line_rows(path, notes, met) for path in paths), key=_moment)


def _moment(row: Row) -> float:
    time = as_number(row.get("time"))
    return -math.inf if time is None or time != time else time


def _again(path: Path, make: Callable[[list[str]], Iterator[Row]], notes: list[str]) -> Again[Row]:
    """Rows of a file; the first whole pass over them adds its notes."""
    done = False

    def begin() -> Iterator[Row]:
        nonlocal done
        told: list[str] = []
        yield from bounded(make(told), path, told)
        if not done:
            notes.extend(told)
            done = True

    return Again(begin, weight, KEPT_CELLS)


def _document(path: Path, kind: str) -> RawLog:
    found: Document = scan(path)
    key = found.key
    if kind == "trainer_state" and key != "log_history":
        raise UnreadableLog(f'{path}: has no "log_history", which trainer_state.json has.')
    notes: list[str] = []
    if key is None:
        if found.columns is None:
            raise UnreadableLog(f"{path}: is JSON, but holds no list of logged rows, nor a list of numbers per name.")
        columns = found.columns
        rows = _again(path, lambda told: (dict(zip(columns, cells)) for cells in zip(*columns.values())), notes)
        return RawLog(path, "json", rows, notes=notes)
    if found.others:
        notes.append(f"{count_of(found.others, 'entry', 'entries')} of {key} are no rows and were skipped.")
    if found.times > 1:
        notes.append(f"{key!r} stands {found.times} times in the document; the rows of all of them were read.")
    rows = _again(path, lambda told: document_rows(path, key), notes)
    return RawLog(path, "trainer_state" if key == "log_history" else "json", rows, found.extra, notes=notes)


# ---------------------------------------------------------------------- which container


def process_files(directory: Path) -> list[Path]:
    """The files that PRIME-RL's processes write side by side."""
    places = (directory / name / "metrics.jsonl" for name in ("orchestrator", "trainer"))
    return [path for path in places if path.is_file()]


def _kind(path: Path, container: str | None) -> tuple[str, bytes, str | None]:
    """The container, the head of a text file and, of a console that was told by its lines, their style."""
    if path.is_dir():
        if container in (None, "jsonl") and len(process_files(path)) > 1:
            return "jsonl", b"", None
        if container is not None and container not in ("mlflow", "wandb", "tensorboard"):
            raise UnreadableLog(f"{path}: is a directory, and {container} is a file; give the file itself.")
        for kind, holds in (
            ("mlflow", mlflow_files.is_mlflow),
            ("wandb", wandb_files.is_wandb_directory),
            ("tensorboard", lambda p: bool(tensorboard.event_files(p))),
        ):
            if kind == container or (container is None and holds(path)):
                return kind, b"", None
        raise UnreadableLog(f"{path}: holds no log that is known here; give the file itself.")
    head = head_of(path)
    if head.startswith((b":W&B", b"SQLite format 3")) and is_packed(path):
        raise UnreadableLog(f"{path}: is compressed, and of a kind that is only read as it is; unpack it first.")
    if container in ("tensorboard", "wandb", "mlflow"):
        return container, head, None
    if wandb_files.is_wandb_file(head):
        return "wandb", head, None
    if tensorboard.is_event_file(path, head):
        return "tensorboard", head, None
    if head.startswith(b"SQLite format 3") and mlflow_files.is_mlflow(path):
        return "mlflow", head, None
    text = text_of(path, head)
    if container is not None:
        return container, head, None
    kind, style = _told_by(path, text, head)
    return kind, head, style


def _told_by(path: Path, text: str, head: bytes) -> tuple[str, str | None]:
    """The container that a text file's content speaks for, and a console's style."""
    lines = (line.strip() for line in text.splitlines())
    first = next((line for line in lines if line and not line.startswith("#")), "")
    if notebook.is_notebook(text):
        return "notebook", None
    if first.startswith("{") and not _is_python(first, text) and (kind := _json_kind(first)) is not None:
        return kind, None
    if first.startswith("[") and _begins_a_list_of_rows(text):
        return "json", None
    if (style := console.find_style(_lines(head))) is not None:
        return "console", style
    if first.startswith(("{", "[")):
        return ("jsonl" if first.startswith("{") else "json"), None
    if delimiter_of(first) is not None:
        return "csv", None
    raise UnreadableLog(
        f"{path}: line 1 is neither JSON nor a CSV header ({first[:40]!r}), and no line holds metrics; {FORMS}."
    )


def _is_python(first: str, text: str) -> bool:
    """Whether a text whose first line opens a brace begins with a Python dict, which has single quotes."""
    return text[text.index(first) + 1 :].lstrip()[:1] == "'"


def _json_kind(first: str) -> str | None:
    """Lines or a document, told by the first line; None where it is no JSON."""
    try:
        value = loads(first)
    except (ValueError, RecursionError):
        # `{` alone, or `{"log_history": [`: a document over several lines, or one longer than what was looked at.
        opens = first == "{" or '"log_history"' in first or len(first) > 30_000 or first.endswith(("{", "[", ","))
        return "json" if opens else None
    if not isinstance(value, dict):
        return None
    lists = [v for v in value.values() if isinstance(v, list) and v]
    of_rows = [v for v in lists if all(isinstance(row, dict) for row in v)]
    columns = len(lists) == len(value) and len({len(v) for v in lists}) == 1 and len(lists[0]) >= 2
    return "json" if "log_history" in value or len(of_rows) == 1 or columns else "jsonl"


def _begins_a_list_of_rows(text: str) -> bool:
    return text.lstrip("\ufeff \t\r\n[").startswith("{")


def _lines(head: bytes) -> list[str]:
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return head.decode("utf-16", errors="replace").splitlines()
    return head.decode("utf-8", errors="replace").splitlines()
