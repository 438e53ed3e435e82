"""Loss, gradients and logged metrics of DistillationTrainer against TRL's, run here on the same models and completions.

Both trainers get their completions from the same script instead of a model, so that everything after sampling is
compared: batches, divergence, loss, gradients of every parameter, metrics.
"""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from outspoken.trainers.distillation import DistillationConfig, DistillationTrainer
from outspoken.trainers.rollouts.batch import sampled_from_ids

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.usefixtures("fast_collection")

# Not comparable: wall-clock times.
TIMED = {"step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos"}

PROMPTS = ["The sky", "What is 2 + 2?", "green grass", "the quick brown fox", "It is", "dog", "What", "lazy dog"]


@pytest.fixture
def compare(tmp_path, tiny_tokenizer_factory, tiny_model_factory, short_run, gradient_tape, completion_script):
    """`compare(student=..., teacher=..., peft=..., evaluate=..., **settings)` trains with both and compares."""

    class ScriptedTRL(trl.DistillationTrainer):
        def _generate_single_turn(self, prompt_ids, *args, **kwargs):
            return self.script(prompt_ids)

    class Scripted(DistillationTrainer):
        def _sample_and_score(self, rows):
            ends = [*self.rollouts.end_ids, self.rollouts.tokenizer.pad_token_id]
            self.rollouts.generate = lambda prompt_ids, params, **_: sampled_from_ids(self.script(prompt_ids), ends)
            return super()._sample_and_score(rows)

    def run(trainer_class, config_class, student, teacher, prompts, peft, evaluate, settings):
        name = config_class.__module__.split(".")[0]
        args = config_class(
            str(tmp_path / name),
            **{
                **short_run,
                "max_grad_norm": 0.0,
                "optim": "sgd",  # Adam makes much of gradients that are only rounding
                "learning_rate": 0.05,
                "per_device_train_batch_size": 2,
                "per_device_eval_batch_size": 2,
                "max_completion_length": 6,
                "max_steps": 2,
                **settings,
                **({"diagnose": False} if name == "outspoken" else {}),
            },
        )
        tape = gradient_tape()
        dataset = Dataset.from_dict({"prompt": prompts, "label": list(range(len(prompts)))})
        trainer = trainer_class(
            model=student(),
            teacher_model=teacher(),
            args=args,
            train_dataset=dataset,
            eval_dataset=dataset.select(range(4)) if evaluate else None,
            processing_class=tiny_tokenizer_factory(),
            callbacks=[tape],
            peft_config=peft() if peft else None,
        )
        trainer.script = completion_script(trainer.processing_class.eos_token_id)
        trainer.train()
        if evaluate:
            trainer.evaluate()
        return trainer, tape

    def compare(student=None, teacher=None, prompts=PROMPTS, peft=None, evaluate=False, **settings):
        student = student or (lambda: tiny_model_factory(seed=1))
        teacher = teacher or (lambda: tiny_model_factory(seed=2, hidden_size=48))
        same = (student, teacher, prompts, peft, evaluate, settings)
        theirs, their_tape = run(ScriptedTRL, trl.DistillationConfig, *same)
        ours, our_tape = run(Scripted, DistillationConfig, *same)

        assert len(our_tape.steps) == len(their_tape.steps) == ours.state.global_step > 0
        for mine, other in zip(our_tape.steps, their_tape.steps):
            assert mine.keys() == other.keys() and mine
            for name, grad in other.items():
                torch.testing.assert_close(mine[name], grad, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        assert any(grad.abs().max() > 1e-4 for grad in our_tape.steps[0].values())
        for mine, other in zip(ours.state.log_history, theirs.state.log_history, strict=True):
            names = {name for name in other if name not in TIMED and not name.endswith(("runtime", "per_second"))}
            assert {name: mine.get(name) for name in names} == pytest.approx(
                {name: other[name] for name in names}, rel=1e-5, abs=1e-5
            )
        ours_weights, their_weights = ours.model.state_dict(), theirs.model.state_dict()
        for name, value in their_weights.items():
            torch.testing.assert_close(ours_weights[name], value, rtol=1e-4, atol=1e-5)
        return ours, theirs

    return compare


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_divergences(compare, beta):
    ours, _ = compare(beta=beta)
    logged = ours.state.log_history[0]
    expected = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(beta, "divergence")
    assert logged["loss"] == pytest.approx(logged[f"distillation/{expected}"], rel=1e-5)


def test_temperature(compare):
    compare(beta=0.3, temperature=2.0)


def test_accumulation(compare):
    compare(beta=1.0, gradient_accumulation_steps=2)


def test_adapter(compare):
    compare(peft=lambda: LoraConfig(r=2, target_modules=["q_proj", "v_proj"]), beta=0.5)


def test_gradient_checkpointing_and_padding_to_a_multiple(compare):
    compare(gradient_checkpointing=True, pad_to_multiple_of=8)


def test_evaluation(compare):
    ours, _ = compare(evaluate=True, beta=0.5, max_steps=1)
    evaluated = next(row for row in ours.state.log_history if "eval_loss" in row)
    assert evaluated["eval_entropy"] > 0 and "eval_completions/mean_length" in evaluated


def test_conversations(compare):
    prompts = [[{"role": "user", "content": text}] for text in PROMPTS]
    compare(prompts=prompts, max_steps=1)


def test_order_of_prompts_over_epochs(compare):
    compare(max_steps=-1, num_train_epochs=2, per_device_train_batch_size=1, gradient_accumulation_steps=3)


def test_defaults():
    """Every setting that TRL has is here, with TRL's default."""
    import dataclasses

    ours = {f.name: f for f in dataclasses.fields(DistillationConfig)}
    for theirs in dataclasses.fields(trl.DistillationConfig):
        assert theirs.name in ours, theirs.name
        assert ours[theirs.name].default == theirs.default, theirs.name
        assert ours[theirs.name].default_factory == theirs.default_factory, theirs.name
