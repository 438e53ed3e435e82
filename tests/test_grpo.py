"""GRPOTrainer end to end on tiny models that really sample: data, generation, rewards, logging, resuming, live changes."""

import copy
import inspect
import itertools
import math
import sys
import types

import pandas as pd
import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback, TrainingArguments

from outspoken.trainers.completion_scores import completion_scores
from outspoken.trainers.config import live_fields
from outspoken.trainers.grpo import GRPOConfig, GRPOTrainer
from outspoken.trainers.rollouts.batch import RolloutBatch, pad_ids, sampled_from_ids
from outspoken.trainers.rollouts.rollout import Rollouts, as_batch
from outspoken.trainers.rollouts.sampler import RepeatSampler, repeat_stream
from outspoken.trainers.rollouts.show import print_completions
from outspoken.trainers.rollouts.transformers_backend import cut_after_eos, eos_token_ids

pytestmark = pytest.mark.usefixtures("fast_collection")

PROMPTS = ["The sky", "What is 2 + 2?", "green grass", "the quick brown fox", "It is", "dog"]


def length(completion_ids, **_):
    return [float(len(ids)) for ids in completion_ids]


def token_sum(completion_ids, **_):
    return [sum(ids) % 7 / 7 for ids in completion_ids]


@pytest.fixture
def config(tmp_path, short_run):
    def build(**settings):
        defaults = {
            **short_run,
            "learning_rate": 1e-3,
            "per_device_train_batch_size": 4,
            "num_generations": 4,
            "max_completion_length": 5,
            "max_steps": 2,
            "diagnose": False,
        }
        return GRPOConfig(str(tmp_path / "run"), **{**defaults, **settings})

    return build


@pytest.fixture
def trainer(config, tiny_tokenizer_factory, tiny_model_factory):
    """`trainer(reward_funcs, model=..., dataset=..., <trainer arguments>, **settings)`."""
    arguments = inspect.signature(GRPOTrainer.__init__).parameters

    def build(reward_funcs=token_sum, model=None, prompts=PROMPTS, **options):
        given = {name: options.pop(name) for name in list(options) if name in arguments}
        dataset = Dataset.from_dict({"prompt": prompts, "label": list(range(len(prompts)))})
        return GRPOTrainer(
            **{
                "model": tiny_model_factory() if model is None else model,
                "reward_funcs": reward_funcs,
                "args": config(**options),
                "train_dataset": dataset,
                "processing_class": tiny_tokenizer_factory(),
                **given,
            }
        )

    return build


# The public surface


def test_constructor_arguments_are_trls():
    import trl

    theirs = list(inspect.signature(trl.GRPOTrainer.__init__).parameters)
    assert list(inspect.signature(GRPOTrainer.__init__).parameters) == theirs


def test_defaults_are_trls(tmp_path):
    import trl

    theirs, ours = trl.GRPOConfig(str(tmp_path), use_cpu=True), GRPOConfig(str(tmp_path), use_cpu=True)
    names = [f for f in theirs.__dataclass_fields__ if hasattr(ours, f) and not f.startswith("_")]
    assert len(names) > 120
    differ = {n for n in names if getattr(ours, n) != getattr(theirs, n)}
    assert differ <= {"bf16", "logging_dir", "run_name", "accelerator_config"}


def test_live_fields():
    assert live_fields(GRPOConfig).keys() == {
        *("learning_rate", "max_grad_norm", "beta", "epsilon", "epsilon_high", "delta"),
        *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_completion_length"),
        *("scale_rewards", "loss_type", "mask_truncated_completions", "reward_weights", "kl_estimator"),
        *("dual_clip", "sapo_temperature_pos", "sapo_temperature_neg", "pass_reward", "dynamic_sampling"),
        *("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg", "dynamic_sampling_max_rounds"),
        *("top_entropy_quantile", "off_policy_mask_threshold", "ref_model_mixup_alpha", "ref_model_sync_steps"),
        *("clip_cov_ratio", "clip_cov_min", "clip_cov_max", "kl_cov_ratio", "kl_cov_coef"),
        *("entropy_coef", "entropy_coef_min", "entropy_coef_max", "entropy_coef_delta", "entropy_target"),
        *("vllm_importance_sampling_clip_max", "vllm_importance_sampling_clip_min"),
    }
    assert live_fields(GRPOConfig)["max_completion_length"] == {"minimum": 1, "maximum": 1_000_000, "choices": None}


def test_a_trl_config_is_taken_as_it_is(trainer, tmp_path, caplog):
    import trl

    theirs = trl.GRPOConfig(
        str(tmp_path), use_cpu=True, num_generations=2, per_device_train_batch_size=2, beta=0.1, bf16=False,
        vllm_server_port=9000, steps_per_generation=3,
    )  # fmt: skip
    ours = trainer(args=theirs).args
    assert isinstance(ours, GRPOConfig)
    assert (ours.num_generations, ours.beta, ours.steps_per_generation, ours.learning_rate) == (2, 0.1, 3, 1e-6)
    assert ours.vllm_server_port == 9000 and "does not know these settings" not in caplog.text


