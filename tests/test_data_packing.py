"""Packing: the rows that TRL makes, and the lengths of their pieces for every strategy."""

import numpy as np
import pyarrow as pa
import pytest
import trl
from datasets import Dataset, DatasetDict, Features, IterableDatasetDict, LargeList, List, Value
from hypothesis import given, settings
from hypothesis import strategies as st

from outspoken.trainers.data.packing import PACKING_STRATEGIES, best_fit_decreasing, pack_dataset, pack_table


def _rows(lengths):
    """Columns in which every value tells where it comes from: 1000 * row + position, and its negative."""
    ids = [[1000 * row + position for position in range(length)] for row, length in enumerate(lengths)]
    return {"input_ids": ids, "labels": [[-token for token in row] for row in ids]}


def _pieces(row):
    ends = np.cumsum(row["seq_lengths"])
    return [row["input_ids"][end - length : end] for end, length in zip(ends, row["seq_lengths"])]


_LENGTHS = st.lists(st.integers(0, 12), min_size=1, max_size=20)


@settings(max_examples=60, deadline=None)
@given(_LENGTHS, st.integers(1, 15), st.sampled_from(PACKING_STRATEGIES))
def test_packed_rows_equal_trl(lengths, seq_length, strategy):
    from trl.data_utils import _pack_bfd, _pack_wrapped

    table = pa.table(_rows(lengths))
    mine = pack_table(table, seq_length, strategy).to_pydict()
    if strategy == "wrapped":
        theirs = _pack_wrapped(table, seq_length).to_pydict()
        if not sum(lengths):
            theirs = {column: [] for column in theirs}  # one row without tokens
    elif not sum(lengths):
        theirs = {column: [] for column in (*_rows([]), "seq_lengths")}  # TRL raises
    else:
        theirs = _pack_bfd(table, seq_length, "split" if strategy == "bfd_split" else "truncate").to_pydict()
    assert {column: mine[column] for column in theirs} == theirs


@settings(max_examples=60, deadline=None)
@given(_LENGTHS, st.integers(1, 15), st.sampled_from(PACKING_STRATEGIES))
def test_seq_lengths_separate_the_documents(lengths, seq_length, strategy):
    """Every piece is a stretch of one document, and no piece is shorter than it must be."""
    packed = pack_table(pa.table(_rows(lengths)), seq_length, strategy).to_pylist()
    pieces = [piece for row in packed for piece in _pieces(row)]
    for row in packed:
        assert 0 < len(row["input_ids"]) == sum(row["seq_lengths"]) <= seq_length
        assert row["labels"] == [-token for token in row["input_ids"]]
    for piece in pieces:
        assert piece == list(range(piece[0], piece[0] + len(piece)))
    kept = sorted(token for piece in pieces for token in piece)
    whole = sorted(token for row in _rows(lengths)["input_ids"] for token in row)
    if strategy == "bfd":
        assert kept == sorted(token for row in _rows(lengths)["input_ids"] for token in row[:seq_length])
        assert len(pieces) == sum(length > 0 for length in lengths)
    else:
        assert kept == whole
    if strategy == "bfd_split":
        assert len(pieces) == sum(-(-length // seq_length) for length in lengths)
    if strategy == "wrapped":
        assert [len(row["input_ids"]) for row in packed[:-1]] == [seq_length] * (len(packed) - 1)
        # A document ends a piece, and so does a full row: nothing else does.
        ends = {*np.cumsum(lengths).tolist(), *range(seq_length, len(whole), seq_length)} - {0}
        assert len(pieces) == len(ends)


def test_wrapped_keeps_the_boundaries_that_trl_loses():
    dataset = Dataset.from_dict({"input_ids": [[1, 2, 3], [4, 5], [6, 7, 8, 9]]})
    packed = pack_dataset(dataset, 4, "wrapped")
    assert packed["input_ids"][:] == [[1, 2, 3, 4], [5, 6, 7, 8], [9]]
    assert packed["seq_lengths"][:] == [[3, 1], [1, 3], [1]]
    assert trl.pack_dataset(dataset, 4, "wrapped").column_names == ["input_ids"]


def test_best_fit_is_the_fullest_pack_that_has_room():
    # 6 and 5 open packs with 4 and 5 left; 4 fits the first exactly; 3 goes where 5 are left, 2 fills it.
    order, packs = best_fit_decreasing(np.array([2, 6, 3, 5, 4]), 10)
    assert order.tolist() == [1, 4, 3, 2, 0]
    assert packs.tolist() == [0, 0, 1, 1, 1]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 200), min_size=1, max_size=60), st.integers(200, 5000))
def test_best_fit_equals_the_search_through_all_packs(lengths, capacity):
    spaces = []
    for length in sorted(lengths, reverse=True):
        fits = [(space, number) for number, space in enumerate(spaces) if space >= length]
        number = min(fits)[1] if fits else len(spaces)
        if not fits:
            spaces.append(capacity)
        spaces[number] -= length
    order, packs = best_fit_decreasing(np.array(lengths), capacity)
    packed = np.bincount(packs, weights=np.array(lengths)[order])
    # Packs with equal space are equally good, so only what is in them is compared.
    assert sorted(capacity - packed) == sorted(spaces)
    assert sorted(order) == list(range(len(lengths)))


