"""How to sample: what every backend is told, in one record."""

from collections.abc import Sequence
from dataclasses import dataclass, field
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


# Fields of `generation_kwargs` that are fields of `SamplingParams`, by another name or the same.
_NAMES = {
    "max_new_tokens": "max_new_tokens",
    "max_tokens": "max_new_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "seed": "seed",
}


def sampling_params(args: Any, end_ids: Sequence[int]) -> SamplingParams:
    """What a trainer's config says about sampling, as it stands now.

    Args:
        args: the config: `max_completion_length`, `temperature`, `top_p`, `top_k`, `min_p`, `repetition_penalty` and
            `generation_kwargs`, whose `stop` or `stop_strings` are texts that end a completion.
        end_ids: tokens that end a completion.
    """
    settings: dict[str, Any] = {
        "max_new_tokens": args.max_completion_length,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "top_k": args.top_k,
        "min_p": args.min_p,
        "repetition_penalty": args.repetition_penalty,
        "end_ids": tuple(end_ids),
    }
    extra = dict(args.generation_kwargs or {})
    stop: Any = extra.pop("stop", None) or extra.pop("stop_strings", None) or ()
    settings["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    if "eos_token_id" in extra:
        ids = extra.pop("eos_token_id")
        settings["end_ids"] = (ids,) if isinstance(ids, int) else tuple(ids)
    if extra.pop("do_sample", True) is False:
        extra["temperature"] = 0.0
    for name in list(extra):
        if name in _NAMES:
            settings[_NAMES[name]] = extra.pop(name)
    settings["top_k"] = max(settings["top_k"] or 0, 0)  # vLLM says -1 for all
    return SamplingParams(**settings, extra=extra)
