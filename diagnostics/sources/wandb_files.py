"""What Weights & Biases leaves on disk: `run-*.wandb`, and `wandb-history.jsonl` of versions before 0.10.

A `.wandb` file is a LevelDB log (blocks of 32 KiB, records cut in pieces, a CRC-32 each) of `Record` messages; read are
its history (one record a `log`) and its config. Rows keep the names as they were logged, with `_step` (calls of `log`),
`_timestamp` and `_runtime`, and `train/global_step` where transformers logged.
Sources: leveldb's `doc/log_format.md`; `wandb_internal.proto` of the wandb package (0.10 to 0.31).
"""

import re
import struct
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import yaml

from outspoken.diagnostics.sources.config import load_yaml
from outspoken.diagnostics.sources.files import MAX_LINE, Row, UnreadableLog
from outspoken.diagnostics.sources.json_rows import loads
from outspoken.diagnostics.sources.protobuf import (
    BYTES,
    FIXED64,
    VARINT,
    Malformed,
    fields,
    messages,
    signed,
    unzigzag,
    varint,
)

MAX_RECORD = 64 * 1024 * 1024  # bytes; a longer one is no row of metrics
MAX_CACHED = 10_000
MAX_KINDS = 20
MAX_DEPTH = 8  # of nested objects
MAX_CONFIG = 4 * 1024 * 1024

_IDENT = b":W&B"
_HEADER = 7
_BLOCK = 32 * 1024
_PIECE = struct.Struct("<IHB")  # checksum, length, kind
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4
_SEEDS = [zlib.crc32(bytes([kind])) for kind in range(5)]

# Fields of a Record.
_HISTORY, _CONFIG, _STATS, _RUN = 2, 5, 7, 17

_RUN_FOLDER = re.compile(r"^(?:offline-|dry)?run-(\d{8}_\d{6})-(.+)$")
_OLD_HISTORY = "wandb-history.jsonl"


# ---------------------------------------------------------------------- what may be asked from outside


def is_wandb_file(head: bytes) -> bool:
    """Whether a file that begins so is a `.wandb` file."""
    return head.startswith(_IDENT)


def is_wandb_directory(path: Path) -> bool:
    """Whether a folder is a run's (`run-…`, `offline-run-…`), or the `wandb` folder that holds runs."""
    return path.is_dir() and (bool(_logs_in(path)) or bool(_runs_in(path)))


def rows(path: Path, notes: list[str]) -> Iterator[Row]:
    """Rows of one run: `{"_step": …, "_timestamp": …, "_runtime": …, name: value}`, a row a record of its history.

    Args:
        path: a `.wandb` file, a run's folder, or the `wandb` folder: then the run that was started last, all folders of
            it if it was resumed.

    Raises:
        UnreadableLog: no such file, or one that is damaged at its beginning or holds no history.
    """
    tally = _Tally()
    count = 0
    for file in _files(path, notes):
        for row in _old_history(file, tally) if _is_old(file) else _history(file, tally):
            count += 1
            yield row
    if not count:
        raise UnreadableLog(f"{path}: holds no logged row.")
    notes.extend(tally.notes())


def settings(path: Path) -> dict[str, Any]:
    """The run's config as it was logged, nested as it was; {} if there is none."""
    found: dict[str, Any] = {}
    for file in _files(path, []):
        if _is_old(file):
            found.update(_config_file(file.parent / "config.yaml"))
            continue
        logged = _config(file)
        found.update(logged or _config_file(file.parent / "files" / "config.yaml"))
    return found


# ---------------------------------------------------------------------- which files


def _logs_in(folder: Path) -> list[Path]:
    """The log of a run's folder, in a list; an empty one if it has none."""
    logs = sorted(folder.glob("*.wandb")) or sorted(folder.glob(_OLD_HISTORY))
    return [log for log in logs if log.is_file()][:1]


def _runs_in(folder: Path) -> list[tuple[str, str, Path]]:
    """(when it was started, its id, its log) of each run in a `wandb` folder, oldest first."""
    found: list[tuple[str, str, Path]] = []
    for inner in folder.iterdir():
        match = _RUN_FOLDER.match(inner.name)
        if match and inner.is_dir() and not inner.is_symlink():
            found.extend((match.group(1), match.group(2), log) for log in _logs_in(inner))
    return sorted(found)


