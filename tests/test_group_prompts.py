"""A group's prompt computed once: every completion's scores and all gradients as in a row of its own, or a refusal."""

import copy
import logging

import pytest
import torch
import transformers as tf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from outspoken.trainers.branch_mask import BranchMask
from outspoken.trainers.group_prompts import (
    attention_masks,
    grouped_completions,
    grouping_settings,
    lay_out,
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


@pytest.fixture(params=["dense", "branches"])
def always(request, monkeypatch):
    """Group even where that costs more; with sdpa by a dense mask, or by a call of attention for each branch."""
    monkeypatch.setattr("outspoken.trainers.group_prompts.MAX_COST_SHARE", 1e9)
    monkeypatch.setattr("outspoken.trainers.group_prompts.CALL_COST", 0 if request.param == "branches" else 10**9)
    return request.param


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
    if not name.endswith("eager"):
        assert isinstance(grouped.inputs["attention_mask"], BranchMask) == (always == "branches")
    assert_right(model, rows, grouped)
    assert_right(model, rows, plain_completions(*padded(rows), position_ids=True))


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
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
    forced.setattr("outspoken.trainers.group_prompts.CALL_COST", 10**9 if seed % 2 else 0)
    try:
        grouped = grouped_completions(*batch, PAD, **grouping_settings(model))
    finally:
        forced.undo()
    if not any(completion for _, completion in rows):
        assert grouped is None
        return
    assert_right(model, rows, grouped)


# ----------------------------------------------------------------------------------------------------- the layout


def test_the_row_is_laid_out_as_promised(always):
    rows = [([11, 12, 13], [21, 22, 23]), ([14, 15], [41]), ([11, 12, 13], [31, 32])]
    batch = grouped_completions(*padded(rows), PAD)
    assert batch.inputs["input_ids"].tolist() == [
        [11, 12, 13, 21, 22, 13, 31, PAD],  # 11 12 | 13 21 22 | 13 31 |
        [14, 15, PAD, PAD, PAD, PAD, PAD, PAD],
    ]
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 4, 2, 3, 0], [0, 1, 0, 0, 0, 0, 0, 0]]
    # A token's label is the next column's: 13 predicts 21, and so on.
    assert batch.labels.tolist() == [
        [-100, -100, -100, 21, 22, 23, 31, 32],
        [-100, -100, 41, -100, -100, -100, -100, -100],
    ]
    assert batch.rows.tolist() == [[0] * 3, [1] * 3, [0] * 3]
    assert batch.mask.tolist() == [[True] * 3, [True, False, False], [True, True, False]]
    assert [c[m].tolist() for c, m in zip(batch.columns, batch.mask)] == [[2, 3, 4], [1], [5, 6]]
    assert batch.inputs["attention_mask"][0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0, 1, 0, 0],  # the second branch begins: the prompt and itself
        [1, 1, 0, 0, 0, 1, 1, 0],
        [1, 1, 0, 0, 0, 0, 0, 1],  # padding sees itself, so that its softmax is not empty
    ]


def test_plain_rows_are_laid_out_as_promised():
    batch = plain_completions(*padded([([11, 12, 13], [21]), ([14], [31, 32])], more=2), position_ids=True)
    assert batch.inputs["input_ids"].tolist() == [[11, 12, 13, 21], [14, 31, 32, PAD]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 3]] * 2
    assert batch.labels.tolist() == [[-100, -100, -100, 21], [-100, 31, 32, -100]]
    values = torch.arange(6.0).view(2, 3)
    assert batch.take(values).tolist() == [[2.0, 0, 0, 0], [3.0, 4.0, 0, 0]]
    without = plain_completions(*padded([([11], [21])]), position_ids=False)
    assert set(without.inputs) == {"input_ids", "attention_mask"}


GROUPS = st.lists(
    st.tuples(st.integers(1, 12), st.lists(st.integers(0, 20), min_size=1, max_size=6)), min_size=1, max_size=4
)


