"""What MLflow keeps on disk: the file store `mlruns/`, and the database `mlflow.db`.

File store: `<experiment>/<run>/metrics/<name>` holds a line "timestamp value step" a measurement (timestamp in
milliseconds; without a step it is 0), `params/<name>` the text of a parameter, `meta.yaml` the run. Database: tables
runs, metrics and params; NaN stands there as `is_nan`, an infinity as the largest float.
Sources: MLflow's documentation "Backend stores"; `FileStore` and `SqlAlchemyStore` of mlflow 2.22 and 3.17.
"""

import heapq
import json
import math
import os
import re
import sqlite3
import sys
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from outspoken.diagnostics.sources.files import Row, UnreadableLog, stamp_of
from outspoken.diagnostics.sources.measurements import Axes, Measurement, survey, to_rows

MAX_METRICS = 10_000  # files of one run
MAX_RUNS = 100_000
MAX_PARAMETER = 1024 * 1024  # bytes
MEMORY = 16 * 1024 * 1024  # bytes read at once, shared by a run's metrics
MIN_CHUNK, MAX_CHUNK = 4096, 256 * 1024
MAX_LINE = 4096  # bytes of a line of a metric: a time, a number, a step
MAX_DIGITS = 40

_SQLITE = b"SQLite format 3\0"
_START = re.compile(r"^start_time: *(\d+)", re.MULTILINE)
_DELETED = re.compile(r"^lifecycle_stage: *deleted", re.MULTILINE)
# A damaged database can also make sqlite3 fail at putting its own message into words.
_DAMAGED = (sqlite3.Error, UnicodeDecodeError, OverflowError)
_EXPERIMENT = re.compile(r"^experiment_id:", re.MULTILINE)


# ---------------------------------------------------------------------- what may be asked from outside


def is_mlflow(path: Path) -> bool:
    """Whether this is a run, an experiment or an `mlruns` folder of MLflow, or its database."""
    if not path.is_dir():
        return _is_database(path)
    if _is_run(path) or _is_experiment(path):
        return True
    return path.name == "mlruns" and any(_is_experiment(inner) for inner in _folders(path))


def rows(path: Path, notes: list[str]) -> Iterator[Row]:
    """Rows `{"step": …, "time": …, name: value}` of one run; of several, of the newest that logged a metric.

    Args:
        path: a run's folder, an experiment's, `mlruns`, or an `mlflow.db`.

    Raises:
        UnreadableLog: no run with metrics, or a database that cannot be read.
    """
    if path.is_dir():
        run = _newest_run(path, notes)
        files = _metric_files(run)
        source = str(run)
        tally = _Tally()
        stamps = tuple((name, *stamp_of(file)) for name, file in files)
        axes = _axes_of_files(tuple(files), stamps, source)
        yield from to_rows(_measured(files, tally), axes, source, notes)
    else:
        source = str(path)
        try:
            with closing(_connect(path)) as database:
                chosen = _newest_in(database, path, notes)
                tally = _Tally()
                axes = _axes_of_database(path, stamp_of(path), chosen)
                yield from to_rows(_selected(database, chosen, tally), axes, source, notes)
        except _DAMAGED as error:
            raise _unreadable(path, error) from None
    notes.extend(tally.notes(source))


def settings(path: Path) -> dict[str, Any]:
    """The parameters of that run. MLflow keeps them as texts; numbers, booleans and None are read back."""
    found: dict[str, str] = {}
    if path.is_dir():
        folder = _newest_run(path, []) / "params"
        for name, file in _named_files(folder):
            try:
                with file.open("rb") as handle:
                    found[name] = handle.read(MAX_PARAMETER).decode(errors="replace")
            except OSError:
                continue
    else:
        try:
            with closing(_connect(path)) as database:
                chosen = _newest_in(database, path, [])
                found = dict(database.execute("SELECT key, value FROM params WHERE run_uuid = ?", (chosen,)))
        except _DAMAGED as error:
            raise _unreadable(path, error) from None
    return {name: _meant(text) for name, text in found.items()}


_CONSTANTS = {"True": True, "False": False, "None": None}


