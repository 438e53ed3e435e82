"""Chat templates: rendering and tokenizing conversations, and finding the tokens the assistant wrote."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

from jinja2 import TemplateError
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerBase, ProcessorMixin

from outspoken.trainers.data.formats import common_prefix_length, is_conversational, prepare_multimodal_messages
from outspoken.trainers.data.training_templates import NotPatchable, marks_generation, training_template

logger = logging.getLogger(__name__)

Processing = PreTrainedTokenizerBase | ProcessorMixin

# The columns that `apply_chat_template` renders, by kind of dataset.
_CONVERSATIONAL = (
    {"messages"},
    {"prompt"},
    {"prompt", "completion"},
    {"prompt", "chosen", "rejected"},
    {"chosen", "rejected"},
    {"prompt", "completion", "label"},
)


def apply_chat_template(
    example: Mapping[str, Any],
    processing_class: Processing,
    tools: list[dict | Callable] | None = None,
    **template_kwargs: Any,
) -> dict[str, Any]:
    """Render the conversations of a row as text: `messages` as `text`, every other column under its own name.

    A prompt that ends with a user or a tool gets the generation prompt; one that ends with the assistant is left open,
    to be continued. Answers are what the rendering of prompt and answer adds to the prompt; where the template renders
    the prompt alone differently, the prompt ends where the renderings part.

    Args:
        example: a row with `messages`, `prompt`, `prompt` and `completion` (and `label`), or `chosen` and `rejected`
            with or without `prompt`. Its `chat_template_kwargs` go to the template.
        tools: functions, or JSON schemas of functions, that the template may describe to the model.
        template_kwargs: further variables of the template.

    Raises:
        KeyError: the row has other columns of these.
        ValueError: the prompt's last message is of another role.
    """
    columns = {*example} & set().union(*_CONVERSATIONAL)
    if columns not in _CONVERSATIONAL:
        raise KeyError(
            f"The row has {', '.join(map(repr, sorted(columns))) or 'no messages'}, which is no kind of dataset; it "
            "needs 'messages', 'prompt' (with 'completion', or 'chosen' and 'rejected'), or 'chosen' and 'rejected'."
        )
    # Llama's template renders an introduction to no tools for an empty list.
    kwargs = {"tools": tools or None, **(example.get("chat_template_kwargs") or {}), **template_kwargs}

    def render(messages: Any, **more: Any) -> str:
        return str(processing_class.apply_chat_template(messages, tokenize=False, **{**kwargs, **more}))

    if "messages" in example:
        return {"text": render(example["messages"])}
    answers = [column for column in ("chosen", "rejected", "completion") if column in example]
    output: dict[str, Any] = {}
    if "prompt" in example:
        role = example["prompt"][-1]["role"]
        if role not in ("user", "tool", "assistant"):
            raise ValueError(
                f"The prompt's last message has the role {role!r}; end prompts with a message of the user, a tool or "
                "the assistant."
            )
        opened = role == "assistant"
        prompt = render(example["prompt"], add_generation_prompt=not opened, continue_final_message=opened)
        rendered = [render([*example["prompt"], *example[answer]]) for answer in answers]
        # Templates that begin the reply for the model (`<think>`) need not do so where the reply is known.
        for text in rendered:
            prompt = prompt[: common_prefix_length(prompt, text)]
        output = {"prompt": prompt, **{answer: text[len(prompt) :] for answer, text in zip(answers, rendered)}}
    else:
        output = {answer: render(example[answer]) for answer in answers}
    if "label" in example:
        output["label"] = example["label"]
    return output


def maybe_apply_chat_template(
    example: dict[str, Any],
    processing_class: Processing,
    tools: list[dict | Callable] | None = None,
    **template_kwargs: Any,
) -> dict[str, Any]:
    """`apply_chat_template` for a row with conversations; other rows as they are."""
    if is_conversational(example):
        return apply_chat_template(example, processing_class, tools, **template_kwargs)
    return example


def default_template(processing_class: Processing) -> str | None:
    """The chat template that is used unless another is asked for: the only one, or the one called "default"."""
    template = processing_class.chat_template
    return template.get("default") if isinstance(template, dict) else template


def supports_tool_calling(processing_class: Processing) -> bool:
    """Whether the chat template renders all of a tool call: its name, its arguments, and the tool's answer."""
    if default_template(processing_class) is None:
        return False
    name, argument, value, answer = "probe_name_7c1", "probe_argument_7c2", "probe_value_7c3", "probe_answer_7c4"
    # Arguments are an object; some templates (DeepSeek-V3) can only put them together from text.
    for arguments in ({argument: value}, f'{{"{argument}": "{value}"}}'):
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        messages: list[dict[str, Any]] = [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "name": name, "content": answer},
        ]
        if isinstance(processing_class, ProcessorMixin):
            messages = prepare_multimodal_messages(messages)
        try:
            text = str(processing_class.apply_chat_template(messages, tokenize=False))
        except TemplateError:  # roles or contents of this kind are refused
            return False
        except TypeError:
            continue
        return all(part in text for part in (name, argument, value, answer))
    return False


