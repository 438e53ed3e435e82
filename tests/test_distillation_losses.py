"""The divergence between two models: against TRL, against formulas written out here, and its own gradients."""

import math
from itertools import pairwise

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

from outspoken.trainers.losses import distillation
from outspoken.trainers.losses.distillation import generalised_jsd, label_divergence, sparse_jsd

BETAS = [0.0, 0.1, 0.5, 1.0]


def logits(*shape, seed=0, scale=3.0, dtype=torch.float64):
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def kl(p, q):
    return (p * (p / q).log()).sum(-1)


def by_hand(student, teacher, beta):
    """The definition on probabilities."""
    if beta == 0.0:
        return kl(teacher, student)
    if beta == 1.0:
        return kl(student, teacher)
    mixture = (1 - beta) * student + beta * teacher
    return beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)


# ---------------------------------------------------------------------- of logits


def test_four_numbers_by_hand():
    # S = (1/2, 1/2), T = (3/4, 1/4): M at 1/2 is (5/8, 3/8).
    s, t = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.75, 0.25]).log()
    forward = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    reverse = 0.5 * math.log(2 / 3) + 0.5 * math.log(2)
    middle = 0.5 * (0.75 * math.log(6 / 5) + 0.25 * math.log(2 / 3) + 0.5 * math.log(4 / 5) + 0.5 * math.log(4 / 3))
    for beta, expected in ((0.0, forward), (1.0, reverse), (0.5, middle)):
        assert generalised_jsd(s, t, beta).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
def test_definition(beta, temperature):
    s, t = logits(5, 11), logits(5, 11, seed=1)
    expected = by_hand((s / temperature).softmax(-1), (t / temperature).softmax(-1), beta)
    torch.testing.assert_close(generalised_jsd(s, t, beta, temperature), expected)
    assert (expected > 0).all()
    torch.testing.assert_close(generalised_jsd(s, s, beta, temperature), torch.zeros(5, dtype=torch.float64))


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("add_tail", [True, False])
def test_sparse_teacher_by_hand(beta, add_tail):
    s, t = logits(4, 9), logits(4, 9, seed=1)
    top = (t / 2.0).log_softmax(-1).topk(3)
    found = sparse_jsd(s, top.indices, top.values, beta, temperature=2.0, add_tail=add_tail)

    p_s, p_t = ((x / 2.0).softmax(-1).gather(-1, top.indices) for x in (s, t))
    if add_tail:
        p_s, p_t = (torch.cat([p, 1 - p.sum(-1, keepdim=True)], -1) for p in (p_s, p_t))
    else:
        p_s, p_t = (p / p.sum(-1, keepdim=True) for p in (p_s, p_t))
    torch.testing.assert_close(found, by_hand(p_s, p_t, beta))


@pytest.mark.parametrize("beta", BETAS)
def test_a_teacher_known_at_all_tokens_is_no_sparse_one(beta):
    s, t = logits(4, 6), logits(4, 6, seed=1)
    top = t.log_softmax(-1).topk(6)
    torch.testing.assert_close(sparse_jsd(s, top.indices, top.values, beta), generalised_jsd(s, t, beta))
    # More tokens tell more: merging tokens into a tail never makes distributions differ more.
    steps = [sparse_jsd(s, top.indices[:, :k], top.values[:, :k], beta) for k in (1, 2, 4, 6)]
    assert all((wider >= narrower - 1e-12).all() for narrower, wider in pairwise(steps))


def test_forbidden_tokens_give_finite_numbers_and_gradients():
    s, t = logits(3, 5), logits(3, 5, seed=1)
    t[0, 2] = -math.inf  # the student may say it
    s[1, 3] = t[1, 3] = -math.inf
    for beta in BETAS:
        leaf = s.clone().requires_grad_()
        found = generalised_jsd(leaf, t, beta)
        found.sum().backward()
        assert found.isfinite().all() and leaf.grad.isfinite().all()
    without = torch.tensor([0, 1, 2, 4])
    torch.testing.assert_close(generalised_jsd(s, t, 0.5)[1], generalised_jsd(s[:, without], t[:, without], 0.5)[1])


# ---------------------------------------------------------------------- of two models


