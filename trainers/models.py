"""Copies of models."""

import re
from copy import deepcopy
from typing import Any

from torch import nn

# Where the layers stand in the names of parameters, by family of architectures (Llama and its kin, GPT-2, GPT-NeoX,
# OPT); `{layer}` is the number.
LAYER_PATTERNS = ("model.layers.{layer}", "transformer.h.{layer}", "gpt_neox.layers.{layer}", "decoder.layers.{layer}")


def create_reference_model(model: nn.Module, num_shared_layers: int | None = None, pattern: str | None = None) -> Any:
    """A frozen copy of a model, in evaluation mode.

    Args:
        num_shared_layers: the copy shares the embeddings and this many of the first layers with the model instead of
            copying them. They are frozen in the model, too.
        pattern: how the layers are called in the names of the parameters, e.g. "transformer.h.{layer}"; needed only
            for architectures with another name for them than the usual ones.

    Raises:
        ValueError: DeepSpeed ZeRO-3 has split the parameters, or no layer has the number `num_shared_layers`.
    """
    from transformers.integrations import is_deepspeed_zero3_enabled

    if is_deepspeed_zero3_enabled():
        raise ValueError(
            "DeepSpeed ZeRO-3 splits the parameters over the processes, so a model cannot be copied; load the reference "
            "model with `from_pretrained`."
        )
    reference = deepcopy(model).requires_grad_(False).eval()
    if num_shared_layers is None:
        return reference

    names = [name for name, _ in model.named_parameters()]
    patterns = LAYER_PATTERNS if pattern is None else (pattern,)
    first = None  # the number of the first parameter that is not shared
    for candidate in patterns:
        layer = re.compile(rf"(^|\.){re.escape(candidate.format(layer=num_shared_layers))}\.")
        first = next((number for number, name in enumerate(names) if layer.search(name)), None)
        if first is not None:
            break
    if first is None:
        raise ValueError(
            f"No parameter belongs to layer {num_shared_layers} ({' or '.join(patterns)}); `num_shared_layers` must be "
            "below the number of layers, and `pattern` say how they are called."
        )
    for name in names[:first]:
        parameter = model.get_parameter(name)
        parameter.requires_grad = False
        reference.get_parameter(name).data = parameter.data
    return reference
