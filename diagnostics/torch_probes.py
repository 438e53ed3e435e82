"""What can be read off a torch model while it trains: gradients, parameters, the allocator. One of the two modules of
`diagnostics/` that import torch.

Everything here is cheap enough for every so many steps: norms are computed by fused kernels and fetched in one
transfer a device, and elements are only counted in tensors whose norm is not finite. Under sharded training (FSDP,
DeepSpeed ZeRO) a rank sees its own shard.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

GIB = 1024**3
NAMES = 5  # tensors named in a list; the count beside it is always complete
OUTSIDE_NAMES = 100  # so many of the tensors missing from the optimizer

Parameters = nn.Module | Iterable[tuple[str, Tensor]] | Iterable[Tensor]


# ----------------------------------------------------------------------------------------- the allocator, GiB


def allocator_memory(device: torch.device | str, reset_peak: bool = False) -> dict[str, float]:
    """Memory of this process on one device, as torch's caching allocator counts it; `{}` on the CPU.

    `memory/peak_allocated` and `memory/peak_reserved` (GiB, since the last reset), `memory/static` (GiB allocated now)
    and `memory/alloc_retries` (count since the start). `memory/static` is the floor that training stands on, weights
    and optimizer state, only if this is called after the optimizer step and `zero_grad`.

    Args:
        device: e.g. `trainer.args.device`.
        reset_peak: start new peaks after reading, so that each reading covers the steps since the one before.
    """
    device = torch.device(device)
    backend = _backend(device)
    if backend is None:
        return {}
    stats = backend.memory_stats(device)
    if not stats:  # the device has not been used yet
        return {}
    if reset_peak:
        backend.reset_peak_memory_stats(device)
    return {
        "memory/peak_allocated": stats["allocated_bytes.all.peak"] / GIB,
        "memory/peak_reserved": stats["reserved_bytes.all.peak"] / GIB,
        "memory/static": stats["allocated_bytes.all.current"] / GIB,
        "memory/alloc_retries": float(stats.get("num_alloc_retries", 0)),
    }


def device_facts(device: torch.device | str) -> dict[str, Any]:
    """`device_name`, `memory/device_total` (GiB) and, where there is one, `device_uuid` of the device trained on.

    The identifier is what `NvmlProbe(devices=[...])` takes, to watch this device and no other. `{}` on the CPU.
    """
    device = torch.device(device)
    backend = _backend(device)
    if backend is None:
        return {}
    properties = backend.get_device_properties(device)
    facts = {"device_name": properties.name, "memory/device_total": properties.total_memory / GIB}
    uuid = getattr(properties, "uuid", None)
    if uuid is not None:
        facts["device_uuid"] = "GPU-" + str(uuid).removeprefix("GPU-")
    return facts


def _backend(device: torch.device) -> Any:
    """`torch.cuda` or its like, if it keeps allocator statistics; else `None`."""
    backend = getattr(torch, device.type, None)
    return backend if device.type != "cpu" and hasattr(backend, "memory_stats") else None


# ---------------------------------------------------------------------------------------------------- gradients


def gradient_facts(parameters: Parameters) -> dict[str, Any]:
    """What the gradients of the trainable parameters look like now: call it before clipping, and again after.

    Args:
        parameters: a model, `named_parameters()`, or bare tensors (then named by position).

    Returns:
        `grad_norm`: L2 norm over all tensors; inf or nan if any element is.
        `grad/nonfinite`: elements that are not finite, with `grad/nonfinite_tensors` and the names of the first of them
        in `grad/nonfinite_names`.
        `grad/zero_share`: share of trainable tensors whose gradient is exactly zero or that have none, with the
        names of the first of them in `grad/zero_names`. In the first step of LoRA half of them are: B starts at zero.
        `grad/without`: tensors without a gradient: no graph led to them.
        `grad/largest`, `grad/largest_norm`: the tensor with the largest finite norm; `None` without one.
        `grad/tensors`: trainable tensors.
        `{}` when nothing is trainable.
    """
    trainable = [(name, p) for name, p in _named(parameters) if p.requires_grad]
    if not trainable:
        return {}
    grads = [(name, _local(p.grad)) for name, p in trainable if p.grad is not None]
    norms = _norms([g for _, g in grads])

    nonfinite: list[tuple[str, int]] = []
    for i, (name, grad) in enumerate(grads):
        if not math.isfinite(norms[i]):
            bad = int(grad.numel() - torch.isfinite(grad).sum())
            if bad:
                nonfinite.append((name, bad))
            else:  # only the sum of squares overflowed
                norms[i] = float(grad.double().norm())
    with_grad = {name for name, _ in grads}
    zero = [name for (name, _), norm in zip(grads, norms) if norm == 0]
    without = [name for name, _ in trainable if name not in with_grad]
    finite = [(norm, name) for (name, _), norm in zip(grads, norms) if math.isfinite(norm)]
    largest_norm, largest = max(finite, key=lambda pair: pair[0], default=(None, None))
    return {
        "grad_norm": _total(norms),
        "grad/nonfinite": float(sum(bad for _, bad in nonfinite)),
        "grad/nonfinite_tensors": len(nonfinite),
        "grad/nonfinite_names": [name for name, _ in nonfinite[:NAMES]],
        "grad/zero_share": (len(zero) + len(without)) / len(trainable),
        "grad/zero_names": (zero + without)[:NAMES],
        "grad/without": len(without),
        "grad/largest": largest,
        "grad/largest_norm": largest_norm,
        "grad/tensors": len(trainable),
    }


def is_nonfinite(loss: Tensor | float) -> bool:
    """Whether a loss holds a NaN or an infinity. Reads the value, so it waits for the device."""
    if isinstance(loss, Tensor):
        return not bool(torch.isfinite(loss.detach()).all())
    return not math.isfinite(loss)


def _norms(tensors: Sequence[Tensor]) -> list[float]:
    """L2 norm of each tensor in float32 (float64 for float64), fetched in one transfer a device and dtype."""
    norms = [0.0] * len(tensors)
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, tensor in enumerate(tensors):
        if tensor.numel():
            kinds.setdefault((tensor.device, tensor.dtype), []).append(i)
    with torch.no_grad():
        for (_, dtype), indices in kinds.items():
            wide = torch.float64 if dtype == torch.float64 else torch.float32  # a norm in float16 overflows at 65504
            found = torch._foreach_norm([tensors[i] for i in indices], 2, wide)
            for i, norm in zip(indices, torch.stack(found).tolist()):
                norms[i] = norm
    return norms


def _total(norms: Sequence[float]) -> float:
    """Root of the sum of squares, without overflow; nan before inf before finite."""
    if any(math.isnan(norm) for norm in norms):
        return math.nan
    return math.hypot(*norms)


def _local(tensor: Tensor) -> Tensor:
    """The dense values held here: of a sharded tensor this rank's, of a sparse one those stored."""
    if hasattr(tensor, "to_local"):
        tensor = tensor.to_local()
    tensor = tensor.detach()
    return tensor.coalesce().values() if tensor.is_sparse else tensor


