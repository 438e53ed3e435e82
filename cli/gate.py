"""`outspoken gate`: the exit code that CI asks for."""

from typing import Annotated

import typer

from outspoken.cli.common import CANNOT_JUDGE, JsonFlag, RunPath, note, print_json


def gate(
    run: RunPath,
    fail_on: Annotated[
        str | None,
        typer.Option(
            metavar="WORDS",
            help="What makes the run bad, with commas between: verdicts (collapse, broken, over_optimising …), "
            "severities (error, warning), codes of rules. [default: collapsing,broken,error]",
        ),
    ] = None,
    unresolved_only: Annotated[
        bool | None,
        typer.Option(
            "--unresolved-only/--ever-fired",
            help="Count only diagnostics that still fired at the end, or all that ever fired. By default those "
            "count that still fired at the end, and named rules and non-finite numbers if they ever fired.",
        ),
    ] = None,
    allow_running: Annotated[
        bool, typer.Option(help="Judge a run that still trains by what it shows so far.")
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Exit with 0 if a run was good, 1 if it was bad, 2 if that cannot be told."""
    from outspoken.agent_api.gate import gate as judge

    result = judge(run, fail_on, unresolved_only=unresolved_only, allow_running=allow_running)
    if json:
        document = result.as_dict()
        if result.exit_code == CANNOT_JUDGE:
            document["error"] = "; ".join(result.reasons)
        print_json(document)
    else:
        from outspoken.diagnostics.sinks import escaped

        word = {0: "PASS", 1: "FAIL", 2: "CANNOT JUDGE"}[result.exit_code]
        for i, reason in enumerate(result.reasons):
            print(f"{word if i == 0 else ' ' * len(word)}  {escaped(reason)}")
        for text in result.notes:
            note(escaped(text))
    raise typer.Exit(result.exit_code)
