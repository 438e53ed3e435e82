"""Diagnose a run after the fact: read its log, replay it through the engine, report.

The record that comes out is `outspoken.report/1` (docs/architecture.md). A run directory of ours is reported as it was
recorded, without a replay, unless one is asked for.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from outspoken.diagnostics import rundir
from outspoken.diagnostics.engine import Engine
from outspoken.diagnostics.records import SEVERITIES
from outspoken.diagnostics.rules.registry import ANY_METHOD
from outspoken.diagnostics.sources import LoggedRun, UnreadableLog, read, read_config
from outspoken.diagnostics.sources.files import listed
from outspoken.diagnostics.sources.own import find_run_directory

SCHEMA = "outspoken.report/1"
STATES = ("firing", "suppressed", "pending", "unknown", "resolved")  # the order of a report


def diagnose(
    path: str | Path,
    config: str | Path | Mapping[str, Any] | None = None,
    method: str | None = None,
    format: str | None = None,
    params: Mapping[str, Mapping[str, Any]] | None = None,
    ignore: Iterable[str] = (),
    replay: bool = False,
) -> dict[str, Any]:
    """The report on a run.

    Args:
        path: a log that `sources.read` reads, or a run directory.
        config: settings by field name or a YAML or JSON file of them. Many rules cannot judge without.
        method: "grpo", "sft", "dpo" …; else what the log speaks for.
        format: one of `sources.FORMATS`; else what the content says.
        params, ignore: as for `Engine`.
        replay: judge a run directory anew instead of reporting what its run recorded. Settings that are given
            (`config`, `method`, `params`, `ignore`) do so too.

    Raises:
        UnreadableLog: there is nothing to read; one sentence names the file, and the line if any.
        ValueError: `method`, `params` or `ignore` name what does not exist.
    """
    if method is not None and method not in ANY_METHOD:
        raise ValueError(f"method {method!r} is not known; choose one of {', '.join(ANY_METHOD)}")
    path, ignore = Path(path), tuple(ignore)
    anew = replay or config is not None or method is not None or bool(params) or bool(ignore)
    directory = find_run_directory(path) if path.is_dir() else None
    if directory is not None and not anew and (directory / rundir.VERDICT).is_file():
        return recorded(directory)
    run = read(path, format=format, config=config, method=method)
    return replayed(run, params=params, ignore=ignore, given=read_config(config))


# ---------------------------------------------------------------------- replay


@dataclass
class _Clock:
    """The time of the log where it has one, so that a report does not depend on when it was made."""

    now: float = field(default_factory=time.time)

    def __call__(self) -> float:
        return self.now


def replayed(
    run: LoggedRun,
    params: Mapping[str, Mapping[str, Any]] | None = None,
    ignore: Iterable[str] = (),
    given: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The report on a log, judged by replaying every observation. `given` settings win over recorded ones."""
    clock = _Clock()
    configs = _configs(run, Path(run.path).parent, given or {}) if run.format == "run_directory" else {}
    engine = engine_for(run, params, ignore, clock, configs.get(0))
    starts = {segment.first: segment for segment in run.segments[1:]}
    for i, observation in enumerate(run.observations):
        if i in starts:
            engine.open_segment(observation.step, starts[i].reason, configs.get(i))
        if observation.time is not None:
            clock.now = observation.time
        engine.observe(observation)
    engine.finish()
    notes = []
    if not run.config_known:
        notes.append(_on_settings(run.config))
    notes.extend(f"Rule {code} failed: {why}" for code, why in engine.failed_rules().items())
    return _report(
        source={
            "path": run.path,
            "format": run.format,
            "rows": len(run.rows),
            "first_step": run.observations[0].step,
            "last_step": run.observations[-1].step,
            "signals": run.signals,
            "notes": run.notes,
        },
        run=_run_id(run),
        method=run.method,
        config_known=run.config_known,
        verdict=engine.verdict(),
        diagnostics=list(engine.diagnostics().values()),
        not_checked=engine.not_checked(),
        notes=notes,
    )


def _on_settings(known: Mapping[str, Any]) -> str:
    names = sorted(known.keys() - {"points_per_log"})
    if not names:
        return "The settings of the run are not known; what depends on them was not judged. Give --config."
    return f"Of the run's settings these are known: {listed(names, 6)}; what depends on others was not judged. Give --config."


def engine_for(
    run: LoggedRun,
    params: Mapping[str, Mapping[str, Any]] | None = None,
    ignore: Iterable[str] = (),
    clock: Callable[[], float] = time.time,
    config: Mapping[str, Any] | None = None,
) -> Engine:
    """An engine that judges a log. `config`: settings at its start, where they are not those of the whole run."""
    return Engine(
        method=run.method,
        config=run.config if config is None else config,
        facts=run.facts,
        params=params,
        ignore=ignore,
        total_steps=run.total_steps,
        run_id=_run_id(run) or "log",
        source="log",
        clock=clock,
    )


