"""Rows with a chosen and a rejected answer, made into two whole sequences of tokens each, as a reward model reads them."""

import logging
import warnings
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
    first_row,
    is_messages,
    where,
)
from outspoken.trainers.data.supervised import template_kwargs, with_eos
from outspoken.trainers.measuring import EndTokens, end_token_ids

logger = logging.getLogger(__name__)

ANSWERS = ("chosen", "rejected")
TOKENS = ("chosen_ids", "rejected_ids")
_OLD_TOKENS = ("chosen_input_ids", "rejected_input_ids")  # TRL's names before 1.0
_STATS = "_outspoken_stats"  # the column that carries what is counted over all rows, removed afterwards


def prepare_pairs(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    *,
    num_scores: int = 1,
    name: str = "train",
    trainer: str = "RewardTrainer",
    num_proc: int | None = None,
    length_column: str | None = None,
) -> tuple[Dataset | IterableDataset, dict[str, float]]:
    """Tokenize a dataset: it gets `chosen_ids` and `rejected_ids`, the prompt in both; other columns stay.

    Understood are `chosen` and `rejected` (text or conversations), alone or to be put behind a `prompt`, and
    `chosen_ids` and `rejected_ids`, which are tokens already. Columns `tools` and `chat_template_kwargs` go to the chat
    template. Texts get an end-of-sequence token. Pairs with a sequence of more than `max_length` tokens are dropped,
    not cut: a cut answer is another answer, and the score is read at its end.

    Args:
        num_scores: how many numbers the columns `margin` and `preferences` have in a row, where they are there.
        name: what the dataset is called in messages.
        trainer: the trainer's class name, for messages.
        num_proc: processes to use, not for streams.
        length_column: a column to add with the tokens of the longer sequence.

    Returns:
        The dataset, and facts about it (empty for a stream): `data/rows` before dropping, `data/longest` and
        `data/p99_length` in tokens of a sequence, and as shares `data/truncated_share` (pairs dropped),
        `data/ends_with_eos_share` (sequences that end with an end-of-sequence or added token) and
        `data/identical_pairs_share` (pairs of the same tokens).

    Raises:
        ValueError: naming the column, the row and the remedy.
    """
    streaming = not isinstance(dataset, Dataset)
    if not streaming and dataset.format["type"] == "custom":
        raise ValueError(
            f"The {name} dataset has a transform (`with_transform`), which would be frozen into its tokens; apply it "
            "with `Dataset.map` first."
        )
    columns, row = {*column_names(dataset, name)}, first_row(dataset, name)
    if {*_OLD_TOKENS} <= columns and not {*TOKENS} & columns:
        warnings.warn(
            "The columns 'chosen_input_ids' and 'rejected_input_ids' are deprecated; call them 'chosen_ids' and "
            "'rejected_ids'.",
            FutureWarning,
            stacklevel=3,
        )
        dataset = dataset.rename_columns(dict(zip(_OLD_TOKENS, TOKENS)))
    if isinstance(row.get("prompt"), str) and is_messages(row.get("chosen")):
        # The prompt as text, beside conversations that begin with it (as in UltraFeedback).
        dataset = dataset.remove_columns("prompt")
    check_rows(dataset, name, PREFERENCE, trainer)
    if not streaming:
        dataset = dataset.with_format(None)
    progress: dict[str, Any] = {} if streaming else {"num_proc": num_proc, "desc": f"Tokenizing {name} dataset"}
    dataset = dataset.map(
        pair_row,
        with_indices=True,
        fn_kwargs={
            "tokenizer": tokenizer,
            "name": name,
            "num_scores": num_scores,
            "length_column": length_column,
            "end": None if streaming else end_token_ids(tokenizer),
        },
        **progress,
    )
    if streaming:
        if max_length is None:
            return dataset, {}
        return dataset.filter(lambda row: max(len(row[column]) for column in TOKENS) <= max_length), {}

    stats = np.array(dataset[_STATS][:], dtype=np.int64).reshape(-1, 5)  # (rows, 5), see pair_row
    dataset = dataset.remove_columns(_STATS)
    lengths, ends, identical = stats[:, :2], stats[:, 2:4], stats[:, 4]
    kept = np.full(len(stats), True) if max_length is None else (lengths <= max_length).all(1)
    facts = {
        "data/rows": float(len(stats)),
        "data/longest": float(lengths.max()),
        "data/p99_length": float(np.quantile(lengths, 0.99, method="higher")),
        "data/truncated_share": float((~kept).mean()),
        "data/ends_with_eos_share": float(ends.mean()),
        "data/identical_pairs_share": float(identical.mean()),
    }
    if identical.all():
        raise ValueError(
            f"In every row of the {name} dataset, 'chosen' and 'rejected' have the same tokens, so there is nothing to "
            "prefer; check how the columns were made."
        )
    if identical.any():
        logger.warning(
            f"In {int(identical.sum())} of {len(stats)} rows of the {name} dataset (first: row "
            f"{int(identical.argmax())}) 'chosen' and 'rejected' have the same tokens, which teaches nothing; drop "
            "these rows."
        )
    if not kept.all():
        if not kept.any():
            raise ValueError(
                f"No row of the {name} dataset is left: each has an answer that is, with its prompt, longer than "
                f"`max_length={max_length}`; raise `max_length` (the longest has {int(facts['data/longest'])} tokens)."
            )
        logger.warning(
            f"{int((~kept).sum())} of {len(stats)} rows of the {name} dataset are dropped (first: row "
            f"{int((~kept).argmax())}): an answer is, with its prompt, longer than `max_length={max_length}`. Raise "
            "`max_length`, or drop them yourself."
        )
        dataset = dataset.select(np.flatnonzero(kept))
    return dataset, facts


