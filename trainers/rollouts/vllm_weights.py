"""The trained weights as vLLM wants them, and the proof that it holds them.

vLLM fuses weights (query, key and value; gate and up) and cuts them over its workers, so a digest of what it holds cannot
be compared with one of what was trained. Two things can: an order-independent digest of the tensors as they were sent and
as they arrived, and sums over what vLLM holds, which neither fusing, cutting nor transposing changes.
"""

import contextlib
import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from outspoken.trainers.sharding import plain_name, reshard, unwrapped

_CHUNK = 1 << 22  # numbers looked at at a time, so that digests and sums need little memory beside the weights
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MASK = (1 << 64) - 1


# ------------------------------------------------------------------------------------------------------------- digests


def tensor_digest(tensor: Tensor) -> int:
    """A 64-bit digest of a tensor's bits and their order, the same on every device; a few passes, no copy of the whole.

    Each number's bits are mixed with its position (multiply and shift, modulo 2^64) and the results added.
    """
    flat = tensor.detach().contiguous().reshape(-1)
    words = flat.view(torch.uint8 if flat.dtype == torch.bool else _WORDS[flat.element_size()])
    total = 0
    for start in range(0, words.numel(), _CHUNK):
        part = words[start : start + _CHUNK].to(torch.int64, copy=True)
        part += torch.arange(start + 1, start + 1 + part.numel(), device=part.device) * 0x1E3779B97F4A7C15
        for factor, shift in ((0x3F58476D1CE4E5B9, 29), (0x14D049BB133111EB, 32)):
            part ^= part >> shift
            part *= factor
        total += int((part ^ (part >> 30)).sum())
    return total & _MASK


class Checksum:
    """An order-independent digest over named tensors: the sum of theirs, modulo 2^64."""

    def __init__(self) -> None:
        self.total = 0

    def add(self, name: str, tensor: Tensor) -> None:
        text = f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|{tensor_digest(tensor)}"
        self.total += int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")

    @property
    def hex(self) -> str:
        return f"{self.total & _MASK:016x}"


class Sums(NamedTuple):
    """What fusing, cutting and transposing leave unchanged of a tensor: its sum and sum of squares, in float64."""

    total: float
    squares: float
    numbers: int
    dtype: str


def sums(tensor: Tensor) -> Sums:
    flat = tensor.detach().reshape(-1)
    if flat.device.type == "mps":  # has no float64
        flat = flat.cpu()
    total = squares = 0.0
    for start in range(0, flat.numel(), _CHUNK):
        part = flat[start : start + _CHUNK].double()
        total += float(part.sum())
        squares += float(part.square().sum())
    return Sums(total, squares, flat.numel(), str(tensor.dtype).removeprefix("torch."))


def add_sums(parts: Iterable[Sums]) -> Sums:
    """The sums of several tensors together; the dtype is the first one's."""
    parts = list(parts)
    return Sums(
        math.fsum(p.total for p in parts),
        math.fsum(p.squares for p in parts),
        sum(p.numbers for p in parts),
        parts[0].dtype,
    )


def groups_of(loaded: Mapping[str, Sequence[str]]) -> list[tuple[list[str], list[str]]]:
    """Which trained tensors went into which of vLLM's parameters, as groups that share none.

    Args:
        loaded: name of a trained tensor -> names of vLLM's parameters that it was loaded into (none: it was ignored).

    Returns:
        `(names of trained tensors, names of vLLM's parameters)` of each group.
    """
    owner: dict[str, int] = {}
    groups: dict[int, tuple[list[str], list[str]]] = {}
    for number, (name, held) in enumerate(loaded.items()):
        if not held:
            continue
        names, parameters = [name], list(dict.fromkeys(held))
        for other in sorted({owner[p] for p in parameters if p in owner}):
            more_names, more_parameters = groups.pop(other)
            names = more_names + names
            parameters = list(dict.fromkeys(more_parameters + parameters))
        groups[number] = (names, parameters)
        owner |= dict.fromkeys(parameters, number)
    return list(groups.values())


