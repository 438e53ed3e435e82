"""Showing sampled completions to a person: on the terminal, in a file beside the checkpoints, in a dashboard."""

import os
import random
import sys
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from accelerate.utils import gather_object
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
    if advantages:
        table.add_column("Advantage", style="magenta", justify="right")
    for name in extra:
        table.add_column(name)
    for row in rows:
        table.add_row(
            _cell(prompts[row]),
            _cell(completions[row]),
            *(f"{values[row]:.2f}" for values in rewards.values()),
            *([f"{advantages[row]:.2f}"] if advantages else []),
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


class CompletionsLog:
    """The completions of the latest generation batch, column by column, over all processes.

    Args:
        size: completions of a generation batch.
    """

    def __init__(self, size: int):
        self.columns: dict[str, Any] = {name: deque(maxlen=size) for name in ("prompt", "completion", "advantages")}
        self.rewards: dict[str, Any] = defaultdict(lambda: deque(maxlen=size))
        self.extra: dict[str, Any] = defaultdict(lambda: deque(maxlen=size))
        self.images: Any = deque(maxlen=size)
        self.pending_extra: dict[str, list] = defaultdict(list)  # what reward functions gave to `log_extra`
        self.is_new = False

    def add(
        self,
        prompts: list,
        completions: list,
        advantages: Sequence[float] | None = None,
        rewards: Mapping[str, Sequence[float]] | None = None,
        images: list | None = None,
    ) -> None:
        """Add completions. `prompts`, `completions` and `images` are this process's, the numbers those of all.

        Raises:
            ValueError: a reward function logged another number of values than there are completions.
        """
        rows_before = len(self.columns["prompt"])
        self.columns["prompt"].extend(gather_object(prompts))
        self.columns["completion"].extend(gather_object(completions))
        self.columns["advantages"].extend(advantages or [])
        if images is not None:
            self.images.extend(gather_object(images))
        for name, values in (rewards or {}).items():
            self.rewards[name].extend(values)
        self.is_new = True
        # Sorted, so that all processes gather in the same order. A column stays aligned with the prompts even if it is
        # not logged for every batch.
        for column in sorted({*gather_object(list(self.pending_extra)), *self.extra}):
            values = self.pending_extra.get(column, [None] * len(prompts))
            if len(values) != len(prompts):
                raise ValueError(
                    f"log_extra({column!r}) got {len(values)} values for {len(prompts)} completions; pass one for each."
                )
            self.extra[column].extend([None] * (rows_before - len(self.extra[column])))
            self.extra[column].extend(gather_object(values))
        self.pending_extra.clear()

    def show(self, args: Any, step: int) -> None:
        """Print the completions and write them beside the checkpoints, and to wandb and trackio."""
        self.is_new = False
        columns = {name: list(values) for name, values in self.columns.items()}
        rewards = {name: list(values) for name, values in self.rewards.items()}
        extra = {name: list(map(_tabular, values)) for name, values in self.extra.items()}
        print_completions(
            columns["prompt"],
            columns["completion"],
            columns["advantages"],
            rewards,
            extra,
            step,
            args.num_completions_to_print,
        )
        named = {"advantage": columns["advantages"]} if columns["advantages"] else {}
        table = pd.DataFrame(
            {
                "step": [step] * len(columns["prompt"]),
                "prompt": [_without_images(prompt) for prompt in columns["prompt"]],
                "completion": columns["completion"],
                **rewards,
                **extra,
                **named,
            }
        )
        folder = os.path.join(args.output_dir, "completions")
        os.makedirs(folder, exist_ok=True)
        table.to_parquet(os.path.join(folder, f"completions_{step:05d}.parquet"))
        for name in ("wandb", "trackio"):
            # Trainer's own integration has imported and started it by now.
            backend = sys.modules.get(name) if name in (args.report_to or []) else None
            if backend is None or (name == "wandb" and backend.run is None):
                continue
            shown = table
            if self.images and args.log_multimodal:
                shown = shown.assign(images=[[backend.Image(image) for image in row or []] for row in self.images])
            if args.log_unique_prompts:
                shown = shown[~shown["prompt"].astype(str).duplicated()]
            backend.log({"completions": backend.Table(dataframe=shown)})


def _tabular(value: Any) -> Any:
    """A value as a column of mixed values can hold it."""
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _without_images(prompt: Any) -> Any:
    """A prompt as a file can hold it: an image becomes its place."""
    if not isinstance(prompt, list):
        return prompt
    return [
        {**message, "content": [{k: v for k, v in part.items() if k != "image"} for part in message["content"]]}
        if isinstance(message.get("content"), list)
        else message
        for message in prompt
    ]
