"""`outspoken watch`: follow a run that trains, from any terminal."""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from outspoken.cli.common import (
    BAD,
    CANNOT_JUDGE,
    FINE,
    CommandError,
    is_bad,
    most_important,
    note,
    parameters,
    print_json,
)

if TYPE_CHECKING:
    from outspoken.agent_api.run import Run
    from outspoken.diagnostics.follow import Follower
    from outspoken.diagnostics.rundir import Tail
    from outspoken.diagnostics.sinks import Sink


def watch(
    path: Annotated[
        str,
        typer.Argument(metavar="PATH", help="A run directory, or any log that `diagnose` reads and that still grows."),
    ],
    interval: Annotated[float, typer.Option(min=0.05, help="Seconds between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Tell what happened so far, and stop.")] = False,
    timeout: Annotated[
        float | None,
        typer.Option(min=0.0, metavar="SECONDS", help="Of a log: stop when nothing was written for so long."),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Of a log: the run's settings (YAML or JSON), where it lacks them."),
    ] = None,
    method: Annotated[str | None, typer.Option(help="Of a log: grpo, sft, dpo …; otherwise told from it.")] = None,
    format: Annotated[
        str | None, typer.Option(help="Of a log: its format or system, where its content does not tell.")
    ] = None,
    param: Annotated[
        list[str] | None, typer.Option(metavar="CODE.NAME=NUMBER", help="Of a log: another threshold.")
    ] = None,
    ignore: Annotated[list[str] | None, typer.Option(metavar="CODE", help="Of a log: switch a rule off.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print for programs: one JSON object a line.")] = False,
) -> None:
    """Tell what happens to a run as it happens: diagnostics, changes, verdicts. Ends when the run does.

    PATH is a run of ours, or the log of any system that `diagnose` reads: then it is judged here, as it grows. A log
    seldom says that its run is over, so end it with Ctrl-C, or give --timeout.

    Exits with 0, or 1 if the run is bad when it ends (as `diagnose` does), or 2 if it was interrupted or cannot be read.
    """
    from outspoken.agent_api.run import NotARun, Run
    from outspoken.diagnostics.sinks import ConsoleSink, JsonSink

    sink: Sink = JsonSink(sys.stdout) if json else ConsoleSink(sys.stdout)
    settings = {
        "--config": config,
        "--method": method,
        "--format": format,
        "--param": param,
        "--ignore": ignore,
        "--timeout": timeout,
    }
    try:
        found = Run(path)
    except NotARun as error:
        if not _may_hold_a_log(path):
            why = f"{error}, and no log that `outspoken diagnose` reads." if Path(path).exists() else ""
            raise CommandError(why or f"{path}: there is no such file or directory.") from None
        follower = _follower(path, format, config, method, param, ignore)
        _watch_log(follower, sink, interval, once, timeout, json)
    except OSError as error:
        raise CommandError(f"{path}: cannot be looked at ({error.strerror or error}).") from None
    given = [name for name, value in settings.items() if value]
    if given:
        raise CommandError(f"{path} is a run of ours, which judges itself; {given[0]} is for logs of other systems.")
    try:
        _watch_run(found, sink, interval, once, json)
    except OSError as error:
        raise CommandError(f"{error.filename or path}: cannot be read ({error.strerror or error}).") from None
    except ValueError as error:
        raise CommandError(str(error)) from None


# ---------------------------------------------------------------------- the log of any system


def _may_hold_a_log(path: str) -> bool:
    from outspoken.diagnostics.sources import UnreadableLog
    from outspoken.diagnostics.sources.discover import find_log

    try:
        return Path(path).is_file() or (Path(path).is_dir() and find_log(Path(path), []) is not None)
    except UnreadableLog:
        return False


def _follower(
    path: str,
    format: str | None,
    config: str | None,
    method: str | None,
    param: list[str] | None,
    ignore: list[str] | None,
) -> "Follower":
    from outspoken.diagnostics.follow import Follower
    from outspoken.diagnostics.rules.registry import ANY_METHOD
    from outspoken.diagnostics.sources import FORMATS

    for option, value, known in (("--method", method, ANY_METHOD), ("--format", format, FORMATS)):
        if value is not None and value not in known:
            raise CommandError(f"{option} {value!r} is not known; choose one of {', '.join(known)}.")
    return Follower(path, format, config, method, parameters(param or []), ignore or ())


