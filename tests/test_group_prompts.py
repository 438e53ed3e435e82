"""A group's prompt computed once: every completion's scores and all gradients as in a row of its own, or a refusal."""

import copy
import logging

import pytest
import torch
import transformers as tf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from outspoken.trainers.group_prompts import (
    grouped_completions,
    grouping_settings,
    lay_out,
    needed_rows,
    plain_completions,
    plan_rows,
    why_not_grouped,
)
from outspoken.trainers.logprobs import label_scores

PAD = 0
VOCAB = 40
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.3,  # attention that matters, so that a wrong mask shows
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADS = {**SIZES, "head_dim": 8}
EAGER = {"attn_implementation": "eager"}


def _build(model_class, config, seed=0):
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return model_class(config).eval()


MODELS = {
    "llama": lambda **own: _build(tf.LlamaForCausalLM, tf.LlamaConfig(**SIZES, **own)),
    "qwen2": lambda **own: _build(tf.Qwen2ForCausalLM, tf.Qwen2Config(**SIZES, **own)),
    "qwen3": lambda **own: _build(tf.Qwen3ForCausalLM, tf.Qwen3Config(**HEADS, **own)),
    "gemma2": lambda sliding_window=64, **own: _build(
        tf.Gemma2ForCausalLM, tf.Gemma2Config(**HEADS, sliding_window=sliding_window, **own)
    ),
    "gemma3": lambda sliding_window=64, **own: _build(
        tf.Gemma3ForCausalLM,
        tf.Gemma3TextConfig(
            **HEADS, sliding_window=sliding_window, layer_types=["sliding_attention", "full_attention"], **own
        ),
    ),
    "mistral": lambda sliding_window=64, **own: _build(
        tf.MistralForCausalLM, tf.MistralConfig(**SIZES, sliding_window=sliding_window, **own)
    ),
    "gpt2": lambda **own: _build(
        tf.GPT2LMHeadModel,
        tf.GPT2Config(
            vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3, **own
        ),
    ),
    "mixtral": lambda **own: _build(
        tf.MixtralForCausalLM, tf.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, **own)
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def models():
    """Name -> model of `MODELS`, "-eager" behind it for eager attention, built once; who changes one takes a copy."""
    built = {}

    def get(name):
        if name not in built:
            base, _, eager = name.partition("-")
            built[name] = MODELS[base](**(EAGER if eager else {}))
        return built[name]

    return get


@pytest.fixture(autouse=True)
def _quiet():
    logging.getLogger("transformers").setLevel(logging.ERROR)


def draw(groups, seed=0, vocabulary=VOCAB):
    """`(prompt, completion)` token lists from `(tokens of the prompt, [tokens of each completion])`, shuffled."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(count):
        return torch.randint(3, vocabulary, (count,), generator=generator).tolist()

    rows = [(prompt, tokens(n)) for p, lengths in groups for prompt in [tokens(p)] for n in lengths]
    return [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]


def padded(rows, more=0):
    """The four tensors of a batch: prompts padded on the left, completions on the right."""
    p = max(len(prompt) for prompt, _ in rows) + more
    t = max(len(completion) for _, completion in rows) + more
    prompt_ids, completion_ids = torch.full((len(rows), p), PAD), torch.full((len(rows), t), PAD)
    prompt_mask, completion_mask = torch.zeros_like(prompt_ids), torch.zeros_like(completion_ids)
    for i, (prompt, completion) in enumerate(rows):
        if prompt:
            prompt_ids[i, -len(prompt) :], prompt_mask[i, -len(prompt) :] = torch.tensor(prompt), 1
        completion_ids[i, : len(completion)] = torch.tensor(completion, dtype=torch.long)
        completion_mask[i, : len(completion)] = 1
    return prompt_ids, prompt_mask, completion_ids, completion_mask


@pytest.fixture
def always(monkeypatch):
    """Group even where that costs more."""
    monkeypatch.setattr("outspoken.trainers.group_prompts.MAX_COST_SHARE", 1e9)


def alone(model, rows):
    """Log-probabilities and entropies of each completion's tokens, from a pass of its own without any padding."""
    found = []
    for prompt, completion in rows:
        if not completion or len(prompt + completion) < 2:
            found.append((torch.zeros(0), torch.zeros(0)))
            continue
        logps = model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
        places = torch.arange(max(len(prompt), 1), len(prompt + completion))
        before = logps[places - 1]
        targets = torch.tensor(prompt + completion)[places]
        found.append((before.gather(1, targets[:, None])[:, 0], -(before.exp() * before).sum(1)))
    return found


def scored(model, batch):
    scores, _ = label_scores(model, batch.inputs, batch.labels, want=("entropy",), entropy_grad=True)
    return batch.take(scores.logps), batch.take(scores.entropy)


def gradients(model, loss):
    model.zero_grad()
    if loss.requires_grad:
        loss.backward()
    zero = torch.zeros(())
    return {n: zero if p.grad is None else p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def weighed(values):
    """A scalar in which every element has a weight of its own."""
    return sum((v * torch.linspace(-1.0, 1.5, v.numel()).view(v.shape)).sum() for v in values)


def assert_right(model, rows, batch):
    """Scores and gradients of a batch are those of each completion alone."""
    expected = alone(model, rows)
    logps, entropy = scored(model, batch)
    assert logps.shape == batch.mask.shape
    assert batch.mask.sum(1).tolist() == [len(values) for values, _ in expected]
    for i, (own_logps, own_entropy) in enumerate(expected):
        mask = batch.mask[i]
        torch.testing.assert_close(logps[i][mask], own_logps, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(entropy[i][mask], own_entropy, atol=1e-5, rtol=1e-5)
        assert (logps[i][~mask] == 0).all() and (entropy[i][~mask] == 0).all()
    own = gradients(model, sum((weighed(pair) for pair in expected), torch.zeros(())))
    ours = gradients(model, sum(weighed((x[m], y[m])) for x, y, m in zip(logps, entropy, batch.mask)))
    for name, gradient in own.items():
        scale = max(1.0, gradient.abs().max().item())
        torch.testing.assert_close(ours[name], gradient.expand_as(ours[name]), atol=1e-5 * scale, rtol=1e-5)


# Two whole groups, a part of one, and a completion alone; one of no and some of one token.
UNEVEN = [(12, [3, 5, 0, 8, 1, 1]), (9, [4, 4, 2]), (7, [6]), (1, [2, 3])]


@pytest.mark.parametrize(
    "name",
    ["llama", "llama-eager", "qwen2", "qwen3", "gemma2-eager", "gemma3", "gemma3-eager", "mistral", "gpt2", "gpt2-eager", "mixtral"],
)  # fmt: skip
def test_scores_and_gradients_are_those_of_rows_of_their_own(models, always, name):
    model, rows = models(name), draw(UNEVEN)
    assert why_not_grouped(model, max_length=32) is None
    grouped = grouped_completions(*padded(rows), PAD, **grouping_settings(model))
    assert len(grouped.labels) < len(rows)
    assert_right(model, rows, grouped)
    assert_right(model, rows, plain_completions(*padded(rows), position_ids=True))


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        st.tuples(st.integers(1, 9), st.lists(st.integers(0, 5), min_size=1, max_size=5)), min_size=1, max_size=3
    ),
    st.integers(0, 100),
    st.integers(0, 3),
    st.booleans(),
)
def test_any_groups(models, groups, seed, more, eager):
    # Few tokens, so that completions often begin alike and some prompts are equal.
    model, rows = models("llama-eager" if eager else "llama"), draw(groups, seed, vocabulary=5)
    batch = padded(rows, more)
    assert_right(model, rows, plain_completions(*batch, position_ids=True))
    forced = pytest.MonkeyPatch()
    forced.setattr("outspoken.trainers.group_prompts.MAX_COST_SHARE", 1e9)
    try:
        grouped = grouped_completions(*batch, PAD, **grouping_settings(model))
    finally:
        forced.undo()
    if not any(completion for _, completion in rows):
        assert grouped is None
        return
    assert_right(model, rows, grouped)
