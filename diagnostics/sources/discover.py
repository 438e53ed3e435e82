"""Which log of a directory to read."""

import os
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path

from outspoken.diagnostics.sources import mlflow_files, wandb_files
from outspoken.diagnostics.sources.files import UnreadableLog
from outspoken.diagnostics.sources.formats import process_files

MAX_ENTRIES = 20_000  # of a directory tree that is looked through
MAX_DEPTH = 8  # folders below it
OTHERS_SHOWN = 5

# What to look for, best first: what is written once per logged step and loses nothing comes first. Of several matches
# of one pattern the newest is taken.
_PATTERNS = (
    "trainer_state.json",
    "metrics.jsonl",
    "checkpoint-*/trainer_state.json",
    "trainer_log.jsonl",
    "log.jsonl",
    "log.jsonl.gz",
    "metrics.csv",
    "lightning_logs/version_*/metrics.csv",
    "version_*/metrics.csv",
    "monitors/file/metrics.jsonl",
    "orchestrator/metrics.jsonl",
    "trainer/metrics.jsonl",
    "*/metrics.jsonl",
    "streams/stats*/**/*.jsonl",
    "log_*.jsonl",
    "log_*.txt",
    "*.jsonl",
    "*.wandb",
    "wandb/latest-run",
    "wandb/run-*",
    "wandb/offline-run-*",
    "runs/*/*tfevents*",
    "**/*tfevents*",
    "mlruns",
    "mlflow.db",
    "*.log",
    "*.out",
    "*.csv",
)
_NOT_LOGS = (
    "completions",
    "dataset",
    "data",
    "samples",
    "eval_results",
    "checkpoints.jsonl",
    "timing_spans",
    "trace_",
)
_NOT_RUNS = ("node_modules", "site-packages", "__pycache__")


def find_log(directory: Path, notes: list[str]) -> Path:
    """The log to read of a directory, which may itself be a run of W&B, MLflow or TensorBoard.

    Raises:
        UnreadableLog: there is none.
    """
    if wandb_files.is_wandb_directory(directory) or mlflow_files.is_mlflow(directory):
        return directory
    if len(process_files(directory)) > 1:
        return directory
    found: list[Path] = []
    for pattern in _PATTERNS:
        matches = sorted(_matches(directory, pattern), key=_newness, reverse=True)
        if matches and "tfevents" in pattern:
            # Event files are read together: a run that was resumed has several folders.
            found.append(directory / "runs" if pattern.startswith("runs/") else directory)
        else:
            found.extend(matches[:1] if pattern.startswith("checkpoint-") else matches)
    once: dict[Path, Path] = {}  # wandb/latest-run is a link
    for path in found:
        once.setdefault(path.resolve(), path)
    found = list(once.values())
    if not found:
        raise UnreadableLog(
            f"{directory}: holds no log of a usual name (trainer_state.json, metrics.jsonl, *.log …); give the file itself."
        )
    if len(found) > 1:
        names = [str(path.relative_to(directory)) for path in found[1:] if path != directory]
        if names and found[0] != directory:
            more = len(names) - OTHERS_SHOWN
            shown = ", ".join(names[:OTHERS_SHOWN]) + (f" and {more} more" if more > 0 else "")
            notes.append(f"Read {found[0].relative_to(directory)}; also there: {shown}.")
    return found[0]


def _matches(directory: Path, pattern: str) -> Iterator[Path]:
    try:
        for path in islice(_glob(directory, pattern), MAX_ENTRIES):
            if not path.name.startswith(_NOT_LOGS) and _size(path) > 0:
                yield path
    except OSError:  # a folder that went away, or that may not be read
        return


def _glob(directory: Path, pattern: str) -> Iterable[Path]:
    """As `Path.glob`, but a `**` looks at so many entries at most, and not into what belongs to no run."""
    start, deep, name = pattern.partition("**/")
    if not deep:
        return directory.glob(pattern)
    starts = directory.glob(start) if start else [directory]
    return (path for folder in starts for path in _below(folder) if fnmatch(path.name, name))


def _below(folder: Path) -> Iterator[Path]:
    looked_at, depth = 0, len(folder.parts)
    for place, folders, files in os.walk(folder):
        looked_at += len(folders) + len(files)
        if looked_at > MAX_ENTRIES:
            return
        here = Path(place)
        far = len(here.parts) - depth >= MAX_DEPTH
        folders[:] = [] if far else sorted(f for f in folders if not f.startswith(".") and f not in _NOT_RUNS)
        yield from (here / name for name in files)


def _size(path: Path) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def _newness(path: Path) -> tuple[int, float, str]:
    """Checkpoints by their step, all else by when it was written."""
    _, _, number = path.parent.name.rpartition("checkpoint-")
    try:
        return (int(number) if number.isdigit() else -1, path.stat().st_mtime, path.name)
    except OSError:
        return (-1, 0.0, path.name)