def _watch_log(
    follower: "Follower", sink: "Sink", interval: float, once: bool, timeout: float | None, json: bool
) -> NoReturn:
    """Judge a log as it grows, until it says that the run is over, nothing comes any more, or Ctrl-C."""
    from outspoken.diagnostics.sources import UnreadableLog

    said, quiet_since = "", time.monotonic()
    ended = "still open"
    try:
        while True:
            fed = follower.run and len(follower.run.observations)
            last = once or (timeout is not None and time.monotonic() - quiet_since > timeout)
            try:
                transitions = follower.look(last=last)
            except UnreadableLog as error:
                if last:
                    raise
                note(f"{error} Waiting for it to be readable again.")
                transitions = []
            if follower.run and len(follower.run.observations) != fed:
                quiet_since = time.monotonic()
            for text in most_important(follower.notes):
                note(text)
            follower.notes = []
            for transition in transitions:
                sink.transition(transition)
            if follower.engine is not None:
                if (digest := follower.engine.take_digest()) is not None:
                    sink.note(digest)
                sink.verdict(follower.engine.verdict())
            if follower.waiting and (last or follower.waiting != said):
                said = follower.waiting
                if last:
                    raise CommandError(said)
                note(f"{said} Waiting for a row of metrics.")
            if last or follower.over:
                ended = "finished" if follower.over else ("read" if once else f"silent for {timeout:g} seconds")
                break
            time.sleep(follower.pause(interval))
    except (ValueError, OSError) as error:
        raise CommandError(str(error)) from None
    except KeyboardInterrupt:
        ended = "left"
    engine = follower.engine
    step = engine.view.step if engine is not None else None
    if json:
        print_json({"event": "outspoken.run", "run": None, "status": ended, "step": step})
    else:
        print(f"[outspoken] LOG {ended} " + ("before a row came" if step is None else f"at step {step}"))
    if engine is None:
        raise typer.Exit(CANNOT_JUDGE)
    raise typer.Exit(BAD if is_bad(engine.verdict(), engine.diagnostics().values()) else FINE)


# ---------------------------------------------------------------------- a run of ours


def _watch_run(found: "Run", sink: "Sink", interval: float, once: bool, json: bool) -> NoReturn:
    from outspoken.diagnostics import rundir

    diagnostics, changes = rundir.Tail(found.path / rundir.DIAGNOSTICS), rundir.Tail(found.path / rundir.CHANGES)
    shown: set[str] = set()
    while True:
        over = not found.alive  # asked before the look, so that the last lines are seen
        _tell_news(found, diagnostics, changes, shown, sink)
        if over or once:
            break
        time.sleep(interval)
    _tell_end(found, over, json)
    raise typer.Exit(_exit_code(found, over))


def _tell_news(run: "Run", diagnostics: "Tail", changes: "Tail", shown: set[str], sink: "Sink") -> None:
    from outspoken.diagnostics.engine import Transition

    news: list[tuple[Any, int, dict[str, Any]]] = []
    for order, tail in enumerate((diagnostics, changes)):
        records, problems = tail.read()
        news += [(record.get("step") or 0, order, record) for record in records]
        for text in problems:
            note(text)
    for _, order, record in sorted(news, key=lambda item: item[:2]):
        if order == 1:
            sink.change(record)
            continue
        key, state = str(record.get("fingerprint")), record.get("state")
        # A diagnostic that another one explains was never shown, so its end is no news either.
        visible = state == "firing" or (key in shown and state in ("resolved", "unknown"))
        if state == "firing":
            shown.add(key)
        elif state == "resolved":
            shown.discard(key)
        sink.transition(Transition(record, shown=visible))
    try:
        verdict = run.verdict()
    except OSError as error:
        note(f"{error.filename}: cannot be read ({error.strerror or error}).")
        return
    except ValueError as error:
        note(str(error))
        return
    if verdict is not None:
        sink.verdict(verdict)


def _state(run: "Run", over: bool) -> str:
    return "interrupted" if over and run.status == "running" else run.status


def _tell_end(run: "Run", over: bool, json: bool) -> None:
    state = _state(run, over)
    if json:
        print_json({"event": "outspoken.run", "run": run.id, "status": state, "step": run.step})
    else:
        from outspoken.diagnostics.sinks import escaped

        print(f"[outspoken] RUN {escaped(state, 40)} at step {run.step}")


def _exit_code(run: "Run", over: bool) -> int:
    state = _state(run, over)
    if state == "failed" or is_bad(run.verdict(), run.diagnostics()):
        return BAD
    return CANNOT_JUDGE if state == "interrupted" else FINE
