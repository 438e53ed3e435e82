"""The sampler on the model's key-value cache: what it samples is what `model.generate` and plain passes say."""

import math
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from scipy.stats import chisquare
from torch.nn.functional import log_softmax
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from outspoken.trainers.rollouts import kv_cache, packed_linear, transformers_backend
from outspoken.trainers.rollouts.sampling import SamplingParams, folded, sampling_params
from outspoken.trainers.rollouts.transformers_backend import sample, why_not_own_sampler

VOCABULARY, END, PAD = 60, 1, 0
WINDOW = 6  # of sliding-window layers: shorter than most prompts, and than every completion

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    # The default of 0.02 leaves all logits near zero, where mistakes hide.
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": END,
    "pad_token_id": PAD,
}
MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
ARCHITECTURES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "llama-eager": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation="eager")),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**{**SIZES, "num_key_value_heads": 4})),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SIZES, **MIXED, attn_implementation="eager", attn_logit_softcapping=5.0)
    ),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, **MIXED)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=WINDOW)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=512,
            initializer_range=0.3,
            bos_token_id=None,
            eos_token_id=END,
            pad_token_id=PAD,
        )
    ),
    "qwen3-moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **EXPERTS)),
    "gpt-oss": lambda: GptOssForCausalLM(
        GptOssConfig(**SIZES, **MIXED, num_local_experts=4, num_experts_per_tok=2, attn_implementation="eager")
    ),
}


def build(architecture="llama", seed=0):
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = ARCHITECTURES[architecture]()
        for name, parameter in model.named_parameters():
            if "sinks" in name:  # zero-initialised by nobody: torch.empty
                torch.nn.init.normal_(parameter)
    return model.eval()


@pytest.fixture(scope="module")
def llama():
    return build()


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer):
    return tiny_tokenizer


def prompts(*lengths, copies=1, seed=0):
    """Prompts of these lengths, each `copies` times."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randint(2, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    return [prompt for prompt in drawn for _ in range(copies)]


def greedy(most, **more):
    return SamplingParams(max_new_tokens=most, temperature=0.0, end_ids=(END,), **more)


def generated(model, prompt_ids, most, **settings):
    """What `model.generate` makes of each prompt alone, up to and with the end token."""
    found = []
    for prompt in prompt_ids:
        ids = torch.tensor([prompt])
        config = GenerationConfig(
            **{"max_new_tokens": most, "do_sample": False, "eos_token_id": END, "pad_token_id": PAD, **settings}
        )
        with torch.no_grad():
            completion = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        completion = completion[0, len(prompt) :].tolist()
        found.append(completion[: completion.index(END) + 1] if END in completion else completion)
    return found


def plain_logits(model, prompt, completion):
    """Logits that predict each token of a completion, from one pass without a cache: (tokens, V)."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion]), use_cache=False).logits[0].float()
    return logits[len(prompt) - 1 : -1]


def check_scores(model, prompt_ids, sampled, temperature=1.0):
    for prompt, completion, logps, entropies in zip(
        prompt_ids, sampled.completion_ids, sampled.logps, sampled.entropies, strict=True
    ):
        assert len(logps) == len(entropies) == len(completion)
        wanted = log_softmax(plain_logits(model, prompt, completion) / temperature, -1)
        at_tokens = wanted[torch.arange(len(completion)), completion]
        assert torch.allclose(torch.tensor(logps), at_tokens, atol=1e-4, rtol=0)
        assert torch.allclose(torch.tensor(entropies), -(wanted.exp() * wanted).sum(-1), atol=1e-4, rtol=0)


# -------------------------------------------------------------------------------------------------------- greedy


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_is_what_generate_says(architecture, tokenizer):
    model = build(architecture)
    assert why_not_own_sampler(model, greedy(40)) is None
    # Shorter and much longer than the window, a prompt of one token, copies beside each other and apart.
    prompt_ids = prompts(3, 17, 5, copies=3) + prompts(1, 17, seed=1) + prompts(3)
    sampled = sample(model, prompt_ids, greedy(40), tokenizer=tokenizer)
    wanted = generated(model, prompt_ids, 40)
    assert sampled.completion_ids == wanted
    assert sampled.finished == [completion[-1] == END for completion in wanted]
    check_scores(model, prompt_ids, sampled)


def test_rows_of_all_lengths_end_where_generate_ends_them(llama, tokenizer):
    """With many end tokens rows end at different steps, and prompts lose all their rows before others do."""
    ends = tuple(range(1, 12))
    prompt_ids = prompts(*range(2, 18))
    params = SamplingParams(max_new_tokens=40, temperature=0.0, end_ids=ends)
    sampled = sample(llama, prompt_ids, params, tokenizer=tokenizer)
    wanted = []
    for row in generated(llama, prompt_ids, 40, eos_token_id=list(ends)):
        stop = next((i for i, token in enumerate(row) if token in ends), len(row))
        wanted.append(row[: stop + 1])
    assert sampled.completion_ids == wanted
    assert len({len(row) for row in wanted}) > 5
    check_scores(llama, prompt_ids, sampled)


