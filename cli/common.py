"""What the commands share: how they end, and how they print for people and for programs."""

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any

import typer

# Exit codes
FINE, BAD, CANNOT_JUDGE = 0, 1, 2

NOTES_SHOWN = 8  # to a person, of those on a log

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
    """Tell a person something beside the answer. What it names may come from a log, so it is escaped."""
    from outspoken.diagnostics.sinks import escaped

    sys.stderr.write(f"[outspoken] note: {escaped(text, 2000)}\n")


def most_important(notes: Sequence[str], shown: int = NOTES_SHOWN) -> list[str]:
    """The first notes on a log, and where the others are to be found: what single names mean stands last."""
    more = len(notes) - shown
    if more <= 1:
        return list(notes)
    return [*notes[:shown], f"{more} further notes, most on what single names mean: outspoken diagnose PATH --json."]


@contextlib.contextmanager
def clean_stdout() -> Iterator[None]:
    """What is printed inside, by child processes too, goes to standard error: a program reads standard output."""
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        sys.stderr.flush()
        os.dup2(saved, 1)
        os.close(saved)


def show(*renderables: Any, width: int = 240) -> None:
    """Print what rich renders. What is no terminal gets lines of at most `width`, without padding at their ends."""
    from rich.console import Console

    out = Console(highlight=False)
    if not out.is_terminal:
        out = Console(highlight=False, width=width)
    with out.capture() as captured:
        for renderable in renderables:
            out.print(renderable)
    text = captured.get()
    if not out.is_terminal:
        text = "".join(line.rstrip() + "\n" for line in text.splitlines())
    sys.stdout.write(text)


def say(text: str = "", style: str = "") -> None:
    """Print one line: no markup, no wrapping, in colour on a terminal."""
    from rich.console import Console

    Console(highlight=False).print(text, style=style or None, markup=False, soft_wrap=True)


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


def parameters(given: list[str]) -> dict[str, dict[str, float]]:
    """Thresholds as `--param RL016.limit=0.3` gives them: rule -> {parameter: number}."""
    params: dict[str, dict[str, float]] = {}
    for text in given:
        name, _, value = text.partition("=")
        code, _, parameter = name.partition(".")
        try:
            params.setdefault(code, {})[parameter] = float(value)
        except ValueError:
            raise CommandError(f"--param {text!r} must look like RL016.limit=0.3.") from None
    return params
