"""Parameters that are whole, or spread over the processes (FSDP1, FSDP2, DeepSpeed ZeRO-3), seen in one way.

A weight is changed in place on the part of it that a process holds; only what must be whole is gathered.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor


def local_part(parameter: nn.Parameter) -> Tensor:
    """What this process holds of a parameter, without gradient: all of it, or its share under FSDP and ZeRO-3.

    Writing into it changes the parameter; call `refresh` on the model afterwards.
    """
    if hasattr(parameter, "ds_tensor"):  # DeepSpeed ZeRO-3
        return parameter.ds_tensor.data
    if isinstance(parameter, DTensor):  # FSDP2
        return parameter.to_local().detach()
    return parameter.detach()  # under FSDP1 this is the process's share


def is_sharded(model: nn.Module) -> bool:
    """Whether the model's parameters are spread over the processes (FSDP, ZeRO-3)."""
    return any(isinstance(module, FullyShardedDataParallel) for module in model.modules()) or any(
        isinstance(p, DTensor) or hasattr(p, "ds_tensor") for p in model.parameters()
    )


@contextlib.contextmanager
def whole_under_zero3(engine: Any) -> Iterator[None]:
    """While open, every process has all weights of DeepSpeed's engine, whose model works as if it were not sharded.

    All processes must enter and leave it together; in between each may call the model as often as it likes, without
    gradients. The weights must not be changed.
    """
    import deepspeed

    engine.empty_partition_cache()
    offload = getattr(engine.optimizer, "parameter_offload", engine.optimizer)
    # DeepSpeed's hooks would let go of a layer's weights after its forward pass.
    taken_off = []
    for handle in (offload.fwd_pre_hook, *offload.forward_hooks, *offload.backward_hooks):
        hooks = handle.hooks_dict_ref()
        if hooks is not None and handle.id in hooks:
            taken_off.append((hooks, handle.id, hooks.pop(handle.id)))
    try:
        with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
            yield
    finally:
        for hooks, number, hook in taken_off:
            hooks[number] = hook


def reshard(model: nn.Module) -> None:
    """Let every process hold its own share only: FSDP leaves some layers gathered after a forward pass."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
        elif isinstance(module, FullyShardedDataParallel):
            handle = module._handle
            # Before the first forward pass there is nothing to give back.
            if handle is not None and handle.uses_sharded_strategy and hasattr(handle.flat_param, "_local_shard"):
                handle.reshard(free_unsharded_flat_param=True)


def refresh(model: nn.Module) -> None:
    """Make known what was written into local parts: ZeRO-3 keeps small parameters gathered. All processes must call it."""
    parameter: Any
    for parameter in model.parameters():
        if hasattr(parameter, "ds_tensor") and parameter.data.shape == parameter.ds_shape:
            parameter.data.copy_(whole(local_part(parameter), parameter.ds_shape))


def whole(part: Tensor, shape: torch.Size) -> Tensor:
    """A parameter of this shape from the parts that all processes hold; each must call it.

    FSDP1, FSDP2 and ZeRO-3 all give process r the r-th piece of the flattened parameter; ZeRO-3 pads the last one.
    """
    length = math.prod(shape)
    flat = part.reshape(-1)
    sizes = torch.zeros(dist.get_world_size(), dtype=torch.long, device=flat.device)
    sizes[dist.get_rank()] = flat.numel()
    dist.all_reduce(sizes)
    longest, total = int(sizes.max()), int(sizes.sum())
    if not length <= total < length + longest:
        raise ValueError(
            f"The processes hold {total} numbers of a parameter with {length}; only sharding over all processes is "
            "supported (FULL_SHARD or ZeRO-3, no hybrid sharding)."
        )
    padded = torch.nn.functional.pad(flat, (0, longest - flat.numel()))
    pieces = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(pieces, padded)
    return torch.cat([piece[:size] for piece, size in zip(pieces, sizes.tolist())])[:length].view(shape)


def blend(sources: nn.Module, targets: nn.Module, pairs: Iterable[tuple[Tensor, nn.Parameter]], alpha: float) -> None:
    """`target <- alpha * source + (1 - alpha) * target`, for pairs of a source's local part and a target's parameter.

    All processes must call it. The models that they belong to are sharded alike, or only the source's is.

    Raises:
        ValueError: only the target's model is sharded.
    """
    gather = is_sharded(sources) and not is_sharded(targets)
    if is_sharded(targets) and not is_sharded(sources):
        raise ValueError(
            "The reference model is sharded over the processes and the trained model is not; shard both or neither."
        )
    for part, target in pairs:
        mine = local_part(target)
        if gather:
            part = whole(part, mine.shape)
        part = part.to(mine.device, mine.dtype)
        if alpha == 1.0:
            mine.copy_(part)
        else:
            mine.mul_(1.0 - alpha).add_(part, alpha=alpha)
    refresh(targets)


def save_whole_model(model: Any, folder: str, main_process: bool) -> None:
    """`save_pretrained` of a model as it is now, sharded or not; all processes must call it."""
    reshard(model)
    inner = unwrapped(model)
    if not is_sharded(model):
        if main_process:
            inner.save_pretrained(folder)
        return
    if any(hasattr(p, "ds_tensor") for p in model.parameters()):
        state: dict[str, Any] = {n: whole(local_part(p), p.ds_shape).cpu() for n, p in inner.named_parameters()}
        state |= {name: buffer.cpu() for name, buffer in inner.state_dict().items() if name not in state}
    else:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        offload = any(p.device.type != "cpu" for p in model.parameters())
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=offload))
    if main_process:
        inner.save_pretrained(folder, state_dict=state)


def unwrapped(model: Any) -> Any:
    """The model inside a DDP, FSDP1 or DeepSpeed wrapper."""
    while isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    return model


def plain_name(name: str) -> str:
    """A parameter's name without what wrappers put into it."""
    for wrapper in ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod."):
        name = name.replace(wrapper, "")
    return name.removeprefix("module.")
