"""What a dataset's rows look like: standard or conversational, which columns, and clear words when they do not fit."""

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset, IterableDataset

MESSAGE_COLUMNS = ("prompt", "completion", "chosen", "rejected", "messages")


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


def is_conversational(row: Mapping[str, Any]) -> bool:
    """Whether a row's prompt, completion, chosen, rejected or messages hold conversations rather than text."""
    return any(is_messages(row.get(column)) for column in MESSAGE_COLUMNS)


def is_from_value(row: Mapping[str, Any]) -> bool:
    """Whether a row is a ShareGPT conversation: `{"conversations": [{"from": ..., "value": ...}]}`."""
    turns = row.get("conversations")
    return (
        isinstance(turns, list) and bool(turns) and isinstance(turns[0], Mapping) and {"from", "value"} <= {*turns[0]}
    )


def messages_from_value(turns: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """ShareGPT turns as messages: `from` becomes `role`, `value` becomes `content`, other keys stay."""
    names = {"from": "role", "value": "content"}
    return [{names.get(key, key): value for key, value in turn.items()} for turn in turns]


def common_prefix_length(ids: Sequence[int], others: Sequence[int]) -> int:
    """How many leading tokens two sequences share."""
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
