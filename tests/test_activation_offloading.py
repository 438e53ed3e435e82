"""Activation offloading: the same gradients, everything that is worth it offloaded once, nothing kept alive."""

import gc
import weakref

import pytest
import torch
from torch import nn

from outspoken.trainers import activation_offloading
from outspoken.trainers.activation_offloading import offload_activations


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.fixture
def packed(monkeypatch):
    """What was copied to host memory, as (shape, bytes)."""
    made = []
    original = activation_offloading._Packed.__init__

    def record(self, tensor, forward):
        made.append((tuple(tensor.shape), tensor.nelement() * tensor.element_size()))
        original(self, tensor, forward)

    monkeypatch.setattr(activation_offloading._Packed, "__init__", record)
    return made


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("prefetch", [0, 1, 5])
def test_gradients_of_a_language_model_are_the_same_to_the_bit(tiny_model_factory, checkpointing, prefetch, packed):
    model = tiny_model_factory().train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    ids = torch.arange(4, 68).view(2, 32)
    results = []
    for offloads in (False, True):
        model.zero_grad()
        # Two forward passes before the backward pass, as in losses that compare two batches.
        losses = []
        for batch in (ids, ids.flip(0, 1)):
            if offloads:
                with offload_activations(model, prefetch=prefetch, cpu_too=True):
                    losses.append(model(batch, labels=batch).loss)
            else:
                losses.append(model(batch, labels=batch).loss)
        (losses[0] * losses[1]).backward()
        results.append(gradients(model))
    assert len(packed) > 2
    for name, gradient in results[0].items():
        assert torch.equal(gradient, results[1][name]), name


def test_with_checkpointing_only_the_inputs_of_layers_travel(tiny_model_factory, packed):
    model = tiny_model_factory(num_hidden_layers=3).train()
    ids = torch.arange(4, 68).view(2, 32)
    with offload_activations(model, cpu_too=True):
        model.model(ids)
    without = sum(size for _, size in packed)
    packed.clear()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with offload_activations(model, cpu_too=True):
        model.model(ids)
    hidden = (2, 32, 32)
    assert sum(shape == hidden for shape, _ in packed) >= 3
    assert sum(size for _, size in packed) < without / 3


def test_one_tensor_kept_by_several_operations_travels_once(packed):
    x = torch.randn(64, 64, requires_grad=True)
    layers = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(3))
    hidden = x * 2
    with offload_activations(layers, cpu_too=True):
        out = sum(layer(hidden) for layer in layers)
    assert [shape for shape, _ in packed] == [(64, 64)]
    out.sum().backward()
    expected = torch.ones(64, 64) @ sum(layer.weight for layer in layers) * 2
    torch.testing.assert_close(x.grad, expected)


def test_a_tensor_changed_in_place_is_another_one():
    x = torch.randn(64, 64, requires_grad=True)
    with offload_activations(nn.Linear(1, 1), cpu_too=True):
        hidden = x * 1.0
        first = hidden * hidden.detach()  # keeps `hidden` as it is now
        hidden.data.add_(1.0)
        hidden.mul_(1.0)  # a new version
        second = hidden * hidden.detach()
    (first.sum() + second.sum()).backward()
    # d/dx of x * c1 + (x + 1) * c2 with c1 = x and c2 = x + 1 held fixed.
    torch.testing.assert_close(x.grad, x.detach() + (x.detach() + 1))


def test_what_stays(packed):
    model = nn.Linear(64, 64)
    model.register_buffer("table", torch.randn(64, 64))
    small, broadcast = torch.randn(8, requires_grad=True), torch.randn(64, 1, requires_grad=True).expand(64, 64)
    with offload_activations(model, cpu_too=True):
        (small * small).sum()
        (broadcast * model.table).sum()  # keeps a buffer, and a view that is larger than what it shows
        model.weight.exp()  # keeps its result: the only one that travels
        torch.randn(
            64, 64, requires_grad=True
        ) * model.weight.t()  # keeps a view of a parameter, and the random factor
    assert [shape for shape, _ in packed] == [(64, 64), (64, 64)]


