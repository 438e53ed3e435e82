"""The run directory: where one run writes what it saw, and where agents ask for changes. Writer and readers.

Only rank 0 writes. Every line is one `write` to a file opened for appending, so it survives `kill -9`; a line torn by
a crash stays alone and readers skip it. A directory that cannot be written never stops training. Nothing read
from here is executed or unpickled.
"""

import contextlib
import errno
import json
import logging
import math
import os
import re
import socket
import stat
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from numbers import Integral
from pathlib import Path
from typing import Any, BinaryIO

from outspoken import schemas
from outspoken.diagnostics.records import MAX_TEXT, Expectation, Observation, as_number

RUN, VERDICT = "run.json", "verdict.json"
METRICS, DIAGNOSTICS, CHANGES = "metrics.jsonl", "diagnostics.jsonl", "changes.jsonl"
CONTROL = "control"
EARLIER = "earlier"  # where the files of runs go that used the directory before

HEARTBEAT_SECONDS = 10.0  # run.json is rewritten at most so often
RETRY_WRITES, RETRY_SECONDS = 50, 30.0  # how often a directory that failed is tried again
MAX_REQUEST_BYTES = 1_000_000
MAX_JSON_BYTES = 64_000_000  # of run.json and verdict.json
MAX_LINE_BYTES = 8_000_000  # no line of ours is longer; readers skip what is
MAX_RECORD_TEXT = 2000  # characters of a text in a record
MAX_CONFIG_TEXT = 20_000  # … and in run.json, whose config may hold a chat template
MAX_DEPTH = 40

_encode = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode
_log = logging.getLogger("outspoken")


@dataclass(frozen=True)
class BadRequest:
    """A file in `control/` that is no request: it is rejected under this id, for this reason."""

    id: str
    reason: str
    path: Path


# ---------------------------------------------------------------------- writing


