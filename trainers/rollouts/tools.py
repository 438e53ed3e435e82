"""Conversations in which the model calls tools: sample, call, append the answers, sample again.

Tokens in, tokens out: what the model sampled is never decoded and encoded again. Only what a tool's answer adds to the
conversation is tokenised: the part that the chat template puts between the end of the assistant's turn and the beginning
of the next. Those tokens have `tool_mask` 0 and no part in the loss.
"""

import inspect
import json
import logging
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import get_json_schema

from outspoken.trainers.calls import CallThread, CallTimeout, Pending, TooManyStuckCalls, is_async, side_by_side
from outspoken.trainers.data.chat_templates import (
    Processing,
    get_training_chat_template,
    is_prefix_preserving,
    supports_tool_calling,
    tokenize_chat,
)
from outspoken.trainers.data.formats import is_messages, prepare_multimodal_messages
from outspoken.trainers.rewards import callable_name
from outspoken.trainers.rollouts.batch import Sampled
from outspoken.trainers.rollouts.sampling import SamplingParams

logger = logging.getLogger(__name__)

TOOL_TIMEOUT = 60.0  # seconds
TOOL_WORKERS = 32
MAX_ANSWER_CHARACTERS = 50_000


# Tools


@dataclass(frozen=True)
class Tool:
    """A function that the model may call.

    Attributes:
        schema: what the chat template tells the model about it.
        thread: where it has to be called; None: anywhere.
        owner: whose method it is, for messages: "environment 'Maze' of sample 3".
    """

    name: str
    function: Callable[..., Any]
    schema: dict[str, Any]
    thread: CallThread | None = None
    owner: str = ""

    def __str__(self) -> str:
        return f"tool {self.name!r}" + (f" of {self.owner}" if self.owner else "")


ToolSet = dict[str, Tool]


def tool_set(functions: Iterable[Callable[..., Any]]) -> ToolSet:
    """Tools by name, from functions, sync or async, with type hints and a docstring in Google's style.

    Raises:
        TypeError: one is no function or method.
        ValueError: one cannot be described to the model, or two have the same name.
    """
    tools: ToolSet = {}
    for position, function in enumerate(functions):
        if not (inspect.isfunction(function) or inspect.ismethod(function)):
            raise TypeError(
                f"tools[{position}] is a {type(function).__name__}, not a function or method; wrap it in a function "
                "with type hints and a docstring."
            )
        name = callable_name(function)
        if name in tools:
            raise ValueError(f"Two tools are called {name!r}; rename one, so that the model can tell them apart.")
        tools[name] = Tool(name, function, tool_schema(function))
    return tools


def tool_schema(function: Callable[..., Any], owner: str = "tool") -> dict[str, Any]:
    """The JSON schema of a function, from its type hints and docstring (`transformers.utils.get_json_schema`)."""
    try:
        return get_json_schema(function)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"The {owner} {callable_name(function)!r} cannot be described to the model ({reason}); give it a docstring "
            "with an entry for each argument, and a type hint for each."
        ) from error


def schemas(tools: ToolSet) -> list[dict[str, Any]] | None:
    """What chat templates take as `tools`; None where there are none (Llama's template introduces an empty list)."""
    return [tool.schema for tool in tools.values()] or None


def row_tools(tools: ToolSet, rows: Sequence[Mapping[str, Any]]) -> list[ToolSet]:
    """The tools of each row: those that its column `tools` names, or all where it has no such column or None in it.

    Args:
        tools: all there are.
        rows: `tools` is a list, or JSON text of a list, of names or of JSON schemas with a name.

    Raises:
        ValueError: a row names a tool that is not there.
    """
    chosen = []
    for index, row in enumerate(rows):
        names = row.get("tools")
        if names is None:
            chosen.append(tools)
            continue
        try:
            listed = [_listed_name(entry) for entry in (json.loads(names) if isinstance(names, str) else names)]
            missing = next((name for name in listed if name not in tools), None)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"'tools' of row {index} of the batch is {str(names)[:80]!r}; it has to be a list of names (or schemas) "
                f"of the trainer's tools: {', '.join(tools)}."
            ) from error
        if missing is not None:
            raise ValueError(
                f"'tools' of row {index} of the batch names {missing!r}, which the trainer has not; pass it in `tools`, "
                f"beside {', '.join(tools)}, or take it out of the row."
            )
        chosen.append({name: tools[name] for name in tools if name in listed})
    return chosen


