"""TensorBoard event files: scalars of `events.out.tfevents.*`, without TensorBoard.

A file is a sequence of records: length (uint64), its checksum, the bytes of an `Event` message, their checksum.
Read are scalars in either form, `simple_value` and a tensor of one number. Nothing else is decoded.
Sources: tensorflow.org, "TFRecord and tf.train.Example" (framing, masked CRC-32C); the `.proto` files `event`,
`summary`, `tensor`, `types` of TensorBoard.
"""

import gzip
import heapq
import json
import math
import os
import struct
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from outspoken.diagnostics.sources.files import Row, UnreadableLog, stamp_of
from outspoken.diagnostics.sources.measurements import MAX_NAMES, Axes, Measurement, Recorded, survey, to_rows
from outspoken.diagnostics.sources.protobuf import (
    BYTES,
    FIXED32,
    FIXED64,
    VARINT,
    Malformed,
    fields,
    messages,
    signed,
    varint,
)

MAX_RECORD = 64 * 1024 * 1024  # bytes; a longer one is no scalar and is passed over
MAX_FILES = 10_000  # below one folder
MAX_CACHED = 10_000
PLANS_KEPT = 16
MAX_CHECKED = 65536  # bytes of a record; a longer one holds media
BATCH = 256 * 1024  # bytes
SETTINGS_WITHIN = 5_000  # records at the start of a file, among which its settings are looked for
NAMES_SHOWN = 5
MAX_KINDS = 20

# Folders that one run writes side by side, by the part of training that they hold.
PARTS = frozenset(("train", "training", "eval", "evaluation", "val", "valid", "validation", "test"))

_LENGTH = struct.Struct("<Q")
_U32 = struct.Struct("<I")
_F32 = struct.Struct("<f")
_F64 = struct.Struct("<d")

# ---------------------------------------------------------------------- what may be asked from outside


def is_event_file(path: Path, head: bytes) -> bool:
    """Whether this is an event file, by its name or by the first bytes of its content (24 or more)."""
    if ".tfevents." in path.name:
        return True
    if len(head) < 22:
        return False
    length, check = _LENGTH.unpack_from(head)[0], _U32.unpack_from(head, 8)[0]
    # every first event holds the time, then the version `brain.Event:2`
    return bool(9 <= length <= 4096 and _masked(_crc(head, 8)) == check and head[12] == 0x09)


def event_files(folder: Path) -> list[Path]:
    """The event files in a folder and below it, in order of path."""
    found = []
    for path in folder.rglob("*.tfevents.*"):
        if path.is_file() and not path.name.endswith(".profile-empty"):
            found.append(path)
        if len(found) > MAX_FILES:
            raise UnreadableLog(f"{folder}: holds more than {MAX_FILES} event files; give the folder of one run.")
    return sorted(found)


def rows(paths: Sequence[Path], notes: list[str]) -> Iterator[Row]:
    """Rows of one run, `{"step": …, "time": …, tag: value}`, from its event files or folders with such files.

    Of several runs the one that was written last is read, with the runs that it went on from. The files of a run follow
    each other in order of time; those of writers that wrote at the same time are merged by time, and a tag that two of
    them wrote is taken from one. Tags of a sub-folder carry its name in front.

    Raises:
        UnreadableLog: no event file, a damaged beginning, or no scalar.
    """
    if not paths:
        raise UnreadableLog("No TensorBoard event file was given.")
    folders = {path.parent for path in paths}
    source = str(paths[0] if len(paths) == 1 else folders.pop() if len(folders) == 1 else _common(paths))
    files = tuple(_expand(paths))
    tally, recorded = _Tally(), Recorded()
    groups, axes, told = _plan(files, tuple(stamp_of(path) for path in files), source, tally, recorded)
    notes.extend(told)
    yield from to_rows(recorded if recorded.whole else _in_order(groups, tally), axes, source, notes)
    notes.extend(tally.notes())