@settings(max_examples=60, deadline=None)
@given(GROUPS, st.integers(0, 100), st.integers(0, 2), st.sampled_from([None, torch.float32]), st.data())
def test_every_token_stands_once_and_sees_its_own_past(groups, seed, more, dtype, data):
    """Any plan: read back from the batch what each completion token's predictor sees, and at which positions."""
    rows = draw(groups, seed)
    prompt_ids, _, completion_ids, completion_mask = padded(rows, more)
    lengths = [len(completion) for _, completion in rows]
    plan = []
    for prompt in {tuple(prompt) for prompt, _ in rows}:
        members = [i for i, (own, _) in enumerate(rows) if tuple(own) == prompt and lengths[i]]
        while members:
            count = data.draw(st.integers(1, len(members)))
            plan.append(members[:count])
            members = members[count:]
    if not plan:
        return
    batch, part = lay_out(plan, [len(p) for p, _ in rows], lengths, prompt_ids, completion_ids, completion_mask, PAD)
    longest = max(len(p) + len(c) for p, c in rows)
    positions, ids, labels = batch.inputs["position_ids"], batch.inputs["input_ids"], batch.labels
    sees = attention_masks(part, positions, longest, mask_dtype=dtype)[:, 0]
    sees = sees if dtype is None else sees == 0
    assert ids.shape == labels.shape == (len(plan), max(len(rows[m[0]][0]) + sum(lengths[i] for i in m) for m in plan))
    assert sees.any(-1).all()
    places = set()
    for i, (prompt, completion) in enumerate(rows):
        assert batch.mask[i].tolist() == [t < len(completion) for t in range(completion_ids.size(1))]
        for t, token in enumerate(completion):
            row, column = int(batch.rows[i, t]), int(batch.columns[i, t])
            places.add((row, column))
            assert labels[row, column + 1] == token
            seen = sees[row, column].nonzero().flatten()
            order = positions[row, seen].argsort()
            assert positions[row, seen][order].tolist() == list(range(len(prompt) + t))
            assert ids[row, seen][order].tolist() == prompt + completion[:t]
    assert len(places) == sum(lengths) == int((labels != -100).sum())


def test_tokens_that_are_not_to_be_scored(models, always):
    """Results of tools are part of the context, but have no score."""
    rows = draw(UNEVEN)
    batch = padded(rows)
    wanted = batch[3].clone()
    wanted[:, 2:4] = 0
    model = models("llama")
    every = plain_completions(*batch, position_ids=True)
    expected = scored(model, every)[0]
    for some in (
        grouped_completions(*batch, PAD, scored=wanted),
        plain_completions(*batch, position_ids=True, scored=wanted),
    ):
        assert torch.equal(some.mask, every.mask & (wanted == 1))
        assert (some.labels != -100).sum() == wanted.sum()
        torch.testing.assert_close(scored(model, some)[0], expected * wanted, atol=1e-5, rtol=1e-5)


def test_a_model_to_be_compiled_gets_a_dense_mask(models, always):
    batch = padded(draw(UNEVEN))
    for compiled, by_branch in ((True, False), (False, always == "branches")):
        grouped = grouped_completions(*batch, PAD, **grouping_settings(models("llama"), compiled=compiled))
        assert isinstance(grouped.inputs["attention_mask"], BranchMask) == by_branch


def test_nothing_to_share_or_to_score_uses_plain_rows(models):
    for rows in (
        draw([(12, [4])]),  # one completion
        draw([(12, [4]), (12, [4]), (9, [2])]),  # one for each prompt
        draw([(12, [0, 0])]),  # no tokens
        [([], [5, 6]), ([], [7, 8]), ([3] * 20, [9]), ([3] * 20, [9])],  # an empty prompt predicts nothing
    ):
        assert grouped_completions(*padded(rows), PAD) is None
        assert_right(models("llama"), rows, plain_completions(*padded(rows), position_ids=True))
    nothing = [tensor[:, :0] if i > 1 else tensor for i, tensor in enumerate(padded(draw([(5, [1, 1])])))]
    assert grouped_completions(*nothing, PAD) is None
    assert plain_completions(*nothing, position_ids=True).take(torch.zeros(2, 4)).shape == (2, 0)


# ----------------------------------------------------------------------------------------------------- its cost


def cost(rows, width, hidden_size, padded=True):
    """The estimate: a token costs 4 hidden sizes, and in attention its row's tokens, half of them without padding."""
    return rows * width * (4 * hidden_size + (width if padded else width / 2))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 300), st.lists(st.integers(0, 300), min_size=1, max_size=8)), min_size=1, max_size=4
    ),
    st.sampled_from([16, 64, 576, 4096]),
)
def test_a_plan_holds_every_completion_and_saves_a_tenth(groups, hidden_size):
    number = [g for g, (_, lengths) in enumerate(groups) for _ in lengths]
    prompts = [p for p, lengths in groups for _ in lengths]
    lengths = [length for _, own in groups for length in own]
    widths = [p + t for p, t in zip(prompts, lengths)]
    plain = cost(len(widths), max(widths), hidden_size, padded=min(widths) < max(widths))
    rows = plan_rows(number, prompts, lengths, hidden_size)
    if rows is None:
        at_once = [p + sum(own) for p, own in groups if any(own)]
        assert not at_once or cost(len(at_once), max(at_once), hidden_size) >= 0.9 * plain
        return
    assert sorted(i for row in rows for i in row) == [i for i, length in enumerate(lengths) if length]
    assert all(len({number[i] for i in row}) == 1 for row in rows)
    assert cost(len(rows), max(prompts[r[0]] + sum(lengths[i] for i in r) for r in rows), hidden_size) < 0.9 * plain


