"""Label scores against `log_softmax` written out, and against the full-logits forward of the same model."""

import os
import socket
import subprocess
import sys
from itertools import product

import pytest
import torch
from torch.nn.functional import log_softmax
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig
from transformers.modeling_outputs import CausalLMOutput

from outspoken.trainers import logprobs
from outspoken.trainers.logprobs import (
    IGNORE_INDEX,
    entropy_from_logits,
    finish_logits,
    label_scores,
    scores_from_logits,
    selective_log_softmax,
)

ALL = ("entropy", "is_top1", "mean_logps", "mean_logits", "log_sum_sq_probs")
NUMBERS = ("logps", "entropy", "mean_logps", "mean_logits", "log_sum_sq_probs")


def _reference(logits, labels, temperature=1.0):
    """The quantities from the full log-softmax, zero where the label is -100."""
    logps = log_softmax(logits / temperature, dim=-1)
    mask = labels != IGNORE_INDEX
    picked = logps.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return {
        "logps": torch.where(mask, picked, 0.0),
        "entropy": torch.where(mask, -(logps.exp() * logps).sum(-1), 0.0),
        "is_top1": mask & (logps.argmax(-1) == labels),
        "mean_logps": torch.where(mask, logps.mean(-1), 0.0),
        "mean_logits": torch.where(mask, (logits / temperature).mean(-1), 0.0).detach(),
        "log_sum_sq_probs": torch.where(mask, logps.exp().square().sum(-1).log(), 0.0).detach(),
    }


@pytest.mark.parametrize("slice_logits", [1, 50, 2**26])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scores_and_gradients_equal_log_softmax(slice_logits, temperature):
    torch.manual_seed(0)
    data = 3 * torch.randn(3, 7, 11)
    labels = torch.randint(11, (3, 7))
    labels[0, :4] = IGNORE_INDEX
    labels[2] = IGNORE_INDEX
    weights = torch.randn(3, 7)

    logits = data.clone().requires_grad_()
    scores = scores_from_logits(
        logits, labels, temperature=temperature, want=ALL, entropy_grad=True, max_slice_logits=slice_logits
    )
    ((scores.logps + 0.5 * scores.entropy + 0.1 * scores.mean_logps) * weights).sum().backward()

    reference_logits = data.clone().requires_grad_()
    expected = _reference(reference_logits, labels, temperature)
    total = expected["logps"] + 0.5 * expected["entropy"] + 0.1 * expected["mean_logps"]
    (total * weights).sum().backward()

    for name in NUMBERS:
        torch.testing.assert_close(getattr(scores, name), expected[name], atol=1e-5, rtol=1e-5)
    assert torch.equal(scores.is_top1, expected["is_top1"])
    assert torch.equal(scores.mask, labels != IGNORE_INDEX)
    torch.testing.assert_close(logits.grad, reference_logits.grad, atol=1e-5, rtol=1e-5)


def test_entropy_carries_no_gradient_unless_asked():
    logits = torch.randn(2, 3, 5, requires_grad=True)
    assert not scores_from_logits(logits, torch.zeros(2, 3).long(), want=("entropy",)).entropy.requires_grad


def test_entropy_of_uniform_and_forbidden_tokens():
    uniform = torch.zeros(1, 8)
    assert entropy_from_logits(uniform).item() == pytest.approx(2.0794415)  # ln 8
    half = torch.tensor([[0.0, 0.0, float("-inf"), float("-inf")]])
    assert entropy_from_logits(half).item() == pytest.approx(0.6931472)  # ln 2


def test_bfloat16_logits_are_normalized_in_float32():
    torch.manual_seed(0)
    logits = torch.randn(4, 1000).bfloat16()
    labels = torch.arange(4)
    expected = log_softmax(logits.double(), dim=-1)[torch.arange(4), labels].float()
    assert selective_log_softmax(logits, labels).dtype == torch.float32
    torch.testing.assert_close(selective_log_softmax(logits, labels), expected, atol=1e-5, rtol=1e-5)


def test_temperature_must_be_positive():
    with pytest.raises(ValueError, match=r"temperature must be positive, got 0"):
        selective_log_softmax(torch.zeros(1, 3), torch.zeros(1).long(), temperature=0)


def _batch(tokenizer):
    texts = ["The sky is blue.", "What is 2 + 2? It is 4."]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORE_INDEX)
    labels[0, :3] = IGNORE_INDEX
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}, labels


