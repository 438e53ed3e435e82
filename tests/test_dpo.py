"""DPOTrainer by itself: its losses against formulas written out here, shared prompts, resuming, data, settings."""

import copy
import json
import logging
import math
import warnings

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch.nn.functional import logsigmoid

from outspoken.trainers.dpo import LOSS_TYPES, DataCollatorForPreference, DPOConfig, DPOTrainer, RewardShift

PROMPT = "The quick brown fox jumps over the lazy dog. What color is the sky?"
ROWS = [
    {"prompt": PROMPT, "chosen": " It is blue.", "rejected": " The grass is green, and so is it."},
    {"prompt": PROMPT + " What is 2 + 2?", "chosen": " It is 4, and that is all.", "rejected": " 5"},
    {"prompt": "Say it, then say it again, all of it:", "chosen": " green.", "rejected": " blue."},
    {"prompt": "Say a b c d e f g h i j k l", "chosen": " a b c d e f g", "rejected": " nothing at all"},
]
TOKENS = [
    {"prompt_ids": [5, 6, 7, 8], "chosen_ids": [9, 10, 11], "rejected_ids": [12]},
    {"prompt_ids": [20, 21], "chosen_ids": [22], "rejected_ids": [23, 24, 25, 26, 27]},
]


@pytest.fixture(scope="module")
def build(tmp_path_factory, tiny_model_factory, tiny_tokenizer_factory):
    def make(rows=ROWS, model=None, tokenizer=None, **settings):
        kwargs = {
            key: settings.pop(key)
            for key in ("ref_model", "eval_dataset", "data_collator", "peft_config", "callbacks")
            if key in settings
        }
        defaults = {
            "output_dir": str(tmp_path_factory.mktemp("run")),
            "use_cpu": True,
            "report_to": [],
            "save_strategy": "no",
            "disable_tqdm": True,
            "logging_steps": 1,
            "gradient_checkpointing": False,
            "diagnose": False,
            "optim": "sgd",
            "learning_rate": 0.01,
            "max_grad_norm": 0.0,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 2,
            "max_steps": 1,
            "beta": 0.3,
        }
        return DPOTrainer(
            tiny_model_factory() if model is None else model,
            args=DPOConfig(**defaults | settings),
            train_dataset=Dataset.from_list(copy.deepcopy(rows)) if isinstance(rows, list) else rows,
            processing_class=tokenizer or tiny_tokenizer_factory(),
            **kwargs,
        )

    return make


