"""KTOTrainer against TRL 1.16.0's, run here on the same tiny model, data and order: loss, metrics, trained weights."""

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, get_peft_model

from outspoken.trainers.kto import KTOConfig, KTOTrainer

trl = pytest.importorskip("trl")

ROWS = [
    {"prompt": "What color is the sky?", "completion": " It is blue.", "label": True},
    {"prompt": "What is 2 + 2?", "completion": " It is 4, and that is all there is to say about it.", "label": False},
    {"prompt": "The grass is", "completion": " green.", "label": True},
    {"prompt": "Say", "completion": " a b c d e f g", "label": True},
    {"prompt": "The quick brown fox", "completion": " sleeps", "label": False},
    {"prompt": "the lazy dog, and then it", "completion": " is 7.", "label": False},
]
METRICS = [
    *(f"{group}/{side}" for group in ("rewards", "logps", "logits") for side in ("chosen", "rejected")),
    "rewards/margins", "kl", "entropy", "num_tokens", "aux_loss", "loss", "grad_norm",
]  # fmt: skip


def _says(role, text):
    return [{"role": role, "content": text}]


CHATS = [
    {
        "prompt": _says("user", "What color is the sky?"),
        "completion": _says("assistant", "It is blue."),
        "label": True,
    },
    {"prompt": _says("user", "Hi"), "completion": _says("assistant", "I said hello."), "label": False},
    {"prompt": _says("user", "What is 2 + 2?"), "completion": _says("assistant", "It is 4."), "label": True},
    {"prompt": _says("user", "And 3?"), "completion": _says("assistant", "The lazy dog."), "label": False},
]
PAIRS = [
    {"prompt": f"What is {i} + 1?", "chosen": f" It is {i + 1}.", "rejected": f" The fox {'x' * i}."} for i in range(4)
]
# No prompt: it is what both begin with.
IMPLICIT = [
    {"chosen": f"What is {i} + 1? It is {i + 1}.", "rejected": f"What is {i} + 1? The fox {'x' * i}."}
    for i in range(4)
]
CHAT_PAIRS = [
    {
        "chosen": _says("user", f"What is {i} + 1?") + _says("assistant", f"It is {i + 1}."),
        "rejected": _says("user", f"What is {i} + 1?") + _says("assistant", f"The fox {'x' * i}."),
    }
    for i in range(4)
]


@pytest.fixture
def run(tmp_path, tiny_model_factory, tiny_tokenizer_factory):
    """Train with both libraries; returns `(our trainer, TRL's trainer)` after training."""

    def train(rows, model=None, trainer_kwargs=None, **config):
        trained = []
        for name, config_class, trainer_class in (
            ("ours", KTOConfig, KTOTrainer),
            ("trl", trl.KTOConfig, trl.KTOTrainer),
        ):
            settings = {
                "output_dir": str(tmp_path / name),
                "use_cpu": True,
                "bf16": False,
                "report_to": [],
                "save_strategy": "no",
                "logging_steps": 1,
                "disable_tqdm": True,
                "train_sampling_strategy": "sequential",
                "gradient_checkpointing": False,
                # Plain gradient descent: the weights differ only as much as the gradients do.
                "optim": "sgd",
                "learning_rate": 1.0,
                "per_device_train_batch_size": 3,
                "max_steps": 4,
                **config,
            }
            if name == "ours":
                settings["diagnose"] = False
            kwargs = {key: value() if callable(value) else value for key, value in (trainer_kwargs or {}).items()}
            if "metrics" in kwargs:
                kwargs["compute_metrics"] = kwargs.pop("metrics")[0]
            policy = model() if model else tiny_model_factory()
            # TRL loads its reference from the path in the config; give it the same one as ours.
            if name == "trl" and not (hasattr(policy, "peft_config") or "peft_config" in kwargs):
                kwargs.setdefault("ref_model", model() if model else tiny_model_factory())
            trainer = trainer_class(
                model=policy,
                args=config_class(**settings),
                train_dataset=rows() if callable(rows) else Dataset.from_list(rows),
                processing_class=tiny_tokenizer_factory(),
                **kwargs,
            )
            trainer.train()
            trained.append(trainer)
        return trained

    return train