def test_what_a_backward_pass_computes_anew_stays(packed):
    class Anew(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.sin().exp().sum()

        @staticmethod
        def backward(ctx, grad):
            with torch.enable_grad():
                x = ctx.saved_tensors[0].detach().requires_grad_()
                return torch.autograd.grad(x.sin().exp().sum(), x)[0] * grad

    x = torch.randn(64, 64, requires_grad=True)
    with offload_activations(nn.Linear(1, 1), cpu_too=True):
        Anew.apply(x).backward()
    assert [shape for shape, _ in packed] == [(64, 64)]  # what the forward pass kept, not the two of the backward pass
    torch.testing.assert_close(x.grad, x.detach().cos() * x.detach().sin().exp())


def test_on_the_cpu_nothing_travels(tiny_model_factory, packed):
    model = tiny_model_factory()
    ids = torch.arange(4, 68).view(2, 32)
    with offload_activations(model):
        model(ids, labels=ids).loss.backward()
    assert packed == []


def test_views_and_layouts_come_back_as_they_were():
    seen = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            ctx.expected = (x.shape, x.stride(), x.dtype, x.clone())
            return x.sum()

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            shape, stride, dtype, values = ctx.expected
            assert (x.shape, x.stride(), x.dtype) == (shape, stride, dtype) and torch.equal(x, values)
            seen.append(1)
            return grad.expand(shape)

    base = torch.randn(4, 32, 64, requires_grad=True)
    with offload_activations(nn.Linear(1, 1), cpu_too=True):
        total = Look.apply(base.transpose(1, 2)) + Look.apply(base[1]) + Look.apply(base.permute(2, 0, 1))
        total = total + Look.apply(base.bfloat16().transpose(0, 2)).float()
    total.backward()
    assert len(seen) == 4


def test_a_second_backward_pass():
    x = torch.randn(64, 64, requires_grad=True)
    with offload_activations(nn.Linear(1, 1), cpu_too=True):
        loss = (x.sin() * x).sum()
    loss.backward(retain_graph=True)
    once = x.grad.clone()
    loss.backward()
    torch.testing.assert_close(x.grad, 2 * once)
    torch.testing.assert_close(once, x.detach().cos() * x.detach() + x.detach().sin())


@pytest.mark.parametrize("backward", [True, False])
def test_nothing_is_kept_alive(tiny_model_factory, monkeypatch, backward):
    hosts = []
    original = activation_offloading._Packed.__init__

    def record(self, tensor, forward):
        original(self, tensor, forward)
        hosts.append((weakref.ref(self), weakref.ref(self.host)))

    monkeypatch.setattr(activation_offloading._Packed, "__init__", record)
    model = tiny_model_factory()
    ids = torch.arange(4, 68).view(2, 32)
    with offload_activations(model, cpu_too=True):
        loss = model(ids, labels=ids).loss
    assert hosts and all(host() is not None for _, host in hosts)
    if backward:
        loss.backward()
    del loss
    gc.collect()
    assert all(packed() is None and host() is None for packed, host in hosts)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_gradients_are_the_same_and_memory_is_lower(tiny_model_factory):
    model = tiny_model_factory(num_hidden_layers=8, hidden_size=256, intermediate_size=1024).cuda()
    ids = torch.randint(4, 250, (8, 512), device="cuda")
    results, peaks = [], []
    for offloads in (False, True, True):
        model.zero_grad()
        torch.cuda.reset_peak_memory_stats()
        if offloads:
            with offload_activations(model):
                loss = model(ids, labels=ids).loss
        else:
            loss = model(ids, labels=ids).loss
        loss.backward()
        peaks.append(torch.cuda.max_memory_allocated())
        results.append(gradients(model))
    for name, gradient in results[0].items():
        torch.testing.assert_close(gradient, results[2][name], msg=name)
    assert peaks[2] < 0.7 * peaks[0]