def _tiny_gemma2(vocab_size):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    return Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, final_logit_softcapping=2.0, initializer_range=0.5,
        )
    )  # fmt: skip


def _tiny_cohere(vocab_size):
    from transformers import CohereConfig, CohereForCausalLM

    torch.manual_seed(0)
    return CohereForCausalLM(
        CohereConfig(
            vocab_size=vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, logit_scale=0.3, initializer_range=0.5,
        )
    )  # fmt: skip


class _Negated(torch.nn.Module):
    """A wrapper whose logits are not what its head says: the full logits must be used."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config

    def get_output_embeddings(self):
        return self.model.get_output_embeddings()

    def forward(self, **inputs):
        output = self.model(**inputs)
        output.logits = -output.logits
        return output


@pytest.mark.parametrize("kind", ["llama", "gemma2", "cohere", "negated"])
def test_label_scores_equal_the_full_logits(kind, tiny_model_factory, tiny_tokenizer):
    vocab_size = len(tiny_tokenizer)
    model = {
        "llama": tiny_model_factory,
        "gemma2": lambda: _tiny_gemma2(vocab_size),
        "cohere": lambda: _tiny_cohere(vocab_size),
        "negated": lambda: _Negated(tiny_model_factory()),
    }[kind]()
    inputs, labels = _batch(tiny_tokenizer)

    scores, output = label_scores(model, inputs, labels, want=ALL, max_slice_logits=3 * vocab_size)
    (-scores.logps.sum()).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    logits = model(**inputs).logits
    expected = _reference(logits[:, :-1], labels[:, 1:])
    (-expected["logps"].sum()).backward()

    assert output.logits.shape[1] == 1
    torch.testing.assert_close(output.logits, logits[:, -1:])
    for name in NUMBERS:
        torch.testing.assert_close(getattr(scores, name), expected[name], atol=1e-5, rtol=1e-5)
    assert torch.equal(scores.is_top1, expected["is_top1"])
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-4, rtol=1e-4)


def test_label_scores_never_build_the_full_logits(tiny_model_factory, tiny_tokenizer):
    model = tiny_model_factory()
    inputs, labels = _batch(tiny_tokenizer)
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape[:-1].numel()))
    label_scores(model, inputs, labels, max_slice_logits=4 * len(tiny_tokenizer))
    scored = int((labels[:, 1:] != IGNORE_INDEX).sum())
    # One kept position a row, then the labelled positions, four at a time.
    assert seen[0] == 2
    assert sum(seen[1:]) == scored
    assert max(seen) == 4


def test_no_label_at_all_gives_zero_gradients(tiny_model_factory, tiny_tokenizer):
    model = tiny_model_factory()
    inputs, labels = _batch(tiny_tokenizer)
    scores, _ = label_scores(model, inputs, torch.full_like(labels, IGNORE_INDEX), want=ALL)
    scores.logps.sum().backward()
    assert scores.logps.abs().sum() == 0
    assert all(p.grad is None or p.grad.abs().sum() == 0 for p in model.parameters())


def test_lm_head_adapter_takes_part(tiny_model_factory, tiny_tokenizer):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(tiny_model_factory(), LoraConfig(target_modules=["lm_head"], init_lora_weights=False))
    inputs, labels = _batch(tiny_tokenizer)
    scores, _ = label_scores(model, inputs, labels)
    expected = _reference(model(**inputs).logits[:, :-1], labels[:, 1:])
    torch.testing.assert_close(scores.logps, expected["logps"], atol=1e-5, rtol=1e-5)
    scores.logps.sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


def test_prompt_learning_scores_the_first_token_too(tiny_model_factory, tiny_tokenizer):
    from peft import PromptTuningConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(tiny_model_factory(), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    inputs, labels = _batch(tiny_tokenizer)
    labels[0, :3] = inputs["input_ids"][0, :3]
    scores, _ = label_scores(model, inputs, labels)
    logits = model(**inputs).logits  # 3 virtual positions in front
    expected = _reference(logits[:, 2:-1], labels)
    assert scores.logps.shape == (2, labels.size(1) + 2)
    torch.testing.assert_close(scores.logps[:, 2:], expected["logps"], atol=1e-5, rtol=1e-5)


def test_autocast_of_the_forward_is_used_for_the_head(tiny_model_factory, tiny_tokenizer):
    model = tiny_model_factory()
    inputs, labels = _batch(tiny_tokenizer)
    inner = model.forward

    def under_autocast(*args, **kwargs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return inner(*args, **kwargs)

    model.forward = under_autocast
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    label_scores(model, inputs, labels)
    assert seen == [torch.bfloat16, torch.bfloat16]
    seen.clear()
    label_scores(model, inputs, labels, fp32_head=True)
    assert seen[1] == torch.float32


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"logit_scale": 0.5}, 1.0),
        ({"logits_scaling": 4.0}, 0.5),
        ({"final_logit_softcapping": 1.0}, 0.9640276),  # tanh(2)
        ({"logit_scale": 0.5, "final_logit_softcapping": 2.0}, 0.9242343),  # 2 tanh(1 / 2)
        ({}, 2.0),
    ],
)
def test_finish_logits(fields, expected):
    from transformers import LlamaConfig

    assert finish_logits(torch.tensor([2.0]), LlamaConfig(**fields)).item() == pytest.approx(expected)


class _Toy(torch.nn.Module):
    """An output head over given hidden states; scale and soft cap as in Cohere and Gemma, written out."""

    def __init__(self, head, multiplier=1.0, cap=None):
        super().__init__()
        self.lm_head, self.multiplier, self.cap = head, multiplier, cap
        self.config = LlamaConfig(logit_scale=multiplier, final_logit_softcapping=cap)

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, hidden):
        logits = self.lm_head(hidden) * self.multiplier
        return CausalLMOutput(logits=logits if self.cap is None else self.cap * torch.tanh(logits / self.cap))


def _toy_batch(vocabulary=11, width=5, dtype=torch.float32):
    """A head, hidden states (3, 6, width) with gradient, labels of which 3 + 0 + 6 are -100."""
    torch.manual_seed(0)
    head = torch.nn.Linear(width, vocabulary, dtype=dtype)
    hidden = torch.randn(3, 6, width, dtype=dtype, requires_grad=True)
    labels = torch.randint(vocabulary, (3, 6))
    labels[0, :3] = IGNORE_INDEX
    labels[2] = IGNORE_INDEX
    return head, hidden, labels


# The 8 x 11 logits in one tile; cut by rows; by rows and columns; number by number.
@pytest.mark.parametrize("slice_logits", [2**26, 30, 12, 1])
@pytest.mark.parametrize("transform", [(1.0, None), (0.3, None), (1.0, 2.0), (1.5, 0.7)])
def test_every_option_equals_log_softmax(slice_logits, transform, monkeypatch):
    monkeypatch.setattr(logprobs, "MIN_TILE_WIDTH", 4)
    monkeypatch.setattr(logprobs, "CPU_BLOCK_LOGITS", 20)
    weights = torch.randn(3, 5)
    for bias, temperature, entropy_grad, frozen in product([True, False], [1.0, 0.7], [True, False], [True, False]):
        head, hidden, labels = _toy_batch()
        head.bias = head.bias if bias else None
        head.requires_grad_(not frozen)
        model = _Toy(head, *transform)

        def gradients(scores):
            total = scores["logps"] + 0.1 * scores["mean_logps"]
            if entropy_grad:  # noqa: B023
                total = total + 0.5 * scores["entropy"]
            hidden.grad = None  # noqa: B023
            model.zero_grad()  # noqa: B023
            (total * weights).sum().backward()
            return [hidden.grad, *(p.grad for p in head.parameters())]  # noqa: B023

        scores, _ = label_scores(
            model, {"hidden": hidden}, labels, temperature=temperature, want=ALL, entropy_grad=entropy_grad,
            max_slice_logits=slice_logits,
        )  # fmt: skip
        expected = _reference(model(hidden).logits[:, :-1], labels[:, 1:], temperature)
        for name in NUMBERS:
            torch.testing.assert_close(getattr(scores, name), expected[name], atol=1e-5, rtol=1e-5)
        assert torch.equal(scores.is_top1, expected["is_top1"])
        actual_gradients = gradients(vars(scores))
        torch.testing.assert_close(actual_gradients, gradients(expected), atol=1e-5, rtol=1e-5)
        assert all((gradient is None) == frozen for gradient in actual_gradients[1:])


@pytest.mark.parametrize("slice_logits", [2**26, 12])
@pytest.mark.parametrize("entropy_grad", [True, False])
@pytest.mark.parametrize("cap", [None, 2.0])
def test_gradients_equal_differences(slice_logits, entropy_grad, cap, monkeypatch):
    monkeypatch.setattr(logprobs, "MIN_TILE_WIDTH", 4)
    head, hidden, labels = _toy_batch(vocabulary=7, width=2, dtype=torch.float64)
    model = _Toy(head, 1.5, cap)

    def scores(*inputs):
        found, _ = label_scores(
            model, {"hidden": hidden}, labels, temperature=0.7, want=("entropy", "mean_logps"),
            entropy_grad=entropy_grad, max_slice_logits=slice_logits,
        )  # fmt: skip
        return found.logps, found.mean_logps, *([found.entropy] if entropy_grad else [])

    assert torch.autograd.gradcheck(scores, (hidden, head.weight, head.bias))


def test_gradients_of_given_logits_equal_differences():
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 7, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[0, 3, IGNORE_INDEX, 6], [IGNORE_INDEX, 1, 2, 2]])

    def scores(logits):
        found = scores_from_logits(
            logits[:, 1:], labels[:, 1:], temperature=0.7, want=("entropy", "mean_logps"), entropy_grad=True
        )
        return found.logps, found.mean_logps, found.entropy

    assert torch.autograd.gradcheck(scores, (logits,))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("slice_logits", [2**26, 700])
def test_gradients_of_a_model_equal_those_through_full_logits(tied, slice_logits, tiny_model_factory, tiny_tokenizer):
    model = tiny_model_factory()
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    inputs, labels = _batch(tiny_tokenizer)
    gradients = []
    for ours in (True, False):
        model.zero_grad()
        if ours:
            logps = label_scores(model, inputs, labels, max_slice_logits=slice_logits)[0].logps
        else:
            logps = _reference(model(**inputs).logits[:, :-1], labels[:, 1:])["logps"]
        logps.sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert ("lm_head.weight" in gradients[0]) != tied
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


def test_a_second_backward_pass_gives_the_same_gradients():
    head, hidden, labels = _toy_batch()
    logps = label_scores(_Toy(head), {"hidden": hidden}, labels)[0].logps.sum()
    inputs = [hidden, head.weight, head.bias]
    first, second = (torch.autograd.grad(logps, inputs, retain_graph=True) for _ in range(2))
    torch.testing.assert_close(first, second)
    assert first[1].abs().sum() > 0


def test_forbidden_tokens_have_no_gradient(monkeypatch):
    monkeypatch.setattr(logprobs, "MIN_TILE_WIDTH", 4)
    head, hidden, labels = _toy_batch()
    head.bias.data[:5] = float("-inf")  # all of the first tile below
    labels = labels.clamp(max=5) + 5 * (labels >= 0)
    allowed = torch.nn.Linear(5, 6)
    allowed.weight.data, allowed.bias.data = head.weight.data[5:], head.bias.data[5:]
    found = []
    for model, targets, slice_logits in ((_Toy(head), labels, 12), (_Toy(allowed), labels - 5 * (labels > 0), 2**26)):
        scores, _ = label_scores(
            model, {"hidden": hidden}, targets, want=("entropy", "log_sum_sq_probs"), entropy_grad=True,
            max_slice_logits=slice_logits,
        )  # fmt: skip
        hidden.grad = None
        (scores.logps + scores.entropy).sum().backward()
        found.append((scores.logps, scores.entropy, scores.log_sum_sq_probs, hidden.grad))
    torch.testing.assert_close(*found)
    assert head.weight.grad[:5].abs().sum() == 0


def test_of_equal_logits_the_first_is_the_most_likely(monkeypatch):
    logits = torch.tensor([[1.0, 2.0, 2.0], [2.0, 2.0, 0.0], [2.0, 2.0, 2.0]]).repeat(1, 1, 1)
    for labels, expected in (([1, 0, 0], [True] * 3), ([2, 1, 2], [False] * 3)):
        scores = scores_from_logits(logits, torch.tensor([labels]), want=("is_top1",))
        assert scores.is_top1.tolist() == [expected]
    # The same across tiles of one column each.
    monkeypatch.setattr(logprobs, "MIN_TILE_WIDTH", 1)
    head = torch.nn.Linear(3, 3, bias=False)
    head.weight.data = logits[0].T.clone()
    hidden = torch.eye(3)[[0, 1, 2, 0]].unsqueeze(0)
    for labels, expected in (([0, 1, 0, 0], [True] * 3), ([0, 2, 1, 2], [False] * 3)):
        scores, _ = label_scores(
            _Toy(head), {"hidden": hidden}, torch.tensor([labels]), want=("is_top1",), max_slice_logits=1
        )
        assert scores.is_top1.tolist() == [expected]


@pytest.mark.parametrize("slice_logits", [2**26, 30])
def test_half_precision_projects_in_half_and_normalizes_in_float32(slice_logits):
    head, hidden, labels = _toy_batch(vocabulary=50, width=64)
    # Logits of a sure model: most labels have p near 1, where 1 - p would be lost if it were rounded to bfloat16.
    head.weight.data *= 20
    head, hidden = head.bfloat16(), hidden.detach().bfloat16().requires_grad_()
    labels[1, 1:] = head(hidden)[1, :-1].argmax(-1)
    scores, _ = label_scores(_Toy(head), {"hidden": hidden}, labels, want=ALL, max_slice_logits=slice_logits)
    scores.logps.sum().backward()

    logits = head(hidden.detach())
    assert logits.dtype == torch.bfloat16 and scores.logps.dtype == torch.float32
    logits = logits.detach().double().requires_grad_()
    expected = _reference(logits[:, :-1], labels[:, 1:])
    expected["logps"].sum().backward()
    for name in NUMBERS:
        torch.testing.assert_close(getattr(scores, name).double(), expected[name], atol=2e-5, rtol=1e-5)
    exact = logits.grad @ head.weight.double()
    torch.testing.assert_close(hidden.grad.double(), exact, atol=0.01 * exact.abs().max().item(), rtol=0.02)
    sure = exact[1, :-1].norm(dim=-1)
    assert sure.min() < 0.01 * exact.norm(dim=-1).max()
    torch.testing.assert_close(hidden.grad[1, :-1].double().norm(dim=-1), sure, rtol=0.02, atol=1e-4)
    exact = logits.grad.flatten(0, 1).T @ hidden.detach().double().flatten(0, 1)
    torch.testing.assert_close(head.weight.grad.double(), exact, atol=0.01 * exact.abs().max().item(), rtol=0.02)


def test_products_of_tiles_are_summed_in_float32():
    head = torch.nn.Linear(1, 3, bias=False, dtype=torch.bfloat16)
    head.weight.data.zero_()
    hidden = torch.ones(1, 601, 1, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.zeros(1, 601, dtype=torch.long)
    # One row a tile: each adds 1 - 1/3 to the first weight's gradient. A sum in bfloat16 stops growing near 256 * 2/3.
    label_scores(_Toy(head), {"hidden": hidden}, labels, max_slice_logits=3)[0].logps.sum().backward()
    assert head.weight.grad.flatten().tolist() == pytest.approx([400, -200, -200], rel=0.01)


class _Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.size = max([self.size, *(leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))])
        return result


@pytest.mark.parametrize("way", ["plain", "called"])
def test_no_tensor_grows_with_batch_and_vocabulary(way, tiny_model_factory):
    model = tiny_model_factory(vocab_size=2048)
    if way == "called":
        model.lm_head.register_forward_hook(lambda module, args, output: None)
    ids = torch.randint(2048, (4, 64))
    with _Largest() as largest:
        scores, _ = label_scores(model, {"input_ids": ids}, ids, want=ALL, max_slice_logits=16 * 2048)
        (scores.logps + scores.mean_logps).sum().backward()
    # The weight's gradient is the largest; a tile has 16 x 2048 logits, and the full logits would have 256 x 2048.
    assert largest.size == model.lm_head.weight.numel() < 64 * 2048


class _Int8Linear(torch.nn.Module):
    """A head whose weight is stored as whole numbers."""

    def __init__(self, linear):
        super().__init__()
        self.scale = linear.weight.detach().abs().max() / 127
        self.weight = torch.nn.Parameter((linear.weight.detach() / self.scale).round().char(), requires_grad=False)

    def forward(self, hidden):
        return hidden @ (self.weight.to(hidden.dtype) * self.scale).T


class _Doubled(torch.nn.Linear):
    def forward(self, hidden):
        return 2 * super().forward(hidden)


@pytest.mark.parametrize("kind", ["hook", "forward", "subclass", "quantized", "modules_to_save", "parametrized"])
def test_heads_that_do_more_than_multiply_are_called(kind, tiny_model_factory, tiny_tokenizer):
    torch.manual_seed(0)
    model = tiny_model_factory()
    head = model.lm_head
    if kind == "hook":
        head.register_forward_hook(lambda module, args, output: 2 * output)
    elif kind == "forward":
        forward = head.forward
        head.forward = lambda hidden: 2 * forward(hidden)
    elif kind == "subclass":
        model.lm_head = _Doubled(head.in_features, head.out_features, bias=False)
    elif kind == "quantized":
        model.lm_head = _Int8Linear(head)
    elif kind == "parametrized":
        torch.nn.utils.parametrizations.weight_norm(head)
    else:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
        model.base_model.model.lm_head.modules_to_save["default"].weight.data += 1
    inputs, labels = _batch(tiny_tokenizer)
    gradients = []
    for ours in (True, False):
        model.zero_grad()
        if ours:
            scores, _ = label_scores(model, inputs, labels, want=ALL, max_slice_logits=1000)
            logps = scores.logps
        else:
            expected = _reference(model(**inputs).logits[:, :-1], labels[:, 1:])
            logps = expected["logps"]
        logps.sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    for name in NUMBERS:
        torch.testing.assert_close(getattr(scores, name), expected[name], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)
    assert gradients[0]


def test_fp32_head_of_a_half_precision_model(tiny_model_factory, tiny_tokenizer):
    model = tiny_model_factory().bfloat16()
    inputs, labels = _batch(tiny_tokenizer)
    scores, _ = label_scores(model, inputs, labels, fp32_head=True)
    hidden = model.model(**inputs).last_hidden_state
    expected = _reference((hidden.float() @ model.lm_head.weight.float().T)[:, :-1], labels[:, 1:])
    torch.testing.assert_close(scores.logps, expected["logps"], atol=1e-5, rtol=1e-5)
    scores.logps.sum().backward()
    assert model.lm_head.weight.grad.dtype == torch.bfloat16


# Each of two processes scores its batch; the averaged gradients must be those of one process with both batches.
_SHARDED = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM
from outspoken.trainers.logprobs import label_scores

kind, tied = sys.argv[1], sys.argv[2] == "tied"
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()

def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        tie_word_embeddings=tied,
    ))

def score(model, rank):
    ids = torch.randint(64, (2, 8), generator=torch.Generator().manual_seed(rank))
    labels, settings = ids.clone(), {}
    if kind == "slices":  # five for the first process, two for the second
        labels[:, 3:] = -100 if rank == 1 else ids[:, 3:]
        settings = {"max_slice_logits": 3 * 64}
    return label_scores(model, {"input_ids": ids}, labels, **settings)[0].logps.sum()

whole = model()
for process in range(2):
    (score(whole, process) / 2).backward()

sharded = model()
decoder, mesh = sharded.model, init_device_mesh("cpu", (2,))
for layer in decoder.layers:
    fully_shard(layer, mesh=mesh)
if kind == "tail":  # as Accelerate does
    if not tied:
        fully_shard(decoder.embed_tokens, mesh=mesh)
    tail = [decoder.norm, *([decoder.embed_tokens] if tied else []), sharded.lm_head]
    fully_shard(tail, mesh=mesh, reshard_after_forward=False)
elif kind in ("head", "slices"):
    fully_shard(sharded.lm_head, mesh=mesh)
fully_shard(sharded, mesh=mesh, reshard_after_forward=True if kind == "resharded" else None)
for _ in range(2):  # what is left gathered by a step must not disturb the next
    sharded.zero_grad()
    with torch.no_grad():
        score(sharded, rank)
    score(sharded, rank).backward()
for (name, parameter), reference in zip(sharded.named_parameters(), whole.parameters()):
    gradient = parameter.grad.full_tensor()
    assert reference.grad.abs().sum() > 0
    torch.testing.assert_close(gradient, reference.grad, atol=1e-5, rtol=1e-5, msg=lambda m: f"{name}: {m}")
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("case", ["root untied", "root tied", "tail untied", "tail tied", "head untied",
                                  "slices untied", "resharded untied", "resharded tied"])  # fmt: skip
def test_fsdp2_averages_the_gradients_of_the_processes(case, tmp_path):
    script = tmp_path / "sharded.py"
    script.write_text(_SHARDED)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), *case.split()], env={**os.environ, **environment, "RANK": str(rank)},
            stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
