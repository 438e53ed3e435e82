"""Loss, gradients and logged metrics of GRPOTrainer and RLOOTrainer against TRL's, run here on the same model and
completions.

Both trainers get their completions from the same script instead of a model, so that everything after sampling is
compared: rewards, advantages, batches, log-probabilities, loss, gradients of every parameter, metrics.
"""

import random

import pytest
import torch
from datasets import Dataset

from outspoken.trainers import completion_scores
from outspoken.trainers.grpo import GRPOConfig, GRPOTrainer
from outspoken.trainers.rloo import RLOOConfig, RLOOTrainer
from outspoken.trainers.rollouts.batch import sampled_from_ids

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.usefixtures("fast_collection")

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
    return [float(len(ids)) if sum(ids) % 3 == 0 else None for ids in completion_ids]


def constant(completion_ids, **_):
    return [0.5 for _ in completion_ids]


@pytest.fixture
def compare(
    tmp_path, tiny_tokenizer_factory, tiny_model_factory, short_run, gradient_tape, completion_script, monkeypatch
):
    """`compare(reward_funcs, kind=..., model=..., peft=..., evaluate=..., **settings)` trains with both and compares.

    `adapt(trainer)` changes both trainers before they train; `own` are settings that only ours has.
    """
    # TRL puts every completion through the model; of those that we leave out, a script knows no entropy to log.
    monkeypatch.setattr(completion_scores, "needed_rows", lambda advantages, mask: torch.arange(len(mask)))

    class Scripted:
        logps = None  # what the sampler says of each completion

        def _generate_single_turn(self, prompt_ids, *args, **kwargs):
            completion_ids = self.script(prompt_ids)
            if isinstance(self, trl.RLOOTrainer):
                return completion_ids
            return completion_ids, self.logps and self.logps(completion_ids)

        def train(self):
            if hasattr(self, "rollouts"):
                ends = [*self.rollouts.end_ids, self.processing_class.pad_token_id]

                def generate(prompt_ids, params, **_):
                    sampled = sampled_from_ids(self.script(prompt_ids), ends)
                    sampled.logps = self.logps and self.logps(sampled.completion_ids)
                    return sampled

                self.rollouts.generate = generate
            return super().train()

    def scripted(trainer_class):
        return type("Scripted", (Scripted, trainer_class), {})

    ours = {"GRPO": (GRPOTrainer, GRPOConfig), "RLOO": (RLOOTrainer, RLOOConfig)}
    theirs = {"GRPO": (trl.GRPOTrainer, trl.GRPOConfig), "RLOO": (trl.RLOOTrainer, trl.RLOOConfig)}

    def run(trainer_class, config_class, reward_funcs, model, prompts, peft, evaluate, adapt, own, settings):
        name = config_class.__module__.split(".")[0]
        # TRL draws the order of single completions; ours keeps those of a prompt together to share it.
        extra = {"diagnose": False, "share_prompts": False, **(own or {})} if name == "outspoken" else {}
        args = config_class(
            str(tmp_path / name),
            **{
                **short_run,
                "max_grad_norm": 0.0,
                "learning_rate": 1e-3,
                "per_device_train_batch_size": 4,
                "num_generations": 4,
                "max_completion_length": 6,
                "max_steps": 2,
                **settings,
                **extra,
            },
        )
        tape = gradient_tape()
        dataset = Dataset.from_dict({"prompt": prompts, "label": list(range(len(prompts)))})
        trainer = scripted(trainer_class)(
            model=model() if callable(model) else model,
            reward_funcs=reward_funcs,
            args=args,
            train_dataset=dataset,
            eval_dataset=dataset.select(range(4)) if evaluate else None,
            processing_class=tiny_tokenizer_factory(),
            callbacks=[tape],
            peft_config=peft() if peft else None,
        )
        trainer.script = completion_script(trainer.processing_class.eos_token_id)
        if adapt is not None:
            adapt(trainer)
        trainer.train()
        if evaluate:
            trainer.evaluate()
        return trainer, tape

    def same(
        reward_funcs,
        kind="GRPO",
        model=tiny_model_factory,
        prompts=PROMPTS,
        peft=None,
        evaluate=False,
        adapt=None,
        own=None,
        atol=1e-5,
        skip=(),
        **settings,
    ):
        case = (reward_funcs, model, prompts, peft, evaluate, adapt, own, settings)
        expected, expected_tape = run(*theirs[kind], *case)
        actual, tape = run(*ours[kind], *case)

        assert len(tape.steps) == len(expected_tape.steps) > 0
        for mine, others in zip(tape.steps, expected_tape.steps):
            assert mine.keys() == others.keys()
            for name in others:
                torch.testing.assert_close(
                    mine[name], others[name], atol=atol, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
                )
        assert max(gradient.abs().max() for step in expected_tape.steps for gradient in step.values()) > 1e-4

        assert len(actual.state.log_history) == len(expected.state.log_history)
        for mine, others in zip(actual.state.log_history, expected.state.log_history):
            names = {name for name in others if not any(name.endswith(timed) for timed in TIMED)}
            names -= {*skip, "eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}
            assert names <= mine.keys()
            for name in names:
                assert mine[name] == pytest.approx(others[name], abs=atol, rel=1e-5), name
        return actual

    return same


@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "bnpo", "dr_grpo"])
def test_losses_and_scalings(compare, loss_type, scale_rewards):
    compare([spread], loss_type=loss_type, scale_rewards=scale_rewards, gradient_accumulation_steps=2)