def settings(paths: Sequence[Path]) -> dict[str, Any]:
    """The run's settings, as its writer put them beside the scalars; {} if it did not.

    Known are the text "args" of transformers (JSON) and the hyperparameters of `add_hparams` and Lightning.
    """
    found: dict[str, Any] = {}
    files = _expand(paths)
    try:
        runs = _one_run(files, "", []) if files else []
    except UnreadableLog:
        return {}
    for file in (file for run in runs for file in run):
        try:
            for number, (record, size) in enumerate(_records(file, _Tally())):
                if number >= SETTINGS_WITHIN:
                    break
                if b"args/text_summary" in record or b"_hparams_/session_start_info" in record:
                    found.update(_settings_in(record[:size]))
        except (UnreadableLog, Malformed):
            continue
    return found


# ---------------------------------------------------------------------- records


def _table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


_CRC = _table()  # CRC-32C (Castagnoli) of each byte


def _crc(data: bytes, size: int) -> int:
    """CRC-32C of the first `size` bytes."""
    crc = 0xFFFF_FFFF
    for byte in data[:size]:
        crc = _CRC[(crc ^ byte) & 255] ^ (crc >> 8)
    return crc ^ 0xFFFF_FFFF


def _changed(records: Sequence[tuple[bytes, int]]) -> set[int]:
    """Which records of a batch do not agree with the checksum behind them; long ones are not looked at.

    Records of one length, as those of one tag are, are gone through side by side.
    """
    lengths: dict[int, list[int]] = {}
    for i, (_, size) in enumerate(records):
        if size <= MAX_CHECKED:
            lengths.setdefault(size, []).append(i)
    table = np.array(_CRC, dtype=np.uint32)
    changed: set[int] = set()
    for size, members in lengths.items():
        if len(members) < 4:
            changed.update(
                i for i in members if _masked(_crc(records[i][0], size)) != _U32.unpack_from(records[i][0], size)[0]
            )
            continue
        flat = np.frombuffer(b"".join(records[i][0] for i in members), dtype=np.uint8).reshape(len(members), size + 4)
        crc = np.full(len(members), 0xFFFF_FFFF, dtype=np.uint32)
        for column in np.ascontiguousarray(flat[:, :size].T):
            crc = table[(crc ^ column) & 255] ^ (crc >> 8)
        crc ^= 0xFFFF_FFFF
        masked = (crc >> 15 | crc << 17) + np.uint32(0xA282EAD8)  # wraps round, as it should
        stored = np.ascontiguousarray(flat[:, size:]).view("<u4")[:, 0]
        changed.update(members[i] for i in np.flatnonzero(masked != stored))
    return changed


