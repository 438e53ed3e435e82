"""Documents that stand in one row: told apart on every attention backend, or refused; packed SFT equals padded SFT."""

import math
import re
from itertools import pairwise

import pytest
import torch
import transformers
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import AutoModelForCausalLM

from outspoken.trainers.attention import (
    LENGTHS,
    MASKS,
    POSITIONS,
    boundary_lengths,
    needs_one_row,
    one_document_a_row,
    prove_boundaries,
    tell_boundaries,
)
from outspoken.trainers.sft import DataCollatorForLanguageModeling, SFTConfig, SFTTrainer

PAD = 1
ROWS = [  # the first label of a row never counts: nothing predicts it
    {"input_ids": [5, 6, 7, 8, 9, 10, 11], "labels": [5, -100, -100, 8, 9, 10, 11]},
    {"input_ids": [20, 21, 22], "labels": [20, 21, 22]},
    {"input_ids": [30, 31, 32, 33, 34], "labels": [-100, -100, -100, -100, 34]},
    {"input_ids": [40, 41], "labels": [40, 41]},
    {"input_ids": [50, 51, 52, 53], "labels": [50, 51, 52, 53]},
    {"input_ids": [60, 61, 62, 63, 64, 65], "labels": [-100, -100, -100, -100, -100, 65]},
]

SMALL = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.2,
}  # fmt: skip
MIXTURE = {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2}


