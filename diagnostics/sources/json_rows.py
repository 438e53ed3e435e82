"""Rows of JSON: one object a line, or one document that holds a list of rows, or a list of numbers for each name.

Documents are read piece by piece, so that memory does not grow with them. Numbers stay what the parser made of them,
NaN and Infinity included.
"""

import codecs
import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from outspoken.diagnostics.sources.files import MAX_LINE, Row, UnreadableLog, count_of, lines_of, open_bytes

MAX_BAD_SHARE = 0.5  # of lines that cannot be parsed; beyond it the file is not what it seems
MAX_DEPTH = 4  # of nested objects that are flattened to a/b/c
MAX_NESTING = 100  # of lists and objects; C code that goes through deeper ones may end Python's stack
MAX_BESIDE = 64 * 1024 * 1024  # characters of one value beside the rows that is no list
MAX_NUMBERS = 2_000_000  # of a document that holds one list of numbers for each name
MAX_MEMBERS = 20_000  # names of a document
CHUNK = 256 * 1024  # characters read at a time
SKIPPED_SHOWN = 10


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


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer)


def loads(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is no JSON, or nested too deeply. RecursionError: it is nested far too deeply.
    """
    value = _DECODER.decode(text)
    _refuse_depth(value, text.count("[") + text.count("{"))
    return value


def _refuse_depth(value: Any, brackets: int) -> None:
    """Raise ValueError for a value nested deeper than MAX_NESTING; `brackets` open in its text."""
    layer, depth = [value], 0
    while layer and brackets > MAX_NESTING:
        depth += 1
        if depth > MAX_NESTING:
            raise ValueError("nested too deeply")
        inner = (v.values() if isinstance(v, dict) else v for v in layer)
        layer = [v for values in inner for v in values if isinstance(v, dict | list)]


def flatten(row: dict[str, Any], depth: int = MAX_DEPTH) -> Row:
    """A row without nested objects: `{"reward": {"mean": 1}}` becomes `{"reward/mean": 1}`. Our own records stay."""
    if not any(isinstance(value, dict) for value in row.values()):
        return row
    if str(row.get("schema", "")).startswith("outspoken."):
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


# ---------------------------------------------------------------------- lines


@dataclass
class Lines:
    """What a pass over JSON lines met. wrapped: whether most metrics stood in an inner object, `{"data": {…}}`."""

    wrapped: bool = False


def line_rows(path: Path, notes: list[str], met: Lines) -> Iterator[Row]:
    """The objects of a file of JSON lines.

    Raises:
        UnreadableLog: more than half of the lines are no objects, or there is none.
    """
    skipped: list[int] = []
    bad = count = twice = last = wrapped = 0
    last_ended = True
    for number, text, ended in lines_of(path, notes):
        if not text or text.isspace():
            continue
        last, last_ended = number, ended
        try:
            value = loads(text)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            bad += 1
            if len(skipped) <= SKIPPED_SHOWN:
                skipped.append(number)
            continue
        count += 1
        twice += isinstance(value, _Pairs)
        wrapped += isinstance(value.get("data"), dict)
        yield flatten(value)
    if bad and bad > max(1, MAX_BAD_SHARE * (count + bad)):
        raise UnreadableLog(f"{path}: line {skipped[0]} is not a JSON object, nor are {bad - 1} other lines.")
    if bad and not count:
        raise UnreadableLog(f"{path}: line {skipped[0]} is not a complete JSON object.")
    met.wrapped = 2 * wrapped > count
    if skipped == [last] and not last_ended:
        notes.append(f"Line {last}, the last, was cut off while it was written; it was skipped.")
    elif skipped:
        shown = ", ".join(map(str, skipped[:SKIPPED_SHOWN])) + (" …" if bad > SKIPPED_SHOWN else "")
        were = "was" if bad == 1 else "were"
        notes.append(f"{count_of(bad, 'line')} could not be parsed and {were} skipped: {shown}.")
    if twice:
        notes.append(f"{count_of(twice, 'row')} held a name twice; the last value of it was kept.")


# ---------------------------------------------------------------------- documents


@dataclass
class Document:
    """What a JSON document holds.

    Attributes:
        key: under which name its rows stand; "" if the document is the list of them; None if it has no such list.
        columns: lists of numbers, one a name, where there are such lists and nothing else.
        extra: numbers and the like beside the rows.
        others: entries of the list that are no objects. times: how often the name of the list stands there.
    """

    key: str | None = None
    columns: dict[str, list[Any]] | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    others: int = 0
    times: int = 1


_SPACE = re.compile(r"[ \t\r\n]*")
_NUMBERS = re.compile(r"(?:[\w.+ \t\r\n-]{1,400},){2,}")


class _Reader:
    """A document as text that is read as it is needed."""

    def __init__(self, path: Path, handle: IO[bytes]):
        self.path, self._handle = path, handle
        self._head = handle.read(2)  # opened before, so it can be unpacked
        utf16 = self._head in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        self._decode = codecs.getincrementaldecoder("utf-16" if utf16 else "utf-8-sig")().decode
        self.text, self.at, self._line, self._over = "", 0, 1, False

    def _more(self, size: int = CHUNK) -> bool:
        """Read on; what was used is let go. False at the end."""
        new = ""
        while not new and not self._over:
            try:
                data = self._head + self._handle.read(size)
            except (EOFError, gzip.BadGzipFile, zlib.error, OSError):
                raise UnreadableLog(f"{self.path}: is a damaged gzip file.") from None
            self._over, self._head = not data, b""
            try:
                new = self._decode(data, self._over)
            except UnicodeDecodeError as error:
                line = self.line(len(self.text)) + data[: error.start].count(b"\n")
                byte = error.object[error.start]
                raise UnreadableLog(f"{self.path}: line {line} is not UTF-8 text (byte 0x{byte:02x}).") from None
        if new:
            self._line += self.text.count("\n", 0, self.at)
            self.text, self.at = self.text[self.at :] + new, 0
        return bool(new)

    def line(self, at: int | None = None) -> int:
        return self._line + self.text.count("\n", 0, self.at if at is None else at)

    def peek(self) -> str:
        """The next character that is no space, "" at the end; `at` stands on it."""
        while True:
            found = _SPACE.match(self.text, self.at)
            self.at = found.end() if found is not None else self.at
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._more():
                return ""

    def expect(self, what: str) -> None:
        found = self.peek()
        if found != what:
            raise self.broken(f"expected {what!r}" + (f", found {found!r}" if found else ""))
        self.at += 1

    def value(self, limit: int) -> Any:
        """The next value, whole.

        Raises:
            UnreadableLog: it is no JSON, or longer than `limit` characters.
        """
        self.peek()
        size = CHUNK
        while True:
            try:
                made, end = _DECODER.raw_decode(self.text, self.at)
                if end < len(self.text) or not self._more(size):  # a number at the edge may go on
                    _refuse_depth(made, self.text.count("[", self.at, end) + self.text.count("{", self.at, end))
                    self.at = end
                    return made
            except json.JSONDecodeError as error:
                if len(self.text) - self.at > limit:
                    raise UnreadableLog(
                        f"{self.path}: line {self.line()} begins a value longer than {limit // 2**20} MiB, "
                        "which no row is."
                    ) from None
                if not self._more(size):
                    raise UnreadableLog(
                        f"{self.path}: line {self._line + error.lineno - 1} is not valid JSON ({error.msg}); "
                        "is it cut off?"
                    ) from None
            except (ValueError, RecursionError):
                raise UnreadableLog(
                    f"{self.path}: is not readable JSON (line {self.line()} begins a value that is nested too deeply)."
                ) from None
            size *= 2

    def skip(self) -> None:
        """Pass over the next value."""
        if self.peek() == "[":
            for _ in self.elements():
                pass
        else:
            self.value(MAX_BESIDE)

    def broken(self, why: str) -> UnreadableLog:
        return UnreadableLog(f"{self.path}: line {self.line()} is not valid JSON ({why}); is it cut off?")

    def elements(self) -> Iterator[Any]:
        """The values of the list that comes next."""
        self.expect("[")
        if self.peek() == "]":
            self.at += 1
            return
        while True:
            yield from self._plain()
            yield self.value(MAX_LINE)
            if self.peek() == "]":
                self.at += 1
                return
            self.expect(",")

    def _plain(self) -> list[Any]:
        """The plain values that come next, each with a comma behind it: a list may hold millions of numbers."""
        self.peek()
        found = _NUMBERS.match(self.text, self.at)
        if found is None:
            return []
        try:
            values = loads(f"[{found.group()[:-1]}]")
        except ValueError:
            return []
        self.at = found.end()
        return list(values)

    def members(self) -> Iterator[str]:
        """The names of the object that comes next; whoever asks takes each value before going on."""
        self.expect("{")
        if self.peek() == "}":
            self.at += 1
            return
        while True:
            if self.peek() != '"':
                raise self.broken("expected a name in double quotes")
            name = str(self.value(MAX_LINE))
            self.expect(":")
            yield name
            if self.peek() == "}":
                self.at += 1
                return
            self.expect(",")


def scan(path: Path) -> Document:
    """What a JSON document holds, gone through once.

    Raises:
        UnreadableLog: it is no JSON, cut off, or too large in what is no row.
    """
    found = Document()
    lists: dict[str, _List] = {}
    with open_bytes(path) as handle:
        document = _Reader(path, handle)
        room = MAX_NUMBERS
        if document.peek() == "[":
            lists[""] = _list(document, 0)
        else:
            for number, name in enumerate(document.members()):
                if number == MAX_MEMBERS:
                    raise UnreadableLog(f"{path}: is a JSON object of more than {MAX_MEMBERS} names, which no log is.")
                if document.peek() == "[":
                    seen, before = _list(document, room), lists.get(name, _List())
                    room -= len(seen.numbers)
                    lists[name] = _List(
                        before.objects + seen.objects, before.others + seen.others, before.times + 1, seen.numbers
                    )
                else:
                    value = document.value(MAX_BESIDE)
                    if not isinstance(value, dict | str):
                        found.extra[name] = value
        if document.peek():
            raise document.broken("it goes on after its end")
    rows = [name for name, seen in lists.items() if seen.objects and not seen.others]
    if "log_history" in lists:
        found.key = "log_history"
    elif len(rows) == 1:
        found.key = rows[0]
    if found.key is not None:
        found.others, found.times = lists[found.key].others, lists[found.key].times
    elif (
        "" not in lists
        and {(seen.objects, min(seen.others, 2)) for seen in lists.values()} == {(0, 2)}
        and _as_long(lists.values())
    ):
        if room == 0:
            raise UnreadableLog(f"{path}: holds lists of more than {MAX_NUMBERS} numbers; give them as CSV.")
        found.columns = {name: seen.numbers for name, seen in lists.items()}
    return found


@dataclass
class _List:
    """What a list of a document holds: how many objects and other entries, and the first of the latter.

    times: how often its name stands there.
    """

    objects: int = 0
    others: int = 0
    times: int = 0
    numbers: list[Any] = field(default_factory=list)


def _as_long(lists: Iterable[_List]) -> bool:
    return len({seen.others for seen in lists}) == 1


def _list(document: _Reader, room: int) -> _List:
    """The list that comes next; of its entries that are no objects, `room` are kept."""
    found = _List(times=1)
    for value in document.elements():
        if isinstance(value, dict):
            found.objects += 1
            continue
        found.others += 1
        if len(found.numbers) < room:
            found.numbers.append(value)
    return found


def document_rows(path: Path, key: str) -> Iterator[Row]:
    """The objects of the list under `key`, "" for the document itself."""
    with open_bytes(path) as handle:
        document = _Reader(path, handle)
        if not key:
            yield from (flatten(value) for value in document.elements() if isinstance(value, dict))
            return
        for name in document.members():
            if name == key and document.peek() == "[":
                yield from (flatten(value) for value in document.elements() if isinstance(value, dict))
            else:
                document.skip()
