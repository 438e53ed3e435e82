"""Rows with a prompt, a chosen and a rejected answer, made into tokens."""

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from outspoken.trainers.data.chat_templates import tokenize_chat
from outspoken.trainers.data.checks import PREFERENCE, check_rows
from outspoken.trainers.data.formats import (
    check_messages,
    check_text,
    column_names,
    common_prefix_length,
    extract_prompt,
    first_row,
    is_messages,
    where,
)
from outspoken.trainers.data.supervised import template_kwargs, with_eos
from outspoken.trainers.measuring import EndTokens, end_token_ids

logger = logging.getLogger(__name__)

ANSWERS = ("chosen", "rejected")
TOKENS = ("prompt_ids", "chosen_ids", "rejected_ids")
_STATS = "_outspoken_stats"  # the column that carries what is counted over all rows, removed afterwards


def prepare_preference(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    truncation_mode: str = "keep_start",
    *,
    name: str = "train",
    trainer: str = "DPOTrainer",
    num_proc: int | None = None,
    length_column: str | None = None,
) -> tuple[Dataset | IterableDataset, dict[str, float]]:
    """Tokenize a dataset: it gets `prompt_ids`, `chosen_ids` and `rejected_ids`; other columns stay.

    Understood are `chosen` and `rejected` (text or conversations), with their `prompt`, or without where both begin
    with it; and `prompt_ids`, `chosen_ids` and `rejected_ids`, which are tokens already. Columns `tools` and
    `chat_template_kwargs` go to the chat template. Text answers get an end-of-sequence token. Rows whose prompt alone
    fills `max_length` are dropped where the end is cut ("keep_start"); the others are not cut here.

    Args:
        name: what the dataset is called in messages.
        trainer: the trainer's class name, for messages.
        num_proc: processes to use, not for streams.
        length_column: a column to add with the tokens of prompt and longer answer, at most `max_length`.

    Returns:
        The dataset, and facts about it (empty for a stream): those of `prepare_supervised`, where lengths and shares
        are those of prompts with an answer, two a row, and `data/boundary_mismatch_share` is of rows; and
        `data/identical_pairs_share`, the rows whose answers have the same tokens.

    Raises:
        ValueError: naming the column, the row and the remedy.
    """
    streaming = not isinstance(dataset, Dataset)
    if not streaming and dataset.format["type"] == "custom":
        raise ValueError(
            f"The {name} dataset has a transform (`with_transform`), which would be frozen into its tokens; apply it "
            "with `Dataset.map` first."
        )
    columns, row = column_names(dataset, name), first_row(dataset, name)
    if "prompt_ids" not in columns and {*TOKENS[1:]} <= {*columns}:
        raise ValueError(
            f"The {name} dataset has columns 'chosen_ids' and 'rejected_ids', but no 'prompt_ids'; add the prompts' tokens."
        )
    if isinstance(row.get("prompt"), str) and is_messages(row.get("chosen")):
        # The prompt as text, beside conversations that begin with it (as in UltraFeedback).
        dataset = dataset.remove_columns("prompt")
    check_rows(dataset, name, PREFERENCE, trainer)
    if not streaming:
        dataset = dataset.with_format(None)
    progress: dict[str, Any] = {} if streaming else {"num_proc": num_proc, "desc": f"Tokenizing {name} dataset"}
    dataset = dataset.map(
        preference_row,
        with_indices=True,
        fn_kwargs={
            "tokenizer": tokenizer,
            "name": name,
            "end": None if streaming else end_token_ids(tokenizer),
            "length_column": length_column,
            "max_length": max_length,
        },
        **progress,
    )
    room = max_length if truncation_mode == "keep_start" else None  # what a prompt must stay below
    if streaming:
        return dataset if room is None else dataset.filter(lambda row: len(row["prompt_ids"]) < room), {}

    stats = np.array(dataset[_STATS][:], dtype=np.int64).reshape(-1, 7)  # (rows, 7), see preference_row
    dataset = dataset.remove_columns(_STATS)
    prompts, answers, ends, mismatch, identical = stats[:, 0], stats[:, 1:3], stats[:, 3:5], stats[:, 5], stats[:, 6]
    kept = np.full(len(stats), True) if room is None else prompts < room
    lengths = prompts[:, None] + answers  # (rows, 2)
    whole = np.full(lengths.shape, True) if max_length is None else lengths <= max_length
    facts = {
        "data/rows": float(len(stats)),
        "data/longest": float(lengths.max()),
        "data/p99_length": float(np.quantile(lengths, 0.99, method="higher")),
        "data/truncated_share": float((~whole).mean()),
        "data/no_supervised_share": float((~kept).mean()),
        "data/boundary_mismatch_share": float(mismatch.mean()),
        "data/identical_pairs_share": float(identical.mean()),
    }
    if whole.any():
        facts["data/ends_with_eos_share"] = float(ends[whole].mean())
    _warn(name, mismatch, identical)
    if not kept.all():
        if not kept.any():
            raise ValueError(
                f"Every prompt of the {name} dataset has at least `max_length={max_length}` tokens, so no token of an "
                f"answer is left; raise `max_length` (the longest row has {int(facts['data/longest'])} tokens)."
            )
        logger.warning(
            f"{int((~kept).sum())} of {len(stats)} rows of the {name} dataset are dropped (first: row "
            f"{int((~kept).argmax())}): their prompts alone have `max_length={max_length}` tokens or more. Raise "
            "`max_length`, or drop them yourself."
        )
        dataset = dataset.select(np.flatnonzero(kept))
    return dataset, facts