def test_the_prompt_goes_through_once(llama, tokenizer, monkeypatch):
    shapes = []
    hook = llama.model.layers[0].register_forward_hook(
        lambda module, args, out: shapes.append(tuple(args[0].shape[:2]))
    )
    try:
        sample(llama, prompts(9, copies=8), SamplingParams(max_new_tokens=4), tokenizer=tokenizer)
        assert shapes == [(1, 9), (8, 1), (8, 1), (8, 1)]
        shapes.clear()
        # A long prompt is not padded to, and prompts of similar lengths share a pass.
        sample(llama, prompts(9, 10, 40, copies=2), SamplingParams(max_new_tokens=2), tokenizer=tokenizer)
        assert shapes == [(2, 10), (1, 40), (6, 1)]
    finally:
        hook.remove()


def test_ended_rows_leave_the_batch(llama, tokenizer):
    rows = []
    hook = llama.model.layers[0].register_forward_hook(lambda module, args, out: rows.append(len(args[0])))
    try:
        sample(
            llama,
            prompts(4, copies=4),
            SamplingParams(max_new_tokens=9, seed=0),
            tokenizer=tokenizer,
            caps=[2, 9, 4, 2],
        )
    finally:
        hook.remove()
    # The first tokens come with the prompt's pass.
    assert rows == [1, 4, 2, 2, 1, 1, 1, 1, 1]


# ----------------------------------------------------------------------------------------------- log-probabilities


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_logps_and_entropies_are_those_of_a_plain_pass(architecture, tokenizer):
    """Also for rows that moved when others ended, and whatever is cut from the distribution."""
    model = build(architecture)
    prompt_ids = prompts(4, 11, copies=6)
    params = SamplingParams(
        max_new_tokens=30,
        temperature=0.7,
        top_p=0.9,
        top_k=20,
        min_p=0.01,
        repetition_penalty=1.2,
        end_ids=tuple(range(12)),
    )
    torch.manual_seed(0)
    sampled = sample(model, prompt_ids, params, tokenizer=tokenizer)
    assert len({len(row) for row in sampled.completion_ids}) > 4
    check_scores(model, prompt_ids, sampled, temperature=0.7)


def test_greedy_logps_are_at_temperature_one(llama, tokenizer):
    prompt_ids = prompts(5)
    check_scores(llama, prompt_ids, sample(llama, prompt_ids, greedy(6), tokenizer=tokenizer), temperature=1.0)


def test_packed_weights_change_nothing_but_rounding(tokenizer):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**{**SIZES, "hidden_size": 256, "intermediate_size": 512})).eval()
    assert packed_linear._available()
    prompt_ids = prompts(5, 9, copies=4)
    before = model.model.layers[0].mlp.up_proj.forward
    with packed_linear.packed_linears(model):
        assert model.model.layers[0].mlp.up_proj.forward != before  # 512 * 256 numbers: worth it
        assert "forward" not in vars(model.model.layers[0].self_attn.k_proj)  # 16 * 256: not
    assert not any("forward" in vars(module) for module in model.modules())
    params = SamplingParams(max_new_tokens=transformers_backend.PACK_FROM, seed=1)
    sampled = sample(model, prompt_ids, params, tokenizer=tokenizer)
    check_scores(model, prompt_ids, sampled)
    assert sample(model, prompt_ids, greedy(40), tokenizer=tokenizer).completion_ids == generated(
        model, prompt_ids, 40
    )
    assert not any("forward" in vars(module) for module in model.modules())


# -------------------------------------------------------------------------------------------------- distributions


DRAWS = 3000


def warped(model, prompt, **settings):
    """The distribution of the next token that `generate` draws from."""
    ids = torch.tensor([prompt])
    config = GenerationConfig(
        **{"max_new_tokens": 1, "do_sample": True, "top_k": 0, "eos_token_id": END, "pad_token_id": PAD, **settings},
        output_scores=True,
        return_dict_in_generate=True,
    )
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return torch.softmax(out.scores[0][0].double(), -1)


def check_counts(counts, probs):
    """Nothing impossible was drawn, and a chi-square test does not tell the draws from the distribution."""
    assert counts[probs == 0].sum() == 0
    order = probs.argsort(descending=True)
    counts, expected = counts[order].double(), probs[order] * counts.sum()
    kept = int((expected >= 5).sum())  # rarer ones are one class
    counts = torch.cat([counts[:kept], counts[kept:].sum()[None]])
    expected = torch.cat([expected[:kept], expected[kept:].sum()[None]])
    if expected[-1] < 1e-6 * expected.sum():
        counts, expected = counts[:-1], expected[:-1]
    assert len(expected) > 2
    assert chisquare(counts, expected * (counts.sum() / expected.sum())).pvalue > 1e-3


TRUNCATIONS = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "hot": {"temperature": 1.7},
    "top_k": {"top_k": 7},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.1},
    "penalty": {"repetition_penalty": 1.8},
    "all": {"temperature": 1.3, "top_k": 12, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.5},
}