def _masked(crc: int) -> int:
    """As it stands in the file."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFF_FFFF


def _open(path: Path) -> IO[bytes]:
    try:
        handle = path.open("rb", buffering=1 << 18)
        if handle.read(2) == b"\x1f\x8b":
            handle.close()
            return cast(IO[bytes], gzip.open(path, "rb"))
        handle.seek(0)
        return handle
    except OSError as error:
        raise UnreadableLog(f"{path}: cannot be opened ({error.strerror or error}).") from None


@dataclass
class _Tally:
    """What was met in event files besides scalars."""

    skipped: Counter[str] = field(default_factory=Counter)  # kind -> values
    damaged: int = 0  # records whose bytes were changed, or that are no message
    torn: list[str] = field(default_factory=list)  # one sentence a file
    hparams: bool = False

    def notes(self) -> list[str]:
        told = list(self.torn)
        if self.skipped:
            kinds = ", ".join(f"{kind} ({count})" for kind, count in sorted(self.skipped.items()))
            told.append(f"Values that are no scalars were not read: {kinds}.")
        if self.damaged:
            told.append(f"{self.damaged} damaged record{'s were' if self.damaged > 1 else ' was'} skipped.")
        return told


def _records(path: Path, tally: _Tally) -> Iterator[tuple[bytes, int]]:
    """(bytes of a record and of its checksum behind, length of the record) of each whole record."""
    sound: set[bytes] = set()  # beginnings whose checksum was right: there are as many as lengths
    at = 0
    with _open(path) as handle:
        try:
            while True:
                head = handle.read(12)
                if len(head) < 12:
                    if head:
                        tally.torn.append(f"{path.name}: the last record was still being written; it was skipped.")
                    elif at == 0:
                        raise UnreadableLog(f"{path}: is empty.")
                    return
                size: int = _LENGTH.unpack_from(head)[0]
                if head not in sound:
                    if _masked(_crc(head, 8)) != _U32.unpack_from(head, 8)[0]:
                        if at == 0:
                            raise UnreadableLog(f"{path}: is no TensorBoard event file, or its beginning is damaged.")
                        tally.torn.append(
                            f"{path.name}: is damaged at byte {at}; what stood before was read, what follows was not."
                        )
                        return
                    if len(sound) > MAX_CACHED:
                        sound.clear()
                    sound.add(head)
                if size > MAX_RECORD:
                    left = size + 4
                    while left and (piece := handle.read(min(left, 1 << 20))):
                        left -= len(piece)
                    tally.skipped["values too large for a scalar"] += 1
                    if left:
                        tally.torn.append(f"{path.name}: the last record was still being written; it was skipped.")
                        return
                else:
                    record = handle.read(size + 4)
                    if len(record) < size + 4:
                        tally.torn.append(f"{path.name}: the last record was still being written; it was skipped.")
                        return
                    yield record, size
                at += size + 16
        except (EOFError, gzip.BadGzipFile, zlib.error):
            tally.torn.append(f"{path.name}: the compressed file ends early; what came before was read.")
        except OSError as error:
            raise UnreadableLog(f"{path}: cannot be read at byte {at} ({error.strerror or error}).") from None


# ---------------------------------------------------------------------- events


def _scalars(path: Path, tally: _Tally) -> Iterator[Measurement]:
    """The scalars of one file, as it goes."""
    records = _records(path, tally)
    tags: dict[bytes, str] = {}  # what stands between the step and the number of a plain scalar -> its tag
    for batch in _batches(records):
        changed = _changed(batch)
        if changed:
            tally.damaged += len(changed)
            batch = [record for i, record in enumerate(batch) if i not in changed]
        yield from _scalars_in(batch, tags, tally)


def _batches(records: Iterator[tuple[bytes, int]]) -> Iterator[list[tuple[bytes, int]]]:
    """Records in lists of about BATCH bytes."""
    batch, held = [], 0
    for record in records:
        batch.append(record)
        held += record[1] + 64
        if held >= BATCH:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def _scalars_in(records: Sequence[tuple[bytes, int]], tags: dict[bytes, str], tally: _Tally) -> Iterator[Measurement]:
    f32, f64 = _F32.unpack_from, _F64.unpack_from
    for record, size in records:
        # An event of one plain scalar, as nearly all are: time, step, and the same bytes for each number of a tag.
        at = 0
        try:
            if size > 20 and record[0] == 0x09:
                step, at = 0, 9
                if record[9] == 0x10:
                    step, at = (record[10], 11) if record[10] < 0x80 else varint(record, 10)
                tag = tags.get(record[at : size - 4])
                if tag is not None:
                    yield f64(record, 1)[0], step, tag, _short(f32(record, size - 4)[0])
                    continue
            time, step, values = _event(record[:size], tally)
        except (Malformed, UnicodeDecodeError):
            tally.damaged += 1
            continue
        for tag, value, plain in values:
            yield time, step, tag, _short(value) if plain else value
        if at and len(values) == 1 and values[0][2] and _plain(values[0][0]) == record[at : size - 4]:
            if len(tags) > MAX_CACHED:
                tags.clear()
            tags[record[at : size - 4]] = values[0][0]


def _short(value: float) -> float:
    """The number of at most 7 digits that a 32-bit float was made from, if there is one: 2e-05, not 1.99999995e-05.

    So a run gives the same numbers whether it was logged here or as text.
    """
    if not -1e38 < value < 1e38:
        return value
    short = float(f"{value:.7g}")
    return short if _F32.unpack(_F32.pack(short))[0] == value else value


def _plain(tag: str) -> bytes:
    """The bytes of a summary of one plain scalar, but for the number."""
    name = tag.encode()
    value = b"\x0a" + _length(len(name)) + name + b"\x15"
    inner = b"\x0a" + _length(len(value) + 4) + value
    return b"\x2a" + _length(len(inner) + 4) + inner


def _length(size: int) -> bytes:
    out = bytearray()
    while size >= 0x80:
        out.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes((*out, size))


def _event(record: bytes, tally: _Tally) -> tuple[float, int, list[tuple[str, float, bool]]]:
    """(time, step, [(tag, number, whether it is a `simple_value`)]) of any event."""
    time, step = 0.0, 0
    values: list[tuple[str, float, bool]] = []
    for number, wire, value in fields(record):
        if number == 1 and wire == FIXED64:
            time = _F64.unpack(cast(bytes, value))[0]
        elif number == 2 and wire == VARINT:
            step = signed(cast(int, value))
        elif number == 5 and wire == BYTES:
            for inner, kind, content in fields(cast(bytes, value)):
                if inner == 1 and kind == BYTES:
                    made = _value(cast(bytes, content), tally)
                    if made is not None:
                        values.append(made)
        elif number == 4 and wire == BYTES:
            tally.skipped["graphs"] += 1
    return (time if math.isfinite(time) else 0.0), step, values


# Fields of Summary.Value that hold something else than a number.
_OTHER_VALUES = {4: "images", 5: "histograms", 6: "sounds"}


def _value(data: bytes, tally: _Tally) -> tuple[str, float, bool] | None:
    """(tag, number, whether it is a `simple_value`); None for what is no scalar, which is counted."""
    tag = plugin = ""
    simple: float | None = None
    tensor: bytes | None = None
    other = ""
    for number, wire, value in fields(data):
        if number == 1 and wire == BYTES:
            tag = cast(bytes, value).decode()
        elif number == 2 and wire == FIXED32:
            simple = _F32.unpack(cast(bytes, value))[0]
        elif number == 8 and wire == BYTES:
            tensor = cast(bytes, value)
        elif number == 9 and wire == BYTES:
            plugin = _plugin(cast(bytes, value))[0]
        elif number in _OTHER_VALUES and wire == BYTES:
            other = _OTHER_VALUES[number]
    if plugin == "hparams" or tag.startswith("_hparams_/"):
        tally.hparams = True
        return None
    if simple is not None:
        return tag, simple, True
    if tensor is not None and plugin in ("", "scalars"):
        number_in = _number_in(tensor)
        if number_in is not None:
            return tag, number_in, False
    sort = other or {"text": "texts"}.get(plugin, plugin or "other values")
    tally.skipped[sort if sort in tally.skipped or len(tally.skipped) < MAX_KINDS else "other values"] += 1
    return None


def _plugin(metadata: bytes) -> tuple[str, bytes]:
    """Name and content of the plugin that a SummaryMetadata names."""
    name, content = "", b""
    for number, wire, value in fields(metadata):
        if number == 1 and wire == BYTES:
            for inner, kind, field_value in fields(cast(bytes, value)):
                if inner == 1 and kind == BYTES:
                    name = cast(bytes, field_value).decode(errors="replace")[:40]
                elif inner == 2 and kind == BYTES:
                    content = cast(bytes, field_value)
    return name, content


# DataType -> how one number stands in `tensor_content`; bfloat16 is the upper half of a float.
_CONTENT = {1: "<f", 2: "<d", 3: "<i", 4: "<B", 5: "<h", 6: "<b", 9: "<q", 10: "<?", 19: "<e", 22: "<I", 23: "<Q"}
_FLOAT, _BFLOAT16 = 1, 14


def _number_in(tensor: bytes) -> float | None:
    """The number of a TensorProto that holds exactly one, None for any other."""
    kind = 0
    content = b""
    found: list[float] = []
    for number, wire, value in fields(tensor):
        if number == 1 and wire == VARINT:
            kind = cast(int, value)
        elif number == 2 and wire == BYTES:
            if any(_sizes(cast(bytes, value))):
                return None
        elif number == 4 and wire == BYTES:
            content = cast(bytes, value)
        elif number in (5, 6):  # float_val, double_val, packed or not
            form = "<f" if number == 5 else "<d"
            packed = cast(bytes, value) if wire != VARINT else b""
            if len(packed) != struct.calcsize(form):
                return None
            held = struct.unpack(form, packed)[0]
            found.append(_short(held) if number == 5 else held)
        elif number in (7, 10, 11, 13, 16, 17):  # integers of several widths, bools, and halves as their 16 bits
            if wire == VARINT:
                whole = cast(int, value)
            else:
                whole, end = varint(cast(bytes, value), 0)
                if end != len(cast(bytes, value)):
                    return None
            if number == 13:
                found.append(_half(whole & 0xFFFF, kind))
            else:
                found.append(float(signed(whole) if number in (7, 10) else whole))
    if content:
        if kind == _BFLOAT16 and len(content) == 2:
            found.append(_half(int.from_bytes(content, "little"), kind))
        elif kind in _CONTENT and len(content) == struct.calcsize(_CONTENT[kind]):
            held = float(struct.unpack(_CONTENT[kind], content)[0])
            found.append(_short(held) if kind == _FLOAT else held)
        else:
            return None
    return found[0] if len(found) == 1 else None


def _half(bits: int, kind: int) -> float:
    if kind == _BFLOAT16:
        return float(_F32.unpack(_U32.pack(bits << 16))[0])
    return float(struct.unpack("<e", struct.pack("<H", bits))[0])


def _sizes(shape: bytes) -> Iterator[bool]:
    """Whether a dimension is longer than one, for each of a TensorShapeProto."""
    for number, wire, value in fields(shape):
        if number == 2 and wire == BYTES:
            for inner, kind, size in fields(cast(bytes, value)):
                if inner == 1 and kind == VARINT:
                    yield size != 1


# ---------------------------------------------------------------------- which files, and in which order


@dataclass
class _Part:
    """What is read of one file."""

    path: Path
    below: str = ""  # its folder within the run's, "" for the same
    first: float = 0.0  # times of its first and last scalar
    last: float = 0.0
    names: Counter[str] = field(default_factory=Counter)  # how often each was written
    without: frozenset[str] = frozenset()  # names that are taken from another file

    def measurements(self, tally: _Tally) -> Iterator[Measurement]:
        plain = _scalars(self.path, tally)
        if not self.below and not self.without:
            return plain
        named = ((time, step, _name(tag, self.below), value) for time, step, tag, value in plain)
        return (m for m in named if m[2] not in self.without)

    def survey(self) -> "_Part":
        """Fill in what it holds."""
        tally = _Tally()
        tags: dict[str, int] = {}
        for time, _, tag, _ in _scalars(self.path, tally):
            if not tags:
                self.first = time
            self.last = max(self.last, time)
            tags[tag] = tags.get(tag, 0) + 1
            if len(tags) > MAX_NAMES:
                raise UnreadableLog(f"{self.path}: holds more than {MAX_NAMES} names, which no log of metrics does.")
        if not (tally.hparams and self.below):  # `add_hparams` writes the results of the run once more, at step 0
            for tag, count in tags.items():
                self.names[_name(tag, self.below)] += count
        return self


def _name(tag: str, below: str) -> str:
    """A tag with its sub-folder in front; `add_scalars` puts "loss" in a folder "loss_train": "loss/train"."""
    if not below:
        return tag
    joined = tag.replace("/", "_") + "_"
    if below.startswith(joined):
        return f"{tag}/{below.removeprefix(joined)}"
    return tag if tag.startswith(f"{below}/") else f"{below}/{tag}"


def _expand(paths: Iterable[Path]) -> list[Path]:
    files: list[Path] = []
    for path in paths:
        files.extend(event_files(path) if path.is_dir() else [path])
    return list(dict.fromkeys(files))


_Plan = tuple[list[list[_Part]], Axes, list[str]]
_plans: dict[Any, _Plan] = {}  # the last ones, by files that did not change since


def _plan(
    files: tuple[Path, ...], stamps: tuple[tuple[int, int], ...], source: str, tally: _Tally, recorded: Recorded
) -> _Plan:
    """What is read in which order, what the steps count, and notes.

    Found once for files that did not change since. Where that took a pass over them, `recorded` holds the
    measurements, if they are not too many, and `tally` what was met on the way.
    """
    key = files, stamps, source
    if key in _plans:
        return _plans[key]
    notes: list[str] = []
    groups = _groups(files, source, notes)
    met = _Tally()
    passes = 0

    def measurements() -> Iterable[Measurement]:
        nonlocal passes
        passes += 1
        if passes == 1:
            return recorded.of(_in_order(groups, met))
        return recorded if recorded.whole else _in_order(groups, _Tally())

    try:
        axes = survey(measurements, source)
    except UnreadableLog as error:
        told = met.notes()
        raise UnreadableLog(f"{str(error)[:-1]}; {told[0]}" if told else str(error)) from None
    if recorded.whole:
        vars(tally).update(vars(met))
    while len(_plans) >= PLANS_KEPT:
        _plans.pop(next(iter(_plans)), None)
    _plans[key] = groups, axes, notes
    return groups, axes, notes


def _in_order(groups: Sequence[Sequence[_Part]], tally: _Tally) -> Iterator[Measurement]:
    for group in groups:
        if len(group) == 1:
            yield from group[0].measurements(tally)
        else:
            yield from heapq.merge(*(part.measurements(tally) for part in group), key=lambda m: m[0])


def _groups(files: Sequence[Path], source: str, notes: list[str]) -> list[list[_Part]]:
    """The files of one run in order of time; those of an inner list were written at the same time."""
    if not files:
        raise UnreadableLog(f"{source}: holds no TensorBoard event file.")
    if len(files) == 1:
        return [[_Part(files[0])]]
    parts: list[_Part] = []
    runs = _one_run(files, source, notes)
    for run in runs:
        folder = _common(run)
        read = []
        for path in run:
            below = path.parent.absolute().relative_to(folder).as_posix()
            part = _Part(path, "" if below == "." else below)
            try:
                part.survey()
            except UnreadableLog as error:
                notes.append(f"A file was left out: {error}")
                continue
            if part.names:
                read.append(part)
            else:
                notes.append(f"{path.name} holds no scalar that belongs to a step; it was left out.")
        parts.extend(sorted(read, key=lambda part: (part.first, part.path)))
    if not parts:
        raise UnreadableLog(f"{source}: none of its {len(files)} event files holds a scalar.")
    groups = _at_the_same_time(parts)
    for group in groups:
        _share(group, notes)
    if len(groups) > 1 and len(runs) == 1:
        notes.append(f"{source}: {len(parts)} event files of one run were read one after another, in order of time.")
    return groups


def _common(run: Sequence[Path]) -> Path:
    """The folder that all of a run's files lie in or below."""
    return Path(os.path.commonpath([path.parent.absolute() for path in run]))


