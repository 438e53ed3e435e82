"""From a file to raw rows: JSON, JSON lines, CSV, plain or gzipped, told apart by content.

A row is a dict of what stood there, in order. Nothing is judged here: numbers stay what the parser made of them, NaN
and Infinity included. Nothing is unpickled or executed.
"""

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

MAX_LINE = 10 * 1024 * 1024  # bytes; a longer line is no row of metrics
MAX_BYTES = 2 * 1024**3  # of one file, after decompression
MAX_BAD_SHARE = 0.5  # of lines that cannot be parsed; beyond it the file is not what it seems
MAX_DEPTH = 4  # of nested objects that are flattened to a/b/c

Row = dict[str, Any]

# How files begin that people hand over by mistake, and what to do instead.
_MAGIC = [
    (
        b"\x80\x02",
        "is a pickle (training_args.bin, a checkpoint); it is never opened. Give its settings with --config",
    ),
    (b"PK\x03\x04", "is a zip archive or a torch checkpoint, not a log of metrics"),
    (b"PAR1", "is a Parquet file; export it as CSV"),
    (b"SQLite format 3", "is a database; export the metrics as CSV"),
    (b"GGUF", "holds model weights, not a log of metrics"),
]


class UnreadableLog(ValueError):
    """A file that cannot be read as a log. The message is one sentence that names the file, and the line if any."""


@dataclass
class RawLog:
    """Raw rows and what was met while they were read.

    Attributes:
        format: "trainer_state", "jsonl", "json" or "csv".
        rows: flat rows, nested names joined by "/".
        extra: what stood beside the rows, e.g. the other fields of trainer_state.json.
        skipped: numbers of lines that could not be parsed.
        wrapped: whether the metrics stood in an inner object, `{"step": 1, "data": {…}}`.
        notes: one sentence each.
    """

    format: str
    rows: list[Row]
    extra: dict[str, Any] = field(default_factory=dict)
    skipped: list[int] = field(default_factory=list)
    wrapped: bool = False
    notes: list[str] = field(default_factory=list)


FORMATS = ("trainer_state", "jsonl", "json", "csv")


def read_raw(path: Path, format: str | None = None) -> RawLog:
    """Read a file's rows; `format` (one of FORMATS) overrides what its content says.

    Raises:
        UnreadableLog: missing, empty, binary, not UTF-8, too long a line, or no format that is known here.
    """
    if format is not None and format not in FORMATS:
        raise UnreadableLog(f"{path}: format {format!r} is not known; choose one of {', '.join(FORMATS)}.")
    notes: list[str] = []
    first = _first_line(path)
    kind = format or _sniff(path, first)
    if kind == "csv":
        raw = _read_csv(path, notes)
    elif kind == "jsonl":
        raw = _read_jsonl(path, notes)
    else:
        raw = _read_document(path, kind, notes)
    raw.notes = [*raw.notes, *notes]
    if not raw.rows:
        raise UnreadableLog(f"{path}: holds no logged row.")
    return raw


# ---------------------------------------------------------------------- bytes and lines


def _open(path: Path) -> IO[bytes]:
    try:
        handle = path.open("rb")
        if handle.read(2) == b"\x1f\x8b":
            handle.close()
            return cast(IO[bytes], gzip.open(path, "rb"))
        handle.seek(0)
        return handle
    except FileNotFoundError:
        raise UnreadableLog(f"{path}: there is no such file.") from None
    except IsADirectoryError:
        raise UnreadableLog(f"{path}: is a directory without a log that is known here.") from None
    except OSError as error:
        raise UnreadableLog(f"{path}: cannot be opened ({error.strerror or error}).") from None