def _assert_same(ours, theirs, names=METRICS, expect=("kl", "rewards/margins")):
    mine = [entry for entry in ours.state.log_history if "loss" in entry]
    other = [entry for entry in theirs.state.log_history if "loss" in entry]
    assert len(mine) == len(other) > 0
    for a, b in zip(mine, other):
        assert {*a} & {*names} == {*b} & {*names}
        for name in {*a} & {*names}:
            assert a[name] == pytest.approx(b[name], rel=1e-5, abs=1e-5), (name, a, b)
    assert all(any(entry.get(name, 0) != 0 for entry in mine) for name in expect)
    expected = dict(theirs.model.named_parameters())
    for name, parameter in ours.model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("rows", "config"),
    [
        pytest.param(ROWS, {}, id="kto"),
        pytest.param(
            ROWS,
            {"desirable_weight": 1.3, "undesirable_weight": 0.4, "beta": 0.5},
            id="weights-and-beta",
            marks=pytest.mark.slow,
        ),
        pytest.param(CHATS, {"per_device_train_batch_size": 2}, id="conversations", marks=pytest.mark.slow),
        pytest.param(
            ROWS[:4],
            {"max_length": 14, "pad_to_multiple_of": 16, "per_device_train_batch_size": 2},
            id="truncation-and-padding",
        ),
        pytest.param(ROWS, {"gradient_checkpointing": True}, id="checkpointing", marks=pytest.mark.slow),
        pytest.param(PAIRS, {}, id="pairs", marks=pytest.mark.slow),
        pytest.param(IMPLICIT, {}, id="implicit-prompts", marks=pytest.mark.slow),
        pytest.param(CHAT_PAIRS, {"max_steps": 2}, id="implicit-conversations", marks=pytest.mark.slow),
    ],
)
def test_training_equals_trl(run, rows, config):
    _assert_same(*run(rows, **config))


def test_accumulation_equals_trl(run):
    ours, theirs = run(
        ROWS, gradient_accumulation_steps=2, desirable_weight=1.3, undesirable_weight=0.4, beta=0.5, max_steps=3
    )
    # TRL's means over rows are means over micro-batches of means, which weigh the rows unequally.
    names = [name for name in METRICS if not name.startswith(("rewards/", "logps/"))]
    _assert_same(ours, theirs, names, expect=("kl",))


def test_apo_zero_unpaired_equals_trl_but_logs_no_kl(run):
    ours, theirs = run(ROWS, loss_type="apo_zero_unpaired", undesirable_weight=0.5)
    assert all("kl" not in entry for entry in ours.state.log_history)
    assert all(entry["kl"] == 0 for entry in theirs.state.log_history if "loss" in entry)
    _assert_same(ours, theirs, [name for name in METRICS if name != "kl"], expect=("rewards/margins",))


@pytest.mark.slow
def test_tools_and_template_settings_equal_trl(run):
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
    rows = [{**row, "tools": [tool], "chat_template_kwargs": {"add": 1}} for row in CHATS]
    ours, theirs = run(rows, per_device_train_batch_size=2, max_steps=2)
    _assert_same(ours, theirs, expect=("kl",))
    assert "Tools:" in ours.processing_class.decode(ours.train_dataset[0]["prompt_ids"])


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        pytest.param({"target_modules": "all-linear", "use_dora": True}, marks=pytest.mark.slow),
    ],
    ids=["lora", "dora"],
)
def test_adapter_training_equals_trl(run, lora):
    ours, theirs = run(
        ROWS, trainer_kwargs={"peft_config": lambda: LoraConfig(task_type="CAUSAL_LM", **lora)}, learning_rate=10.0
    )
    assert ours.ref_model is None
    _assert_same(ours, theirs)


def test_adapter_trained_before_is_its_own_reference_as_in_trl(run, tiny_model_factory):
    def trained_before():
        torch.manual_seed(0)
        model = get_peft_model(tiny_model_factory(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        return model

    ours, theirs = run(ROWS, model=trained_before, learning_rate=3.0)
    assert ours.state.log_history[0]["rewards/chosen"] == 0
    _assert_same(ours, theirs)


@pytest.mark.slow
def test_given_reference_equals_trl(run, tiny_model_factory):
    ours, theirs = run(ROWS, trainer_kwargs={"ref_model": lambda: tiny_model_factory(seed=1)}, learning_rate=0.1)
    assert ours.state.log_history[0]["rewards/chosen"] != 0
    _assert_same(ours, theirs)


def test_precomputed_reference_equals_trl(run):
    # One batch is the whole dataset, so that both libraries form the same mismatched pairs.
    rows = [{**row, "label": i > 0} for i, row in enumerate(ROWS)]
    ours, theirs = run(rows, precompute_ref_log_probs=True, per_device_train_batch_size=6)
    assert ours.ref_model is None
    columns = ["KL_completion_ids", "ref_logps", "ref_KL_logps"]
    mine, other = (trainer.train_dataset.select_columns(columns)[:] for trainer in (ours, theirs))
    assert mine["KL_completion_ids"] == other["KL_completion_ids"]
    for column in columns[1:]:
        assert mine[column] == pytest.approx(other[column], rel=1e-6)
    _assert_same(ours, theirs)


def test_moving_reference_equals_trl(run):
    config = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.3}
    ours, theirs = run(ROWS, **config)
    _assert_same(ours, theirs)
    for mine, other in zip(ours.ref_model.parameters(), theirs.ref_model.parameters()):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-6)
    policy = dict(ours.model.named_parameters())
    assert not any(torch.equal(p, policy[name]) for name, p in ours.ref_model.named_parameters() if p.dim() > 1)


