"""Activations wait in the host's memory for the backward pass, instead of on the accelerator.

Autograd keeps what the backward pass will need. Here each such tensor is copied to pinned host memory on a stream of
its own, while the forward pass goes on, and brought back, one ahead of its use, during the backward pass. Gradients are
the same to the bit; the price is traffic over the bus. With gradient checkpointing only the layers' inputs travel.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

MIN_BYTES = 1024  # below this the copy costs more than the memory is worth


@contextmanager
def offload_activations(
    model: nn.Module, *, min_bytes: int = MIN_BYTES, prefetch: int = 1, cpu_too: bool = False
) -> Iterator[None]:
    """While open, tensors that autograd keeps for the backward pass are kept in host memory.

    Open it around the forward pass. The backward pass, or several, may come after it is closed or before. Left where they
    are: parameters and buffers of `model`, tensors below `min_bytes`, tensors already on the CPU, subclasses of `Tensor`
    (sharded or quantized ones), and views that show a smaller storage several times.

    >>> with offload_activations(model):  # doctest: +SKIP
    ...     loss = model(**batch).loss
    >>> loss.backward()  # doctest: +SKIP

    Args:
        prefetch: how many tensors to bring back ahead of the one that the backward pass waits for.
        cpu_too: copy tensors of the CPU as well. It saves nothing; it shows on any machine that gradients stay the same.
    """
    forward = _Forward(model, min_bytes, prefetch, cpu_too)
    with saved_tensors_hooks(forward.pack, _unpack):
        yield


class _Forward:
    """The tensors packed in one forward pass, in order: the backward pass wants them in the reverse order."""

    def __init__(self, model: nn.Module, min_bytes: int, prefetch: int, cpu_too: bool):
        self.min_bytes, self.prefetch, self.cpu_too = min_bytes, prefetch, cpu_too
        self.kept = {_address(tensor) for tensor in (*model.parameters(), *model.buffers()) if _is_plain(tensor)}
        self.packed: list[weakref.ref[_Packed]] = []  # weak: memory is free as soon as autograd lets go
        self.by_view: dict[tuple[Any, ...], tuple[StorageWeakRef, weakref.ref[_Packed]]] = {}

    def pack(self, tensor: Tensor) -> "Tensor | _Packed":
        if not self.worth_it(tensor):
            return tensor.detach()  # the tensor itself would hold the graph that holds it
        # Several operations often keep the same tensor (the inputs of q, k and v): it travels once. Address and version
        # tell the same content only while the storage is alive.
        view = (
            _address(tensor),
            tensor.storage_offset(),
            tensor.shape,
            tensor.stride(),
            tensor.dtype,
            tensor._version,
        )
        storage, known = self.by_view.get(view, (None, None))
        if storage is not None and known is not None and not storage.expired():
            packed = known()
            if packed is not None:
                packed.users += 1
                return packed
        packed = _Packed(tensor, self)
        self.packed.append(weakref.ref(packed))
        self.by_view[view] = (StorageWeakRef(tensor.untyped_storage()), weakref.ref(packed))
        return packed

    def worth_it(self, tensor: Tensor) -> bool:
        if not _is_plain(tensor) or (tensor.device.type == "cpu" and not self.cpu_too):
            return False
        # What a backward pass computes anew (checkpoints, the chunked output head) is used at once.
        if torch._C._current_graph_task_id() != -1:
            return False
        # Under FSDP the gathered weights have other addresses than the model's parameters, but are parameters too.
        if isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter):
            return False
        size = tensor.nelement() * tensor.element_size()
        storage = tensor.untyped_storage()
        return size >= self.min_bytes and storage.nbytes() >= size and _address(tensor) not in self.kept


class _Packed:
    """A tensor that waits in host memory."""

    def __init__(self, tensor: Tensor, forward: _Forward):
        self.forward, self.index, self.device = forward, len(forward.packed), tensor.device
        self.users, self.taken = 1, 0  # operations that keep this tensor, and how often it was taken by one
        self.back: Tensor | None = None  # on its way back, or there
        accelerator = self.device.type != "cpu"
        self.host = torch.empty_like(tensor, device="cpu", pin_memory=accelerator, requires_grad=False)
        stream = _copy_stream(self.device)
        if stream is None:
            self.host.copy_(tensor)
            return
        module = torch.get_device_module(self.device)
        stream.wait_stream(module.current_stream(self.device))
        with module.stream(stream):
            self.host.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)  # its memory is not given away before the copy is done

    def fetch(self) -> Tensor:
        """Start bringing it back."""
        if self.back is None:
            stream = _copy_stream(self.device)
            module = None if stream is None else torch.get_device_module(self.device)
            with nullcontext() if module is None else module.stream(stream):
                # The copy to the host is done first: it is earlier on the same stream.
                self.back = torch.empty_like(self.host, device=self.device)
                self.back.copy_(self.host, non_blocking=True)
        return self.back

    def take(self) -> Tensor:
        """The tensor, on its device, for use now. A second backward pass may take it again."""
        tensor = self.fetch()
        self.taken += 1
        if self.taken % self.users == 0:
            self.back = None
        stream = _copy_stream(self.device)
        if stream is not None:
            current = torch.get_device_module(self.device).current_stream(self.device)
            current.wait_stream(stream)
            tensor.record_stream(current)
        for packed in reversed(self.forward.packed[max(self.index - self.forward.prefetch, 0) : self.index]):
            if (ahead := packed()) is not None:
                ahead.fetch()
        return tensor


def _unpack(packed: "Tensor | _Packed") -> Tensor:
    return packed.take() if isinstance(packed, _Packed) else packed


def _is_plain(tensor: Tensor) -> bool:
    """Whether it is a dense tensor with storage of its own, not a subclass that stands for something else."""
    return (
        type(tensor) in (Tensor, nn.Parameter, nn.Buffer)
        and tensor.layout == torch.strided
        and tensor.device.type != "meta"
    )


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


_STREAMS: dict[torch.device, Any] = {}


def _copy_stream(device: torch.device) -> Any:
    """The stream for copies of a device; None on the CPU."""
    if device.type == "cpu":
        return None
    if device not in _STREAMS:
        _STREAMS[device] = torch.get_device_module(device).Stream(device=device)
    return _STREAMS[device]