def _lines(path: Path, notes: list[str]) -> Iterator[tuple[int, str, bool]]:
    """(number, text, whether it ends with a newline) of each line; numbers begin at 1."""
    with _open(path) as handle:
        stream: IO[bytes] = handle
        head = handle.read(4)
        handle.seek(0)
        if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # e.g. a PowerShell redirection
            text = handle.read(MAX_BYTES).decode("utf-16", errors="replace")
            stream = io.BytesIO(text.encode())
        total = 0
        number = 0
        while True:
            number += 1
            try:
                line = stream.readline(MAX_LINE + 1)
            except (EOFError, gzip.BadGzipFile, zlib.error):
                notes.append(f"The compressed file ends early, at line {number}; what came before was read.")
                return
            except OSError as error:
                raise UnreadableLog(f"{path}: line {number} cannot be read ({error.strerror or error}).") from None
            if not line:
                return
            total += len(line)
            if len(line) > MAX_LINE:
                raise UnreadableLog(f"{path}: line {number} is longer than {MAX_LINE // 2**20} MiB, which no row is.")
            if total > MAX_BYTES:
                raise UnreadableLog(f"{path}: is larger than {MAX_BYTES // 2**30} GiB.")
            ended = line.endswith(b"\n")
            if number == 1 and line.startswith(codecs.BOM_UTF8):
                line = line[len(codecs.BOM_UTF8) :]
            if b"\0" in line and not line.strip(b"\0\r\n \t"):
                line = b""  # what a crash of the machine leaves of a line that was never written
            try:
                decoded = line.decode("utf-8")
            except UnicodeDecodeError as error:
                if not ended:  # cut within a character
                    decoded = line[: error.start].decode("utf-8")
                else:
                    raise UnreadableLog(
                        f"{path}: line {number} is not UTF-8 text (byte 0x{line[error.start]:02x} at {error.start})."
                    ) from None
            yield number, decoded.rstrip("\r\n"), ended


def _first_line(path: Path) -> str:
    """The first line that is not blank, or the beginning of it."""
    with _open(path) as handle:
        try:
            head = handle.read(65536)
        except (EOFError, gzip.BadGzipFile, zlib.error, OSError):
            raise UnreadableLog(f"{path}: is a damaged gzip file.") from None
    for magic, why in _MAGIC:
        if head.startswith(magic):
            raise UnreadableLog(f"{path}: {why}.")
    if path.name.startswith("events.out.tfevents"):
        raise UnreadableLog(f"{path}: is a TensorBoard event file; export its scalars as CSV.")
    if not head.strip(b"\0 \r\n\t"):
        raise UnreadableLog(f"{path}: is empty.")
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        text = head.decode("utf-16", errors="ignore")
    else:
        if b"\0" in head.split(b"\n")[0]:
            raise UnreadableLog(f"{path}: is a binary file, not a log of metrics.")
        text = head.removeprefix(codecs.BOM_UTF8).decode("utf-8", errors="ignore")
    lines = (line.strip() for line in text.splitlines())
    return next((line for line in lines if line and not line.startswith("#")), "")


def _sniff(path: Path, first: str) -> str:
    """The format that the content speaks for."""
    if first.startswith("{"):
        try:
            value = _loads(first)
        except (ValueError, RecursionError):
            return "json" if _opens_document(first) else "jsonl"
        lists_only = isinstance(value, dict) and all(isinstance(v, list) for v in value.values())
        return "json" if _history(value) is not None or (lists_only and _columns(value)) else "jsonl"
    if first.startswith("["):
        return "json"
    if _delimiter(first) is not None:
        return "csv"
    raise UnreadableLog(f"{path}: line 1 is neither JSON nor a CSV header ({first[:60]!r}).")


def _opens_document(first: str) -> bool:
    # `{` alone, or `{"log_history": [`: a document over several lines, or one longer than what was looked at.
    return first == "{" or '"log_history"' in first or len(first) > 30000 or first.rstrip().endswith(("{", "[", ","))


# ---------------------------------------------------------------------- JSON