def test_command_line_parsing(tmp_path):
    from transformers import HfArgumentParser

    words = f"--output_dir {tmp_path} --use_cpu true --epsilon_high 0.3 --scale_rewards none --loss_type bnpo".split()
    words += ["--generation_kwargs", '{"bad_words_ids": [[5]]}', "--reward_weights", "1.0", "0.5"]
    (args,) = HfArgumentParser(GRPOConfig).parse_args_into_dataclasses(words)
    assert (args.epsilon_high, args.scale_rewards, args.loss_type) == (0.3, "none", "bnpo")
    assert args.generation_kwargs == {"bad_words_ids": [[5]]} and args.reward_weights == [1.0, 0.5]


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"loss_type": "ppo"}, "loss_type is 'ppo'; choose one of 'grpo', 'dapo', 'bnpo', 'dr_grpo', 'cispo'"),
        ({"loss_type": "cispo"}, "loss_type is 'cispo', .* but epsilon_high is unset; set it, to 5.0 as a start"),
        ({"scale_rewards": "sum"}, "scale_rewards is 'sum'; choose one of 'group', 'batch', 'none'"),
        ({"importance_sampling_level": "word"}, "importance_sampling_level is 'word'; choose one of"),
        ({"multi_objective_aggregation": "max"}, "multi_objective_aggregation is 'max'; choose one of"),
        ({"num_generations": 1}, "num_generations is 1; .* choose 2 or more"),
        ({"num_generations": 3}, "generation_batch_size is 4 .* not divisible by num_generations=3"),
        ({"generation_batch_size": 6}, "generation_batch_size is 6, which is not divisible by the 4 completions"),
        (
            {"generation_batch_size": 8, "steps_per_generation": 3},
            "generation_batch_size is 8 and steps_per_generation is 3; .* set only one",
        ),
        (
            {"eval_strategy": "steps", "per_device_eval_batch_size": 6},
            "per_device_eval_batch_size is 6 .* not divisible by the 4 completions per prompt in evaluation",
        ),
        ({"num_iterations": 0}, "num_iterations is 0; choose 1 or more"),
        ({"temperature": 0.0}, "temperature is 0.0; choose a value between 0.01 and 10.0"),
        ({"max_completion_length": 0}, "max_completion_length is 0; choose a value between 1 and 1000000"),
        ({"beta": -1.0}, "beta is -1.0; choose a value at least 0.0"),
        ({"top_entropy_quantile": 2.0}, "top_entropy_quantile is 2.0; choose a value between 0.0 and 1.0"),
        ({"vllm_mode": "remote"}, "vllm_mode is 'remote'; choose one of 'colocate', 'server'"),
        ({"sync_ref_model": True}, "sync_ref_model is True, but beta is 0"),
        ({"advantage_estimator": "gae"}, "advantage_estimator is 'gae'; choose one of 'grpo', 'rloo'"),
        ({"advantage_estimator": "pass_at_k"}, "pass_at_k is None; choose a k from 1 to 3"),
        ({"advantage_estimator": "pass_at_k", "pass_at_k": 4}, "pass_at_k is 4; choose a k from 1 to 3"),
        (
            {"advantage_estimator": "opo", "multi_objective_aggregation": "normalize_then_sum"},
            "leave one at its default",
        ),
        ({"replay_buffer_size": -1}, "replay_buffer_size is -1; choose 0 or more"),
        (
            {"vllm_importance_sampling_clip_min": 3.0, "vllm_importance_sampling_clip_max": 2.0},
            "vllm_importance_sampling_clip_min is 3.0, but vllm_importance_sampling_clip_max is 2.0",
        ),
        (
            {"vllm_importance_sampling_mode": "token_truncate", "vllm_importance_sampling_clip_max": None},
            "but neither vllm_importance_sampling_clip_min nor vllm_importance_sampling_clip_max is set",
        ),
        ({"reward_timeout": 0}, "reward_timeout is 0; choose seconds above 0"),
        ({"reward_on_error": "ignore"}, "reward_on_error is 'ignore'; choose one of 'raise', 'none'"),
        ({"log_completions_hub_repo": "a/b"}, "log_completions_hub_repo is set, but log_completions is False"),
        ({"use_vllm": True, "use_transformers_continuous_batching": True}, "set the other to False"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size is True, but .* lower per_device_train_batch_size"),
        ({"use_liger_kernel": True}, "use_liger_kernel is True"),
    ],
)
def test_wrong_settings(config, settings, words):
    with pytest.raises(ValueError, match=words):
        config(**settings)