def moved(trainer, size=0.01):
    """The trainer, with a policy that has moved away from its reference."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter += size * torch.randn(parameter.shape, generator=generator)
    return trainer


def batch_of(trainer):
    return trainer.data_collator([*trainer.train_dataset])


def step(trainer, batch=None):
    """Loss, gradients and metrics of one batch."""
    trainer.model.train()
    trainer.model.zero_grad()
    trainer._metrics["train"].clear()
    loss = trainer.compute_loss(trainer.model, batch_of(trainer) if batch is None else batch)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    return loss.item(), gradients, {name: values[-1] for name, values in trainer._metrics["train"].items()}


# ---------------------------------------------------------------------- shared prompts


@pytest.fixture(scope="module")
def both_ways(build):
    return moved(build(use_weighting=True, ld_alpha=0.5))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_shared_prompts_change_nothing(both_ways, loss_type):
    trainer = both_ways
    trainer.args.loss_type = [loss_type]
    trainer.args.use_weighting = not loss_type.startswith("aot")
    trainer.args.label_smoothing = 0.1
    rows = []
    for share in (True, False):
        trainer._share_prompts = share
        rows.append(len(trainer._answers(batch_of(trainer)).labels))
        if share:
            shared = step(trainer)
        else:
            plain = step(trainer)
    assert rows == [4, 8]
    assert shared[0] == pytest.approx(plain[0], rel=1e-5, abs=1e-6)
    for name, gradient in plain[1].items():
        scale = max(1.0, gradient.abs().max().item())
        torch.testing.assert_close(shared[1][name], gradient, rtol=1e-5, atol=1e-5 * scale)
    assert shared[2].keys() == plain[2].keys()
    for name, value in plain[2].items():
        if name != "num_tokens":
            assert shared[2][name] == pytest.approx(value, rel=1e-5, abs=1e-5), name


def test_shared_prompts_can_be_switched_off_and_are_where_the_model_forbids_them(build, tiny_model_factory, caplog):
    assert build()._share_prompts
    caplog.set_level(logging.INFO, "outspoken.trainers.dpo")
    assert not build(share_prompts=False)._share_prompts
    windowed = tiny_model_factory(architecture="qwen2", sliding_window=8, use_sliding_window=True, max_window_layers=0)
    assert not build(model=windowed)._share_prompts
    assert "is computed twice: its attention reaches back 8 tokens only" in caplog.text
    other = tiny_model_factory(seed=1)
    other.set_attn_implementation("eager")
    assert not build(ref_model=other)._share_prompts  # the two take different masks
    short = build([{"prompt_ids": [5], "chosen_ids": [6, 7], "rejected_ids": [8, 9]}])
    assert short._share_prompts and len(short._answers(batch_of(short)).labels) == 2  # not worth it


# ---------------------------------------------------------------------- losses that TRL lacks, or gets wrong


def log_ratios(trainer):
    """Chosen and rejected log-ratios, tokens of the answers, and chosen log-probability, by the plain way."""
    batch = DataCollatorForPreference(trainer._pad_token_id)([*trainer.train_dataset])
    found = {}
    for name, model in (("policy", trainer.model), ("reference", trainer.ref_model)):
        with torch.no_grad():
            logps = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].log_softmax(-1)
        picked = (
            logps.gather(-1, batch["input_ids"][:, 1:].unsqueeze(-1)).squeeze(-1) * batch["completion_mask"][:, 1:]
        )
        squares = (logps.exp() ** 2).sum(-1).log() * batch["completion_mask"][:, 1:]
        found[name] = picked, squares
    picked, squares = found["policy"]
    lengths = batch["completion_mask"][:, 1:].sum(1)
    weights = ((picked - squares).sum(1) / lengths).exp()
    chosen, rejected = (picked - found["reference"][0]).sum(1).chunk(2)
    return chosen, rejected, lengths.chunk(2), picked.sum(1).chunk(2)[0], weights.chunk(2)


def test_label_smoothing_makes_it_conservative(build):
    trainer = moved(build(label_smoothing=0.2))
    chosen, rejected, *_ = log_ratios(trainer)
    margin = 0.3 * (chosen - rejected)
    expected = (-0.8 * logsigmoid(margin) - 0.2 * logsigmoid(-margin)).mean().item()
    assert step(trainer)[0] == pytest.approx(expected, rel=1e-5)
    trainer.args.loss_type = ["sigmoid_norm"]
    lengths = log_ratios(trainer)[2]
    margin = 0.3 * (chosen / lengths[0] - rejected / lengths[1])
    expected = (-0.8 * logsigmoid(margin) - 0.2 * logsigmoid(-margin)).mean().item()
    assert step(trainer)[0] == pytest.approx(expected, rel=1e-5)


def test_r_dpo_charges_for_length(build):
    trainer = moved(build(length_alpha=0.05))
    chosen, rejected, lengths, *_ = log_ratios(trainer)
    expected = -logsigmoid(0.3 * (chosen - rejected) + 0.05 * (lengths[0] - lengths[1])).mean().item()
    assert step(trainer)[0] == pytest.approx(expected, rel=1e-5)


def test_dpop_holds_the_chosen_answer_up(build):
    trainer = moved(build(dpop_lambda=5.0))
    chosen, rejected, *_ = log_ratios(trainer)
    assert (chosen < 0).any()
    expected = -logsigmoid(0.3 * (chosen - rejected - 5.0 * (-chosen).clamp(min=0))).mean().item()
    assert step(trainer)[0] == pytest.approx(expected, rel=1e-5)


def test_wpo_weighs_pairs_but_not_the_sft_term(build):
    """In TRL it fails with both of these losses."""
    trainer = moved(build(use_weighting=True, loss_type=["hinge", "sft"], loss_weights=[1.0, 0.5]))
    chosen, rejected, lengths, logps, weights = log_ratios(trainer)
    hinge = (1 - 0.3 * (chosen - rejected)).clamp(min=0) * weights[0] * weights[1]
    expected = hinge.mean() - 0.5 * logps.sum() / lengths[0].sum()
    assert step(trainer)[0] == pytest.approx(expected.item(), rel=1e-5)


def test_bco_shifts_rewards_by_their_running_mean(build):
    trainer = moved(build(loss_type="bco_pair", bco_shift=True))
    chosen, rejected, *_ = (0.3 * values for values in log_ratios(trainer)[:2])
    shift = torch.cat([chosen, rejected]).mean()
    expected = (-logsigmoid(chosen - shift) - logsigmoid(shift - rejected)).mean()
    assert step(trainer)[0] == pytest.approx(expected.item(), rel=1e-5)
    (running,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, RewardShift))
    running.add(total=-80.0, count=8)  # what batches before it would have left
    trainer.model.eval()
    shift = (8 * shift - 80) / 16
    expected = (-logsigmoid(chosen - shift) - logsigmoid(shift - rejected)).mean()
    for _ in range(2):  # an evaluation uses the mean, and leaves it as it is
        with torch.no_grad():
            assert trainer.compute_loss(trainer.model, batch_of(trainer)).item() == pytest.approx(
                expected.item(), rel=1e-5
            )


# ---------------------------------------------------------------------- accumulation


@pytest.mark.parametrize("loss_type", [["sigmoid"], ["sigmoid", "sft"]])
def test_micro_batches_weigh_by_their_pairs_and_tokens(build, loss_type):
    """Four pairs as one batch, and as micro-batches of 3 and 1: the same loss and the same step."""
    weights = {"loss_weights": [1.0, 0.5]} if len(loss_type) == 2 else {}
    whole = moved(build(loss_type=loss_type, **weights))
    parts = moved(build(loss_type=loss_type, per_device_train_batch_size=3, gradient_accumulation_steps=2, **weights))
    for trainer in (whole, parts):
        trainer.train()
    assert parts.state.global_step == 1
    one, other = (trainer.state.log_history[0] for trainer in (whole, parts))
    assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
    for expected, found in zip(whole.model.parameters(), parts.model.parameters()):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------- settings in flight


def test_settings_are_read_where_they_are_used(build):
    trainer = moved(build())
    chosen, rejected, *_ = log_ratios(trainer)
    assert step(trainer)[0] == pytest.approx(-logsigmoid(0.3 * (chosen - rejected)).mean().item(), rel=1e-5)
    trainer.args.beta = 0.05
    loss, _, metrics = step(trainer)
    assert loss == pytest.approx(-logsigmoid(0.05 * (chosen - rejected)).mean().item(), rel=1e-5)
    assert metrics["rewards/margins"] == pytest.approx(0.05 * (chosen - rejected).mean().item(), abs=1e-5)
    trainer.args.loss_weights = [2.0]
    assert step(trainer)[0] == pytest.approx(2 * loss, rel=1e-6)


def test_what_may_change_in_flight():
    from outspoken.trainers.config import live_fields

    live = live_fields(DPOConfig)
    assert {
        "beta", "label_smoothing", "loss_weights", "ld_alpha", "discopop_tau", "f_alpha_divergence_coef",
        "length_alpha", "dpop_lambda", "ref_model_mixup_alpha", "ref_model_sync_steps", "learning_rate",
    } <= live.keys()  # fmt: skip
    assert not {"loss_type", "precompute_ref_log_probs", "share_prompts", "max_length"} & live.keys()


# ---------------------------------------------------------------------- the reference


def test_the_reference_is_what_was_given(build, tiny_model_factory):
    """Also weights that no path leads to."""
    model = tiny_model_factory()
    with torch.no_grad():
        model.model.norm.weight += 0.5
    trainer = build(model=model, max_steps=3)
    trainer.train()
    first, last = trainer.state.log_history[0], trainer.state.log_history[-2]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5) and abs(first["rewards/margins"]) < 1e-5
    assert last["rewards/margins"] != 0
    assert trainer.ref_model.model.norm.weight[0].item() == pytest.approx(1.5)


def test_the_reference_moves_in_tr_dpo(build):
    trainer = build(sync_ref_model=True, ref_model_sync_steps=2, ref_model_mixup_alpha=0.25, max_steps=3)
    start = [p.detach().clone() for p in trainer.model.parameters()]
    after = {}
    step_of = trainer.training_step

    def note(*args, **kwargs):
        after.setdefault(trainer.state.global_step, [p.detach().clone() for p in trainer.model.parameters()])
        return step_of(*args, **kwargs)

    trainer.training_step = note
    trainer.train()
    for reference, initial, second in zip(trainer.ref_model.parameters(), start, after[2]):
        torch.testing.assert_close(reference, 0.25 * second + 0.75 * initial)
    with pytest.raises(ValueError, match="`sync_ref_model=True` needs a reference model of its own"):
        build(sync_ref_model=True, peft_config=LoraConfig(task_type="CAUSAL_LM"))


def test_precomputed_columns_that_are_there_are_used(build):
    rows = [{**row, "ref_chosen_logps": -10.0 * i, "ref_rejected_logps": -5.0} for i, row in enumerate(TOKENS)]
    trainer = build(rows, precompute_ref_log_probs=True)
    assert trainer.ref_model is None
    batch = batch_of(trainer)
    assert batch["ref_chosen_logps"].tolist() == [0.0, -10.0]
    _, _, metrics = step(trainer)
    assert metrics["rewards/chosen"] == pytest.approx(0.3 * (metrics["logps/chosen"] + 5.0), rel=1e-5)


def test_precomputing_changes_nothing_and_is_refused_once_training_began(build):
    rows = Dataset.from_list(ROWS)
    held, asked = build(max_steps=2), build(max_steps=2, precompute_ref_log_probs=True, eval_dataset={"same": rows})
    for trainer in (held, asked):
        trainer.train()
    assert asked.ref_model is None
    for a, b in zip(held.model.parameters(), asked.model.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert held.evaluate(rows)["eval_loss"] == pytest.approx(asked.evaluate()["eval_same_loss"], rel=1e-5)
    with pytest.raises(ValueError, match="pass that dataset as `eval_dataset` when the trainer is built"):
        asked.evaluate(rows)
    with pytest.raises(ValueError, match="the train dataset is a stream"):
        build(Dataset.from_list(ROWS).to_iterable_dataset(), precompute_ref_log_probs=True)
    with pytest.raises(ValueError, match="The batch has no 'ref_chosen_logps'"):
        step(asked, {k: v for k, v in batch_of(asked).items() if k != "ref_chosen_logps"})


def test_precomputed_numbers_keep_their_precision_under_deepspeed(build, monkeypatch):
    """It casts whatever is no integer to the weights' precision, in which -345.7 is -346."""
    trainer = build(TOKENS)

    class Plugin:
        hf_ds_config = type("Config", (), {"dtype": staticmethod(lambda: torch.bfloat16)})

    trainer.is_deepspeed_enabled = True
    monkeypatch.setattr(type(trainer.accelerator.state), "deepspeed_plugin", Plugin, raising=False)
    prepared = trainer._prepare_inputs({"ref_chosen_logps": torch.tensor([-345.7]), "pixel_values": torch.ones(1)})
    assert prepared["ref_chosen_logps"].dtype == torch.float32 and prepared["pixel_values"].dtype == torch.bfloat16


