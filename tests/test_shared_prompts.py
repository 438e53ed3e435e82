"""Prompts computed once: every answer's scores and all gradients as in rows of their own, or a refusal that says why."""

import copy
import logging

import pytest
import torch
import transformers as tf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from outspoken.trainers.logprobs import label_scores
from outspoken.trainers.shared_prompts import (
    mask_dtype_of,
    plain_batch,
    saves_enough,
    shared_batch,
    shared_ends,
    why_not_shared,
)

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
SMALL_HEADS = {**SIZES, "head_dim": 8}


def _build(model_class, config, seed=0):
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return model_class(config).eval()


def _without(fields, *names):
    return {name: value for name, value in fields.items() if name not in names}


MODELS = {
    "llama": lambda: _build(tf.LlamaForCausalLM, tf.LlamaConfig(**SIZES)),
    "llama-eager": lambda: _build(tf.LlamaForCausalLM, tf.LlamaConfig(**SIZES, attn_implementation="eager")),
    "qwen2": lambda: _build(tf.Qwen2ForCausalLM, tf.Qwen2Config(**SIZES)),
    "qwen3": lambda: _build(tf.Qwen3ForCausalLM, tf.Qwen3Config(**SMALL_HEADS)),
    "gemma2": lambda: _build(tf.Gemma2ForCausalLM, tf.Gemma2Config(**SMALL_HEADS, sliding_window=64)),
    "gemma3": lambda: _build(tf.Gemma3ForCausalLM, tf.Gemma3TextConfig(**SMALL_HEADS, sliding_window=64)),
    "mistral": lambda: _build(tf.MistralForCausalLM, tf.MistralConfig(**SIZES, sliding_window=64)),
    "gpt2": lambda: _build(
        tf.GPT2LMHeadModel,
        tf.GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3),
    ),
    "gpt-neox": lambda: _build(tf.GPTNeoXForCausalLM, tf.GPTNeoXConfig(**_without(SIZES, "num_key_value_heads"))),
    "mixtral": lambda: _build(
        tf.MixtralForCausalLM, tf.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
    ),
    "opt": lambda: _build(
        tf.OPTForCausalLM,
        tf.OPTConfig(
            vocab_size=VOCAB, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2,
            word_embed_proj_dim=16, max_position_embeddings=64, init_std=0.3, pad_token_id=PAD,
        ),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def models():
    """Name -> model of `MODELS`, built once; a test that changes one takes a copy."""
    built = {}

    def get(name):
        if name not in built:
            built[name] = MODELS[name]()
        return built[name]

    return get


def pairs_of(lengths, seed=0, vocabulary=VOCAB):
    """`(prompt, chosen, rejected)` token lists for triples of lengths."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count):
        return torch.randint(3, vocabulary, (count,), generator=generator).tolist()

    return [tuple(draw(length) for length in triple) for triple in lengths]


def batch_of(pairs, width=0):
    """A batch in TRL's format: chosen rows, then rejected rows, padded on the right."""
    rows = [(p, c) for p, c, _ in pairs] + [(p, r) for p, _, r in pairs]
    width = max(width, *(len(p) + len(a) for p, a in rows))
    batch = {key: torch.zeros(len(rows), width, dtype=torch.long) for key in ("attention_mask", "completion_mask")}
    batch["input_ids"] = torch.full((len(rows), width), PAD)
    for i, (p, a) in enumerate(rows):
        batch["input_ids"][i, : len(p + a)] = torch.tensor(p + a)
        batch["attention_mask"][i, : len(p + a)] = 1
        batch["completion_mask"][i, len(p) : len(p + a)] = 1
    return batch


def alone(model, pairs):
    """Log-probabilities and entropies of each answer's tokens, from a forward pass of its own without any padding.

    A first token that nothing stands before has no score.
    """
    found = []
    for prompt, answer in [(p, c) for p, c, _ in pairs] + [(p, r) for p, _, r in pairs]:
        if len(answer) == 0 or len(prompt + answer) < 2:
            found.append((torch.zeros(0), torch.zeros(0)))
            continue
        logps = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        places = torch.arange(max(len(prompt), 1), len(prompt + answer))
        targets = torch.tensor(prompt + answer)[places]
        before = logps[places - 1]
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
    return sum((value * torch.arange(1.0, value.numel() + 1).view(value.shape)).sum() for value in values)


def assert_right(model, pairs, batch):
    """Scores and gradients of a batch are those of each answer alone."""
    expected = alone(model, pairs)
    logps, entropy = scored(model, batch)
    assert batch.mask.sum(1).tolist() == [len(values) for values, _ in expected]
    for answer, (own_logps, own_entropy) in enumerate(expected):
        mask = batch.mask[answer]
        torch.testing.assert_close(logps[answer][mask], own_logps, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(entropy[answer][mask], own_entropy, atol=1e-5, rtol=1e-5)
        assert (logps[answer][~mask] == 0).all() and (entropy[answer][~mask] == 0).all()
    own = gradients(model, sum((weighed(pair) for pair in expected), torch.zeros(())))
    ours = gradients(model, sum(weighed((x[m], y[m])) for x, y, m in zip(logps, entropy, batch.mask)))
    for name, gradient in own.items():
        scale = max(1.0, gradient.abs().max().item())
        torch.testing.assert_close(ours[name], gradient.expand_as(ours[name]), atol=1e-5 * scale, rtol=1e-5)


RAGGED = [(9, 3, 5), (6, 1, 8), (12, 4, 4), (7, 6, 2)]


@pytest.mark.parametrize("name", MODELS)
def test_scores_and_gradients_are_those_of_rows_of_their_own(models, name):
    model, pairs = models(name), pairs_of(RAGGED)
    assert why_not_shared(model, max_length=32) is None
    inputs = batch_of(pairs)
    shared = shared_batch(inputs, PAD, mask_dtype=mask_dtype_of(model))
    assert shared.labels.shape[0] == len(pairs)
    assert_right(model, pairs, shared)
    assert_right(model, pairs, plain_batch(inputs))


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=4),
    st.integers(0, 100),
    st.integers(0, 3),
    st.booleans(),
)
def test_any_lengths(models, lengths, seed, more, eager):
    # Few tokens, so that answers often begin alike and prompts contain the padding token's neighbours.
    model = models("llama-eager" if eager else "llama")
    pairs = pairs_of(lengths, seed, vocabulary=6)
    if not any(p + c + r for p, c, r in pairs):
        return
    inputs = batch_of(pairs, width=max(len(p) + max(len(c), len(r)) for p, c, r in pairs) + more)
    assert_right(model, pairs, plain_batch(inputs))
    dtype = torch.float32 if eager else None
    always = pytest.MonkeyPatch()
    always.setattr("outspoken.trainers.shared_prompts.MAX_COST_SHARE", 10.0)
    try:
        assert_right(model, pairs, shared_batch(inputs, PAD, mask_dtype=dtype))
    finally:
        always.undo()