def _tiny(kind, implementation="sdpa", seed=0, dtype=torch.float32, **config):
    """A tiny model of an architecture of transformers', e.g. `Llama`."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(pad_token_id=PAD, **config)
    flash = implementation == "flash_attention_2"  # not installed: `flash` below plays its part
    config._attn_implementation = "eager" if flash else implementation
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    if flash:
        model.config._attn_implementation = implementation
    return model


@pytest.fixture
def flash(monkeypatch):
    """Flash attention in plain arithmetic, in the place where transformers keeps the kernels it has loaded."""
    module = transformers.modeling_flash_attention_utils

    def attend(q, k, v, scale, causal):  # (T, heads, D)
        groups = q.size(1) // k.size(1)
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        weights = torch.einsum("qhd,khd->hqk", q, k) * (scale or q.size(-1) ** -0.5)
        if causal:
            weights = weights.masked_fill(torch.ones(weights.shape[1:]).triu(1).bool(), -math.inf)
        return torch.einsum("hqk,khd->qhd", weights.softmax(-1), v)

    def dense(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, **unused):
        return torch.stack([attend(*row, softmax_scale, causal) for row in zip(q, k, v)])

    def varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False
    ):  # fmt: skip
        assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
        assert cu_seqlens_q.dtype == torch.int32
        bounds = cu_seqlens_q.tolist()
        parts = [slice(start, end) for start, end in pairwise(bounds)]
        return torch.cat([attend(q[p], k[p], v[p], softmax_scale, causal) for p in parts])

    monkeypatch.setattr(module, "_flash_fn", dense)
    monkeypatch.setattr(module, "_flash_varlen_fn", varlen)
    monkeypatch.setattr(module, "_process_flash_kwargs_fn", module._lazy_define_process_function(varlen))
    monkeypatch.setattr(module, "_loaded_implementation", "flash_attention_2")


# ---------------------------------------------------------------------------------------------- the proof


@pytest.mark.parametrize(
    ("kind", "config", "implementation", "way"),
    [
        ("Llama", SMALL, "sdpa", POSITIONS),
        ("Llama", SMALL, "eager", POSITIONS),
        ("Llama", SMALL, "flash_attention_2", LENGTHS),
        ("GPT2", {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 4}, "sdpa", POSITIONS),
        ("Mixtral", MIXTURE, "sdpa", POSITIONS),
        ("Gemma2", {**SMALL, "head_dim": 8, "sliding_window": 4}, "eager", POSITIONS),
        # These make their masks without a look at the positions; they are given masks.
        ("GptOss", {**MIXTURE, "head_dim": 8, "sliding_window": 4}, "eager", MASKS),
        ("Mpt", {"vocab_size": 300, "d_model": 32, "n_layers": 2, "n_heads": 4}, "eager", MASKS),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_models_that_keep_documents_apart(flash, kind, config, implementation, way, dtype):
    model = _tiny(kind, implementation, dtype=dtype, **config).train()
    before = torch.get_rng_state()
    for one_row in {needs_one_row(model.config), True}:
        assert prove_boundaries(model, "packing", one_row=one_row) == way
    assert torch.equal(before, torch.get_rng_state())  # the run stays the same
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("kind", "config", "why"),
    [
        ("Bloom", {"vocab_size": 300, "hidden_size": 32, "n_layer": 1, "n_head": 4}, "the predictions in a document"),
        ("Mamba", {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 1}, "the predictions in a document"),
        (
            "Lfm2",
            {**SMALL, "num_hidden_layers": 3, "layer_types": ["full_attention", "full_attention", "conv"]},
            r"it cannot be told where documents begin \(ValueError: `causal_conv1d_fn` can't keep packed",
        ),
        (
            "Bart",
            {"vocab_size": 300, "d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 32,
             "is_decoder": True, "is_encoder_decoder": False, "init_std": 0.2},
            "the predictions in a document",
        ),
    ],
    ids=["bloom", "mamba", "short-convolutions", "bart"],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_models_that_mix_documents_are_refused(kind, config, why, dtype):
    model = _tiny(kind, "eager", dtype=dtype, **config)
    name = rf"^`padding_free=True` puts several documents into one row, and {kind}ForCausalLM \({kind.lower()}\) with "
    with pytest.raises(ValueError, match=name + rf"`attn_implementation='eager'` does not keep them apart: {why}.*"):
        prove_boundaries(model, "padding_free", one_row=True)


def test_a_trace_of_mixing_is_seen_in_any_precision():
    """A leak too weak to change a bfloat16 logit still has a gradient."""

    class Leaky(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = _tiny("Llama", dtype=torch.bfloat16, **SMALL)
            self.config = self.inner.config
            self.get_input_embeddings = self.inner.get_input_embeddings

        def forward(self, **inputs):
            out = self.inner(**inputs)
            embeddings = seen[-1]
            out.logits = out.logits + 1e-4 * embeddings.roll(1, 1).sum(-1, keepdim=True)
            return out

    seen = []
    leaky = Leaky()
    handle = leaky.get_input_embeddings().register_forward_hook(lambda m, a, out: seen.append(out), always_call=True)
    handle.remove()
    # The hook has to see the embeddings after those of the proof were put in.
    leaky.inner.model.layers[0].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with pytest.raises(ValueError, match="the predictions in a document depend on the documents before it"):
        prove_boundaries(leaky, "packing", one_row=False)


def test_absolute_positions_must_start_anew(monkeypatch):
    model = _tiny("GPT2", vocab_size=300, n_embd=32, n_layer=1, n_head=4)
    forward = model.transformer.wpe.forward
    monkeypatch.setattr(
        model.transformer.wpe, "forward", lambda ids: forward(torch.arange(ids.size(-1)).expand_as(ids))
    )
    with pytest.raises(ValueError, match="does not keep them apart: positions do not start anew with each document"):
        prove_boundaries(model, "packing", one_row=False)


def test_flash_attention_takes_one_row_only(flash):
    """Several packed rows side by side leak there, so a batch's rows have to be joined."""
    model = _tiny("Llama", "flash_attention_2", **SMALL)
    assert needs_one_row(model.config)
    ids = torch.tensor([[5, 6, 7, 20, 21], [8, 9, 20, 21, 22]])
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]])
    alone = model(input_ids=torch.tensor([[20, 21]])).logits[0]
    beside = model(input_ids=ids, position_ids=positions).logits[0, 3:]
    assert not torch.allclose(alone, beside, atol=1e-3)
    joined = model(
        input_ids=ids.view(1, -1), position_ids=positions.view(1, -1), **boundary_lengths([3, 2, 2, 3])
    ).logits[0, 3:5]
    torch.testing.assert_close(alone, joined, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_flex_attention_keeps_documents_apart():
    """Forward only: on CPUs it has no backward pass, and is refused."""
    model = _tiny("Llama", "flex_attention", **SMALL | {"num_hidden_layers": 1, "hidden_size": 64}).eval()
    ids = torch.tensor([[5, 6, 7, 20, 21], [8, 9, 20, 21, 22]])
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]])
    with torch.no_grad():
        alone = model(input_ids=torch.tensor([[20, 21]])).logits[0]
        for way in (POSITIONS, MASKS):
            told = tell_boundaries({"input_ids": ids, "position_ids": positions, "use_cache": False}, way, model)
            torch.testing.assert_close(model(**told).logits[0, 3:], alone, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match=r"NotImplementedError: FlexAttention does not support backward on CPU"):
        prove_boundaries(model, "packing", one_row=False)