class RunDirectory:
    """Writes a run directory. No method raises for what the file system does: see `problem`.

    Args:
        path: the directory, by convention `<output_dir>/outspoken`. It is made if it is not there.
        resume: append to the run that is there. Otherwise its files are first moved to `earlier/<its id>/`.
        say: is told, once each, when writing fails and when it works again. Default: the logger "outspoken".

    Attributes:
        problem: why the directory cannot be written now, or None.
        lost_lines: lines that could not be written so far.
    """

    def __init__(self, path: str | Path, resume: bool = True, say: Callable[[str], None] | None = None):
        self.path = Path(os.path.abspath(path))
        self.control = self.path / CONTROL
        self.problem: str | None = None
        self.lost_lines = 0
        self._say = say or _log.warning
        self._fds: dict[str, int] = {}
        self._skipped = 0  # writes given up since the last try
        self._tried = 0.0
        self._run: dict[str, Any] = {}
        self._beat = -math.inf
        self._recorded: set[str] = set()  # ids that changes.jsonl has beyond `requested`
        self._handled: set[str] = set()  # ids that the trainer has dealt with
        self._inbox: dict[str, Path] = {}  # id -> its file in control/
        self._resume = resume
        self._started = False
        self._try(self._open)

    # -- records

    def write_run(self, record: Mapping[str, Any]) -> bool:
        """Replace run.json. Says whether it was written."""
        self._run = {"process": this_process(), **record}
        self._beat = time.monotonic()
        return self._try(self._replace_run)

    def heartbeat(self, step: int) -> None:
        """Note in run.json that the run is alive and at which step; at most every `HEARTBEAT_SECONDS`."""
        if not self._run:
            return
        self._run["step"] = step
        now = time.monotonic()
        if now - self._beat >= HEARTBEAT_SECONDS:
            self._beat = now
            self._run["heartbeat"] = time.time()
            self._try(lambda: self._replace_run(to_disk=False))

    def write_verdict(self, record: Mapping[str, Any]) -> bool:
        """Replace verdict.json. Says whether it was written."""
        return self._try(lambda: self._replace(VERDICT, _encode(plain(record))))

    def append_observation(self, observation: Observation, segment: int) -> bool:
        """Add a line to metrics.jsonl. Says whether it was written."""
        return self._append(METRICS, _observation_line(observation, segment))

    def append_diagnostic(self, record: Mapping[str, Any]) -> bool:
        """Add a transition to diagnostics.jsonl. Says whether it was written."""
        return self._append(DIAGNOSTICS, _encode(plain(record)))

    def append_change(self, record: Mapping[str, Any]) -> bool:
        """Add a transition to changes.jsonl. Says whether it was written."""
        written = self._append(CHANGES, _encode(plain(record)))
        if written and record.get("state") != "requested":
            self._recorded.add(str(record.get("id")))
        return written

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds = {}

    # -- requests

    def requests(self) -> Iterator[dict[str, Any] | BadRequest]:
        """What agents ask for in `control/`, oldest first (by name). Each comes until `done` is called for its id.

        A request that changes.jsonl has beyond `requested` was dealt with before a crash: its file is only removed.
        While the directory cannot be written, requests wait: what is done about them could not be recorded.
        """
        if self.problem is not None:
            return
        try:
            names = sorted(name for name in os.listdir(self.control) if name.endswith(".json") and name[0] != ".")
        except OSError:
            return
        for name in names:
            request_id, path = _request_id(name), self.control / name
            if request_id in self._recorded:
                _remove(path)
            elif request_id not in self._handled:
                self._inbox[request_id] = path
                try:
                    yield read_request(path)
                except (OSError, ValueError) as error:
                    yield BadRequest(request_id, str(error)[:MAX_TEXT], path)

    def done(self, request_id: str) -> None:
        """The request was dealt with: it is not handed out again, and its file goes once changes.jsonl says so."""
        self._handled.add(request_id)
        path = self._inbox.pop(request_id, None)
        if path is not None and request_id in self._recorded:
            _remove(path)

    # -- the file system

    def _append(self, name: str, line: str) -> bool:
        data = (line + "\n").encode()
        written = self._try(lambda: self._write(name, data))
        if not written:
            self.lost_lines += 1
        return written

    def _write(self, name: str, data: bytes) -> None:
        if name in self._fds and os.fstat(self._fds[name]).st_nlink == 0:  # what we wrote there would be lost
            self._say(f"{self.path / name} was deleted while the run trains; it is started anew.")
            self.close()
        if name not in self._fds:
            self._open()
        size = os.write(self._fds[name], data)
        if size < len(data):  # the disk took a part; opening again ends the torn line
            raise OSError(f"only {size} of {len(data)} bytes were written to {name}")

    def _open(self) -> None:
        self.close()
        if not self._started and not self._resume:
            _move_aside(self.path)
        self.control.mkdir(parents=True, exist_ok=True)
        for name in (METRICS, DIAGNOSTICS, CHANGES):
            self._fds[name] = _open_to_append(self.path / name)
        if not self._started:
            changes, _ = read_jsonl(self.path / CHANGES)
            self._recorded = {str(c.get("id")) for c in changes if c.get("state") != "requested"}
            self._started = True
        if self._run and not (self.path / RUN).exists():
            self._replace_run()

    def _replace_run(self, to_disk: bool = True) -> None:
        self._replace(RUN, _encode(plain(self._run, MAX_CONFIG_TEXT)), to_disk)

    def _replace(self, name: str, text: str, to_disk: bool = False) -> None:
        """Put a whole new file in the old one's place. `to_disk` waits for the disk (milliseconds, or more)."""
        if not self.path.is_dir():
            self._open()
        temporary = self.path / f".{name}.{os.getpid()}"
        try:
            with open(temporary, "wb") as file:
                file.write(text.encode() + b"\n")
                file.flush()
                if to_disk:
                    os.fsync(file.fileno())
            os.replace(temporary, self.path / name)
        except OSError:
            _remove(temporary)
            raise

    def _try(self, action: Callable[[], None]) -> bool:
        """Do it, or keep why not. After a failure most calls give up at once; now and then one tries again."""
        if self.problem is not None:
            self._skipped += 1
            if self._skipped < RETRY_WRITES and time.monotonic() - self._tried < RETRY_SECONDS:
                return False
        try:
            action()
        except OSError as error:
            self._failed(error)
            return False
        if self.problem is not None:
            self._recovered()
        return True

    def _failed(self, error: OSError) -> None:
        self._skipped, self._tried = 0, time.monotonic()
        try:
            self.close()
        except OSError:
            self._fds = {}
        first = self.problem is None
        self.problem = (
            f"The run directory {self.path} cannot be written ({str(error)[:MAX_TEXT]}). Training goes on; "
            "what happens until it can be written again is not recorded."
        )
        if first:
            self._say(self.problem)

    def _recovered(self) -> None:
        self.problem, self._skipped = None, 0
        self._say(f"The run directory {self.path} can be written again; {self.lost_lines} lines were lost so far.")
        if self._run:
            self._try(self._replace_run)


