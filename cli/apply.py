"""`outspoken apply`: ask a run that trains for a change."""

import getpass
import json as json_module
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from outspoken.cli.common import BAD, FINE, CommandError, JsonFlag, RunPath, note, print_json, show

if TYPE_CHECKING:
    from outspoken.agent_api.run import Run


def apply(
    run: RunPath,
    suggestion: Annotated[
        str | None,
        typer.Argument(metavar="[SUGGESTION]", help="The id of a suggestion, or the code of the rule that makes it."),
    ] = None,
    set: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="A new value for a config field.")
    ] = None,
    actor: Annotated[str | None, typer.Option(help="Who asks; it stands in the record. [default: cli:<user>]")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until the change was verified, or was not.")] = False,
    timeout: Annotated[float, typer.Option(min=0, help="Seconds to wait, with --wait.")] = 3600.0,
    rollback: Annotated[
        bool, typer.Option("--rollback/--no-rollback", help="Take the change back if its effect does not come.")
    ] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the change and show it, without asking.")] = False,
    json: JsonFlag = False,
) -> None:
    """Ask a run that trains for a change: a suggestion, or values of your own. Without either, list the suggestions.

    Exits with 0 once it is asked for; with --wait, with 0 if the change was verified and 1 if it failed, was rejected
    or rolled back. 2 if it cannot be asked for.
    """
    from outspoken.agent_api.run import NotARun, RequestRefused, Run

    try:
        found = Run(run)
        if suggestion is None and not set:
            _list(found, json)
            return
        if suggestion is not None and set:
            raise CommandError("give either a suggestion or --set, not both.")
        change: Any = _suggestion(found, suggestion) if suggestion is not None else _values(found, set or [])
        actor = actor or _who()
        if dry_run:
            _show_plan(found.plan(change, actor=actor, rollback_on_failure=rollback), json)
            return
        asked = found.apply(change, actor=actor, rollback_on_failure=rollback)
    except (NotARun, RequestRefused) as error:
        raise CommandError(f"{error}.") from None
    if not wait:
        if json:
            print_json({"id": asked, "state": "requested", "run": found.id, "actor": actor})
        else:
            print(f"requested as {asked}; the trainer takes it after its next step (watch: outspoken watch {run})")
        return
    note(f"requested as {asked}; waiting for its effect")
    record = _settled(found, asked, timeout, rollback)
    if json:
        print_json(record)
    else:
        from outspoken.diagnostics.sinks import change_line

        print(f"[outspoken] {change_line(record)}")
    raise typer.Exit(FINE if record.get("state") == "verified" else BAD)


def _list(run: "Run", json: bool) -> None:
    suggestions = run.suggestions()
    if json:
        print_json({"suggestions": suggestions})
        return
    from rich.table import Table

    from outspoken.diagnostics.sinks import escaped

    if not suggestions:
        print("No diagnostic that fires now suggests a change.")
        return
    table = Table(box=None, pad_edge=False)
    for title in ("id", "rule", "what", "when", "risk"):
        table.add_column(title, no_wrap=title != "what")
    from rich.text import Text

    for suggestion in suggestions:
        cells = (suggestion.get(key) for key in ("id", "code", "title", "when", "risk"))
        table.add_row(*(Text(escaped(cell, 200)) for cell in cells))
    show(table)


def _suggestion(run: "Run", name: str) -> Any:
    """What the name stands for: a suggestion's id as it is; of a rule's suggestions the one that can be applied now."""
    ids = [s.get("id") for s in run.suggestions()]
    of_rule = [s for s in run.suggestions() if str(s.get("code")).upper() == name.upper()]
    if name in ids or not of_rule:
        return name
    usable = [s for s in of_rule if s.get("patch") and s.get("when") in ("live", "earlier_checkpoint")]
    if len(usable) > 1:
        raise CommandError(
            f"{name} suggests several changes; choose one of {', '.join(str(s['id']) for s in usable)}."
        )
    return (usable or of_rule)[0]


def _values(run: "Run", given: list[str]) -> dict[str, Any]:
    """Field -> value of the `--set` options. Values are JSON where they can be, and text where the field holds text."""
    config = run.config
    values: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise CommandError(f"--set {text!r} must look like learning_rate=1e-5.")
        name = name.strip().replace("-", "_")
        if name in values:
            raise CommandError(f"--set names {name} twice.")
        try:
            parsed = json_module.loads(value)
        except ValueError:
            parsed = {"True": True, "False": False, "None": None}.get(value, value)
        keep_text = isinstance(config.get(name), str) and not isinstance(parsed, str)
        values[name] = value if keep_text else parsed
    return values


def _who() -> str:
    try:
        return f"cli:{getpass.getuser()}"
    except (OSError, KeyError):  # no user name for this id, as in many containers
        return "cli"


def _show_plan(request: Mapping[str, Any], json: bool) -> None:
    if json:
        print_json({"dry_run": True, "request": request})
        return
    from outspoken.diagnostics.sinks import escaped, value_text

    old = {op["path"]: op["value"] for op in request["patch"] if op["op"] == "test"}
    for op in request["patch"]:
        if op["op"] != "test":
            before = f"{value_text(old[op['path']])} -> " if op["path"] in old else ""
            print(f"would change {escaped(op['path'].lstrip('/'), 80)}: {before}{value_text(op['value'])}")
    if request.get("restore"):
        print("after going back to the newest good checkpoint")
    expect = request.get("expect")
    if expect:
        steps = expect.get("within_steps")
        print(f"expecting {expect['signal']} {expect['direction']} {value_text(expect['value'])} within {steps} steps")


def _settled(run: "Run", asked: str, timeout: float, rollback: bool) -> dict[str, Any]:
    """The change's record once it has run its course."""
    try:
        record = run.wait_for(asked, timeout=timeout)
    except TimeoutError as error:
        raise CommandError(f"{error}.") from None
    if record.get("state") == "failed" and rollback:
        try:
            return run.wait_for(asked, "rolled_back", timeout=min(timeout, 10.0))
        except TimeoutError:
            pass  # it could not be taken back, or is not yet
    return record