# ---------------------------------------------------------------------------------------------- batches


def test_packed_rows_in_a_batch():
    rows = [
        {"input_ids": [5, 6, 7, 8, 9], "labels": [5, 6, 7, -100, 9], "seq_lengths": [2, 3]},
        {"input_ids": [20, 21, 22], "labels": [20, 21, 22], "seq_lengths": [3]},
    ]
    batch = DataCollatorForLanguageModeling(PAD, pad_to_multiple_of=6)(rows)
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[5, 6, 7, 8, 9, PAD], [20, 21, 22, PAD, PAD, PAD]],
        "attention_mask": [[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]],
        "labels": [[-100, 6, -100, -100, 9, -100], [-100, 21, 22, -100, -100, -100]],
        "position_ids": [[0, 1, 0, 1, 2, 0], [0, 1, 2, 0, 1, 2]],
    }


@pytest.mark.parametrize("packed", [True, False])
def test_joined_rows_as_trl_makes_them(packed):
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling as Theirs

    rows = [dict(row) for row in ROWS[:3]]
    if packed:
        rows = [row | {"seq_lengths": lengths} for row, lengths in zip(rows, ([3, 4], [3], [1, 1, 3]))]
    ours = DataCollatorForLanguageModeling(PAD, padding_free=True)(rows)
    theirs = Theirs(PAD, padding_free=True)(rows)
    assert {*ours} - {*theirs} == {"attention_mask"}  # all ones, for counting; the model does not get it
    assert ours["attention_mask"].all()
    for name, value in theirs.items():
        if isinstance(value, int):
            assert ours[name] == value
        else:
            assert torch.equal(ours[name], value), name
            assert ours[name].dtype == value.dtype, name


def test_documents_as_rows():
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 0, 1, 0, 1]])
    values = torch.arange(10).view(2, 5)
    (rows,) = one_document_a_row(positions, (values, -1))
    assert rows.tolist() == [[0, 1, 2], [3, 4, -1], [5, -1, -1], [6, 7, -1], [8, 9, -1]]


# ---------------------------------------------------------------------------------------------- training


@pytest.fixture
def build(tmp_path, tiny_tokenizer_factory):
    """`build(model, rows=ROWS, trainer_options={}, **config)`: an SFTTrainer that has not trained yet."""
    made = []

    def trainer(model, rows=ROWS, options=None, **config):
        made.append(None)
        settings = {
            "output_dir": str(tmp_path / str(len(made))), "use_cpu": True, "report_to": [], "disable_tqdm": True,
            "logging_steps": 1, "save_strategy": "no", "diagnose": False, "optim": "sgd", "learning_rate": 0.1,
            "max_grad_norm": 1e9, "per_device_train_batch_size": 6, "max_steps": 1, "max_length": 8, "seed": 3,
            "per_device_eval_batch_size": 4,
        }  # fmt: skip
        return SFTTrainer(
            model,
            SFTConfig(**settings | config),
            train_dataset=Dataset.from_list(rows) if isinstance(rows, list) else rows,
            processing_class=tiny_tokenizer_factory(),
            **options or {},
        )

    return trainer