@pytest.fixture
def pair(tiny_model_factory):
    """A student and a teacher of another width, in evaluation mode."""
    return tiny_model_factory(seed=1).eval(), tiny_model_factory(seed=2, hidden_size=48).eval()


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(4, 300, (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    labels = ids.clone()
    labels[:, :4] = -100
    labels[2, 7:] = -100
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": position_ids, "use_cache": False}, labels


def weights(labels):
    return torch.linspace(0.5, 1.5, labels[:, 1:].numel()).view(labels[:, 1:].shape)


def expected_by_full_logits(student, teacher, inputs, labels, compare):
    """Divergence (B, T - 1) and the gradients of its weighted sum, from whole logits and autograd."""
    student.zero_grad()
    s = student(**inputs).logits[:, -labels.size(1) :][:, :-1]
    with torch.no_grad():
        t = teacher(**inputs).logits[:, :-1]
    mask = labels[:, 1:] != -100
    divergence = compare(s, t).masked_fill(~mask, 0.0)
    (divergence * weights(labels)).sum().backward()
    return divergence.detach(), s.detach(), t, mask, grads(student)


def grads(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected, student, expected_grads, labels, rtol=1e-4, atol=1e-5):
    student.zero_grad()
    torch.testing.assert_close(found.divergence[:, -expected.size(1) :].detach(), expected, rtol=rtol, atol=atol)
    (found.divergence[:, -expected.size(1) :] * weights(labels)).sum().backward()
    of_student = grads(student)
    assert of_student.keys() == expected_grads.keys() and of_student
    for name, grad in expected_grads.items():
        torch.testing.assert_close(of_student[name], grad, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("max_slice_logits", [2**26, 3000], ids=["one tile", "several tiles"])
def test_models_equal_whole_logits(pair, batch, beta, max_slice_logits):
    student, teacher = pair
    inputs, labels = batch
    expected, s, t, mask, expected_grads = expected_by_full_logits(
        student, teacher, inputs, labels, lambda s, t: generalised_jsd(s, t, beta, 0.7)
    )
    found, output = label_divergence(
        student, teacher, inputs, labels, beta=beta, temperature=0.7, max_slice_logits=max_slice_logits
    )
    assert output.logits.shape == (3, 1, 300)
    assert_same(found, expected, student, expected_grads, labels)
    assert not grads(teacher)

    p_s, p_t = (s / 0.7).softmax(-1).double(), (t / 0.7).softmax(-1).double()
    at = labels[:, 1:].clamp(min=0).unsqueeze(-1)
    for name, value in {
        "forward_kl": kl(p_t, p_s),
        "reverse_kl": kl(p_s, p_t),
        "entropy": -(p_s * p_s.log()).sum(-1),
        "teacher_entropy": -(p_t * p_t.log()).sum(-1),
        "same_top1": (p_s.argmax(-1) == p_t.argmax(-1)).double(),
        "logps": p_s.gather(-1, at).squeeze(-1).log(),
        "teacher_logps": p_t.gather(-1, at).squeeze(-1).log(),
    }.items():
        torch.testing.assert_close(
            getattr(found, name).double(), value * mask, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
        assert not getattr(found, name).requires_grad


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_equal_to_trl(pair, batch, beta):
    student, teacher = pair
    inputs, labels = batch
    mask = labels[:, 1:] != -100
    hidden = student.model(**inputs).last_hidden_state[:, :-1][mask]
    with torch.no_grad():
        of_teacher = teacher.model(**inputs).last_hidden_state[:, :-1][mask]
    expected, entropy = ChunkedDivergenceFunction.apply(
        hidden, student.lm_head.weight, None, of_teacher, teacher.lm_head.weight, None, beta, 1.3
    )
    (expected * weights(labels)[mask]).sum().backward()
    expected_grads = grads(student)

    found, _ = label_divergence(student, teacher, inputs, labels, beta=beta, temperature=1.3)
    torch.testing.assert_close(found.entropy[mask], entropy, rtol=1e-5, atol=1e-5)
    full = torch.zeros(mask.shape).masked_scatter(mask, expected.detach())
    assert_same(found, full, student, expected_grads, labels, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("add_tail", [True, False])
@pytest.mark.parametrize("max_slice_logits", [2**26, 3000], ids=["one tile", "several tiles"])
def test_sparse_teacher_model(pair, batch, beta, add_tail, max_slice_logits):
    student, teacher = pair
    inputs, labels = batch

    def compare(s, t):
        top = (t / 1.5).log_softmax(-1).topk(4)
        return sparse_jsd(s, top.indices, top.values, beta, 1.5, add_tail)

    expected, *_, expected_grads = expected_by_full_logits(student, teacher, inputs, labels, compare)
    found, _ = label_divergence(
        student,
        teacher,
        inputs,
        labels,
        beta=beta,
        temperature=1.5,
        top_k=4,
        add_tail=add_tail,
        max_slice_logits=max_slice_logits,
    )
    assert_same(found, expected, student, expected_grads, labels)


def test_top_k_of_the_whole_vocabulary_is_all_of_it(pair, batch):
    whole, _ = label_divergence(*pair, *batch, beta=0.5)
    wide, _ = label_divergence(*pair, *batch, beta=0.5, top_k=5000)
    torch.testing.assert_close(whole.divergence, wide.divergence)


def scaling_pair(kind):
    sizes = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.5,
    }
    torch.manual_seed(0)
    if kind == "cohere":
        return tuple(CohereForCausalLM(CohereConfig(**sizes, logit_scale=scale)).eval() for scale in (0.5, 0.25))
    caps = {"head_dim": 8, "query_pre_attn_scalar": 8}
    return tuple(
        Gemma2ForCausalLM(Gemma2Config(**sizes, **caps, final_logit_softcapping=cap)).eval() for cap in (2.0, 3.0)
    )


@pytest.mark.parametrize("kind", ["cohere", "gemma2"])
@pytest.mark.parametrize("max_slice_logits", [2**26, 3000], ids=["one tile", "several tiles"])
def test_scaled_and_capped_logits(batch, kind, max_slice_logits):
    student, teacher = scaling_pair(kind)
    inputs, labels = batch
    for beta in (0.0, 0.5, 1.0):
        expected, *_, expected_grads = expected_by_full_logits(
            student, teacher, inputs, labels, lambda s, t, b=beta: generalised_jsd(s, t, b, 0.5)
        )
        found, _ = label_divergence(
            student, teacher, inputs, labels, beta=beta, temperature=0.5, max_slice_logits=max_slice_logits
        )
        assert_same(found, expected, student, expected_grads, labels)


class OddLogits(nn.Module):
    """A model whose logits are not what its head gives."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config

    def get_output_embeddings(self):
        return self.model.lm_head

    def forward(self, **inputs):
        output = self.model(**inputs)
        output.logits = output.logits * 0.5 + 0.1
        return output


@pytest.mark.parametrize("odd", ["student", "teacher", "both"])
def test_models_that_change_their_logits_elsewhere(pair, batch, odd):
    student, teacher = pair
    student = OddLogits(student) if odd in ("student", "both") else student
    teacher = OddLogits(teacher) if odd in ("teacher", "both") else teacher
    inputs, labels = batch
    expected, *_, expected_grads = expected_by_full_logits(
        student, teacher, inputs, labels, lambda s, t: generalised_jsd(s, t, 0.5)
    )
    found, output = label_divergence(student, teacher, inputs, labels, beta=0.5, max_slice_logits=3000)
    assert output.logits.shape[:2] == (3, 1)
    assert_same(found, expected, student, expected_grads, labels)


@pytest.mark.parametrize("on", ["student", "teacher"])
@pytest.mark.parametrize("max_slice_logits", [2**26, 3000], ids=["one slice", "several slices"])
def test_adapter_on_the_head(tiny_model_factory, batch, on, max_slice_logits):
    student, teacher = tiny_model_factory(seed=1), tiny_model_factory(seed=2)
    config = LoraConfig(target_modules=["q_proj", "lm_head"], r=2, init_lora_weights=False)
    if on == "student":
        student = get_peft_model(student, config).eval()
    else:
        teacher = get_peft_model(teacher, config).eval()
    inputs, labels = batch
    expected, *_, expected_grads = expected_by_full_logits(
        student, teacher, inputs, labels, lambda s, t: generalised_jsd(s, t, 0.5)
    )
    found, _ = label_divergence(student, teacher, inputs, labels, beta=0.5, max_slice_logits=max_slice_logits)
    assert_same(found, expected, student, expected_grads, labels)
    if on == "student":
        assert any("lm_head.lora_B" in name for name in expected_grads)


def test_prompt_learning_shifts_the_student_only(tiny_model_factory, batch):
    student = get_peft_model(tiny_model_factory(seed=1), PromptTuningConfig("CAUSAL_LM", num_virtual_tokens=3)).eval()
    teacher = tiny_model_factory(seed=2).eval()
    inputs, labels = batch
    inputs = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    expected, *_, expected_grads = expected_by_full_logits(
        student, teacher, inputs, labels, lambda s, t: generalised_jsd(s, t, 1.0)
    )
    found, _ = label_divergence(student, teacher, inputs, labels, beta=1.0)
    assert found.divergence.shape == (3, 8 + 3) and not found.mask[:, :3].any()
    assert_same(found, expected, student, expected_grads, labels)


@pytest.mark.parametrize("sizes", [(320, 300), (300, 320)])
@pytest.mark.parametrize("max_slice_logits", [2**26, 3000])
def test_embeddings_padded_to_different_sizes(tiny_model_factory, batch, sizes, max_slice_logits):
    student, teacher = (
        tiny_model_factory(seed=seed, vocab_size=size, tie_word_embeddings=False).eval()
        for seed, size in zip((1, 2), sizes)
    )
    inputs, labels = batch
    expected, *_, expected_grads = expected_by_full_logits(
        student, teacher, inputs, labels, lambda s, t: generalised_jsd(s[..., :300], t[..., :300], 0.5)
    )
    found, _ = label_divergence(student, teacher, inputs, labels, beta=0.5, max_slice_logits=max_slice_logits)
    assert_same(found, expected, student, expected_grads, labels)


def test_bfloat16_is_compared_in_float32(pair, batch):
    inputs, labels = batch
    student, teacher = (model.to(torch.bfloat16) for model in pair)
    with torch.no_grad():
        s, t = (
            (model.model(**inputs).last_hidden_state.float() @ model.lm_head.weight.float().t())[:, :-1]
            for model in (student, teacher)
        )
    mask = labels[:, 1:] != -100
    found, _ = label_divergence(student, teacher, inputs, labels, beta=1.0)
    torch.testing.assert_close(found.divergence[mask].detach(), generalised_jsd(s, t, 1.0)[mask], rtol=1e-5, atol=1e-5)
    found.divergence.sum().backward()
    assert all(p.grad is None or p.grad.dtype == torch.bfloat16 for p in student.parameters())

    same, _ = label_divergence(student, student, inputs, labels, beta=1.0)
    assert same.divergence.abs().max() < 1e-6


def test_nothing_to_compare_gives_zero_gradients(pair, batch):
    inputs, labels = batch
    found, _ = label_divergence(*pair, inputs, torch.full_like(labels, -100), beta=0.5)
    found.divergence.sum().backward()
    assert found.divergence.abs().sum() == 0
    assert all((grad == 0).all() for grad in grads(pair[0]).values()) and grads(pair[0])


def test_no_gradient_leaves_no_graph(pair, batch):
    with torch.no_grad():
        found, _ = label_divergence(*pair, *batch, beta=0.5)
    assert not found.divergence.requires_grad


def test_a_second_backward_pass(pair, batch):
    student, teacher = pair
    found, _ = label_divergence(student, teacher, *batch, beta=0.5)
    found.divergence.sum().backward(retain_graph=True)
    first = grads(student)
    student.zero_grad()
    found.divergence.sum().backward()
    for name, grad in grads(student).items():
        torch.testing.assert_close(grad, first[name])


@pytest.mark.parametrize(("setting", "message"), [({"temperature": 0.0}, "temperature"), ({"top_k": 0}, "top_k")])
def test_impossible_settings(pair, batch, setting, message):
    with pytest.raises(ValueError, match=message):
        label_divergence(*pair, *batch, beta=0.5, **setting)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("top_k", "add_tail"), [(None, True), (3, True), (3, False)])
@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("max_slice_logits", [2**26, 22], ids=["one tile", "several tiles"])
def test_gradcheck(beta, top_k, add_tail, cap, max_slice_logits):
    number, hidden, vocabulary = 4, 3, 11
    states = logits(2, 3, hidden, scale=1.0).requires_grad_()
    weight = logits(vocabulary, hidden, seed=1, scale=1.0).requires_grad_()
    bias = logits(vocabulary, seed=2, scale=0.1).requires_grad_()
    teacher = logits(number, vocabulary, seed=3)
    index = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 2, 1, 2])
    targets = torch.tensor([1, 5, 0, 10])
    how = distillation._How(beta, 0.8, top_k, add_tail, vocabulary, max_slice_logits, torch.float64, 1.7, cap)

    def divergence(states, weight, bias):
        found = distillation._compare(states, index, targets, how, lambda rows, like: teacher[rows], weight, bias)
        return found[0]

    assert torch.autograd.gradcheck(divergence, (states, weight, bias))