def is_prefix_preserving(processing_class: Processing) -> bool:
    """Whether a tool's answer leaves the rendering of the call before it as it was, so that it can be appended."""
    arguments: Any
    for arguments in ({}, "{}"):
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        messages: list[dict[str, Any]] = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "name": "f", "content": "b"},
        ]
        if isinstance(processing_class, ProcessorMixin):
            messages = prepare_multimodal_messages(messages)
        try:
            before = processing_class.apply_chat_template(messages[:2], tokenize=False)
            after = processing_class.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except TypeError:  # arguments as text only
            continue
        return str(after).startswith(str(before))
    return False


def get_training_chat_template(
    processing_class: Processing | None = None, tokenizer: PreTrainedTokenizerBase | None = None
) -> str | None:
    """The variant of the chat template for training (see `training_template`), or None if the template is one itself.

    It is one itself if it has `{% generation %}` marks, and a tool's answer does not change what is before it.

    Args:
        processing_class: a tokenizer or processor.
        tokenizer: another name for it.

    Raises:
        ValueError: there is no template, or it has no such variant.
    """
    processing_class = processing_class if processing_class is not None else tokenizer
    if processing_class is None:
        raise TypeError("`processing_class` is missing; pass a tokenizer or processor.")
    template = default_template(processing_class)
    if template is None:
        raise ValueError("The tokenizer has no chat template; set one, or use a model that was trained for chat.")
    if marks_generation(template) and (
        not supports_tool_calling(processing_class) or is_prefix_preserving(processing_class)
    ):
        return None
    return training_template(template, _special_tokens(processing_class))


def template_with_marks(processing_class: Processing) -> str | None:
    """The chat template if it marks the assistant's words, else its training variant; None if there is neither."""
    template = default_template(processing_class)
    if template is None or marks_generation(template):
        return template
    try:
        return training_template(template, _special_tokens(processing_class))
    except NotPatchable:
        return None


def _special_tokens(processing_class: Any) -> dict[str, str]:
    tokenizer = processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class
    return {name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}


def tokenize_chat(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], **template_kwargs: Any
) -> list[int]:
    """Token ids of a conversation rendered with the tokenizer's chat template.

    Args:
        template_kwargs: `tools`, `add_generation_prompt`, and whatever else the template understands.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            "The dataset is conversational, but the tokenizer has no chat template; set `chat_template_path`, or use a "
            "model that was trained for chat."
        )
    encoded: Any = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **template_kwargs)
    return encoded["input_ids"]


def tokenize_chat_with_assistant_mask(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], **template_kwargs: Any
) -> tuple[list[int], list[int]]:
    """Token ids of a conversation, and 1 for each token that the assistant wrote, its end-of-turn token included.

    The chat template's `{% generation %}` markers decide, or those of its training variant. Without either, an
    assistant's turn is what rendering the conversation up to it adds to the generation prompt before it. That needs a
    template under which a longer conversation only appends to a shorter one.

    Raises:
        ValueError: the template has no markers, no variant with them, and rewrites earlier turns; or the tokenizer
            cannot tell which characters a token stands for.
    """
    encoded: Any
    text: Any
    if not tokenizer.is_fast:
        raise ValueError(
            f"`assistant_only_loss=True` needs a fast tokenizer, which tells the characters that a token stands for, "
            f"and the {type(tokenizer).__name__} is slow; pass another `processing_class`, or set it to False."
        )
    template = template_with_marks(tokenizer)
    if template is not None:
        encoded = tokenizer.apply_chat_template(
            messages,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            **{"chat_template": template, **template_kwargs},
        )
        return encoded["input_ids"], encoded["assistant_masks"]

    ids = tokenize_chat(tokenizer, messages, **template_kwargs)
    text = tokenizer.apply_chat_template(messages, tokenize=False, **template_kwargs)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    if encoded["input_ids"] != ids:
        raise ValueError(
            "The rendered conversation tokenizes differently than through the chat template, so the assistant's tokens "
            "cannot be located; pass a template with {% generation %} markers as `chat_template_path`."
        )
    mask = [0] * len(ids)
    for start, end in assistant_spans(tokenizer, messages, text, **template_kwargs):
        for position, (token_start, token_end) in enumerate(encoded["offset_mapping"]):
            if token_start < end and token_end > start:
                mask[position] = 1
    return ids, mask


def assistant_spans(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], text: str, **template_kwargs: Any
) -> list[tuple[int, int]]:
    """The character spans of `text`, the rendered conversation, that the assistant wrote, by comparing renderings.

    Whitespace after the end-of-turn token belongs to the template, not to the assistant: generation stops before it.
    A template may close the conversation with an end-of-sequence token (Phi-3); the last turn then ends in it.
    """

    def render(turns: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        kwargs: Any = {**template_kwargs, "add_generation_prompt": add_generation_prompt}
        return str(tokenizer.apply_chat_template(turns, tokenize=False, **kwargs))

    eos = tokenizer.eos_token or ""
    spans = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        try:
            before, after = render(messages[:turn], True), render(messages[: turn + 1], False)
        except (TemplateError, IndexError, TypeError, ValueError) as error:
            raise ValueError(
                f"The chat template cannot render the conversation up to message {turn}, so the assistant's tokens "
                "cannot be located; pass a template with {% generation %} markers as `chat_template_path`."
            ) from error
        if not text.startswith(after) and text.startswith(after.removesuffix(eos)):
            after = after.removesuffix(eos)
        if not (after.startswith(before) and text.startswith(after)):
            raise ValueError(
                f"The chat template renders message {turn} differently when the conversation goes on, so the "
                "assistant's tokens cannot be located; pass a template with {% generation %} markers as "
                "`chat_template_path`."
            )
        spans.append((len(before), len(before) + len(after[len(before) :].rstrip())))
    return spans


def trains_to_stop(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether an assistant's turn, as masked for the loss, ends in an end-of-turn token (one of the added tokens).

    Some templates count that token to the next message; a model trained with them never learns to stop.
    """
    probe = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    try:
        ids, mask = tokenize_chat_with_assistant_mask(tokenizer, probe)
    except (TemplateError, TypeError, ValueError):
        return False
    added = set(tokenizer.get_added_vocab().values())
    written = [
        token for token, by_assistant in zip(ids, mask) if by_assistant and str(tokenizer.decode([token])).strip()
    ]
    return bool(written) and written[-1] in added


