"""Rows with images, made into batches when they are needed: pixels of a whole dataset would not fit on disk or in memory.

Axis letters: `B` rows (or pairs) of a batch, `T` tokens of a row.

A row has `images`, a list, or `image`, a single one (PIL images, or what else the processor takes); the rest is as for
text. Conversations may say where the images stand by blocks `{"type": "image"}` in their contents; else all stand
before the first words of the user.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import ProcessorMixin

from outspoken.trainers.data.chat_templates import apply_chat_template
from outspoken.trainers.data.formats import MESSAGE_COLUMNS, is_messages, prepare_multimodal_messages
from outspoken.trainers.data.padding import pad
from outspoken.trainers.data.supervised import template_kwargs, with_eos
from outspoken.trainers.logprobs import IGNORE_INDEX

IMAGE_COLUMNS = ("image", "images")

# What processors return for each token, beside `input_ids` and `attention_mask`: which tokens stand for an image.
TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")


@dataclass
class DataCollatorForVisionLanguageModeling:
    """Renders, tokenizes and pads B rows on the right to (B, T), and prepares their images.

    Returns `input_ids`, `attention_mask`, `labels` (-100 where there is no loss), and what the processor makes of the
    images (`pixel_values` ...). Rows have `messages`, the text column, or `prompt` and `completion`, all of one kind;
    `tools` and `chat_template_kwargs` go to the chat template. Text that is no conversation gets an end-of-sequence
    token.

    Attributes:
        processor: of the model; its tokenizer has a padding token.
        max_length: rows are cut to this many tokens, never into an image.
        completion_only_loss: loss on completions only.
        assistant_only_loss: loss on what the assistant wrote only; needs `messages`, and a chat template with
            `{% generation %}` markers.
        chat_template: used instead of the processor's own.

    Raises:
        ValueError: a row does not fit, in one sentence.
    """

    processor: ProcessorMixin
    max_length: int | None = None
    completion_only_loss: bool = False
    pad_to_multiple_of: Any = None  # int or None
    dataset_text_field: str = "text"
    assistant_only_loss: bool = False
    chat_template: str | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        images = [row_images(row) for row in rows]
        columns = {*rows[0]}
        if {"prompt", "completion"} <= columns:
            if self.assistant_only_loss:
                raise ValueError(
                    "`assistant_only_loss=True` needs a column 'messages' where there are images, not 'prompt' and "
                    "'completion'; set it to False, and the loss is on the completions."
                )
            texts = [
                render_chat(row, own, self.processor, self.chat_template)
                if is_messages(row["prompt"])
                else render_text(row, ("prompt", "completion"), self.processor)
                for row, own in zip(rows, images)
            ]
            processed = process(self.processor, [text["prompt"] for text in texts], images)
            answers = process(self.processor, [text["completion"] for text in texts])
            tokens = join_tokens(token_rows(processed), token_rows(answers))
            completions = tokens.pop("completion_mask")
            loss = completions if self.completion_only_loss else tokens["attention_mask"]
        elif self.completion_only_loss:
            raise ValueError(
                "`completion_only_loss=True` needs columns 'prompt' and 'completion', and the dataset has "
                f"{', '.join(map(repr, rows[0]))}; leave it unset."
            )
        elif self.assistant_only_loss:
            processed = self._with_assistant_masks(rows, images)
            tokens = token_rows(processed, "assistant_masks")
            loss = tokens.pop("assistant_masks")
        else:
            column = "text" if "messages" in columns else self.dataset_text_field
            texts = [
                render_chat(row, own, self.processor, self.chat_template)
                if "messages" in columns
                else render_text(row, (column,), self.processor)
                for row, own in zip(rows, images)
            ]
            processed = process(self.processor, [text[column] for text in texts], images)
            tokens = token_rows(processed)
            loss = tokens["attention_mask"]
        tokens["labels"] = [row.masked_fill(mask == 0, IGNORE_INDEX) for row, mask in zip(tokens["input_ids"], loss)]
        batch = cut_and_pad(tokens, self.processor, self.max_length, self.pad_to_multiple_of)
        batch.pop("truncated", None)
        return {**image_inputs(processed), **batch}

    def _with_assistant_masks(self, rows: Sequence[Mapping[str, Any]], images: list[list[Any]]) -> Any:
        if not is_messages(rows[0].get("messages")):
            raise ValueError(
                "`assistant_only_loss=True` needs conversations, but the dataset is not conversational; set it to "
                "False, or give the dataset a column 'messages'."
            )
        settings = [template_kwargs(row, None, "given") for row in rows]
        if any(other != settings[0] for other in settings):
            raise ValueError(
                "`assistant_only_loss=True` with images needs the same `tools` and `chat_template_kwargs` in all rows; "
                "set it to False, or drop the columns."
            )
        messages = [prepare_multimodal_messages(row["messages"], own) for row, own in zip(rows, images)]
        return self.processor.apply_chat_template(
            messages,
            chat_template=self.chat_template,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            return_assistant_tokens_mask=True,
            processor_kwargs=dict(_PROCESSOR_KWARGS),  # which is written into
            **settings[0],
        )


@dataclass
class DataCollatorForVisionPreference:
    """Renders, tokenizes and pads B pairs with images on the right: the chosen answers in the first half of 2B rows.

    Returns `input_ids`, `attention_mask`, `completion_mask`, (2B, T); `truncated`, (2B,), if `max_length` is set; and
    what the processor makes of the images, for each row its own. Rows have `prompt`, `chosen` and `rejected`, text or
    conversations; `tools` and `chat_template_kwargs` go to the chat template. Text that is no conversation gets an
    end-of-sequence token.

    Attributes:
        processor: of the model; its tokenizer has a padding token.
        max_length: rows are cut to this many tokens, never into an image.

    Raises:
        ValueError: a row does not fit, in one sentence.
    """

    processor: ProcessorMixin
    max_length: int | None = None
    pad_to_multiple_of: Any = None  # int or None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        images = [row_images(row) for row in rows]
        texts = [
            render_chat(row, own, self.processor)
            if is_messages(row["prompt"])
            else render_text(row, ("prompt", "chosen", "rejected"), self.processor)
            for row, own in zip(rows, images)
        ]
        prompts = process(self.processor, [text["prompt"] for text in texts], images)
        answers = process(self.processor, [text[side] for side in ("chosen", "rejected") for text in texts])
        twice = {name: values * 2 for name, values in token_rows(prompts).items()}
        tokens = join_tokens(twice, token_rows(answers))
        batch = cut_and_pad(tokens, self.processor, self.max_length, self.pad_to_multiple_of)
        pictures = {
            name: torch.cat([value, value]) if isinstance(value, Tensor) else [*value, *value]
            for name, value in image_inputs(prompts).items()
        }
        return {**pictures, **batch}


# ---------------------------------------------------------------------- rows


def contents_as_blocks(dataset: Any, processor: Any) -> Any:
    """A dataset of text for a model that sees: its template takes contents as lists of blocks. Else the same."""
    if not isinstance(processor, ProcessorMixin):
        return dataset

    def convert(row: Mapping[str, Any]) -> dict[str, Any]:
        return {c: prepare_multimodal_messages(row[c]) for c in MESSAGE_COLUMNS if is_messages(row.get(c))}

    return dataset.map(convert)


def row_images(row: Mapping[str, Any]) -> list[Any]:
    """The images of a row; none if they are missing."""
    images = [row["image"]] if "image" in row else row.get("images") or []
    return [image for image in images if image is not None]


def render_chat(
    row: Mapping[str, Any], images: list[Any], processor: ProcessorMixin, chat_template: str | None = None
) -> dict[str, str]:
    """The conversations of a row as text: `text` of `messages`; or `prompt`, in which the images stand, and answers."""
    columns = [c for c in ("messages", "prompt", "completion", "chosen", "rejected") if c in row]
    if "messages" in columns:
        columns = ["messages"]
    prepared = {
        column: prepare_multimodal_messages(row[column], images if column in ("messages", "prompt") else None)
        for column in columns
    }
    settings = template_kwargs(row, None, "given")
    if chat_template is not None:
        settings["chat_template"] = chat_template
    return apply_chat_template(prepared, processor, **settings)


def render_text(row: Mapping[str, Any], columns: Sequence[str], processor: Any) -> dict[str, str]:
    """Columns of a row that is no conversation, with an end-of-sequence token behind all but the prompt."""
    return {c: row[c] if c == "prompt" else with_eos(row[c], processor.tokenizer) for c in columns}


# ---------------------------------------------------------------------- tokens

# A rendered conversation has its special tokens already.
_PROCESSOR_KWARGS = {"padding": True, "padding_side": "right", "add_special_tokens": False}


def process(processor: Any, texts: list[str], images: list[list[Any]] | None = None) -> Any:
    """What the processor makes of texts and their images."""
    if images is not None and not any(images):
        images = None  # processors do not take a batch of no images
    return processor(text=texts, images=images, return_tensors="pt", **_PROCESSOR_KWARGS)


def token_rows(processed: Mapping[str, Any], *more: str) -> dict[str, list[Tensor]]:
    """What there is for each token, as B rows without padding."""
    present = processed["attention_mask"].bool()
    names = [name for name in ("input_ids", "attention_mask", *TOKEN_TYPES, *more) if name in processed]
    return {name: [row[mask] for row, mask in zip(torch.as_tensor(processed[name]), present)] for name in names}


def join_tokens(prompts: dict[str, list[Tensor]], answers: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
    """Prompts with answers behind them, and `completion_mask`, 1 for the answers' tokens."""
    ends = answers["input_ids"]
    joined = {
        name: [
            torch.cat([start, end])
            for start, end in zip(starts, answers.get(name, [e.new_zeros(len(e)) for e in ends]))
        ]
        for name, starts in prompts.items()
    }
    joined["completion_mask"] = [
        torch.cat([torch.zeros_like(start), torch.ones_like(end)]) for start, end in zip(prompts["input_ids"], ends)
    ]
    return joined