def _meant(text: Any) -> Any:
    """What a parameter was before it was written as text: `str(value)` of Python."""
    if not isinstance(text, str):
        return text
    text = text.removesuffix("\n")
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    for kind in (int, float):
        try:
            return kind(text) if len(text) < 100 and "_" not in text else text
        except ValueError:
            continue
    if text.startswith(("[", "{")):
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            pass
    return text


@dataclass
class _Tally:
    """What was met besides measurements."""

    strange: int = 0  # lines or cells that hold none
    torn: int = 0

    def notes(self, source: str) -> list[str]:
        told = []
        if self.torn:
            told.append(f"{source}: the last line of {self.torn} metric{'s' if self.torn > 1 else ''} was cut off.")
        if self.strange:
            told.append(f"{source}: measurements that could not be understood were skipped: {self.strange}.")
        return told


# ---------------------------------------------------------------------- the file store


def _folders(path: Path) -> Iterator[Path]:
    try:
        for number, inner in enumerate(path.iterdir()):
            if number >= MAX_RUNS:
                return
            if inner.is_dir():
                yield inner
    except OSError as error:
        raise UnreadableLog(f"{path}: cannot be listed ({error.strerror or error}).") from None


def _meta(folder: Path) -> str:
    try:
        with (folder / "meta.yaml").open("rb") as handle:
            return handle.read(65536).decode(errors="replace")
    except OSError:
        return ""


def _is_run(folder: Path) -> bool:
    return (folder / "metrics").is_dir() and ((folder / "meta.yaml").is_file() or (folder / "params").is_dir())


def _is_experiment(folder: Path) -> bool:
    return not (folder / "metrics").exists() and bool(_EXPERIMENT.search(_meta(folder)))


def _newest_run(path: Path, notes: list[str]) -> Path:
    """The run that a folder is, or the newest below it that logged a metric."""
    if _is_run(path):
        return path
    experiments = [path] if _is_experiment(path) else [inner for inner in _folders(path) if _is_experiment(inner)]
    runs: list[tuple[int, str, Path]] = []
    for experiment in experiments:
        for folder in _folders(experiment):
            if _is_run(folder):
                meta = _meta(folder)
                start = _START.search(meta)
                if not _DELETED.search(meta):
                    runs.append((int(start.group(1)) if start else 0, folder.name, folder))
    for _, name, folder in sorted(runs, reverse=True):
        if next(_named_files(folder / "metrics"), None) is not None:
            _tell(notes, path, name, len(runs) - 1)
            return folder
    raise UnreadableLog(f"{path}: holds no run of MLflow that logged a metric.")


def _tell(notes: list[str], path: Path, name: str, others: int) -> None:
    if others:
        notes.append(
            f"{path}: the newest run that logged a metric, {name}, was read; "
            f"{others} other{' lies' if others == 1 else 's lie'} there."
        )


def _named_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """(name, file) of each metric or parameter: names with a slash are folders."""
    for place, _, files in os.walk(folder):
        for file in files:
            path = Path(place) / file
            if path.is_file():
                yield path.relative_to(folder).as_posix(), path


def _metric_files(run: Path) -> list[tuple[str, Path]]:
    files: list[tuple[str, Path]] = []
    for found in _named_files(run / "metrics"):
        files.append(found)
        if len(files) > MAX_METRICS:
            raise UnreadableLog(f"{run}: holds more than {MAX_METRICS} metrics.")
    if not files:
        raise UnreadableLog(f"{run}: holds no metric.")
    return sorted(files)


@lru_cache(maxsize=16)
def _axes_of_files(files: tuple[tuple[str, Path], ...], stamps: tuple[Any, ...], source: str) -> Axes:
    """What the steps count: found once for files that did not change since."""
    return survey(lambda: _measured(files, _Tally()), source)