@pytest.mark.parametrize(
    "options, kind, words",
    [
        ({"reward_funcs": None}, ValueError, "`reward_funcs` is empty; pass at least one reward function"),
        ({"reward_funcs": []}, ValueError, "`reward_funcs` is empty"),
        ({"reward_funcs": [1.0]}, TypeError, "`reward_funcs` holds a float"),
        ({"reward_weights": [1.0, 2.0]}, ValueError, "reward_weights has 2 entries for 1 reward functions"),
        ({"reward_processing_classes": [None, None]}, ValueError, "`reward_processing_classes` has 2 entries for 1"),
        ({"train_dataset": None}, ValueError, "`train_dataset` is missing; pass a datasets.Dataset"),
        ({"train_dataset": [{"prompt": "x"}]}, TypeError, "`train_dataset` must be a datasets.Dataset .*, got list"),
        (
            {"train_dataset": Dataset.from_dict({"question": ["x"]})},
            ValueError,
            "`train_dataset` has the columns question, but no 'prompt'",
        ),
        (
            {"eval_dataset": {"a": Dataset.from_dict({"q": ["x"]})}},
            ValueError,
            r"`eval_dataset\['a'\]` has the columns q",
        ),
        ({"args": "run.yaml"}, TypeError, "`args` must be a GRPOConfig, got str"),
        ({"router_aux_loss_coef": 0.1}, ValueError, "needs a mixture-of-experts model"),
    ],
)
def test_wrong_arguments(trainer, options, kind, words):
    with pytest.raises(kind, match=words):
        trainer(**options)


def test_return_outputs_is_refused(trainer):
    with pytest.raises(ValueError, match="return_outputs is True"):
        trainer().compute_loss(None, None, return_outputs=True)


def test_plain_training_arguments_are_converted(trainer, tmp_path):
    plain = TrainingArguments(str(tmp_path), use_cpu=True, per_device_train_batch_size=8, report_to="none")
    assert trainer(args=plain).args.steps_per_generation == 1


# Drawing prompts


@pytest.mark.parametrize("shuffle", [True, False])
def test_prompts_come_in_trls_order(shuffle):
    from trl.trainer.utils import RepeatSampler as Theirs

    data = range(7)
    ours = RepeatSampler(data, group_size=2, prompts_per_batch=3, repeats=4, shuffle=shuffle, seed=5)
    theirs = Theirs(data, mini_repeat_count=2, batch_size=3, repeat_count=4, shuffle=shuffle, seed=5)
    assert len(ours) == len(theirs)
    for _ in range(3):  # epochs
        assert list(ours) == list(theirs)


def test_an_epoch_is_the_same_whether_reached_or_resumed():
    one, other = (RepeatSampler(range(9), 2, 3, seed=1) for _ in range(2))
    epochs = [list(one) for _ in range(3)]
    other.set_epoch(2)
    assert list(other) == epochs[2] != epochs[0]


def test_a_stream_comes_in_the_samplers_order():
    dataset = Dataset.from_dict({"prompt": list("abcde"), "n": list(range(5))})
    settings = {"group_size": 2, "prompts_per_batch": 2, "repeats": 3}
    order = list(RepeatSampler(dataset, **settings, shuffle=False))
    assert [row["n"] for row in repeat_stream(dataset.to_iterable_dataset(), **settings)] == order


def test_training_and_evaluating_on_a_stream(trainer):
    stream = Dataset.from_dict({"prompt": PROMPTS}).to_iterable_dataset()
    run = trainer(
        train_dataset=stream, eval_dataset=stream, per_device_eval_batch_size=4, gradient_accumulation_steps=2
    )
    run.train()
    assert run.state.global_step == 2
    assert run.evaluate()["eval_completions/mean_length"] >= 1


def test_reward_functions_get_columns_state_and_groups(trainer):
    calls = []

    def judge(prompts, completions, completion_ids, label, trainer_state, log_extra, log_metric):
        calls.append((prompts, label, trainer_state.global_step))
        assert len(prompts) == len(completions) == len(completion_ids) == 8
        return [1.0] * 8

    run = trainer([judge], per_device_train_batch_size=8, max_steps=2)
    run.train()
    for step, (prompts, label, global_step) in enumerate(calls):
        assert global_step == step
        groups = [prompts[:4], prompts[4:]]
        assert all(len(set(group)) == 1 for group in groups) and len({*prompts}) == 2
        assert [PROMPTS[i] for i in label] == prompts


def test_only_the_prompt_column_is_left_on_request(trainer):
    def judge(prompts, **columns):
        assert "label" not in columns
        return [1.0] * len(prompts)

    trainer([judge], remove_unused_columns=True, max_steps=1).train()


# Sampling


def sampled(run, prompts):
    return run.rollouts.generate(prompts, run.rollouts.params()).completion_ids


def test_padding_does_not_change_what_is_sampled(trainer):
    """Greedy, so that each prompt's continuation is determined: alone and beside longer ones."""
    run = trainer(generation_kwargs={"do_sample": False}, max_completion_length=6)
    prompts = [[10, 11, 12, 13, 14], [20], [30, 31]]
    together = sampled(run, prompts)
    assert together == [sampled(run, [prompt])[0] for prompt in prompts]
    run.args.use_transformers_continuous_batching = True
    # Without bounds its cache takes most of the memory there is.
    run.args.transformers_continuous_batching_config = {"num_blocks": 16, "max_batch_tokens": 64, "page_size": 16}
    assert sampled(run, prompts) == together


def test_sampling_settings_are_read_at_each_call(trainer):
    run = trainer(max_completion_length=3)
    prompts = [[10, 11]] * 64
    assert max(map(len, sampled(run, prompts))) == 3
    run.args.max_completion_length = 7
    assert max(map(len, sampled(run, prompts))) == 7
    run.args.top_k = 1
    assert len({*map(tuple, sampled(run, prompts))}) == 1