def _assert_same_training(one, other, names=("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens")):
    """One step over the same rows, all of them in one batch: the same metrics, and the same weights after it."""
    for trainer in (one, other):
        if not trainer.state.log_history:
            trainer.train()
    mine, theirs = one.state.log_history[0], other.state.log_history[0]
    for name in names:
        assert mine[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-6), name
    expected = dict(other.model.named_parameters())
    for name, parameter in one.model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], atol=1e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


PACKED, SPLIT, FREE = {"packing": True}, {"packing": True, "packing_strategy": "bfd_split"}, {"padding_free": True}
JOINED = {"padding_free": True, "packing": True, "pad_to_multiple_of": 8}
slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("how", "implementation"),
    [
        pytest.param(PACKED, "sdpa", id="packed-sdpa"),
        pytest.param(PACKED, "eager", id="packed-eager"),
        pytest.param(PACKED, "flash_attention_2", id="packed-flash"),
        pytest.param(SPLIT, "sdpa", id="split-sdpa", marks=slow),
        pytest.param(SPLIT, "flash_attention_2", id="split-flash", marks=slow),
        pytest.param(FREE, "sdpa", id="padding-free-sdpa"),
        pytest.param(FREE, "eager", id="padding-free-eager", marks=slow),
        pytest.param(FREE, "flash_attention_2", id="padding-free-flash", marks=slow),
        pytest.param(JOINED, "sdpa", id="joined-sdpa", marks=slow),
        pytest.param(JOINED, "eager", id="joined-eager", marks=slow),
        pytest.param(JOINED, "flash_attention_2", id="joined-flash"),
    ],
)
def test_packed_training_equals_padded_training(build, flash, implementation, how):
    padded = build(_tiny("Llama", **SMALL))
    packed = build(_tiny("Llama", implementation, **SMALL), **how)
    _assert_same_training(packed, padded)
    if "packing" in how:
        assert len(packed.train_dataset) == 4  # 27 tokens in rows of 8: 7, 6 + 2, 5 + 3, 4
        assert [sum(lengths) for lengths in packed.train_dataset["seq_lengths"]] == [7, 8, 8, 4]
    mine, theirs = packed.recorder.take().signals, padded.recorder.take().signals
    assert mine == theirs
    assert mine["samples/no_supervised#n"] == 6  # documents, not packed rows


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        pytest.param(
            "GPT2",
            {
                "vocab_size": 300,
                "n_embd": 32,
                "n_layer": 2,
                "n_head": 4,
                "resid_pdrop": 0,
                "embd_pdrop": 0,
                "attn_pdrop": 0,
            },
            id="positions-learned",
            marks=slow,
        ),
        pytest.param("GptOss", {**MIXTURE, "head_dim": 8, "sliding_window": 4}, id="masks"),
        pytest.param("Gemma2", {**SMALL, "head_dim": 8, "sliding_window": 4}, id="sliding-window", marks=slow),
    ],
)
def test_other_architectures_packed_equal_padded(build, kind, config):
    settings = {"router_aux_loss_coef": 0.0} if kind == "GptOss" else {}
    implementation = "sdpa" if kind == "GPT2" else "eager"
    _assert_same_training(
        build(_tiny(kind, implementation, **config), packing=True, **settings),
        build(_tiny(kind, implementation, **config), **settings),
    )


def test_load_balancing_of_packed_rows_leaves_padding_out(build):
    """The auxiliary loss is a mean over the tokens of a batch; the packed rows are joined, so that there is no padding."""
    packed, padded = (
        build(_tiny("Mixtral", **MIXTURE), router_aux_loss_coef=0.5, **how) for how in ({"packing": True}, {})
    )
    _assert_same_training(packed, padded, ("loss", "grad_norm", "aux_loss", "entropy"))
    assert packed.state.log_history[0]["aux_loss"] > 0
    with pytest.raises(ValueError, match=r"; set `packing=False` or `router_aux_loss_coef=0`\.$"):
        build(_tiny("GptOss", "eager", **MIXTURE, head_dim=8), packing=True)