def _named(parameters: Parameters) -> Iterable[tuple[str, Tensor]]:
    if isinstance(parameters, nn.Module):
        yield from parameters.named_parameters()
        return
    for i, item in enumerate(parameters):
        yield item if isinstance(item, tuple) else (f"parameter {i}", item)


# --------------------------------------------------------------------------------------------------- parameters


def parameter_facts(model: nn.Module, optimizer: Any = None) -> dict[str, Any]:
    """What is trained, once at the start: plain values for `run.json` and the rules that read it.

    Returns:
        `total_parameters`, `trainable_parameters`: elements, a tied tensor counted once; `trainable_tensors`: tensors.
        `parameter_dtypes`: elements by dtype, e.g. `{"bfloat16": 134515008}`.
        `parameters_outside_optimizer`: names of trainable tensors that no optimizer group holds, so that they never
        change; at most `OUTSIDE_NAMES`, their number is `parameters_outside_optimizer_count`. Both are absent without
        an optimizer, and under DeepSpeed, whose optimizer holds flattened copies.
        `peft`: whether adapters are in the model. If so, `adapters`: their names, `peft_parameters` and
        `peft_trainable`: elements that belong to them, and those of them that are trained.
    """
    named = list(model.named_parameters())
    dtypes: Counter[str] = Counter()
    for _, p in named:
        dtypes[str(p.dtype).removeprefix("torch.")] += _elements(p)
    trainable = [(name, p) for name, p in named if p.requires_grad]
    facts: dict[str, Any] = {
        "total_parameters": sum(_elements(p) for _, p in named),
        "trainable_parameters": sum(_elements(p) for _, p in trainable),
        "trainable_tensors": len(trainable),
        "parameter_dtypes": dict(dtypes),
    }
    adapters = getattr(model, "peft_config", None) or {}
    facts["peft"] = bool(adapters)
    if adapters:
        parameters = _adapter_parameters(model)
        facts["adapters"] = sorted(adapters)
        facts["peft_parameters"] = sum(_elements(p) for p in parameters)
        facts["peft_trainable"] = sum(_elements(p) for p in parameters if p.requires_grad)
    if optimizer is not None and not _is_deepspeed(optimizer):
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        missing = [name for name, p in trainable if id(p) not in held]
        facts["parameters_outside_optimizer"] = missing[:OUTSIDE_NAMES]
        facts["parameters_outside_optimizer_count"] = len(missing)
    return facts


def nonfinite_parameters(model: nn.Module, sample: int | None = 1_000_000) -> int:
    """Elements of the trainable parameters that are not finite, among about `sample` of them (`None`: all).

    A tensor whose share of the sample is smaller than itself is read at equal distances, every tensor at least at
    one element. A step taken with a NaN gradient spoils every element it updates, so that a sample finds it.
    """
    if sample is not None and sample < 1:
        raise ValueError(f"sample={sample} must be at least 1, or None for all elements")
    tensors = [_local(p) for p in model.parameters() if p.requires_grad and p.numel()]
    total = sum(t.numel() for t in tensors)
    counts = []
    for tensor in tensors:
        flat = tensor.reshape(-1)
        if sample is not None and total > sample:
            flat = flat[:: math.ceil(total / sample)]
        counts.append((~torch.isfinite(flat)).sum())
    by_device: dict[torch.device, list[Tensor]] = {}
    for count in counts:
        by_device.setdefault(count.device, []).append(count)
    return sum(int(torch.stack(same).sum()) for same in by_device.values())


def _elements(parameter: Tensor) -> int:
    """Elements of a parameter; under ZeRO-3 those of the whole, not the empty stand-in kept here."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _adapter_parameters(model: nn.Module) -> list[Tensor]:
    """Parameters that PEFT added: those under a tuner layer's adapter attributes, and prompt encoders."""
    found: dict[int, Tensor] = {}
    for module in model.modules():
        names = getattr(module, "adapter_layer_names", ())
        for name in (*names, "prompt_encoder"):
            part = getattr(module, name, None)
            if isinstance(part, nn.Module):
                found.update((id(p), p) for p in part.parameters())
    return list(found.values())


def _is_deepspeed(optimizer: Any) -> bool:
    inner = getattr(optimizer, "optimizer", optimizer)
    return any(type(o).__module__.startswith("deepspeed") for o in (optimizer, inner))
