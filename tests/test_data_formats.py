"""The public dataset utilities give what TRL's give, and what TRL gets wrong they get right."""

import copy

import pytest
import trl
from datasets import Dataset, DatasetDict, IterableDatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

from outspoken.trainers.data import formats

_TEXT = st.text(alphabet="ab é", max_size=6)
_MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": _TEXT}), min_size=1, max_size=4
)
_EITHER = st.one_of(_TEXT, _MESSAGES)


def _user(text):
    return {"role": "user", "content": text}


def _assistant(text):
    return {"role": "assistant", "content": text}


CHAT = [_user("What color is the sky?"), _assistant("It is blue.")]
SHAREGPT = [{"from": "user", "value": "Hi", "weight": 1.0}, {"from": "assistant", "value": "Hello", "weight": 0.0}]
PREFERENCES = {
    "standard": [
        {"prompt": "The sky is", "chosen": " blue.", "rejected": " green.", "score": 1},
        {"prompt": "The sun is", "chosen": " up.", "rejected": " down.", "score": 2},
    ],
    "implicit": [{"chosen": "The sky is blue.", "rejected": "The sky is green."}],
    "conversational": [{"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": [_assistant("Green.")]}] * 3,
}


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([*formats.MESSAGE_COLUMNS, "text", "conversations"]), _EITHER)
def test_is_conversational_equals_trl(column, value):
    assert formats.is_conversational({column: value}) == trl.is_conversational({column: value})
    assert formats.is_conversational_from_value({column: value}) == trl.is_conversational_from_value({column: value})


def test_rows_that_trl_judges_by_chance_or_not_at_all():
    # TRL looks at one column of an unordered set, so its answer for this row changes from run to run.
    assert formats.is_conversational({"prompt": "What color is the sky?", "chosen": CHAT, "rejected": CHAT})
    # TRL raises IndexError.
    assert not formats.is_conversational({"messages": []})
    assert not formats.is_conversational_from_value({"conversations": []})
    assert formats.is_conversational_from_value({"conversations": SHAREGPT})


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": SHAREGPT},
        {"conversations": CHAT, "extra": 1},
        {"messages": SHAREGPT},
        {"prompt": SHAREGPT[:1], "completion": SHAREGPT[1:]},
        {"prompt": SHAREGPT[:1], "chosen": SHAREGPT[1:], "rejected": SHAREGPT[1:]},
        {"text": "Hi"},
        {"conversations": "Hi"},
    ],
)
def test_conversion_to_chatml_equals_trl(row):
    expected = trl.maybe_convert_to_chatml(copy.deepcopy(row))
    given_row = copy.deepcopy(row)
    turns = given_row.get("conversations")
    assert formats.maybe_convert_to_chatml(given_row) == expected
    assert turns == row.get("conversations")  # TRL changes the messages themselves
    mine = Dataset.from_list([row, row]).map(formats.maybe_convert_to_chatml)
    theirs = Dataset.from_list([row, row]).map(trl.maybe_convert_to_chatml)
    assert mine.features == theirs.features
    assert mine[:] == theirs[:]


@settings(max_examples=150, deadline=None)
@given(_TEXT, _TEXT, _TEXT)
def test_extracted_prompt_of_texts(start, chosen, rejected):
    row = {"chosen": start + chosen, "rejected": start + rejected}
    mine = formats.extract_prompt(row)
    for answer in ("chosen", "rejected"):
        assert mine["prompt"] + mine[answer] == row[answer]
    if row["chosen"] and row["rejected"]:
        assert mine["chosen"] and mine["rejected"]
        # Without any shared beginning, TRL looks at the character before the first: the last one.
        if row["chosen"][0] == row["rejected"][0] or row["chosen"][-1] != " ":
            assert mine == trl.extract_prompt(row)
        else:
            assert mine == {"prompt": "", **row}


@settings(max_examples=60, deadline=None)
@given(_MESSAGES, _MESSAGES, _MESSAGES)
def test_extracted_prompt_of_conversations_equals_trl(start, chosen, rejected):
    row = {"chosen": start + chosen, "rejected": start + rejected}
    assert formats.extract_prompt(row) == trl.extract_prompt(row)


def test_a_space_at_the_end_of_an_answer_is_no_reason_to_cut_it():
    row = {"chosen": "yes, of course ", "rejected": "no"}
    assert trl.extract_prompt(row)["prompt"] == "yes, of course"  # what TRL makes of it
    assert formats.extract_prompt(row) == {"prompt": "", **row}