def _open_to_append(path: Path) -> int:
    # O_NONBLOCK: opening a pipe that somebody put there must fail, not wait.
    fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o644)
    try:
        size = os.fstat(fd).st_size
        if size and os.pread(fd, 1, size - 1) != b"\n":
            os.write(fd, b"\n")  # a crash tore the last line: end it, so that it spoils no other
    except OSError:
        os.close(fd)
        raise
    return fd


def _move_aside(path: Path) -> None:
    """Move the files of the run that used the directory before to `earlier/<its id>/`."""
    present = [name for name in (RUN, VERDICT, METRICS, DIAGNOSTICS, CHANGES, CONTROL) if (path / name).exists()]
    if not present:
        return
    try:
        old_id = _safe_name(str(read_json(path / RUN).get("id")))
    except (OSError, ValueError):
        old_id = "unknown"
    target, n = path / EARLIER / old_id, 1
    while target.exists():
        n += 1
        target = path / EARLIER / f"{old_id}-{n}"
    target.mkdir(parents=True)
    for name in present:
        os.rename(path / name, target / name)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):  # gone already, or not ours to remove; it is not handed out again
        path.unlink()


def _safe_name(name: str) -> str:
    """A name for a file or an id: itself if it is plain, else its plain characters and a checksum."""
    if re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}", name):
        return name
    return f"{re.sub(r'[^A-Za-z0-9_-]', '_', name)[:80]}-{zlib.crc32(name.encode(errors='replace')):08x}"


def _request_id(file_name: str) -> str:
    return _safe_name(file_name.removesuffix(".json"))


# ---------------------------------------------------------------------- records as lines


def _observation_line(observation: Observation, segment: int) -> str:
    """The observation as one line of strict JSON. Fast for what a trainer hands over, right for anything."""
    signals = observation.signals
    try:
        numbers = dict(zip(signals, map(float, signals.values())))
        if observation.nonfinite:
            numbers.update(dict.fromkeys(observation.nonfinite))  # type: ignore[arg-type]
        if max(map(len, numbers), default=0) <= MAX_TEXT:
            return _encode(
                {
                    "schema": "outspoken.observation/1",
                    "step": observation.step,
                    "time": observation.time,
                    "epoch": observation.epoch,
                    "segment": segment,
                    "signals": numbers,
                    "nonfinite": dict(observation.nonfinite),
                    "unreadable": {name[:MAX_TEXT]: text[:MAX_TEXT] for name, text in observation.unreadable.items()},
                }
            )
    except (TypeError, ValueError, OverflowError, AttributeError):
        pass
    sorted_out = Observation.from_raw(observation.step, {str(k)[:MAX_TEXT]: v for k, v in signals.items()})
    nonfinite = {**sorted_out.nonfinite, **{str(k)[:MAX_TEXT]: v for k, v in observation.nonfinite.items()}}
    record = {
        "schema": "outspoken.observation/1",
        "step": observation.step,
        "time": observation.time,
        "epoch": observation.epoch,
        "segment": segment,
        "signals": {**sorted_out.signals, **dict.fromkeys(nonfinite)},
        "nonfinite": nonfinite,
        "unreadable": {**sorted_out.unreadable, **observation.unreadable},
    }
    return _encode(plain(record, MAX_TEXT))


