"""RewardTrainer against TRL 1.16.0's, run here on the same tiny model, data and order."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import GPT2Config, GPT2ForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from outspoken.trainers.reward import RewardConfig, RewardTrainer

trl = pytest.importorskip("trl")

METRICS = ("accuracy", "margin", "mean_reward", "min_reward", "max_reward", "num_tokens")
OURS = ("share_prompts", "num_scores", "diagnose")


def _say(role, text):
    return [{"role": role, "content": text}]


EXPLICIT = [
    {"prompt": f"What is {i} + 1?" * 2, "chosen": f" It is {i + 1}." + " yes" * (i % 3), "rejected": " The fox " + "x" * i}
    for i in range(6)
]  # fmt: skip
DATA = {
    "explicit": EXPLICIT,
    "implicit": [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in EXPLICIT],
    "margin": [{**row, "margin": 0.25 * i} for i, row in enumerate(EXPLICIT)],
    "chat": [
        {
            "prompt": _say("user", row["prompt"]),
            "chosen": _say("assistant", row["chosen"]),
            "rejected": _say("assistant", row["rejected"]),
        }
        for row in EXPLICIT
    ],
    "whole-chats": [
        {
            side: _say("user", row["prompt"]) + _say("assistant", row[side]) + _say("user", "Sure?")
            for side in ("chosen", "rejected")
        }
        for row in EXPLICIT
    ],
    "tools": [
        {
            "prompt": _say("user", row["prompt"]),
            "chosen": _say("assistant", row["chosen"]),
            "rejected": _say("assistant", row["rejected"]),
            "tools": '[{"type": "function", "function": {"name": "add"}}]',
        }
        for row in EXPLICIT
    ],
    "tokens": [
        {"chosen_ids": [*range(10, 20), 30 + i, 2], "rejected_ids": [*range(10, 20), *range(40, 40 + i), 3]}
        for i in range(6)
    ],
}


@pytest.fixture
def judge(tiny_tokenizer):
    def build(architecture="llama", seed=0):
        torch.set_num_threads(1)
        vocabulary, pad = len(tiny_tokenizer), tiny_tokenizer.pad_token_id
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            if architecture == "gpt2":
                return GPT2ForSequenceClassification(
                    GPT2Config(
                        vocab_size=vocabulary, n_embd=16, n_layer=2, n_head=2, n_positions=256, num_labels=1,
                        initializer_range=0.2, pad_token_id=pad,
                    )
                )  # fmt: skip
            return LlamaForSequenceClassification(
                LlamaConfig(
                    vocab_size=vocabulary, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_labels=1,
                    num_attention_heads=2, initializer_range=0.2, pad_token_id=pad,
                )
            )  # fmt: skip

    return build


@pytest.fixture
def both(tmp_path, tiny_tokenizer_factory):
    """`(our trainer, TRL's trainer)`, not yet trained, for copies of the same model and the same settings."""

    def build(model, rows, peft_config=None, stream=False, **options):
        settings = {
            "per_device_train_batch_size": 3,
            "per_device_eval_batch_size": 3,
            "max_steps": 2,
            "logging_steps": 1,
            "learning_rate": 1e-2,
            "optim": "sgd",
            "max_grad_norm": 1000.0,
            "report_to": "none",
            "save_strategy": "no",
            "use_cpu": True,
            "bf16": False,
            "disable_tqdm": True,
            "gradient_checkpointing": False,
            "diagnose": False,
            **options,
        }
        made = []
        for library, config_class, trainer_class in (
            ("ours", RewardConfig, RewardTrainer),
            ("trl", trl.RewardConfig, trl.RewardTrainer),
        ):
            own = {k: v for k, v in settings.items() if library == "ours" or k not in OURS}
            dataset = Dataset.from_list(rows)
            made.append(
                trainer_class(
                    copy.deepcopy(model),
                    args=config_class(str(tmp_path / library), **own),
                    train_dataset=dataset.to_iterable_dataset() if stream else dataset,
                    eval_dataset=None if stream else dataset,
                    processing_class=tiny_tokenizer_factory(),
                    peft_config=copy.deepcopy(peft_config),
                )
            )
        return made

    return build


CASES = {
    **{name: {"rows": rows} for name, rows in DATA.items()},
    "centering": {"rows": EXPLICIT, "center_rewards_coefficient": 0.1},
    "margin and centering": {"rows": DATA["margin"], "center_rewards_coefficient": 0.01},
    "apart": {"rows": DATA["margin"], "share_prompts": False},
    "too long": {"rows": EXPLICIT, "max_length": 28},
    "padded to 16": {"rows": EXPLICIT, "pad_to_multiple_of": 16},
    "checkpointed": {"rows": EXPLICIT, "gradient_checkpointing": True},
    "gpt2": {"rows": EXPLICIT, "architecture": "gpt2"},
    "gpt2 apart": {"rows": DATA["chat"], "architecture": "gpt2", "share_prompts": False},
}


@pytest.mark.parametrize("case", CASES)
def test_loss_gradients_and_metrics_of_a_batch(judge, both, case):
    options = dict(CASES[case])
    model = judge(options.pop("architecture", "llama"))
    ours, theirs = both(model, options.pop("rows"), **options)
    assert ours._share_prompts is options.get("share_prompts", True)
    assert len(ours.train_dataset) == len(theirs.train_dataset)
    found = []
    for trainer in (ours, theirs):
        trainer.model.train()
        batch = next(iter(trainer.get_train_dataloader()))
        loss = trainer.compute_loss(trainer.model, dict(batch))
        loss.backward()
        metrics = {name: trainer._metrics["train"][name] for name in METRICS}
        gradients = {name: p.grad for name, p in trainer.model.named_parameters() if p.requires_grad}
        found.append((loss.item(), {n: sum(v) / len(v) for n, v in metrics.items()}, gradients))
    (loss, metrics, gradients), (their_loss, their_metrics, their_gradients) = found
    assert loss == pytest.approx(their_loss, abs=1e-5)
    assert metrics == pytest.approx(their_metrics, abs=1e-5)
    assert gradients.keys() == their_gradients.keys()
    for name, gradient in their_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-5, rtol=1e-5)


RUNS = {
    "plain": {},
    "accumulated": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1},
    "stream": {"stream": True},
    "warm-up, decay, clipping": {"warmup_steps": 1, "weight_decay": 0.1, "optim": "adamw_torch", "max_grad_norm": 0.5},
    "LoRA": {"peft_config": LoraConfig(task_type="SEQ_CLS", target_modules="all-linear", r=2)},
}


@pytest.mark.parametrize("name", RUNS)
def test_runs_log_the_same_and_end_with_the_same_weights(judge, both, name):
    ours, theirs = both(judge(), DATA["margin"], **RUNS[name])
    evaluations = []
    for trainer in (ours, theirs):
        trainer.train()
        evaluations.append(None if RUNS[name].get("stream") else trainer.evaluate())
    for mine, other in zip(ours.state.log_history, theirs.state.log_history):
        for key in ("loss", "grad_norm", "learning_rate", *METRICS):
            assert mine.get(key) == pytest.approx(other.get(key), abs=2e-5), key
    if evaluations[0] is not None:
        for key in ("eval_loss", *(f"eval_{metric}" for metric in METRICS)):
            assert evaluations[0][key] == pytest.approx(evaluations[1][key], abs=2e-5), key
    weights = dict(theirs.model.named_parameters())
    for key, parameter in ours.model.named_parameters():
        torch.testing.assert_close(parameter, weights[key], atol=1e-5, rtol=1e-5)


def test_a_model_given_by_its_path_gets_the_same_head(tiny_model_dir, both):
    ours, theirs = both(tiny_model_dir, EXPLICIT)
    assert ours.model.score.weight.shape == (1, 32)
    assert torch.equal(ours.model.score.weight, theirs.model.score.weight)


def test_trl_config_is_taken_as_it_is(tmp_path, judge, tiny_tokenizer_factory):
    args = trl.RewardConfig(
        str(tmp_path), max_length=99, center_rewards_coefficient=0.02, eos_token="<|im_end|>", hub_token="secret",
        use_cpu=True, bf16=False, report_to="none",
    )  # fmt: skip
    trainer = RewardTrainer(
        judge(), args, train_dataset=Dataset.from_list(EXPLICIT), processing_class=tiny_tokenizer_factory()
    )
    assert isinstance(trainer.args, RewardConfig)
    assert (trainer.args.max_length, trainer.args.center_rewards_coefficient) == (99, 0.02)
    assert (trainer.args.eos_token, trainer.args.pad_token, trainer.args.hub_token) == ("<|im_end|>", None, "secret")


def test_every_field_default_and_argument_of_trls_is_here():
    import dataclasses
    import inspect

    def fields(config):
        return {f.name: f.default for f in dataclasses.fields(config)}

    ours, theirs = fields(RewardConfig), fields(trl.RewardConfig)
    assert theirs.keys() <= ours.keys()
    own = {f.name for f in dataclasses.fields(trl.RewardConfig)} - {f.name for f in dataclasses.fields(trl.SFTConfig)}
    assert {"center_rewards_coefficient", "disable_dropout"} <= own
    differ = {name for name, default in theirs.items() if default is not dataclasses.MISSING and ours[name] != default}
    assert differ <= {"_n_gpu"}, differ
    arguments = list(inspect.signature(RewardTrainer.__init__).parameters)
    assert arguments == list(inspect.signature(trl.RewardTrainer.__init__).parameters)
