"""`outspoken watch`: follow a run that trains, from any terminal."""

import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from outspoken.cli.common import BAD, CANNOT_JUDGE, FINE, CommandError, RunPath, is_bad, note, print_json

if TYPE_CHECKING:
    from outspoken.agent_api.run import Run
    from outspoken.diagnostics.rundir import Tail
    from outspoken.diagnostics.sinks import Sink


def watch(
    run: RunPath,
    interval: Annotated[float, typer.Option(min=0.05, help="Seconds between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Tell what happened so far, and stop.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print for programs: one JSON object a line.")] = False,
) -> None:
    """Tell what happens to a run as it happens: diagnostics, changes, verdicts. Ends when the run does.

    Exits with 0, or 1 if the run is bad when it ends (as `diagnose` does), or 2 if it was interrupted.
    """
    from outspoken.agent_api.run import NotARun, Run
    from outspoken.diagnostics import rundir
    from outspoken.diagnostics.sinks import ConsoleSink, JsonSink

    try:
        found = Run(run)
    except NotARun as error:
        raise CommandError(f"{error}.") from None
    sink: Sink = JsonSink(sys.stdout) if json else ConsoleSink(sys.stdout)
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
    except (OSError, ValueError) as error:
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
        print(f"[outspoken] RUN {state} at step {run.step}")


def _exit_code(run: "Run", over: bool) -> int:
    state = _state(run, over)
    if state == "failed" or is_bad(run.verdict(), run.diagnostics()):
        return BAD
    return CANNOT_JUDGE if state == "interrupted" else FINE