@pytest.mark.parametrize(
    "row",
    [
        PREFERENCES["standard"][0],
        PREFERENCES["implicit"][0],
        PREFERENCES["conversational"][0],
        {"prompt": "What color is the sky?", "chosen": CHAT, "rejected": [CHAT[0], _assistant("Green.")]},
        {"chosen": CHAT, "rejected": CHAT},
        {"prompt": "a", "completion": "b"},
    ],
)
def test_maybe_extract_prompt_equals_trl(row):
    assert formats.maybe_extract_prompt(row) == trl.maybe_extract_prompt(row)
    mine = Dataset.from_list([row] * 2).map(formats.maybe_extract_prompt)
    assert mine[:] == Dataset.from_list([row] * 2).map(trl.maybe_extract_prompt)[:]


@pytest.mark.parametrize("kind", PREFERENCES)
@pytest.mark.parametrize("wrap", ["dataset", "dict", "stream"])
def test_unpairing_equals_trl(kind, wrap):
    def build():
        dataset = Dataset.from_list(PREFERENCES[kind])
        if wrap == "dict":
            return DatasetDict({"train": dataset, "test": dataset})
        return dataset.to_iterable_dataset() if wrap == "stream" else dataset

    def rows(dataset):
        return {k: list(v) for k, v in dataset.items()} if wrap == "dict" else list(dataset)

    expected = rows(trl.unpair_preference_dataset(build(), batch_size=2))
    assert rows(formats.unpair_preference_dataset(build(), batch_size=2)) == expected
    mine = formats.maybe_unpair_preference_dataset(build())
    assert rows(formats.maybe_unpair_preference_dataset(mine)) == rows(mine)  # nothing left to unpair
    if wrap != "stream":  # TRL passes `num_proc`, which a stream's map does not have
        assert rows(mine) == rows(trl.maybe_unpair_preference_dataset(build()))


def test_unpairing_what_trl_cannot():
    stream = Dataset.from_list(PREFERENCES["standard"]).to_iterable_dataset()
    both = formats.maybe_unpair_preference_dataset(IterableDatasetDict({"train": stream, "test": stream}))
    assert [row["label"] for row in both["test"]] == [True, True, False, False]
    unknown_columns = stream.map(lambda row: row)
    assert unknown_columns.column_names is None
    assert len(list(formats.maybe_unpair_preference_dataset(unknown_columns))) == 4
    # A column that is called like the new one gives way to it; in TRL's result it wins.
    labelled = Dataset.from_list([{**row, "label": "x"} for row in PREFERENCES["standard"]])
    assert formats.unpair_preference_dataset(labelled)["label"][:] == [True, True, False, False]
    with pytest.raises(ValueError, match=r"has no column 'rejected', only 'prompt', 'chosen'; unpairing needs"):
        formats.unpair_preference_dataset(Dataset.from_dict({"prompt": ["a"], "chosen": ["b"]}))


_IMAGE = {"type": "image"}
_CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}


@pytest.mark.parametrize(
    ("messages", "images"),
    [
        (CHAT, []),
        (CHAT, None),
        (CHAT, ["one", "two"]),
        ([{"role": "system", "content": "Be brief."}, *CHAT, *CHAT], ["one"]),
        ([{"role": "user", "content": [_IMAGE, {"type": "text", "text": "a"}, _IMAGE]}, CHAT[1]], ["one", "two"]),
        ([{"role": "user", "content": [{"type": "image", "image": "filled"}, _IMAGE]}], ["one"]),
        ([{"role": "user", "content": [{"type": "image", "image": "filled"}]}, CHAT[1]], []),
        ([_user("a"), _CALL, {"role": "tool", "name": "f", "content": "b"}], ["one"]),
        ([_user("a"), _CALL, {"role": "tool", "name": "f", "content": [_IMAGE]}], ["one"]),
        ([{"role": "assistant", "content": [_IMAGE, _IMAGE]}], ["one", "two"]),
    ],
)
def test_multimodal_messages_equal_trl(messages, images):
    before = copy.deepcopy(messages)
    assert formats.prepare_multimodal_messages(messages, images) == trl.prepare_multimodal_messages(messages, images)
    assert messages == before


def test_multimodal_messages_that_do_not_fit():
    with pytest.raises(
        ValueError, match=r"^The conversation has 1 places for images, but 2 images are given; give one"
    ):
        formats.prepare_multimodal_messages([{"role": "user", "content": [_IMAGE]}], ["one", "two"])
    with pytest.raises(ValueError, match="role 'developer'; use one of 'system', 'user', 'assistant', 'tool'"):
        formats.prepare_multimodal_messages([{"role": "developer", "content": "a"}])