def _files(path: Path, notes: list[str]) -> list[Path]:
    if not path.is_dir():
        return [path]
    logs = _logs_in(path)
    if logs:
        return logs
    runs = _runs_in(path)
    if not runs:
        raise UnreadableLog(f"{path}: holds no run of Weights & Biases.")
    newest = next((run for _, run, log in reversed(runs) if _has_history(log)), runs[-1][1])
    chosen = [log for _, run, log in runs if run == newest]
    others = len({run for _, run, _ in runs}) - 1
    if others:
        notes.append(
            f"{path}: the newest run that logged anything, {newest}, was read; "
            f"{others} other{' lies' if others == 1 else 's lie'} there. Give a run's own folder to read another."
        )
    if len(chosen) > 1:
        notes.append(f"{path}: run {newest} was resumed; its {len(chosen)} folders were read one after another.")
    return chosen


def _is_old(log: Path) -> bool:
    """Whether a log is JSON lines, as versions before 0.10 wrote them."""
    if log.suffix != ".jsonl":
        return False
    with _open(log) as handle:
        return not is_wandb_file(handle.read(len(_IDENT)))


def _has_history(log: Path) -> bool:
    try:
        tally = _Tally()
        return next(_old_history(log, tally) if _is_old(log) else _history(log, tally), None) is not None
    except UnreadableLog:
        return False


# ---------------------------------------------------------------------- records


@dataclass
class _Tally:
    """What was met besides numbers."""

    media: Counter[str] = field(default_factory=Counter)  # type as W&B names it -> values
    system: int = 0
    damaged: int = 0
    torn: list[str] = field(default_factory=list)

    def skip(self, kind: Any) -> None:
        sort = str(kind)[:40]
        self.media[sort if sort in self.media or len(self.media) < MAX_KINDS else "other values"] += 1

    def notes(self) -> list[str]:
        told = list(self.torn)
        if self.media:
            kinds = ", ".join(f"{kind} ({count})" for kind, count in sorted(self.media.items()))
            told.append(f"Values that are no numbers were not read: {kinds}.")
        if self.system:
            told.append(f"Samples of the machine (system metrics) have no step and were not read: {self.system}.")
        if self.damaged:
            told.append(f"{self.damaged} damaged record{'s were' if self.damaged > 1 else ' was'} skipped.")
        return told


def _open(path: Path) -> IO[bytes]:
    try:
        return path.open("rb")
    except OSError as error:
        raise UnreadableLog(f"{path}: cannot be opened ({error.strerror or error}).") from None


def _records(path: Path, tally: _Tally) -> Iterator[bytes]:
    """The bytes of each whole record."""
    with _open(path) as handle:
        try:
            head = handle.read(_HEADER)
            if not head.startswith(_IDENT) or len(head) < _HEADER:
                raise UnreadableLog(f"{path}: {'is empty' if not head else 'is no .wandb file'}.")
            if head[4:6] != b"\xe1\xbe":
                raise UnreadableLog(f"{path}: is a .wandb file of a kind that is not known here ({head[4:].hex()}).")
            pieces: list[bytes] | None = None  # of a record that is not whole yet
            held = 0
            room = _BLOCK - _HEADER
            while block := handle.read(room):
                at, full = 0, len(block) == room
                while at + _HEADER <= len(block):
                    check, size, kind = _PIECE.unpack_from(block, at)
                    end = at + _HEADER + size
                    if kind == 0 and size == 0 and check == 0:
                        break  # room that was never written
                    if end > len(block) and not full:
                        break  # still being written: `at` stays before the end
                    data = block[at + _HEADER : end]
                    if not _FULL <= kind <= _LAST or end > len(block) or zlib.crc32(data, _SEEDS[kind]) != check:
                        tally.damaged += 1
                        pieces = None
                        at = len(block)  # where the next record begins is only known for the next block
                        break
                    at = end
                    if kind in (_FULL, _FIRST):
                        tally.damaged += pieces is not None
                        pieces, held = [], 0
                    if pieces is None:  # the beginning of this record was damaged
                        continue
                    held += size
                    if held <= MAX_RECORD:
                        pieces.append(data)
                    if kind in (_FULL, _LAST):
                        if held <= MAX_RECORD:
                            yield b"".join(pieces) if len(pieces) > 1 else data
                        else:
                            tally.skip("values too large for a number")
                        pieces = None
                if not full:
                    if pieces is not None or block[at:].strip(b"\0"):
                        tally.torn.append(f"{path.name}: the last record was still being written; it was skipped.")
                    return
                room = _BLOCK
            if pieces is not None:
                tally.torn.append(f"{path.name}: the last record was still being written; it was skipped.")
        except OSError as error:
            raise UnreadableLog(f"{path}: cannot be read ({error.strerror or error}).") from None