def _listed_name(entry: Any) -> str:
    if isinstance(entry, str):
        return entry
    function = entry.get("function")
    return (function if isinstance(function, Mapping) else entry)["name"]


# Chat template


def check_tool_template(processing_class: Processing) -> str | None:
    """The chat template under which tools' answers can be appended to a conversation; None: the tokenizer's own.

    Where a tool's answer changes how the turns before it are rendered, it is the template's training variant. Prompts
    have to be rendered with it, too.

    Raises:
        ValueError: the template renders no tool calls, or earlier turns differently and has no training variant.
    """
    if not supports_tool_calling(processing_class):
        raise ValueError(
            "The chat template does not render tool calls and their answers; use a model that was trained to call "
            "tools, or set `chat_template` to a template that renders them."
        )
    if is_prefix_preserving(processing_class):
        return None
    try:
        return get_training_chat_template(processing_class)
    except ValueError as error:
        raise ValueError(
            f"The chat template renders a turn differently once a tool's answer follows, and has no variant that does "
            f"not ({error}); set `chat_template` to one under which turns only append."
        ) from error


def tokenize_tool_prompts(
    processing_class: PreTrainedTokenizerBase,
    prompts: Sequence[Any],
    tools: ToolSet | Sequence[ToolSet],
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[list[int]]:
    """Token ids of prompts with the generation prompt, each rendered with its own tools; equal neighbours once."""
    each = _for_each(tools, len(prompts))
    kwargs = {**(chat_template_kwargs or {})}
    if chat_template is not None:
        kwargs["chat_template"] = chat_template
    tokenized: list[list[int]] = []
    for index, (prompt, own) in enumerate(zip(prompts, each)):
        if index and prompt == prompts[index - 1] and [*own] == [*each[index - 1]]:
            tokenized.append(list(tokenized[-1]))
        else:
            tokenized.append(
                list(tokenize_chat(processing_class, prompt, tools=schemas(own), add_generation_prompt=True, **kwargs))
            )
    return tokenized


class AnswerTokenizer:
    """Token ids of tools' answers as the chat template puts them behind a turn of the assistant.

    They are the difference of two renderings of a conversation with a stand-in for the turn, with the answers and the
    next generation prompt behind it, and without. What an answer contains is text: `<|im_end|>` in a web page ends no
    turn, because the control tokens of the template are encoded like any other text there.
    """

    def __init__(
        self,
        processing_class: Processing,
        end_ids: Sequence[int],
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ):
        """
        Args:
            end_ids: tokens that end a turn of the assistant.
            chat_template: instead of the tokenizer's own; see `check_tool_template`.
        """
        self.multimodal = isinstance(processing_class, ProcessorMixin)
        self.tokenizer = _tokenizer(processing_class)
        self.end_ids = {*end_ids}
        self.kwargs: dict[str, Any] = {**(chat_template_kwargs or {})}
        template = chat_template or (processing_class.chat_template if self.multimodal else None)
        if template is not None:
            self.kwargs["chat_template"] = template
        self._added = {*self.tokenizer.get_added_vocab().values(), *end_ids}
        self._stand_ins: dict[str, tuple[list[int], int]] = {}
        self._arguments: Any = {}
        try:
            self._ids(self._stand_in("f"))
        except TypeError:
            self._arguments = "{}"  # some templates (DeepSeek-V3) put arguments together from text only

    def __call__(self, messages: Sequence[Mapping[str, Any]], last_token: int) -> list[int]:
        """The tokens between a turn of the assistant and its next.

        Args:
            messages: the tools' answers, with role "tool", `name` and `content`.
            last_token: with which the model ended its turn. Where that is not an end token (it ended in a stop text),
                the template's end of a turn comes first.

        Raises:
            ValueError: the template renders the turn differently when an answer follows.
        """
        answers = [dict(message) for message in messages]
        turn = self._stand_in(answers[0]["name"])
        before, end = self._stand_in_ids(answers[0]["name"], turn, last_token)
        try:
            after = self._ids([*turn, *answers], add_generation_prompt=True)
        except ValueError:
            # This tokenizer makes a control token of plain text, too.
            texts = [token for token in self.tokenizer.get_added_vocab() if token.strip()]
            answers = [_without(answer, texts) for answer in answers]
            after = self._ids([*turn, *answers], add_generation_prompt=True)
        if after[:end] != before[:end]:
            raise ValueError(
                "The chat template renders a turn of the assistant differently once a tool's answer follows, so answers "
                "cannot be appended; set `chat_template` to one under which turns only append "
                "(`outspoken.get_training_chat_template` gives such a variant of many)."
            )
        if end == len(before) and last_token in self.end_ids and after[end : end + 1] == [last_token]:
            end += 1  # the beginning of the next message is the end of this one, and the model has written it (GLM-4)
        return after[end:]

    def _stand_in_ids(self, name: str, turn: list[dict[str, Any]], last_token: int) -> tuple[list[int], int]:
        """The stand-in's tokens, and how many of them are before what the model has not written."""
        if name not in self._stand_ins:
            ids = self._ids(turn)
            opened = self._ids(turn[:1], add_generation_prompt=True)
            start = next((i for i, (a, b) in enumerate(zip(ids, opened)) if a != b), min(len(ids), len(opened)))
            self._stand_ins[name] = ids, start
        ids, start = self._stand_ins[name]
        reply = range(len(ids) - 1, start - 1, -1)
        if last_token in self._added:
            for position in reply:
                if ids[position] == last_token:
                    return ids, position + 1
        for position in reply:
            if ids[position] in self._added:
                if self.tokenizer.decode(ids[position + 1 :]).strip():
                    break
                # The model ended its turn with another token than the template does, or with none.
                return ids, position + (last_token in self.end_ids)
        return ids, len(ids)

    def _stand_in(self, name: str) -> list[dict[str, Any]]:
        # The name matters: some templates (gpt-oss) take the header of the answer from the call.
        call = {"type": "function", "function": {"name": name, "arguments": self._arguments}}
        return [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [call]}]

    def _ids(self, messages: list[dict[str, Any]], **kwargs: Any) -> list[int]:
        if self.multimodal:
            messages = prepare_multimodal_messages(messages)
        return tokenize_chat(self.tokenizer, messages, sanitize_control_tokens=True, **{**self.kwargs, **kwargs})