def differences(
    sent: Mapping[str, Sums], groups: Sequence[tuple[list[str], list[str]]], held: Sequence[Mapping[str, Sums]]
) -> tuple[list[str], int]:
    """Where what vLLM holds is not what was sent.

    Args:
        sent: sums of each trained tensor.
        groups: from `groups_of`.
        held: for each of vLLM's workers, sums of its (part of each) parameter.

    Returns:
        One description per group that differs, and how many groups could be compared. A group cannot where vLLM's workers
        hold some of its numbers more than once, or keep the parameter in a form that cannot be read.
    """
    found, compared = [], 0
    for names, parameters in groups:
        if any(p not in worker for p in parameters for worker in held):
            continue
        expected = add_sums(sent[name] for name in names)
        mine = [add_sums(worker[p] for p in parameters) for worker in held]
        copies = all(part.numbers == expected.numbers for part in mine)
        # Workers' parts may be padded with zeros (a vocabulary), but then by less than each worker's part.
        together = add_sums(mine)
        padding = together.numbers - expected.numbers
        vocabulary = any("embed" in p or "lm_head" in p or "wte" in p for p in parameters)
        if not copies and padding != 0 and not (vocabulary and padding > 0):
            continue
        compared += 1
        for part in mine if copies else [together]:
            same_dtype = part.dtype == expected.dtype
            tolerance = 1e-9 if same_dtype else float(torch.finfo(getattr(torch, part.dtype)).eps)
            scale = math.sqrt(expected.numbers * expected.squares)  # at least the sum of the absolute values
            if not _close(part.total, expected.total, tolerance * scale) or not _close(
                part.squares, expected.squares, 2 * tolerance * expected.squares
            ):
                found.append(
                    f"{', '.join(names[:3])}{' …' if len(names) > 3 else ''} (sum of squares {expected.squares:.9g} "
                    f"trained, {part.squares:.9g} in {', '.join(parameters[:3])})"
                )
                break
    return found, compared


def _close(a: float, b: float, tolerance: float) -> bool:
    if not (math.isfinite(a) and math.isfinite(b)):
        return str(a) == str(b)  # weights that are NaN in both places are the same weights
    return abs(a - b) <= tolerance


# ----------------------------------------------------------------------------------------------------- trained weights


def trained_weights(model: nn.Module, device: torch.device | None = None) -> Iterator[tuple[str, Tensor]]:
    """Every weight of the trained model under its name in a checkpoint, whole and with adapters merged in, one by one.

    All processes must iterate to the end: sharded weights (FSDP, ZeRO-3) are gathered on the way, a layer at a time. The
    model itself stays as it is, to the bit.

    Args:
        device: where to gather weights that were offloaded to the CPU.
    """
    inner = unwrapped(model)
    base = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    with torch.no_grad():
        # What transformers renamed or fused when it loaded the checkpoint goes back, a decoder layer at a time.
        for _, layer in groupby(_whole_weights(model, device), key=lambda item: _layer(item[0])):
            yield from _checkpoint_format(base, dict(layer)).items()


def _layer(name: str) -> str:
    """`model.layers.3` for `model.layers.3.mlp.experts.7.w1`; nothing for what is in no layer."""
    pieces = name.split(".")
    number = next((i for i, piece in enumerate(pieces) if piece.isdigit()), -1)
    return ".".join(pieces[: number + 1])


def _checkpoint_format(model: Any, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    if not hasattr(model, "config"):
        return weights
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, weights)


def _whole_weights(model: nn.Module, device: torch.device | None) -> Iterator[tuple[str, Tensor]]:
    reshard(model)
    seen: set[int] = set()
    if not any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        yield from _weights_of(unwrapped(model), "", device, seen, ())
        return
    # FSDP1: one unit at a time is whole, and its numbers are gone when the next one is. An adapter's parts may lie in
    # several units, so then all are gathered.
    adapted = any(isinstance(module, BaseTunerLayer) for module in model.modules())
    units = [model] if adapted else FullyShardedDataParallel.fsdp_modules(model)
    names = {module: plain_name(name) for name, module in model.named_modules()}
    for unit in units:
        with FullyShardedDataParallel.summon_full_params(unit, recurse=adapted, writeback=False):
            nested = tuple(u for u in units if u is not unit)
            for name, weight in _weights_of(unit, names[unit], device, seen, nested):
                yield name, weight.clone()


def _weights_of(
    module: nn.Module, path: str, device: torch.device | None, seen: set[int], stop: tuple[nn.Module, ...]
) -> Iterator[tuple[str, Tensor]]:
    """The weights below a module, by checkpoint name; nothing below the modules in `stop`."""
    name = _checkpoint_name(path)
    if isinstance(module, ModulesToSaveWrapper):
        active = module.modules_to_save[module.active_adapters[0]]
        yield from _weights_of(active, path, device, seen, stop)
        return
    if isinstance(module, TrainableTokensWrapper):
        yield from _weights_of(module.token_adapter, path, device, seen, stop)
        return
    if isinstance(module, BaseTunerLayer):
        seen.update(id(p) for p in module.get_base_layer().parameters(recurse=False))
        for key, weight in _merged(module, device).items():
            yield f"{name}.{key}" if name else key, weight
        return
    for key, parameter in module.named_parameters(recurse=False):
        if id(parameter) in seen:
            continue  # tied: sent once, as in a checkpoint
        seen.add(id(parameter))
        with _gathered([parameter]) as sharded:
            weight = _full(parameter, device)
            yield (f"{name}.{key}" if name else key), (weight.clone() if sharded else weight)
    for key, child in module.named_children():
        if not any(child is s for s in stop):
            yield from _weights_of(child, f"{path}.{key}" if path else key, device, seen, stop)