@pytest.mark.parametrize("settings", TRUNCATIONS.values(), ids=TRUNCATIONS)
def test_first_tokens_follow_the_distribution_that_generate_draws_from(settings, llama, tokenizer):
    prompt = prompts(14)[0]
    params = SamplingParams(max_new_tokens=1, end_ids=(END,), seed=3, **settings)
    sampled = sample(llama, [prompt] * DRAWS, params, tokenizer=tokenizer)
    counts = torch.bincount(torch.tensor(sampled.completion_ids).flatten(), minlength=VOCABULARY)
    check_counts(counts, warped(llama, prompt, **settings))


@pytest.mark.parametrize(
    "settings", [{}, {"repetition_penalty": 1.8}, TRUNCATIONS["all"]], ids=["plain", "penalty", "all"]
)
def test_later_tokens_follow_it_too(settings, llama, tokenizer):
    """The third token, after the likeliest first two: those come from the cache, and count for the penalty."""
    prompt = prompts(8)[0]
    params = SamplingParams(max_new_tokens=3, seed=5, **settings)
    sampled = sample(llama, [prompt] * (8 * DRAWS), params, tokenizer=tokenizer)
    ids = torch.tensor(sampled.completion_ids)
    pairs, number = ids[:, :2].unique(dim=0, return_counts=True)
    first_two = pairs[number.argmax()]
    third = ids[(ids[:, :2] == first_two).all(1), 2]
    assert len(third) > 300
    counts = torch.bincount(third, minlength=VOCABULARY)
    check_counts(counts, warped(llama, prompt + first_two.tolist(), **settings))


def test_top_p_of_a_large_vocabulary_is_exact_either_way():
    """Where the first tokens sorted are not enough for top_p, all are."""
    torch.manual_seed(0)
    flat, peaked = torch.randn(2, 4096) * 0.01, torch.randn(2, 4096) * 5
    for logits in (flat, peaked, torch.cat([flat, peaked])):
        probs = torch.softmax(logits, -1)
        weights, ids = transformers_backend._truncated(probs, SamplingParams(max_new_tokens=1, top_p=0.7))
        for row in range(len(probs)):
            order = probs[row].argsort(descending=True)
            before = probs[row, order].double().cumsum(0) - probs[row, order]
            kept = {*order[before < 0.7].tolist()}
            assert {*ids[row][weights[row] > 0].tolist()} ^ kept == set()


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0 - 2.0**-24, 1.0])
def test_a_draw_never_takes_what_has_no_weight(value, monkeypatch):
    """The largest random number a row can get, and weights with zeros at both ends."""
    weights = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0], [0.0, 1e-30, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0, 0.0]])
    monkeypatch.setattr(torch, "rand", lambda *size, **more: torch.full(size, value))
    places = transformers_backend._draw(weights, None)
    assert bool((weights.gather(1, places[:, None]) > 0).all())


# Every setting of `extra` that is left to transformers, with some that come before and after it in transformers' order.
PROCESSED = {
    "min_new_tokens": {"min_new_tokens": 4},
    "min_length": {"min_length": 14},
    "bad_words_ids": {"bad_words_ids": [[7], [8, 9], [30]]},
    "suppress_tokens": {"suppress_tokens": [3, 4, 5, 6]},
    "begin_suppress_tokens": {"begin_suppress_tokens": [10, 11, 12]},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "sequence_bias": {"sequence_bias": [[[9], 4.0], [[12, 13], 6.0]]},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (2, 1.5)},
    "typical_p": {"typical_p": 0.6},
    "epsilon_cutoff": {"epsilon_cutoff": 0.02},
    "eta_cutoff": {"eta_cutoff": 0.05},
    "top_h": {"top_h": 0.5},
    "renormalize_logits": {"renormalize_logits": True},
    "remove_invalid_values": {"remove_invalid_values": True},
    "several": {"suppress_tokens": [3, 4], "typical_p": 0.9, "sequence_bias": [[[9], 4.0]], "min_new_tokens": 3},
}


@pytest.mark.filterwarnings("ignore:Unfeasible length constraints")
@pytest.mark.parametrize("extra", PROCESSED.values(), ids=PROCESSED)
def test_further_settings_are_processed_as_generate_does(extra, llama, tokenizer):
    prompt = prompts(9)[0]
    common = {"temperature": 1.3, "top_k": 30, "top_p": 0.95, "repetition_penalty": 1.4}
    assert why_not_own_sampler(llama, SamplingParams(max_new_tokens=1, end_ids=(END,), extra=extra)) is None
    params = SamplingParams(max_new_tokens=1, end_ids=(END,), seed=7, **common, extra=extra)
    sampled = sample(llama, [prompt] * DRAWS, params, tokenizer=tokenizer)
    counts = torch.bincount(torch.tensor(sampled.completion_ids).flatten(), minlength=VOCABULARY)
    check_counts(counts, warped(llama, prompt, **common, **extra))
    # Greedy over a whole completion, where the history counts, in a batch with other prompts and with rows that end.
    prompt_ids = prompts(9, 4, 13, copies=2)
    found = sample(llama, prompt_ids, greedy(16, repetition_penalty=1.4, extra=extra), tokenizer=tokenizer)
    assert found.completion_ids == generated(llama, prompt_ids, 16, repetition_penalty=1.4, **extra)
    check_scores(llama, prompt_ids, found)


