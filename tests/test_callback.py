"""What the diagnostics callback measures, against the trainers' own logs and arithmetic, on ours and unmodified ones."""

import json
import math
import warnings

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from outspoken import DiagnosticsCallback, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer, schemas
from outspoken.agent_api.run import Run
from outspoken.diagnostics.callback import method_of
from outspoken.diagnostics.recorder import PHASES

KINDS = ("sft", "grpo", "trl-sft", "trl-grpo", "trl-dpo", "plain")
RL = ("grpo", "trl-grpo")
GROUP, ROWS = 4, 8
SENTENCES = ["The sky is blue and", "What is 2 + 2? It", "green grass", "the quick brown fox jumps", "It is", "dog"]


def reward(completion_ids, **_):
    """Values from -1 to 1, None (not scorable) for some."""
    return [None if sum(ids) % 7 == 0 else (sum(ids) % 9 - 4) / 4 for ids in completion_ids]


def shortness(completion_ids, log_metric=None, **_):
    log_metric("shortest", min(map(len, completion_ids)))
    return [-float(len(ids)) / 8 for ids in completion_ids]


@pytest.fixture
def make(tmp_path, tiny_model_factory, tiny_tokenizer_factory, tiny_model_dir):
    """`make(kind, *callbacks, **settings)`: a trainer on the tiny model, watched by default, ready to train."""
    made = []

    def build(kind, *callbacks, folder=None, watched=True, reward_funcs=None, model=None, **settings):
        made.append(kind)
        common = {
            "output_dir": str(tmp_path / (folder or f"{kind}-{len(made)}")),
            "max_steps": 6,
            "per_device_train_batch_size": ROWS,
            "per_device_eval_batch_size": ROWS,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 2,
            "logging_steps": 3,
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": True,
            "bf16": False,
            "disable_tqdm": True,
            "gradient_checkpointing": False,
            **settings,
        }
        tokenizer = tiny_tokenizer_factory()
        model = tiny_model_factory() if model is None else model
        texts = Dataset.from_dict({"text": [s + t for s in SENTENCES for t in SENTENCES]})
        prompts = Dataset.from_dict({"prompt": [s + t[:5] for s in SENTENCES for t in SENTENCES]})
        callbacks = list(callbacks)
        if kind in RL:
            common |= {"num_generations": GROUP, "max_completion_length": 8}
            common.setdefault("temperature", 1.0)
        if watched and kind not in ("sft", "grpo"):
            callbacks.append(DiagnosticsCallback())
        if kind in ("sft", "grpo"):
            common["diagnose"] = watched
        data = {"train_dataset": prompts if kind in RL else texts, "processing_class": tokenizer}
        if common.get("eval_strategy", "no") != "no":
            data["eval_dataset"] = data["train_dataset"].select(range(ROWS))
        funcs = reward_funcs or [reward, shortness]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if kind == "sft":
                return SFTTrainer(model, args=SFTConfig(**common), callbacks=callbacks, **data)
            if kind == "grpo":
                return GRPOTrainer(model, funcs, args=GRPOConfig(**common), callbacks=callbacks, **data)
            if kind == "plain":
                common.pop("gradient_checkpointing")
                return Trainer(
                    model, args=TrainingArguments(**common), callbacks=callbacks, **_tokenized(data, tokenizer)
                )
            import trl

            if kind == "trl-sft":
                return trl.SFTTrainer(model, args=trl.SFTConfig(**common), callbacks=callbacks, **data)
            if kind == "trl-grpo":
                return trl.GRPOTrainer(model, funcs, args=trl.GRPOConfig(**common), callbacks=callbacks, **data)
            pairs = {"prompt": SENTENCES * 6, "chosen": [" yes it is"] * 36, "rejected": [" no", " never ever"] * 18}
            data["train_dataset"] = Dataset.from_dict(pairs)
            if "eval_dataset" in data:
                data["eval_dataset"] = data["train_dataset"].select(range(ROWS))
            return trl.DPOTrainer(
                model, tiny_model_factory(seed=1), args=trl.DPOConfig(**common), callbacks=callbacks, **data
            )

    return build


def _tokenized(data, tokenizer):
    def rows(batch):
        found = tokenizer(batch["text"], padding="max_length", truncation=True, max_length=24)
        labels = [
            [i if m else -100 for i, m in zip(ids, mask)]
            for ids, mask in zip(found["input_ids"], found["attention_mask"])
        ]
        return {**found, "labels": labels}

    datasets = {
        k: v.map(rows, batched=True, remove_columns=["text"]) for k, v in data.items() if k.endswith("dataset")
    }
    return {**datasets, "processing_class": tokenizer}