# ---------------------------------------------------------------------- history


def _history(path: Path, tally: _Tally) -> Iterator[Row]:
    names: dict[bytes, str] = {}
    for record in _records(path, tally):
        try:
            for number, wire, value in fields(record):
                if number == _HISTORY and wire == BYTES:
                    row = _row(cast(bytes, value), names, tally)
                    if any(not name.startswith("_") for name in row):
                        yield row
                elif number == _STATS:
                    tally.system += 1
        except (Malformed, UnicodeDecodeError):
            tally.damaged += 1


def _row(history: bytes, names: dict[bytes, str], tally: _Tally) -> Row:
    """One record of history as a row; values of media are counted instead."""
    row: Row = {}
    deep: list[tuple[tuple[str, ...], Any]] = []
    at, end = 0, len(history)
    while at < end:
        # An item whose name and number are short, as nearly all are: key or nested_key, then value_json.
        if history[at] == 0x0A and at + 3 < end:
            size = history[at + 1]
            stop = at + 2 + size
            kind = history[at + 2]
            middle = at + 4 + history[at + 3]
            if (
                size < 0x80
                and stop <= end
                and kind in (0x0A, 0x12)
                and middle + 3 <= stop
                and history[middle] == 0x82
                and history[middle + 1] == 0x01
                and middle + 3 + history[middle + 2] == stop
            ):
                key = history[at + 4 : middle]
                name = names.get(key)
                if name is None:
                    name = key.decode()
                    if len(names) > MAX_CACHED:
                        names.clear()
                    names[key] = name
                value = _number(history[middle + 3 : stop])
                if value is None or isinstance(value, dict):
                    deep.append(((name,), value))
                else:
                    row[name] = value
                at = stop
                continue
        tag, start = varint(history, at)
        if tag & 7 != BYTES:
            raise Malformed
        size, start = varint(history, start)
        at = start + size
        if at > end:
            raise Malformed
        if tag >> 3 == 1:
            deep.append(_item(history[start:at]))
        elif tag >> 3 == 2 and "_step" not in row:
            row["_step"] = next(
                (signed(cast(int, v)) for n, w, v in fields(history[start:at]) if n == 1 and w == 0), 0
            )
    if deep:
        _put(row, deep, tally)
    return row


def _item(data: bytes) -> tuple[tuple[str, ...], Any]:
    """(name, a part for each level; value) of an item of history or config."""
    path: list[str] = []
    value: Any = None
    for number, wire, content in fields(data):
        if number in (1, 2) and wire == BYTES:
            path.append(cast(bytes, content).decode())
        elif number in (8, 16) and wire == BYTES:
            value = _number(cast(bytes, content))
        elif number == 4 and wire == VARINT:
            value = bool(content)
        elif number == 5 and wire == VARINT:
            value = unzigzag(cast(int, content))
        elif number == 6 and wire == FIXED64:
            value = struct.unpack("<d", cast(bytes, content))[0]
        elif number == 7 and wire == BYTES:
            value = _words(cast(bytes, content).decode())
    return tuple(path), value


_SPELT = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}


def _words(text: str) -> Any:
    """A text, or the number that is written as one where JSON has no other way."""
    return _SPELT.get(text, text)