def _run_id(run: LoggedRun) -> str | None:
    return _text(_card(Path(run.path).parent).get("id")) if run.format == "run_directory" else None


def _configs(run: LoggedRun, directory: Path, given: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """Index of a segment's first observation -> the config of that segment, from the changes that were recorded.

    run.json holds the config as it is at the end, so the changes are undone from the last to the first.
    """
    records, _ = rundir.read_jsonl(directory / rundir.CHANGES)
    steps: dict[int, dict[str, Any]] = {}  # segment -> field -> value before it
    for record in records:
        fields = record.get("fields")
        segment = record.get("segment")
        if record.get("state") not in ("applied", "rolled_back") or not isinstance(fields, dict):
            continue
        if isinstance(segment, int):
            # a rollback set back to "old" what its change had set to "new"
            before = "old" if record["state"] == "applied" else "new"
            back = {name: v.get(before) for name, v in fields.items() if isinstance(v, dict)}
            steps[segment] = {**back, **steps.get(segment, {})}
    config = dict(run.config)
    configs: dict[int, dict[str, Any]] = {}
    firsts = dict(zip(run.segment_numbers, (segment.first for segment in run.segments)))
    for number in sorted({*steps, *firsts}, reverse=True):
        if number in firsts:
            configs[firsts[number]] = {**config, **given}
        config = {**config, **steps.get(number, {})}
    return configs


# ---------------------------------------------------------------------- what a run recorded


def recorded(directory: Path) -> dict[str, Any]:
    """The report on a run directory as its run recorded it, whether the run still trains or not.

    Raises:
        UnreadableLog: its verdict is not readable.
    """
    card = _card(directory)
    try:
        verdict = rundir.read_json(directory / rundir.VERDICT)
    except OSError as error:
        raise UnreadableLog(
            f"{directory / rundir.VERDICT}: cannot be read ({error.strerror or error}); judge anew with --replay."
        ) from None
    except ValueError as error:  # which names the file
        raise UnreadableLog(f"{error}; judge anew with --replay.") from None
    lines, notes = rundir.read_jsonl(directory / rundir.DIAGNOSTICS)
    latest = {str(line.get("code")): line for line in lines if line.get("code") and line.get("state")}
    first, rows, names = None, 0, []
    try:
        run = read(directory)
        first, rows, names = run.observations[0].step, len(run.rows), run.signals
        notes = [*notes, *run.notes]
    except UnreadableLog as error:
        notes = [*notes, str(error)]
    step = verdict.get("step")
    return _report(
        source={
            "path": str(directory),
            "format": "run_directory",
            "rows": rows,
            "first_step": first,
            "last_step": step if isinstance(step, int) and first is not None else None,
            "signals": names,
            "notes": notes,
        },
        run=_text(card.get("id")),
        method=_text(card.get("method")) or "unknown",
        config_known=isinstance(card.get("config"), dict),
        verdict=verdict,
        diagnostics=list(latest.values()),
        not_checked=[],
        notes=[
            "As the run recorded it. A replay (--replay) judges it anew and lists what could not be checked.",
            *([f"The run is {card['status']}."] if isinstance(card.get("status"), str) else []),
        ],
    )


def _card(directory: Path) -> dict[str, Any]:
    try:
        return rundir.read_json(directory / rundir.RUN)
    except (OSError, ValueError):
        return {}


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


# ---------------------------------------------------------------------- the record


def _rank(record: Mapping[str, Any]) -> tuple[int, int, Any]:
    state, severity = record.get("state"), record.get("severity")
    onset = record.get("onset_step")
    return (
        STATES.index(state) if state in STATES else len(STATES),
        SEVERITIES.index(severity) if severity in SEVERITIES else len(SEVERITIES),
        onset if isinstance(onset, int) else 0,
    )


def _report(
    *,
    source: Mapping[str, Any],
    run: str | None,
    method: str,
    config_known: bool,
    verdict: Mapping[str, Any],
    diagnostics: Sequence[Mapping[str, Any]],
    not_checked: Sequence[Mapping[str, str]],
    notes: Sequence[str],
) -> dict[str, Any]:
    record: dict[str, Any] = rundir.plain(
        {
            "schema": SCHEMA,
            "source": source,
            "run": run,
            "method": method,
            "config_known": config_known,
            "verdict": verdict,
            "diagnostics": sorted(diagnostics, key=_rank),
            "not_checked": list(not_checked),
            "notes": list(notes),
        }
    )
    return record
