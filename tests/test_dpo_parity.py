"""DPOTrainer against TRL 1.16.0's, run here on the same tiny model and data: loss, gradients, metrics, trained weights."""

import copy
import json

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

from outspoken.trainers.dpo import LOSS_TYPES, DataCollatorForPreference, DPOConfig, DPOTrainer

trl = pytest.importorskip("trl")

ROWS = [
    {"prompt": "What color is the sky?", "chosen": " It is blue.", "rejected": " The grass is green, and so is it."},
    {"prompt": "What is 2 + 2?", "chosen": " It is 4, and that is all there is to say.", "rejected": " 5"},
    {"prompt": "The grass is", "chosen": " green.", "rejected": " blue."},
    {"prompt": "Say", "chosen": " a b c d e f g", "rejected": " nothing at all"},
]


def _turns(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def _answer(text):
    return [{"role": "assistant", "content": text}]


CHATS = [
    {"prompt": _turns("What color is the sky?"), "chosen": _answer("It is blue."), "rejected": _answer("Green.")},
    {"prompt": _turns("Hi", "Hello", "What?"), "chosen": _answer("I said hello."), "rejected": _answer("No")},
]
METRICS = (
    "loss", "entropy", "mean_token_accuracy", "num_tokens", "rewards/chosen", "rewards/rejected",
    "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected",
)  # fmt: skip


@pytest.fixture(scope="module")
def build(tmp_path_factory, tiny_model_dir, tiny_tokenizer_factory):
    """`build(rows, ...)`: our trainer and TRL's, on the tiny model loaded from its path."""

    def make(rows=ROWS, model=None, ours=None, ref_model=None, **config):
        kwargs = {key: config.pop(key) for key in ("eval_dataset", "compute_metrics") if key in config}
        peft_config = config.pop("peft_config", None)
        built = []
        for config_class, trainer_class in ((DPOConfig, DPOTrainer), (trl.DPOConfig, trl.DPOTrainer)):
            settings = {
                "output_dir": str(tmp_path_factory.mktemp("run")),
                "use_cpu": True,
                "bf16": False,
                "report_to": [],
                "save_strategy": "no",
                "logging_steps": 1,
                "disable_tqdm": True,
                "gradient_checkpointing": False,
                # Plain gradient descent: the weights differ only as much as the gradients do.
                "optim": "sgd",
                "learning_rate": 0.01,
                "per_device_train_batch_size": 2,
                "max_steps": 2,
                "beta": 0.3,
                **config,
            }
            if config_class is DPOConfig:
                settings |= {"diagnose": False, **(ours or {})}
            trainer = trainer_class(
                model=model() if model else tiny_model_dir,
                ref_model=ref_model() if ref_model else None,
                args=config_class(**settings),
                train_dataset=rows() if callable(rows) else Dataset.from_list(copy.deepcopy(rows)),
                processing_class=tiny_tokenizer_factory(),
                peft_config=copy.deepcopy(peft_config),
                **kwargs,
            )
            built.append(trainer)
        return built

    return make


def train(trainers):
    for trainer in trainers:
        trainer.train()
    return trainers


def assert_same_runs(ours, theirs, names=(*METRICS, "grad_norm")):
    mine = [entry for entry in ours.state.log_history if "loss" in entry]
    other = [entry for entry in theirs.state.log_history if "loss" in entry]
    assert len(mine) == len(other) > 0
    for a, b in zip(mine, other):
        for name in names:
            assert a[name] == pytest.approx(b[name], rel=2e-5, abs=2e-5), (name, a, b)
    expected = dict(theirs.model.named_parameters())
    for name, parameter in ours.model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


# ---------------------------------------------------------------------- one step, every loss


@pytest.fixture(scope="module")
def moved(build):
    """Both trainers, with a policy that has moved away from its reference in the same way."""
    trainers = build(use_weighting=True)  # TRL prepares for it when the trainer is built
    for trainer in trainers:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    return trainers


OPTIONS = {
    # name of the field -> name of TRL's copy of it
    "loss_type": "loss_types", "loss_weights": "loss_weights", "beta": "beta", "label_smoothing": "label_smoothing",
    "ld_alpha": "ld_alpha", "f_divergence_type": "f_divergence_type", "use_weighting": "use_weighting",
    "f_alpha_divergence_coef": "f_alpha_divergence_coef",
}  # fmt: skip


def step(trainer, own_names, **options):
    """Loss, gradients and metrics of one batch under these options, which are read at use."""
    args = copy.deepcopy(trainer.args)
    options = {"label_smoothing": 0.1, "loss_weights": None, "use_weighting": False, **options}
    if not own_names:
        options["loss_weights"] = options["loss_weights"] or [1.0] * len(options["loss_type"])
    for name, value in options.items():
        setattr(*((trainer.args, name) if own_names else (trainer, OPTIONS[name])), value)
    batch = trainer.data_collator([*trainer.train_dataset])
    trainer.model.train()
    trainer.model.zero_grad()
    trainer._metrics["train"].clear()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    trainer.args = args
    gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
    return loss.item(), gradients, {name: values[-1] for name, values in trainer._metrics["train"].items()}


def assert_same_steps(trainers, **options):
    ours, theirs = trainers
    given = {name: getattr(theirs, copy_) for name, copy_ in OPTIONS.items()}
    try:
        found, expected = step(ours, True, **options), step(theirs, False, **options)
    finally:
        for name, copy_ in OPTIONS.items():
            setattr(theirs, copy_, given[name])
    assert found[0] == pytest.approx(expected[0], rel=1e-5, abs=1e-6)
    for name, gradient in expected[1].items():
        scale = max(1.0, gradient.abs().max().item())
        # An exponential makes of the last digit of a sum of log-probabilities, 4e-6 at 60 nats, a relative error.
        exponential = "discopop" in options["loss_type"] or options.get("f_divergence_type") == "forward_kl"
        tolerance = 5e-5 if exponential else 1e-5
        torch.testing.assert_close(found[1][name], gradient, rtol=tolerance, atol=tolerance * scale)
    for name in METRICS[1:]:
        if name != "num_tokens":
            assert found[2][name] == pytest.approx(expected[2][name], rel=1e-5, abs=1e-5), name


@pytest.mark.parametrize("loss_type", [name for name in LOSS_TYPES if name not in ("sigmoid", "sigmoid_norm")])
def test_every_loss_equals_trl(moved, loss_type):
    assert_same_steps(moved, loss_type=[loss_type])


@pytest.mark.parametrize("loss_type", ["sigmoid", "sigmoid_norm"])
def test_logistic_losses_equal_trl_without_smoothing(moved, loss_type):
    """With smoothing they are conservative DPO here; in TRL they ignore it."""
    assert_same_steps(moved, loss_type=[loss_type], label_smoothing=0.0)


@pytest.mark.parametrize("loss_type", ["sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop"])
@pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence", "alpha_divergence"])
def test_divergences_equal_trl(moved, loss_type, divergence):
    smoothing = 0.0 if loss_type.startswith("sigmoid") else 0.1
    options = {"loss_type": [loss_type], "f_divergence_type": divergence, "label_smoothing": smoothing, "beta": 0.01}
    assert_same_steps(moved, f_alpha_divergence_coef=0.9, **options)


# TRL multiplies in place, which fails in the backward pass of the hinge loss, and at once with "sft".
@pytest.mark.parametrize("loss_type", [n for n in LOSS_TYPES if n not in ("aot", "aot_unpaired", "sft", "hinge")])
def test_wpo_equals_trl(moved, loss_type):
    smoothing = 0.0 if loss_type.startswith("sigmoid") else 0.1
    assert_same_steps(moved, loss_type=[loss_type], use_weighting=True, label_smoothing=smoothing)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "aot"])
