"""Rows with text or conversations, made into `input_ids` and `labels` for supervised fine-tuning."""

import json
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from outspoken.trainers.data.chat_templates import (
    template_with_marks,
    tokenize_chat,
    tokenize_chat_with_assistant_mask,
)
from outspoken.trainers.data.checks import SUPERVISED, check_rows
from outspoken.trainers.data.formats import (
    check_messages,
    check_text,
    column_names,
    common_prefix_length,
    first_row,
    is_conversational_from_value,
    is_messages,
    messages_from_value,
    where,
)
from outspoken.trainers.logprobs import IGNORE_INDEX

logger = logging.getLogger(__name__)

TRUNCATION_MODES = ("keep_start", "keep_end")
_STATS = "_outspoken_stats"  # the column that carries what is counted over all rows, removed afterwards


@dataclass(frozen=True)
class SupervisedFormat:
    """How rows become tokens and labels.

    Attributes:
        text_column: the column of plain text.
        completion_only_loss: loss on the completion only, where rows have a prompt and a completion.
        assistant_only_loss: loss on what the assistant wrote only; needs conversations.
        max_length: rows are cut to this many tokens; None leaves them.
        truncation_mode: "keep_start" or "keep_end".
    """

    text_column: str = "text"
    completion_only_loss: bool = False
    assistant_only_loss: bool = False
    max_length: int | None = 1024
    truncation_mode: str = "keep_start"


def prepare_supervised(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    how: SupervisedFormat,
    *,
    name: str = "train",
    formatting_func: Callable[[dict], str] | None = None,
    num_proc: int | None = None,
) -> tuple[Dataset | IterableDataset, dict[str, float]]:
    """Tokenize a dataset and give it `labels`, -100 on every token without loss; other columns stay.

    Understood are a text column, `messages` (or ShareGPT `conversations`), `prompt` and `completion` (text or
    conversations), and `input_ids` that are tokens already, with `labels`, or with `completion_mask` or
    `assistant_masks` to make them from. Columns `tools` and `chat_template_kwargs` go to the chat template. Plain text
    and completions get an end-of-sequence token. Rows that truncation leaves without any label are dropped.

    Args:
        name: what the dataset is called in messages.
        formatting_func: makes a row's text; it then counts instead of all other columns.
        num_proc: processes to use, not for streams.

    Returns:
        The dataset, and facts about it (empty for a stream): `data/rows` before dropping, `data/longest` and
        `data/p99_length` in tokens before truncation, and as shares of rows `data/truncated_share`,
        `data/no_supervised_share`, `data/ends_with_eos_share` (of the rows not truncated, those whose last label is an
        end-of-sequence or added token), and `data/boundary_mismatch_share` (prompt's tokens are not the beginning of
        prompt + completion's).

    Raises:
        ValueError: naming the column, the row and the remedy.
    """
    if how.truncation_mode not in TRUNCATION_MODES:
        raise ValueError(f"`truncation_mode` is {how.truncation_mode!r}; use 'keep_start' or 'keep_end'.")
    streaming = not isinstance(dataset, Dataset)
    if not streaming and dataset.format["type"] == "custom":
        raise ValueError(
            f"The {name} dataset has a transform (`with_transform`), which would be frozen into its tokens; apply it "
            "with `Dataset.map` first, or pass `dataset_kwargs={'skip_prepare_dataset': True}`."
        )
    columns = column_names(dataset, name)
    source = row_source(columns, first_row(dataset, name), how, name, formatted=formatting_func is not None)
    read = {"prompt": ["prompt", "completion"], "text": [how.text_column], "input_ids": [], "formatted": []}
    if used := read.get(source, [source]):
        check_rows(dataset.select_columns(used), name, SUPERVISED, "SFTTrainer", filled=used)
    if formatting_func is not None and source == "input_ids":
        logger.warning(f"The {name} dataset is tokenized already (it has `input_ids`); `formatting_func` is ignored.")
    if not streaming:
        dataset = dataset.with_format(None)
    end_tokens = {tokenizer.eos_token_id, *tokenizer.get_added_vocab().values()} - {None}
    progress: dict[str, Any] = {} if streaming else {"num_proc": num_proc, "desc": f"Tokenizing {name} dataset"}
    dataset = dataset.map(
        supervised_row,
        with_indices=True,
        fn_kwargs={
            "tokenizer": tokenizer,
            "how": how,
            "source": source,
            "name": name,
            "formatting_func": formatting_func,
            "end_tokens": None if streaming else sorted(end_tokens),
        },
        **progress,
    )
    if streaming:
        if how.max_length is not None:
            dataset = dataset.filter(_has_label)
        return dataset, {}

    stats = np.array(dataset[_STATS][:], dtype=np.int64).reshape(-1, 4)  # (rows, 4), see supervised_row
    dataset = dataset.remove_columns(_STATS)
    facts = _facts(stats, how)
    if stats[:, 3].any():
        logger.warning(
            f"In {int(stats[:, 3].sum())} of {len(stats)} rows of the {name} dataset (first: row "
            f"{int(stats[:, 3].argmax())}) the prompt's tokens are not the beginning of the tokens of prompt + "
            "completion, so the model trains on another context than it will see. End prompts on a token boundary, "
            "e.g. move a trailing space into the completion, or use a chat template that renders the prompt alone as "
            "it does before a completion."
        )
    if how.max_length is not None and not stats[:, 1].all():
        kept = np.flatnonzero(stats[:, 1])
        if len(kept) == 0:
            raise ValueError(
                f"No row of the {name} dataset has a token with loss left after truncation to "
                f"`max_length={how.max_length}`; raise `max_length` (the longest row has {int(facts['data/longest'])} "
                "tokens)."
            )
        logger.warning(
            f"{len(stats) - len(kept)} of {len(stats)} rows of the {name} dataset are dropped: truncation to "
            f"`max_length={how.max_length}` leaves them no token with loss. Raise `max_length`, or drop them yourself."
        )
        dataset = dataset.select(kept)
    return dataset, facts