def preference_row(
    row: Mapping[str, Any],
    index: int,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    end: EndTokens | None = None,
    length_column: str | None = None,
    max_length: int | None = None,
) -> dict[str, Any]:
    """`prompt_ids`, `chosen_ids` and `rejected_ids` of one row.

    With `end`, another column counts: tokens of prompt, chosen and rejected answer; whether the last token of each
    answer is an end token; whether the prompt's tokens are not the beginning of the whole; whether the answers are the
    same.
    """
    prompt, chosen, rejected, mismatch = _tokens(row, index, tokenizer, name)
    for column, ids in zip(TOKENS[1:] if TOKENS[1] in row else ANSWERS, (chosen, rejected)):
        if not ids:
            raise ValueError(f"{where(name, index, column)}: the answer has no tokens; fill or drop the row.")
    result: dict[str, Any] = dict(zip(TOKENS, (prompt, chosen, rejected)))
    if length_column is not None:
        length = len(prompt) + max(len(chosen), len(rejected))
        result[length_column] = length if max_length is None else min(length, max_length)
    if end is not None:
        ended = [
            next((token for token in reversed(ids) if token not in end.blanks), None) in end.ends
            for ids in (chosen, rejected)
        ]
        result[_STATS] = [len(prompt), len(chosen), len(rejected), *ended, mismatch, chosen == rejected]
    return result


def _tokens(
    row: Mapping[str, Any], index: int, tokenizer: PreTrainedTokenizerBase, name: str
) -> tuple[list[int], list[int], list[int], bool]:
    """Tokens of the prompt and of both answers, and whether the prompt tokenizes differently once an answer follows."""
    if {*TOKENS} <= row.keys():
        prompt, chosen, rejected = (_check_tokens(row[column], index, name, column) for column in TOKENS)
        return prompt, chosen, rejected, False
    if "prompt" not in row:
        parts = extract_prompt(row)
        if not parts["prompt"]:
            raise ValueError(
                f"Row {index} of the {name} dataset has no prompt of its own, and its 'chosen' and 'rejected' do not "
                "begin alike; add a column 'prompt' of the same kind as the answers."
            )
        row = {**row, **parts}
    if any(is_messages(row[column]) for column in ("prompt", *ANSWERS)):
        kwargs = template_kwargs(row, index, name)
        asked = check_messages(row["prompt"], name, index, "prompt")
        prompt = tokenize_chat(tokenizer, asked, add_generation_prompt=True, **kwargs)
        chosen, rejected = (
            tokenize_chat(tokenizer, asked + check_messages(row[column], name, index, column), **kwargs)
            for column in ANSWERS
        )
    else:
        text = check_text(row["prompt"], name, index, "prompt")
        prompt = tokenizer(text=text)["input_ids"]
        chosen, rejected = (
            tokenizer(text=text + with_eos(check_text(row[column], name, index, column), tokenizer))["input_ids"]
            for column in ANSWERS
        )
    # The answers begin where the tokens of the prompt and of the whole part, which need not be after the prompt.
    boundary = min(common_prefix_length(prompt, chosen), common_prefix_length(prompt, rejected))
    return prompt[:boundary], chosen[boundary:], rejected[boundary:], boundary < len(prompt)


def _check_tokens(ids: Any, index: int, name: str, column: str) -> list[int]:
    if not isinstance(ids, list) or not all(isinstance(token, int) for token in ids):
        raise ValueError(f"{where(name, index, column)}: expected a list of token ids; fix or drop the row.")
    return ids


def _warn(name: str, mismatch: np.ndarray, identical: np.ndarray) -> None:
    rows = len(mismatch)
    if mismatch.any():
        logger.warning(
            f"In {int(mismatch.sum())} of {rows} rows of the {name} dataset (first: row {int(mismatch.argmax())}) the "
            "prompt's tokens are not the beginning of the tokens of prompt + answer, so the model trains on another "
            "context than it will see. End prompts on a token boundary, e.g. move a trailing space into the answers, "
            "or use a chat template that renders the prompt alone as it does before an answer."
        )
    if identical.all():
        raise ValueError(
            f"In every row of the {name} dataset, 'chosen' and 'rejected' have the same tokens, so there is nothing to "
            "prefer; check how the columns were made."
        )
    if identical.any():
        logger.warning(
            f"In {int(identical.sum())} of {rows} rows of the {name} dataset (first: row {int(identical.argmax())}) "
            "'chosen' and 'rejected' have the same tokens, which teaches nothing; drop these rows."
        )