def test_long_completions_take_several_rows_a_prompt():
    """Attention over all branches together may cost more than the prompt once more."""

    def plan(prompt, lengths, hidden_size=576):
        rows = plan_rows([0] * len(lengths), [prompt] * len(lengths), lengths, hidden_size)
        return None if rows is None else [sum(lengths[i] for i in row) for row in rows]

    assert plan(256, [33] + [32] * 7) == [257]
    # In thousands: plain 7 x 1768 x (2304 + 1768) = 50395. One row of 4536: 31026. Two of 2536: 24550, three of 1768,
    # which is the longest with its prompt: 21598.
    assert plan(256, [1512, 512, 512, 500, 500, 372, 372]) == [1512, 1384, 1384]
    # Plain 8 x 1280 x (2304 + 640) = 30147; rows of two: 4 x 2304 x (2304 + 2304) = 42467.
    assert plan(256, [1024] * 8) is None


def test_what_tokens_see_is_what_attention_costs_without_dense_masks():
    """Plain 8 x 1280 x (2304 + 640) = 30147 thousand; a row of 8448: 8448 x 2304 + 256^2 / 2 + 8192 (256 + 512) = 25788."""
    lengths = [1024] * 8
    assert plan_rows([0] * 8, [256] * 8, lengths, 576) is None
    assert plan_rows([0] * 8, [256] * 8, lengths, 576, "flex") == [list(range(8))]
    # By branch: plain without a mask as above; 8448 x 2304 + 255^2 / 2 + 8192 (255 + 1024) = 29974: no tenth less. With
    # one shorter completion, plain rows need a mask: 8 x 1280 x (2304 + 1280) = 36700.
    assert plan_rows([0] * 8, [256] * 8, lengths, 576, "branches") is None
    assert plan_rows([0] * 8, [256] * 8, [*lengths[1:], 1000], 576, "branches") == [list(range(8))]


# ------------------------------------------------------------------------------------------- models and how they run


def test_under_gradient_checkpointing(models, always):
    model, batch = copy.deepcopy(models("qwen2")), padded(draw(UNEVEN))
    grouped = grouped_completions(*batch, PAD, **grouping_settings(model))
    grouped.inputs["use_cache"] = False
    expected = gradients(model, weighed(scored(model, grouped)))
    model.train()
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        assert why_not_grouped(model) is None
        found = gradients(model, weighed(scored(model, grouped)))
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-5)


def test_adapters(models, always):
    rows = draw(UNEVEN)
    model = get_peft_model(
        copy.deepcopy(models("llama")), LoraConfig(target_modules="all-linear", init_lora_weights=False)
    ).eval()
    assert why_not_grouped(model) is None
    assert_right(model, rows, grouped_completions(*padded(rows), PAD, **grouping_settings(model)))


@pytest.mark.parametrize("name", ["llama", "llama-eager"])
def test_in_bfloat16_nothing_is_nan(models, always, name):
    batch = padded(draw(UNEVEN))
    exact = scored(models(name), plain_completions(*batch, position_ids=True))[0]
    half = copy.deepcopy(models(name)).to(torch.bfloat16)
    for model, autocast in ((models(name), True), (half, False)):
        grouped = grouped_completions(*batch, PAD, **grouping_settings(model))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            logps, _ = scored(model, grouped)
        found = gradients(model, logps.sum())
        assert all(torch.isfinite(gradient).all() for gradient in found.values())
        torch.testing.assert_close(logps.float(), exact, atol=0.2, rtol=0.1)
    assert why_not_grouped(half) is None


WINDOWS = [("gemma2", EAGER), ("gemma3", {}), ("gemma3", EAGER), ("mistral", {})]