def _at_the_same_time(parts: Sequence[_Part]) -> list[list[_Part]]:
    """Parts in order of time, grouped where a part overlaps for more than half of the shorter one."""
    groups: list[list[_Part]] = []
    for part in parts:
        for other in groups[-1] if groups else []:
            shared = min(part.last, other.last) - max(part.first, other.first)
            shorter = min(part.last - part.first, other.last - other.first)
            if shared > 0.5 * shorter or (shorter == 0 and shared == 0):
                groups[-1].append(part)
                break
        else:
            groups.append([part])
    return groups


def _share(group: Sequence[_Part], notes: list[str]) -> None:
    """Take each name from one of several writers: from the one that wrote it most often."""
    owner: dict[str, _Part] = {}
    for part in group:
        for name, count in part.names.items():
            if name not in owner or count > owner[name].names[name]:
                owner[name] = part
    for part in group:
        part.without = frozenset(name for name in part.names if owner[name] is not part)
        if part.without:
            twice = sorted(part.without)
            shown = ", ".join(twice[:NAMES_SHOWN]) + (" …" if len(twice) > NAMES_SHOWN else "")
            notes.append(
                f"{part.path.name} was written at the same time as {owner[twice[0]].path.name}; "
                f"what both hold was not read from it: {shown}."
            )


