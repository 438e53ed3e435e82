"""Label scores against `log_softmax` written out, and against the full-logits forward of the same model."""

import pytest
import torch
from torch.nn.functional import log_softmax

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