def _without(message: dict[str, Any], texts: Sequence[str]) -> dict[str, Any]:
    content = message["content"]
    for text in texts:
        content = content.replace(text, "\ufffd")
    return {**message, "content": content}


def _tokenizer(processing_class: Processing) -> Any:
    return processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class


# Replies


def parse_reply(
    tokenizer: Any, ids: Sequence[int], prefix: Sequence[int], tools: ToolSet | None = None
) -> tuple[dict[str, Any], bool]:
    """A reply of the model as a message (`content`, and `reasoning_content` and `tool_calls` where it has them).

    A reply that cannot be taken apart, such as a call that is not JSON, is plain text and calls nothing.

    Args:
        tokenizer: with a `response_template`; see `outspoken.add_response_schema`.
        prefix: the tokens before the reply; the template may have begun it (`<think>`).
        tools: arguments are converted to the types in their schemas where the syntax knows only text.

    Returns:
        The message, and whether it could not be taken apart.
    """
    try:
        message = tokenizer.parse_response(list(ids), prefix=list(prefix), tools=schemas(tools or {}))
        if message is None:
            raise ValueError("nothing is left of it")
        calls = message.get("tool_calls")
        if calls is not None:
            message["tool_calls"] = [_checked_call(call) for call in calls]
    except (ValueError, TypeError, AttributeError):
        return {"role": "assistant", "content": tokenizer.decode(list(ids), skip_special_tokens=True)}, True
    content = message.get("content")
    if isinstance(content, str):
        content = content.removesuffix(tokenizer.eos_token or "")
    message["content"] = content or ""
    return message, False