def test_the_order_of_all_settings_is_transformers(llama, tokenizer):
    """What is left when everything is set at once, and that another order would leave something else."""
    prompt = prompts(9)[0]
    settings = {"temperature": 2.5, "top_k": 25, "top_p": 0.7, "min_p": 0.2, "repetition_penalty": 0.6}
    likely = {token for token, p in enumerate(warped(llama, prompt, **settings).tolist()) if p > 0}
    sampled = sample(
        llama, [prompt] * DRAWS, SamplingParams(max_new_tokens=1, seed=1, **settings), tokenizer=tokenizer
    )
    assert {row[0] for row in sampled.completion_ids} == likely

    logits = plain_logits(llama, prompt, [0])[0]
    logits[[*{*prompt}]] = torch.where(logits < 0, logits * 0.6, logits / 0.6)[[*{*prompt}]]

    def in_order(*steps):
        left = logits.clone()
        for step in steps:
            probs = torch.softmax(left, -1)
            order = probs.argsort(descending=True)
            if step == "temperature":
                left = left / 2.5
            if step == "top_k":
                left[order[25:]] = -torch.inf
            if step == "top_p":
                left[order[(probs[order].cumsum(0) - probs[order]) >= 0.7]] = -torch.inf
            if step == "min_p":
                left[probs < 0.2 * probs.max()] = -torch.inf
        return {token for token, value in enumerate(left.tolist()) if value > -math.inf}

    assert in_order("temperature", "top_k", "top_p", "min_p") == likely
    assert in_order("top_k", "top_p", "min_p", "temperature") != likely
    assert in_order("temperature", "min_p", "top_p", "top_k") != likely
    assert in_order("temperature", "top_p", "top_k", "min_p") != likely


# ------------------------------------------------------------------------------------------------- where rows end


def test_caps_cut_rows_apart(llama, tokenizer):
    prompt_ids = prompts(6, 3, copies=3)
    caps = [3, 10, 0, 1, 7, 40]
    sampled = sample(llama, prompt_ids, greedy(10), tokenizer=tokenizer, caps=caps)
    whole = generated(llama, prompt_ids, 40)
    assert sampled.completion_ids == [row[:cap] for row, cap in zip(whole, caps)]
    assert sampled.finished == [END in row[:cap] for row, cap in zip(whole, caps)]
    assert [len(row) for row in sampled.logps] == [len(row) for row in sampled.completion_ids]


def test_a_cap_reached_with_the_end_token_is_finished(llama, tokenizer):
    prompt_ids = prompts(6)
    first = sample(llama, prompt_ids, greedy(1), tokenizer=tokenizer).completion_ids[0][0]
    params = SamplingParams(max_new_tokens=1, temperature=0.0, end_ids=(first,))
    sampled = sample(llama, prompt_ids, params, tokenizer=tokenizer)
    assert (sampled.completion_ids, sampled.finished) == ([[first]], [True])
    assert sample(llama, prompt_ids, greedy(1), tokenizer=tokenizer).finished == [False]


def test_no_prompts(llama, tokenizer):
    sampled = sample(llama, [], SamplingParams(max_new_tokens=5), tokenizer=tokenizer)
    assert (sampled.completion_ids, sampled.finished, sampled.logps, sampled.entropies) == ([], [], [], [])


@pytest.fixture(scope="module")
def writer(tiny_model_factory):
    return tiny_model_factory(seed=1)


def test_stop_texts_end_a_completion_with_the_token_that_completes_them(writer, tiny_tokenizer):
    """Across the borders of tokens, for each row where its text first has one."""
    prompt_ids = [tiny_tokenizer("The sky")["input_ids"], tiny_tokenizer("What is 2")["input_ids"]] * 2
    free = sample(writer, prompt_ids, SamplingParams(max_new_tokens=24, temperature=0.0), tokenizer=tiny_tokenizer)
    texts = [tiny_tokenizer.decode(row) for row in free.completion_ids]
    pieces = [[tiny_tokenizer.decode([token]) for token in row] for row in free.completion_ids]
    # A text that begins within a token and ends within the next one, and one token of the other row.
    across = next(
        (a + b)[len(a) - 1 : len(a) + 1]
        for a, b in zip(pieces[0][5:], pieces[0][6:])
        if "\ufffd" not in a + b and a and b
    )
    stops = (across, pieces[1][9]) if "\ufffd" not in pieces[1][9] else (across,)
    params = SamplingParams(max_new_tokens=24, temperature=0.0, stop=stops)
    sampled = sample(writer, prompt_ids, params, tokenizer=tiny_tokenizer)
    for row, text, whole in zip(sampled.completion_ids, texts, free.completion_ids):
        lengths = [n for n in range(1, 25) if any(stop in tiny_tokenizer.decode(whole[:n]) for stop in stops)]
        assert row == whole[: min(lengths, default=24)], (stops, text)
    assert sampled.finished == [any(s in tiny_tokenizer.decode(row) for s in stops) for row in sampled.completion_ids]
    assert sampled.finished[0] and len(sampled.completion_ids[0]) < 24
    assert [len(row) for row in sampled.logps] == [len(row) for row in sampled.completion_ids]