@pytest.mark.parametrize(("name", "own"), WINDOWS)
def test_windows_shorter_than_the_rows(always, name, own):
    """Each kind of layer gets a mask of its own; one for all would be wrong."""
    model, rows = MODELS[name](sliding_window=5, **own), draw(UNEVEN)
    assert why_not_grouped(model) is None and model.config.sliding_window == 5
    settings = grouping_settings(model)
    grouped = grouped_completions(*padded(rows), PAD, **settings)
    masks = grouped.inputs["attention_mask"]
    assert isinstance(masks, dict) if name != "mistral" else masks.ndim == 4
    if not own:
        some = masks["sliding_attention"] if isinstance(masks, dict) else masks
        assert isinstance(some, BranchMask) == (always == "branches")
    assert_right(model, rows, grouped)
    blind = grouped_completions(*padded(rows), PAD, **{**settings, "windows": None})
    assert (scored(model, blind)[0] - scored(model, grouped)[0]).abs().max() > 1e-3


def _flash():
    model = MODELS["llama"]()
    model.config._attn_implementation = "flash_attention_2"
    return model


def _aux_loss():
    return _build(tf.MixtralForCausalLM, tf.MixtralConfig(**SIZES, num_local_experts=4, output_router_logits=True))


REFUSED = {
    "bloom": (lambda: _build(tf.BloomForCausalLM, tf.BloomConfig(vocab_size=VOCAB, hidden_size=16, n_layer=1, n_head=2)), "position ids"),
    "falcon-alibi": (lambda: _build(tf.FalconForCausalLM, tf.FalconConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, alibi=True)), "fails on a mask"),
    "mamba": (lambda: _build(tf.MambaForCausalLM, tf.MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1)), "position ids"),
    "lfm2": (lambda: _build(tf.Lfm2ForCausalLM, tf.Lfm2Config(**SIZES, layer_types=["conv", "full_attention"])), "'conv'"),
    "gpt-neo": (lambda: _build(tf.GPTNeoForCausalLM, tf.GPTNeoConfig(vocab_size=VOCAB, hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]], window_size=8)), "8 tokens"),
    "router-loss": (_aux_loss, "router"),
    "prompt-tuning": (lambda: get_peft_model(MODELS["llama"](), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)), "virtual tokens"),
    "flash": (_flash, "flash_attention_2"),
    "flex-on-cpu": (lambda: MODELS["llama"](attn_implementation="flex_attention"), "backward pass on a CPU"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_cannot_are_refused_with_a_reason(name):
    build, reason = REFUSED[name]
    why = why_not_grouped(build(), max_length=32)
    assert why is not None and reason in why, why


class _IgnoresPositions(tf.LlamaForCausalLM):
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        return super().forward(input_ids, attention_mask, **kwargs)


class _IgnoresMask(tf.LlamaForCausalLM):
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        causal = torch.ones_like(input_ids) if attention_mask.dim() == 4 else attention_mask
        return super().forward(input_ids, causal, position_ids, **kwargs)


class _CutsGradients(tf.LlamaForCausalLM):
    """The same hidden states, but no gradient to the tokens of a row behind others of the same position."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        embeds = self.get_input_embeddings()(input_ids)
        if attention_mask.dim() == 4:
            embeds = torch.cat([embeds[:, :6], embeds[:, 6:].detach()], dim=1)
        return super().forward(None, attention_mask, position_ids, inputs_embeds=embeds, **kwargs)


@pytest.mark.parametrize(
    ("model_class", "what"),
    [(_IgnoresPositions, "hidden states"), (_IgnoresMask, "hidden states"), (_CutsGradients, "gradients")],
)
def test_the_trial_finds_what_the_config_does_not_tell(model_class, what):
    # Attention as weak as in a fresh model: what leaks is small.
    model = _build(model_class, tf.LlamaConfig(**{**SIZES, "initializer_range": 0.02}))
    assert what in why_not_grouped(model) and "differ" in why_not_grouped(model)


class _OwnWindow(tf.MistralForCausalLM):
    """A window that stands elsewhere than in the config."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        self.config.sliding_window, before = 6, self.config.sliding_window
        try:
            return super().forward(input_ids, attention_mask, position_ids, **kwargs)
        finally:
            self.config.sliding_window = before


def test_windows_that_are_not_the_configs_are_refused():
    model = _build(_OwnWindow, tf.MistralConfig(**SIZES, sliding_window=64))
    assert "differ" in why_not_grouped(model)


def test_the_trial_leaves_no_trace(models):
    model = copy.deepcopy(models("gemma3")).train()
    before = torch.random.get_rng_state()
    with torch.no_grad():
        assert why_not_grouped(model) is None
    assert torch.equal(before, torch.random.get_rng_state()) and model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.config.sliding_window == 64 and not model.get_input_embeddings()._forward_hooks


def test_weights_that_are_not_here_are_not_tried():
    with torch.device("meta"):
        llama, mistral = tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES)), tf.MistralForCausalLM(tf.MistralConfig(**SIZES))
    assert why_not_grouped(llama) is None
    assert "4096 tokens" in why_not_grouped(mistral) and why_not_grouped(mistral, max_length=4096) is None


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.lists(st.integers(1, 8), min_size=1, max_size=4)), min_size=1, max_size=3
    ),
    st.integers(0, 100),
    st.sampled_from([None, ("sliding_attention", 3), ("chunked_attention", 4)]),
)
def test_attention_by_branch_is_attention_with_the_dense_mask(rows, seed, window):
    """Values and gradients of all tokens but padding; and what else is done with the mask is done with the dense one."""
    width = max(p + sum(own) for p, own in rows) + 1
    sizes = [[p, *own, width - p - sum(own)] for p, own in rows]
    part, positions = torch.full((len(rows), width), -1), torch.zeros(len(rows), width, dtype=torch.long)
    for row, (p, *own, rest) in enumerate(sizes):
        part[row] = torch.tensor([0] * p + [1 + i for i, n in enumerate(own) for _ in range(n)] + [-1] * rest)
        positions[row] = torch.tensor([*range(p), *(p + t for n in own for t in range(n)), *[0] * rest])
    windows = dict([window]) if window else None
    dense = attention_masks(part, positions, 10**6, windows=windows)
    mask = attention_masks(part, positions, 10**6, windows=windows, sizes=sizes)
    assert mask.shape == dense.shape and mask.dtype == torch.bool and mask.device == dense.device
    assert torch.equal(mask[:, :, 1:], dense[:, :, 1:]) and torch.equal(~mask, ~dense)
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(len(rows), 2, width, 4, generator=generator).requires_grad_() for _ in range(3)]
    weights = torch.randn(len(rows), 2, width, 4, generator=generator) * (part != -1)[:, None, :, None]
    outputs = [
        torch.nn.functional.scaled_dot_product_attention(*tensors, attn_mask=m, scale=0.7) for m in (mask, dense)
    ]
    torch.testing.assert_close(*(output * weights for output in outputs), atol=1e-6, rtol=1e-5)
    for one, two in zip(*(torch.autograd.grad((output * weights).sum(), tensors) for output in outputs)):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)


