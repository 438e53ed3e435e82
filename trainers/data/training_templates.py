"""Chat templates for training: marks around what the assistant writes, and no turn rewritten when more follows.

A template made for inference says neither which tokens the model wrote nor, in some families, what it wrote: reasoning
of earlier turns is dropped. `training_template` edits a template's own source, whatever family it is of:

1. The loop over the messages is found by rendering, and its body's output captured, so that each turn is one text.
2. Conditions that depend on what comes after a message are found by rendering with and without it, and fixed to what
   they are while the message is the last: every turn then stays as the model wrote it.
3. A turn of the assistant is cut where the generation prompt ends and behind its end-of-turn token, and the part
   between is put into `{% generation %}`.

The result is tried on conversations of all kinds before it is returned.
"""

import functools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from outspoken.trainers.data.formats import common_prefix_length

# What a template may do with a conversation that it was not written for.
RENDERING_ERRORS = (jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError)

# Where a tool's answer stands within the assistant's turn: Gemma 4. The first token hands over to the tool, so the
# model writes it.
_EMBEDDED_ANSWERS = (("<|tool_response>", "<tool_response|>"),)

_NAME = "look_up"  # of the tool in the conversations below

Edit = tuple[int, int, str]  # from, to, and what comes there
Messages = list[dict[str, Any]]


def marks_generation(template: str) -> bool:
    """Whether a template marks the assistant's words with `{% generation %}`."""
    return re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", template) is not None


def training_template(template: str, special_tokens: Mapping[str, str]) -> str:
    """The training variant of a template.

    It has `{% generation %}` marks around what the assistant writes, from the end of the generation prompt to its
    end-of-turn token (marks that the template has stay as they are), and renders every turn as if it were the last.
    Otherwise it renders what the template does, except that: reasoning within a content stays where the template cuts
    it off; the arguments of tool calls may be objects where the template takes only text; and an end-of-turn token that
    is the beginning of the next message (GLM) closes the last turn, too.

    Args:
        special_tokens: the tokenizer's, by name: `bos_token`, `eos_token` ...

    Raises:
        NotPatchable: there is none, in one sentence.
    """
    result = _training_template(template, tuple(sorted(special_tokens.items())))
    if isinstance(result, NotPatchable):
        raise result
    return result


@functools.lru_cache(maxsize=32)
def _training_template(template: str, special_tokens: tuple[tuple[str, str], ...]) -> "str | NotPatchable":
    try:
        return _Patch(template, dict(special_tokens)).result()
    except NotPatchable as error:
        return error
    except RENDERING_ERRORS as error:
        return NotPatchable(f"it fails on a conversation ({_first_line(error)})")


class NotPatchable(ValueError):
    """A template that cannot be made one for training."""

    def __init__(self, reason: str):
        super().__init__(
            f"The chat template cannot be made one for training by itself, because {reason}; write one with "
            "{% generation %} around what the assistant writes, and pass it as `chat_template_path`."
        )


# --- conversations to try a template on -------------------------------------------------------------------------------


def _content(text: str, blocks: bool) -> Any:
    return [{"type": "text", "text": text}] if blocks else text


def _user(text: str, blocks: bool) -> dict[str, Any]:
    return {"role": "user", "content": _content(text, blocks)}


def _tool(text: str, blocks: bool) -> dict[str, Any]:
    return {"role": "tool", "name": _NAME, "content": _content(text, blocks)}


def _assistant(
    text: str, blocks: bool, reasoning: str | None = None, calls: Sequence[tuple[str, Any]] = ()
) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": _content(text, blocks)}
    if reasoning is not None:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = [
            {"type": "function", "function": {"name": name, "arguments": arguments}} for name, arguments in calls
        ]
    return message


