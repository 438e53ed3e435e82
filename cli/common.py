"""What the commands share: how they end, and how they print for people and for programs."""

import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

# Exit codes
FINE, BAD, CANNOT_JUDGE = 0, 1, 2

BAD_VERDICTS = ("broken", "collapsing", "over_optimising", "stalled_no_signal")

JsonFlag = Annotated[bool, typer.Option("--json", help="Print for programs: one JSON document on standard output.")]
RunPath = Annotated[str, typer.Argument(metavar="RUN", help="A run's output directory, or its outspoken/ folder.")]


class CommandError(Exception):
    """Ends a command with one sentence and an exit code."""

    def __init__(self, sentence: str, exit_code: int = CANNOT_JUDGE):
        super().__init__(sentence)
        self.exit_code = exit_code


def print_json(document: Any) -> None:
    from outspoken.diagnostics.sinks import strict_json

    sys.stdout.write(strict_json(document) + "\n")


def note(text: str) -> None:
    """Tell a person something beside the answer."""
    sys.stderr.write(f"[outspoken] note: {text}\n")


def console() -> "Console":
    """Standard output. What is no terminal gets wide lines, which other programs can search."""
    from rich.console import Console

    out = Console(highlight=False, soft_wrap=False)
    return out if out.is_terminal else Console(highlight=False, width=240)


def say(out: "Console", text: str, style: str = "") -> None:
    """Print a line as it is: no markup, and no wrapping where it is not a terminal."""
    out.print(text, style=style or None, markup=False, highlight=False, soft_wrap=True)


SEVERITY_STYLES = {"error": "bold red", "warning": "bold yellow", "info": "cyan"}


def severity_style(record: Mapping[str, Any]) -> str:
    """How a diagnostic's line looks."""
    if record.get("state") == "resolved":
        return "green"
    if record.get("state") != "firing":
        return "dim"
    return SEVERITY_STYLES.get(str(record.get("severity")), "")


def is_bad(verdict: Mapping[str, Any] | None, diagnostics: Iterable[Mapping[str, Any]]) -> bool:
    """Whether a run counts as bad: its verdict says so, or a diagnostic of severity error fired."""
    if verdict is not None and verdict.get("state") in BAD_VERDICTS:
        return True
    return any(
        record.get("severity") == "error"
        and record.get("state") in ("firing", "resolved", "unknown")
        and record.get("fired_step") is not None
        for record in diagnostics
    )
