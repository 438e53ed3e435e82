"""Response templates: how to take a model's reply apart into reasoning, tool calls and content.

`tokenizer.parse_response` of transformers reads such a template; most tokenizers do not bring one. The chat template
knows the same from the other side, so one is made from what it renders of a message with reasoning and a tool call.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import ProcessorMixin

from outspoken.trainers.data.chat_templates import Processing, default_template
from outspoken.trainers.data.formats import common_prefix_length, prepare_multimodal_messages
from outspoken.trainers.data.training_templates import RENDERING_ERRORS

Field = dict[str, Any]

_CALL = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}

# A value in a call like `f(a='x', b=[1, {'c': 2}], d=3)`: quoted, in brackets (nested three deep), or up to the next
# comma or parenthesis.
_ITEM = r"""'[^']*'|"[^"]*"|[^\[\]{}'"]"""
_NESTED = _ITEM
for _ in range(3):
    _NESTED = rf"(?:{_ITEM}|[\[{{](?:{_NESTED})*[\]}}])"
_PYTHON_VALUE = rf"'[^']*'|[\[{{](?:{_NESTED})*[\]}}]|[^,)]*"


@dataclass(frozen=True)
class _Dialect:
    """A way to write tool calls: how to know it in a rendered call of `probe(key="value")`, and how to parse it."""

    rendered: str
    field: Callable[[re.Match], Field]


def _tagged(tag: str, pattern: str, value: Any = None) -> Field:
    """Arguments as pairs of key and value in tags."""
    return {"content": tag, "content_args": {"tag_pattern": pattern, "value_parser": value or {"name": "text"}}}


