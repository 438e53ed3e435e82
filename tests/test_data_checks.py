"""Wrong datasets are told in one sentence, from whole columns and from the first row of a stream."""

import re

import pytest
from datasets import Dataset

from outspoken.trainers.data.checks import PREFERENCE, SUPERVISED, UNPAIRED, check_rows, identical_pairs

USER = {"role": "user", "content": "a"}
REPLY = {"role": "assistant", "content": "b"}

WRONG = [
    (PREFERENCE, {"prompt": ["a", "b"], "chosen": ["x", None], "rejected": ["y", "z"]}, 1, "chosen", "nothing (None)"),
    (PREFERENCE, {"prompt": ["a", "b"], "chosen": ["x", " "], "rejected": ["y", "z"]}, 1, "chosen", "text is empty"),
    (PREFERENCE, {"chosen": [1, 2], "rejected": [1, 2]}, 0, "chosen", "found an integer"),
    (PREFERENCE, {"chosen": [[1, 2]], "rejected": [[1, 2]]}, 0, "chosen", "found a list of integers"),
    (PREFERENCE, {"chosen": [[USER], []], "rejected": [[USER], [USER]]}, 1, "chosen", "has no messages"),
    (PREFERENCE, {"chosen": [[USER], None], "rejected": [[USER], [USER]]}, 1, "chosen", "found nothing (None)"),
    (
        PREFERENCE,
        {"chosen": [[USER, {"role": "assistant", "content": None}]], "rejected": [[USER, REPLY]]},
        0,
        "chosen",
        "neither content nor tool calls",
    ),
    (PREFERENCE, {"chosen": [[{"name": "u", "content": "a"}]], "rejected": [[REPLY]]}, 0, "chosen", "but no 'role'"),
    (PREFERENCE, {"chosen": ["a"], "rejected": ["b"], "margin": ["big"]}, 0, "margin", "expected a number"),
    (UNPAIRED, {"prompt": ["a"], "completion": ["x"], "label": ["yes"]}, 0, "label", "found 'yes'"),
    (UNPAIRED, {"prompt": ["a", "b"], "completion": ["x", "y"], "label": [1, 2]}, 1, "label", "found 2"),
    (UNPAIRED, {"prompt": ["a", "b"], "completion": ["x", "y"], "label": [True, None]}, 1, "label", "found nothing"),
    (UNPAIRED, {"prompt": ["a"], "completion": [""], "label": [True]}, 0, "completion", "text is empty"),
    (SUPERVISED, {"text": ["a", ""]}, 1, "text", "text is empty"),
    (SUPERVISED, {"messages": [[USER, {"role": None, "content": "b"}]]}, 0, "messages", "has no role"),
]

WRONG_COLUMNS = [
    (PREFERENCE, {"prompt": ["a"], "completion": ["x"], "label": [True]}, "not paired; Some needs .* use KTOTrainer"),
    (PREFERENCE, {"prompt": ["a"], "completion": ["x"]}, "single answers; Some needs .* use SFTTrainer"),
    (PREFERENCE, {"prompt": ["a"], "chosen": ["x"]}, "'chosen', 'prompt', but no 'rejected'; Some needs"),
    (UNPAIRED, {"prompt": ["a"], "completion": ["x"]}, "no column 'label'; Some needs"),
    (
        PREFERENCE,
        {"prompt": [[USER]], "chosen": ["x"], "rejected": ["y"]},
        "conversations in column 'prompt', but not",
    ),
]


@pytest.mark.parametrize(("kind", "columns", "row", "column", "what"), WRONG)
def test_wrong_rows(kind, columns, row, column, what):
    with pytest.raises(ValueError, match=re.escape(what)) as error:
        check_rows(Dataset.from_dict(columns), "train", kind, "Some")
    assert str(error.value).startswith(f"Row {row} of the train dataset, column {column!r}: ")


@pytest.mark.parametrize(("kind", "columns", "what"), WRONG_COLUMNS)
@pytest.mark.parametrize("streaming", [False, True])
def test_wrong_columns(kind, columns, what, streaming):
    dataset = Dataset.from_dict(columns)
    with pytest.raises(ValueError, match=what):
        check_rows(dataset.to_iterable_dataset() if streaming else dataset, "train", kind, "Some")


@pytest.mark.parametrize(
    ("kind", "columns"),
    [
        (PREFERENCE, {"prompt": ["", "b"], "chosen": ["x", "y"], "rejected": ["y", "z"], "margin": [1, 2]}),
        (PREFERENCE, {"chosen_ids": [[1]], "rejected_ids": [[2]]}),
        (UNPAIRED, {"chosen": ["x"], "rejected": ["y"]}),
        (UNPAIRED, {"prompt": ["a", "b"], "completion": ["x", "y"], "label": [1, 0]}),
        (SUPERVISED, {"messages": [[{"role": "user", "content": [{"type": "text", "text": "a"}]}]]}),
        (SUPERVISED, {"anything": ["a"]}),  # the text column has any name
        (
            SUPERVISED,
            {
                "messages": [
                    [USER, {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}]
                ]
            },
        ),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_right_rows(kind, columns, streaming):
    dataset = Dataset.from_dict(columns)
    check_rows(dataset.to_iterable_dataset() if streaming else dataset, "train", kind, "Some")


def test_rows_are_counted_in_the_datasets_own_order_and_across_batches():
    rows = Dataset.from_dict({"prompt": ["a"] * 25_000, "chosen": ["x"] * 24_999 + [""], "rejected": ["y"] * 25_000})
    with pytest.raises(ValueError, match=r"^Row 24999 of the train"):
        check_rows(rows, "train", PREFERENCE, "Some")
    with pytest.raises(ValueError, match=r"^Row 0 of the eval"):
        check_rows(rows.select(range(24_999, -1, -1)), "eval", PREFERENCE, "Some")


def test_identical_pairs_are_found():
    text = Dataset.from_dict({"chosen": ["a", "b", "c"], "rejected": ["x", "b", "c"]})
    messages = Dataset.from_dict({"chosen": [[REPLY], [USER]], "rejected": [[REPLY], [REPLY]]})
    assert identical_pairs(text) == [1, 2]
    assert identical_pairs(messages) == [0]
