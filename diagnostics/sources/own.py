"""Our own run directory: `run.json` and `metrics.jsonl`, read back as they were written."""

from pathlib import Path
from typing import Any

from outspoken.diagnostics.records import MAX_TEXT, Observation, as_number
from outspoken.diagnostics.rundir import METRICS, RUN, read_json
from outspoken.diagnostics.sources.files import Row, UnreadableLog

RECORD = "outspoken.observation/"


def find_run_directory(path: Path) -> Path | None:
    """The run directory that `path` is, or that lies in it as `outspoken/`; None if neither is one."""
    for directory in (path, path / "outspoken"):
        if (directory / RUN).is_file() or (directory / METRICS).is_file():
            return directory
    return None


def read_card(directory: Path) -> dict[str, Any]:
    """`run.json`, {} if there is none.

    Raises:
        UnreadableLog: it is no JSON object.
    """
    path = directory / RUN
    if not path.exists():
        return {}
    try:
        return read_json(path)
    except OSError as error:
        raise UnreadableLog(f"{path}: cannot be read ({error.strerror or error}).") from None
    except ValueError as error:  # which names the file
        raise UnreadableLog(f"{error}.") from None


def is_record(row: Row) -> bool:
    return str(row.get("schema", "")).startswith(RECORD)


def to_observation(record: dict[str, Any]) -> Observation | None:
    """The observation of one line of metrics.jsonl; None if the line has no step."""
    step = as_number(record.get("step"))
    if step is None or step != step or abs(step) == float("inf"):
        return None
    raw: dict[str, Any] = {}
    nonfinite = record.get("nonfinite")
    for name, value in _mapping(record.get("signals")).items():
        raw[name[:MAX_TEXT]] = value
    for name, what in _mapping(nonfinite).items():
        raw[name[:MAX_TEXT]] = float(what) if what in ("nan", "inf", "-inf") else float("nan")
    seen = Observation.from_raw(int(step), raw, as_number(record.get("time")), as_number(record.get("epoch")))
    unreadable = {k[:MAX_TEXT]: str(v)[:MAX_TEXT] for k, v in _mapping(record.get("unreadable")).items()}
    return Observation(
        seen.step, seen.signals, seen.nonfinite, {**seen.unreadable, **unreadable}, seen.time, seen.epoch
    )


def cells(record: dict[str, Any]) -> int:
    """How many signals a line of metrics.jsonl names."""
    return len(
        {*_mapping(record.get("signals")), *_mapping(record.get("nonfinite")), *_mapping(record.get("unreadable"))}
    )


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