def test_sampling_is_without_dropout_and_leaves_the_mode(trainer, tiny_model_factory):
    run = trainer(
        model=tiny_model_factory(attention_dropout=0.9),
        generation_kwargs={"do_sample": False},
        max_completion_length=6,
    )
    run.model.eval()
    expected = sampled(run, [[10, 11]])
    run.model.train()
    assert all(sampled(run, [[10, 11]]) == expected for _ in range(5))
    assert run.model.training


def test_completions_end_with_the_first_eos():
    assert cut_after_eos([5, 6, 0, 7, 0], {0}) == [5, 6, 0]
    assert cut_after_eos([5, 9, 0], {0, 9}) == [5, 9]
    assert cut_after_eos([5, 6], {0}) == [5, 6]


def test_every_declared_eos_token_ends_a_completion(tiny_model_factory, tiny_tokenizer):
    model = tiny_model_factory()
    model.generation_config.eos_token_id = [3, 7]
    assert eos_token_ids(model, tiny_tokenizer) == [tiny_tokenizer.eos_token_id, 3, 7]
    model.generation_config.eos_token_id = None
    assert eos_token_ids(model, tiny_tokenizer) == [tiny_tokenizer.eos_token_id]


# Scoring


def test_reward_model(trainer, tiny_tokenizer_factory, tmp_path):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    tokenizer = tiny_tokenizer_factory()
    torch.manual_seed(0)
    judge = LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, num_labels=1, initializer_range=0.5,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).eval()  # fmt: skip
    judge.save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")

    run = trainer([str(tmp_path / "judge"), judge], reward_processing_classes=[None, tokenizer])
    assert run.rewards.names == ["judge", "LlamaForSequenceClassification"]
    messages = [[{"role": "user", "content": "hi"}], [{"role": "user", "content": "hello there"}]]
    replies = [[{"role": "assistant", "content": "a"}], [{"role": "assistant", "content": "b c"}]]
    found = run.rewards.score(
        messages, replies, [[1], [2]], {}, trainer_state=run.state, log_extra=print, log_metric=print
    )
    for row, (prompt, reply) in enumerate(zip(messages, replies)):
        ids = tokenizer.apply_chat_template(prompt + reply, return_tensors="pt", return_dict=True)["input_ids"]
        with torch.no_grad():
            expected = judge(input_ids=ids).logits[0, 0].item()
        assert found[row].tolist() == pytest.approx([expected, expected], abs=1e-5)
    run.train()
    assert math.isfinite(run.state.log_history[0]["rewards/judge/mean"])


def test_two_functions_of_the_same_name_are_told_apart(trainer):
    run = trainer(
        [lambda completions, **_: [1.0] * len(completions), lambda completions, **_: [2.0] * len(completions)]
    )
    run.train()
    log = run.state.log_history[0]
    assert (log["rewards/<lambda>/mean"], log["rewards/<lambda>_2/mean"], log["reward"]) == (1.0, 2.0, 3.0)


def test_async_rewards(trainer):
    async def judge(completion_ids, **_):
        return [float(len(ids)) for ids in completion_ids]

    run = trainer([judge, length], reward_weights=[1.0, -1.0])
    run.train()
    assert run.state.log_history[0]["reward"] == 0.0
    assert run.state.log_history[0]["rewards/judge/mean"] >= 1.0


def test_an_error_in_a_reward_function_names_it(trainer):
    def judge(label, **_):
        return [1.0 / (value - value) for value in label]

    with pytest.raises(RuntimeError, match="Reward function 'judge' raised ZeroDivisionError"):
        trainer([judge]).train()


# Training


def test_the_policy_learns(trainer):
    """Rewarded for one token of 300, the policy comes to say it."""
    favourite = 42

    def says_it(completion_ids, **_):
        return [sum(token == favourite for token in ids) / len(ids) for ids in completion_ids]

    run = trainer(
        [says_it], per_device_train_batch_size=16, num_generations=16, learning_rate=4e-2, max_steps=24,
        lr_scheduler_type="constant", scale_rewards="none", max_completion_length=4,
    )  # fmt: skip
    run.train()
    rewards = [entry["reward"] for entry in run.state.log_history if "reward" in entry]
    assert sum(rewards[:3]) / 3 < 0.1 and sum(rewards[-3:]) / 3 > 0.8


@pytest.mark.parametrize("steps_per_generation, gradient_accumulation_steps", [(2, 2), (4, 2)])
def test_a_resumed_run_is_the_run(trainer, steps_per_generation, gradient_accumulation_steps):
    """Weights after 6 steps in three epochs, with a stop at step 4 and without."""
    settings = {
        "prompts": PROMPTS[:4],
        "steps_per_generation": steps_per_generation,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "num_iterations": 1,
        "save_strategy": "steps",
        "save_steps": 2,
        "lr_scheduler_type": "constant",
    }
    whole = trainer(max_steps=6, **settings)
    whole.train()
    resumed = trainer(max_steps=6, **settings)
    resumed.train(resume_from_checkpoint=f"{resumed.args.output_dir}/checkpoint-4")
    for (name, ours), theirs in zip(resumed.model.named_parameters(), whole.model.parameters()):
        torch.testing.assert_close(ours, theirs, msg=lambda m, n=name: f"{n}: {m}")
    tokens = [[e["num_tokens"] for e in run.state.log_history if "num_tokens" in e] for run in (resumed, whole)]
    assert tokens[0] == tokens[1]