def _checkpoint_name(path: str) -> str:
    """A module's path without what peft and wrappers put into it."""
    name = plain_name(path + ".")
    for part in ("base_model.model.", "base_layer.", "modules_to_save.default.", "token_adapter."):
        name = name.replace(part, "")
    return name.removesuffix(".")


@contextlib.contextmanager
def _gathered(parameters: Sequence[nn.Parameter]) -> Iterator[bool]:
    """Parameters that ZeRO-3 spread are whole inside; whether there were any."""
    spread = [p for p in parameters if hasattr(p, "ds_id")]
    if not spread:
        yield False
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(spread):
        yield True


def _full(parameter: Tensor, device: torch.device | None) -> Tensor:
    if isinstance(parameter, DTensor):
        if device is not None and parameter.device.type == "cpu" and device.type != "cpu":
            parameter = parameter.to(device)  # offloaded; the processes gather over their accelerators
        return parameter.full_tensor()  # type: ignore[attr-defined]
    return parameter.detach()


def _merged(layer: Any, device: torch.device | None) -> dict[str, Tensor]:
    """The weights of an adapted layer with its active adapters added, as new tensors.

    A plain LoRA is added here; any other adapter merges itself, and the base weight is put back to the bit afterwards
    (unmerging by subtraction would leave rounding in it, more with every push).

    Raises:
        NotImplementedError: an adapter of another kind than plain LoRA on a model that FSDP2 sharded.
    """
    with _gathered(list(layer.parameters())) as spread:
        base = layer.get_base_layer()
        lora = _plain_lora(layer)
        if lora is None and any(isinstance(p, DTensor) for p in layer.parameters()):
            raise NotImplementedError(
                f"An adapter of type {type(layer).__name__} cannot be merged under FSDP; use a plain LoRA, DDP or ZeRO-3."
            )
        others = {
            key: _full(p, device).clone() if spread else _full(p, device)
            for key, p in base.named_parameters(recurse=False)
        }
        if lora is not None:
            weight = _full(_dequantized(base), device)
            merged = weight.float()
            for a, b, scale, transposed in lora:
                delta = _full(b, device).float() @ _full(a, device).float() * scale
                merged = merged + (delta.T if transposed else delta)
            kind = weight.dtype if weight.is_floating_point() else torch.get_default_dtype()
            return {**others, "weight": merged.to(kind)}
        before = {key: p.detach().clone() for key, p in base.named_parameters(recurse=False)}
        chain = [layer]  # adapters of several parameters of one module wrap one another
        while isinstance(getattr(chain[-1], "base_layer", None), BaseTunerLayer):
            chain.append(chain[-1].base_layer)
        for adapter in chain:
            adapter.merge()
        merged_weights = {key: p.detach().clone() for key, p in base.named_parameters(recurse=False)}
        for adapter in reversed(chain):
            adapter.unmerge()
        for key, p in base.named_parameters(recurse=False):
            p.data.copy_(before[key])
        return merged_weights


def _dequantized(base: nn.Module) -> Tensor:
    from peft.utils.integrations import dequantize_module_weight

    return base.weight if isinstance(base.weight, DTensor) else dequantize_module_weight(base)  # type: ignore[return-value, arg-type]


def _plain_lora(layer: Any) -> list[tuple[Tensor, Tensor, float, bool]] | None:
    """`(A, B, scale, whether B A is to be transposed)` of each active adapter, or None if they are not all plain LoRAs."""
    if not isinstance(layer, LoraLayer) or hasattr(layer, "parameter_name"):
        return None
    parts = []
    for adapter in layer.active_adapters:
        known = adapter in layer.lora_A or adapter in layer.lora_embedding_A
        if not known:
            continue
        if getattr(layer, "lora_variant", {}).get(adapter) is not None or getattr(layer, "lora_bias", {}).get(adapter):
            return None
        if adapter in layer.lora_embedding_A:
            parts.append(
                (layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter], layer.scaling[adapter], True)
            )
        elif isinstance(layer.lora_A[adapter], nn.Linear):
            a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            parts.append((a, b, layer.scaling[adapter], bool(getattr(layer, "fan_in_fan_out", False))))
        else:
            return None
    return parts