def lines(trainer, name="metrics.jsonl"):
    path = f"{trainer.args.output_dir}/outspoken/{name}"
    return [json.loads(line) for line in open(path, encoding="utf-8")]


def of_steps(trainer):
    """The observations of optimizer steps, by step: those that timed one."""
    found = [line for line in lines(trainer) if "time/step" in line["signals"]]
    assert len({line["step"] for line in found}) == len(found), "a step was observed twice"
    return {line["step"]: line["signals"] for line in found}


def run_record(trainer):
    with open(f"{trainer.args.output_dir}/outspoken/run.json", encoding="utf-8") as file:
        return json.load(file)


# ------------------------------------------------------------------------------------------ what is measured


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_run(make, kind):
    """One run each, with evaluations and checkpoints between the logs."""
    trainer = make(kind, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()

    folder = f"{trainer.args.output_dir}/outspoken"
    record = run_record(trainer)
    schemas.validate(record)
    assert (record["status"], record["step"], record["total_steps"]) == ("finished", 6, 6)
    assert record["method"] == {"plain": "sft"}.get(kind, kind.removeprefix("trl-"))
    for line in lines(trainer):
        schemas.validate(line)
        assert not line["unreadable"]

    steps = of_steps(trainer)
    assert list(steps) == [1, 2, 3, 4, 5, 6]
    epochs = [line["epoch"] for line in lines(trainer) if "time/step" in line["signals"]]
    assert epochs[-1] == trainer.state.epoch and epochs == sorted(epochs)

    # Each window of three steps averages to what the trainer logged; learning rate and gradient norm are the last's.
    logs = {log["step"]: log for log in trainer.state.log_history if "loss" in log}
    compared = set()
    for last in (3, 6):
        window = [steps[s] for s in range(last - 2, last + 1)]
        for name, logged in logs[last].items():
            if name in ("step", "epoch"):
                continue
            values = [w[name] for w in window if w.get(name) is not None]
            if name in ("learning_rate", "grad_norm", "num_tokens"):
                values = values[-1:]
            if logged is None:
                assert not values, name
                continue
            assert np.mean(values) == pytest.approx(logged, rel=1e-5, abs=1e-7), (name, last)
            compared.add(name)
    assert {"loss", "learning_rate", "grad_norm"} <= compared
    assert len(compared) > {"grpo": 20, "trl-grpo": 20, "trl-dpo": 9}.get(kind, 2), compared
    if kind in RL:
        assert {"reward", "shortest", "rewards/shortness/mean", "entropy"} <= compared

    # Evaluation: at its step, the values that the trainer logged.
    for log in trainer.state.log_history:
        if "eval_loss" in log:
            found = [line["signals"] for line in lines(trainer) if line["step"] == log["step"]]
            seen = next(s for s in found if "eval_loss" in s)
            assert seen["eval_loss"] == pytest.approx(log["eval_loss"])
            if kind in RL:
                assert seen["eval_reward"] == pytest.approx(log["eval_reward"])

    # Phases: there, and no longer than their step. Saving and evaluating after step 2 count in step 3.
    timed = {f"time/{phase}" for phase in PHASES}
    for step, signals in steps.items():
        assert {"time/data", "time/forward_backward", "time/optimizer", "time/diagnostics"} <= signals.keys()
        assert ({"time/save", "time/eval"} <= signals.keys()) == (step in (3, 5)), step
        assert ({"time/generate", "time/score"} <= signals.keys()) == (kind in RL)
        total = sum(v for k, v in signals.items() if k in timed)
        assert 0 < total <= signals["time/step"], step
        assert all(v > 0 for k, v in signals.items() if k in timed)
    after_the_last = {k: v for line in lines(trainer) if line["step"] == 6 for k, v in line["signals"].items()}
    assert {"time/save", "time/eval"} <= after_the_last.keys()

    frame = Run(folder).metrics("loss")
    assert list(frame.index) == [1, 2, 3, 4, 5, 6] and frame["loss"].notna().all()


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_changes_the_training(make, kind):
    """With and without the callback: the same weights, bit by bit, the same logs, the same attributes."""
    settings = {"eval_strategy": "steps", "eval_steps": 3, "logging_steps": 1, "max_steps": 4}
    watched, alone = make(kind, **settings), make(kind, watched=False, **settings)
    for trainer in (alone, watched):
        torch.manual_seed(0)
        trainer.train()
    for (name, a), (_, b) in zip(watched.model.named_parameters(), alone.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    for a, b in zip(watched.state.log_history, alone.state.log_history, strict=True):
        timed = [k for k in a if k.endswith(("_runtime", "_per_second", "step_time"))]
        assert {k: v for k, v in a.items() if k not in timed} == {k: v for k, v in b.items() if k not in timed}
    assert vars(watched).keys() - vars(alone).keys() == set(), "a wrapper was left on the trainer"


@pytest.mark.parametrize("kind", ("sft", "grpo", "trl-grpo", "plain"))
def test_gradient_accumulation_and_no_clipping(make, kind):
    """Two micro-batches a step, max_grad_norm=0: loss, metrics and gradient norm still are the trainer's own."""
    trainer = make(kind, gradient_accumulation_steps=2, max_grad_norm=0.0, logging_steps=1, max_steps=3)
    trainer.train()
    steps, logs = of_steps(trainer), [log for log in trainer.state.log_history if "loss" in log]
    for log in logs:
        found = steps[log["step"]]
        for name in ("loss", "grad_norm", "learning_rate", "reward", "entropy", "completions/mean_length"):
            if name in log:
                assert found[name] == pytest.approx(log[name], rel=1e-5, abs=1e-7), name
    if kind in RL:  # a generation batch of two micro-batches, ROWS completions each
        assert steps[1]["num_completions"] == 2 * ROWS and steps[1]["groups/count"] <= 2 * ROWS / GROUP


@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_loss_is_seen_before_the_filter(make, kind):
    """`logging_nan_inf_filter` hides one NaN loss from the log; NUM001 has seen it. The gradient stays finite."""
    trainer = make(kind, logging_steps=1)
    compute_loss, calls = trainer.compute_loss, []

    def planted(*args, **kwargs):
        calls.append(1)
        loss = compute_loss(*args, **kwargs)
        return loss + math.nan if len(calls) == 3 else loss

    trainer.compute_loss = planted
    trainer.train()
    assert all(math.isfinite(log["loss"]) for log in trainer.state.log_history if "loss" in log)
    third = next(line for line in lines(trainer) if line["step"] == 3)
    assert third["nonfinite"] == {"loss": "nan"} and third["signals"]["loss"] is None
    assert [line["nonfinite"] for line in lines(trainer) if line["step"] != 3] == [{}] * 5
    fired = [d for d in lines(trainer, "diagnostics.jsonl") if d["code"] == "NUM001" and d["state"] == "firing"]
    assert fired and fired[0]["step"] == 3 and fired[0]["onset_step"] == 3
    for record in lines(trainer, "diagnostics.jsonl"):
        schemas.validate(record)


@pytest.mark.parametrize("kind", ("sft", "plain"))
def test_a_nan_gradient_names_the_tensors(make, kind):
    """The gradients of the step whose loss is NaN are looked at before clipping spreads the NaN to all of them."""
    trainer = make(kind, logging_steps=1, max_steps=25)
    parameter = trainer.model.get_parameter("model.layers.1.mlp.up_proj.weight")
    compute_loss = trainer.compute_loss

    def planted(*args, **kwargs):
        loss = compute_loss(*args, **kwargs)
        return loss + math.nan * parameter.sum() if trainer.state.global_step == 6 else loss

    trainer.compute_loss = planted
    trainer.train()
    seventh = of_steps(trainer)[7]
    assert seventh["grad/nonfinite"] == parameter.numel()
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, DiagnosticsCallback))
    assert callback.engine.view.facts["grad/nonfinite_names"][0].endswith("up_proj.weight")
    assert seventh["parameters/nonfinite"] > 0  # the step was taken all the same