def cut_and_pad(
    tokens: dict[str, list[Tensor]], processor: Any, max_length: int | None, multiple_of: int | None
) -> dict[str, Tensor]:
    """Rows as (B, T), and `truncated`, (B,), where they were longer than `max_length`, if that is set.

    Raises:
        ValueError: a token that stands for an image would be cut off.
    """
    lengths = torch.tensor([len(row) for row in tokens["input_ids"]])
    if max_length is not None:
        for ids in tokens["input_ids"]:
            places = torch.isin(ids, torch.tensor(image_token_ids(processor), dtype=ids.dtype)).nonzero()
            if len(places) and int(places[-1]) >= max_length:
                raise ValueError(
                    f"`max_length={max_length}` would cut off a part of an image: in a row of {len(ids)} tokens the "
                    f"images end at token {int(places[-1]) + 1}; raise `max_length` to more than that, set it to None, "
                    "or make the images smaller."
                )
    padding = {"input_ids": processor.tokenizer.pad_token_id, "labels": IGNORE_INDEX}
    batch = {
        name: pad([row[:max_length] for row in rows], padding.get(name, 0), multiple_of=multiple_of, dtype=torch.long)
        for name, rows in tokens.items()
    }
    if max_length is not None:
        batch["truncated"] = lengths > max_length
    return batch


