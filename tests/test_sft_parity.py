"""SFTTrainer against TRL 1.16.0's, run here on the same tiny model and data: loss, metrics, trained weights."""

import json

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig

from outspoken.trainers.sft import SFTConfig, SFTTrainer

trl = pytest.importorskip("trl")

TEXTS = [
    {"text": "The sky is blue and the grass is green."},
    {"text": "What color is the sky? It is blue."},
    {"text": "the quick brown fox jumps over the lazy dog, and then it sleeps for a very long time under the tree"},
    {"text": "Two."},
    {"text": "What is 2 + 2? It is 4. What is 3 + 4? It is 7."},
    {"text": "system user assistant tool"},
]
PAIRS = [
    {"prompt": "What color is the sky?", "completion": " It is blue."},
    {"prompt": "What is 2 + 2?", "completion": " It is 4, and that is all there is to say about it."},
    {"prompt": "The grass is", "completion": " green."},
    {"prompt": "Say nothing", "completion": "."},
    {"prompt": "Say", "completion": " a b c d e f g"},
]


def _turns(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


CHATS = [
    {"messages": _turns("What color is the sky?", "It is blue.", "And the grass?", "It is green.")},
    {"messages": _turns("What is 2 + 2?", "It is 4.")},
    {"messages": _turns("Hi", "The quick brown fox jumps over the lazy dog, over and over again.")},
]
CHAT_PAIRS = [
    {"prompt": _turns("What color is the sky?"), "completion": [{"role": "assistant", "content": "It is blue."}]},
    {"prompt": _turns("Hi", "Hello", "What?"), "completion": [{"role": "assistant", "content": "I said hello."}]},
]


TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}
TOOL_CHATS = [{"messages": row["messages"], "tools": json.dumps([TOOL])} for row in CHATS]
SHARED_CHATS = [
    {"conversations": [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]}
    for texts in (["What color is the sky?", "It is blue."], ["Hi", "Hello", "Bye", "Goodbye"])
]
TOKENS = [
    {"input_ids": [9, 10, 11, 12, 13], "completion_mask": [0, 0, 1, 1, 1]},
    {"input_ids": [20, 21, 22], "completion_mask": [0, 1, 1]},
    {"input_ids": [30, 31, 32, 33, 34, 35, 36], "completion_mask": [0, 0, 0, 0, 0, 1, 1]},
]


@pytest.fixture
def run(tmp_path, tiny_model_factory, tiny_tokenizer_factory):
    """Train with both libraries; returns `(our trainer, TRL's trainer)` after training."""

    def train(rows, model=None, tokenizer=None, trainer_kwargs=None, **config):
        trained = []
        for name, config_class, trainer_class in (
            ("ours", SFTConfig, SFTTrainer),
            ("trl", trl.SFTConfig, trl.SFTTrainer),
        ):
            settings = {
                "output_dir": str(tmp_path / name),
                "use_cpu": True,
                "bf16": False,
                "report_to": [],
                "save_strategy": "no",
                "logging_steps": 1,
                "disable_tqdm": True,
                # Plain gradient descent: the weights differ only as much as the gradients do.
                "optim": "sgd",
                "learning_rate": 0.1,
                "per_device_train_batch_size": 2,
                "max_steps": 3,
                **config,
            }
            if name == "ours":
                settings["diagnose"] = False
            kwargs = {"peft_config": None, **(trainer_kwargs or {})}
            if kwargs["peft_config"] is not None:
                kwargs["peft_config"] = LoraConfig(**kwargs["peft_config"])
            trainer = trainer_class(
                model=model() if model else tiny_model_factory(),
                args=config_class(**settings),
                train_dataset=rows() if callable(rows) else Dataset.from_list(rows),
                processing_class=tokenizer() if tokenizer else tiny_tokenizer_factory(),
                **kwargs,
            )
            trainer.train()
            trained.append(trainer)
        return trained

    return train


