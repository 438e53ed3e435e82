"""Rendering rows with chat templates, and what a chat template can do: beside TRL, over all templates that TRL knows."""

from pathlib import Path

import pytest
import trl
from datasets import Dataset

import outspoken
from outspoken.trainers.data.chat_templates import is_prefix_preserving

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
FAMILIES = sorted(path.stem for path in TEMPLATES.glob("*.jinja") if not path.stem.endswith("_training"))


def _template(name):
    return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


def get_weather(city: str):
    """
    Gets the weather.

    Args:
        city: Where.
    """


def _user(text):
    return {"role": "user", "content": text}


def _assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


ASK, ANSWER = _user("What color is the sky?"), _assistant("It is blue.")
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}
ROWS = {
    "messages": {"messages": [ASK, ANSWER, _user("And the grass?"), _assistant("Green.")]},
    "prompt": {"prompt": [ASK]},
    "prompt to continue": {"prompt": [ASK, _assistant("It is")]},
    "prompt and completion": {"prompt": [ASK], "completion": [ANSWER]},
    "completion of several turns": {"prompt": [ASK], "completion": [ANSWER, _user("Why?"), _assistant("Light.")]},
    "reasoning": {"prompt": [ASK], "completion": [_assistant("Blue.", reasoning_content="Look up.")]},
    "preference": {"prompt": [ASK], "chosen": [ANSWER], "rejected": [_assistant("It is green.")]},
    "implicit prompt": {"chosen": [ASK, ANSWER], "rejected": [ASK, _assistant("It is green.")]},
    "unpaired": {"prompt": [ASK], "completion": [ANSWER], "label": True},
    "kwargs": {"prompt": [ASK], "completion": [ANSWER], "chat_template_kwargs": {"enable_thinking": False}},
    "other columns": {"prompt": [ASK], "score": 3},
}
TOOL_ROWS = {
    "prompt with a tool's answer": {
        "prompt": [ASK, _assistant("", tool_calls=[CALL]), {"role": "tool", "name": "get_weather", "content": "Sun"}]
    },
    "messages with a call": {"messages": [ASK, _assistant("", tool_calls=[CALL])]},
}


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think", "phi3", "llama3_1", "deepseek_r1_distill", "gemma4_v5"])
def test_rendered_rows_equal_trl(name, tiny_tokenizer_factory):
    tokenizer = tiny_tokenizer_factory(chat_template=_template(name), bos_token="<bos>")
    rows = {**ROWS, **(TOOL_ROWS if trl.supports_tool_calling(tokenizer) else {})}
    for kind, row in rows.items():
        for kwargs in ({}, {"tools": [get_weather]}, {"tools": [], "thinking": True}):
            mine = outspoken.apply_chat_template(row, tokenizer, **kwargs)
            assert mine == trl.apply_chat_template(row, tokenizer, **kwargs), (kind, kwargs)
            assert outspoken.maybe_apply_chat_template(row, tokenizer, **kwargs) == mine


def test_rows_are_rendered_in_maps(tiny_tokenizer):
    dataset = Dataset.from_list([{"prompt": [ASK], "completion": [ANSWER]}] * 2)
    kwargs = {"fn_kwargs": {"processing_class": tiny_tokenizer, "tools": [get_weather]}}
    expected = dataset.map(trl.apply_chat_template, **kwargs).to_dict()
    assert dataset.map(outspoken.apply_chat_template, **kwargs).to_dict() == expected
    assert list(dataset.to_iterable_dataset().map(outspoken.apply_chat_template, **kwargs)) == [
        {column: values[row] for column, values in expected.items()} for row in range(2)
    ]


def test_rows_without_conversations_stay(tiny_tokenizer):
    row = {"prompt": "The sky is", "completion": " blue."}
    assert outspoken.maybe_apply_chat_template(row, tiny_tokenizer) is row
    # In a dataset in which other rows have them, the column is there; TRL raises TypeError.
    row = {"prompt": [ASK], "chat_template_kwargs": None}
    assert outspoken.apply_chat_template(row, tiny_tokenizer)["prompt"].endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("row", "error", "message"),
    [
        (
            {"messages": [ASK], "prompt": [ASK]},
            KeyError,
            "The row has 'messages', 'prompt', which is no kind of dataset",
        ),
        ({"completion": [ANSWER]}, KeyError, "The row has 'completion', which is no kind of dataset"),
        ({"text": "a"}, KeyError, "The row has no messages, which is no kind of dataset; it needs 'messages',"),
        (
            {"prompt": [{"role": "system", "content": "a"}]},
            ValueError,
            "last message has the role 'system'; end prompts",
        ),
    ],
)
def test_rows_that_are_no_dataset(row, error, message, tiny_tokenizer):
    with pytest.raises(error, match=message):
        outspoken.apply_chat_template(row, tiny_tokenizer)
    with pytest.raises(error):
        trl.apply_chat_template(row, tiny_tokenizer)


@pytest.mark.parametrize("name", FAMILIES)
def test_abilities_of_templates_are_as_trl_sees_them(name, tiny_tokenizer_factory):
    from trl.chat_template_utils import is_chat_template_prefix_preserving

    tokenizer = tiny_tokenizer_factory(chat_template=_template(name), bos_token="<bos>")
    assert outspoken.supports_tool_calling(tokenizer) == trl.supports_tool_calling(tokenizer)
    if trl.supports_tool_calling(tokenizer):
        assert is_prefix_preserving(tokenizer) == is_chat_template_prefix_preserving(tokenizer)


def test_no_template_calls_no_tools(tiny_tokenizer_factory):
    assert not outspoken.supports_tool_calling(tiny_tokenizer_factory(chat_template=None))
    named = tiny_tokenizer_factory(chat_template={"default": _template("qwen3"), "short": "{{ messages }}"})
    assert outspoken.supports_tool_calling(named)


def test_cloning_without_rounding(tmp_path, tiny_tokenizer_factory, tiny_model_factory):
    source = tiny_tokenizer_factory(chat_template="{{ messages[0]['content'] }}<turn>")
    source.add_tokens(["<turn>"])
    source.save_pretrained(tmp_path)
    model, tokenizer = tiny_model_factory(), tiny_tokenizer_factory()
    result = outspoken.clone_chat_template(model, tokenizer, str(tmp_path), resize_to_multiple_of=None)
    theirs = trl.clone_chat_template(tiny_model_factory(), tiny_tokenizer_factory(), str(tmp_path), None)
    assert result[0] is model and result[1] is tokenizer
    assert result[2] == theirs[2] == [300]
    assert model.get_input_embeddings().weight.shape == theirs[0].get_input_embeddings().weight.shape


@pytest.mark.parametrize("name", ["qwen3_vl", "idefics3"])
def test_processors_have_their_own_template(name, tiny_tokenizer_factory):
    from transformers import ProcessorMixin

    class Processor(ProcessorMixin):
        def __init__(self, tokenizer=None, chat_template=None):
            super().__init__(tokenizer, chat_template=chat_template)

    tokenizer = tiny_tokenizer_factory(chat_template=None, bos_token="<bos>")
    processor = Processor(tokenizer, chat_template=_template(name))
    assert outspoken.supports_tool_calling(processor) == trl.supports_tool_calling(processor) == (name == "qwen3_vl")
    expected = outspoken.get_training_chat_template(tiny_tokenizer_factory(chat_template=_template(name)))
    assert outspoken.get_training_chat_template(processor) == expected
    if name == "qwen3_vl":
        assert outspoken.add_response_schema(processor) is processor
        assert tokenizer.response_template["start_anchor"] == "<|im_start|>assistant\n"