def image_inputs(processed: Mapping[str, Any]) -> dict[str, Any]:
    """What the model gets of the images."""
    of_tokens = ("input_ids", "attention_mask", "assistant_masks", *TOKEN_TYPES)
    return {name: value for name, value in processed.items() if name not in of_tokens}


def joined_images(images: Sequence[Mapping[str, Tensor]], width: int, behind: int = 0) -> dict[str, Tensor]:
    """What the model gets of the images of several prompts that are padded on the left.

    Args:
        images: for each prompt what `image_inputs` has of it, and its token types, if there are some, one per token.
        width: tokens of the longest prompt.
        behind: columns for what is written behind the prompts, which no image is part of.

    Returns:
        What belongs to images, one after the other; token types as (N, width + behind).
    """
    joined = {}
    for name in dict.fromkeys(name for row in images for name in row):
        if name in TOKEN_TYPES:
            first = next(row[name] for row in images if name in row)
            joined[name] = torch.zeros(len(images), width + behind, dtype=torch.long, device=first.device)
            for types, row in zip(joined[name], images):
                if name in row:
                    types[width - len(row[name]) : width] = row[name]
        else:
            joined[name] = torch.cat([row[name] for row in images if name in row])
    return joined


def image_token_ids(processor: Any) -> list[int]:
    """The tokens that stand for parts of an image (or of a video) in a text."""
    found = {getattr(processor, name, None) for name in ("image_token_id", "video_token_id")}
    return sorted(token for token in found if token is not None)


def expect_unused_parameters(processor: Any, args: Any) -> None:
    """Tell DDP that a batch without images leaves the parameters that see without a gradient."""
    reentrant = (args.gradient_checkpointing_kwargs or {}).get("use_reentrant")
    if isinstance(processor, ProcessorMixin) and args.ddp_find_unused_parameters is None and not reentrant:
        args.ddp_find_unused_parameters = True


def refuse_new_images(columns: Collection[str], name: str) -> None:
    """Raise if a dataset has images beside a train dataset that has none."""
    found = {*IMAGE_COLUMNS} & {*columns}
    if found:
        raise ValueError(
            f"The {name} dataset has a column {min(found)!r}, but the train dataset has no images; remove the column, "
            "or train with images, too."
        )


def refuse_with_images(processor: Any, args: Any, trainer: str) -> None:
    """Raise for a processor and settings that do not go with images.

    Args:
        args: with `max_length` and `truncation_mode`, and whatever it has of the settings below.
        trainer: the trainer's class name, for messages.
    """
    if not isinstance(processor, ProcessorMixin):
        raise ValueError(
            f"The train dataset has a column of images, but {type(processor).__name__} is a tokenizer, which cannot "
            "prepare them; pass a model that sees and its processor, or remove the column."
        )
    for setting in ("packing", "eval_packing", "padding_free", "precompute_ref_log_probs"):
        if getattr(args, setting, False):
            raise ValueError(f"`{setting}=True` does not work with images; set it to False.")
    if args.max_length is not None and args.truncation_mode == "keep_end":
        raise ValueError(
            "`truncation_mode='keep_end'` would cut images off, which stand at the beginning; use 'keep_start', or set "
            "`max_length=None`."
        )