def probes(blocks: bool = False, arguments_as_text: bool = False) -> dict[str, Messages]:
    """Conversations of all kinds; what the assistant writes contains "Written", what others write "Given".

    Args:
        blocks: contents are lists of blocks instead of text.
        arguments_as_text: the arguments of tool calls are JSON text instead of objects.
    """
    arguments: Any = {"WrittenArgument": "WrittenValue"}
    call = [(_NAME, json.dumps(arguments) if arguments_as_text else arguments)]
    ask, ask_again = _user("Given question", blocks), _user("Given more", blocks)
    answer, answer_again = _assistant("Written answer", blocks), _assistant("Written too", blocks)
    calling, answering = _assistant("", blocks, calls=call), _tool("Given result", blocks)
    thinking = _assistant("Written answer", blocks, reasoning="Written thought")
    thinking_again = _assistant("Written too", blocks, reasoning="Written thought")
    thinking_aloud = _assistant("<think>\nWritten thought\n</think>\n\nWritten answer", blocks)
    thinking_calling = _assistant("", blocks, reasoning="Written thought", calls=call)
    return {
        "single": [ask, answer],
        "multi": [ask, answer, ask_again, answer_again],
        "system": [{"role": "system", "content": _content("Given rule", blocks)}, ask, answer],
        "reasoning": [ask, thinking],
        "reasoning, multi": [ask, thinking, ask_again, thinking_again],
        "reasoning, some": [ask, thinking, ask_again, answer_again],
        "inline": [ask, thinking_aloud],
        "inline, multi": [ask, thinking_aloud, ask_again, answer_again],
        "call": [ask, calling],
        "call with words": [ask, _assistant("Written words", blocks, calls=call), answering, answer],
        "tool": [ask, calling, answering, answer],
        "tool, multi": [ask, calling, answering, answer, ask_again, answer_again],
        "tool, reasoning": [ask, thinking_calling, answering, thinking],
        "tool, reasoning, multi": [ask, thinking_calling, answering, thinking, ask_again, thinking_again],
    }


class _Renderer:
    """Renders conversations with a template, without a tokenizer."""

    def __init__(self, special: Mapping[str, str]):
        self.special = dict(special)

    def __call__(self, template: str, messages: Messages, **kwargs: Any) -> str:
        rendered: Any = render_jinja_template([messages], chat_template=template, **{**self.special, **kwargs})
        return rendered[0][0]

    def marked(self, template: str, messages: Messages, **kwargs: Any) -> tuple[str, list[tuple[int, int]]]:
        """The text, and from where to where the marks go."""
        rendered: Any = render_jinja_template(
            [messages], chat_template=template, return_assistant_tokens_mask=True, **{**self.special, **kwargs}
        )
        return rendered[0][0], rendered[1][0]


# --- a template's source ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tag:
    """A `{% name inner %}` or `{{ inner }}` (without name), and where in the source it stands."""

    name: str
    inner: str
    start: int
    inner_start: int
    stop: int
    opening: str
    closing: str

    def replaced(self, inner: str) -> Edit:
        return self.inner_start, self.inner_start + len(self.inner), inner


def _tokens(source: str) -> Iterator[tuple[str, str, int]]:
    """Jinja's tokens of a source: kind, text, and where it stands."""
    position = 0
    for _, kind, text in jinja2.Environment(trim_blocks=True, lstrip_blocks=True).lexer.tokeniter(source, None):
        position = source.index(text, position)  # whitespace that a tag swallows is no token
        yield kind, text, position
        position += len(text)


def _tags(source: str) -> list[_Tag]:
    found = []
    start, inner_start, opening, name, waiting = 0, 0, "", "", False
    for kind, text, position in _tokens(source):
        if kind in ("block_begin", "variable_begin"):
            start, inner_start, opening, name = position, position + len(text), text, ""
            waiting = kind == "block_begin"
        elif kind == "name" and waiting:
            name, inner_start, waiting = text, position + len(text), False
        elif kind in ("block_end", "variable_end"):
            closing = text.rstrip()
            found.append(
                _Tag(name, source[inner_start:position], start, inner_start, position + len(closing), opening, closing)
            )
    return found


def _edited(source: str, edits: Iterable[Edit]) -> str:
    for start, stop, text in sorted(edits, reverse=True):
        source = source[:start] + text + source[stop:]
    return source


