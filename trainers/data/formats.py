"""What a dataset's rows look like: standard or conversational, which columns, and clear words when they do not fit.

The functions from `is_conversational` on are public; names, arguments and results are TRL 1.16's.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

MESSAGE_COLUMNS = ("prompt", "completion", "chosen", "rejected", "messages")
MESSAGE_ROLES = ("system", "user", "assistant", "tool")

AnyDataset = TypeVar("AnyDataset", Dataset, DatasetDict, IterableDataset, IterableDatasetDict)


def first_row(dataset: Dataset | IterableDataset, name: str) -> dict[str, Any]:
    """The first row of a dataset.

    Args:
        name: what the dataset is called in messages, e.g. "train".

    Raises:
        ValueError: there is none.
    """
    for row in dataset:
        return row
    raise ValueError(f"The {name} dataset is empty; pass a dataset with at least one row.")


def column_names(dataset: Dataset | IterableDataset, name: str) -> list[str]:
    """The columns of a dataset, read off its first row where a stream does not know them."""
    return list(dataset.column_names or first_row(dataset, name))


def is_messages(value: Any) -> bool:
    """Whether a value is a conversation: a non-empty list of mappings that have a role."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping) and "role" in value[0]


def messages_from_value(turns: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """ShareGPT turns as messages: `from` becomes `role`, `value` becomes `content`, other keys stay."""
    names = {"from": "role", "value": "content"}
    return [{names.get(key, key): value for key, value in turn.items()} for turn in turns]


def common_prefix_length(ids: Sequence[Any], others: Sequence[Any]) -> int:
    """How many leading tokens (characters) two sequences share."""
    length = 0
    for one, other in zip(ids, others):
        if one != other:
            break
        length += 1
    return length


def where(name: str, index: int | None, column: str) -> str:
    """`Row 3 of the train dataset, column 'text'`, for error messages."""
    row = f"Row {index} of the {name} dataset" if index is not None else f"The {name} dataset"
    return f"{row}, column {column!r}"


def check_text(value: Any, name: str, index: int | None, column: str) -> str:
    """Return a column's value if it is text, else raise a `ValueError` that says where and what to do."""
    if isinstance(value, str):
        return value
    found = "nothing (None)" if value is None else f"a {type(value).__name__}"
    raise ValueError(f"{where(name, index, column)}: expected text, found {found}; fix or drop the row.")


def check_messages(value: Any, name: str, index: int | None, column: str) -> list[dict[str, Any]]:
    """Return a column's value if it is a conversation, else raise a `ValueError` that says where and what to do."""
    if not isinstance(value, list):
        found = "nothing (None)" if value is None else f"a {type(value).__name__}"
        raise ValueError(
            f"{where(name, index, column)}: expected a list of messages, found {found}; every row must use the same "
            "format."
        )
    if not value:
        raise ValueError(f"{where(name, index, column)}: the conversation has no messages; drop the row.")
    for turn, message in enumerate(value):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(
                f"{where(name, index, column)}: message {turn} has no role; give every message a 'role' and a "
                "'content'."
            )
        if message.get("content") is None and not message.get("tool_calls"):
            raise ValueError(
                f"{where(name, index, column)}: message {turn} (role {message['role']!r}) has neither content nor "
                "tool calls; fill its 'content' or drop the row."
            )
    return value


def is_conversational(example: Mapping[str, Any]) -> bool:
    """Whether a row's prompt, completion, chosen, rejected or messages hold conversations rather than text."""
    return any(is_messages(example.get(column)) for column in MESSAGE_COLUMNS)


def is_conversational_from_value(example: Mapping[str, Any]) -> bool:
    """Whether a row is a ShareGPT conversation: `{"conversations": [{"from": ..., "value": ...}]}`."""
    turns = example.get("conversations")
    return (
        isinstance(turns, list) and bool(turns) and isinstance(turns[0], Mapping) and {"from", "value"} <= {*turns[0]}
    )


def maybe_convert_to_chatml(example: dict[str, Any]) -> dict[str, Any]:
    """A row whose messages have `role` and `content` where they had `from` and `value`; other rows unchanged.

    The column `conversations` becomes `messages`. The row is changed in place, as `Dataset.map` needs it to drop the
    old column; its messages are new.
    """
    for column in (*MESSAGE_COLUMNS, "conversations"):
        turns = example.get(column)
        if isinstance(turns, list):
            example[column] = [*messages_from_value(turns)] if all(isinstance(t, Mapping) for t in turns) else turns
    if "conversations" in example:
        example["messages"] = example.pop("conversations")
    return example


def extract_prompt(example: Mapping[str, Any]) -> dict[str, Any]:
    """Take the beginning that `chosen` and `rejected` share out of both, as `prompt`; they are text or conversations.

    Both keep at least their last message (character), also if they are equal or one begins with the other. A space
    before the place where two texts part stays with the answers.
    """
    chosen, rejected = example["chosen"], example["rejected"]
    shorter = min(len(chosen), len(rejected))
    end = next((i for i in range(shorter) if chosen[i] != rejected[i]), None)
    if end is None:
        end = max(shorter - 1, 0)
    elif end > 0 and chosen[end - 1] == " ":
        end -= 1
    return {"prompt": chosen[:end], "chosen": chosen[end:], "rejected": rejected[end:]}


def maybe_extract_prompt(example: dict[str, Any]) -> dict[str, Any]:
    """`extract_prompt` for a row with `chosen` and `rejected`, unless it has a `prompt` of the same kind as they are.

    A text prompt beside conversations is a repetition of what these begin with, so it is replaced.
    """
    if "chosen" not in example or "rejected" not in example:
        return example
    if "prompt" in example and is_messages(example["prompt"]) == is_messages(example["chosen"]):
        return example
    return extract_prompt(example)


def unpair_preference_dataset(dataset: AnyDataset, **map_kwargs: Any) -> AnyDataset:
    """Make of each row with `chosen` and `rejected` two rows with `completion` and `label` (True for the chosen one).

    `prompt` and further columns are repeated. Within each batch of the map the chosen answers come first.

    Args:
        map_kwargs: keyword arguments of the dataset's `map`.
    """
    columns = _columns(dataset)
    missing = [column for column in ("chosen", "rejected") if column not in columns]
    if missing:
        raise ValueError(
            f"The dataset has no column {missing[0]!r}, only {', '.join(map(repr, columns))}; unpairing needs 'chosen' "
            "and 'rejected'."
        )
    return dataset.map(_unpair, batched=True, remove_columns=columns, **map_kwargs)


def _unpair(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    rows = len(batch["chosen"])
    computed = {"completion": batch["chosen"] + batch["rejected"], "label": [True] * rows + [False] * rows}
    kept = {key: values + values for key, values in batch.items() if key not in ("chosen", "rejected", *computed)}
    return {**computed, **kept}


def maybe_unpair_preference_dataset(
    dataset: AnyDataset, num_proc: int | None = None, desc: str | None = None
) -> AnyDataset:
    """`unpair_preference_dataset` if the dataset has `chosen` and `rejected`, else the dataset itself.

    Args:
        num_proc: processes to use, not for streams.
        desc: what the progress bar says, not for streams.
    """
    if not {"chosen", "rejected"} <= {*_columns(dataset)}:
        return dataset
    streaming = isinstance(dataset, IterableDataset | IterableDatasetDict)
    return unpair_preference_dataset(dataset, **({} if streaming else {"num_proc": num_proc, "desc": desc}))


def _columns(dataset: Any) -> list[str]:
    """The columns of a dataset, or of the first of several."""
    if isinstance(dataset, dict):
        dataset = next(iter(dataset.values()))
    return column_names(dataset, "given")


def prepare_multimodal_messages(
    messages: Sequence[Mapping[str, Any]], images: Sequence[Any] | None = None
) -> list[dict[str, Any]]:
    """Messages whose contents are lists of blocks, `{"type": "text", "text": ...}`, with the images in their places.

    Blocks `{"type": "image"}` are places, filled in their order. The first message of a user whose content is text gets
    places for all images before it. Image blocks that hold an image already stay as they are, and so do those of tools;
    the given messages are not changed.

    Args:
        messages: with roles system, user, assistant or tool; contents are text or lists of blocks. A content may be
            missing from messages with tool calls.
        images: one for each place.

    Raises:
        ValueError: a role is another one, or the images are more or fewer than the places.
    """
    images = list(images or [])
    prepared: list[dict[str, Any]] = []
    placed = False
    for message in messages:
        message = dict(message)
        if message["role"] not in MESSAGE_ROLES:
            raise ValueError(
                f"A message has the role {message['role']!r}; use one of {', '.join(map(repr, MESSAGE_ROLES))}."
            )
        if isinstance(message.get("content"), str):
            new = [{"type": "image"} for _ in images] if message["role"] == "user" and not placed else []
            placed = placed or message["role"] == "user"
            message["content"] = [*new, {"type": "text", "text": message["content"]}]
        prepared.append(message)

    def is_place(block: Mapping[str, Any]) -> bool:
        return block["type"] == "image" and "image" not in block

    with_blocks = [m for m in prepared if m["role"] != "tool" and m.get("content")]
    places = sum(is_place(block) for message in with_blocks for block in message["content"])
    if places != len(images):
        raise ValueError(
            f"The conversation has {places} places for images, but {len(images)} images are given; give one image for "
            "each place."
        )
    following = iter(images)
    for message in with_blocks:
        message["content"] = [{**b, "image": next(following)} if is_place(b) else b for b in message["content"]]
    return prepared
