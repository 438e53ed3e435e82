"""Showing sampled completions to a person."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

MAX_CELL_CHARACTERS = 2000


def print_completions(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    advantages: Sequence[float],
    rewards: Mapping[str, Sequence[float]],
    extra: Mapping[str, Sequence[Any]],
    step: int,
    count: int | None = None,
    console: Console | None = None,
) -> None:
    """Print a table of prompts, completions, rewards and advantages, one row per completion.

    Args:
        prompts, completions: strings or lists of messages.
        rewards: reward function name -> one number per completion.
        extra: further columns.
        count: how many rows, drawn at random; all if None.
    """
    rows: Sequence[int] = range(len(prompts))
    if count is not None and count < len(rows):
        # Not the global generator: what is shown must not change what is trained.
        rows = sorted(random.Random(step).sample(rows, max(count, 0)))
    if not rows:
        return
    table = Table(expand=True, show_lines=True)
    table.add_column("Prompt", style="yellow")
    table.add_column("Completion", style="green")
    for name in rewards:
        table.add_column(name, style="cyan", justify="right")
    table.add_column("Advantage", style="magenta", justify="right")
    for name in extra:
        table.add_column(name)
    for row in rows:
        table.add_row(
            _cell(prompts[row]),
            _cell(completions[row]),
            *(f"{values[row]:.2f}" for values in rewards.values()),
            f"{advantages[row]:.2f}",
            *(_cell(values[row]) for values in extra.values()),
        )
    (console or Console()).print(Panel(table, title=f"Step {step}", expand=False))


def _cell(entry: Any) -> Text:
    """A string or a conversation as text that the terminal neither interprets nor drowns in."""
    if isinstance(entry, list) and all(isinstance(message, dict) for message in entry):
        return Text("\n\n").join(
            Text.assemble((str(message.get("role", "")).upper(), "bold"), "\n", _plain(message.get("content", "")))
            for message in entry
        )
    return Text(_plain(entry))


def _plain(value: Any) -> str:
    text = value if isinstance(value, str) else str(value)
    if len(text) > MAX_CELL_CHARACTERS:
        text = f"{text[:MAX_CELL_CHARACTERS]}… ({len(text) - MAX_CELL_CHARACTERS} more characters)"
    return "".join(c if c.isprintable() or c in "\n\t" else "�" for c in text)