def test_a_stop_text_that_begins_in_the_prompt_does_not_count(writer, tiny_tokenizer):
    prompt = tiny_tokenizer("The sky is")["input_ids"]
    free = sample(writer, [prompt], SamplingParams(max_new_tokens=8, temperature=0.0), tokenizer=tiny_tokenizer)
    first = tiny_tokenizer.decode(free.completion_ids[0][:1])
    params = SamplingParams(max_new_tokens=8, temperature=0.0, stop=("is" + first,))
    assert sample(writer, [prompt], params, tokenizer=tiny_tokenizer).completion_ids == free.completion_ids


def test_long_stop_texts_are_seen_over_many_tokens(writer, tiny_tokenizer):
    prompt = tiny_tokenizer("blue")["input_ids"]
    free = sample(
        writer, [prompt], SamplingParams(max_new_tokens=60, temperature=0.8, seed=2), tokenizer=tiny_tokenizer
    )
    ids = free.completion_ids[0]
    stop = tiny_tokenizer.decode(ids[5:50])
    stop = stop[1:-1].strip("\ufffd")
    if "\ufffd" in stop:
        stop = max(stop.split("\ufffd"), key=len)
    lengths = [n for n in range(1, 61) if stop in tiny_tokenizer.decode(ids[:n])]
    params = SamplingParams(max_new_tokens=60, temperature=0.8, seed=2, stop=(stop,))
    assert sample(writer, [prompt], params, tokenizer=tiny_tokenizer).completion_ids[0] == ids[: lengths[0]]


# ------------------------------------------------------------------------------------------------- random numbers


def test_seeds(llama, tokenizer):
    prompt_ids = prompts(6, 9, copies=4)
    params = SamplingParams(max_new_tokens=12, seed=11, end_ids=(END, 2, 3))

    torch.manual_seed(0)
    first = sample(llama, prompt_ids, params, tokenizer=tokenizer)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    again = sample(llama, prompt_ids, params, tokenizer=tokenizer)
    assert first == again
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator was not touched

    other = SamplingParams(max_new_tokens=12, seed=12, end_ids=(END, 2, 3))
    assert sample(llama, prompt_ids, other, tokenizer=tokenizer).completion_ids != first.completion_ids

    free = SamplingParams(max_new_tokens=12, end_ids=(END, 2, 3))
    torch.manual_seed(0)
    one = sample(llama, prompt_ids, free, tokenizer=tokenizer)
    two = sample(llama, prompt_ids, free, tokenizer=tokenizer)
    assert one.completion_ids != two.completion_ids
    torch.manual_seed(0)
    assert sample(llama, prompt_ids, free, tokenizer=tokenizer) == one


def test_settings_may_stand_in_extra(llama, tokenizer):
    """Under the names of `GenerationConfig`, where they win over the fields."""
    prompt_ids = prompts(6, 9, copies=2)
    plain = SamplingParams(max_new_tokens=20, temperature=0.5, top_k=5, end_ids=(3, 4), seed=2)
    extra = {"temperature": 0.5, "top_k": 5, "eos_token_id": [3, 4], "max_new_tokens": 20, "min_p": None}
    given = SamplingParams(max_new_tokens=3, end_ids=(END,), seed=2, extra=extra)
    assert sample(llama, prompt_ids, given, tokenizer=tokenizer) == sample(
        llama, prompt_ids, plain, tokenizer=tokenizer
    )
    given = SamplingParams(max_new_tokens=20, seed=2, extra={"do_sample": False, "eos_token_id": END})
    assert sample(llama, prompt_ids, given, tokenizer=tokenizer) == sample(
        llama, prompt_ids, greedy(20), tokenizer=tokenizer
    )
    stops = [SamplingParams(max_new_tokens=9, seed=2, stop=("e",)), None, None]
    stops[1:] = [SamplingParams(max_new_tokens=9, seed=2, extra={name: "e"}) for name in ("stop", "stop_strings")]
    found = [sample(llama, prompt_ids, params, tokenizer=tokenizer) for params in stops]
    assert found[0] == found[1] == found[2]