def _measured(files: Iterable[tuple[str, Path]], tally: _Tally) -> Iterator[Measurement]:
    """A run's measurements in order of time, then of step."""
    files = list(files)
    chunk = min(MAX_CHUNK, max(MIN_CHUNK, MEMORY // len(files)))
    for time, step, name, value in heapq.merge(*(_measured_in(name, file, chunk, tally) for name, file in files)):
        yield time / 1000, step, name, value


def _measured_in(name: str, path: Path, chunk: int, tally: _Tally) -> Iterator[tuple[int, int, str, float]]:
    """One metric, from a file that is opened anew for each chunk: a run may have more metrics than open files."""
    at, rest = 0, b""
    while True:
        try:
            with path.open("rb", buffering=0) as handle:
                handle.seek(at)
                data = handle.read(chunk)
        except OSError as error:
            raise UnreadableLog(f"{path}: cannot be read ({error.strerror or error}).") from None
        if not data:
            break
        at += len(data)
        lines = (rest + data).split(b"\n")
        rest = lines.pop()
        if len(rest) > MAX_LINE:
            raise UnreadableLog(f"{path}: holds a line longer than {MAX_LINE} bytes, which no measurement is.")
        for line in lines:
            parts = line.split()
            if any(len(part) > MAX_DIGITS for part in parts[:3]):
                tally.strange += 1
                continue
            try:
                # with five parts, a dataset follows the step
                yield int(parts[0]), int(parts[2]) if len(parts) > 2 else 0, name, float(parts[1])
            except (ValueError, IndexError):
                tally.strange += bool(parts)
    tally.torn += bool(rest.strip())


# ---------------------------------------------------------------------- the database


def _is_database(path: Path) -> bool:
    try:
        with path.open("rb") as handle:
            if handle.read(len(_SQLITE)) != _SQLITE:
                return False
        with closing(_connect(path)) as database:
            return _has_tables(database)
    except (OSError, *_DAMAGED, UnreadableLog):
        return False


def _connect(path: Path) -> sqlite3.Connection:
    """Open a database that is never written to."""
    if not path.is_file():
        raise UnreadableLog(f"{path}: there is no such file.")
    database = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=5)
    database.text_factory = lambda data: data.decode(errors="replace")
    database.execute("PRAGMA trusted_schema = OFF")
    return database


def _unreadable(path: Path, error: Exception) -> UnreadableLog:
    why = " ".join(str(error).split())[:100] if isinstance(error, sqlite3.Error) else "its text is damaged"
    return UnreadableLog(f"{path}: cannot be read as a database ({why}).")


def _has_tables(database: sqlite3.Connection) -> bool:
    # Tables, not views: a view may compute for ever.
    names = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    return {"runs", "metrics", "params"} <= names


def _newest_in(database: sqlite3.Connection, path: Path, notes: list[str]) -> str:
    """The id of the newest run that logged a metric."""
    if not _has_tables(database):
        raise UnreadableLog(f"{path}: is a database, but not of MLflow (it has no tables runs, metrics and params).")
    runs = database.execute(
        "SELECT run_uuid, name, start_time FROM runs WHERE lifecycle_stage IS NOT 'deleted' ORDER BY start_time DESC"
    ).fetchmany(MAX_RUNS)
    for run, name, _ in runs:
        if database.execute("SELECT 1 FROM metrics WHERE run_uuid = ? LIMIT 1", (run,)).fetchone():
            _tell(notes, path, str(name or run)[:80], len(runs) - 1)
            return str(run)
    raise UnreadableLog(f"{path}: holds no run that logged a metric.")


@lru_cache(maxsize=16)
def _axes_of_database(path: Path, stamp: tuple[int, int], run: str) -> Axes:
    """What the steps count: found once for a database that did not change since."""
    with closing(_connect(path)) as database:
        return survey(lambda: _selected(database, run, _Tally()), str(path))


def _selected(database: sqlite3.Connection, run: str, tally: _Tally) -> Iterator[Measurement]:
    found = database.execute(
        "SELECT timestamp, step, key, value, is_nan FROM metrics WHERE run_uuid = ? ORDER BY timestamp, step, key",
        (run,),
    )
    largest = sys.float_info.max
    for time, step, name, value, is_nan in found:
        if is_nan:
            value = math.nan
        elif not isinstance(value, (int, float)):
            tally.strange += 1
            continue
        elif value >= largest or value <= -largest:
            value = math.copysign(math.inf, value)
        if not (isinstance(time, (int, float)) and isinstance(step, int) and isinstance(name, str)):
            tally.strange += 1
            continue
        yield time / 1000, step, name, float(value)
