"""Rows with a prompt, a completion and whether it is desirable, made into tokens for learning from unpaired answers;
and completions put behind other rows' prompts, from which KTO estimates its reference point."""

import itertools
import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from outspoken.trainers.data.checks import UNPAIRED, check_rows
from outspoken.trainers.data.formats import (
    column_names,
    extract_prompt,
    first_row,
    is_messages,
    maybe_unpair_preference_dataset,
    where,
)
from outspoken.trainers.data.supervised import SupervisedFormat, _facts, _prompt_completion
from outspoken.trainers.measuring import EndTokens, end_token_ids

logger = logging.getLogger(__name__)

SPARE_ROWS = 256
_DRAWS = 10_000  # rows looked at for spare ones with different completions
_STATS = "_outspoken_stats"  # the column that carries what is counted over all rows, removed afterwards

Row = Mapping[str, Any]


def prepare_unpaired(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    *,
    name: str = "train",
    num_proc: int | None = None,
    length_column: str | None = None,
) -> tuple[Dataset | IterableDataset, dict[str, float]]:
    """Tokenize a dataset: it gets `prompt_ids`, `completion_ids`, and `label` as a boolean; other columns stay.

    Understood are `prompt`, `completion` and `label` (text or conversations), `chosen` and `rejected` with or without
    `prompt`, which become two rows each, and `prompt_ids`, `completion_ids` and `label`, which are tokens already.
    Columns `tools` and `chat_template_kwargs` go to the chat template. Text completions get an end-of-sequence token.
    Rows whose prompt alone fills `max_length` are dropped; the others are not cut here.

    Args:
        name: what the dataset is called in messages.
        num_proc: processes to use, not for streams.
        length_column: a column to add with each row's length in tokens, at most `max_length`.

    Returns:
        The dataset, and facts about it (empty for a stream): those of `prepare_supervised`; `data/desirable_share` and
        `data/undesirable_share`; and `data/identical_pairs_share`, the rows whose prompt and completion also stand in
        a row with the opposite label.

    Raises:
        ValueError: naming the column, the row and the remedy.
    """
    streaming = not isinstance(dataset, Dataset)
    if not streaming and dataset.format["type"] == "custom":
        raise ValueError(
            f"The {name} dataset has a transform (`with_transform`), which would be frozen into its tokens; apply it "
            "with `Dataset.map` first."
        )
    row = first_row(dataset, name)
    if isinstance(row.get("prompt"), str) and is_messages(row.get("chosen")):
        dataset = dataset.remove_columns("prompt")  # as text, beside conversations that begin with it (UltraFeedback)
    check_rows(dataset, name, UNPAIRED, "KTOTrainer")
    if not streaming:
        dataset = dataset.with_format(None)
    columns = column_names(dataset, name)
    tokenized = {"completion_ids", "label"} <= {*columns}
    if tokenized and "prompt_ids" not in columns:
        raise ValueError(
            f"The {name} dataset has columns 'completion_ids' and 'label', but no 'prompt_ids'; add the prompts' tokens."
        )
    how: dict[str, Any] = {} if streaming else {"num_proc": num_proc}
    if not tokenized:
        if "prompt" not in columns:
            desc = {} if streaming else {"desc": f"Extracting the prompts of the {name} dataset"}
            dataset = dataset.map(_extract_prompt, with_indices=True, fn_kwargs={"name": name}, **how, **desc)
        dataset = maybe_unpair_preference_dataset(dataset, num_proc, f"Unpairing {name} dataset")
    dataset = dataset.map(
        unpaired_row,
        with_indices=True,
        fn_kwargs={
            "tokenizer": tokenizer,
            "max_length": max_length,
            "name": name,
            "length_column": length_column,
            "end": None if streaming else end_token_ids(tokenizer),
        },
        **({} if streaming else {**how, "desc": f"Tokenizing {name} dataset"}),
    )
    if streaming:
        return dataset if max_length is None else dataset.filter(lambda row: len(row["prompt_ids"]) < max_length), {}

    stats = np.array(dataset[_STATS][:], dtype=np.int64).reshape(-1, 6)  # (rows, 6), see unpaired_row
    dataset = dataset.remove_columns(_STATS)
    facts = _facts(stats[:, :4], SupervisedFormat(max_length=max_length))
    facts["data/desirable_share"] = float(stats[:, 4].mean())
    facts["data/undesirable_share"] = 1.0 - facts["data/desirable_share"]
    facts["data/identical_pairs_share"] = _contradictory_share(stats[:, 5], stats[:, 4].astype(bool))
    _warn(stats, name)
    if not stats[:, 1].all():
        kept = np.flatnonzero(stats[:, 1])
        if len(kept) == 0:
            raise ValueError(
                f"Every prompt of the {name} dataset has at least `max_length={max_length}` tokens, so no token of a "
                f"completion is left; raise `max_length` (the longest row has {int(facts['data/longest'])} tokens)."
            )
        logger.warning(
            f"{len(stats) - len(kept)} of {len(stats)} rows of the {name} dataset are dropped: their prompts alone have "
            f"`max_length={max_length}` tokens or more. Raise `max_length`, or drop them yourself."
        )
        dataset = dataset.select(kept)
    return dataset, facts