def check_prepared(columns: Collection[str], name: str) -> None:
    """Raise unless a dataset that is used as it is has tokens, and labels if it has masks to make them from."""
    if "input_ids" not in columns:
        raise ValueError(
            f"`skip_prepare_dataset` is set, but the {name} dataset has no column 'input_ids'; tokenize it, drop the "
            "option, or pass a `data_collator`."
        )
    if "labels" not in columns and {"completion_mask", "assistant_masks"} & {*columns}:
        raise ValueError(
            f"`skip_prepare_dataset` is set, so the masks of the {name} dataset would be ignored; add a column "
            "'labels' (-100 where no loss is wanted), or drop the option."
        )


def row_source(
    columns: Sequence[str], row: Mapping[str, Any], how: SupervisedFormat, name: str, formatted: bool = False
) -> str:
    """Which columns a dataset's tokens come from: "input_ids", "formatted", "prompt", "messages", "conversations" or
    "text".

    Raises:
        ValueError: none of them is there, or the loss that is asked for does not fit them.
    """
    if "input_ids" in columns:
        source = "input_ids"
    elif formatted:
        source = "formatted"
    elif {"prompt", "completion"} <= {*columns}:
        source = "prompt"
    elif "messages" in columns:
        source = "messages"
    elif is_conversational_from_value(row) or is_messages(row.get("conversations")):
        source = "conversations"
    elif how.text_column in columns:
        source = "text"
    elif {"chosen", "rejected"} <= {*columns}:
        raise ValueError(
            f"The {name} dataset has columns 'chosen' and 'rejected', so it holds preferences; use DPOTrainer, or keep "
            "the chosen answers in a column 'completion' beside 'prompt'."
        )
    elif "prompt" in columns:
        raise ValueError(
            f"The {name} dataset has a column 'prompt' but no 'completion' to learn; add one, or pass "
            "`formatting_func`."
        )
    else:
        raise ValueError(
            f"The {name} dataset has columns {', '.join(map(repr, columns))}, but none to train on; it needs "
            f"{how.text_column!r} (set by `dataset_text_field`), 'messages', or 'prompt' and 'completion': name the "
            "column in `dataset_text_field`, rename it, or pass `formatting_func`."
        )
    if how.assistant_only_loss and not (
        source in ("messages", "conversations")
        or (source == "prompt" and is_messages(row["completion"]))
        or (source == "input_ids" and {"assistant_masks", "labels"} & {*columns})
    ):
        raise ValueError(
            f"`assistant_only_loss=True` needs conversations, but the {name} dataset is not conversational; set it to "
            "False, or give the dataset a column 'messages'."
        )
    return source