def test_second_pass_over_a_batch_is_clipped_alike(compare):
    trainer = compare(
        [spread],
        num_iterations=2,
        learning_rate=0.05,
        max_steps=4,
        gradient_accumulation_steps=2,
        loss_type="grpo",
    )
    history = [entry for entry in trainer.state.log_history if "clip_ratio/region_mean" in entry]
    assert history[0]["clip_ratio/region_mean"] == 0.0
    assert history[1]["clip_ratio/region_mean"] > 0.1


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_off_policy_importance_level(compare, loss_type, level):
    settings = {"epsilon": 0.1, "epsilon_high": 0.3, "delta": 1.2}
    compare(
        [spread],
        num_iterations=3,
        learning_rate=0.02,
        max_steps=3,
        loss_type=loss_type,
        importance_sampling_level=level,
        **settings,
    )


@pytest.mark.parametrize("bias_correction", [True, False])
def test_reference_model(compare, tiny_model_dir, bias_correction):
    compare(
        [spread],
        model=tiny_model_dir,
        beta=0.3,
        num_iterations=2,
        learning_rate=0.02,
        max_steps=4,
        use_bias_correction_kl=bias_correction,
    )


def test_more_micro_batches_per_generation_than_per_step(compare):
    """4 micro-batches a generation, 2 a step: the second step is off-policy."""
    compare([spread], steps_per_generation=4, gradient_accumulation_steps=2, learning_rate=0.02, max_steps=4)


def test_fewer_micro_batches_per_generation_than_per_step(compare):
    compare([spread], steps_per_generation=1, gradient_accumulation_steps=2, max_steps=2)


def test_generation_batch_size(compare):
    compare([spread], generation_batch_size=16, gradient_accumulation_steps=1, learning_rate=0.02, max_steps=5)


@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_several_weighted_rewards_some_not_applicable(compare, aggregation, scale_rewards):
    compare(
        [spread, sometimes, shortness],
        reward_weights=[1.0, 0.5, -0.25],
        multi_objective_aggregation=aggregation,
        scale_rewards=scale_rewards,
        gradient_accumulation_steps=2,
        max_steps=3,
    )


@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
def test_completions_that_nothing_scores(compare, scale_rewards):
    compare([mostly_none], scale_rewards=scale_rewards, gradient_accumulation_steps=2, max_steps=4, logging_steps=2)


def test_reward_without_spread_beside_one_with(compare):
    compare([constant, spread], max_steps=2)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "bnpo", "dr_grpo"])
