"""DPOTrainer against TRL 1.16.0's, run here on the same tiny model and data: loss, metrics, trained weights."""

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, get_peft_model

from outspoken.trainers.dpo import LOSS_TYPES, DPOConfig, DPOTrainer

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
IMPLICIT_CHATS = [
    {"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]} for row in CHATS
]
METRICS = (
    "loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens", "rewards/chosen", "rewards/rejected",
    "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected",
)  # fmt: skip


@pytest.fixture
def run(tmp_path, tiny_model_dir, tiny_model_factory, tiny_tokenizer_factory):
    """Train with both libraries from the model's path; returns `(our trainer, TRL's trainer)` after training."""

    def train(rows=ROWS, model=None, tokenizer=None, trainer_kwargs=None, ours=None, **config):
        trained = []
        for name, config_class, trainer_class in (
            ("ours", DPOConfig, DPOTrainer),
            ("trl", trl.DPOConfig, trl.DPOTrainer),
        ):
            settings = {
                "output_dir": str(tmp_path / name),
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
                "max_grad_norm": 0.0,
                "per_device_train_batch_size": 2,
                "max_steps": 2,
                "beta": 0.3,
                **config,
            }
            if name == "ours":
                settings |= {"diagnose": False, **(ours or {})}
            kwargs = dict(trainer_kwargs or {})
            if "peft_config" in kwargs:
                kwargs["peft_config"] = LoraConfig(**kwargs["peft_config"])
            trainer = trainer_class(
                model=model() if model else tiny_model_dir,
                args=config_class(**settings),
                train_dataset=rows() if callable(rows) else Dataset.from_list(rows),
                processing_class=tokenizer() if tokenizer else tiny_tokenizer_factory(),
                **kwargs,
            )
            trainer.train()
            trained.append(trainer)
        return trained

    return train


def _assert_same(ours, theirs, names=METRICS):
    mine = [entry for entry in ours.state.log_history if "loss" in entry]
    other = [entry for entry in theirs.state.log_history if "loss" in entry]
    assert len(mine) == len(other) > 0
    for a, b in zip(mine, other):
        for name in names:
            assert a[name] == pytest.approx(b[name], rel=2e-5, abs=2e-5), (name, a, b)
    expected = dict(theirs.model.named_parameters())
    for name, parameter in ours.model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_loss_equals_trl(run, loss_type):
    smoothed = loss_type in ("exo_pair", "robust", "aot", "aot_unpaired")
    _assert_same(*run(loss_type=loss_type, **({"label_smoothing": 0.1} if smoothed else {})))