def supervised_row(
    row: Mapping[str, Any],
    index: int,
    tokenizer: PreTrainedTokenizerBase,
    how: SupervisedFormat,
    source: str,
    name: str,
    formatting_func: Callable[[dict], str] | None = None,
    end_tokens: Sequence[int] | None = None,
) -> dict[str, list[int]]:
    """`input_ids` and `labels` of one row, truncated.

    With `end_tokens`, a third column counts: tokens before truncation, labels after it, whether the last label is one
    of `end_tokens`, and whether the prompt's tokens are not the beginning of the whole row's.
    """
    mismatch = False
    if source == "input_ids":
        ids, labels = _tokenized_already(row, index, how, name)
    else:
        if source == "formatted":
            assert formatting_func is not None
            text = formatting_func(dict(row))
            if not isinstance(text, str):
                raise ValueError(
                    f"`formatting_func` returned a {type(text).__name__} for row {index} of the {name} dataset; it "
                    "must return one string for each row."
                )
            ids = tokenizer(text=with_eos(text, tokenizer))["input_ids"]
            mask = [1] * len(ids)
        elif source == "text":
            text = check_text(row[how.text_column], name, index, how.text_column)
            ids = tokenizer(text=with_eos(text, tokenizer))["input_ids"]
            mask = [1] * len(ids)
        elif source == "prompt":
            ids, mask, mismatch = _prompt_completion(row, index, tokenizer, how, name)
        else:
            turns = row[source]
            if source == "conversations" and is_conversational_from_value(row):
                turns = messages_from_value(turns)
            ids, mask = _conversation(
                check_messages(turns, name, index, source), row, index, source, tokenizer, how, name
            )
        labels = [token if wanted else IGNORE_INDEX for token, wanted in zip(ids, mask)]

    length = len(ids)
    if how.max_length is not None and length > how.max_length:
        keep = slice(how.max_length) if how.truncation_mode == "keep_start" else slice(-how.max_length, None)
        ids, labels = ids[keep], labels[keep]
    result = {"input_ids": ids, "labels": labels}
    if end_tokens is not None:
        supervised = [label for label in labels if label != IGNORE_INDEX]
        # A newline that a template puts behind the end-of-turn token does not hide it.
        last = next((label for label in reversed(supervised) if str(tokenizer.decode([label])).strip()), None)
        result[_STATS] = [length, len(supervised), int(last in end_tokens), int(mismatch)]
    return result


def _tokenized_already(
    row: Mapping[str, Any], index: int, how: SupervisedFormat, name: str
) -> tuple[list[int], list[int]]:
    ids = list(row["input_ids"])
    given = {"labels": row.get("labels")}
    if given["labels"] is None:
        given = {"assistant_masks": row.get("assistant_masks")}
        if how.completion_only_loss:
            given["completion_mask"] = row.get("completion_mask")
    columns = {column: list(values) for column, values in given.items() if values is not None}
    for column, values in columns.items():
        if len(values) != len(ids):
            raise ValueError(
                f"{where(name, index, column)}: {len(values)} values for {len(ids)} input_ids; both must be equally "
                "long."
            )
    if "labels" in columns:
        return ids, columns["labels"]
    return ids, [
        token if all(mask[position] for mask in columns.values()) else IGNORE_INDEX
        for position, token in enumerate(ids)
    ]