def clone_chat_template(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    source_tokenizer_path: str,
    resize_to_multiple_of: int | None = 64,
) -> tuple[Any, PreTrainedTokenizerBase, list[int]]:
    """Give a model and its tokenizer the chat template, special tokens and EOS token of another tokenizer, in place.

    The embeddings grow to the new vocabulary, rounded up to `resize_to_multiple_of` (None: not rounded); the tokenizer
    gets placeholder tokens for the rounding, so that both have the same size.

    Args:
        model: a `PreTrainedModel` or `PeftModel`.
        source_tokenizer_path: path or hub name of the tokenizer to take them from.

    Returns:
        The model, the tokenizer, and the ids of the tokens that are new.
    """
    new = copy_chat_template(tokenizer, source_tokenizer_path)
    return model, tokenizer, fit_embeddings(model, tokenizer, new, resize_to_multiple_of)


def copy_chat_template(tokenizer: PreTrainedTokenizerBase, source: str) -> list[str]:
    """Give a tokenizer the chat template, special tokens and EOS token of another one; return the new tokens."""
    other = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = other.get_chat_template()
    vocabulary = tokenizer.get_vocab()
    added = [token for token in other.added_tokens_decoder.values() if token.content not in vocabulary]
    tokenizer.add_tokens(added)
    tokenizer.eos_token = other.eos_token
    return [token.content for token in added]


def fit_embeddings(
    model: Any, tokenizer: PreTrainedTokenizerBase, new: list[str], multiple_of: int | None = 64
) -> list[int]:
    """Make a model's embeddings as many as its tokenizer's tokens after `new` ones came, and its EOS token the same.

    Returns:
        The ids of the new tokens, placeholders for the rounding to `multiple_of` included.
    """
    model.config.get_text_config().eos_token_id = tokenizer.eos_token_id
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.resize_token_embeddings(len(tokenizer.get_vocab()), pad_to_multiple_of=multiple_of)
    names = list(new)
    embeddings: Any = model.get_input_embeddings()
    size = embeddings.weight.shape[0]
    number = 0
    while len(tokenizer.get_vocab()) < size:
        name = f"<extra_id_{number}>"
        if tokenizer.add_tokens(AddedToken(name)):
            names.append(name)
        number += 1
    return [tokenizer.get_vocab()[name] for name in names]


def set_chat_template(tokenizer: PreTrainedTokenizerBase, path: str) -> list[str] | None:
    """Set a tokenizer's chat template from a Jinja file (`.jinja`, `.j2`), or copy it from another tokenizer.

    Returns:
        The tokens that copying added, which `fit_embeddings` makes room for in the model; None for a file.
    """
    if not path.endswith((".jinja", ".j2")):
        return copy_chat_template(tokenizer, path)
    try:
        with open(path, encoding="utf-8") as file:
            tokenizer.chat_template = file.read()
    except OSError as error:
        raise ValueError(f"`chat_template_path` is {path!r}, which cannot be read ({error.strerror}).") from error
    return None