def test_the_row_is_laid_out_as_promised():
    """`p0 p1 p2 c0 c1` and `p0 p1 p2 r0` become `p0 p1 | p2 c0 c1 | p2 r0`."""
    inputs = batch_of([([11, 12, 13], [21, 22], [31]), ([14, 15, 16, 17], [23], [32])])
    shared = shared_batch(inputs, PAD)
    assert shared.inputs["input_ids"].tolist() == [[11, 12, 13, 21, 22, 13, 31], [14, 15, 16, 17, 23, 17, 32]]
    assert shared.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 4, 2, 3], [0, 1, 2, 3, 4, 3, 4]]
    assert shared.labels.tolist() == [[-100, -100, -100, 21, 22, -100, 31], [-100] * 4 + [23, -100, 32]]
    # Scores are shifted by one: column t scores token t + 1.
    assert shared.rows.tolist() == [[0, 0], [1, 1], [0, 0], [1, 1]]
    assert shared.mask.tolist() == [[True, True], [True, False], [True, False], [True, False]]
    assert shared.columns[shared.mask].tolist() == [2, 3, 3, 5, 5]
    sees = shared.inputs["attention_mask"][0, 0].int().tolist()
    assert sees == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 0, 1, 0],  # the rejected branch begins: the prompt and itself
        [1, 1, 0, 0, 0, 1, 1],
    ]