def unpaired_row(
    row: Row,
    index: int,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    name: str,
    length_column: str | None = None,
    end: EndTokens | None = None,
) -> dict[str, Any]:
    """`prompt_ids`, `completion_ids` and `label` of one row.

    With `end`, a fourth column counts: tokens, completion tokens that truncation leaves, whether the last token is an
    end token, whether the prompt's tokens are not the beginning of the whole row's, the label, and a hash of both.
    """
    label = row["label"]
    if not isinstance(label, (bool, int, float, np.bool_)) or label not in (0, 1):
        found = "nothing (None)" if label is None else repr(label)
        raise ValueError(f"{where(name, index, 'label')}: expected true or false, found {found}; make it a boolean.")
    if "completion_ids" in row:
        prompt, completion, mismatch = list(row["prompt_ids"]), list(row["completion_ids"]), False
    else:
        if _is_empty(row["completion"]):
            raise ValueError(f"{where(name, index, 'completion')}: the completion is empty; fill or drop the row.")
        whole = SupervisedFormat(completion_only_loss=True, max_length=None)
        ids, mask, mismatch = _prompt_completion(row, index, tokenizer, whole, name)
        boundary = len(mask) - sum(mask)
        prompt, completion = ids[:boundary], ids[boundary:]
    if not completion:
        raise ValueError(f"{where(name, index, 'completion')}: the completion has no tokens; fill or drop the row.")
    result: dict[str, Any] = {"prompt_ids": prompt, "completion_ids": completion, "label": bool(label)}
    length = len(prompt) + len(completion)
    left = len(completion) if max_length is None else max(0, min(length, max_length) - len(prompt))
    if length_column is not None:
        result[length_column] = length if max_length is None else min(length, max_length)
    if end is not None:
        last = next((token for token in reversed(completion) if token not in end.blanks), None)
        # The hash of integers is the same in every process.
        result[_STATS] = [length, left, last in end.ends, mismatch, bool(label), hash(_key(result))]
    return result


def _extract_prompt(row: Row, index: int, name: str) -> dict[str, Any]:
    found = extract_prompt(row)
    if not found["prompt"]:
        raise ValueError(
            f"Row {index} of the {name} dataset has no column 'prompt', and its 'chosen' and 'rejected' do not begin "
            "alike; add the prompt as a column."
        )
    return found


def _is_empty(completion: Any) -> bool:
    if isinstance(completion, str):
        return not completion.strip()
    return is_messages(completion) and all(m.get("content") == "" and not m.get("tool_calls") for m in completion)


def _contradictory_share(keys: np.ndarray, labels: np.ndarray) -> float:
    _, group = np.unique(keys, return_inverse=True)
    wanted, unwanted = np.bincount(group, labels) > 0, np.bincount(group, ~labels) > 0
    return float((wanted & unwanted)[group].mean())


def _warn(stats: np.ndarray, name: str) -> None:
    mismatch, labels = stats[:, 3], stats[:, 4]
    if mismatch.any():
        logger.warning(
            f"In {int(mismatch.sum())} of {len(stats)} rows of the {name} dataset (first: row "
            f"{int(mismatch.argmax())}) the prompt's tokens are not the beginning of the tokens of prompt + completion, "
            "so the model trains on another context than it will see. End prompts on a token boundary, e.g. move a "
            "trailing space into the completion, or use a chat template that renders the prompt alone as it does before "
            "a completion."
        )
    if len({*labels.tolist()}) == 1:
        which, other = ("desirable", "undesirable") if labels[0] else ("undesirable", "desirable")
        logger.warning(
            f"All {len(labels)} rows of the {name} dataset are {which}, so there is nothing to tell them from; add "
            f"{other} ones (`label` {str(not labels[0]).lower()}), or use SFTTrainer for good answers alone."
        )