@dataclass(frozen=True)
class _Loop:
    """A loop at the top of a template that goes through the messages."""

    begin: _Tag
    end: _Tag
    variable: str
    inside: list[_Tag]

    def captured(self, ending: str) -> list[Edit]:
        """The edits that put the output of each round into `outspoken_turn`, and `ending` behind."""
        return [
            # The whitespace that the loop's own tags would swallow is swallowed by the new ones.
            (self.begin.stop, self.begin.stop, "{% set outspoken_turn " + self.begin.closing),
            (self.end.start, self.end.start, self.end.opening + " endset %}" + ending),
        ]


def _message_loops(tags: list[_Tag]) -> list[_Loop]:
    loops, stack = [], []
    for index, tag in enumerate(tags):
        if tag.name in ("for", "macro"):
            stack.append((tag, index))
        elif tag.name in ("endfor", "endmacro") and stack:
            begin, first = stack.pop()
            match = re.match(r"\s*(\w+)\s+in\s+(.*messages.*)", begin.inner, flags=re.DOTALL)
            if not stack and begin.name == "for" and match:
                loops.append(_Loop(begin, tag, match[1], tags[first + 1 : index]))
    return loops


def boolean_leaves(condition: str) -> list[tuple[int, int]]:
    """Where the parts of a condition stand that `and`, `or`, `not` and parentheses connect."""
    prefix = "{% if "
    tokens = [
        (text, position - len(prefix))
        for kind, text, position in _tokens(prefix + condition + " %}")
        if kind not in ("block_begin", "block_end", "whitespace")
    ][1:]

    def leaves(part: list[tuple[str, int]]) -> list[tuple[int, int]]:
        operands: list[list[tuple[str, int]]] = [[]]
        depth = 0
        for text, position in part:
            depth += (text in ("(", "[", "{")) - (text in (")", "]", "}"))
            if depth == 0 and text == "if":  # one value or another, which is no connection
                return [(part[0][1], part[-1][1] + len(part[-1][0]))]
            if depth == 0 and text in ("and", "or"):
                operands.append([])
            else:
                operands[-1].append((text, position))
        if len(operands) > 1:
            return [leaf for operand in operands for leaf in leaves(operand)]
        (operand,) = operands
        if operand and operand[0][0] == "not":
            return leaves(operand[1:])
        if operand and operand[0][0] == "(" and _closes(operand) == len(operand) - 1:
            return leaves(operand[1:-1])
        return [(operand[0][1], operand[-1][1] + len(operand[-1][0]))] if operand else []

    return leaves(tokens)


def _closes(tokens: list[tuple[str, int]]) -> int:
    """The index of the parenthesis that closes the first one."""
    depth = 0
    for index, (text, _) in enumerate(tokens):
        depth += (text == "(") - (text == ")")
        if depth == 0:
            return index
    return len(tokens)


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


# --- the patch --------------------------------------------------------------------------------------------------------