def test_truncated_completions_masked(compare, loss_type):
    compare(
        [spread], loss_type=loss_type, mask_truncated_completions=True, gradient_accumulation_steps=2, num_iterations=2
    )


def lora():
    from peft import LoraConfig

    return LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)


@pytest.mark.parametrize("beta", [0.0, 0.2])
def test_adapter(compare, beta):
    compare([spread], peft=lora, beta=beta, num_iterations=2, learning_rate=0.02, max_steps=4)


def test_adapter_from_before_is_its_own_reference(compare, tiny_model_factory):
    from peft import get_peft_model

    def adapted():
        torch.manual_seed(0)
        return get_peft_model(tiny_model_factory(), lora())

    compare([spread], model=adapted, beta=0.2, num_iterations=2, learning_rate=0.02, max_steps=4)


def test_temperature_and_gradient_checkpointing(compare):
    compare([spread], temperature=0.7, gradient_checkpointing=True, num_iterations=2, learning_rate=0.02)


def test_entropy_bonus(compare):
    # A weight whose two gradients cancel in the first step is moved by their rounding: Adam divides by their size.
    compare([spread], entropy_coef=0.05, gradient_accumulation_steps=2, loss_type="grpo", atol=5e-5)


def test_high_entropy_tokens_only(compare):
    compare([spread], top_entropy_quantile=0.4, entropy_coef=0.01)


def test_off_policy_sequence_mask(compare):
    compare([spread], off_policy_mask_threshold=0.001, num_iterations=3, learning_rate=0.02, max_steps=3)


def test_gradient_clipping_and_padding(compare):
    compare([spread], max_grad_norm=0.1, pad_to_multiple_of=8, max_steps=3)


def test_evaluation(compare):
    compare(
        [spread, sometimes],
        evaluate=True,
        num_generations_eval=2,
        per_device_eval_batch_size=4,
        gradient_accumulation_steps=2,
        loss_type="dapo",
    )


def test_conversational_prompts(compare):
    prompts = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]

    def content_length(completions, prompts, label, **_):
        assert all(p[0]["role"] == "user" for p in prompts) and len(label) == len(prompts)
        return [float(len(c[0]["content"])) for c in completions]

    compare([content_length], prompts=prompts)


def test_mixture_of_experts_auxiliary_loss(compare, tiny_tokenizer):
    from transformers import MixtralConfig, MixtralForCausalLM

    def mixtral():
        torch.manual_seed(0)
        config = MixtralConfig(
            vocab_size=len(tiny_tokenizer),
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            initializer_range=0.2,
            pad_token_id=tiny_tokenizer.pad_token_id,
            eos_token_id=tiny_tokenizer.eos_token_id,
        )
        return MixtralForCausalLM(config)

    compare([spread], model=mixtral, router_aux_loss_coef=0.1, gradient_accumulation_steps=2)


OFF_POLICY = {"num_iterations": 3, "learning_rate": 0.02, "max_steps": 3}


@pytest.mark.parametrize(
    "loss_type, level",
    [
        ("cispo", "token"),
        ("cispo", "sequence"),
        ("sapo", "token"),
        ("sapo", "sequence"),
        ("luspo", "sequence"),
        ("vespo", "token"),
    ],
)
def test_losses_without_a_hard_clip_and_of_whole_completions(compare, loss_type, level):
    compare(
        [spread],
        loss_type=loss_type,
        importance_sampling_level=level,
        epsilon_high=1.1,
        gradient_accumulation_steps=2,
        steps_per_generation=4,
        learning_rate=0.02,
        max_steps=3,
    )


@pytest.mark.parametrize("loss_type", ["cispo", "sapo", "vespo"])
def test_their_settings(compare, tiny_model_dir, loss_type):
    settings = {"sapo_temperature_pos": 0.7, "sapo_temperature_neg": 1.4, "vespo_k_pos": 1.5, "vespo_lambda_neg": 2.5}
    compare([spread], model=tiny_model_dir, loss_type=loss_type, epsilon_high=1.05, beta=0.1, **settings, **OFF_POLICY)