def _prompt_completion(
    row: Mapping[str, Any], index: int, tokenizer: PreTrainedTokenizerBase, how: SupervisedFormat, name: str
) -> tuple[list[int], list[int], bool]:
    """Tokens, loss mask, and whether the prompt tokenizes differently once the completion follows."""
    if is_messages(row["prompt"]) or is_messages(row["completion"]):
        asked = check_messages(row["prompt"], name, index, "prompt")
        answered = check_messages(row["completion"], name, index, "completion")
        kwargs = template_kwargs(row, index, name)
        if how.assistant_only_loss:  # the template that the whole conversation is rendered with
            kwargs = {"chat_template": template_with_marks(tokenizer), **kwargs}
        prompt_ids = tokenize_chat(tokenizer, asked, add_generation_prompt=True, **kwargs)
        ids, mask = _conversation(asked + answered, row, index, "completion", tokenizer, how, name)
    else:
        prompt = check_text(row["prompt"], name, index, "prompt")
        completion = check_text(row["completion"], name, index, "completion")
        prompt_ids = tokenizer(text=prompt)["input_ids"]
        ids = tokenizer(text=prompt + with_eos(completion, tokenizer))["input_ids"]
        mask = [1] * len(ids)
    # The completion begins where the tokens of the prompt and of the whole part, which need not be after the prompt.
    boundary = common_prefix_length(prompt_ids, ids)
    if how.completion_only_loss:
        mask = [0] * boundary + mask[boundary:]
    return ids, mask, boundary < len(prompt_ids)


def _conversation(
    messages: list[dict[str, Any]],
    row: Mapping[str, Any],
    index: int,
    column: str,
    tokenizer: PreTrainedTokenizerBase,
    how: SupervisedFormat,
    name: str,
) -> tuple[list[int], list[int]]:
    """Tokens of a conversation, and 1 for each that carries loss."""
    kwargs = template_kwargs(row, index, name)
    if not how.assistant_only_loss:
        ids = tokenize_chat(tokenizer, messages, **kwargs)
        return ids, [1] * len(ids)
    ids, mask = tokenize_chat_with_assistant_mask(tokenizer, messages, **kwargs)
    if 1 not in mask:
        raise ValueError(
            f"{where(name, index, column)}: the conversation has no token of the assistant, though "
            "`assistant_only_loss=True`; drop the row, or check where the chat template has {% generation %} markers."
        )
    return ids, mask


def template_kwargs(row: Mapping[str, Any], index: int | None, name: str) -> dict[str, Any]:
    """What a row says to the chat template beside its messages: `tools`, and its `chat_template_kwargs`.

    Raises:
        ValueError: `tools` is text, but not JSON.
    """
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{where(name, index, 'tools')}: not valid JSON ({error.msg}); store the tools' schemas as a list, or "
                "as JSON text."
            ) from error
    return {"tools": tools or None, **(row.get("chat_template_kwargs") or {})}


def with_eos(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A text that ends with the end-of-sequence token."""
    eos = tokenizer.eos_token
    if eos is None:
        raise ValueError(
            "The tokenizer has no end-of-sequence token, so the model could not learn to stop; set `eos_token` in the "
            "config."
        )
    return text if text.endswith(eos) else text + eos


def _has_label(row: Mapping[str, Any]) -> bool:
    return any(label != IGNORE_INDEX for label in row["labels"])


def _facts(stats: np.ndarray, how: SupervisedFormat) -> dict[str, float]:
    """Facts of a dataset from the counts of its rows, (rows, 4)."""
    lengths, supervised, ends, mismatch = stats.T
    truncated = lengths > how.max_length if how.max_length is not None else np.zeros(len(stats), dtype=bool)
    facts = {
        "data/rows": float(len(stats)),
        "data/longest": float(lengths.max()),
        "data/p99_length": float(np.quantile(lengths, 0.99, method="higher")),
        "data/truncated_share": float(truncated.mean()),
        "data/no_supervised_share": float((supervised == 0).mean()),
        "data/boundary_mismatch_share": float(mismatch.mean()),
    }
    whole = ~truncated & (supervised > 0)
    if whole.any():
        facts["data/ends_with_eos_share"] = float(ends[whole].mean())
    return facts