def _checked_call(call: Any) -> dict[str, Any]:
    function = call.get("function", call)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError("a call has no name")
    if function.get("arguments") is None:  # some templates leave them out where there are none
        function["arguments"] = {}  # type: ignore[index]
    return call


# Calls

_UNENCODABLE = re.compile("[\0\ud800-\udfff]")
_NAME = re.compile(r"[\w.:/-]{1,100}")


@dataclass(frozen=True)
class Answer:
    """What a call gave: `content` is what the model gets to see, an error's text where it failed."""

    name: str
    content: str
    failed: bool = False
    timed_out: bool = False
    unknown: bool = False
    seconds: float = 0.0

    @property
    def message(self) -> dict[str, Any]:
        return {"role": "tool", "name": self.name, "content": self.content}


def answer_text(result: Any, limit: int = MAX_ANSWER_CHARACTERS) -> str:
    """What a tool returned as text for the model, at most about `limit` characters, the middle left out.

    A list of content blocks gives the text of its text blocks; other blocks are named in brackets. Everything else is
    `str(result)`. Characters that tokenizers cannot take (NUL, halves of surrogate pairs) become U+FFFD.
    """
    if isinstance(result, list) and result and all(isinstance(part, Mapping) and "type" in part for part in result):
        result = "\n".join(
            str(part.get("text", "")) if part["type"] == "text" else f"[{part['type']}]" for part in result
        )
    text = result if isinstance(result, str) else str(result)
    if len(text) > limit:
        half = limit // 2
        text = f"{text[:half]}\n[{len(text) - 2 * half} characters left out]\n{text[len(text) - half :]}"
    return _UNENCODABLE.sub("\ufffd", text)


def answer_calls(
    calls: Sequence[Mapping[str, Any]],
    tools: ToolSet,
    timeout: float | None = TOOL_TIMEOUT,
    max_characters: int = MAX_ANSWER_CHARACTERS,
) -> list[Answer]:
    """Carry out the calls of one turn, in order; async ones run beside the others. Answers are in the calls' order.

    A call that fails (no such tool, arguments that do not fit, an exception, no answer within `timeout` seconds) answers
    with `{'error': ...}`. Behind a call that did not return, the turn's others are not begun.

    Raises:
        TooManyStuckCalls: too many calls of this run did not return.
    """
    under_way: list[Pending | Answer] = []
    hung = False
    for call in calls:
        function = call.get("function", call)
        name, tool = function["name"], tools.get(function["name"])
        kind = call.get("type", "function")
        if kind != "function":
            under_way.append(_failure(name, f"Unsupported tool call type: {kind}", max_characters))
        elif tool is None:
            # The model's own words go where the template puts names, so they have to look like one.
            name = name if _NAME.fullmatch(name) else "unknown"
            under_way.append(_failure(name, f"Tool {name} not found.", max_characters, unknown=True))
        elif not isinstance(function["arguments"], Mapping):
            message = f"The arguments of {name} are no object with a value for each name."
            under_way.append(_failure(name, message, max_characters))
        elif hung:
            message = f"{name} was not called: an earlier call of this turn did not return."
            under_way.append(_failure(name, message, max_characters))
        else:
            try:
                pending = Pending(str(tool), tool.function, dict(function["arguments"]), timeout, tool.thread)
            except CallTimeout as error:
                under_way.append(_failure(name, f"{name} cannot be called: {error}.", max_characters, timed_out=True))
                continue
            if not is_async(tool.function):
                under_way.append(_awaited(name, pending, max_characters))
                hung = under_way[-1].timed_out  # type: ignore[union-attr]
            else:
                under_way.append(pending)
    return [
        entry if isinstance(entry, Answer) else _awaited(call.get("function", call)["name"], entry, max_characters)
        for call, entry in zip(calls, under_way)
    ]