def test_adaptive_entropy(compare):
    trainer = compare(
        [spread],
        use_adaptive_entropy=True,
        entropy_coef=0.01,
        entropy_target=5.11,
        gradient_accumulation_steps=2,
        loss_type="grpo",
        max_steps=5,
        atol=1e-4,
    )
    coefficients = [entry["entropy_coef"] for entry in trainer.state.log_history if "entropy_coef" in entry]
    assert len({*coefficients}) > 2


def test_moving_reference(compare, tiny_model_dir):
    compare(
        [spread], model=tiny_model_dir, beta=0.3, sync_ref_model=True, ref_model_sync_steps=2, ref_model_mixup_alpha=0.5, learning_rate=0.02,
        max_steps=5,
    )  # fmt: skip


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
@pytest.mark.parametrize("loss_type", ["dapo", "vespo"])
def test_correction_for_another_sampler(compare, mode, loss_type):
    """The script says log-probabilities that are off from the policy's by noise; one is not a number."""

    def noisy(completion_ids):
        rng = random.Random(sum(map(sum, completion_ids)))
        logps = [[-5.7 + rng.gauss(0, 0.7) for _ in ids] for ids in completion_ids]
        logps[1][0] = None
        return logps

    def adapt(trainer):
        trainer.logps = noisy
        trainer.use_vllm = trainer.args.use_vllm = True
        # No weights are to be sent to an engine that is not there.
        trainer._last_loaded_step = None

    compare(
        [spread],
        adapt=adapt,
        loss_type=loss_type,
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_max=2.0,
        vllm_importance_sampling_clip_min=0.4,
        off_policy_mask_threshold=0.5,
        gradient_accumulation_steps=2,
        max_steps=3,
    )


# RLOO

# TRL takes the spread of the rewards less the KL penalty, which is never 0 once the policy has moved.
WITH_PENALTY = ["frac_reward_zero_std", "eval_frac_reward_zero_std"]


@pytest.mark.parametrize("beta", [0.0, 0.05])
@pytest.mark.parametrize("own", [{"loss_type": "clipped"}, {"loss_type": "reinforce"}])
def test_rloo_on_policy(compare, tiny_model_dir, own, beta):
    """TRL's clipped ratio is 1 as long as the policy has not moved, and its gradient is REINFORCE's."""
    compare(
        [spread, sometimes],
        kind="RLOO",
        model=tiny_model_dir,
        own=own,
        beta=beta,
        gradient_accumulation_steps=2,
        max_steps=3,
        skip=WITH_PENALTY + ([] if own["loss_type"] == "clipped" else ["loss", "train_loss"]),
    )


@pytest.mark.parametrize("normalize", [False, True])
def test_rloo_off_policy(compare, tiny_model_dir, normalize):
    trainer = compare(
        [spread],
        kind="RLOO",
        model=tiny_model_dir,
        own={"loss_type": "clipped"},
        normalize_advantages=normalize,
        reward_clip_range=(0.5, 3.0),
        reward_weights=[1.5],
        epsilon=0.05,
        num_iterations=2,
        learning_rate=0.02,
        max_steps=4,
    )
    assert any(entry.get("clip_ratio/region_mean", 0) > 0.1 for entry in trainer.state.log_history)


def test_rloo_adapter_truncation_evaluation(compare):
    compare(
        [spread], kind="RLOO", own={"loss_type": "clipped"}, peft=lora, beta=0.1, mask_truncated_completions=True,
        evaluate=True, per_device_eval_batch_size=4, num_generations_eval=2, max_steps=2, skip=WITH_PENALTY,
    )  # fmt: skip


def test_rloo_moving_reference(compare, tiny_model_dir):
    compare(
        [spread], kind="RLOO", model=tiny_model_dir, own={"loss_type": "clipped"}, beta=0.3, sync_ref_model=True, ref_model_sync_steps=2,
        ref_model_mixup_alpha=0.5, learning_rate=0.02, max_steps=4,
    )  # fmt: skip