class _Patch:
    """The edits that make a template one for training, found one kind after the other."""

    def __init__(self, template: str, special: dict[str, str]):
        # As Jinja reads it.
        self.source = re.sub(r"\r\n|\r", "\n", template).removesuffix("\n")
        self.marked = marks_generation(template)
        self.render = _Renderer(special)
        self.edits: list[Edit] = []
        self.tags = _tags(self.source)

    def result(self) -> str:
        blocks = self._content_format()
        self._take_arguments_as_objects(blocks)
        self.loop = self._find_loop(blocks)
        self.probes = {
            name: messages
            for name, messages in probes(blocks, self.arguments_as_text).items()
            if self._renders(messages)
        }
        self.continuations = self._continuations()
        # What is behind the loop closes the text.
        self.tail = "" if self.marked else self._turns(self.probes["single"])[1]
        kept = not self.marked and self._keep_reasoning()
        frozen = self._freeze_turns()
        if not self.marked:
            self.edits += self._marks()
        patched = _edited(self.source, self.edits)
        self._check(patched, frozen, kept)
        return patched

    def _text(self, messages: Messages, edits: Iterable[Edit] = (), **kwargs: Any) -> str:
        return self.render(_edited(self.source, [*self.edits, *edits]), messages, **kwargs)

    def _turns(self, messages: Messages, edits: Iterable[Edit] = (), **kwargs: Any) -> tuple[list[str], str]:
        """What each round of the loop adds to the text, and what comes behind the loop."""
        ending = "{% generation %}{{ outspoken_turn }}{% endgeneration %}"
        source = _edited(self.source, [*self.edits, *edits, *self.loop.captured(ending)])
        text, spans = self.render.marked(source, messages, **kwargs)
        return [text[start:stop] for start, stop in spans], text[spans[-1][1] if spans else 0 :]

    def _renders(self, messages: Messages, **kwargs: Any) -> bool:
        """Whether the template renders a conversation, with what was said last and all tool calls."""
        try:
            text = self._text(messages, **kwargs)
        except RENDERING_ERRORS:
            return False
        said = [*_words(messages[-1]["content"]), *(w for m in messages for w in _words(m.get("tool_calls")))]
        return all(word in text for word in said if "thought" not in word)

    # --- what the template expects

    def _content_format(self) -> bool:
        """Whether the template wants contents as lists of blocks rather than text."""
        error: Exception | None = None
        for blocks in (False, True):
            try:
                text = self._text(probes(blocks)["single"])
            except RENDERING_ERRORS as problem:
                error = error or problem
                continue
            if "Given question" in text and "Written answer" in text:
                return blocks
        why = "" if error is None else f" ({_first_line(error)})"
        raise NotPatchable(f"it does not render a question and its answer{why}") from error

    def _take_arguments_as_objects(self, blocks: bool) -> None:
        """Where a template puts arguments of tool calls together as text, also let it take objects (DeepSeek)."""
        self.arguments_as_text = False
        try:
            self._text(probes(blocks)["call"])
        except TypeError:
            edits = []
            for tag in self.tags:
                inner = re.sub(
                    r"\b\w+\[(['\"])function\1\]\[(['\"])arguments\2\](?!\s*\|)",
                    lambda match: f"({match[0]} if {match[0]} is string else {match[0]} | tojson)",
                    tag.inner,
                )
                if inner != tag.inner and not tag.name:
                    edits.append(tag.replaced(inner))
            try:
                self._text(probes(blocks)["call"], edits)
                self.edits += edits
            except RENDERING_ERRORS:
                self.arguments_as_text = True
        except RENDERING_ERRORS:
            pass

    def _find_loop(self, blocks: bool) -> _Loop:
        """The loop that renders the messages: the first in whose output an answer stands."""
        messages = probes(blocks)["single"]
        for loop in _message_loops(self.tags):
            self.loop = loop
            try:
                if self.marked:
                    log = self._trace(messages)
                    if len(log) >= len(messages) and loop.inside and "generation" in [t.name for t in loop.inside]:
                        return loop
                elif "Written answer" in (self._turns(messages)[0] or [""])[-1]:
                    return loop
            except RENDERING_ERRORS:
                continue
        raise NotPatchable("no loop over the messages was found in it")

    # --- what depends on what comes after

    def _keep_reasoning(self) -> bool:
        """Where a content's reasoning is cut off even in the last turn, keep it; returns whether that was needed."""
        messages = self.probes.get("inline")
        if messages is None or "Written thought" in self._text(messages):
            return False
        for tag in self.loop.inside:
            if tag.name in ("if", "elif") and "</think>" in tag.inner:
                edit = tag.replaced(" false ")
                if "Written thought" in self._text(messages, [edit]):
                    self.edits.append(edit)
                    return True
        return False

    def _freeze_turns(self) -> bool:
        """Fix conditions so that no turn is rendered differently once more follows; returns whether there were any."""

        def rewritten(edits: Sequence[Edit]) -> int:
            return len(self._rewritten(_edited(self.source, [*self.edits, *edits])))

        edits: list[Edit] = []
        left, improving = rewritten(edits), True
        while left and improving:  # what one condition hides from view may depend on the position, too
            improving = False
            for leaf in self._position_dependent(edits):
                better = rewritten([*edits, leaf])
                if better < left:
                    edits.append(leaf)
                    left, improving = better, True
        self.edits += edits
        return bool(edits)

    def _continuations(self) -> list[tuple[str, Messages, Messages, bool]]:
        """Conversations up to a turn of the assistant, and further; with the name of the probe they are from, and
        whether a generation prompt belongs behind the longer one."""
        found = []
        for name, messages in self.probes.items():
            for turn, message in enumerate(messages):
                if message["role"] == "assistant":
                    for stop in range(turn + 2, len(messages) + 1):
                        before, after = messages[: turn + 1], messages[:stop]
                        prompted = after[-1]["role"] != "assistant"
                        if self._renders(before) and self._renders(after, add_generation_prompt=prompted):
                            found.append((name, before, after, prompted))
        return found

    def _rewritten(self, template: str) -> list[str]:
        """The probes in which a turn of the assistant is rendered differently when the conversation goes on."""
        return [
            name
            for name, before, after, prompted in self.continuations
            if not self.render(template, after, add_generation_prompt=prompted).startswith(
                self.render(template, before).removesuffix(self.tail)
            )
        ]

    def _trace(
        self,
        messages: Messages,
        leaves: Sequence[tuple[_Tag, int, int]] = (),
        edits: Iterable[Edit] = (),
        **kwargs: Any,
    ) -> list[dict[int, list[str]]]:
        """What the leaves of conditions were in each round of the loop: a list of 0 and 1 for each that was asked."""
        before = (
            "{% macro outspoken_leaf(state, number, value) %}"
            "{% set state.log = state.log ~ number ~ (':1 ' if value else ':0 ') %}{{ '1' if value else '' }}{% endmacro %}"
            "{% set outspoken_state = namespace(log='') %}"
        )
        edits = [
            *edits,
            (0, 0, before),
            (
                self.loop.begin.stop,
                self.loop.begin.stop,
                "{% set outspoken_state.log = outspoken_state.log ~ '/' " + self.loop.begin.closing,
            ),
            (len(self.source), len(self.source), "{{ '\ue000' ~ outspoken_state.log }}"),
        ]
        for number, (tag, start, stop) in enumerate(leaves):
            where = tag.inner_start + start, tag.inner_start + stop
            edits.append((*where, f"outspoken_leaf(outspoken_state, {number}, ({tag.inner[start:stop]}))"))
        rounds = self._text(messages, edits, **kwargs).rpartition("\ue000")[2].split("/")[1:]
        found: list[dict[int, list[str]]] = []
        for entries in rounds:
            values: dict[int, list[str]] = {}
            for entry in entries.split():
                number_text, value = entry.split(":")
                values.setdefault(int(number_text), []).append(value)
            found.append(values)
        return found

    def _position_dependent(self, done: Sequence[Edit]) -> list[Edit]:
        """Edits that fix each part of a condition that changes as messages follow to what it is while none does."""
        edited = [(start, stop) for start, stop, _ in (*self.edits, *done)]
        leaves = [
            (tag, *leaf)
            for tag in self.loop.inside
            if tag.name in ("if", "elif")
            for leaf in boolean_leaves(tag.inner)
            if not any(
                tag.inner_start + leaf[0] < stop and start < tag.inner_start + leaf[1] for start, stop in edited
            )
        ]
        changing: set[int] = set()
        when_last: dict[int, set[str]] = {}
        elsewhere: set[int] = set()  # leaves that count for messages of others, too
        for _, before, after, prompted in self.continuations:
            short = self._trace(before, leaves, done)
            long = self._trace(after, leaves, done, add_generation_prompt=prompted)
            turn = len(short) - 1
            for number, values in short[turn].items():
                when_last.setdefault(number, set()).update(values)
                if number in long[turn] and long[turn][number] != values:
                    changing.add(number)
            skipped = len(before) - len(short)
            for message, values_of in zip(after[skipped:], long):
                if message["role"] != "assistant":
                    elsewhere.update(values_of)
        edits = []
        role = f"{self.loop.variable}['role']"
        for number in sorted(changing):
            tag, start, stop = leaves[number]
            if len(when_last[number]) > 1:
                continue
            value = when_last[number] == {"1"}
            text = "true" if value else "false"
            if number in elsewhere:
                leaf = tag.inner[start:stop]
                text = f"({role} == 'assistant' or ({leaf}))" if value else f"({role} != 'assistant' and ({leaf}))"
            edits.append((tag.inner_start + start, tag.inner_start + stop, text))
        return edits

    # --- the marks

    def _marks(self) -> list[Edit]:
        """The edits that put what the assistant writes into `{% generation %}`."""
        heads: dict[str, None] = {}
        for messages in self.probes.values():
            for turn, message in enumerate(messages):
                if message["role"] == "assistant" and self._renders(messages[:turn], add_generation_prompt=True):
                    prompt = self._generation_prompt(messages[:turn])
                    written = self._turns(messages[: turn + 1])[0][-1]
                    head = prompt[: common_prefix_length(prompt, written)]
                    if len(head) < len(prompt):  # not within a token
                        head = re.sub(r"<[^<>]*$", "", head)
                    heads.setdefault(head)
        single = self._turns(self.probes["single"])[0][-1]
        stops = self._stops() if single.rstrip().endswith("Written answer") and not self.tail else {}
        role = f"{self.loop.variable}['role']"
        ending = (
            f"{{% if {role} == 'assistant' %}}"
            f"{{% set outspoken_start = {_length_of_beginning('outspoken_turn', heads)} %}}"
            "{{ outspoken_turn[:outspoken_start] }}"
            "{% set outspoken_written = outspoken_turn[outspoken_start:] %}"
            + self._marked_turn(stops)
            + self._marked_stop(stops, role)
            + "{% else %}{{ outspoken_turn }}{% endif %}"
        )
        edits = self.loop.captured(ending)
        if self.tail and self.tail == self.render.special.get("eos_token"):
            stop = self.loop.end.stop
            edits += [
                (stop, stop, "{% set outspoken_tail " + self.loop.end.closing),
                (
                    len(self.source),
                    len(self.source),
                    "{% endset %}{% if not add_generation_prompt and messages[-1]['role'] == 'assistant' %}"
                    "{% generation %}{{ outspoken_tail }}{% endgeneration %}{% else %}{{ outspoken_tail }}{% endif %}",
                ),
            ]
        return edits

    def _generation_prompt(self, messages: Messages) -> str:
        """What asks the model to reply: the text behind the loop, or what the last round adds to it (Zephyr)."""
        behind = self._turns(messages, add_generation_prompt=True)[1]
        with_prompt, without = self._text(messages, add_generation_prompt=True), self._text(messages)
        return behind or (with_prompt.removeprefix(without) if with_prompt.startswith(without) else "")

    def _marked_turn(self, stops: dict[str, str]) -> str:
        """Jinja that writes `outspoken_written` with marks around all but the whitespace behind the last token."""
        if stops:
            last = "" if "tool" not in stops else f"{_literal(stops['tool'])} if {self.loop.variable}.tool_calls else "
            last = f"({last}{_literal(stops['user'])}) if loop.last and not add_generation_prompt else ''"
            return "{% generation %}{{ outspoken_written ~ (" + last + ") }}{% endgeneration %}"
        messages = self.probes.get("tool")
        turn = "" if messages is None else self._turns(messages)[0][1 - len(messages)]
        if "Given result" not in turn:
            return _marked_but_whitespace("outspoken_written")
        for begin, end in _EMBEDDED_ANSWERS:
            if re.search(
                f"{re.escape(begin)}(?:(?!{re.escape(end)}).)*Given result.*{re.escape(end)}", turn, re.DOTALL
            ):
                break
        else:
            raise NotPatchable("it renders a tool's answer within the assistant's turn")
        begin, end = _literal(begin), _literal(end)
        return (
            f"{{% for outspoken_piece in outspoken_written.split({end}) %}}"
            f"{{% set outspoken_own, outspoken_begin, outspoken_answer = outspoken_piece.partition({begin}) %}}"
            "{% if outspoken_own %}{% set outspoken_part = outspoken_own ~ outspoken_begin %}"
            + _marked_but_whitespace("outspoken_part")
            + "{% else %}{{ outspoken_begin }}{% endif %}"
            + f"{{{{ outspoken_answer }}}}{{{{ {end} if not loop.last else '' }}}}{{% endfor %}}"
        )

    def _stops(self) -> dict[str, str]:
        """The token that a message begins with, by its role: what the assistant has to write to end its turn."""
        stops = {}
        for name, role in (("multi", "user"), ("tool", "tool")):
            messages = self.probes.get(name, [])
            index = next((i for i, m in enumerate(messages) if i > 0 and m["role"] == role), None)
            if index is not None:
                turn = self._turns(messages[: index + 1])[0][-1]
                match = re.match(r"<[^<>\s]+>", turn)
                if match:
                    stops[role] = match[0]
        return stops if "user" in stops else {}

    def _marked_stop(self, stops: dict[str, str], role: str) -> str:
        """Jinja for the message behind the assistant's, whose first token ends the assistant's turn."""
        if not stops:
            return ""
        length = _length_of_beginning("outspoken_turn", dict.fromkeys(stops.values()))
        return (
            f"{{% elif not loop.first and loop.previtem['role'] == 'assistant' %}}{{% set outspoken_stop = {length} %}}"
            "{% generation %}{{ outspoken_turn[:outspoken_stop] }}{% endgeneration %}"
            "{{ outspoken_turn[outspoken_stop:] }}"
        )

    # --- the check

    def _check(self, patched: str, frozen: bool, kept: bool) -> None:
        """Try the result; what it renders must be what the template renders, and the marks be around the right words.

        Raises:
            NotPatchable: it is not so.
        """
        for name, messages in self.probes.items():
            try:
                text, spans = self.render.marked(patched, messages)
            except RENDERING_ERRORS as error:
                raise NotPatchable(f"its variant cannot render a conversation ({name})") from error
            marked = [False] * len(text)
            for start, stop in spans:
                marked[start:stop] = [True] * (stop - start)
            words = [(match[1] == "Written", match.span()) for match in re.finditer(r"(Written|Given)\w* ?\w+", text)]
            if any(by_assistant != own for own, span in words for by_assistant in marked[slice(*span)]):
                raise NotPatchable(f"the marks would be around the wrong words ({name})")
            called = text.find(_NAME)
            if called >= 0 and not marked[called]:
                raise NotPatchable(f"the marks would leave out a tool call ({name})")
            if (frozen and sum(m["role"] == "assistant" for m in messages) > 1) or (kept and "inline" in name):
                continue  # rendered differently on purpose
            try:
                original = self.render(self.source, messages)
            except RENDERING_ERRORS:
                continue  # only the variant takes arguments as objects
            if not re.fullmatch(re.escape(original) + r"(<[^<>\s]+>)?", text):
                raise NotPatchable(f"its variant would render a conversation differently ({name})")
        # Gemma 4 moves words beside a tool call behind the tool's answer.
        if {*self._rewritten(patched)} - {"call with words"}:
            raise NotPatchable("it renders a turn of the assistant differently once more follows")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _words(value: Any) -> list[str]:
    return re.findall(r"(?:Written|Given) ?[A-Za-z]+", json.dumps(value))


def _marked_but_whitespace(name: str) -> str:
    """Jinja that writes a variable with marks around all but the whitespace at its end."""
    return (
        f"{{% generation %}}{{{{ {name}.rstrip() }}}}{{% endgeneration %}}{{{{ {name}[{name}.rstrip() | length:] }}}}"
    )


def _length_of_beginning(name: str, beginnings: Iterable[str]) -> str:
    """Jinja for the length of the longest of some beginnings that a variable begins with, or 0."""
    cases = [
        f"{len(text)} if {name}.startswith({_literal(text)}) else "
        for text in sorted(beginnings, key=len, reverse=True)
        if text
    ]
    return "".join(cases) + "0"