def test_resuming_inside_a_generation_cycle_keeps_its_rhythm(trainer):
    """Batches are made at micro-batches 0, 4, 8; a run resumed at 6 has the rest of its cycle, and makes one at 8."""
    settings = {"steps_per_generation": 2, "num_iterations": 2, "save_strategy": "steps", "save_steps": 3}
    settings |= {"gradient_accumulation_steps": 2, "max_steps": 6}
    trainer(**settings).train()
    resumed = trainer(**settings)
    seen = []
    sample = resumed._sample_and_score
    resumed._sample_and_score = lambda rows: seen.append(resumed._step) or sample(rows)
    resumed.train(resume_from_checkpoint=f"{resumed.args.output_dir}/checkpoint-3")
    assert seen == [8]


def test_training_twice_starts_afresh(trainer):
    run = trainer(steps_per_generation=2, max_steps=3)
    run.train()
    seen = []
    sample = run._sample_and_score
    run._sample_and_score = lambda rows: seen.append(run._step) or sample(rows)
    run.train()
    assert seen == [0, 2]


def test_evaluation_while_training(trainer):
    dataset = Dataset.from_dict({"prompt": PROMPTS[:4], "label": [0] * 4})
    run = trainer(
        eval_dataset={"one": dataset, "two": dataset}, eval_strategy="steps", eval_steps=1,
        num_generations_eval=2, per_device_eval_batch_size=4,
    )  # fmt: skip
    groups = []
    advantages = run._advantages
    run._advantages = lambda *given: groups.append((run.model.training, given[-1])) or advantages(*given)
    run.train()
    assert {*groups} == {(True, 4), (False, 2)}
    evaluations = [entry for entry in run.state.log_history if "eval_one_loss" in entry]
    assert len(evaluations) == 2 and "eval_reward" in evaluations[0]
    assert evaluations[0]["eval_one_reward"] == evaluations[0]["eval_reward"]
    trained = [entry for entry in run.state.log_history if "loss" in entry]
    assert trained[-1]["num_tokens"] > trained[0]["num_tokens"]
    assert "step_time" in trained[0]


def test_gradient_checkpointing_keeps_the_cache_while_sampling(trainer):
    run = trainer(gradient_checkpointing=True)
    caches = []
    forward = run.model.forward

    def spy(*args, **kwargs):
        if not torch.is_grad_enabled():
            caches.append(kwargs.get("past_key_values") is not None and kwargs["input_ids"].size(1) == 1)
        return forward(*args, **kwargs)

    run.model.forward = spy
    run.train()
    assert sum(caches) >= 2 * 2  # all but the first token of each batch


def lora(**options):
    from peft import LoraConfig

    return LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], **options})