def pair_row(
    row: Mapping[str, Any],
    index: int,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    num_scores: int = 1,
    length_column: str | None = None,
    end: EndTokens | None = None,
) -> dict[str, Any]:
    """`chosen_ids` and `rejected_ids` of one row; `margin` and `preferences` are checked.

    With `end`, a further column counts: tokens of the chosen and of the rejected sequence, whether the last token of
    each is an end token, and whether they are the same.
    """
    for column in ("margin", "preferences"):
        if column in row:
            _check_numbers(row[column], num_scores, name, index, column)
    result: dict[str, Any] = {
        tokens: _sequence(row, tokens, column, index, tokenizer, name) for tokens, column in zip(TOKENS, ANSWERS)
    }
    chosen, rejected = result.values()
    if length_column is not None:
        result[length_column] = max(len(chosen), len(rejected))
    if end is not None:
        ended = [
            next((token for token in reversed(ids) if token not in end.blanks), None) in end.ends
            for ids in (chosen, rejected)
        ]
        result[_STATS] = [len(chosen), len(rejected), *ended, chosen == rejected]
    return result


def _sequence(
    row: Mapping[str, Any], tokens: str, column: str, index: int, tokenizer: PreTrainedTokenizerBase, name: str
) -> list[int]:
    """The tokens of the prompt, if there is one, and an answer."""
    if tokens in row:
        ids = row[tokens]
        if not isinstance(ids, list) or not all(isinstance(token, int) for token in ids):
            raise ValueError(f"{where(name, index, tokens)}: expected a list of token ids; fix or drop the row.")
        column = tokens
    elif is_messages(row[column]):
        messages = check_messages(row[column], name, index, column)
        if "prompt" in row:
            messages = check_messages(row["prompt"], name, index, "prompt") + messages
        ids = tokenize_chat(tokenizer, messages, **template_kwargs(row, index, name))
    else:
        text = with_eos(check_text(row[column], name, index, column), tokenizer)
        if "prompt" in row:
            text = check_text(row["prompt"], name, index, "prompt") + text
        ids = tokenizer(text=text)["input_ids"]
    if not ids:
        raise ValueError(f"{where(name, index, column)}: the answer has no tokens; fill or drop the row.")
    return ids


def _check_numbers(value: Any, count: int, name: str, index: int, column: str) -> None:
    """Raise unless a row has one finite number, or a list of one for each score; a preference lies in [-1, 1]."""
    numbers = value if isinstance(value, list) else [value]
    if not all(isinstance(number, (int, float)) and np.isfinite(number) for number in numbers):
        what = "one number" if count == 1 else f"one number, or a list of {count}"
        raise ValueError(f"{where(name, index, column)}: expected {what}, found {value!r}; fix or drop the row.")
    if isinstance(value, list) and len(value) != count:
        raise ValueError(
            f"{where(name, index, column)}: found {len(value)} numbers for `num_scores={count}`; give one for each "
            "score, or a single number for all."
        )
    if column == "preferences" and any(abs(number) > 1 for number in numbers):
        raise ValueError(
            f"{where(name, index, column)}: found {value!r}; use 1 where the chosen answer is better, -1 where the "
            "rejected one is, 0 where they are not compared, or numbers between."
        )