# ---------------------------------------------------------------------- resuming


RESUMED = {
    "plain": {},
    "tr-dpo": {"sync_ref_model": True, "ref_model_sync_steps": 1},
    "bco-shift": {"loss_type": "bco_pair", "bco_shift": True},
    "precomputed": {"precompute_ref_log_probs": True},
    "adapter": {"adapter": True},
}


@pytest.mark.parametrize("name", ["tr-dpo", "bco-shift", *(pytest.param(n, marks=pytest.mark.slow) for n in
                                  ("plain", "precomputed", "adapter"))])  # fmt: skip
def test_a_resumed_run_equals_an_uninterrupted_one(build, tmp_path, name):
    def make(folder):
        settings = dict(RESUMED[name])
        if settings.pop("adapter", False):
            settings["peft_config"] = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"])
        return build(
            max_steps=4, per_device_train_batch_size=2, save_strategy="steps", save_steps=2, optim="adamw_torch",
            learning_rate=1e-3, output_dir=str(tmp_path / folder), **settings,
        )  # fmt: skip

    whole = make("whole")
    whole.train()
    resumed = make("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    expected = dict(whole.model.named_parameters())
    for parameter_name, parameter in resumed.model.named_parameters():
        assert torch.equal(parameter, expected[parameter_name]), parameter_name
    for a, b in zip(whole.state.log_history, resumed.state.log_history):
        for key in {*a} - {"train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss"}:
            assert a[key] == b[key], key


# ---------------------------------------------------------------------- what is measured


def test_measurements_are_handed_over(build, tiny_tokenizer):
    eos = tiny_tokenizer.eos_token_id
    rows = [
        {"prompt_ids": [5, 6], "chosen_ids": [7, 8, 9, eos], "rejected_ids": [10, eos]},
        {"prompt_ids": [5, 6], "chosen_ids": [7, 8, eos], "rejected_ids": [7, 8, eos]},
        {"prompt_ids": [5], "chosen_ids": [11, 12], "rejected_ids": [7, 7, 7, 7, 7, eos]},
    ]
    trainer = moved(build(rows, max_length=6, ref_model=None))
    facts = trainer.recorder.facts
    assert facts["data/rows"] == 3 and facts["data/longest"] == 7
    assert facts["data/truncated_share"] == pytest.approx(1 / 6)
    assert facts["data/identical_pairs_share"] == pytest.approx(1 / 3)
    assert facts["data/ends_with_eos_share"] == pytest.approx(4 / 5)  # of the whole ones
    assert facts["data/no_supervised_share"] == facts["data/boundary_mismatch_share"] == 0

    chosen, rejected, lengths, *_ = log_ratios_cut(trainer, 6)
    trainer.train()
    signals = trainer.recorder.take().signals
    assert (signals["samples/truncated"], signals["samples/truncated#n"]) == (pytest.approx(1 / 6), 6)
    assert signals["samples/supervised_eos"] == pytest.approx(4 / 6)
    assert signals["samples/no_supervised"] == 0
    assert signals["tokens/supervised_share"] == pytest.approx(19 / (19 + 2 * 5))
    assert signals["pairs/identical"] == pytest.approx(1 / 3)
    assert signals["lengths/chosen"] == pytest.approx(3) and signals["lengths/rejected"] == pytest.approx(10 / 3)
    assert signals["shift/chosen"] == pytest.approx(chosen.sum().item() / 9, abs=1e-5)
    assert signals["shift/rejected"] == pytest.approx(rejected.sum().item() / 10, abs=1e-5)
    gap = (torch.cat([chosen, rejected]) / torch.cat(lengths)).abs().max().item()
    assert signals["reference/initial_gap"] == pytest.approx(gap, rel=1e-3)
    assert "rewards/length_correlation" not in signals  # of three pairs it says nothing
    trainer.train()
    assert "reference/initial_gap" not in trainer.recorder.take().signals  # the second run's policy has been trained


def test_a_run_is_watched(build, tmp_path):
    trainer = build(output_dir=str(tmp_path), diagnose=True, max_steps=2, eval_strategy="steps", eval_steps=1,
                    eval_dataset=Dataset.from_list(ROWS[:2]))  # fmt: skip
    trainer.train()
    run = json.loads((tmp_path / "outspoken" / "run.json").read_text())
    steps = [
        json.loads(line)["signals"] for line in (tmp_path / "outspoken" / "metrics.jsonl").read_text().splitlines()
    ]
    assert run["method"] == "dpo" and run["status"] == "finished" and run["facts"]["data/rows"] == 4
    assert {"beta", "loss_weights", "ld_alpha"} <= run["live"].keys() and run["config"]["share_prompts"] is True
    steps = [signals for signals in steps if "loss" in signals]  # evaluations are lines of their own
    assert len(steps) == 2 and {
        "loss", "rewards/margins", "lengths/chosen", "shift/rejected", "reference/initial_gap", "tokens/supervised_share",
    } <= steps[0].keys()  # fmt: skip
    assert "reference/initial_gap" not in steps[1]


def test_settings_come_from_the_command_line(tmp_path):
    from transformers import HfArgumentParser

    words = f"--output_dir {tmp_path} --use_cpu --loss_type sigmoid sft --loss_weights 1 0.5 --beta 0.2 --ld_alpha 0.5"
    (args,) = HfArgumentParser(DPOConfig).parse_args_into_dataclasses(words.split())
    assert (args.loss_type, args.loss_weights, args.beta, args.ld_alpha) == (["sigmoid", "sft"], [1.0, 0.5], 0.2, 0.5)


def log_ratios_cut(trainer, max_length):
    """`log_ratios` of rows cut to `max_length`."""
    whole = trainer.train_dataset
    cut = whole.map(
        lambda row: {k: row[k][: max_length - len(row["prompt_ids"])] for k in ("chosen_ids", "rejected_ids")}
    )
    trainer.train_dataset = cut
    found = log_ratios(trainer)
    trainer.train_dataset = whole
    return found


def test_the_gap_to_the_reference_is_measured_before_the_first_update_only(build):
    trainer = build(max_steps=2, num_train_epochs=1)
    gaps = []
    take = trainer.compute_loss

    def note(*args, **kwargs):
        loss = take(*args, **kwargs)
        gaps.append(trainer.recorder.take().signals.get("reference/initial_gap"))
        return loss

    trainer.compute_loss = note
    trainer.train()
    assert gaps[0] < 1e-5 and gaps[1] is None


def test_correlation_of_margin_and_length(build):
    rows = [
        {"prompt_ids": [5, 6], "chosen_ids": [7] * (1 + i), "rejected_ids": [8] * (1 + (3 * i) % 5)} for i in range(9)
    ]
    trainer = moved(build(rows, per_device_train_batch_size=9))
    chosen, rejected, lengths, *_ = log_ratios(trainer)
    trainer.train()
    signals = trainer.recorder.take().signals
    pairs = torch.stack([chosen - rejected, (lengths[0] - lengths[1]).float()])
    assert signals["rewards/length_correlation"] == pytest.approx(torch.corrcoef(pairs)[0, 1].item(), abs=1e-3)
    assert signals["rewards/length_correlation#n"] == 9


# ---------------------------------------------------------------------- data


def test_rows_that_the_prompt_fills_are_dropped(build, caplog):
    rows = [
        {"prompt_ids": [5] * 4, "chosen_ids": [6], "rejected_ids": [7]},
        {"prompt_ids": [5] * 3, "chosen_ids": [6, 6], "rejected_ids": [7]},
        {"prompt_ids": [5] * 9, "chosen_ids": [6], "rejected_ids": [7]},
    ]
    trainer = build(rows, max_length=4)
    assert len(trainer.train_dataset) == 1
    assert "2 of 3 rows of the train dataset are dropped (first: row 0)" in caplog.text
    assert trainer.recorder.facts["data/no_supervised_share"] == pytest.approx(2 / 3)
    assert [len(r["prompt_ids"]) for r in build(rows[:2] + rows, max_length=None).train_dataset] == [4, 3, 4, 3, 9]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert len(build(rows, max_length=4, truncation_mode="keep_end").train_dataset) == 3
    stream = build(Dataset.from_list(rows).to_iterable_dataset(), max_length=4)
    assert len([*stream.train_dataset]) == 1
    with pytest.raises(ValueError, match="Every prompt of the train dataset has at least `max_length=2` tokens"):
        build(rows, max_length=2)


def test_a_text_prompt_beside_conversations_that_repeat_it(build):
    """As in UltraFeedback."""
    asked = {"role": "user", "content": "What color is the sky?"}

    def row(**prompt):
        answers = {"chosen": "Blue.", "rejected": "Green."}
        return {
            **prompt,
            **{key: [asked, {"role": "assistant", "content": text}] for key, text in answers.items()},
        }

    with_text, without = build([row(prompt="What color is the sky?")] * 2), build([row()] * 2)
    for column in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert with_text.train_dataset[0][column] == without.train_dataset[0][column]
    rows = [{"prompt": "Hi", "chosen": [{"role": "assistant", "content": "a"}], "rejected": [asked]}]
    with pytest.raises(
        ValueError, match=r"Row 0 of the train dataset has no prompt of its own, .* do not begin alike"
    ):
        build(rows)


def test_batches_of_similar_length(build):
    trainer = build(train_sampling_strategy="group_by_length", max_length=30, per_device_train_batch_size=1)
    assert trainer.train_dataset["length"][:] == [
        min(30, len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])))
        for row in trainer.train_dataset
    ]
    trainer.train()