def test_take_is_differentiable_and_skips_virtual_tokens():
    batch = plain_batch(batch_of([([11, 12], [21], [31, 32])]))  # (2, 4): answers at scores 1, and 1 and 2
    values = torch.arange(10.0).view(2, 5).requires_grad_()  # 2 virtual tokens in front
    taken = batch.take(values)
    assert taken.tolist() == [[3.0, 0.0], [8.0, 9.0]]
    taken.sum().backward()
    assert values.grad.tolist() == [[0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]


def test_holes_in_the_completion_mask_are_kept(models):
    """Tokens in the middle of an answer that carry no loss (e.g. results of tools) have no score."""
    inputs = batch_of(pairs_of([(8, 5, 5)]))
    inputs["completion_mask"][:, 10] = 0
    shared, plain = shared_batch(inputs, PAD), plain_batch(inputs)
    assert shared.mask.tolist() == plain.mask.tolist() == [[True, True, False, True, True]] * 2
    model = models("llama")
    torch.testing.assert_close(scored(model, shared)[0], scored(model, plain)[0], atol=1e-5, rtol=1e-5)


def test_prompts_that_differ_and_savings_too_small_use_the_plain_batch():
    assert shared_batch(batch_of(pairs_of([(20, 4, 4)])), PAD) is not None
    other = batch_of([([5] * 20, [6] * 4, [7] * 4)])
    other["input_ids"][1, 0] = 9  # the prompts differ in the first token
    assert shared_batch(other, PAD) is None
    # A prompt of P and answers of A tokens: P - 1 + 2 (A + 1) tokens instead of 2 (P + A). Attention counts little in
    # rows much shorter than 4 x 1024 tokens.
    for prompt, answer, worth_it in ((1, 8, False), (3, 30, False), (8, 30, False), (9, 12, True), (40, 9, True)):
        batch = shared_batch(batch_of(pairs_of([(prompt, answer, answer)])), PAD)
        assert (batch is not None) == worth_it
        if worth_it:
            assert batch.labels.shape == (1, prompt - 1 + 2 * (answer + 1))


def test_attention_is_part_of_the_price():
    """Cost of a token: 4 hidden sizes for all else, and its row's tokens for attention."""
    # Prompt 256 and answers of 512: 1281 tokens for 2 x 768, a share of 0.834.
    assert saves_enough(1281, 768, 4096)  # 1281 (16384 + 1281) / (2 * 768 (16384 + 768)) = 0.859
    assert not saves_enough(1281, 768, 256)  # 1281 (1024 + 1281) / (2 * 768 (1024 + 768)) = 1.073
    # Where attention is nearly all, half the tokens cost the same only below 1 / sqrt 2 of them.
    assert saves_enough(133, 100, 1) and not saves_enough(
        137, 100, 1
    )  # 133 (4 + 133) / (200 (4 + 100)) = 0.876; 0.929


def test_more_than_tokens_uses_the_plain_batch():
    inputs = batch_of(pairs_of([(20, 4, 4)])) | {"pixel_values": torch.zeros(1, 3, 2, 2)}
    assert shared_batch(inputs, PAD) is None
    plain = plain_batch(inputs)
    assert set(plain.inputs) == {"input_ids", "attention_mask", "pixel_values"}


def test_under_gradient_checkpointing(models):
    model, pairs = copy.deepcopy(models("qwen2")), pairs_of(RAGGED)
    shared = shared_batch(batch_of(pairs), PAD)
    shared.inputs["use_cache"] = False
    expected = gradients(model, weighed(scored(model, shared)))
    model.train()
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        found = gradients(model, weighed(scored(model, shared)))
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "llama-eager"])
def test_in_bfloat16_nothing_is_nan(models, name):
    """Padded rows see themselves, so no row of the softmax is empty; the rest is rounding."""
    pairs = pairs_of([(9, 3, 5), (1, 1, 0), (2, 0, 0)])
    inputs = batch_of(pairs)
    exact = scored(models(name), plain_batch(inputs))[0]
    half = copy.deepcopy(models(name)).to(torch.bfloat16)
    for model, autocast in ((models(name), True), (half, False)):
        shared = shared_batch(inputs, PAD, mask_dtype=mask_dtype_of(model))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            logps, _ = scored(model, shared)
        found = gradients(model, logps.sum())
        assert all(torch.isfinite(gradient).all() for gradient in found.values())
        torch.testing.assert_close(logps.float(), exact, atol=0.2, rtol=0.1)
    assert why_not_shared(half) is None