@pytest.mark.parametrize("strategy", PACKING_STRATEGIES)
def test_datasets_of_all_kinds(strategy):
    dataset = Dataset.from_dict(_rows([5, 2, 9, 1, 3, 4]))
    expected = trl.pack_dataset(dataset, 6, strategy, map_kwargs={"batch_size": 4})
    packed = pack_dataset(dataset, 6, strategy, map_kwargs={"batch_size": 4})
    assert {column: packed[column][:] for column in expected.column_names} == expected.to_dict()
    assert packed.column_names == ["input_ids", "labels", "seq_lengths"]
    assert packed.features["seq_lengths"] == List(Value("int32"))

    both = pack_dataset(DatasetDict({"train": dataset, "test": dataset}), 6, strategy, {"batch_size": 4})
    assert isinstance(both, DatasetDict)
    assert both["test"].to_dict() == packed.to_dict()

    stream = pack_dataset(dataset.to_iterable_dataset(), 6, strategy, {"batch_size": 4})
    assert list(stream) == list(packed)
    unknown_columns = dataset.to_iterable_dataset().map(lambda row: row)
    streams = pack_dataset(IterableDatasetDict({"train": unknown_columns}), 6, strategy, {"batch_size": 4})
    assert isinstance(streams, IterableDatasetDict)
    assert list(streams["train"]) == list(packed)


def test_processes_and_slices_give_the_same():
    dataset = Dataset.from_dict(_rows([5, 2, 9, 1, 3, 4, 7, 7]))
    part = dataset.select(range(2, 8))  # Arrow columns that begin in the middle of their buffers
    for strategy in PACKING_STRATEGIES:
        copied = Dataset.from_dict(part.to_dict())
        assert pack_dataset(part, 6, strategy).to_dict() == pack_dataset(copied, 6, strategy).to_dict()
    two = pack_dataset(dataset, 6, "bfd", {"batch_size": 4, "num_proc": 2})
    assert two.to_dict() == pack_dataset(dataset, 6, "bfd", {"batch_size": 4}).to_dict()


def test_the_format_stays_and_shows_the_new_column():
    dataset = Dataset.from_dict(_rows([5, 2, 3]))
    packed = pack_dataset(dataset.with_format("numpy", columns=["input_ids"]), 6)
    assert packed.format["type"] == "numpy"
    assert packed.format["columns"] == ["input_ids", "seq_lengths"]
    assert packed.column_names == ["input_ids", "labels", "seq_lengths"]
    assert isinstance(packed[0]["seq_lengths"], np.ndarray)
    stream = pack_dataset(dataset.to_iterable_dataset().with_format("numpy"), 6)
    assert isinstance(next(iter(stream))["input_ids"], np.ndarray)


def test_value_and_list_types_stay():
    features = Features({"input_ids": LargeList(Value("int32")), "weights": List(Value("float32"))})
    dataset = Dataset.from_dict({"input_ids": [[1, 2], [3]], "weights": [[0.5, 1.0], [2.0]]}, features=features)
    for strategy in PACKING_STRATEGIES:
        packed = pack_dataset(dataset, 3, strategy)
        assert packed.features["input_ids"] == LargeList(Value("int32"))
        assert packed.features["weights"] == List(Value("float32"))
        assert packed[0] == {"input_ids": [1, 2, 3], "weights": [0.5, 1.0, 2.0], "seq_lengths": [2, 1]}
    fixed = Dataset.from_dict({"input_ids": [[1, 2], [3, 4]]}, Features({"input_ids": List(Value("int64"), length=2)}))
    assert pack_dataset(fixed, 3, "bfd_split")[:]["seq_lengths"] == [[2], [2]]


@pytest.mark.parametrize(
    ("columns", "arguments", "error", "message"),
    [
        (_rows([2]), (0,), ValueError, "`seq_length` is 0; use the number of tokens"),
        (_rows([2]), (4, "ffd"), ValueError, "`strategy` is 'ffd'; use one of 'bfd', 'bfd_split', 'wrapped'."),
        ({**_rows([2]), "text": ["a"]}, (4,), TypeError, "Column 'text' holds string, not lists, so it cannot"),
        (
            {"input_ids": [[1], [2, 3]], "labels": [[1], [2]]},
            (4,),
            ValueError,
            "Row 1 of a batch has 2 values in column 'input_ids' but 1 in 'labels'",
        ),
        ({"input_ids": [[1], None]}, (4,), ValueError, r"Row 1 of a batch, column 'input_ids': nothing \(None\)"),
    ],
)
def test_what_cannot_be_packed(columns, arguments, error, message):
    with pytest.raises(error, match=message):
        pack_dataset(Dataset.from_dict(columns), *arguments)
    with pytest.raises(error, match=message):
        list(pack_dataset(Dataset.from_dict(columns).to_iterable_dataset(), *arguments))
