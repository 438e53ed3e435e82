"""How to sample: what every backend is told, in one record."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any


@dataclass(frozen=True)
class SamplingParams:
    """Settings of one call that samples completions.

    Attributes:
        max_new_tokens: completions are cut after so many tokens.
        temperature: the logits are divided by it; 0 takes the likeliest token (greedy).
        top_p: sample from the likeliest tokens of this total probability.
        top_k: sample from so many likeliest tokens; 0: from all.
        min_p: sample from tokens at least so likely relative to the likeliest; None: from all.
        repetition_penalty: above 1, tokens seen before, in the prompt too, are less likely.
        stop: texts that end a completion, which keeps them.
        end_ids: tokens that end a completion, which keeps them.
        seed: of a generator of this call's own; None: torch's global generator.
        extra: further settings that the backend knows by name (fields of transformers' `GenerationConfig`, or of vLLM's
            `SamplingParams`); they win over those above.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    end_ids: tuple[int, ...] = ()
    seed: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)


# What transformers and vLLM call fields of `SamplingParams`, where it is another name.
_OTHER_NAMES = {"max_tokens": "max_new_tokens", "stop_strings": "stop", "eos_token_id": "end_ids"}
_OWN = {own.name for own in fields(SamplingParams)} - {"extra"}
_MAY_BE_NONE = {"top_k", "min_p", "seed"}


def folded(params: SamplingParams) -> SamplingParams:
    """The settings with what `extra` says about fields of theirs in those fields, by this record's names or those of
    transformers and vLLM. A None says nothing where the field cannot be None."""
    own: dict[str, Any] = {"top_k": params.top_k}
    extra = {}
    for name, value in params.extra.items():
        field_name = _OTHER_NAMES.get(name, name)
        if field_name not in _OWN:
            extra[name] = value
        elif value is not None or field_name in _MAY_BE_NONE:
            own[field_name] = value
    if extra.pop("do_sample", True) is False:
        own["temperature"] = 0.0
    for name in own.keys() & {"stop", "end_ids"}:
        own[name] = (own[name],) if isinstance(own[name], str | int) else tuple(own[name])
    if own["top_k"] in (None, -1):  # vLLM says -1 for all
        own["top_k"] = 0
    return replace(params, **own, extra=extra)


def sampling_params(args: Any, end_ids: Sequence[int]) -> SamplingParams:
    """What a trainer's config says about sampling, as it stands now.

    Args:
        args: the config: `max_completion_length`, `temperature`, `top_p`, `top_k`, `min_p`, `repetition_penalty` and
            `generation_kwargs`, which win over them (`folded`).
        end_ids: tokens that end a completion.
    """
    return folded(
        SamplingParams(
            max_new_tokens=args.max_completion_length,
            temperature=args.temperature,
            top_p=args.top_p,
            top_k=args.top_k,
            min_p=args.min_p,
            repetition_penalty=args.repetition_penalty,
            end_ids=tuple(end_ids),
            extra=dict(args.generation_kwargs or {}),
        )
    )
