"""Linear layers of a model on a CPU with their weights laid out for the matrix products of sampling.

A step of sampling multiplies a handful of rows with every weight of the model, and the plain product lays each weight
out anew, every time. oneDNN can lay it out once: steps of 4 to 64 rows then take about half as long.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

# Laid out for this many rows, a weight also suits fewer and more.
ROWS = 16
# Smaller weights stay in the cache, where laying them out saves nothing.
MIN_WEIGHT = 2**16


@contextlib.contextmanager
def packed_linears(model: nn.Module) -> Iterator[None]:
    """Within, the model's linear layers on the CPU multiply with copies of their weights, made on entry.

    The results are the same but for rounding. Not for training: the copies neither follow the weights nor carry a
    gradient. Layers that something else already changed (sharded, quantised, hooked into) stay as they are, and so do
    all under autocast, which casts them, and where torch was built without oneDNN.
    """
    changed = []
    if _available() and not torch.is_autocast_enabled("cpu"):
        for module in model.modules():
            weight: Any = getattr(module, "weight", None)
            if type(module) is nn.Linear and "forward" not in vars(module) and _suits(weight):
                packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)
                module.forward = functools.partial(_forward, module, packed)  # type: ignore[method-assign]
                changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def _suits(weight: Any) -> bool:
    return (
        type(weight) in (nn.Parameter, Tensor)
        and weight.device.type == "cpu"
        and weight.dtype is torch.float32
        and weight.dim() == 2
        and weight.numel() >= MIN_WEIGHT
        and weight.is_contiguous()
    )


def _forward(module: nn.Linear, packed: Tensor, states: Tensor) -> Tensor:
    if states.dtype is not torch.float32 or states.numel() == 0:
        return nn.functional.linear(states, module.weight, module.bias)
    return torch.ops.mkldnn._linear_pointwise(states, packed, module.bias, "none", [], "")


@functools.cache
def _available() -> bool:
    """Whether torch has the two operations, which it uses for compiled models, and they do what is expected here."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):  # type: ignore[attr-defined]
        return False
    try:
        with torch.no_grad():
            states, weight, bias = torch.ones(2, 1, 32), torch.arange(64 * 32.0).view(64, 32), torch.ones(64)
            packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
            found = torch.ops.mkldnn._linear_pointwise(states, packed, bias, "none", [], "")
        return torch.allclose(found, nn.functional.linear(states, weight, bias))
    except (AttributeError, RuntimeError):
        return False