@settings(max_examples=20, deadline=None)
@given(GROUPS, st.integers(0, 100), st.sampled_from([None, ("sliding_attention", 3), ("chunked_attention", 4)]))
def test_block_masks_say_the_same(groups, seed, window):
    from torch.nn.attention.flex_attention import create_mask

    rows = [row for row in draw(groups, seed) if row[1]]
    if not rows:
        return
    prompt_ids, _, completion_ids, completion_mask = padded(rows)
    prompts = [prompt for prompt, _ in rows]
    plan = [
        [i for i, prompt in enumerate(prompts) if prompt == own] for own in {tuple(p): p for p in prompts}.values()
    ]
    batch, part = lay_out(
        plan, [len(p) for p, _ in rows], [len(c) for _, c in rows], prompt_ids, completion_ids, completion_mask, PAD
    )
    windows = {"full_attention": None, **({window[0]: window[1]} if window else {})}
    longest = max(len(p) + len(c) for p, c in rows)
    dense, block = (
        attention_masks(part, batch.inputs["position_ids"], longest, windows=windows, flex=flex)
        for flex in (False, True)
    )
    if not isinstance(dense, dict):
        dense, block = {"all": dense}, {"all": block}
    assert dense.keys() == block.keys()
    for kind, mask in dense.items():
        found = create_mask(block[kind].mask_mod, *mask.shape[:2], *mask.shape[2:], device="cpu")
        assert torch.equal(found, mask)


def test_flex_attention_takes_the_block_mask(models, always, monkeypatch):
    """Its forward pass, uncompiled: on a CPU there is no backward pass."""
    from torch.nn.attention.flex_attention import flex_attention
    from transformers.integrations import flex_attention as integration

    def uncompiled(query, key, value, training=False, **kwargs):
        return flex_attention(query, key, value, **kwargs)

    monkeypatch.setattr(integration, "compile_friendly_flex_attention", uncompiled)
    model, batch = MODELS["gemma3"](sliding_window=5, attn_implementation="flex_attention"), padded(draw(UNEVEN))
    with torch.no_grad():
        grouped = grouped_completions(*batch, PAD, **grouping_settings(model))
        assert set(grouped.inputs["attention_mask"]) == {"full_attention", "sliding_attention"}
        found = scored(model, grouped)[0]
        expected = scored(MODELS["gemma3"](sliding_window=5), plain_completions(*batch, position_ids=True))[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