def test_settings_are_folded_from_whatever_they_are_called():
    """What transformers and vLLM call the same, on top of a trainer's config or of a record."""
    plain = SamplingParams(max_new_tokens=8, top_k=5, min_p=0.1, end_ids=(END,), seed=3)
    cases = [
        ({"max_tokens": 4}, {"max_new_tokens": 4}),
        (
            {"max_new_tokens": 4, "temperature": 0.5, "top_p": 0.9},
            {"max_new_tokens": 4, "temperature": 0.5, "top_p": 0.9},
        ),
        ({"top_k": -1}, {"top_k": 0}),
        ({"top_k": None, "min_p": None, "seed": None}, {"top_k": 0, "min_p": None, "seed": None}),
        ({"max_new_tokens": None, "temperature": None, "eos_token_id": None, "stop_strings": None}, {}),
        ({"eos_token_id": 0}, {"end_ids": (0,)}),
        ({"eos_token_id": [2, 3]}, {"end_ids": (2, 3)}),
        ({"stop": "a"}, {"stop": ("a",)}),
        ({"stop_strings": ["a", "b"]}, {"stop": ("a", "b")}),
        ({"do_sample": False, "temperature": 0.7}, {"temperature": 0.0}),
        ({"do_sample": True, "num_beams": None, "top_h": 0.4}, {"extra": {"num_beams": None, "top_h": 0.4}}),
    ]
    for extra, wanted in cases:
        assert folded(replace(plain, extra=extra)) == replace(plain, **wanted)
    assert folded(replace(plain, top_k=-1)) == replace(plain, top_k=0)

    args = SimpleNamespace(
        max_completion_length=8, temperature=1.0, top_p=1.0, top_k=5, min_p=0.1, repetition_penalty=1.0
    )
    for extra, wanted in cases:
        args.generation_kwargs = {"seed": 3, **extra}
        assert sampling_params(args, [END]) == replace(plain, **wanted)
        assert args.generation_kwargs == {"seed": 3, **extra}
    args.generation_kwargs = None
    assert sampling_params(args, [END]) == replace(plain, seed=None)


def test_the_trial_leaves_random_numbers_alone(tokenizer):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert why_not_own_sampler(build("qwen2"), greedy(4)) is None
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)


# ------------------------------------------------------------------------------------------------------ the model


def test_modes_hooks_and_settings_of_the_model_come_back(tokenizer):
    model = build()
    model.train()
    model.gradient_checkpointing_enable()
    model.model.layers[1].eval()  # as somebody may have set it
    modes = {name: module.training for name, module in model.named_modules()}
    sampled = sample(model, prompts(5, 8), greedy(40), tokenizer=tokenizer)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert model.config._attn_implementation == "sdpa"
    assert model.is_gradient_checkpointing
    assert sampled.completion_ids == generated(build(), prompts(5, 8), 40)
    # And it still trains: nothing that sampling left behind is an inference tensor.
    model(torch.tensor([[3, 4, 5]]), labels=torch.tensor([[3, 4, 5]])).loss.backward()


def test_recomputing_models_sample_with_a_cache(tokenizer):
    model = build()
    model.train()
    model.gradient_checkpointing_enable()
    shapes = []
    model.lm_head.register_forward_hook(lambda module, args, out: shapes.append(out.shape[1]))
    sample(model, prompts(30), SamplingParams(max_new_tokens=5), tokenizer=tokenizer)
    assert shapes[-5:] == [1] * 5


def test_an_error_leaves_the_model_as_it_was(tokenizer):
    model = build()
    why_not_own_sampler(model, greedy(4))
    model.train()
    calls = []

    def fail(module, args, kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("no memory")

    model.register_forward_pre_hook(fail, with_kwargs=True)
    with pytest.raises(RuntimeError, match="no memory"):
        sample(model, prompts(5), greedy(40), tokenizer=tokenizer)
    assert model.training and model.config._attn_implementation == "sdpa"
    assert not kv_cache._active


def test_dropout_is_off(tokenizer):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, bos_token_id=None))
    model.train()
    found = [sample(model, prompts(5), greedy(12), tokenizer=tokenizer).completion_ids for _ in range(3)]
    assert found[0] == found[1] == found[2]


def test_a_peft_model(tokenizer):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False, lora_dropout=0.5)
    plain = generated(build(), prompts(5, 9), 20)
    with torch.random.fork_rng():
        torch.manual_seed(4)
        model = get_peft_model(build(), config)
    model.train()
    assert why_not_own_sampler(model, greedy(20)) is None
    sampled = sample(model, prompts(5, 9, copies=2), greedy(40), tokenizer=tokenizer)
    model.eval()
    assert sampled.completion_ids == generated(model, prompts(5, 9, copies=2), 40)
    check_scores(model, prompts(5, 9, copies=2), sampled)
    with model.disable_adapter():
        assert sample(model, prompts(5, 9), greedy(20), tokenizer=tokenizer).completion_ids == plain