def _assert_same(ours, theirs, names=("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens")):
    mine = [entry for entry in ours.state.log_history if "loss" in entry]
    other = [entry for entry in theirs.state.log_history if "loss" in entry]
    assert len(mine) == len(other) > 0
    for a, b in zip(mine, other):
        for name in names:
            assert a[name] == pytest.approx(b[name], rel=2e-5, abs=2e-5), (name, a, b)
    expected = dict(theirs.model.named_parameters())
    for name, parameter in ours.model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("rows", "config"),
    [
        pytest.param(TEXTS, {}, id="nll"),
        pytest.param(TEXTS, {"loss_type": "dft"}, id="dft"),
        pytest.param(PAIRS, {}, id="completion-only"),
        pytest.param(PAIRS, {"completion_only_loss": False}, id="whole-sequence-of-pairs", marks=pytest.mark.slow),
        pytest.param(CHATS, {"assistant_only_loss": True}, id="assistant-only"),
        pytest.param(CHAT_PAIRS, {"assistant_only_loss": True}, id="assistant-only-pairs", marks=pytest.mark.slow),
        pytest.param(
            TEXTS, {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 1}, id="uneven-accumulation"
        ),
        pytest.param(
            PAIRS,
            {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "loss_type": "dft"},
            id="dft-accumulation",
        ),
        pytest.param(TEXTS, {"label_smoothing_factor": 0.1}, id="label-smoothing", marks=pytest.mark.slow),
        pytest.param(
            TEXTS, {"label_smoothing_factor": 0.3, "gradient_accumulation_steps": 2}, id="label-smoothing-accumulation"
        ),
        pytest.param(
            TEXTS, {"gradient_checkpointing": False}, id="without-gradient-checkpointing", marks=pytest.mark.slow
        ),
        pytest.param(TEXTS, {"max_length": 8, "pad_to_multiple_of": 16}, id="truncation-and-padding"),
        pytest.param(TEXTS, {"shuffle_dataset": True, "seed": 7}, id="shuffled", marks=pytest.mark.slow),
        pytest.param(TEXTS, {"neftune_noise_alpha": 5.0, "logging_steps": 1}, id="neftune"),
        pytest.param(TOOL_CHATS, {"assistant_only_loss": True}, id="tools"),
        pytest.param(SHARED_CHATS, {}, id="sharegpt", marks=pytest.mark.slow),
        pytest.param(TOKENS, {"completion_only_loss": True}, id="tokenized", marks=pytest.mark.slow),
        pytest.param(TOKENS, {"completion_only_loss": True, "packing": True, "max_length": 9}, id="tokenized-packed"),
        pytest.param(PAIRS, {"packing": True, "max_length": 64}, id="completion-only-packed", marks=pytest.mark.slow),
        pytest.param(
            PAIRS,
            {"packing": True, "packing_strategy": "bfd_split", "max_length": 12, "loss_type": "dft"},
            id="completion-only-split-dft",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            CHATS,
            {"assistant_only_loss": True, "packing": True, "max_length": 96},
            id="assistant-only-packed",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            CHATS,
            {"assistant_only_loss": True, "padding_free": True, "max_length": None, "label_smoothing_factor": 0.2},
            id="assistant-only-padding-free-smoothed",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            TEXTS,
            {"packing": True, "max_length": 32, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 1},
            id="packed-accumulation",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            TEXTS,
            {"padding_free": True, "max_length": None, "neftune_noise_alpha": 5.0},
            id="padding-free-neftune",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            PAIRS, {"max_length": 14, "completion_only_loss": True}, id="cut-completions", marks=pytest.mark.slow
        ),
        pytest.param(
            TEXTS,
            {"weight_decay": 0.1, "warmup_steps": 2, "lr_scheduler_type": "cosine"},
            id="scheduler",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_training_equals_trl(run, rows, config):
    _assert_same(*run(rows, **config))


@pytest.mark.slow
@pytest.mark.parametrize("config", [{"packing": True, "max_length": 64}, {"padding_free": True, "max_length": None}])
def test_packed_adapter_training_equals_trl(run, config):
    lora = {"peft_config": {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"], "use_rslora": True}}
    _assert_same(*run(PAIRS, trainer_kwargs=lora, **config))


@pytest.mark.slow
def test_packed_mixture_of_experts_equals_trl(run, tiny_tokenizer):
    model = lambda: _tiny_mixtral(len(tiny_tokenizer))  # noqa: E731
    names = ["loss", "entropy", "mean_token_accuracy", "aux_loss", "num_tokens"]
    _assert_same(*run(TEXTS, model=model, packing=True, max_length=32, router_aux_loss_coef=0.5), names)


@pytest.mark.slow
def test_formatting_function_equals_trl(run):
    rows = [{"question": row["prompt"], "answer": row["completion"]} for row in PAIRS]
    _assert_same(*run(rows, trainer_kwargs={"formatting_func": lambda row: row["question"] + row["answer"]}))


def test_packed_evaluation_equals_trl(run):
    options = {"eval_dataset": {"one": Dataset.from_list(PAIRS)}}
    settings = {"packing": True, "max_length": 64, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 2}
    ours, theirs = run(PAIRS, trainer_kwargs=options, **settings)
    for name in ("eval_one_loss", "eval_entropy", "eval_mean_token_accuracy"):
        a, b = ([e[name] for e in t.state.log_history if name in e] for t in (ours, theirs))
        assert len(a) == 1
        assert a == pytest.approx(b, rel=2e-5), name


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        pytest.param({"target_modules": "all-linear", "use_dora": True}, marks=pytest.mark.slow),
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=["lora", "dora", "lm-head-saved"],
)
def test_adapter_training_equals_trl(run, lora):
    ours, theirs = run(PAIRS, trainer_kwargs={"peft_config": {"task_type": "CAUSAL_LM", **lora}})
    _assert_same(ours, theirs)
    assert {n for n, p in ours.model.named_parameters() if p.requires_grad} == {
        n for n, p in theirs.model.named_parameters() if p.requires_grad
    }


def test_qwen2_with_tied_embeddings_equals_trl(run, tiny_model_factory):
    _assert_same(*run(TEXTS, model=lambda: tiny_model_factory(architecture="qwen2", tie_word_embeddings=True)))


def _tiny_mixtral(vocab_size):
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=vocab_size, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=4, initializer_range=0.2,
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [{"router_aux_loss_coef": 0.5}, pytest.param({"router_aux_loss_coef": 0.0}, marks=pytest.mark.slow), {}],
)
def test_mixture_of_experts_equals_trl(run, tiny_tokenizer, config):
    ours, theirs = run(
        TEXTS, model=lambda: _tiny_mixtral(len(tiny_tokenizer)), gradient_accumulation_steps=2, max_steps=2, **config
    )
    names = ["loss", "entropy", "mean_token_accuracy"]
    if config.get("router_aux_loss_coef") != 0.0:
        names.append("aux_loss")
    else:
        assert "aux_loss" not in ours.state.log_history[0]
    _assert_same(ours, theirs, names)


def test_stream_equals_trl(run):
    def rows():
        return IterableDataset.from_generator(lambda: iter(PAIRS))

    _assert_same(*run(rows, max_length=20))


def test_user_loss_equals_trl(run):
    def loss_of(outputs, labels, num_items_in_batch=None):
        logps = outputs.logits[:, :-1].log_softmax(-1)
        targets = labels[:, 1:]
        picked = logps.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return -(picked * (targets != -100)).sum() * 2 / num_items_in_batch

    _assert_same(*run(TEXTS, trainer_kwargs={"compute_loss_func": loss_of}))


def _accuracy(prediction):
    hits = prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]
    return {"accuracy": float(hits[prediction.label_ids[:, 1:] != -100].mean())}


@pytest.mark.parametrize("metrics", [None, _accuracy], ids=["loss-only", "compute-metrics"])
def test_evaluation_equals_trl(run, metrics):
    several = {"one": Dataset.from_list(PAIRS[:3]), "two": Dataset.from_list(CHAT_PAIRS)}
    ours, theirs = run(
        PAIRS,
        trainer_kwargs={"eval_dataset": several, "compute_metrics": metrics},
        eval_strategy="steps",
        eval_steps=2,
        per_device_eval_batch_size=2,
        max_steps=2,
    )
    mine = [entry for entry in ours.state.log_history if any(key.startswith("eval_") for key in entry)]
    other = [entry for entry in theirs.state.log_history if any(key.startswith("eval_") for key in entry)]
    timed = ("_runtime", "_per_second")
    assert len(mine) == len(other) == 2
    for a, b in zip(mine, other):
        # Beyond TRL, the metrics stand under their dataset's name too, as the loss does.
        prefix = "eval_one_" if "eval_one_loss" in a else "eval_two_"
        twice = {key: value for key, value in a.items() if key not in b}
        assert {*b} <= {*a} and twice
        assert twice == {key: a[f"eval_{key.removeprefix(prefix)}"] for key in twice}
        for name in b:
            if not name.endswith(timed):
                assert a[name] == pytest.approx(b[name], rel=2e-5, abs=2e-5), name
    fresh = Dataset.from_list([{"text": "A dataset that was not there before."}])
    a, b = ours.evaluate(fresh), theirs.evaluate(fresh)
    assert a["eval_loss"] == pytest.approx(b["eval_loss"], rel=1e-5)


def test_model_by_path_equals_trl(tmp_path, tiny_model_dir):
    trained = []
    for config_class, trainer_class, extra in (
        (SFTConfig, SFTTrainer, {"diagnose": False}),
        (trl.SFTConfig, trl.SFTTrainer, {}),
    ):
        args = config_class(
            str(tmp_path), use_cpu=True, bf16=False, report_to=[], save_strategy="no", logging_steps=1, max_steps=1,
            disable_tqdm=True, learning_rate=1e-2, **extra,
        )  # fmt: skip
        trainer = trainer_class(tiny_model_dir, args, train_dataset=Dataset.from_list(TEXTS))
        trainer.train()
        trained.append(trainer)
    _assert_same(*trained)
    assert trained[0].model.dtype == torch.float32