def test_a_collator_of_ones_own(build):
    """With TRL's keys, and bool masks."""

    def collate(rows):
        made = DataCollatorForPreference(0)(rows)
        return {key: made[key].bool() if "mask" in key else made[key] for key in ("input_ids", "attention_mask", "completion_mask")}  # fmt: skip

    own, given = build(max_steps=2), build(max_steps=2, data_collator=collate)
    for trainer in (own, given):
        trainer.train()
    assert own.recorder.take().signals["samples/truncated"] == 0
    assert "samples/truncated" not in given.recorder.take().signals  # nobody knows what was cut
    for a, b in zip(own.model.parameters(), given.model.parameters()):
        torch.testing.assert_close(a, b)


WRONG_DATA = {
    "unpaired": (
        [{"prompt": "a", "completion": " b", "label": True}],
        "columns 'completion' and 'label', so its answers are not paired.*KTOTrainer",
    ),
    "no rejected": ([{"prompt": "a", "chosen": " b"}], "no 'rejected'; DPOTrainer needs 'prompt', 'chosen'"),
    "empty answer": (
        [*ROWS, {"prompt": "a", "chosen": " b", "rejected": "  "}],
        "Row 4 of the train dataset, column 'rejected': the text is empty",
    ),
    "number": ([{"prompt": "a", "chosen": 1, "rejected": 2}], "column 'chosen': expected text"),
    "mixed": (
        [{"prompt": "a", "chosen": [{"role": "assistant", "content": "b"}], "rejected": "c"}],
        "holds conversations in column 'chosen', but not in 'rejected'",
    ),
    "same answers": (
        [{"prompt": "a", "chosen": " b", "rejected": " b"}] * 2,
        "In every row of the train dataset, 'chosen' and 'rejected' have the same tokens",
    ),
    "no common beginning": ([{"chosen": "Yes", "rejected": "No"}], "do not begin alike; add a column 'prompt'"),
    "no prompt tokens": ([{"chosen_ids": [5], "rejected_ids": [6]}], "but no 'prompt_ids'"),
    "no tokens": (
        [{"prompt_ids": [5], "chosen_ids": [6], "rejected_ids": []}],
        "Row 0 of the train dataset, column 'rejected_ids': the answer has no tokens",
    ),
    "text as tokens": (
        [{"prompt_ids": "five", "chosen_ids": [6], "rejected_ids": [5]}],
        "column 'prompt_ids': expected a list of token ids",
    ),
    "images": ([{**ROWS[0], "images": [1]}], "The train dataset has a column of images, but TokenizersBackend is a"),
    "tools": (
        [{key: [{"role": "user", "content": text}] for key, text in ROWS[0].items()} | {"tools": "{"}],
        "Row 0 of the train dataset, column 'tools': not valid JSON",
    ),
}


