"""Packing: several short rows as one long one, with the lengths that tell them apart again.

Rows are placed whole ("bfd", arXiv 2404.10830), with the overflow of long rows placed like rows of their own
("bfd_split", the paper's method), or cut out of one long sequence wherever it is full ("wrapped", arXiv 1910.10683).
"""

from collections import defaultdict, deque
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import DatasetDict, IterableDataset, IterableDatasetDict

from outspoken.trainers.data.formats import AnyDataset

PACKING_STRATEGIES = ("bfd", "bfd_split", "wrapped")
SEQ_LENGTHS = "seq_lengths"


def pack_dataset(
    dataset: AnyDataset, seq_length: int, strategy: str = "bfd", map_kwargs: dict[str, Any] | None = None
) -> AnyDataset:
    """Pack the rows of a dataset, or of each dataset of a dict, into rows of at most `seq_length` tokens.

    All columns are packed alike (`input_ids`, `labels`, masks), so they must be lists, in each row equally long. The
    new column `seq_lengths` has the lengths of the pieces that each new row consists of: attention and positions have
    to start anew at each of them. Rows are packed within each batch of the dataset's `map` (1000 rows by default);
    larger batches pack more densely.

    Args:
        seq_length: the most tokens of a packed row.
        strategy: "bfd" cuts rows to `seq_length`, drops the rest, and puts each row, longest first, where it leaves
            the least space. "bfd_split" does the same with the pieces of `seq_length` that long rows are cut into, so
            it drops nothing. "wrapped" fills every row but the last of a batch up, and cuts rows where they do not fit.
        map_kwargs: keyword arguments of the dataset's `map`, e.g. `batch_size` or `num_proc`.

    Raises:
        ValueError: an argument is wrong, or the columns of a row are not equally long.
        TypeError: a column does not hold lists.
    """
    if strategy not in PACKING_STRATEGIES:
        raise ValueError(f"`strategy` is {strategy!r}; use one of {', '.join(map(repr, PACKING_STRATEGIES))}.")
    if seq_length < 1:
        raise ValueError(f"`seq_length` is {seq_length}; use the number of tokens that a packed row may have.")
    kwargs = {**(map_kwargs or {}), "batched": True, "fn_kwargs": {"seq_length": seq_length, "strategy": strategy}}
    if isinstance(dataset, dict):
        packed = {name: _pack(part, kwargs) for name, part in dataset.items()}
        return (IterableDatasetDict if isinstance(dataset, IterableDatasetDict) else DatasetDict)(packed)
    return _pack(dataset, kwargs)


def _pack(dataset: Any, map_kwargs: dict[str, Any]) -> Any:
    """Pack one dataset through Arrow tables, and give it its own format back, with the new column shown."""
    if isinstance(dataset, IterableDataset):
        formatting = dataset._formatting
        packed = dataset.with_format("arrow").map(pack_table, **map_kwargs)
        return packed.with_format(formatting.format_type if formatting is not None else None)
    _check_columns(dataset.features.arrow_schema)
    before = dataset.format
    hidden = {*dataset.column_names} - {*before["columns"]}
    packed = dataset.with_format("arrow").map(pack_table, **map_kwargs)
    shown = [column for column in packed.column_names if column not in hidden]
    return packed.with_format(
        before["type"], columns=shown, output_all_columns=before["output_all_columns"], **before["format_kwargs"]
    )


