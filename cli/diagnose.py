"""`outspoken diagnose`: what is wrong with a run, after the fact."""

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from outspoken.cli.common import (
    BAD,
    BAD_VERDICTS,
    FINE,
    CommandError,
    JsonFlag,
    is_bad,
    most_important,
    parameters,
    print_json,
    say,
    severity_style,
    show,
)

RULES_NAMED = 3  # of those that could not be checked for one reason; of more, only the codes


def diagnose(
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH",
            help="A run directory, or what a run of any system left: its output directory, trainer_state.json, metrics "
            "as JSON lines or CSV, the text of a console or notebook, TensorBoard, W&B or MLflow files.",
        ),
    ],
    config: Annotated[
        str | None, typer.Option(metavar="FILE", help="The run's settings (YAML or JSON), where PATH lacks them.")
    ] = None,
    method: Annotated[str | None, typer.Option(help="grpo, sft, dpo …; otherwise told from the metrics.")] = None,
    format: Annotated[
        str | None,
        typer.Option(help="The format of PATH, or the system that wrote it, where its content does not tell."),
    ] = None,
    param: Annotated[
        list[str] | None, typer.Option(metavar="CODE.NAME=NUMBER", help="Another threshold, like RL016.limit=0.3.")
    ] = None,
    ignore: Annotated[list[str] | None, typer.Option(metavar="CODE", help="Switch a rule off.")] = None,
    replay: Annotated[
        bool, typer.Option("--replay", help="Judge a run directory anew, instead of telling what its run recorded.")
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Say what is wrong with a finished run, or with anybody's log of one.

    Exits with 1 if the run is bad: its verdict is broken, collapsing, over_optimising or stalled_no_signal, or an
    error fired; with 2 if PATH cannot be read.
    """
    from outspoken.diagnostics.diagnose import diagnose as report_on

    try:
        report = report_on(
            path,
            config=config,
            method=method,
            format=format,
            params=parameters(param or []),
            ignore=ignore or (),
            replay=replay,
        )
    except (ValueError, OSError) as error:
        raise CommandError(str(error)) from None
    if json:
        print_json(report)
    else:
        print_report(report)
    raise typer.Exit(BAD if is_bad(report["verdict"], report["diagnostics"]) else FINE)


def print_report(report: Mapping[str, Any]) -> None:
    """The report for people: verdict, one line per diagnostic, and what could not be checked."""
    from outspoken.diagnostics.sinks import escaped, transition_line

    source = report["source"]
    steps = f"steps {source['first_step']} to {source['last_step']}"
    say(
        f"{escaped(source['path'])}: {source['format']}, {source['rows']} rows, {steps}, "
        f"method {escaped(report['method'], 80)}",
    )
    for text in most_important(source["notes"]):
        say(f"  note: {escaped(text)}", "dim")
    say()
    _print_verdict(report["verdict"])
    say()
    for record in report["diagnostics"]:
        line = transition_line(record)
        if record.get("state") == "resolved":
            line += f" It was: {escaped(record.get('message', ''))}"
        say(line, severity_style(record))
    if not report["diagnostics"]:
        say("No diagnostic fired.")
    else:
        say(f"Details: outspoken explain {escaped(report['diagnostics'][0].get('code'), 20)}", "dim")
    reasons: dict[str, list[Mapping[str, Any]]] = {}
    for missing in report["not_checked"]:
        reasons.setdefault(str(missing["reason"]), []).append(missing)
    if reasons:
        say("\nNot checked:")
        for reason, rules in reasons.items():
            named = len(rules) <= RULES_NAMED
            codes = [f"{rule['code']} {rule['name']}" if named else str(rule["code"]) for rule in rules]
            say(f"  {', '.join(codes)}: {escaped(reason)}", "dim")
    for text in report["notes"]:
        say(f"note: {escaped(text)}", "dim")


def _print_verdict(verdict: Mapping[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    from outspoken.diagnostics.sinks import escaped

    state = escaped(verdict.get("state"), 40)
    style = "bold red" if state in BAD_VERDICTS else "bold green" if state in ("improving", "converged") else "bold"
    table = Table.grid(padding=(0, 2))
    since = f", since step {escaped(verdict['since_step'], 20)}" if verdict.get("since_step") else ""
    table.add_row("verdict", Text.assemble((state, style), f" ({escaped(verdict.get('confidence'), 20)}{since})"))
    table.add_row("because", Text(escaped(verdict.get("reason", ""))))
    if verdict.get("runner_up"):
        table.add_row("otherwise", Text(escaped(verdict["runner_up"])))
    if verdict.get("would_change"):
        table.add_row("changes if", Text(escaped(verdict["would_change"])))
    show(table)