def plain(value: Any, max_text: int = MAX_RECORD_TEXT, _depth: int = 0) -> Any:
    """The value as strict, bounded JSON: long texts cut, non-finite numbers null, what JSON lacks as its repr."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Enum):
        return plain(value.value, max_text, _depth)
    if isinstance(value, str):
        return value if len(value) <= max_text else value[: max_text - 1] + "…"
    if isinstance(value, Integral):
        return int(value) if abs(int(value)) < 2**1023 else None
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if _depth >= MAX_DEPTH:
        return plain(repr(type(value)), max_text)
    if isinstance(value, Mapping):
        return {str(k)[:MAX_TEXT]: plain(v, max_text, _depth + 1) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v, max_text, _depth + 1) for v in value]
    if isinstance(value, set | frozenset):
        return sorted((plain(v, max_text, _depth + 1) for v in value), key=repr)
    try:
        number = as_number(value)
        return plain(repr(value) if number is None else number, max_text, _depth)
    except Exception:  # a foreign object's own methods; a record must not stop a run
        return f"<{type(value).__name__}>"


# ---------------------------------------------------------------------- reading


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no JSON object; the message names the file.
    """
    with _regular(path) as file:
        data = file.read(MAX_JSON_BYTES + 1)
    record = f"it is longer than {MAX_JSON_BYTES} bytes" if len(data) > MAX_JSON_BYTES else _object(data)
    if isinstance(record, str):
        raise ValueError(f"{path} is no JSON object: {record}")
    return record


def _regular(path: str | Path) -> BinaryIO:
    """A file opened to be read.

    Raises:
        OSError: it cannot be opened, or is a pipe or device, which might never end.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "is no regular file", str(path))
    return open(path, "rb")


def read_jsonl(path: str | Path, since_line: int = 0) -> tuple[list[dict[str, Any]], list[str]]:
    """The records of a file of JSON lines, from line number `since_line` (the first is 0), and notes.

    A line that is torn, too long or no JSON object is skipped with a note that names file and line. A file that is
    not there has no records. Memory is that of the records.

    Raises:
        OSError: the file is there and cannot be read.
    """
    tail = Tail(path)
    records, notes = tail.read(since_line)
    rest, torn = tail.last_torn()
    if rest is not None and tail.line >= since_line:
        records.append(rest)
    return records, notes + torn


class Tail:
    """Reads a growing file of JSON lines: each `read` returns the records and notes of the complete new lines.

    `line` counts the lines consumed.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.line = 0
        self._offset = 0

    def read(self, since_line: int = 0) -> tuple[list[dict[str, Any]], list[str]]:
        records: list[dict[str, Any]] = []
        notes: list[str] = []
        try:
            file = _regular(self.path)
        except FileNotFoundError:
            return records, notes
        with file:
            if file.seek(0, os.SEEK_END) < self._offset:  # another file than before
                self.line = self._offset = 0
            file.seek(self._offset)
            while line := _read_line(file):
                if not line.endswith(b"\n"):
                    break  # not complete yet
                self.line += 1
                self._offset = file.tell()
                if self.line <= since_line or not line.strip():
                    continue
                record = _object(line)
                if isinstance(record, str):
                    notes.append(f"{self.path.name} line {self.line}: skipped, {record}")
                else:
                    records.append(record)
        return records, notes

    def last_torn(self) -> tuple[dict[str, Any] | None, list[str]]:
        """The record after the last line end, if it is whole; else a note on it, if anything stands there."""
        try:
            with _regular(self.path) as file:
                file.seek(self._offset)
                rest = file.read(MAX_LINE_BYTES)
        except FileNotFoundError:
            return None, []
        if not rest.strip():
            return None, []
        record = _object(rest)
        if isinstance(record, str):
            return None, [f"{self.path.name} line {self.line + 1}: skipped, its end is torn off"]
        return record, []