def test_half_precision_and_autocast(tokenizer):
    prompt_ids = prompts(5, 9, copies=3)
    model = build().bfloat16()
    assert why_not_own_sampler(model, greedy(8)) is None
    sampled = sample(model, prompt_ids, SamplingParams(max_new_tokens=8, seed=0), tokenizer=tokenizer)
    for prompt, row, logps in zip(prompt_ids, sampled.completion_ids, sampled.logps):
        wanted = log_softmax(plain_logits(model, prompt, row), -1)[torch.arange(len(row)), row]
        assert torch.allclose(torch.tensor(logps), wanted, atol=0.3)
    model = build()
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        sampled = sample(model, prompt_ids, SamplingParams(max_new_tokens=40, seed=0), tokenizer=tokenizer)
        model(torch.tensor([[3, 4, 5]]), labels=torch.tensor([[3, 4, 5]])).loss.backward()
    assert [len(row) for row in sampled.completion_ids] == [40] * 6


def test_batches_bounded_in_tokens(llama, tokenizer):
    prompt_ids = prompts(6, 9, 12, copies=3)
    rows = []
    hook = llama.model.layers[0].register_forward_hook(lambda module, args, out: rows.append(tuple(args[0].shape[:2])))
    try:
        # A group of three rows takes 6 + 3 * 10 tokens and more; two of them are above the bound.
        sampled = sample(llama, prompt_ids, greedy(10), tokenizer=tokenizer, max_batch_tokens=50)
        assert {n for n, length in rows if length == 1} <= {1, 2, 3}
        assert sum(length > 1 for _, length in rows) == 3
        rows.clear()
        # A bound below one group splits it, and below one row leaves one row.
        alone = sample(llama, prompt_ids, greedy(10), tokenizer=tokenizer, max_batch_tokens=5)
        assert {n for n, length in rows if length == 1} == {1}
    finally:
        hook.remove()
    whole = sample(llama, prompt_ids, greedy(10), tokenizer=tokenizer)
    assert sampled.completion_ids == alone.completion_ids == whole.completion_ids


# --------------------------------------------------------------------------------------------------- model.generate


def test_what_the_own_sampler_leaves_to_generate(llama, tokenizer):
    def why(**extra):
        return why_not_own_sampler(llama, SamplingParams(max_new_tokens=4, extra=extra))

    assert why(num_beams=1, use_cache=True, pad_token_id=3, do_sample=True, repetition_penalty=1.2) is None
    assert why(num_beams=3) == "num_beams is 3"
    assert why(prompt_lookup_num_tokens=2) == "prompt_lookup_num_tokens is 2"
    assert why(cache_implementation="static") == "cache_implementation is 'static'"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        lfm2 = Lfm2ForCausalLM(Lfm2Config(**SIZES, layer_types=["conv", "full_attention"])).eval()
        bloom = BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4)).eval()
    assert "state from token to token" in why_not_own_sampler(lfm2, greedy(4))
    assert "Bloom" in why_not_own_sampler(bloom, greedy(4))
    for model in (lfm2, bloom):
        prompt_ids = prompts(7, 7, copies=2)
        sampled = sample(model, prompt_ids, greedy(12), tokenizer=tokenizer)
        assert sampled.completion_ids == generated(model, prompt_ids, 12)
        assert sampled.finished == [row[-1] == END for row in sampled.completion_ids]
        check_scores(model, prompt_ids, sampled)


def test_beams(llama, tokenizer):
    prompt_ids = prompts(5, 5, copies=1)
    sampled = sample(llama, prompt_ids, greedy(8, extra={"num_beams": 3}), tokenizer=tokenizer)
    assert sampled.completion_ids == generated(llama, prompt_ids, 8, num_beams=3)
    assert sampled.logps is None and sampled.entropies is None


def test_a_model_that_reads_its_cache_otherwise_is_found_out(tokenizer):
    """Attention that asks for two keys a token and lacks one: nothing in the config tells."""
    model = build()
    attention = model.model.layers[1].self_attn
    forward = attention.forward

    def odd(hidden_states, *args, past_key_values=None, **kwargs):
        if past_key_values is not None and past_key_values.get_seq_length() > 6:
            hidden_states = hidden_states * 1.1
        return forward(hidden_states, *args, past_key_values=past_key_values, **kwargs)

    attention.forward = odd
    assert "logits would differ" in why_not_own_sampler(model, greedy(4))
    sampled = sample(model, prompts(4), greedy(8), tokenizer=tokenizer)
    assert len(sampled.logps[0]) == len(sampled.completion_ids[0])