def _one_run(files: Sequence[Path], source: str, notes: list[str]) -> list[list[Path]]:
    """The files of the run that was written last, after those of the runs that it went on from."""
    runs: dict[Path, list[Path]] = {}
    folders = {path.parent for path in files}
    for path in files:
        runs.setdefault(_root(path.parent, folders), []).append(path)
    if len(runs) == 1:
        return [list(files)]
    heads: dict[Path, tuple[float, int, int]] = {}  # run -> time of its newest file; first step and the next one's gap
    for root, members in runs.items():
        seen = [head for path in members if (head := _head(path)) is not None]
        if seen:
            first = min(seen)
            heads[root] = max(seen)[0], first[1], first[2]
    if not heads:
        raise UnreadableLog(f"{source}: none of its {len(files)} event files holds a scalar.")
    newest = max(heads, key=lambda root: (heads[root][0], root))
    chain = [newest]
    # A run whose first step is beyond its first interval was resumed; TensorBoard's writer got a folder of its own.
    while (before := _gone_on_from(chain[0], runs, heads)) is not None:
        chain.insert(0, before)
    if len(chain) > 1:
        names = ", ".join(root.name for root in chain)
        notes.append(f"{source}: {names} were read one after another: each goes on where an earlier one was.")
    others = len(runs) - len(chain)
    if others:
        notes.append(
            f"{source}: {others} other {'run lies' if others == 1 else 'runs lie'} there; "
            f"the one written last, {newest.name}, was read. Give a run's own folder to read another."
        )
    return [runs[root] for root in chain]