def test_adapters(models):
    pairs = pairs_of(RAGGED)
    model = get_peft_model(
        copy.deepcopy(models("llama")), LoraConfig(target_modules="all-linear", init_lora_weights=False)
    )
    assert why_not_shared(model) is None
    assert_right(model.eval(), pairs, shared_batch(batch_of(pairs), PAD))


# ------------------------------------------------------------------------------------------------- what is refused


def _vision():
    config = tf.Qwen2VLConfig(
        text_config={**SIZES, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]}},
        vision_config={"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 16},
    )
    return _build(tf.Qwen2VLForConditionalGeneration, config)


def _aux_loss():
    return _build(tf.MixtralForCausalLM, tf.MixtralConfig(**SIZES, num_local_experts=4, output_router_logits=True))


def _prompt_tuning():
    return get_peft_model(MODELS["llama"](), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


def _flash():
    model = MODELS["llama"]()
    model.config._attn_implementation = "flash_attention_2"
    return model


REFUSED = {
    "bloom": (lambda: _build(tf.BloomForCausalLM, tf.BloomConfig(vocab_size=VOCAB, hidden_size=16, n_layer=1, n_head=2)), "position ids"),
    "falcon-alibi": (lambda: _build(tf.FalconForCausalLM, tf.FalconConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, alibi=True)), "fails on a mask"),
    "mpt": (lambda: _build(tf.MptForCausalLM, tf.MptConfig(vocab_size=VOCAB, d_model=16, n_layers=1, n_heads=2)), "position ids"),
    "mamba": (lambda: _build(tf.MambaForCausalLM, tf.MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1)), "position ids"),
    "qwen3-next": (lambda: _build(tf.Qwen3NextForCausalLM, tf.Qwen3NextConfig(**SMALL_HEADS, num_experts=2, num_experts_per_tok=1)), "'linear_attention'"),
    "lfm2": (lambda: _build(tf.Lfm2ForCausalLM, tf.Lfm2Config(**SIZES, layer_types=["conv", "full_attention"])), "'conv'"),
    "gpt-neo": (lambda: _build(tf.GPTNeoForCausalLM, tf.GPTNeoConfig(vocab_size=VOCAB, hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]], window_size=8)), "8 tokens"),
    "router-loss": (_aux_loss, "router"),
    "prompt-tuning": (_prompt_tuning, "virtual tokens"),
    "flash": (_flash, "flash_attention_2"),
    "vision": (_vision, "more than text"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_cannot_are_refused_with_a_reason(name):
    build, reason = REFUSED[name]
    why = why_not_shared(build(), max_length=32)
    assert why is not None and reason in why, why


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "mistral"])
def test_windows_shorter_than_the_rows_are_refused_and_would_be_wrong(name):
    fields = SIZES if name == "mistral" else SMALL_HEADS
    model_class, config_class = {
        "gemma2": (tf.Gemma2ForCausalLM, tf.Gemma2Config),
        "gemma3": (tf.Gemma3ForCausalLM, tf.Gemma3TextConfig),
        "mistral": (tf.MistralForCausalLM, tf.MistralConfig),
    }[name]
    model = _build(model_class, config_class(**fields, sliding_window=16))
    assert why_not_shared(model, max_length=16) is None
    for longest in (17, None):
        assert "16 tokens" in why_not_shared(model, max_length=longest)
    pairs = pairs_of([(24, 6, 6)])
    shared = shared_batch(batch_of(pairs), PAD, mask_dtype=mask_dtype_of(model))
    own = torch.stack([logps for logps, _ in alone(model, pairs)])
    assert (scored(model, shared)[0] - own).abs().max() > 1e-3


