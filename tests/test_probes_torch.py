"""Gradient, parameter and allocator facts, on models small enough to count by hand."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from outspoken.diagnostics import torch_probes

GIB = 1024**3


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def with_gradients(*grads, dtype=torch.float32):
    """Named trainable parameters with these gradients (lists of numbers, or None)."""
    named = []
    for i, grad in enumerate(grads):
        p = nn.Parameter(torch.zeros(3 if grad is None else len(grad), dtype=dtype))
        p.grad = None if grad is None else torch.tensor(grad, dtype=dtype)
        named.append((f"layer{i}", p))
    return named


# ---------------------------------------------------------------------------------------------------- gradients


def test_gradient_facts_by_hand():
    named = with_gradients([3.0, 0.0], [0.0, 0.0], [0.0, 4.0, 12.0], None)
    named.append(("frozen", nn.Parameter(torch.ones(2), requires_grad=False)))
    assert torch_probes.gradient_facts(named) == {
        "grad_norm": pytest.approx(13),  # sqrt(9 + 16 + 144)
        "grad/nonfinite": 0.0,
        "grad/nonfinite_tensors": 0,
        "grad/nonfinite_names": [],
        "grad/zero_share": 0.5,  # the second and the one without
        "grad/zero_names": ["layer1", "layer3"],
        "grad/without": 1,
        "grad/largest": "layer2",
        "grad/largest_norm": pytest.approx(math.sqrt(160)),
        "grad/tensors": 4,
    }


def test_nonfinite_gradients_are_counted_and_named():
    nan, inf = math.nan, math.inf
    facts = torch_probes.gradient_facts(with_gradients([1.0, nan, inf], [5.0], [-inf, 2.0]))
    assert math.isnan(facts["grad_norm"])
    assert (facts["grad/nonfinite"], facts["grad/nonfinite_tensors"]) == (3, 2)
    assert facts["grad/nonfinite_names"] == ["layer0", "layer2"]
    assert (facts["grad/largest"], facts["grad/largest_norm"]) == ("layer1", 5)
    only_infinite = torch_probes.gradient_facts(with_gradients([1.0, inf]))
    assert only_infinite["grad_norm"] == math.inf
    assert only_infinite["grad/largest"] is None


def test_the_lists_of_names_are_bounded_but_the_counts_are_not():
    facts = torch_probes.gradient_facts(with_gradients(*[[math.nan]] * 9, *[[0.0]] * 11))
    assert len(facts["grad/nonfinite_names"]) == len(facts["grad/zero_names"]) == torch_probes.NAMES
    assert facts["grad/nonfinite"] == 9
    assert facts["grad/zero_share"] == 11 / 20


def test_finite_gradients_that_overflow_when_squared_are_finite():
    # 3e30 squared is beyond float32, and a norm of 2 * 60000 beyond float16.
    facts = torch_probes.gradient_facts(with_gradients([3e30, 4e30]))
    assert facts["grad_norm"] == pytest.approx(5e30, rel=1e-6)
    assert facts["grad/nonfinite"] == 0
    half = torch_probes.gradient_facts(with_gradients([60000.0] * 4, dtype=torch.float16))
    assert half["grad_norm"] == 120_000
    assert half["grad/nonfinite"] == 0


def test_mixed_dtypes_and_empty_and_sparse_gradients():
    named = with_gradients([3.0]) + with_gradients([4.0], dtype=torch.bfloat16) + with_gradients([12.0], [])
    named += with_gradients([84.0], dtype=torch.float64)
    assert torch_probes.gradient_facts(named)["grad_norm"] == pytest.approx(85.0)  # 3 4 12 84
    embedding = nn.Embedding(10, 2, sparse=True)
    embedding(torch.tensor([1, 1, 3])).sum().backward()  # rows 1 and 3: gradients 2 and 1, twice each
    facts = torch_probes.gradient_facts(embedding)
    assert facts["grad_norm"] == pytest.approx(math.sqrt(4 + 4 + 1 + 1))


def test_gradient_facts_agree_with_torch_before_and_after_clipping(tiny_model_factory):
    model = tiny_model_factory()
    ids = torch.arange(24).reshape(2, 12)
    model(input_ids=ids, labels=ids).loss.backward()
    before = torch_probes.gradient_facts(model)
    reported = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    assert before["grad_norm"] == pytest.approx(float(reported), rel=1e-5)
    assert torch_probes.gradient_facts(model)["grad_norm"] == pytest.approx(0.1, rel=1e-4)
    assert before["grad/largest"] in dict(model.named_parameters())
    assert (before["grad/zero_share"], before["grad/without"]) == (0, 0)
    bare = torch_probes.gradient_facts(model.parameters())
    assert bare["grad/largest"].startswith("parameter ")


def test_gradient_facts_leave_the_gradients_alone():
    named = with_gradients([3.0, math.nan])
    before = named[0][1].grad.clone()
    torch_probes.gradient_facts(named)
    torch.testing.assert_close(named[0][1].grad, before, rtol=0, atol=0, equal_nan=True)


def test_nothing_trainable():
    assert torch_probes.gradient_facts([]) == {}
    assert torch_probes.gradient_facts(nn.Linear(2, 2).requires_grad_(False)) == {}


def test_no_backward_yet():
    facts = torch_probes.gradient_facts(nn.Linear(2, 2))
    assert (facts["grad_norm"], facts["grad/zero_share"], facts["grad/without"]) == (0, 1, 2)
    assert facts["grad/largest"] is None


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (1.0, False),
        (math.nan, True),
        (-math.inf, True),
        (torch.tensor(1.0), False),
        (torch.tensor(math.inf, dtype=torch.bfloat16), True),
        (torch.tensor([1.0, math.nan], requires_grad=True), True),
    ],
)
def test_is_nonfinite(loss, expected):
    assert torch_probes.is_nonfinite(loss) is expected


# --------------------------------------------------------------------------------------------------- parameters


def mlp():
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2, bias=False))  # 15 and 6 elements


def test_parameter_facts_by_hand():
    model = mlp()
    model[1].to(torch.bfloat16)
    model[0].bias.requires_grad_(False)
    assert torch_probes.parameter_facts(model) == {
        "total_parameters": 21,
        "trainable_parameters": 18,
        "trainable_tensors": 2,
        "parameter_dtypes": {"float32": 15, "bfloat16": 6},
        "peft": False,
    }


def test_tied_parameters_count_once(tiny_model_factory):
    model = tiny_model_factory(tie_word_embeddings=True)
    facts = torch_probes.parameter_facts(model)
    assert facts["total_parameters"] == sum(p.numel() for p in set(model.parameters()))
    assert facts["total_parameters"] == model.num_parameters()


def test_parameters_that_the_optimizer_forgot():
    model = mlp()
    complete = torch.optim.SGD(model.parameters(), lr=0.1)
    assert torch_probes.parameter_facts(model, complete)["parameters_outside_optimizer"] == []
    model.append(nn.Linear(2, 2))  # too late for the optimizer
    model[0].bias.requires_grad_(False)
    groups = torch.optim.SGD([{"params": [model[0].weight]}, {"params": [model[1].weight], "lr": 0.0}], lr=0.1)
    facts = torch_probes.parameter_facts(model, groups)
    assert facts["parameters_outside_optimizer"] == ["2.weight", "2.bias"]
    assert facts["parameters_outside_optimizer_count"] == 2


def test_names_outside_the_optimizer_are_bounded(monkeypatch):
    monkeypatch.setattr(torch_probes, "OUTSIDE_NAMES", 2)
    other = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    facts = torch_probes.parameter_facts(mlp(), other)
    assert facts["parameters_outside_optimizer"] == ["0.weight", "0.bias"]
    assert facts["parameters_outside_optimizer_count"] == 3


def test_the_optimizer_of_accelerate_is_understood_and_that_of_deepspeed_is_not_judged():
    from accelerate import Accelerator

    model = mlp()
    prepared = Accelerator(cpu=True).prepare(torch.optim.SGD(model[0].parameters(), lr=0.1))
    assert torch_probes.parameter_facts(model, prepared)["parameters_outside_optimizer"] == ["1.weight"]

    class ZeroOptimizer(SimpleNamespace):
        __module__ = "deepspeed.runtime.zero.stage_1_and_2"

    flat = ZeroOptimizer(param_groups=[{"params": [torch.zeros(21)]}])
    for optimizer in (flat, SimpleNamespace(optimizer=flat, param_groups=flat.param_groups)):
        assert "parameters_outside_optimizer" not in torch_probes.parameter_facts(model, optimizer)


def test_parameters_sharded_by_zero_3_count_in_full():
    model = nn.Linear(2, 2, bias=False)
    model.weight.data = torch.empty(0)
    model.weight.ds_numel = 4  # what DeepSpeed leaves beside the empty stand-in
    assert torch_probes.parameter_facts(model)["total_parameters"] == 4


def test_peft_adapters_are_counted(tiny_model_factory):
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny_model_factory(), lora)
    facts = torch_probes.parameter_facts(model)
    # Two layers, A and B of 4 x 32 each on a 32 x 32 projection.
    assert (facts["peft"], facts["adapters"]) == (True, ["default"])
    assert facts["peft_parameters"] == facts["peft_trainable"] == facts["trainable_parameters"] == 2 * 2 * 4 * 32

    model.requires_grad_(False)  # the adapter frozen by mistake, the head trained instead
    model.get_output_embeddings().weight.requires_grad_(True)
    frozen = torch_probes.parameter_facts(model)
    assert (frozen["peft_trainable"], frozen["peft_parameters"]) == (0, 512)
    assert frozen["trainable_parameters"] > 0


def test_half_of_a_new_lora_adapter_has_no_gradient(tiny_model_factory):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model_factory(), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    ids = torch.arange(8)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    facts = torch_probes.gradient_facts(model)
    assert facts["grad/zero_share"] == 0.5  # B is 0, so nothing reaches A
    assert all("lora_A" in name for name in facts["grad/zero_names"])


def test_prompt_tuning_counts_as_an_adapter(tiny_model_factory):
    from peft import PromptTuningConfig, get_peft_model

    model = get_peft_model(
        tiny_model_factory(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, token_dim=32)
    )
    facts = torch_probes.parameter_facts(model)
    assert facts["peft_parameters"] == facts["peft_trainable"] == 3 * 32


def test_nonfinite_parameters():
    model = nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 10))
    assert torch_probes.nonfinite_parameters(model) == 0
    with torch.no_grad():
        model[0].weight[3, 4] = math.nan
        model[1].bias[:2] = math.inf
    assert torch_probes.nonfinite_parameters(model) == 3
    assert torch_probes.nonfinite_parameters(model, sample=None) == 3
    model[0].weight.requires_grad_(False)
    assert torch_probes.nonfinite_parameters(model) == 2


def test_a_step_with_a_nan_gradient_is_found_in_a_small_sample():
    model = nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.full((1, 100), math.nan)).sum().backward()
    optimizer.step()
    # The gradients of both weights hold the NaN input, those of the biases do not. Of 11,110 elements one in
    # ceil(11110/100) = 112 is read: ceil(10000/112) = 90 of the first weight, ceil(1000/112) = 9 of the second.
    assert torch_probes.nonfinite_parameters(model, sample=100) == 99


def test_nonfinite_parameters_needs_a_sample():
    with pytest.raises(ValueError, match="sample=0"):
        torch_probes.nonfinite_parameters(mlp(), sample=0)


# ------------------------------------------------------------------------------------------------ the allocator


def test_the_cpu_has_no_allocator_to_ask():
    assert torch_probes.allocator_memory("cpu") == {}
    assert torch_probes.allocator_memory(torch.device("cpu"), reset_peak=True) == {}
    assert torch_probes.device_facts("cpu") == {}


def test_allocator_memory_reads_the_statistics_of_cuda(monkeypatch):
    """No device here: the statistics are given by their documented names."""
    stats = {
        "allocated_bytes.all.peak": 6 * GIB,
        "allocated_bytes.all.current": 2 * GIB,
        "reserved_bytes.all.peak": 7 * GIB,
        "reserved_bytes.all.current": 5 * GIB,
        "num_alloc_retries": 3,
    }
    resets = []
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: stats)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", resets.append)
    expected = {
        "memory/peak_allocated": 6,
        "memory/peak_reserved": 7,
        "memory/static": 2,
        "memory/alloc_retries": 3,
    }
    assert torch_probes.allocator_memory("cuda:1") == expected
    assert resets == []
    assert torch_probes.allocator_memory("cuda:1", reset_peak=True) == expected
    assert resets == [torch.device("cuda:1")]
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: {})  # before the first allocation
    assert torch_probes.allocator_memory("cuda:1") == {}


def test_device_facts_name_the_device_as_nvml_does(monkeypatch):
    properties = SimpleNamespace(name="Fake", total_memory=80 * GIB, uuid="8932f937-d72c-4106-c12f-20bd9faed9f6")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert torch_probes.device_facts("cuda:0") == {
        "device_name": "Fake",
        "memory/device_total": 80,
        "device_uuid": "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6",
    }


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_allocator_memory_on_a_real_device():
    torch.cuda.empty_cache()
    before = torch_probes.allocator_memory("cuda", reset_peak=True).get("memory/static", 0.0)
    block = torch.empty(GIB // 4, dtype=torch.float32, device="cuda")
    del block
    after = torch_probes.allocator_memory("cuda")
    assert after["memory/peak_allocated"] - before == pytest.approx(1.0, abs=0.01)
    assert after["memory/static"] == pytest.approx(before, abs=0.01)
    assert after["memory/peak_reserved"] >= after["memory/peak_allocated"]
    assert torch_probes.device_facts("cuda")["memory/device_total"] > 1