def _root(folder: Path, folders: set[Path]) -> Path:
    """The folder of the run to which a folder with event files belongs."""
    while folder.parent in folders:  # sub-folders of `add_scalars`, `add_hparams`
        folder = folder.parent
    if folder.name.lower() in PARTS:
        beside = (other for other in folders if other.parent == folder.parent and other != folder)
        if any(other.name.lower() in PARTS for other in beside):
            return folder.parent
    return folder


def _head(path: Path) -> tuple[float, int, int] | None:
    """(time of the first scalar, its step, steps to the next step) of a file; None if it holds none."""
    start: tuple[float, int] | None = None
    try:
        for time, step, _, _ in _scalars(path, _Tally()):
            if start is None:
                start = time, step
            elif step != start[1]:
                return *start, step - start[1]
    except UnreadableLog:
        pass
    return (*start, 0) if start is not None else None


def _gone_on_from(root: Path, runs: dict[Path, list[Path]], heads: dict[Path, tuple[float, int, int]]) -> Path | None:
    """The newest earlier run in whose middle a run begins."""
    begun, first, gap = heads[root]
    if first <= max(1, gap):
        return None
    earlier = [
        other
        for other, (time, step, _) in heads.items()
        if other.parent == root.parent and time < begun and step < first
    ]
    for other in sorted(earlier, key=lambda other: heads[other], reverse=True):
        reached = max((step for path in runs[other] for _, step, _, _ in _sound(path)), default=0)
        if reached >= first - max(1, gap):
            return other
    return None