def test_adapters_train_and_the_base_does_not(trainer, tiny_model_factory):
    run = trainer(peft_config=lora(), beta=0.1, num_iterations=2, gradient_checkpointing=True, max_steps=4)
    assert run.ref_model is None
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    run.train()
    moved = {name for name, p in run.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all("lora_" in name for name in moved)
    assert run.state.log_history[0]["kl"] == 0.0 and run.state.log_history[-2]["kl"] > 0.0


def test_an_adapter_on_the_output_head_trains(trainer):
    run = trainer(peft_config=lora(target_modules=["lm_head"]))
    run.train()
    assert run.model.base_model.model.lm_head.lora_B["default"].weight.abs().max() > 0


def test_a_given_adapter_keeps_its_start_as_reference(trainer, tiny_model_factory):
    from peft import get_peft_model

    torch.manual_seed(0)
    run = trainer(model=get_peft_model(tiny_model_factory(), lora(init_lora_weights=False)), beta=0.1, max_steps=3)
    parameters = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    run.train()
    after = dict(run.model.named_parameters())
    assert all(torch.equal(p, after[name]) for name, p in parameters.items() if ".ref." in name)
    assert any(not torch.equal(p, after[name]) for name, p in parameters.items() if ".default." in name)
    assert run.state.log_history[0]["kl"] == 0.0 and run.model.active_adapter == "default"


def test_reference_model_is_the_policy_at_the_start(trainer, tiny_model_factory):
    """Also for a model built in memory, which no path leads to."""
    start = tiny_model_factory()
    run = trainer(beta=0.5, max_steps=3)
    run.train()
    for reference, initial in zip(run.ref_model.parameters(), start.parameters()):
        assert torch.equal(reference, initial) and not reference.requires_grad
    assert any(not torch.equal(p, q) for p, q in zip(run.model.parameters(), start.parameters()))


def test_dropout_can_be_disabled(trainer, tiny_model_factory):
    run = trainer(peft_config=lora(lora_dropout=0.5), disable_dropout=True)
    rates = [m.p for m in run.model.modules() if isinstance(m, torch.nn.Dropout)]
    assert rates and set(rates) == {0.0}


def test_output_head_in_float32(trainer, tiny_model_factory):
    for tied in (False, True):
        model = tiny_model_factory(tie_word_embeddings=tied).to(torch.bfloat16)
        run = trainer(model=model, cast_lm_head_to_fp32=True, max_steps=1)
        assert run.model.lm_head.weight.dtype == torch.float32
        assert run.model.model.embed_tokens(torch.tensor([[5]])).dtype == torch.bfloat16
        assert run.model(input_ids=torch.tensor([[5, 6]])).logits.dtype == torch.float32
        run.train()
        assert math.isfinite(run.state.log_history[0]["loss"])


def test_output_head_with_an_adapter_cannot_be_cast(trainer):
    with pytest.raises(
        ValueError, match="cast_lm_head_to_fp32 is True, but the output head is a Linear, not a linear"
    ):
        trainer(peft_config=lora(target_modules=["lm_head"]), cast_lm_head_to_fp32=True)


def test_learned_positions_are_counted_from_the_first_token(trainer, tiny_tokenizer_factory):
    """GPT-2 adds a vector per position: left padding must not shift them."""
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = tiny_tokenizer_factory()
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.5,
            eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
        )
    ).eval()  # fmt: skip
    run = trainer(model=model)
    prompts, completions = [[10, 11, 12, 13, 14], [20]], [[30, 31], [40, 41, 42]]
    rollouts = Rollouts(
        [{}, {}], ["", ""], ["", ""], prompts, completions, [True, True], [None] * 2, [None] * 2, [None] * 2
    )
    batch = as_batch(run, rollouts, temperature=0.7, cap=5)
    with torch.no_grad():
        logps = completion_scores(run, run.model, batch).logps
        for row, (prompt, completion) in enumerate(zip(prompts, completions)):
            logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1] / 0.7
            expected = logits.log_softmax(-1)[range(len(completion)), completion]
            torch.testing.assert_close(logps[row, : len(completion)], expected, atol=1e-5, rtol=1e-5)
    run.train()


# Changes while training


def test_settings_changed_in_flight_take_effect(trainer, at_step):
    def change(args, model):
        args.max_completion_length = 9
        args.reward_weights = [3.0]
        args.loss_type, args.scale_rewards = "grpo", "none"
        args.temperature, args.epsilon, args.epsilon_high = 0.5, 0.1, 0.4

    run = trainer(
        lambda completions, **_: [1.0] * len(completions), callbacks=[at_step(2, change)], max_steps=4,
        per_device_train_batch_size=16, num_generations=16,
    )  # fmt: skip
    batches = []
    loss = run.compute_loss
    run.compute_loss = lambda model, batch, **k: batches.append(batch) or loss(model, batch, **k)
    run.train()
    logs = [entry for entry in run.state.log_history if "loss" in entry]
    assert [entry["completions/max_length"] for entry in logs] == [5, 5, 9, 9]
    assert [entry["reward"] for entry in logs] == [1, 1, 3, 3]
    assert [batch.temperature for batch in batches] == [1, 1, 0.5, 0.5]
    assert [batch.max_completion_length for batch in batches] == [5, 5, 9, 9]
    assert logs[2]["entropy"] < logs[1]["entropy"]


def test_a_buffered_batch_is_scored_at_the_temperature_it_was_sampled_at(trainer, at_step):
    """One generation batch for 4 steps: after step 1 the temperature changes, the buffered rows keep theirs."""
    run = trainer(
        steps_per_generation=4, max_steps=5, callbacks=[at_step(1, lambda args, _: setattr(args, "temperature", 0.3))],
        learning_rate=0.0,
    )  # fmt: skip
    run.train()
    region = [entry["clip_ratio/region_mean"] for entry in run.state.log_history if "loss" in entry]
    assert region == [0.0] * 5  # the policy does not move, so a ratio off 1 could only come from the temperature


def test_beta_can_be_switched_off_and_on_where_a_reference_is_held(trainer, at_step):
    acts = [
        at_step(1, lambda args, _: setattr(args, "beta", 0.0)),
        at_step(3, lambda args, _: setattr(args, "beta", 0.2)),
    ]
    run = trainer(beta=0.1, callbacks=acts, max_steps=6, steps_per_generation=2)
    run.train()
    logs = [entry for entry in run.state.log_history if "loss" in entry]
    assert ["kl" in entry for entry in logs] == [True, False, False, False, True, True]


def test_beta_cannot_be_switched_on_without_a_reference(trainer, at_step):
    run = trainer(callbacks=[at_step(1, lambda args, _: setattr(args, "beta", 0.2))])
    with pytest.raises(
        ValueError, match=r"beta is 0\.2, but the run started with beta=0 and holds no reference model"
    ):
        run.train()


# Logging


