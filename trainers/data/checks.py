"""Looks at a whole dataset, column by column, before anything heavy happens: wrong data is one clear sentence.

The columns are read through Arrow, so a million rows take about a second. Of a stream only the first row is looked at;
the others are checked when they are tokenized.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset

from outspoken.trainers.data.formats import column_names, first_row, where

_BATCH = 10_000  # rows looked at together


@dataclass(frozen=True)
class Kind:
    """What rows of one kind of dataset look like.

    Attributes:
        needs: columns that must be there.
        filled: columns in which a row must not be empty, where they are there.
        tokens: columns that replace all others when the rows are tokenized already.
        example: what a row looks like, in words.
    """

    needs: tuple[str, ...]
    filled: tuple[str, ...]
    tokens: tuple[str, ...]
    example: str


PREFERENCE = Kind(
    needs=("chosen", "rejected"),
    filled=("chosen", "rejected"),
    tokens=("chosen_ids", "rejected_ids"),
    example="'prompt', 'chosen' and 'rejected'",
)
UNPAIRED = Kind(
    needs=("prompt", "completion", "label"),
    filled=("completion",),
    tokens=("completion_ids", "label"),
    example="'prompt', 'completion' and 'label'",
)
SUPERVISED = Kind(
    needs=(),
    filled=("text", "messages", "completion"),
    tokens=("input_ids",),
    example="'text', 'messages', or 'prompt' and 'completion'",
)


PROMPTS = Kind(needs=("prompt",), filled=("prompt",), tokens=(), example="'prompt'")


def check_rows(
    dataset: Dataset | IterableDataset, name: str, kind: Kind, trainer: str, filled: Sequence[str] = ()
) -> None:
    """Raise if a dataset cannot be trained on: a column is missing or of the wrong type, a row is empty.

    Args:
        name: what the dataset is called in messages, e.g. "train".
        kind: what its rows must look like.
        trainer: the trainer's class name, for messages.
        filled: columns that count beside those of the kind, e.g. the text column.

    Raises:
        ValueError: naming the column, the first bad row and the remedy.
    """
    columns = {*column_names(dataset, name)}
    if kind.tokens and {*kind.tokens} <= columns:
        return
    _check_columns(columns, name, kind, trainer)
    checked = [c for c in dict.fromkeys(("prompt", *kind.filled, *filled, "label", "margin")) if c in columns]
    if isinstance(dataset, Dataset):
        if dataset.format["type"] == "custom":
            return  # its transform makes rows of which the table knows nothing
        batches: Iterator[pa.Table] = dataset.with_format("arrow").select_columns(checked).iter(batch_size=_BATCH)
    else:
        row = {column: [first_row(dataset, name)[column]] for column in checked}
        try:
            batches = iter([pa.table(row)])
        except pa.ArrowException:
            return  # images and the like; the row is checked when it is tokenized
    first = 0
    for table in batches:
        _check_same_format(table, name, [c for c in ("prompt", *kind.filled) if c in checked])
        for column in checked:
            values = table.column(column).combine_chunks()
            may_be_empty = column == "prompt" and column not in kind.filled
            if column == "label":
                _check_label(values, name, first)
            elif column == "margin":
                _check_number(values, name, first, column)
            else:
                _check_text_or_messages(values, name, first, column, may_be_empty)
        first += len(table)


def _check_columns(columns: set[str], name: str, kind: Kind, trainer: str) -> None:
    missing = [column for column in kind.needs if column not in columns]
    if not missing:
        return
    has = ", ".join(map(repr, sorted(columns)))
    if kind is UNPAIRED and {"chosen", "rejected"} <= columns:
        return  # pairs are taken apart
    if kind is PREFERENCE and {"completion", "label"} <= columns:
        raise ValueError(
            f"The {name} dataset has columns 'completion' and 'label', so its answers are not paired; {trainer} needs "
            f"{kind.example}: use KTOTrainer, or pair the answers."
        )
    if kind is PREFERENCE and {"completion", "text", "messages"} & columns:
        found = next(c for c in ("completion", "messages", "text") if c in columns)
        raise ValueError(
            f"The {name} dataset has a column {found!r}, so it holds single answers; {trainer} needs {kind.example}: "
            "use SFTTrainer, or add the answers to compare."
        )
    if kind is UNPAIRED and missing == ["label"]:
        raise ValueError(
            f"The {name} dataset has no column 'label'; {trainer} needs one that is true where the completion is "
            "desirable and false where it is not."
        )
    raise ValueError(
        f"The {name} dataset has columns {has}, but no {' and no '.join(map(repr, missing))}; {trainer} needs "
        f"{kind.example}: rename or add the columns."
    )


def _check_same_format(table: pa.Table, name: str, columns: list[str]) -> None:
    """Text and conversations cannot stand in one row."""
    formats = {c: _is_list(table.schema.field(c).type) for c in columns if not pa.types.is_null(table.column(c).type)}
    if len({*formats.values()}) > 1:
        conversational = next(c for c, messages in formats.items() if messages)
        text = next(c for c, messages in formats.items() if not messages)
        raise ValueError(
            f"The {name} dataset holds conversations in column {conversational!r}, but not in {text!r}; make both text "
            "or both lists of messages."
        )


def _check_text_or_messages(values: pa.Array, name: str, first: int, column: str, may_be_empty: bool) -> None:
    kind = values.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        bad = _rows(pc.is_null(values))
        if bad:
            _complain(name, first, column, bad, "expected text, found nothing (None)", "fill or drop the row")
        bad = [] if may_be_empty else _rows(pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(values)), 0))
        if bad:
            _complain(name, first, column, bad, "the text is empty", "fill or drop the row")
    elif _is_list(kind) and (pa.types.is_struct(kind.value_type) or not _is_plain(kind.value_type)):
        bad = _rows(pc.is_null(values))
        if bad:
            _complain(name, first, column, bad, "expected a list of messages, found nothing (None)", "drop the row")
        bad = _rows(pc.equal(pc.list_value_length(values), 0))
        if bad:
            _complain(name, first, column, bad, "the conversation has no messages", "drop the row")
        if pa.types.is_struct(kind.value_type):
            _check_messages(values, name, first, column)
    elif not pa.types.is_null(kind):
        _complain(
            name,
            first,
            column,
            [0],
            f"expected text or a list of messages, found {_words(kind)}",
            "convert the column",
        )
    else:
        _complain(name, first, column, [0], "expected text, found nothing (None)", "fill or drop the row")


def _check_messages(values: pa.Array, name: str, first: int, column: str) -> None:
    """Every message has a role, and content or tool calls."""
    messages = values.flatten()
    rows = pc.list_parent_indices(values)
    fields = [field.name for field in values.type.value_type]
    if "role" not in fields:
        if {"from", "value"} <= {*fields}:
            return  # ShareGPT, which is converted
        _complain(
            name,
            first,
            column,
            [0],
            f"messages have {', '.join(map(repr, fields))}, but no 'role'",
            "give every message a 'role' and a 'content'",
        )
    without_role = pc.filter(rows, pc.is_null(pc.struct_field(messages, "role"))).to_pylist()
    if without_role:
        _complain(
            name, first, column, without_role, "a message has no role", "give every message a 'role' and a 'content'"
        )
    empty = pc.is_null(pc.struct_field(messages, "content")) if "content" in fields else _all(True, len(messages))
    for other in ("tool_calls", "reasoning_content", "thinking"):
        if other in fields:
            empty = pc.and_(empty, pc.is_null(pc.struct_field(messages, other)))
    without_content = pc.filter(rows, empty).to_pylist()
    if without_content:
        _complain(
            name,
            first,
            column,
            without_content,
            "a message has neither content nor tool calls",
            "fill its 'content' or drop the row",
        )


def _check_label(values: pa.Array, name: str, first: int) -> None:
    bad = _rows(pc.is_null(values))
    if bad:
        _complain(name, first, "label", bad, "expected true or false, found nothing (None)", "fill or drop the row")
    if pa.types.is_boolean(values.type):
        return
    numeric = pa.types.is_integer(values.type) or pa.types.is_floating(values.type)
    bad = [0] if not numeric else _rows(pc.invert(pc.is_in(values, pa.array([0, 1], type=values.type))))
    if bad:
        found = values[bad[0]].as_py()
        _complain(name, first, "label", bad, f"expected true or false, found {found!r}", "make it a boolean")


def _check_number(values: pa.Array, name: str, first: int, column: str) -> None:
    kind = values.type
    if _is_list(kind):  # one number for each of several scores
        values, kind = values.flatten(), kind.value_type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        _complain(name, first, column, [0], f"expected a number, found {_words(kind)}", "convert the column")
    bad = _rows(pc.is_null(values))
    if bad:
        _complain(name, first, column, bad, "expected a number, found nothing (None)", "fill or drop the row")


def _complain(name: str, first: int, column: str, bad: Sequence[int], what: str, remedy: str) -> None:
    rows = len({*bad})
    more = f" (and {rows - 1} more of the rows around it)" if rows > 1 else ""
    raise ValueError(f"{where(name, first + bad[0], column)}: {what}{more}; {remedy}.")


def _rows(wanted: pa.Array) -> list[int]:
    return pc.indices_nonzero(pc.fill_null(wanted, False)).to_pylist()


def _all(value: bool, count: int) -> pa.Array:
    return pa.array([value] * count)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _is_plain(kind: pa.DataType) -> bool:
    """Whether a list of this is a list of numbers or texts, not of messages."""
    return (
        pa.types.is_integer(kind)
        or pa.types.is_floating(kind)
        or pa.types.is_boolean(kind)
        or (pa.types.is_string(kind) and not isinstance(kind, pa.BaseExtensionType))
    )


def _words(kind: pa.DataType) -> str:
    if _is_list(kind):
        return f"a list of {_words(kind.value_type).removeprefix('a ').removeprefix('an ')}s"
    for test, word in (
        (pa.types.is_integer, "an integer"),
        (pa.types.is_floating, "a number"),
        (pa.types.is_boolean, "a boolean"),
        (pa.types.is_string, "a text"),
        (pa.types.is_struct, "a mapping"),
    ):
        if test(kind):
            return word
    return str(kind)


def identical_pairs(dataset: Dataset) -> list[int]:
    """Rows whose chosen and rejected answers are the same."""
    rows, first = [], 0
    for table in dataset.with_format("arrow").select_columns(["chosen", "rejected"]).iter(batch_size=_BATCH):
        chosen, rejected = (table.column(c).combine_chunks() for c in ("chosen", "rejected"))
        if pa.types.is_string(chosen.type):
            rows += [first + row for row in _rows(pc.equal(chosen, rejected))]
        else:
            rows += [first + i for i, (c, r) in enumerate(zip(chosen.to_pylist(), rejected.to_pylist())) if c == r]
        first += len(table)
    return rows