class _IgnoresPositions(tf.LlamaForCausalLM):
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        return super().forward(input_ids, attention_mask, **kwargs)


class _IgnoresMask(tf.LlamaForCausalLM):
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        causal = torch.ones_like(input_ids) if attention_mask.dim() == 4 else attention_mask
        return super().forward(input_ids, causal, position_ids, **kwargs)


@pytest.mark.parametrize("model_class", [_IgnoresPositions, _IgnoresMask])
def test_the_trial_finds_what_the_config_does_not_tell(model_class):
    # Attention as weak as in a fresh model: what leaks is small.
    model = _build(model_class, tf.LlamaConfig(**{**SIZES, "initializer_range": 0.02}))
    assert "differ" in why_not_shared(model)


def test_the_trial_leaves_no_trace(models):
    model = copy.deepcopy(models("llama")).train()
    before = torch.random.get_rng_state()
    assert why_not_shared(model) is None
    assert torch.equal(before, torch.random.get_rng_state()) and model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_weights_that_are_not_here_are_not_tried():
    with torch.device("meta"):
        model = tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES))
    assert why_not_shared(model) is None


# ------------------------------------------------------------------------------------------- ends, for reward models


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=4),
    st.integers(0, 100),
)
def test_last_tokens_find_their_hidden_states(models, lengths, seed):
    """What is shared is what begins alike, wherever the prompt ends; also where one row is the beginning of the other."""
    model, pairs = models("llama"), pairs_of(lengths, seed, vocabulary=5)
    inputs = batch_of(pairs)
    del inputs["completion_mask"]
    always = pytest.MonkeyPatch()
    always.setattr("outspoken.trainers.shared_prompts.MAX_COST_SHARE", 10.0)
    try:
        shared_inputs, rows, columns = shared_ends(inputs, PAD)
    finally:
        always.undo()
    found = model.model(**shared_inputs).last_hidden_state[rows, columns]
    whole = [p + c for p, c, _ in pairs] + [p + r for p, _, r in pairs]
    expected = torch.cat([model.model(torch.tensor([ids])).last_hidden_state[:, -1] for ids in whole])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_ends_look_through_padding_tokens_at_the_end():
    """The last token of a sequence is the last that is no padding token, as models with a score head look for it."""
    ids = torch.tensor([[5, 6, 7, 8, 9, PAD], [5, 6, 7, 8, PAD, PAD]])
    inputs = {"input_ids": ids, "attention_mask": torch.tensor([[1] * 6, [1] * 5 + [0]])}
    found = shared_ends(inputs, PAD)
    shared_inputs, rows, columns = found
    assert shared_inputs["input_ids"][rows, columns].tolist() == [9, 8]
    # 8 belongs to what both have in common: 5 6 7 8 | 9 PAD | PAD
    assert shared_inputs["input_ids"].tolist() == [[5, 6, 7, 8, 9, PAD, PAD]]
    assert columns.tolist() == [4, 3]


@pytest.fixture(autouse=True)
def _quiet():
    logging.getLogger("transformers").setLevel(logging.ERROR)
