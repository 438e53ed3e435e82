"""Showing sampled completions to a person: on the terminal, in a file beside the checkpoints, in a dashboard."""

import logging
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

logger = logging.getLogger(__name__)

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
        args: the trainer's config: `generation_batch_size`, and if completions are to be sent to the hub
            `log_completions_hub_repo`.
    """

    def __init__(self, args: Any):
        size: int = args.generation_batch_size
        self.wanted: bool = args.log_completions
        self._repository = getattr(args, "log_completions_hub_repo", None)
        self._scheduler: Any = None
        self.columns: dict[str, Any] = {name: deque(maxlen=size) for name in ("prompt", "completion", "advantages")}
        self.rewards: dict[str, Any] = defaultdict(lambda: deque(maxlen=size))
        self.extra: dict[str, Any] = defaultdict(lambda: deque(maxlen=size))
        self.images: Any = deque(maxlen=size)
        self.is_new = False

    def add(
        self,
        prompts: list,
        completions: list,
        advantages: Sequence[float] | None = None,
        rewards: Mapping[str, Sequence[float]] | None = None,
        extra: Mapping[str, list] | None = None,
        images: list | None = None,
    ) -> None:
        """Add completions, if they are to be shown. `prompts`, `completions`, `extra` and `images` are this process's, the numbers those of all.

        Args:
            extra: columns that reward functions logged.

        Raises:
            ValueError: a reward function logged another number of values than there are completions.
        """
        if not self.wanted:
            return
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
        extra = extra or {}
        for column in sorted({*gather_object(list(extra)), *self.extra}):
            values = extra.get(column, [None] * len(prompts))
            if len(values) != len(prompts):
                raise ValueError(
                    f"log_extra({column!r}) got {len(values)} values for {len(prompts)} completions; pass one for each."
                )
            self.extra[column].extend([None] * (rows_before - len(self.extra[column])))
            self.extra[column].extend(gather_object(values))

    def show(self, args: Any, step: int) -> None:
        """Print the completions and write them beside the checkpoints, and to wandb and trackio."""
        self.is_new = False
        if self._repository is not None and self._scheduler is None:
            self._scheduler = send_to_hub(self._repository, args)
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
                images = [[backend.Image(image) for image in row or []] for row in self.images]
                shown = shown.assign(images=pd.Series(images, index=shown.index))
            if args.log_unique_prompts:
                shown = shown[~shown["prompt"].astype(str).duplicated()]
            backend.log({"completions": backend.Table(dataframe=shown)})


def send_to_hub(repository: str, args: Any) -> Any:
    """Start sending the files of completions to a dataset repository on the hub every two minutes, and at the end.

    A hub that cannot be reached is told of, and does not end the run.

    Args:
        repository: its name; it is made if it is not there, private if `args.hub_private_repo` says so.
        args: the trainer's config: `output_dir`, `hub_model_id`, `hub_private_repo`, `hub_token`.

    Returns:
        What sends them, or False.
    """
    from huggingface_hub import CommitScheduler, DatasetCard, create_repo

    folder = os.path.join(args.output_dir, "completions")
    os.makedirs(folder, exist_ok=True)
    of_model = f" of `{args.hub_model_id}`" if args.hub_model_id else ""
    card = (
        "---\ntags:\n- outspoken\n- completions\n---\n\n# Completions\n\nWhat a model wrote while it was trained with "
        f"Outspoken{of_model}: one file a log, with prompts, completions, rewards and advantages.\n"
    )
    try:
        create_repo(
            repository, private=args.hub_private_repo, repo_type="dataset", exist_ok=True, token=args.hub_token
        )
        DatasetCard(card).push_to_hub(repository, token=args.hub_token)
        return CommitScheduler(
            repo_id=repository,
            repo_type="dataset",
            folder_path=folder,
            every=2,
            allow_patterns=["*.parquet"],
            token=args.hub_token,
        )
    except Exception as error:
        logger.warning(
            f"Completions cannot be sent to {repository} ({type(error).__name__}: {error}); they stay in {folder}."
        )
        return False


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
