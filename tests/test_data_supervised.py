"""Rows become the tokens and labels that TRL 1.16.0's SFTTrainer makes of them, run here; facts and dropped rows."""

import json

import pytest
from datasets import Dataset, IterableDataset

from outspoken.trainers.data.chat_templates import (
    clone_chat_template,
    tokenize_chat_with_assistant_mask,
    trains_to_stop,
)
from outspoken.trainers.data.formats import common_prefix_length
from outspoken.trainers.data.padding import pad
from outspoken.trainers.data.supervised import SupervisedFormat, prepare_supervised
from outspoken.trainers.sft import DataCollatorForLanguageModeling, SFTConfig, SFTTrainer

trl = pytest.importorskip("trl")


def _chat(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def _says(text):
    return [{"role": "assistant", "content": text}]


TEXTS = [{"text": "The sky is blue."}, {"text": "Ends itself.<|endoftext|>"}, {"text": "What is 2 + 2? It is 4."}]
PAIRS = [
    {"prompt": "The sky is", "completion": " blue."},
    {
        "prompt": "The sky is ",
        "completion": "blue, very blue, and that for a long time.",
    },  # merges across the boundary
    {"prompt": "What is 2 + 2? Tell me at length and with care.", "completion": " 4"},
]
CHATS = [
    {"messages": _chat("What color is the sky?", "It is blue.", "And the grass?", "Green.")},
    {"messages": [{"role": "system", "content": "Be brief."}, *_chat("What is 2 + 2?", "It is 4.")]},
]
CHAT_PAIRS = [
    {"prompt": _chat("What color is the sky?"), "completion": _says("It is blue.")},
    {"prompt": _chat("Hi", "Hello", "What?"), "completion": _says("I said hello.")},
]
SHARE_GPT = [{"conversations": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hello"}]}]
TOOL = {"type": "function", "function": {"name": "add", "description": "adds", "parameters": {"type": "object"}}}
WITH_TOOLS = [{**row, "tools": json.dumps([TOOL])} for row in CHATS]
WITH_KWARGS = [{**row, "chat_template_kwargs": {"ending": "the end"}} for row in CHATS]
IDS = [{"input_ids": [5, 6, 7, 8]}, {"input_ids": [9, 10]}]
IDS_LABELS = [{"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}, {"input_ids": [9, 10], "labels": [9, -100]}]
IDS_COMPLETION = [{"input_ids": [5, 6, 7], "completion_mask": [0, 0, 1]}, {"input_ids": [9], "completion_mask": [1]}]
IDS_ASSISTANT = [{"input_ids": [5, 6, 7], "assistant_masks": [0, 1, 0]}, {"input_ids": [9], "assistant_masks": [1]}]


@pytest.mark.parametrize(
    ("rows", "config", "kwargs"),
    [
        pytest.param(TEXTS, {}, {}, id="text"),
        pytest.param([{"body": "abc"}], {"dataset_text_field": "body"}, {}, id="named-text"),
        pytest.param(TEXTS, {"eos_token": "<|im_end|>"}, {}, id="other-eos"),
        pytest.param(TEXTS, {"max_length": 5}, {}, id="keep-start"),
        pytest.param(TEXTS, {"max_length": 5, "truncation_mode": "keep_end"}, {}, id="keep-end"),
        pytest.param(TEXTS, {"max_length": None}, {}, id="no-truncation"),
        pytest.param(TEXTS, {"shuffle_dataset": True, "seed": 3}, {}, id="shuffled"),
        pytest.param(PAIRS, {}, {}, id="pairs"),
        pytest.param(PAIRS, {"completion_only_loss": False}, {}, id="pairs-whole"),
        pytest.param(PAIRS, {"max_length": 12}, {}, id="pairs-one-dropped"),
        pytest.param(PAIRS, {"max_length": 3, "truncation_mode": "keep_end"}, {}, id="pairs-keep-end"),
        pytest.param(CHATS, {}, {}, id="chats"),
        pytest.param(CHATS, {"assistant_only_loss": True}, {}, id="chats-assistant"),
        pytest.param(CHATS, {"assistant_only_loss": True, "max_length": 30}, {}, id="chats-assistant-truncated"),
        pytest.param(CHAT_PAIRS, {}, {}, id="chat-pairs"),
        pytest.param(CHAT_PAIRS, {"completion_only_loss": False}, {}, id="chat-pairs-whole"),
        pytest.param(CHAT_PAIRS, {"assistant_only_loss": True}, {}, id="chat-pairs-assistant"),
        pytest.param(
            CHAT_PAIRS, {"assistant_only_loss": True, "completion_only_loss": False}, {}, id="chat-pairs-all-turns"
        ),
        pytest.param(SHARE_GPT, {}, {}, id="sharegpt"),
        pytest.param(WITH_TOOLS, {}, {}, id="tools"),
        pytest.param(WITH_KWARGS, {}, {}, id="template-kwargs"),
        pytest.param(IDS, {}, {}, id="ids"),
        pytest.param(IDS, {"max_length": 3}, {}, id="ids-truncated"),
        pytest.param(IDS_LABELS, {}, {}, id="ids-labels"),
        pytest.param(IDS_LABELS, {"max_length": 2}, {}, id="ids-labels-dropped"),
        pytest.param(IDS_COMPLETION, {"completion_only_loss": True}, {}, id="ids-completion"),
        pytest.param(IDS_COMPLETION, {}, {}, id="ids-completion-ignored"),
        pytest.param(IDS_ASSISTANT, {}, {}, id="ids-assistant"),
        pytest.param(
            [{"q": "1+1", "a": "2"}, {"q": "2+2", "a": "4"}],
            {},
            {"formatting_func": lambda row: f"Q: {row['q']} A: {row['a']}"},
            id="formatted",
        ),
    ],
)
@pytest.mark.parametrize("streaming", [False, True], ids=["", "stream"])
def test_tokens_and_labels_equal_trl(
    rows, config, kwargs, streaming, tmp_path, tiny_model_factory, tiny_tokenizer_factory, tiny_chat_templates
):
    template = tiny_chat_templates["generation"] + "{{ ending or '' }}"
    made = []
    for config_class, trainer_class in ((SFTConfig, SFTTrainer), (trl.SFTConfig, trl.SFTTrainer)):
        args = config_class(str(tmp_path), use_cpu=True, bf16=False, report_to=[], max_steps=1, **config)
        args.diagnose = False
        if streaming:
            dataset = IterableDataset.from_generator(lambda: iter(rows))
        else:
            dataset = Dataset.from_list(rows)
        tokenizer = tiny_tokenizer_factory(chat_template=template)
        trainer = trainer_class(
            tiny_model_factory(), args, train_dataset=dataset, processing_class=tokenizer, **kwargs
        )
        made.append([(row["input_ids"], row["labels"]) for row in trainer.train_dataset])
    assert made[0] == made[1]
    assert made[0]


def test_facts_and_dropped_rows(tiny_tokenizer, caplog):
    # Lengths by construction: 10 ids each; labels on the last 1, 3 and 0 of them.
    rows = [
        {"input_ids": [4] * 10, "labels": [-100] * 9 + [tiny_tokenizer.eos_token_id]},
        {"input_ids": [4] * 10, "labels": [-100] * 7 + [50, 51, 52]},
        {"input_ids": [4] * 4, "labels": [-100] * 4},
        {"input_ids": [4] * 4, "labels": [50, 51, 52, tiny_tokenizer.eos_token_id]},
        {"input_ids": [4] * 3, "labels": [50, 51, 52]},
    ]
    prepared, facts = prepare_supervised(Dataset.from_list(rows), tiny_tokenizer, SupervisedFormat(max_length=8))
    assert facts == {
        "data/rows": 5,
        "data/longest": 10,
        "data/p99_length": 10,
        "data/truncated_share": 2 / 5,
        "data/no_supervised_share": 2 / 5,  # the first loses its only label, the third has none
        "data/boundary_mismatch_share": 0,
        "data/ends_with_eos_share": 1 / 2,  # of the two whole rows with labels, one ends in EOS
    }
    assert prepared["labels"][:] == [[-100] * 7 + [50], [50, 51, 52, tiny_tokenizer.eos_token_id], [50, 51, 52]]
    assert (
        "2 of 5 rows of the train dataset are dropped: truncation to `max_length=8` leaves them no token with loss"
        in caplog.text
    )


def test_boundary_mismatch_is_counted_and_named(tiny_tokenizer, caplog):
    how = SupervisedFormat(completion_only_loss=True)
    # "is " + "blue": the space belongs to the token " blue" (or " b") once the completion follows.
    rows = [{"prompt": "The sky is", "completion": " blue."}, {"prompt": "The sky is ", "completion": "blue."}]
    _, facts = prepare_supervised(Dataset.from_list(rows), tiny_tokenizer, how)
    assert facts["data/boundary_mismatch_share"] == 0.5
    assert (
        "In 1 of 2 rows of the train dataset (first: row 1) the prompt's tokens are not the beginning" in caplog.text
    )


def test_formatting_counts_instead_of_other_columns(tiny_tokenizer):
    rows = [{**chat, "text": "not this"} for chat in CHATS]
    prepared, _ = prepare_supervised(
        Dataset.from_list(rows), tiny_tokenizer, SupervisedFormat(), formatting_func=lambda row: "this"
    )
    assert [tiny_tokenizer.decode(ids) for ids in prepared["input_ids"]] == ["this<|endoftext|>"] * 2


@pytest.mark.slow
def test_several_processes_give_the_same(tiny_tokenizer):
    dataset = Dataset.from_list(CHATS * 4)
    one, facts = prepare_supervised(dataset, tiny_tokenizer, SupervisedFormat())
    two, more_facts = prepare_supervised(dataset, tiny_tokenizer, SupervisedFormat(), num_proc=2)
    assert one["labels"][:] == two["labels"][:]
    assert facts == more_facts


def test_assistant_mask_without_markers_equals_the_markers(
    tiny_tokenizer, tiny_tokenizer_factory, tiny_chat_templates
):
    plain = tiny_tokenizer_factory(chat_template=tiny_chat_templates["plain"])
    for row in CHATS:
        expected = tokenize_chat_with_assistant_mask(tiny_tokenizer, row["messages"])
        assert tokenize_chat_with_assistant_mask(plain, row["messages"]) == expected
        assert 0 < sum(expected[1]) < len(expected[1])
    assert trains_to_stop(plain)


def _plain_template(name):
    return getattr(trl.chat_template_utils, f"{name}_chat_template")


@pytest.mark.parametrize(
    "name", ["qwen2_5", "llama3", "phi3", "phi3_5", "gemma", "cohere", "cohere2", "qwen3_instruct_2507"]
)
def test_assistant_mask_of_known_templates_equals_trl(name, tiny_tokenizer_factory):
    """TRL keeps hand-made variants with markers; theirs may add whitespace around a turn, which is not compared."""
    # Their tokens need not be in the vocabulary: they are then spelled out, and the words stay where they are.
    tokenizer = tiny_tokenizer_factory(chat_template=_plain_template(name))
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    marked = tiny_tokenizer_factory(chat_template=trl.chat_template_utils.get_training_chat_template(tokenizer))
    marked.add_special_tokens({"bos_token": "<bos>"})
    messages = _chat("What color is the sky?", "It is blue.", "And the grass?", "Green.")
    ids, mask = tokenize_chat_with_assistant_mask(tokenizer, messages)
    expected_ids, expected_mask = tokenize_chat_with_assistant_mask(marked, messages)
    assert ids == expected_ids
    blank = [not tokenizer.decode([token]).strip() for token in ids]
    assert [m for m, b in zip(mask, blank) if not b] == [m for m, b in zip(expected_mask, blank) if not b]
    assert sum(mask) > 0


def test_template_that_rewrites_earlier_turns_is_refused(tiny_tokenizer_factory):
    # Only the last message is rendered whole, as templates do that drop earlier reasoning.
    template = (
        "{% for m in messages %}{{ m['role'] + ':' + (m['content'] if loop.last else m['content'][:2]) + '\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    tokenizer = tiny_tokenizer_factory(chat_template=template)
    with pytest.raises(ValueError, match="renders message 1 differently when the conversation goes on"):
        tokenize_chat_with_assistant_mask(tokenizer, CHATS[0]["messages"])


def test_end_of_turn_outside_the_markers_is_noticed(tiny_tokenizer, tiny_tokenizer_factory, tiny_chat_templates):
    outside = tiny_chat_templates["generation"].replace(
        "{{ '<|im_end|>' }}{% endgeneration %}", "{% endgeneration %}{{ '<|im_end|>' }}"
    )
    assert outside != tiny_chat_templates["generation"]
    assert trains_to_stop(tiny_tokenizer)
    assert not trains_to_stop(tiny_tokenizer_factory(chat_template=outside))


def test_cloned_chat_template_equals_trl(tmp_path, tiny_tokenizer_factory, tiny_model_factory):
    source = tiny_tokenizer_factory(chat_template="{{ messages[0]['content'] }}<turn>")
    source.add_tokens(["<turn>", "<think>"])
    source.eos_token = "<turn>"
    source.save_pretrained(tmp_path)
    model, tokenizer = tiny_model_factory(), tiny_tokenizer_factory()
    same_model, same_tokenizer, added = clone_chat_template(model, tokenizer, str(tmp_path))
    assert same_model is model and same_tokenizer is tokenizer
    their_model, their_tokenizer, their_added = trl.clone_chat_template(
        tiny_model_factory(), tiny_tokenizer_factory(), str(tmp_path)
    )
    assert added == their_added == list(range(300, 320))  # 2 tokens, and 18 to fill 302 up to 5 * 64
    assert tokenizer.get_vocab() == their_tokenizer.get_vocab()
    assert tokenizer.chat_template == their_tokenizer.chat_template
    assert model.config.eos_token_id == their_model.config.eos_token_id == tokenizer.eos_token_id == 300
    assert model.get_input_embeddings().weight.shape == their_model.get_input_embeddings().weight.shape == (320, 32)


def test_collator_equals_trl():
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling as Theirs

    rows = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4], "labels": [4]}]
    bare = [{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5]}]
    for batch in (rows, bare):
        for multiple in (None, 4):
            mine = DataCollatorForLanguageModeling(0, pad_to_multiple_of=multiple)(batch)
            other = Theirs(0, pad_to_multiple_of=multiple)(batch)
            assert {*mine} == {*other}
            assert all(mine[key].equal(other[key]) for key in mine)


def test_pad():
    assert pad([[1, 2, 3], [4]], 9).tolist() == [[1, 2, 3], [4, 9, 9]]
    assert pad([[1, 2, 3], [4], []], 9, side="left").tolist() == [[1, 2, 3], [9, 9, 4], [9, 9, 9]]
    assert pad([[1.0]], 0, multiple_of=4).tolist() == [[1.0, 0.0, 0.0, 0.0]]
    with pytest.raises(ValueError, match="side must be 'left' or 'right', got 'middle'"):
        pad([[1]], 0, side="middle")


def test_common_prefix_length():
    assert common_prefix_length([1, 2, 3], [1, 2, 4, 5]) == 2
    assert common_prefix_length([1, 2], [1, 2, 3]) == 2
    assert common_prefix_length([], [1]) == 0