def _awaited(name: str, pending: Pending, max_characters: int) -> Answer:
    try:
        content = answer_text(pending.result(), max_characters)
    except CallTimeout:
        message = f"{name} did not return within {pending.timeout:g} seconds."
        return _failure(name, message, max_characters, timed_out=True, seconds=pending.seconds)
    except TooManyStuckCalls:
        raise
    except BaseException as error:  # a tool that exits fails, too
        if isinstance(error, KeyboardInterrupt) and pending.timeout is None:
            raise
        return _failure(name, str(error) or type(error).__name__, max_characters, seconds=pending.seconds)
    return Answer(name, content, seconds=pending.seconds)


def _failure(name: str, message: str, max_characters: int, **facts: Any) -> Answer:
    return Answer(name, answer_text({"error": message}, max_characters), failed=True, **facts)


# The conversation


@dataclass
class ToolRollout(Sampled):
    """What a backend sampled and tools answered, one entry per prompt.

    `completion_ids` holds the turns of the model and the answers between them, at most `max_new_tokens` in all;
    `tool_mask` is 1 on the model's tokens and 0 on the answers', and `logps` and `entropies` are 0.0 there. A conversation
    is `finished` if the model ended its last turn by itself; not if that turn was cut, nor if an answer no longer fitted.

    Attributes:
        completions: messages: turns of the assistant (with `tool_calls`), and tools' answers.
        turns: turns of the assistant.
        calls, failures, timeouts, unknown: calls; those that answered with an error; of those: that did not return in
            time, and of tools that are not there.
        malformed: turns that could not be taken apart.
        exhausted: whether the model's last turn calls tools, and `max_iterations` was reached.
        overflowed: whether an answer was left out because it did not fit.
        call_seconds: sum over all calls. tool_seconds: what the run waited for them (they run side by side).
    """

    completions: list[list[dict[str, Any]]] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)
    calls: list[int] = field(default_factory=list)
    failures: list[int] = field(default_factory=list)
    timeouts: list[int] = field(default_factory=list)
    unknown: list[int] = field(default_factory=list)
    malformed: list[int] = field(default_factory=list)
    exhausted: list[bool] = field(default_factory=list)
    overflowed: list[bool] = field(default_factory=list)
    call_seconds: float = 0.0
    tool_seconds: float = 0.0