_DIALECTS = (
    # <tool_call>{"name": "probe", "arguments": {"key": "value"}}</tool_call>
    _Dialect(
        r'(?P<open><[^<>\s]+>)\s*\{"name": "probe", "arguments": \{"key": "value"\}\}\s*(?P<close><[^<>\s]+>)',
        lambda match: {
            "open": match["open"],
            "close_pattern": re.escape(match["close"]) + r"\s*",
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
    ),
    # {"name": "probe", "parameters": {"key": "value"}}<|eot_id|>
    _Dialect(
        r'\{"name": "probe", "parameters": \{"key": "value"\}\}(?P<close><[^<>\s]+>)',
        lambda match: {
            "open_pattern": r'\{"name":\s*"(?P<name>[^"]+)",\s*"parameters":\s*',
            "close_pattern": r"\}" + re.escape(match["close"]) + r"\s*",
            "content": "json",
            "transform": _CALL,
        },
    ),
    # <tool_call><function=probe><parameter=key>value</parameter></function></tool_call>
    _Dialect(
        r"(?P<open><[^<>\s]+>)\s*<function=probe>\s*<parameter=key>\s*value\s*</parameter>\s*</function>\s*"
        r"(?P<close><[^<>\s]+>)",
        lambda match: {
            "open_pattern": re.escape(match["open"]) + r"\s*<function=(?P<name>[^>\n]+)>",
            "close_pattern": re.escape(match["close"]) + r"\s*",
            **_tagged("xml-inline", r"<parameter=(?P<key>[^>\n]+)>\s*(?P<value>.*?)\s*</parameter>"),
            "transform": _CALL,
        },
    ),
    # <tool_call>probe<arg_key>key</arg_key><arg_value>value</arg_value></tool_call>
    _Dialect(
        r"(?P<open><[^<>\s]+>)probe\s*<arg_key>key</arg_key>\s*<arg_value>value</arg_value>\s*(?P<close><[^<>\s]+>)",
        lambda match: {
            "open_pattern": re.escape(match["open"]) + r"(?P<name>[^\s<]+)\s*",
            "close_pattern": re.escape(match["close"]) + r"\s*",
            **_tagged("xml-inline", r"<arg_key>(?P<key>[^<]+)</arg_key>\s*<arg_value>(?P<value>.*?)</arg_value>"),
            "transform": _CALL,
        },
    ),
    # to=functions.probe<|channel|>commentary json<|message|>{"key": "value"}<|call|>
    _Dialect(
        r'to=functions\.probe<\|channel\|>commentary json<\|message\|>\{"key": "value"\}<\|call\|>',
        lambda match: {
            "open_pattern": r"to=functions\.(?P<name>\S+?)<\|channel\|>commentary\s+json<\|message\|>",
            "close_pattern": r"<\|call\|>\s*",
            "content": "json",
            "transform": _CALL,
        },
    ),
    # <|tool_call_start|>[probe(key='value')]<|tool_call_end|>, several calls with commas between
    _Dialect(
        r"(?P<open><[^<>\s]+>)\[probe\(key='value'\)\](?P<close><[^<>\s]+>)",
        lambda match: {
            "open_pattern": "(?:" + re.escape(match["open"]) + r"\[|,\s*)(?P<name>\w+)\(",
            "close_pattern": r"\)(?:\]" + re.escape(match["close"]) + r")?\s*",
            **_tagged(
                "xml-inline",
                rf"(?P<key>\w+)=(?P<value>{_PYTHON_VALUE})",
                {"name": "json", "args": {"string_delims": [["'", "'"]], "allow_non_json": True}},
            ),
            "transform": _CALL,
        },
    ),
    # <|tool_call>call:probe{key:<|"|>value<|"|>}<tool_call|>
    _Dialect(
        r"(?P<open><[^<>\s]+>)call:probe\{key:(?P<quote><[^<>\s]+>)value(?P=quote)\}(?P<close><[^<>\s]+>)",
        lambda match: {
            "open_pattern": re.escape(match["open"]) + r"call:(?P<name>\w+)",
            "close_pattern": re.escape(match["close"]) + r"\s*",
            "content": "json",
            "content_args": {"string_delims": [[match["quote"], match["quote"]]], "unquoted_keys": True},
            "transform": _CALL,
        },
    ),
)


def add_response_schema(processing_class: Processing) -> Processing:
    """Give a tokenizer (a processor's own one) the `response_template` that `parse_response` needs, in place.

    The template is made from what the chat template renders, whatever family it is of; the kinds of tool calls that are
    known are those of Qwen 2.5 to 3.8, Nemotron 3, GLM-4, gpt-oss, Llama 3.1 and 3.2, LFM 2 and 2.5, and Gemma 4.

    Returns:
        The tokenizer or processor itself.

    Raises:
        ValueError: the chat template renders tool calls in another way, or neither tool calls nor reasoning.
    """
    tokenizer = processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class
    tokenizer.response_template = response_template(processing_class)
    return processing_class


def response_template(processing_class: Processing) -> dict[str, Any]:
    """The response template that fits a chat template; see `add_response_schema`."""
    source = default_template(processing_class)
    if source is None:
        raise ValueError("The tokenizer has no chat template, so how it replies is unknown; set `chat_template`.")

    question = {"role": "user", "content": "question"}

    def render(*messages: dict[str, Any], **kwargs: Any) -> str:
        turns: Any = [question, *messages]
        if isinstance(processing_class, ProcessorMixin):
            turns = prepare_multimodal_messages(turns)
        return str(processing_class.apply_chat_template(turns, tokenize=False, **kwargs))

    try:
        start = render()
        prompt = _added(start, render(add_generation_prompt=True))
        plain = _added(start, render(_assistant(content="answer")))
    except RENDERING_ERRORS as error:
        raise ValueError(
            f"The chat template cannot render a question and its answer ({error}), so how the model replies is unknown; "
            "set the tokenizer's `response_template` yourself."
        ) from error
    # The part of a turn that says whose it is; the prompt may go on with the beginning of the reply.
    header = prompt[: common_prefix_length(prompt, plain)].partition("<think>")[0]

    def reply(**message: Any) -> str:
        """A message of the assistant behind the header; nothing if the template cannot render it."""
        try:
            return _added(start, render(_assistant(**message))).removeprefix(header)
        except RENDERING_ERRORS:
            return ""

    call = {"type": "function", "function": {"name": "probe", "arguments": {"key": "value"}}}
    call_of_text = {"type": "function", "function": {"name": "probe", "arguments": '{"key": "value"}'}}
    calling = reply(tool_calls=[call]) or reply(tool_calls=[call_of_text])
    thinking = reply(content="answer", reasoning_content="thought")
    thinking_calling = reply(tool_calls=[call], reasoning_content="thought")

    name = "thinking" if re.search(r"\.thinking\b|['\"]thinking['\"]", source) else "reasoning_content"
    fields: dict[str, Field] = {name: _reasoning(thinking, prompt) or _reasoning(thinking_calling, prompt) or _THINK}
    if "probe" in calling:
        fields["tool_calls"] = _tool_calls(calling)
    elif "thought" not in thinking and "<think>" not in prompt:
        raise ValueError(
            "The chat template renders neither tool calls nor reasoning, so there is nothing to take apart; set the "
            "tokenizer's `response_template` yourself."
        )
    fields["content"] = _content(plain.removeprefix(header))
    anchors = [header]
    if "<tool_response|>" in source:
        anchors.append("<tool_response|>")  # Gemma 4's turn goes on behind a tool's answer
        fields["content"]["close_pattern"] += r"|<\|tool_response>\s*|<eos>\s*"
        fields[name] = {"open": "<|channel>thought\n", "close_pattern": r"<channel\|>\s*", "content": "text"}
    return {
        "defaults": {"role": "assistant"},
        "start_anchor": anchors if len(anchors) > 1 else header,
        "fields": fields,
    }


def _assistant(**message: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": "", **message}


def _added(before: str, after: str) -> str:
    return after[common_prefix_length(before, after) :]


_THINK: Field = {"open": "<think>", "close_pattern": r"</think>\s*", "content": "text"}


def _reasoning(reply: str, prompt: str) -> Field | None:
    """How reasoning is written, read off a reply with the reasoning "thought"; None if it is not rendered."""
    if "<think>" in prompt:
        # Then a reply begins within the reasoning, and has only its end.
        return {"open_pattern": r"<think>|(?=.*?</think>)", "close_pattern": r"</think>\s*", "content": "text"}
    match = re.search(r"(?P<open>(?:<[^<>\s]+>[a-z]*)+)\s*thought\s*(?P<close><[^<>\s]+>)", reply)
    if match is None:
        return None
    return {"open": match["open"], "close_pattern": re.escape(match["close"]) + r"\s*", "content": "text"}


def _tool_calls(reply: str) -> Field:
    """How tool calls are written, read off a reply with a call of `probe(key="value")`."""
    for dialect in _DIALECTS:
        match = re.search(dialect.rendered, reply)
        if match:
            return {**dialect.field(match), "repeats": True}
    raise ValueError(
        f"The chat template renders tool calls in a way that is not known ({reply!r:.120}); set the tokenizer's "
        "`response_template` yourself."
    )


def _content(reply: str) -> Field:
    """How the content is written, read off a reply with the content "answer": whatever is not something else."""
    match = re.search(r"(?P<open>(?:<[^<>\s]+>[a-z]*)*)\s*answer\s*(?P<close><[^<>\s]+>|$)", reply)
    assert match is not None
    # Without an end-of-turn token, the next message begins with it (GLM-4).
    close = re.escape(match["close"]) + r"\s*" if match["close"] else r"<\|(?:user|observation)\|>\s*|$"
    field: Field = {"close_pattern": close, "content": "text"}
    if "<|channel|>" in match["open"]:  # gpt-oss writes nothing outside of channels
        field["open"] = match["open"]
    return field