def _read_line(file: BinaryIO) -> bytes:
    """The next line; of one that is too long only the end, so that memory stays bounded."""
    line = file.readline(MAX_LINE_BYTES)
    if len(line) < MAX_LINE_BYTES or line.endswith(b"\n"):
        return line
    while True:
        more = file.readline(MAX_LINE_BYTES)
        if not more:
            return b"too long"
        if more.endswith(b"\n"):
            return b"too long\n"


def _object(data: bytes) -> dict[str, Any] | str:
    """The JSON object in `data`, or why there is none."""
    if data == b"too long\n":
        return f"it is longer than {MAX_LINE_BYTES} bytes"
    try:
        record = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError:
        return "it is not UTF-8 text"
    except RecursionError:
        return "it is nested too deeply"
    except ValueError as error:
        return f"it is no JSON ({error})"[:MAX_TEXT]
    return record if isinstance(record, dict) else f"it is a JSON {type(record).__name__}, not an object"


def last_line(path: str | Path) -> dict[str, Any] | None:
    """The last complete record of a file of JSON lines, found from its end; None if there is none."""
    try:
        with _regular(path) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1_000_000))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return None
    for line in reversed(lines[:-1]):
        if line.strip() and isinstance(record := _object(line), dict):
            return record
    return None


def read_request(path: str | Path) -> dict[str, Any]:
    """The request in a file of `control/`, checked against its schema.

    Raises:
        OSError, ValueError: it is no regular file, too large, or no valid request; the message says which.
    """
    path = Path(path)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if path.is_symlink():
            raise ValueError(f"{path.name} is a symbolic link, not a file") from None
        raise ValueError(f"{path.name} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ValueError(f"{path.name} is no regular file")
    with open(fd, "rb") as file:
        data = file.read(MAX_REQUEST_BYTES + 1)
    if len(data) > MAX_REQUEST_BYTES:
        raise ValueError(f"{path.name} is larger than {MAX_REQUEST_BYTES} bytes")
    record = _object(data)
    if isinstance(record, str):
        raise ValueError(f"{path.name} is no request: {record}")
    schemas.validate(record, "request")
    if record["id"] != path.name.removesuffix(".json"):
        raise ValueError(f"{path.name} holds the request {record['id']!r}; file and request must have one id")
    if record["expect"] is not None:
        record["expect"].setdefault("min_n", Expectation.min_n)
    return record


# ---------------------------------------------------------------------- alive or dead

MIN_SILENCE, SILENT_STEPS = 300.0, 20  # a heartbeat this old (seconds, mean step times) counts as death
SAME_PROCESS = 60.0  # seconds that a process's time of creation may seem to move when the clock is set


def this_process() -> dict[str, Any]:
    """Who writes: machine (or container) and process id, with the process's time of creation."""
    import psutil

    return {"host": _host(), "pid": os.getpid(), "created": psutil.Process().create_time()}


def _host() -> str:
    """A name that two processes share exactly if they see each other's process ids."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + "/" + os.readlink("/proc/self/ns/pid")
    except OSError:
        return socket.gethostname()


def is_alive(run: Mapping[str, Any], now: float | None = None) -> bool:
    """Whether the run of a run record still trains.

    On the writer's machine its process tells. Elsewhere the heartbeat does, which comes between steps: silence for
    five minutes and twenty mean step times counts as death.
    """
    if run.get("status") != "running":
        return False
    process = run.get("process")
    if isinstance(process, Mapping) and process.get("host") == _host():
        import psutil

        try:
            found = psutil.Process(int(process["pid"]))
            if found.status() == psutil.STATUS_ZOMBIE:
                return False
            created = process.get("created")
            return created is None or abs(found.create_time() - float(created)) < SAME_PROCESS
        except psutil.AccessDenied:
            return True
        except (psutil.Error, KeyError, TypeError, ValueError, OverflowError):
            return False
    heartbeat, started, step = (as_number(run.get(key)) for key in ("heartbeat", "started", "step"))
    if heartbeat is None:
        return False
    per_step = max(0.0, heartbeat - (heartbeat if started is None else started)) / max(1.0, step or 0.0)
    return (time.time() if now is None else now) - heartbeat < max(MIN_SILENCE, SILENT_STEPS * per_step)