def test_completions_are_printed_and_written(trainer, capsys):
    def judge(completions, log_extra, log_metric, trainer_state, **_):
        if trainer_state.global_step == 1:
            log_extra("note", [f"n{i}" for i in range(len(completions))])
        log_metric("judge/seen", trainer_state.global_step)
        return [None if i % 2 else float(i) for i in range(len(completions))]

    run = trainer([judge, length], log_completions=True, num_completions_to_print=2, max_steps=3)
    run.train()
    folder = f"{run.args.output_dir}/completions"
    first, second, third = (pd.read_parquet(f"{folder}/completions_{step:05d}.parquet") for step in (1, 2, 3))
    assert list(first) == ["step", "prompt", "completion", "judge", "length", "advantage"]
    assert list(second)[:-1] == ["step", "prompt", "completion", "judge", "length", "note"]
    assert second["note"].tolist() == ["n0", "n1", "n2", "n3"] and third["note"].isna().all()
    assert first["step"].tolist() == [1] * 4 and first["prompt"].isin(PROMPTS).all()
    assert first["judge"].isna().tolist() == [False, True, False, True]
    z = first["judge"].fillna(0) + first["length"]
    expected = (z - z.mean()) / (z.std() + 1e-4)
    assert first["advantage"].tolist() == pytest.approx(expected.tolist(), abs=1e-5)
    assert [entry["judge/seen"] for entry in run.state.log_history if "loss" in entry] == [0, 1, 2]
    printed = capsys.readouterr().out
    assert "Step 1" in printed and printed.count("Step ") == 3 and "Advantage" in printed


def test_conversations_are_written(trainer):
    prompts = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    run = trainer(prompts=prompts, log_completions=True, max_steps=1)
    run.train()
    table = pd.read_parquet(f"{run.args.output_dir}/completions/completions_00001.parquet")
    assert table["prompt"][0][0]["role"] == "user" and table["completion"][0][0]["role"] == "assistant"


def test_extra_columns_that_do_not_fit_are_left_out(trainer, caplog):
    def judge(completions, log_extra, **_):
        log_extra("note", ["one"])
        return [1.0] * len(completions)

    run = trainer([judge], log_completions=True, max_steps=1)
    run.train()
    assert "'judge' logged 1 values in the column 'note' for 4 completions; they are left out" in caplog.text
    assert "note" not in pd.read_parquet(f"{run.args.output_dir}/completions/completions_00001.parquet")


def test_completions_go_to_wandb(trainer, monkeypatch):
    tables = []
    wandb = types.SimpleNamespace(
        run=object(), Table=lambda dataframe: dataframe, log=lambda what: tables.append(what["completions"])
    )
    run = trainer(log_completions=True, max_steps=1, per_device_train_batch_size=8, log_unique_prompts=True)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    run.args.report_to = ["wandb"]
    run.train()
    assert len(tables) == 1 and len(tables[0]) == 2  # 8 completions of 2 prompts


def test_completions_go_to_the_hub(trainer, monkeypatch, caplog):
    import huggingface_hub

    calls = []
    monkeypatch.setattr(huggingface_hub, "create_repo", lambda name, **k: calls.append(("repo", name, k["private"])))
    monkeypatch.setattr(
        huggingface_hub.DatasetCard, "push_to_hub", lambda self, name, **k: calls.append(("card", name))
    )
    monkeypatch.setattr(
        huggingface_hub, "CommitScheduler", lambda **k: calls.append(("files", k["folder_path"])) or True
    )
    run = trainer(log_completions=True, max_steps=2, log_completions_hub_repo="me/texts", hub_private_repo=True)
    run.train()
    folder = f"{run.args.output_dir}/completions"
    assert calls == [("repo", "me/texts", True), ("card", "me/texts"), ("files", folder)]

    def away(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "create_repo", away)
    trainer(log_completions=True, max_steps=1, log_completions_hub_repo="me/texts").train()
    assert "Completions cannot be sent to me/texts (OSError: no network); they stay in" in caplog.text


def test_what_is_printed_is_text_and_bounded():
    from io import StringIO

    from rich.console import Console

    out = StringIO()
    completions = ["[red]not markup[/red]\x1b[31m\x07", "x" * 5000]
    print_completions(
        ["p", [{"role": "user", "content": "hello"}]], completions, [0.5, -0.5], {"f": [1.0, math.nan]},
        {"note": ["a", None]}, 7, console=Console(file=out, width=100),
    )  # fmt: skip
    text = out.getvalue()
    assert "[red]not markup[/red]" in text and "\x1b" not in text and "\x07" not in text
    assert text.count("x") < 2100 and "3000 more" in text.replace("\n", " ") and "USER" in text and "nan" in text


# What the diagnostics get


class Recorded(TrainerCallback):
    def __init__(self):
        self.steps = []

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(self.recorder.take())