def _number(text: bytes) -> Any:
    """The value of a JSON text; what is no JSON stays a text."""
    try:
        if text.isdigit():
            return int(text)
        return float(text)  # NaN and Infinity, too
    except ValueError:
        pass
    try:
        value = loads(text.decode())
    except (ValueError, RecursionError):
        return text.decode(errors="replace")
    return _words(value) if isinstance(value, str) else value


def _put(row: Row, items: list[tuple[tuple[str, ...], Any]], tally: _Tally) -> None:
    """Add values that are nested, or may be: `{"a": {"b": 1}}` becomes "a/b"."""
    flat: list[tuple[tuple[str, ...], Any]] = []
    for path, value in items:
        _flatten(path, value, flat, tally)
    media = {path[:-1]: value for path, value in flat if len(path) > 1 and path[-1] == "_type"}
    for kind in media.values():
        tally.skip(kind)
    for path, value in flat:
        if path and path[0] != "_wandb" and not any(path[:i] in media for i in range(1, len(path))):
            row["/".join(path)] = value


def _flatten(path: tuple[str, ...], value: Any, into: list[tuple[tuple[str, ...], Any]], tally: _Tally) -> None:
    if isinstance(value, dict) and len(path) <= MAX_DEPTH:
        if "_type" in value:
            tally.skip(value["_type"])
            return
        for name, inner in value.items():
            _flatten((*path, name), inner, into, tally)
    else:
        into.append((path, _words(value) if isinstance(value, str) else value))


def _old_history(path: Path, tally: _Tally) -> Iterator[Row]:
    with _open(path) as handle:
        number = 0
        while True:
            number += 1
            try:
                line = handle.readline(MAX_LINE + 1)
            except OSError as error:
                raise UnreadableLog(f"{path}: line {number} cannot be read ({error.strerror or error}).") from None
            if not line:
                return
            if len(line) > MAX_LINE:
                raise UnreadableLog(f"{path}: line {number} is longer than {MAX_LINE // 2**20} MiB, which no row is.")
            if not line.strip():
                continue
            try:
                value = loads(line.decode())
            except (ValueError, RecursionError):
                value = None
            if not isinstance(value, dict):
                if line.endswith(b"\n"):
                    tally.damaged += 1
                else:
                    tally.torn.append(f"{path.name}: the last line was still being written; it was skipped.")
                continue
            row: Row = {}
            _put(row, [((name,), inner) for name, inner in value.items()], tally)
            if any(not name.startswith("_") for name in row):
                yield row


# ---------------------------------------------------------------------- config


def _config(path: Path) -> dict[str, Any]:
    """The config of a `.wandb` file: as the run began, with every later change."""
    found: dict[str, Any] = {}
    for record in _records(path, _Tally()):
        try:
            for number, wire, value in fields(record):
                if number == _RUN and wire == BYTES:
                    for config in messages(cast(bytes, value), 4):
                        _change(found, config)
                elif number == _CONFIG and wire == BYTES:
                    _change(found, cast(bytes, value))
        except (Malformed, UnicodeDecodeError):
            continue
    found.pop("_wandb", None)
    return found


def _change(config: dict[str, Any], record: bytes) -> None:
    for number, wire, item in fields(record):
        if number not in (1, 2) or wire != BYTES:
            continue
        path, value = _item(cast(bytes, item))
        if not path:
            continue
        place = config
        for name in path[:-1]:
            inner = place.get(name)
            if not isinstance(inner, dict):
                inner = place[name] = {}
            place = inner
        if number == 1:
            place[path[-1]] = value
        else:
            place.pop(path[-1], None)


def _config_file(path: Path) -> dict[str, Any]:
    """The config of a `config.yaml`, where each name holds `{value: …}`."""
    try:
        if not path.is_file() or path.stat().st_size > MAX_CONFIG:
            return {}
        value = load_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}
    if not isinstance(value, dict):
        return {}
    return {
        str(name): held["value"]
        for name, held in value.items()
        if isinstance(held, dict) and "value" in held and name != "_wandb"
    }