def _sound(path: Path) -> Iterator[Measurement]:
    try:
        yield from _scalars(path, _Tally())
    except UnreadableLog:
        return


# ---------------------------------------------------------------------- settings


def _settings_in(record: bytes) -> dict[str, Any]:
    """The settings in an event that holds some."""
    found: dict[str, Any] = {}
    for number, wire, summary in fields(record):
        if number != 5 or wire != BYTES:
            continue
        for value in messages(cast(bytes, summary), 1):
            tags = [tag.decode(errors="replace") for tag in messages(value, 1)]
            if tags == ["args/text_summary"]:
                texts = [text for tensor in messages(value, 8) for text in messages(tensor, 8)]
                try:
                    args = json.loads(texts[0]) if texts else None
                except (ValueError, RecursionError):
                    args = None
                found.update(args if isinstance(args, dict) else {})
            elif tags == ["_hparams_/session_start_info"]:
                for metadata in messages(value, 9):
                    found.update(_hparams(_plugin(metadata)[1]))
    return found


def _hparams(content: bytes) -> dict[str, Any]:
    """Name -> value of HParamsPluginData.session_start_info.hparams."""
    found: dict[str, Any] = {}
    for session in messages(content, 3):
        for entry in messages(session, 1):
            name = b"".join(messages(entry, 1)).decode(errors="replace")
            for value in messages(entry, 2):
                for number, wire, held in fields(value):
                    if number == 2 and wire == FIXED64:
                        found[name] = _F64.unpack(cast(bytes, held))[0]
                    elif number == 3 and wire == BYTES:
                        found[name] = cast(bytes, held).decode(errors="replace")
                    elif number == 4 and wire == VARINT:
                        found[name] = bool(held)
    return found