@pytest.mark.parametrize("kind", RL)
def test_the_reward_matrix(make, kind):
    """groups/* and rewards/* of each step, by arithmetic on what the reward functions returned."""
    seen = []

    def watched(completion_ids, **_):
        values = reward(completion_ids)
        seen.append([(a, -len(ids) / 8) for a, ids in zip(values, completion_ids)])
        return values

    trainer = make(kind, reward_funcs=[watched, shortness], reward_weights=[2.0, 0.5], max_steps=5)
    trainer.train()
    smallest, largest = math.inf, -math.inf
    assert len(seen) == 5
    for step, rows in enumerate(seen, 1):
        found = of_steps(trainer)[step]
        totals = [2.0 * (a or 0.0) + 0.5 * b for a, b in rows]
        smallest, largest = min(smallest, *totals), max(largest, *totals)
        width = largest - smallest
        groups = [totals[i : i + GROUP] for i in range(0, ROWS, GROUP)]
        stds = []
        for group in groups:
            mean = sum(group) / GROUP
            stds.append(math.sqrt(sum((x - mean) ** 2 for x in group) / (GROUP - 1)))
        expected = {
            "num_completions": ROWS,
            "groups/count": 2,
            "groups/zero_std": sum(s < 1e-6 for s in stds) / 2,
            "groups/std_mean": sum(stds) / 2,
            "groups/attenuation": sum(s / (s + 1e-4) for s in stds) / 2,
            "groups/all_failed": sum(max(g) <= smallest + 0.01 * width for g in groups) / 2,
            "groups/all_passed": sum(min(g) >= largest - 0.01 * width for g in groups) / 2,
            "rewards/range": width,
            "rewards/unscored": 0.0,  # shortness scores all
            "rewards/watched/none_share": sum(a is None for a, _ in rows) / ROWS,
            "rewards/shortness/none_share": 0.0,
        }
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-6), (name, step)
    assert any(s["rewards/watched/none_share"] > 0 for s in of_steps(trainer).values())