def test_measurements_are_handed_over(trainer, tiny_tokenizer):
    eos = tiny_tokenizer.eos_token_id
    script = itertools.cycle([[5, eos], [5, eos], [6, 7, eos], [6, 7, 8, 9, 10], [5], [5, 6, 7, 8, eos], [6], [6]])

    def judge(completion_ids, **_):
        return [None if len(ids) == 2 else float(len(ids)) for ids in completion_ids]

    recorded = Recorded()
    run = trainer([judge], per_device_train_batch_size=8, num_generations=4, callbacks=[recorded], max_steps=2)
    recorded.recorder = run.recorder
    run.rollouts.generate = lambda prompt_ids, params, **_: sampled_from_ids([next(script) for _ in prompt_ids], [eos])
    run.train()
    step = recorded.steps[0]
    assert step.signals["num_completions"] == 8 and step.signals["num_prompts"] == 2
    (rewards,) = step.rewards
    expected = [[math.nan, math.nan, 3, 5], [1, 5, 1, 1]]
    for matrix in (rewards.total, rewards.per_function["judge"]):
        assert str([list(map(float, row)) for row in matrix]) == str([list(map(float, row)) for row in expected])
    # Ended: lengths 2 2 3 5; cut: 5 1 1 1, rewards 5 1 1 1. Duplicates: one of [5, eos], one of [6].
    signals = step.signals
    assert signals["completions/p50_terminated_length"] == pytest.approx(2.5)
    assert signals["completions/p99_terminated_length"] == pytest.approx(3 + 0.97 * 2)
    assert signals["completions/truncated_reward"] == pytest.approx(2.0)
    assert signals["completions/terminated_reward"] == pytest.approx(4.0)
    assert signals["completions/at_cap"] == pytest.approx(2 / 8) and signals["completions/at_cap#n"] == 8
    assert signals["completions/duplicate_share"] == pytest.approx(2 / 8)
    # Group 1: 3 5 -> -+ 1/(sqrt 2 + 1e-4); group 2: 1 5 1 1, mean 2, std 2.
    one, two = 1 / (math.sqrt(2) + 1e-4), 1 / (2 + 1e-4)
    assert signals["advantages/abs_mean"] == pytest.approx((2 * one + 6 * two) / 8)
    assert signals["advantages/zero_share"] == pytest.approx(2 / 8)
    assert {"time/generate", "time/score", "prompts/p95_length"} <= signals.keys()
    assert not any(name.startswith("log_ratio") for name in signals)  # on-policy: the ratio is 1 by construction


def test_log_ratios_are_handed_over_off_policy(trainer):
    recorded = Recorded()
    run = trainer(num_iterations=2, callbacks=[recorded], learning_rate=0.02, max_steps=2)
    recorded.recorder = run.recorder
    run.train()
    first, second = (step.signals for step in recorded.steps)
    assert first["log_ratio/abs_mean"] == pytest.approx(0, abs=1e-5) and first["ratio/ess"] == pytest.approx(1)
    assert second["log_ratio/abs_mean"] > 0.01 and 0 < second["ratio/ess"] < 1 and second["policy/approx_kl"] > 0
    assert second["log_ratio/p01"] < second["log_ratio/p99"]
    assert "num_completions" in first and "num_completions" not in second


def test_nothing_is_handed_over_in_evaluation(trainer):
    run = trainer(eval_dataset=Dataset.from_dict({"prompt": PROMPTS}), per_device_eval_batch_size=4)
    run.evaluate()
    taken = run.recorder.take()
    assert taken.signals == {} and taken.rewards == []


# The record between sampling and loss


def test_batches_split_and_shuffle_rows_together():
    n = 6
    column = torch.arange(n).unsqueeze(1)
    ones = torch.ones_like(column)
    batch = RolloutBatch(
        prompt_ids=column, prompt_mask=ones, completion_ids=column, completion_mask=ones, loss_mask=ones,
        advantages=torch.arange(n), active_tokens=torch.tensor(99), temperature=0.7, max_completion_length=5,
        versions=torch.zeros(n), old_logps=column.float(),
    )  # fmt: skip
    torch.manual_seed(0)
    shuffled = batch.shuffled()
    assert sorted(shuffled.advantages.tolist()) == list(range(n)) and shuffled.advantages.tolist() != list(range(n))
    parts = shuffled.split(3)
    assert torch.cat([part.advantages for part in parts]).tolist() == shuffled.advantages.tolist()
    for part in parts:
        assert len(part) == 2 and part.active_tokens == 99 and part.temperature == 0.7 and part.ref_logps is None
        assert part.old_logps.flatten().tolist() == part.completion_ids.flatten().tolist() == part.advantages.tolist()


def test_padding():
    ids, mask = pad_ids([[5, 6, 7], [8]], 1, "left", 4)
    assert ids.tolist() == [[1, 5, 6, 7], [1, 1, 1, 8]] and mask.tolist() == [[0, 1, 1, 1], [0, 0, 0, 1]]
    ids, mask = pad_ids([[5, 6, 7], [8]], 1, "right")
    assert ids.tolist() == [[5, 6, 7], [8, 1, 1]] and mask.tolist() == [[1, 1, 1], [1, 0, 0]]


def test_configs_can_be_copied_and_serialised(config):
    args = config(loss_type="grpo", scale_rewards=False)
    assert config(scale_rewards=True).scale_rewards == config(scale_rewards="true").scale_rewards == "group"
    assert copy.deepcopy(args).scale_rewards == "none"
    assert '"loss_type": "grpo"' in args.to_json_string()
    again = GRPOConfig(**{k: v for k, v in args.to_dict().items() if args.__dataclass_fields__[k].init})
    assert again.generation_batch_size == args.generation_batch_size