def test_ld_dpo_equals_trl(moved, loss_type, alpha):
    assert_same_steps(moved, loss_type=[loss_type], ld_alpha=alpha, label_smoothing=0.0)


@pytest.mark.parametrize(
    ("loss_type", "weights"),
    [(["sigmoid", "sft"], [1.0, 0.005]), (["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0]), (["ipo", "hinge"], None)],
    ids=["rpo", "mpo", "unweighted"],
)
def test_sums_of_losses_equal_trl(moved, loss_type, weights):
    assert_same_steps(moved, loss_type=loss_type, loss_weights=weights, label_smoothing=0.0)


# ---------------------------------------------------------------------- runs


TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}},
}
RUNS = {
    "sigmoid": (ROWS, {"max_grad_norm": 0.0}),
    "accumulation": (ROWS, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1}),
    "gradient-checkpointing": (ROWS, {"gradient_checkpointing": True}),
    "truncation": (ROWS, {"max_length": 20, "pad_to_multiple_of": 8}),
    "truncation-drops-rows": (ROWS, {"max_length": 14, "per_device_train_batch_size": 1}),
    "truncation-keeps-the-end": (ROWS, {"max_length": 12, "truncation_mode": "keep_end"}),
    "conversations": (CHATS, {}),
    "conversations-with-tools": ([{**row, "tools": json.dumps([TOOL])} for row in CHATS], {}),
    "implicit-prompts": (
        [{"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]} for row in CHATS],
        {},
    ),
    "implicit-text-prompts": (
        [{"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]} for row in ROWS],
        {},
    ),
    "stream": (lambda: IterableDataset.from_generator(lambda: iter(ROWS)), {"max_length": 25}),
    "precomputed": (ROWS, {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 3, "ld_alpha": 0.5}),
    "adam": (ROWS, {"optim": "adamw_torch", "learning_rate": 1e-3, "max_steps": 3, "warmup_steps": 1}),
    "no-dropout-switch": (ROWS, {"disable_dropout": False}),
}
SLOW = ("gradient-checkpointing", "implicit-text-prompts", "adam", "no-dropout-switch", "truncation")


@pytest.mark.filterwarnings("ignore:.*keep_end.*:FutureWarning")
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in RUNS])
def test_training_equals_trl(build, name):
    rows, config = RUNS[name]
    assert_same_runs(*train(build(rows, **config)))


LORA = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"], "r": 4}
ADAPTERS = {
    "lora": LoraConfig(**LORA),
    "dora": LoraConfig(**{**LORA, "use_dora": True}),
    "prompt-tuning": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


@pytest.mark.parametrize("name", ["lora", pytest.param("dora", marks=pytest.mark.slow), "prompt-tuning"])
def test_a_fresh_adapter_equals_trl(build, name):
    assert_same_runs(*train(build(peft_config=ADAPTERS[name], learning_rate=0.1)))


@pytest.mark.parametrize("precompute", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_trained_adapter_equals_trl(build, tiny_model_factory, precompute):
    def model():
        torch.manual_seed(0)
        return get_peft_model(tiny_model_factory(), LoraConfig(**{**LORA, "init_lora_weights": False}))

    assert_same_runs(*train(build(model=model, learning_rate=0.1, precompute_ref_log_probs=precompute)))


def test_a_given_reference_equals_trl(build, tiny_model_factory, tiny_model_dir):
    def model():
        return AutoModelForCausalLM.from_pretrained(tiny_model_dir)

    assert_same_runs(*train(build(model=model, ref_model=lambda: tiny_model_factory(seed=3))))


def _tiny_mixtral(path, vocab_size):
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    MixtralForCausalLM(
        MixtralConfig(
            vocab_size=vocab_size, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=4, initializer_range=0.2,
        )
    ).save_pretrained(path)  # fmt: skip
    return lambda: str(path)


@pytest.mark.parametrize("coef", [0.5, pytest.param(0.0, marks=pytest.mark.slow)])
def test_mixture_of_experts_equals_trl(build, tiny_tokenizer, tmp_path, coef):
    model = _tiny_mixtral(tmp_path, len(tiny_tokenizer))
    trainers = build(
        model=model, router_aux_loss_coef=coef, gradient_accumulation_steps=2, per_device_train_batch_size=1,
        max_steps=1, learning_rate=1e-3,
    )  # fmt: skip
    assert_same_runs(*train(trainers), names=(*METRICS, *(["aux_loss"] if coef else [])))


def _accuracy(prediction):
    hits = prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]
    return {"accuracy": float(hits.mean())}


@pytest.mark.filterwarnings("ignore:.*return_outputs.*:FutureWarning")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compute_metrics": _accuracy},
        pytest.param({"precompute_ref_log_probs": True}, marks=pytest.mark.slow),
    ],
    ids=["loss-only", "compute-metrics", "precomputed"],
)
def test_evaluation_equals_trl(build, options):
    several = {"one": Dataset.from_list(ROWS[:3]), "two": Dataset.from_list(ROWS[1:])}
    ours, theirs = train(
        build(eval_dataset=several, eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=2, **options)
    )
    mine = [entry for entry in ours.state.log_history if any(key.startswith("eval_") for key in entry)]
    other = [entry for entry in theirs.state.log_history if any(key.startswith("eval_") for key in entry)]
    assert len(mine) == len(other) == 2
    for a, b in zip(mine, other):
        assert {*b} <= {*a}  # each name also stands with its dataset's name here
        for name in b:
            if not name.endswith(("_runtime", "_per_second")):
                assert a[name] == pytest.approx(b[name], rel=2e-5, abs=2e-5), name
    if "precompute_ref_log_probs" not in options:
        fresh = [{"prompt": "A dataset", "chosen": " that was not there", "rejected": " before."}]
        a, b = (trainer.evaluate(Dataset.from_list(fresh)) for trainer in (ours, theirs))
        assert a["eval_loss"] == pytest.approx(b["eval_loss"], rel=1e-5)


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("max_length", [None, 4])
def test_batches_equal_trl(mode, max_length):
    rows = [
        {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6], "ref_chosen_logps": -1.5},
        {"prompt_ids": [7, 8], "chosen_ids": [9], "rejected_ids": [10, 11, 12], "ref_chosen_logps": -2.5},
    ]
    rows = [{**row, "ref_rejected_logps": 0.25} for row in rows]
    expected = trl.trainer.dpo_trainer.DataCollatorForPreference(0, max_length, mode, 3)(rows)
    found = DataCollatorForPreference(0, max_length, mode, 3)(rows)
    cut = found.pop("truncated", None)
    assert {*found} == {*expected}
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert cut is None if max_length is None else cut.tolist() == [True, False, False, True]