def run_with_tools(
    generate: Callable[..., Sampled],
    prompts: Sequence[Any],
    prompt_ids: Sequence[Sequence[int]],
    *,
    tokenizer: Processing,
    tools: ToolSet | Sequence[ToolSet],
    params: SamplingParams,
    max_iterations: int | None = None,
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    timeout: float | None = TOOL_TIMEOUT,
    workers: int = TOOL_WORKERS,
    max_answer_characters: int = MAX_ANSWER_CHARACTERS,
    max_length: int | None = None,
    images: Sequence[Any] | None = None,
    anyone: Callable[[bool], bool] = bool,
) -> ToolRollout:
    """Sample completions in which the model may call tools, turn by turn.

    A turn that calls tools is followed by their answers and the next turn, until a turn calls none, an answer does not
    fit in what is left of `params.max_new_tokens` with at least one token after it (it is then left out, though the tool
    was called), or tools have answered `max_iterations` times. Only conversations that go on are sampled again, together.

    Args:
        generate: the backend's `generate(prompt_ids, params, *, caps=None)`.
        prompts: conversations.
        prompt_ids: their tokens, rendered with the same tools and template.
        tokenizer: with a `response_template`.
        tools: of all, or of each conversation.
        params: `max_new_tokens` counts all tokens of a completion, answers included.
        max_iterations: how often tools answer in a conversation; None: no limit.
        chat_template: instead of the tokenizer's own; see `check_tool_template`.
        timeout: seconds for each call; None: no limit, and sync tools are called in this thread, one after the other.
        workers: conversations whose tools are called at the same time.
        max_answer_characters: longer answers lose their middle.
        max_length: tokens of prompt and completion that the model can take; None: any number.
        images: what the model gets of each prompt's images, for `generate`.
        anyone: over several processes that have to call `generate` together: whether any of them passes True. Each
            process calls it once before each further turn, and where it is true `generate` too, maybe with no prompts.

    Raises:
        ValueError: a prompt is no conversation, or the chat template rewrites earlier turns.
        TooManyStuckCalls: too many tools hang.
    """
    for index, prompt in enumerate(prompts):
        if not is_messages(prompt):
            raise ValueError(
                f"The prompt of row {index} of the batch is a {type(prompt).__name__}, but tools need conversations: "
                "make it a list of messages with role and content."
            )
    count = len(prompt_ids)
    each = _for_each(tools, count)
    plain = _tokenizer(tokenizer)
    answer_ids = AnswerTokenizer(tokenizer, params.end_ids, chat_template, chat_template_kwargs)

    def sample(indices: Sequence[int], params: SamplingParams, **kwargs: Any) -> Sampled:
        ids = [[*prompt_ids[index], *rollout.completion_ids[index]] for index in indices]
        if images is not None:
            kwargs["images"] = [images[index] for index in indices]
        return generate(ids, params, **kwargs)

    rollout = ToolRollout(
        completion_ids=[[] for _ in range(count)],
        finished=[False] * count,
        tool_mask=[[] for _ in range(count)],
        completions=[[] for _ in range(count)],
        turns=[0] * count,
        calls=[0] * count,
        failures=[0] * count,
        timeouts=[0] * count,
        unknown=[0] * count,
        malformed=[0] * count,
        exhausted=[False] * count,
        overflowed=[False] * count,
    )

    def room(index: int) -> int:
        """How many tokens the conversation may still get."""
        used = len(rollout.completion_ids[index])
        left = params.max_new_tokens - used
        return left if max_length is None else min(left, max_length - len(prompt_ids[index]) - used)

    def take(indices: Sequence[int], sampled: Sampled) -> list[int]:
        """Append a turn to each conversation, and return those that call tools."""
        calling = []
        for row, index in enumerate(indices):
            ids = list(sampled.completion_ids[row])
            prefix = [*prompt_ids[index], *rollout.completion_ids[index]]
            _append(rollout, index, ids, 1, sampled, row)
            rollout.finished[index] = sampled.finished[row]
            if not ids:
                continue
            message, malformed = parse_reply(plain, ids, prefix, each[index])
            rollout.completions[index].append(message)
            rollout.turns[index] += 1
            rollout.malformed[index] += malformed
            if message.get("tool_calls") and each[index]:
                calling.append(index)
        return calling

    first = sample(range(count), params)
    if first.logps is not None:
        rollout.logps = [[] for _ in range(count)]
    if first.entropies is not None:
        rollout.entropies = [[] for _ in range(count)]
    calling = take(range(count), first)
    iteration = 0
    while True:
        if max_iterations is not None and iteration >= max_iterations:
            for index in calling:
                rollout.exhausted[index] = True
            calling = []
        going_on = []
        for index, answers in zip(
            calling, _answer_turns(rollout, calling, each, timeout, workers, max_answer_characters)
        ):
            messages = [answer.message for answer in answers]
            ids = answer_ids(messages, rollout.completion_ids[index][-1])
            if len(ids) >= room(index):
                rollout.overflowed[index], rollout.finished[index] = True, False
                continue
            rollout.completions[index].extend(messages)
            _append(rollout, index, ids, 0)
            going_on.append(index)
        if not anyone(bool(going_on)):
            return rollout
        iteration += 1
        seed = None if params.seed is None else params.seed + iteration
        again = sample(going_on, replace(params, seed=seed), caps=[room(index) for index in going_on])
        calling = take(going_on, again)


def _append(
    rollout: ToolRollout, index: int, ids: list[int], mask: int, sampled: Sampled | None = None, row: int = 0
) -> None:
    """Tokens at the end of a conversation: the model's, from `row` of `sampled`, or an answer's."""
    assert rollout.tool_mask is not None
    rollout.completion_ids[index].extend(ids)
    rollout.tool_mask[index].extend([mask] * len(ids))
    for name in ("logps", "entropies"):
        kept = getattr(rollout, name)
        if kept is not None:
            kept[index].extend([0.0] * len(ids) if sampled is None else getattr(sampled, name)[row])