@pytest.mark.parametrize("coef", [0.5, pytest.param(0.0, marks=pytest.mark.slow)])
def test_mixture_of_experts_equals_trl(run, tiny_tokenizer, coef):
    from transformers import MixtralConfig, MixtralForCausalLM

    def mixtral():
        torch.manual_seed(0)
        return MixtralForCausalLM(
            MixtralConfig(
                vocab_size=len(tiny_tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, initializer_range=0.2,
            )
        )  # fmt: skip

    ours, theirs = run(ROWS, model=mixtral, router_aux_loss_coef=coef, max_steps=3, learning_rate=0.1)
    _assert_same(ours, theirs, expect=("rewards/margins", *(["aux_loss"] if coef else [])))
    assert ("aux_loss" in ours.state.log_history[0]) == bool(coef)


def test_stream_equals_trl(run):
    _assert_same(*run(lambda: IterableDataset.from_generator(lambda: iter(ROWS)), max_steps=2), expect=())


def _accuracy(prediction):
    hits = prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]
    return {"accuracy": float(hits.mean())}


@pytest.mark.parametrize(
    "metrics", [pytest.param(None, marks=pytest.mark.slow), _accuracy], ids=["loss-only", "compute-metrics"]
)
def test_evaluation_equals_trl(run, metrics):
    several = {"one": Dataset.from_list(ROWS), "two": Dataset.from_list(CHATS[:3])}
    ours, theirs = run(
        ROWS,
        trainer_kwargs={"eval_dataset": several, "metrics": (metrics,)},
        eval_strategy="steps",
        eval_steps=2,
        # TRL forms the mismatched pairs of an evaluation in blocks of the training batch. One batch holds all rows,
        # for TRL's means over rows are else means of means.
        per_device_train_batch_size=6,
        per_device_eval_batch_size=6,
        max_steps=2,
    )
    mine = [entry for entry in ours.state.log_history if any(key.startswith("eval_") for key in entry)]
    other = [entry for entry in theirs.state.log_history if any(key.startswith("eval_") for key in entry)]
    assert len(mine) == len(other) == 2
    for a, b in zip(mine, other):
        # Beyond TRL, the metrics stand under their dataset's name too, as the loss does.
        prefix = "eval_one_" if "eval_one_loss" in a else "eval_two_"
        twice = {key: value for key, value in a.items() if key not in b}
        assert {*b} <= {*a} and twice
        assert twice == {key: a[f"eval_{key.removeprefix(prefix)}"] for key in twice}
        for name in b:
            if not name.endswith(("_runtime", "_per_second")):
                assert a[name] == pytest.approx(b[name], rel=1e-5, abs=1e-5), name
    fresh = Dataset.from_list(PAIRS[:3])
    a, b = ours.evaluate(fresh), theirs.evaluate(fresh)
    assert a["eval_loss"] == pytest.approx(b["eval_loss"], rel=1e-5)
    assert a["eval_kl"] == pytest.approx(b["eval_kl"], rel=1e-5, abs=1e-5)


@pytest.mark.slow
def test_model_by_path_equals_trl(tmp_path, tiny_model_dir):
    trained = []
    for config_class, trainer_class, extra in (
        (KTOConfig, KTOTrainer, {"diagnose": False}),
        (trl.KTOConfig, trl.KTOTrainer, {}),
    ):
        args = config_class(
            str(tmp_path), use_cpu=True, bf16=False, report_to=[], save_strategy="no", logging_steps=1, max_steps=3,
            disable_tqdm=True, learning_rate=1e-2, per_device_train_batch_size=3,
            train_sampling_strategy="sequential", **extra,
        )  # fmt: skip
        trainer = trainer_class(tiny_model_dir, args=args, train_dataset=Dataset.from_list(ROWS))
        trainer.train()
        trained.append(trainer)
    _assert_same(*trained, expect=("rewards/margins",))
    assert trained[0].model.dtype == torch.float32