def test_accumulated_packed_batches_equal_one_padded_batch(build):
    packed = build(_tiny("Llama", **SMALL), packing=True, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    _assert_same_training(packed, build(_tiny("Llama", **SMALL)), ("loss", "grad_norm", "num_tokens"))


def test_packed_adapter_training_equals_padded(build):
    from peft import LoraConfig

    packed, padded = (
        build(
            _tiny("Llama", **SMALL),
            options={
                "peft_config": LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
            },
            **how,
        )
        for how in ({"packing": True}, {})
    )
    _assert_same_training(packed, padded)


def test_wrapped_rows_are_cut_but_not_mixed(build):
    """27 tokens in rows of 8: documents that are cut go on in the next row like new ones."""
    pieces = [[5, 6, 7, 8, 9, 10, 11], [20], [21, 22], [30, 31, 32, 33, 34], [40], [41], [50, 51, 52, 53], [60, 61, 62],
              [63, 64, 65]]  # fmt: skip
    rows = [{"input_ids": row["input_ids"]} for row in ROWS]
    packed = build(_tiny("Llama", **SMALL), rows, packing=True, packing_strategy="wrapped")
    assert packed.train_dataset["seq_lengths"][:] == [[7, 1], [2, 5, 1], [1, 4, 3], [3]]
    padded = build(_tiny("Llama", **SMALL), [{"input_ids": piece} for piece in pieces], per_device_train_batch_size=9)
    _assert_same_training(packed, padded)


def test_completions_only_and_packing(build):
    rows = [{"prompt": f"What is {i} + {i}?", "completion": f" It is {2 * i}."} for i in range(6)]
    settings = {"max_length": 64, "per_device_train_batch_size": 8}
    packed, padded = (build(_tiny("Llama", **SMALL), rows, **settings, **how) for how in ({"packing": True}, {}))
    assert len(packed.train_dataset) < 6
    _assert_same_training(packed, padded)


def test_packed_stream_and_evaluation(build):
    stream = IterableDataset.from_generator(lambda: iter(ROWS))
    evaluation = {"packed": Dataset.from_list(ROWS), "stream": IterableDataset.from_generator(lambda: iter(ROWS))}
    trainer = build(_tiny("Llama", **SMALL), stream, {"eval_dataset": evaluation}, packing=True)
    _assert_same_training(trainer, build(_tiny("Llama", **SMALL)))
    assert "seq_lengths" in next(iter(trainer.train_dataset))
    metrics = trainer.evaluate()
    fresh = trainer.evaluate(Dataset.from_list(ROWS))["eval_loss"]
    again = trainer.evaluate(trainer.eval_dataset["packed"])["eval_loss"]  # packed already
    assert metrics["eval_packed_loss"] == metrics["eval_stream_loss"] == fresh == again

    apart = build(
        _tiny("Llama", **SMALL), ROWS, {"eval_dataset": Dataset.from_list(ROWS)}, packing=True, eval_packing=False
    )
    assert "seq_lengths" not in apart.eval_dataset.column_names
    padded = build(_tiny("Llama", **SMALL), ROWS, {"eval_dataset": Dataset.from_list(ROWS)}, eval_packing=True)
    assert "seq_lengths" not in padded.train_dataset.column_names
    assert "seq_lengths" in padded.eval_dataset.column_names
    whole = build(_tiny("Llama", **SMALL), per_device_eval_batch_size=6).evaluate(Dataset.from_list(ROWS))["eval_loss"]
    for trainer in (apart, padded):
        trainer.args.per_device_eval_batch_size = 6
        assert trainer.evaluate()["eval_loss"] == pytest.approx(whole, rel=1e-5)


def test_metrics_of_a_joined_evaluation(build):
    def accuracy(prediction):
        targets = prediction.label_ids[:, 1:]
        hits = prediction.predictions[:, :-1].argmax(-1) == targets
        return {"accuracy": float(hits[targets != -100].mean()), "tokens": int((targets != -100).sum())}

    found = []
    for how in ({}, {"padding_free": True}, {"packing": True}):
        options = {"eval_dataset": Dataset.from_list(ROWS), "compute_metrics": accuracy}
        found.append(build(_tiny("Llama", **SMALL), options=options, **how, per_device_eval_batch_size=6).evaluate())
    for name in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy", "eval_accuracy", "eval_tokens"):
        assert found[1][name] == pytest.approx(found[0][name], rel=1e-5), name
        assert found[2][name] == pytest.approx(found[0][name], rel=1e-5), name
    assert found[0]["eval_tokens"] == 12


def test_rows_packed_beforehand_are_kept_apart(build):
    rows = [
        {"input_ids": [5, 6, 7, 20, 21], "labels": [5, 6, 7, 20, 21], "seq_lengths": [3, 2]},
        {"input_ids": [8, 9, 30, 31, 32], "labels": [8, 9, 30, 31, 32], "seq_lengths": [2, 3]},
    ]
    apart = [{"input_ids": ids} for ids in ([5, 6, 7], [20, 21], [8, 9], [30, 31, 32])]
    skip = {"dataset_kwargs": {"skip_prepare_dataset": True}}
    _assert_same_training(build(_tiny("Llama", **SMALL), rows, **skip), build(_tiny("Llama", **SMALL), apart))


def test_positions_of_a_users_collator_are_the_users(build):
    """Nothing is packed: what the collator says about padding and positions goes to the model as it is."""

    def left_padded(rows):
        width = max(len(row["input_ids"]) for row in rows)
        sides = [width - len(row["input_ids"]) for row in rows]
        return {
            "input_ids": torch.tensor([[PAD] * n + row["input_ids"] for n, row in zip(sides, rows)]),
            "labels": torch.tensor([[-100] * n + [-100, *row["labels"][1:]] for n, row in zip(sides, rows)]),
            "attention_mask": torch.tensor([[0] * n + [1] * (width - n) for n in sides]),
            "position_ids": torch.stack([(torch.arange(width) - n).clamp(min=0) for n in sides]),
        }

    own = build(_tiny("Llama", **SMALL), options={"data_collator": left_padded})
    _assert_same_training(own, build(_tiny("Llama", **SMALL)))


def test_cut_documents_are_counted_in_packed_rows(build):
    rows = [{"input_ids": list(range(10, 10 + n))} for n in (9, 3, 2)]
    for strategy, cut in (("bfd", 1 / 3), ("bfd_split", 0.0), ("wrapped", 0.0)):
        trainer = build(_tiny("Llama", **SMALL), rows, packing=True, packing_strategy=strategy)
        trainer.train()
        assert trainer.recorder.take().signals["samples/truncated"] == cut, strategy


# ---------------------------------------------------------------------------------------------- like TRL


@pytest.mark.parametrize(
    "config",
    [
        {"packing": True, "max_length": 24},
        pytest.param({"packing": True, "packing_strategy": "bfd_split", "max_length": 10}, marks=pytest.mark.slow),
        pytest.param({"packing": True, "shuffle_dataset": True, "max_length": 32}, marks=pytest.mark.slow),
        {"padding_free": True, "max_length": None},
        pytest.param({"packing": True, "max_length": 24, "loss_type": "dft"}, marks=pytest.mark.slow),
        pytest.param({"packing": True, "max_length": 24, "label_smoothing_factor": 0.1}, marks=pytest.mark.slow),
    ],
    ids=["bfd", "bfd-split", "shuffled", "padding-free", "dft", "smoothed"],
)  # fmt: skip
def test_packed_training_equals_trl(build, tmp_path, tiny_tokenizer_factory, config):
    trl = pytest.importorskip("trl")
    texts = [
        "The sky is blue.",
        "What is 2 + 2? It is 4.",
        "Two.",
        "the quick brown fox",
        "system user",
        "a b c d e f g",
    ]
    rows = [{"text": text} for text in texts]
    config = {"per_device_train_batch_size": 2, "max_steps": 3, "max_grad_norm": 1.0, **config}
    ours = build(_tiny("Llama", **SMALL), rows, **config)
    ours.train()
    args = {name: getattr(ours.args, name) for name in ("use_cpu", "report_to", "disable_tqdm", "logging_steps", "optim",
            "learning_rate", "seed", "save_strategy")}  # fmt: skip
    theirs = trl.SFTTrainer(
        _tiny("Llama", **SMALL),
        trl.SFTConfig(str(tmp_path / "trl"), bf16=False, **args, **config),
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer_factory(),
    )
    theirs.train()
    for mine, other in zip(ours.state.log_history[:3], theirs.state.log_history[:3], strict=True):
        for name in ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens"):
            assert mine[name] == pytest.approx(other[name], rel=2e-5, abs=2e-5), name
    expected = dict(theirs.model.named_parameters())
    for name, parameter in ours.model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------------- mistakes


def test_mistakes_get_one_sentence(build, tiny_tokenizer_factory):
    from peft import PromptTuningConfig

    cases = [
        (
            {"packing": True, "max_length": None}, {},
            "`packing=True` fills rows of `max_length` tokens, and `max_length` is None; set it to the length that rows "
            "shall have.",
        ),
        (
            {"packing": True, "packing_strategy": "best"}, {},
            "`packing_strategy` is 'best'; use one of 'bfd', 'bfd_split', 'wrapped'.",
        ),
        (
            {"padding_free": True}, {"data_collator": DataCollatorForLanguageModeling(PAD)},
            "`padding_free=True` needs batches that say where documents begin, which the trainer's own collator makes; "
            "drop `data_collator`, or set `padding_free=False`.",
        ),
        (
            {"packing": True}, {"peft_config": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)},
            "`packing=True` puts several documents into one row, and PromptTuningConfig puts its virtual tokens before "
            "the first of them only; set `packing=False`, or use another adapter, such as LoRA.",
        ),
    ]  # fmt: skip
    for config, options, message in cases:
        with pytest.raises(ValueError) as error:
            build(_tiny("Llama", **SMALL), ROWS, options, **config)
        assert str(error.value) == message
    with pytest.raises(ValueError) as error:
        build(_tiny("Bloom", "eager", vocab_size=300, hidden_size=32, n_layer=1, n_head=4), packing=True)
    assert re.sub(r"\s+", " ", str(error.value)) == (
        "`packing=True` puts several documents into one row, and BloomForCausalLM (bloom) with "
        "`attn_implementation='eager'` does not keep them apart: the predictions in a document depend on the documents "
        "before it; set `packing=False`."
    )


def test_sharded_weights_cannot_be_tried(build, monkeypatch):
    from outspoken.trainers.attention import refuse_unproved

    assert refuse_unproved(_tiny("Llama", **SMALL).config, "packing", router_loss=False) == MASKS
    assert refuse_unproved(_tiny("Llama", "flash_attention_2", **SMALL).config, "packing", True) == LENGTHS
    with pytest.raises(ValueError, match=r"^`packing=True` with sharded weights needs an architecture that surely"):
        refuse_unproved(
            _tiny("Mamba", "eager", vocab_size=300, hidden_size=32, num_hidden_layers=1).config, "packing", False
        )
    # Masks, not believing the positions: right for architectures that ignore these.
    monkeypatch.setattr(SFTTrainer, "_find_boundaries", lambda self, joining: MASKS)
    settings = {"router_aux_loss_coef": 0.0}
    model = {"kind": "GptOss", "implementation": "eager", **MIXTURE, "head_dim": 8}
    _assert_same_training(build(_tiny(**model), packing=True, **settings), build(_tiny(**model), **settings))
