"""Loss, gradients and logged metrics of GRPOTrainer against TRL's, run here on the same model and completions.

Both trainers get their completions from the same script instead of a model, so that everything after sampling is
compared: rewards, advantages, batches, log-probabilities, loss, gradients of every parameter, metrics.
"""

import random

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from outspoken.trainers.grpo import GRPOConfig, GRPOTrainer

# Not comparable: wall-clock times.
TIMED = {"step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos"}

PROMPTS = ["The sky", "What is 2 + 2?", "green grass", "the quick brown fox", "It is", "dog"]


def spread(completion_ids, **_):
    return [(sum(ids) % 17) / 4 for ids in completion_ids]


def shortness(completion_ids, **_):
    return [-float(len(ids)) for ids in completion_ids]


def sometimes(completion_ids, **_):
    return [None if sum(ids) % 3 == 0 else float(sum(ids) % 5) for ids in completion_ids]


def mostly_none(completion_ids, log_metric, **_):
    log_metric("seen", len(completion_ids))
    return [1.0 if sum(ids) % 5 == 0 else None for ids in completion_ids]


def constant(completion_ids, **_):
    return [0.5 for _ in completion_ids]


class Script:
    """Completions of 1 to 6 tokens, from the call's number: about half end in EOS, the rest are cut."""

    def __init__(self, eos):
        self.eos, self.calls = eos, 0

    def __call__(self, prompt_ids):
        rng = random.Random(self.calls)
        self.calls += 1
        completions = []
        for _ in prompt_ids:
            ids = [rng.randrange(4, 290) for _ in range(rng.randint(1, 6))]
            completions.append([*ids[:-1], self.eos] if rng.random() < 0.5 else ids)
        return completions


class GradientTape(TrainerCallback):
    """Gradients of every parameter before each optimizer step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


@pytest.fixture
def compare(tmp_path, tiny_tokenizer_factory, tiny_model_factory):
    """`compare(reward_funcs, model=..., peft=..., evaluate=..., **settings)` trains with both and compares."""
    import trl

    class ScriptedTRL(trl.GRPOTrainer):
        def _generate_single_turn(self, prompt_ids, *args, **kwargs):
            return self.script(prompt_ids), None

    class Scripted(GRPOTrainer):
        def _generate(self, prompt_ids):
            return self.script(prompt_ids)

    def run(trainer_class, config_class, reward_funcs, model, prompts, peft, evaluate, settings):
        name = config_class.__module__.split(".")[0]
        extra = {"diagnose": False} if name == "outspoken" else {}
        args = config_class(
            str(tmp_path / name),
            **{
                "use_cpu": True,
                "bf16": False,
                "report_to": "none",
                "save_strategy": "no",
                "logging_steps": 1,
                "gradient_checkpointing": False,
                "max_grad_norm": 0.0,
                "learning_rate": 1e-3,
                "per_device_train_batch_size": 4,
                "num_generations": 4,
                "max_completion_length": 6,
                "max_steps": 2,
                "disable_tqdm": True,
                **settings,
                **extra,
            },
        )
        tape = GradientTape()
        dataset = Dataset.from_dict({"prompt": prompts, "label": list(range(len(prompts)))})
        trainer = trainer_class(
            model=model() if callable(model) else model,
            reward_funcs=reward_funcs,
            args=args,
            train_dataset=dataset,
            eval_dataset=dataset.select(range(4)) if evaluate else None,
            processing_class=tiny_tokenizer_factory(),
            callbacks=[tape],
            peft_config=peft() if peft else None,
        )
        trainer.script = Script(trainer.processing_class.eos_token_id)
        trainer.train()
        if evaluate:
            trainer.evaluate()
        return trainer, tape

    def same(
        reward_funcs, model=tiny_model_factory, prompts=PROMPTS, peft=None, evaluate=False, atol=1e-5, **settings
    ):
        case = (reward_funcs, model, prompts, peft, evaluate, settings)
        expected, expected_tape = run(ScriptedTRL, trl.GRPOConfig, *case)
        actual, tape = run(Scripted, GRPOConfig, *case)

        assert len(tape.steps) == len(expected_tape.steps) > 0
        for ours, theirs in zip(tape.steps, expected_tape.steps):
            assert ours.keys() == theirs.keys()
            for name in theirs:
                torch.testing.assert_close(
                    ours[name], theirs[name], atol=atol, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
                )
        assert any(g.abs().max() > 1e-4 for g in expected_tape.steps[0].values())

        assert len(actual.state.log_history) == len(expected.state.log_history)
        for ours, theirs in zip(actual.state.log_history, expected.state.log_history):
            names = {name for name in theirs if not any(name.endswith(timed) for timed in TIMED)}
            names -= {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}
            assert names <= ours.keys()
            for name in names:
                assert ours[name] == pytest.approx(theirs[name], abs=atol, rel=1e-4), name
        return actual

    return same


@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "bnpo", "dr_grpo"])
def test_every_loss_and_scaling(compare, loss_type, scale_rewards):
    compare([spread], loss_type=loss_type, scale_rewards=scale_rewards, gradient_accumulation_steps=2)
