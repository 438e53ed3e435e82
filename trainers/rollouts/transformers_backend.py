"""Sampling completions with `model.generate`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from outspoken.trainers.rollouts.batch import pad_ids


def eos_token_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a completion: those the model declares (an end-of-turn token, say) and the tokenizer's."""
    declared = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = [] if declared is None else [declared] if isinstance(declared, int) else list(declared)
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ids:
        ids = [tokenizer.eos_token_id, *ids]
    return ids


def generation_config(args: Any, tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int]) -> GenerationConfig:
    """What the trainer's config says about sampling, as it stands now."""
    settings = {
        "max_new_tokens": args.max_completion_length,
        "do_sample": True,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": list(eos_ids),
        "temperature": args.temperature,
        "top_p": args.top_p,
        "top_k": args.top_k,
        "min_p": args.min_p,
        "repetition_penalty": args.repetition_penalty,
        "cache_implementation": args.cache_implementation,
        "disable_compile": True,
    }
    return GenerationConfig(**{**settings, **(args.generation_kwargs or {})})


def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[Sequence[int]],
    args: Any,
    eos_ids: Sequence[int],
) -> list[list[int]]:
    """Sample one completion for each prompt, all in one batch; a prompt that occurs G times gets G of them.

    The model samples in evaluation mode (no dropout, key-value cache on even where training recomputes activations) and
    is left in the mode it came in. Randomness is torch's global generator.

    Args:
        model: the unwrapped model.
        prompt_ids: token ids of each prompt.
        args: the trainer's config; the sampling settings are read from it at each call.
        eos_ids: tokens that end a completion.

    Returns:
        Token ids of each completion, up to and with the first EOS token.
    """
    device = next(model.parameters()).device
    ids, mask = pad_ids(prompt_ids, tokenizer.pad_token_id, "left", args.pad_to_multiple_of)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            sampled = model.generate(  # type: ignore[operator]
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                generation_config=generation_config(args, tokenizer, eos_ids),
            )
    finally:
        model.train(was_training)
    return [cut_after_eos(row, set(eos_ids)) for row in sampled[:, ids.size(1) :].tolist()]


def cut_after_eos(ids: list[int], eos_ids: set[int]) -> list[int]:
    """The tokens up to and with the first EOS token, or all of them if there is none."""
    for position, token in enumerate(ids):
        if token in eos_ids:
            return ids[: position + 1]
    return ids