@pytest.mark.parametrize("by", ["generate", "own"])
def test_both_paths_keep_the_same_records(by, llama, tokenizer, writer, tiny_tokenizer):
    """Caps, stop texts, end tokens, scores and seeds, with and without the own sampler."""
    cache = "dynamic" if by == "own" else "static"
    prompt_ids = prompts(6, 9, copies=2)
    params = SamplingParams(
        max_new_tokens=14, temperature=0.8, top_p=0.9, repetition_penalty=1.3, seed=4, end_ids=(1, 2)
    )
    sampled = sample(llama, prompt_ids, params, tokenizer=tokenizer, caps=[3, 14, 9, 14], cache_implementation=cache)
    assert all(len(row) <= cap for row, cap in zip(sampled.completion_ids, [3, 14, 9, 14]))
    assert sampled.finished == [row[-1] in (1, 2) for row in sampled.completion_ids]
    check_scores(llama, prompt_ids, sampled, temperature=0.8)
    again = sample(llama, prompt_ids, params, tokenizer=tokenizer, caps=[3, 14, 9, 14], cache_implementation=cache)
    assert again == sampled

    prompt_ids = [tiny_tokenizer("The sky")["input_ids"]] * 2
    free = sample(writer, prompt_ids, SamplingParams(max_new_tokens=20, temperature=0.0), tokenizer=tiny_tokenizer)
    stop = next(
        text
        for i in range(4, 16)
        if "\ufffd" not in (text := tiny_tokenizer.decode(free.completion_ids[0][i : i + 2]))
    )
    params = SamplingParams(max_new_tokens=20, temperature=0.0, stop=(stop,))
    sampled = sample(writer, prompt_ids, params, tokenizer=tiny_tokenizer, cache_implementation=cache)
    length = next(n for n in range(1, 21) if stop in tiny_tokenizer.decode(free.completion_ids[0][:n]))
    assert sampled.completion_ids == [free.completion_ids[0][:length]] * 2
    assert sampled.finished == [True, True]


def test_nothing_comes_from_the_generation_config_of_the_model(tokenizer):
    model = build()
    wanted = sample(model, prompts(5), greedy(10), tokenizer=tokenizer).completion_ids
    banned = sorted({*wanted[0]})
    model.generation_config.suppress_tokens = banned
    for cache in (None, "static"):
        found = sample(model, prompts(5), greedy(10), tokenizer=tokenizer, cache_implementation=cache)
        assert found.completion_ids == wanted
    assert model.generation_config.suppress_tokens == banned


# ---------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("prompt_ids", "settings", "more", "message"),
    [
        ([[3], []], {}, {}, r"prompt_ids\[1\] is empty; give each prompt a token at least, such as the BOS token\."),
        ([[3]], {"extra": {"temprature": 1}}, {}, "'temprature' is no setting of sampling with transformers"),
        ([[3]], {"temperature": -1.0}, {}, r"temperature is -1.0; choose 0 \(the likeliest token\) or more\."),
        ([[3]], {"top_p": 1.5}, {}, "top_p is 1.5; choose a share between 0 and 1."),
        ([[3]], {"min_p": -0.5}, {}, "min_p is -0.5; choose a share between 0 and 1."),
        ([[3]], {"top_k": -2}, {}, r"top_k is -2; choose 0 \(all tokens\) or more\."),
        ([[3]], {"repetition_penalty": 0.0}, {}, "repetition_penalty is 0.0; choose more than 0."),
        ([[3]], {"stop": ("",)}, {}, "stop contains an empty text"),
        ([[3]], {"extra": {"num_return_sequences": 4}}, {}, "num_return_sequences is 4; a prompt gets"),
        ([[3]], {}, {"caps": [1, 2]}, "caps has 2 entries for 1 prompts; give one to each prompt."),
        ([[3]], {}, {"max_batch_tokens": 0}, "max_batch_tokens is 0; choose 1 or more, or None for no bound."),
    ],
)
def test_errors_are_one_sentence(prompt_ids, settings, more, message, llama, tokenizer):
    with pytest.raises(ValueError, match=message) as error:
        sample(llama, prompt_ids, SamplingParams(max_new_tokens=2, **settings), tokenizer=tokenizer, **more)
    assert str(error.value).rstrip(".").count(". ") == 0


# ------------------------------------------------------------------------------------------------- several processes


@pytest.mark.slow
def test_processes_that_step_together(tmp_path):
    """Two processes whose weights can only be used together, with rows of uneven lengths, and one without prompts."""
    worker = Path(__file__).with_name("sampler_worker.py")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, str(worker), str(tmp_path)],
            env={**environment, "RANK": str(rank), "WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        told = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(told)


def test_the_numbers_of_the_table_of_groups():
    """Rows of two prompts, then some gone: what is laid out comes back, and empty places do no harm."""
    groups = kv_cache.Groups.of([0, 0, 0, 1, 1, 1], 2, torch.device("cpu"))
    assert groups.source is None and groups.width == 3
    values = torch.arange(6 * 2 * 3 * 4.0).view(6, 2, 3, 4)
    assert torch.equal(kv_cache._by_row(kv_cache._by_prompt(values, groups), groups, 2), values)
    groups = kv_cache.Groups.of([1, 0, 1, 1], 2, torch.device("cpu"))
    assert groups.width == 3 and groups.place.tolist() == [3, 0, 4, 5]
    values = torch.arange(4 * 2 * 3 * 4.0).view(4, 2, 3, 4)
    assert torch.equal(kv_cache._by_row(kv_cache._by_prompt(values, groups), groups, 2), values)
    assert math.isclose(float(kv_cache._by_prompt(values, groups)[2:].sum()), float(values[[0, 2, 3]].sum()))