# ---------------------------------------------------------------------- mismatched pairs


def _key(row: Row) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(row["prompt_ids"]), tuple(row["completion_ids"])


def spare_rows(dataset: Dataset | IterableDataset, seed: int, name: str = "train") -> list[dict[str, list[int]]]:
    """Up to 256 rows with different completions, for rows that find none in their batch: drawn with `seed`, of a stream
    the first ones.

    Raises:
        ValueError: there are not two different completions.
    """
    if isinstance(dataset, Dataset):
        ids = dataset.select_columns(["prompt_ids", "completion_ids"])
        rows: Iterator[Row] = (ids[int(i)] for i in np.random.default_rng(seed).permutation(len(ids))[:_DRAWS])
    else:
        rows = itertools.islice(iter(dataset), SPARE_ROWS)
    found: dict[tuple[int, ...], dict[str, list[int]]] = {}
    for row in rows:
        found.setdefault(tuple(row["completion_ids"]), {key: row[key] for key in ("prompt_ids", "completion_ids")})
        if len(found) == SPARE_ROWS:
            break
    if len(found) < 2:
        raise ValueError(
            f"`loss_type='kto'` needs completions to other prompts, but all rows of the {name} dataset that were looked "
            "at have the same completion; use `loss_type='apo_zero_unpaired'`, or add other completions."
        )
    return list(found.values())


def mismatched_completions(rows: Sequence[Row], spares: Sequence[Row] = ()) -> list[list[int]]:
    """For each row the tokens of a completion that was not written to its prompt.

    It is that of the row before it, for the first row that of the last: so the completions of a batch stay the same and
    only change their prompts (arXiv 2402.01306). Completions that some row of the batch has behind the same prompt are
    passed over, and the next one back is taken. Where the batch has none left (always, if it is one row), it is that of
    a spare row, beginning with the one that a hash of the row's tokens points to; passed over are, besides, those that
    a spare row has behind the same prompt. Where there is none either (all prompts are the same), any completion that
    differs from the row's own will do.

    Args:
        rows: with `prompt_ids` and `completion_ids`. Where they also have `KL_completion_ids`, it is those.
        spares: rows like these, from anywhere in the dataset.

    Raises:
        ValueError: all rows and spares have the same completion.
    """
    keys = [_key(row) for row in rows]
    written: dict[tuple[int, ...], set[tuple[int, ...]]] = defaultdict(set)
    for prompt, completion in keys:
        written[prompt].add(completion)

    found = []
    for i, (row, (prompt, own)) in enumerate(zip(rows, keys)):
        if row.get("KL_completion_ids") is not None:
            found.append(list(row["KL_completion_ids"]))
            continue
        before = (keys[i - step][1] for step in range(1, len(keys)))
        other = next((completion for completion in before if completion not in written[prompt]), None)
        if other is None and spares:
            start = hash(keys[i]) % len(spares)
            others = [_key(spare) for spare in (*spares[start:], *spares[:start])]
            passed = written[prompt] | {completion for at, completion in others if at == prompt}
            other = next((completion for _, completion in others if completion not in passed), None)
        if other is None:
            anything = (completion for _, completion in (*keys, *map(_key, spares)) if completion != own)
            other = next(anything, None)
        if other is None:
            raise ValueError(
                "`loss_type='kto'` needs completions of other rows, but all that were looked at are the same; use "
                "`loss_type='apo_zero_unpaired'`, or add other completions."
            )
        found.append(list(other))
    return found


def fix_mismatched_completions(dataset: Dataset, spares: Sequence[Row], num_proc: int | None = None) -> Dataset:
    """Give each row `KL_completion_ids`, once and for all: `mismatched_completions` of blocks of 1000 rows."""

    columns = [c for c in ("prompt_ids", "completion_ids", "KL_completion_ids") if c in dataset.column_names]

    def fix(*values: list[Any]) -> dict[str, list[Any]]:
        rows = [dict(zip(columns, row)) for row in zip(*values)]
        return {"KL_completion_ids": mismatched_completions(rows, spares)}

    description = "Pairing prompts with other rows' completions"
    return dataset.map(fix, batched=True, input_columns=columns, num_proc=num_proc, desc=description)