@pytest.mark.parametrize("kind", ("grpo", "trl-grpo"))
def test_training_again(make, kind):
    """A second call of train() is another run; what the first one wrote is set aside."""
    trainer = make(kind, max_steps=2)
    trainer.train()
    first = run_record(trainer)
    trainer.train()
    second = run_record(trainer)
    assert second["id"] != first["id"] and second["status"] == "finished" and second["step"] == 2
    assert list(of_steps(trainer)) == [1, 2]
    earlier = f"{trainer.args.output_dir}/outspoken/earlier/{first['id']}"
    with open(f"{earlier}/run.json", encoding="utf-8") as file:
        assert json.load(file)["id"] == first["id"]


def test_a_batch_size_that_was_too_large(make):
    """auto_find_batch_size begins again after an out-of-memory error: the run that failed is set aside."""
    trainer = make("plain", auto_find_batch_size=True, max_steps=3)
    compute_loss = trainer.compute_loss

    def full(model, inputs, *args, **kwargs):
        if len(inputs["input_ids"]) == ROWS and trainer.state.global_step == 1:
            raise RuntimeError("CUDA out of memory.")
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = full
    trainer.train()
    record = run_record(trainer)
    assert record["status"] == "finished" and list(of_steps(trainer)) == [1, 2, 3]
    (earlier,) = (Run(trainer.args.output_dir).path / "earlier").iterdir()
    failed = json.loads((earlier / "run.json").read_text())
    assert failed["status"] == "failed" and failed["id"] != record["id"] and failed["step"] == 1
    assert not {"training_step", "_run_epoch", "evaluate"} & vars(trainer).keys()


@pytest.mark.parametrize("kind", ("sft", "grpo"))
def test_evaluation_first_and_the_best_model_last(make, kind):
    """eval_on_start evaluates before step 1; load_best_model_at_end loads a checkpoint before the run is closed."""
    own = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    trainer = make(kind, eval_on_start=True, load_best_model_at_end=True, logging_steps=1, **own)
    trainer.train()
    first, *_ = lines(trainer)
    assert first["step"] == 0 and first["signals"]["eval_loss"] is not None
    steps = of_steps(trainer)
    assert list(steps) == [1, 2, 3, 4] and "time/eval" in steps[1] and run_record(trainer)["status"] == "finished"
    logs = {log["step"]: log["entropy"] for log in trainer.state.log_history if "entropy" in log}
    assert {step: s["entropy"] for step, s in steps.items()} == pytest.approx(logs)


def test_rows_without_a_label(make):
    """Of a plain trainer's rows some have no label that counts."""
    trainer = make("plain", max_steps=3)
    rows = trainer.train_dataset

    def blank(row, index):
        return {"labels": [-100] * len(row["labels"]) if index % 4 == 0 else row["labels"]}

    trainer.train_dataset = rows.map(blank, with_indices=True)
    trainer.train()
    steps = of_steps(trainer).values()
    assert all(s["samples/no_supervised#n"] == ROWS for s in steps)
    blanks = sum(s["samples/no_supervised"] * ROWS for s in steps)
    assert 0 < blanks <= 9  # of 36 rows 9 are blank; 24 were seen


def test_the_clipped_gradient(make):
    trainer = make("plain", max_grad_norm=0.25, max_steps=2)
    trainer.train()
    for signals in of_steps(trainer).values():
        assert signals["grad_norm"] > 0.25 and signals["grad_norm_clipped"] == pytest.approx(0.25, rel=1e-3)


def test_method_of():
    class GRPOTrainer:
        pass

    class MyRewardShapingTrainer(GRPOTrainer):
        pass

    class OnlineDPOTrainer:
        pass

    class CustomKTO:
        pass

    found = [method_of(c()) for c in (GRPOTrainer, MyRewardShapingTrainer, OnlineDPOTrainer, CustomKTO, dict)]
    assert found == ["grpo", "grpo", "online_dpo", "kto", "sft"]
