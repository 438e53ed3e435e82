"""Replies are taken apart as with TRL's hand-made response templates, without knowing the family."""

import functools
import os
from pathlib import Path

import pytest
import trl

import outspoken

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
# Those that TRL has a response template for.
FAMILIES = [
    "deepseek_r1_distill",
    *("gemma4", "gemma4_v2", "gemma4_v3", "gemma4_v4", "gemma4_v5", "glm4moe", "gptoss"),
    *("lfm2_2_5", "lfm2_2_5_v2", "lfm2_2_5_vl", "lfm2_v2", "llama3_1", "llama3_2"),
    *("nemotron_3_5_lightning", "nemotron_3_nano", "nemotron_3_super", "nemotron_3_ultra"),
    *("qwen2_5", "qwen3", "qwen3_5_nothink", "qwen3_5_think", "qwen3_6", "qwen3_8", "qwen3_instruct_2507", "qwen3_vl"),
]
QUESTION = {"role": "user", "content": "What is the weather?"}


def _call(arguments, name="get_weather"):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Gets the weather.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
        },
    }
]
ARGUMENTS = [
    {},
    {"city": "Paris, France"},
    {"days": 3, "deep": {"a": [1, {"b": "x"}]}, "list": ["p", "q"], "half": 0.5},
]
MESSAGES = [
    {"content": "It is <b>sunny</b>, {ok}.\n\nYes."},
    {"content": "Sunny.", "reasoning_content": "Look up.\nThe sun."},
    *({"content": "", "tool_calls": [_call(a)]} for a in ARGUMENTS),
    {"content": "Let me see.", "tool_calls": [_call(ARGUMENTS[1])]},
    {"content": "", "reasoning_content": "Look it up.", "tool_calls": [_call(ARGUMENTS[1])]},
    {"content": "", "tool_calls": [_call({"city": "Paris"}), _call({"days": 2}, "other")]},
]


def _tokenizer(factory, name):
    template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    return factory(chat_template=template, bos_token="<bos>")


def _parsed(tokenizer, reply, prompt, tools=None):
    try:
        return tokenizer.parse_response(reply, prefix=prompt, tools=tools)
    except ValueError as error:
        return type(error).__name__


def _replies(tokenizer):
    """Generation prompts, and replies to them, whole and broken off."""
    prompt = tokenizer.apply_chat_template([QUESTION], tokenize=False, add_generation_prompt=True)
    for message in MESSAGES:
        try:
            text = tokenizer.apply_chat_template([QUESTION, {"role": "assistant", **message}], tokenize=False)
        except Exception:  # one call only (Llama)
            continue
        shared = os.path.commonprefix([prompt, text])  # noqa: RUF071 (of texts)
        if shared == prompt or "<think>" in shared:
            reply = text[len(shared) :]
            yield from ((shared, reply), (shared, reply[: len(reply) * 2 // 3]))
    if prompt.endswith("<think>\n"):
        yield prompt, "Look up.\n</think>\n\nSunny."


@pytest.mark.parametrize("name", FAMILIES)
def test_replies_are_parsed_as_with_trls_template(name, tiny_tokenizer_factory):
    mine, theirs = (_tokenizer(tiny_tokenizer_factory, name) for _ in range(2))
    assert outspoken.add_response_schema(mine) is mine
    trl.add_response_schema(theirs)
    replies = list(_replies(mine))
    assert len(replies) > 5 or name == "deepseek_r1_distill"
    for prompt, reply in replies:
        for tools in (None, TOOLS):
            expected = _parsed(theirs, reply, prompt, tools)
            if prompt.endswith("<think>\n") and "</think>" not in reply:
                # The prompt has begun the reasoning, so a reply broken off there is reasoning; to TRL it is content.
                assert _parsed(mine, reply, prompt, tools)["reasoning_content"] == reply.strip()
            else:
                assert _parsed(mine, reply, prompt, tools) == expected, (prompt, reply)


@pytest.mark.parametrize(
    ("name", "reply", "expected"),
    [
        (
            "qwen3",
            '<think>\nHm\n</think>\n\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call><|im_end|>',
            {"reasoning_content": "Hm", "tool_calls": [_call({"a": 1}, "f")]},
        ),
        ("qwen3_5_think", "Hm\n</think>\n\nYes.<|im_end|>", {"reasoning_content": "Hm", "content": "Yes."}),
        ("glm4moe", "\n<think>Hm</think>\nYes.<|observation|>", {"reasoning_content": "Hm", "content": "Yes."}),
        ("gptoss", "<|channel|>final<|message|>Yes.<|return|>", {"content": "Yes."}),
    ],
)
def test_replies_by_hand(name, reply, expected, tiny_tokenizer_factory):
    tokenizer = outspoken.add_response_schema(_tokenizer(tiny_tokenizer_factory, name))
    assert tokenizer.parse_response(reply, prefix="") == {"role": "assistant", **expected}


def test_it_is_kept_with_the_tokenizer(tmp_path, tiny_tokenizer_factory):
    from transformers import AutoTokenizer

    tokenizer = outspoken.add_response_schema(_tokenizer(tiny_tokenizer_factory, "qwen3"))
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).response_template == tokenizer.response_template


def test_a_template_that_trl_does_not_know(tiny_tokenizer_factory):
    changed = (TEMPLATES / "qwen3.jinja").read_text(encoding="utf-8").replace("<|im_end|>", "<|done|>")
    tokenizer = tiny_tokenizer_factory(chat_template=changed)
    with pytest.raises(ValueError, match="Unrecognized chat template"):
        trl.add_response_schema(tokenizer)
    outspoken.add_response_schema(tokenizer)
    assert tokenizer.parse_response("Yes.<|done|>", prefix="")["content"] == "Yes."


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "phi3",
            "^The chat template renders neither tool calls nor reasoning, so there is nothing to take apart; set",
        ),
        ("deepseekv3", "^The chat template renders tool calls in a way that is not known "),
        ("llava_next", "^The chat template cannot render a question and its answer "),
        (None, "^The tokenizer has no chat template, so how it replies is unknown; set `chat_template`"),
    ],
)
def test_templates_that_tell_too_little(template, message, tiny_tokenizer_factory):
    build = functools.partial(_tokenizer, tiny_tokenizer_factory) if template else tiny_tokenizer_factory
    tokenizer = build(template) if template else build(chat_template=None)
    with pytest.raises(ValueError, match=message):
        outspoken.add_response_schema(tokenizer)