class _Pairs(dict[str, Any]):
    """An object in which a name stood twice."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    return made if len(made) == len(pairs) else _Pairs(made)


def _integer(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:  # more digits than Python reads
        return float(text)


def _loads(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_object, parse_int=_integer)


def flatten(row: dict[str, Any], depth: int = MAX_DEPTH) -> Row:
    """A row without nested objects: `{"reward": {"mean": 1}}` becomes `{"reward/mean": 1}`. Our own records stay."""
    if str(row.get("schema", "")).startswith("outspoken."):
        return row
    if not any(isinstance(value, dict) for value in row.values()):
        return row
    flat: Row = {}
    for name, value in row.items():
        if isinstance(value, dict) and value and depth > 0:
            # verl and others wrap the metrics in one object
            prefix = "" if name in ("data", "metrics") else f"{name}/"
            for inner, leaf in flatten(value, depth - 1).items():
                key = f"{prefix}{inner}"
                flat[key if key not in flat else f"{name}/{inner}"] = leaf
        else:
            flat[name] = value
    return flat


def _read_jsonl(path: Path, notes: list[str]) -> RawLog:
    rows: list[Row] = []
    skipped: list[int] = []
    twice = last = wrapped = 0
    last_ended = True
    for number, text, ended in _lines(path, notes):
        if not text.strip():
            continue
        last, last_ended = number, ended
        try:
            value = _loads(text)
        except (ValueError, RecursionError):
            skipped.append(number)
            continue
        if not isinstance(value, dict):
            skipped.append(number)
            continue
        twice += isinstance(value, _Pairs)
        wrapped += isinstance(value.get("data"), dict)
        rows.append(flatten(value))
    if skipped and len(skipped) > max(1, MAX_BAD_SHARE * (len(rows) + len(skipped))):
        raise UnreadableLog(f"{path}: line {skipped[0]} is not a JSON object, nor are {len(skipped) - 1} other lines.")
    if skipped and not rows:
        raise UnreadableLog(f"{path}: line {skipped[0]} is not a complete JSON object.")
    if skipped == [last] and not last_ended:
        notes.append(f"Line {last}, the last, was cut off while it was written; it was skipped.")
    elif skipped:
        shown = ", ".join(map(str, skipped[:10])) + (" …" if len(skipped) > 10 else "")
        were = "was" if len(skipped) == 1 else "were"
        notes.append(f"{_count(len(skipped), 'line')} could not be parsed and {were} skipped: {shown}.")
    if twice:
        notes.append(f"{_count(twice, 'row')} held a name twice; the last value of it was kept.")
    return RawLog("jsonl", rows, skipped=skipped, wrapped=2 * wrapped > len(rows))


def _history(value: Any) -> str | None:
    """The key under which a document keeps its rows, "" if it is the rows itself, None if it has none."""
    if isinstance(value, list):
        return "" if value and all(isinstance(row, dict) for row in value) else None
    if not isinstance(value, dict):
        return None
    if isinstance(value.get("log_history"), list):
        return "log_history"
    lists = [k for k, v in value.items() if isinstance(v, list) and v and all(isinstance(row, dict) for row in v)]
    return lists[0] if len(lists) == 1 else None


def _columns(value: Any) -> list[Row] | None:
    """Rows of a document that holds one list of numbers a name, all of one length."""
    if not isinstance(value, dict):
        return None
    columns = {k: v for k, v in value.items() if isinstance(v, list)}
    if not columns or len({len(v) for v in columns.values()}) != 1 or len(next(iter(columns.values()))) < 2:
        return None
    return [dict(zip(columns, cells)) for cells in zip(*columns.values())]


def _read_document(path: Path, kind: str, notes: list[str]) -> RawLog:
    with _open(path) as handle:
        try:
            data = handle.read(MAX_BYTES + 1)
        except (EOFError, gzip.BadGzipFile, zlib.error, OSError):
            raise UnreadableLog(f"{path}: is a damaged gzip file.") from None
    if len(data) > MAX_BYTES:
        raise UnreadableLog(f"{path}: is larger than {MAX_BYTES // 2**30} GiB.")
    utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UnreadableLog(f"{path}: line {line} is not UTF-8 text (byte 0x{data[error.start]:02x}).") from None
    try:
        value = _loads(text)
    except json.JSONDecodeError as error:
        raise UnreadableLog(f"{path}: line {error.lineno} is not valid JSON ({error.msg}); is it cut off?") from None
    except (ValueError, RecursionError) as error:
        raise UnreadableLog(f"{path}: is not readable JSON ({type(error).__name__}).") from None
    key = _history(value)
    if kind == "trainer_state" and key != "log_history":
        raise UnreadableLog(f'{path}: has no "log_history", which trainer_state.json has.')
    if key is None:
        rows = _columns(value)
        if rows is None:
            raise UnreadableLog(f"{path}: is JSON, but holds no list of logged rows.")
        return RawLog("json", rows)
    listed = value[key] if key else value
    rows = [flatten(row) for row in listed if isinstance(row, dict)]
    if len(rows) < len(listed):
        notes.append(f"{_count(len(listed) - len(rows), 'entry', 'entries')} of {key} are no rows and were skipped.")
    extra = {k: v for k, v in value.items() if k != key} if key else {}
    return RawLog("trainer_state" if key == "log_history" else "json", rows, extra)


# ---------------------------------------------------------------------- CSV


def _delimiter(header: str) -> str | None:
    """The delimiter of a CSV header, None if the line is no header."""
    if header.startswith(("{", "[")) or "\r" in header:
        return None
    counts = {d: header.count(d) for d in (",", "\t", ";", "|")}
    best = max(counts, key=lambda d: counts[d])
    if counts[best] == 0:
        # a single column: one bare word
        return "," if header and " " not in header and not _is_number(header) and len(header) < 100 else None
    try:
        names = next(csv.reader([header], delimiter=best))
    except (csv.Error, StopIteration):
        return None
    if any(_is_number(name) for name in names) or any(len(name) > 200 for name in names):
        return None
    return best


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return text.strip().lower() not in ("nan", "inf", "infinity")


def _read_csv(path: Path, notes: list[str]) -> RawLog:
    ended = True

    def texts() -> Iterator[str]:
        nonlocal ended
        for _, text, whole in _lines(path, notes):
            ended = whole
            if text.strip() and not text.startswith("#"):
                yield text + "\n"

    lines = texts()
    header_line = next(lines, "").strip()
    delimiter = _delimiter(header_line)
    if delimiter is None:
        raise UnreadableLog(f"{path}: line 1 is no CSV header of column names ({header_line[:60]!r}).")
    header = [name.strip() for name in next(csv.reader([header_line], delimiter=delimiter))]
    names: list[str] = []
    for i, name in enumerate(header):
        unique = name or ("row_index" if i == 0 else f"column_{i + 1}")
        while unique in names:
            unique += "_again"
        names.append(unique)
    rows: list[Row] = []
    short = 0
    reader = csv.reader(lines, delimiter=delimiter, strict=False)
    try:
        for cells in reader:
            if len(cells) > len(names):
                names.extend(f"column_{i + 1}" for i in range(len(names), len(cells)))
            short = len(header) - len(cells)
            rows.append({name: (cell.strip() or None) for name, cell in zip(names, cells)})
    except csv.Error as error:
        raise UnreadableLog(f"{path}: line {reader.line_num} is not CSV ({error}).") from None
    if rows and short > 0 and not ended:
        rows.pop()
        notes.append("The last row was cut off while it was written; it was skipped.")
    if len(names) > len(header):
        notes.append(
            f"Some rows have more cells than the header; the extra ones are named {names[len(header)]} and on."
        )
    if rows and not any(_is_number(v) for row in rows[:50] for v in row.values() if v):
        raise UnreadableLog(f"{path}: has no column of numbers; it is no log of metrics that is known here.")
    return RawLog("csv", rows)


def _count(n: int, one: str, many: str | None = None) -> str:
    return f"{n} {one if n == 1 else many or one + 's'}"