def pack_table(table: pa.Table, seq_length: int, strategy: str) -> pa.Table:
    """`pack_dataset` for one batch of rows."""
    _check_columns(table.schema)
    columns = [_one_chunk(column) for column in table.columns]
    lengths = _row_lengths(columns, table.column_names)  # (rows,)
    # From here on, where each piece begins in the flattened columns, how long it is, and which packed row gets it.
    if strategy == "wrapped":
        starts, lengths, packs = _wrap(lengths, seq_length)
    else:
        starts = np.cumsum(lengths) - lengths
        if strategy == "bfd_split":
            starts, lengths = _split(starts, lengths, seq_length)
        starts, lengths = starts[lengths > 0], np.minimum(lengths[lengths > 0], seq_length)
        order, packs = best_fit_decreasing(lengths, seq_length)
        starts, lengths = starts[order], lengths[order]

    ends = np.cumsum(lengths)  # of the pieces, in the packed columns
    moved = starts - (ends - lengths)  # how far each piece comes from
    values = [column.flatten() for column in columns]
    if moved.any() or lengths.sum() < len(values[0]):
        tokens = pa.array(np.repeat(moved, lengths) + np.arange(lengths.sum()))
        values = [column.take(tokens) for column in values]
    pack_ends = ends[np.flatnonzero(np.diff(packs, append=-1))]
    packed = [_lists(column, pack_ends, like.type) for column, like in zip(values, columns)]
    sizes = _lists(pa.array(lengths, pa.int32()), np.cumsum(np.bincount(packs)), pa.list_(pa.int32()))
    return pa.Table.from_arrays([*packed, sizes], names=[*table.column_names, SEQ_LENGTHS])


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Distribute pieces over packs: longest first, each into the pack where it leaves the least space, else a new one.

    Args:
        lengths: (N,) of the pieces, each from 1 to `capacity`.

    Returns:
        The pieces' indices, pack after pack, and the pack of each, both (N,).
    """
    longest_first = np.argsort(-lengths, kind="stable")
    # Bit s of `spaces` is set where a pack with s tokens of space exists, so that the best fit is the lowest bit not
    # below the length: a search in C over machine words.
    spaces = 0
    packs_with: dict[int, deque[int]] = defaultdict(deque)
    packs = np.empty(len(lengths), dtype=np.int64)
    count = 0
    for index, length in enumerate(lengths[longest_first].tolist()):
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            pack = packs_with[space].popleft()
            if not packs_with[space]:
                spaces ^= 1 << space
        else:
            space, pack, count = capacity, count, count + 1
        packs[index] = pack
        space -= length
        if space:
            packs_with[space].append(pack)
            spaces |= 1 << space
    together = np.argsort(packs, kind="stable")
    return longest_first[together], packs[together]


def _wrap(lengths: np.ndarray, seq_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The pieces of rows of these lengths, laid end to end and cut every `seq_length` tokens, and their packs."""
    row_ends = np.cumsum(lengths)
    total = int(row_ends[-1]) if len(row_ends) else 0
    ends = np.union1d(row_ends, np.arange(seq_length, total, seq_length))
    ends = ends[ends > 0].astype(np.int64)
    starts = np.concatenate(([0], ends[:-1])).astype(np.int64)[: len(ends)]
    return starts, ends - starts, starts // seq_length


def _split(starts: np.ndarray, lengths: np.ndarray, seq_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows cut into pieces of `seq_length` tokens, the last of each row shorter."""
    counts = -(-lengths // seq_length)
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)  # of the piece within its row
    offsets = number * seq_length
    return np.repeat(starts, counts) + offsets, np.minimum(np.repeat(lengths, counts) - offsets, seq_length)


def _check_columns(schema: pa.Schema) -> None:
    for field in schema:
        if not (
            pa.types.is_list(field.type)
            or pa.types.is_large_list(field.type)
            or pa.types.is_fixed_size_list(field.type)
        ):
            raise TypeError(
                f"Column {field.name!r} holds {field.type}, not lists, so it cannot be packed; remove it with "
                "`Dataset.remove_columns` first."
            )


def _row_lengths(columns: list[Any], names: list[str]) -> np.ndarray:
    """Tokens of each row, (rows,); the same in all columns."""
    lengths: list[np.ndarray] = []
    for column, name in zip(columns, names):
        if column.null_count:
            row = int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
            raise ValueError(f"Row {row} of a batch, column {name!r}: nothing (None) to pack; drop the row.")
        lengths.append(pc.list_value_length(column).to_numpy(zero_copy_only=False).astype(np.int64))
        different = np.flatnonzero(lengths[0] != lengths[-1])
        if len(different):
            row = int(different[0])
            raise ValueError(
                f"Row {row} of a batch has {lengths[0][row]} values in column {names[0]!r} but {lengths[-1][row]} in "
                f"{name!r}; columns that are packed together must be equally long."
            )
    return lengths[0]


def _one_chunk(column: pa.ChunkedArray) -> Any:
    combined = column.combine_chunks()
    return combined if not isinstance(combined, pa.ChunkedArray) else combined.chunk(0)


def _lists(values: pa.Array, ends: np.ndarray, like: pa.DataType) -> pa.Array:
    """Consecutive values as lists that end where `ends` says, in a list type like the given one."""
    large = pa.types.is_large_list(like)
    offsets = np.concatenate(([0], ends)).astype(np.int64 if large else np.int32)
    return (pa.LargeListArray if large else pa.ListArray).from_arrays(pa.array(offsets), values)