def _answer_turns(
    rollout: ToolRollout,
    indices: Sequence[int],
    tools: Sequence[ToolSet],
    timeout: float | None,
    workers: int,
    max_characters: int,
) -> list[list[Answer]]:
    """The answers to the last turn of each of these conversations, counted in `rollout`."""
    if not indices:
        return []
    start = time.perf_counter()

    def answers_of(index: int) -> list[Answer]:
        calls = rollout.completions[index][-1]["tool_calls"]
        return answer_calls(calls, tools[index], timeout, max_characters)

    answered = side_by_side(answers_of, indices, 1 if timeout is None else workers)
    rollout.tool_seconds += time.perf_counter() - start
    for index, answers in zip(indices, answered):
        rollout.calls[index] += len(answers)
        rollout.failures[index] += sum(answer.failed for answer in answers)
        rollout.timeouts[index] += sum(answer.timed_out for answer in answers)
        rollout.unknown[index] += sum(answer.unknown for answer in answers)
        rollout.call_seconds += sum(answer.seconds for answer in answers)
    late = [(index, a) for index, answers in zip(indices, answered) for a in answers if a.timed_out]
    if late:
        index, answer = late[0]
        tool = tools[index][answer.name]
        logger.warning(
            f"{len(late)} tool calls did not return within {timeout:g} s, the first of {tool}, conversation {index} of the "
            "batch; they count as failed, and the run goes on without them."
        )
    return answered


def _for_each(tools: ToolSet | Sequence[ToolSet], count: int) -> list[ToolSet]:
    if isinstance(tools, Mapping):
        return [tools] * count
    if len(tools) != count:
        raise ValueError(
            f"There are {len(tools)} sets of tools for {count} prompts; pass one for each, or one for all."
        )
    return list(tools)


# Metrics


def tool_totals(rollout: ToolRollout) -> dict[str, float]:
    """What `tool_metrics` needs of one process's batch: sums, and the largest number of turns."""
    counted = ("turns", "calls", "failures", "timeouts", "unknown", "malformed", "exhausted", "overflowed")
    return {
        **{name: sum(getattr(rollout, name)) for name in counted},
        "conversations": len(rollout.completion_ids),
        "call_seconds": rollout.call_seconds,
        "max_turns": max(rollout.turns, default=0),
    }


def tool_metrics(totals: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Metrics of a batch from the `tool_totals` of all processes. NaN where there is nothing to divide by.

    `tools/call_frequency`: calls per completion. `tools/failure_frequency`: share of calls that answered with an error.
    `tools/timeout_frac`, `tools/unknown_frac`: share of calls that did not return in time, and of tools that are not
    there. `tools/latency_s`: mean seconds of a call. `tools/malformed_frac`: share of turns that could not be taken
    apart. `tools/loop_exhausted_frac`, `tools/overflow_frac`: share of completions that ended because tools had answered
    `max_iterations` times, and because an answer did not fit. `rollout/turns_mean`, `rollout/turns_max`.
    """
    total = {name: sum(one[name] for one in totals) for name in totals[0]}

    def share(of: str, among: str) -> float:
        return total[of] / total[among] if total[among] else math.nan

    return {
        "tools/call_frequency": share("calls", "conversations"),
        "tools/failure_frequency": share("failures", "calls"),
        "tools/timeout_frac": share("timeouts", "calls"),
        "tools/unknown_frac": share("unknown", "calls"),
        "tools/latency_s": share("call_seconds", "calls"),
        "tools/malformed_frac": share("malformed", "turns"),
        "tools/loop_exhausted_frac": share("exhausted", "conversations"),
        "tools/overflow_frac": share("overflowed", "conversations"),
        "rollout/turns_mean": share("turns", "conversations"),
        "rollout/turns_max": float(max(one["max_turns"] for one in totals)),
    }