@pytest.mark.parametrize("name", WRONG_DATA)
def test_wrong_data_is_told_before_the_model_is_loaded(build, name, tiny_model_dir, monkeypatch):
    rows, message = WRONG_DATA[name]
    monkeypatch.setattr("outspoken.trainers.dpo.prepare_model", lambda *a, **k: pytest.fail("the model was loaded"))
    with pytest.raises(ValueError, match=message) as error:
        build(rows, model=tiny_model_dir)
    assert str(error.value).count("\n") == 0


def test_some_identical_pairs_are_told(build, caplog):
    build([*ROWS, {"prompt": "a", "chosen": " b", "rejected": " b"}])
    assert "In 1 of 5 rows of the train dataset (first: row 4) 'chosen' and 'rejected' have the same" in caplog.text


WRONG_SETTINGS = {
    "`loss_type` is 'kto_pair'; use one or more of 'sigmoid'": {"loss_type": ["sigmoid", "kto_pair"]},
    "`loss_type` is empty": {"loss_type": []},
    "`loss_weights` has 1 numbers for 2 losses": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]},
    "`beta` is 0": {"beta": 0},
    "`label_smoothing` is 0.5; choose at least 0 and less than 0.5": {"label_smoothing": 0.5},
    "`loss_type='exo_pair'` needs `label_smoothing` above 0": {"loss_type": "exo_pair"},
    "`ld_alpha` is 1.5": {"ld_alpha": 1.5},
    "`f_divergence_type` is 'kl'": {"f_divergence_type": "kl"},
    "`f_divergence_type='forward_kl'` does not work with `loss_type='apo_zero'`": {
        "f_divergence_type": "forward_kl", "loss_type": "apo_zero",
    },
    "`use_weighting=True` weighs pairs, which 'aot'": {"use_weighting": True, "loss_type": "aot"},
    "`length_alpha=0.1` has no effect with `loss_type=\\['ipo'\\]`": {"length_alpha": 0.1, "loss_type": "ipo"},
    "`dpop_lambda=5` has no effect": {"dpop_lambda": 5, "loss_type": ["sft"]},
    "`bco_shift=True` has no effect": {"bco_shift": True},
    "`padding_free=True` is not supported": {"padding_free": True},
    "`truncation_mode` is 'middle'": {"truncation_mode": "middle"},
    "`pad_to_multiple_of` is 'many'": {"pad_to_multiple_of": "many"},
    "`sync_ref_model=True` moves the reference model": {"sync_ref_model": True, "precompute_ref_log_probs": True},
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG_SETTINGS)
def test_wrong_settings_are_told(message, tmp_path):
    with pytest.raises(ValueError, match=message):
        DPOConfig(str(tmp_path), use_cpu=True, **WRONG_SETTINGS[message])


def test_smoothing_without_effect_is_told(tmp_path, caplog):
    DPOConfig(str(tmp_path), use_cpu=True, loss_type="hinge", label_smoothing=0.1)
    assert "`label_smoothing=0.1` has no effect with `loss_type=['hinge']`" in caplog.text


# ---------------------------------------------------------------------- memory


def test_offloaded_activations_give_the_same_gradients(build, monkeypatch):
    import outspoken.trainers.dpo as module

    offload = module.offload_activations
    monkeypatch.setattr(module, "offload_activations", lambda model: offload(model, cpu_too=True, min_bytes=0))
    plain, offloaded = build(max_steps=2), build(max_steps=2, activation_offloading=True)
    for trainer in (plain, offloaded):
        trainer.train()
    for a, b in zip(plain.model.parameters(), offloaded.model.parameters()):
        assert torch.equal(a, b)


def test_no_full_logits_are_built(build, tiny_tokenizer):
    trainer = build()
    shapes = []
    head = trainer.model.get_output_embeddings()
    handle = head.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape)))
    step(trainer)
    handle.remove()
    assert shapes and all(shape[1] == 1 for shape in shapes if len(shape) == 3)


# ---------------------------------------------------------------------- requests from outside


@pytest.mark.parametrize(
    ("settings", "fields", "reason"),
    [
        (
            {"loss_type": "exo_pair", "label_smoothing": 0.1},
            {"label_smoothing": 0},
            "makes the loss 'exo_pair' infinite",
        ),
        ({"loss_type": ["sigmoid", "sft"]}, {"loss_weights": [1.0]}, "a number for each of the 2 losses"),
        ({"precompute_ref_log_probs": True}, {"ld_alpha": 0.5}, "which were computed before training"),
        ({}, {"ld_alpha": 0.5, "label_smoothing": 0, "loss_weights": [2.0], "beta": 0.2}, None),
    ],
    ids=["exo", "weights", "precomputed", "fine"],
)
def test_changes_that_cannot_take_effect_are_refused(tmp_path, settings, fields, reason):
    from outspoken.diagnostics.live import config_of, refusal

    found = refusal(None, config_of(DPOConfig(str(tmp_path), use_cpu=True, **settings)), fields)
    assert found is None if reason is None else reason in found
