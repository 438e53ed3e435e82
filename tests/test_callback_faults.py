"""Whatever fails in the diagnostics, training goes on and ends with the same weights, and one clear line tells."""

import dataclasses
import errno
import json
import os
import shutil
import warnings

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from outspoken import DiagnosticsCallback, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer, schemas
from outspoken.diagnostics import engine as engines
from outspoken.diagnostics import rundir
from outspoken.diagnostics.journal import guarded

SENTENCES = ["The sky is blue and", "What is 2 + 2? It", "green grass", "the quick brown fox jumps", "It is", "dog"]
TEXTS = [s + t for s in SENTENCES for t in SENTENCES]


def settings(folder, **own):
    common = {
        "output_dir": str(folder),
        "max_steps": 8,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "learning_rate": 1e-3,
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }
    return common | own


@pytest.fixture
def sft(tmp_path, tiny_model_factory, tiny_tokenizer):
    """`sft(callback or None, *callbacks, **settings)` trains the tiny model and returns the trainer."""
    runs = []

    def train(watcher, *others, compute_metrics=None, prepare=lambda trainer: None, **own):
        runs.append(1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = SFTTrainer(
                tiny_model_factory(),
                args=SFTConfig(**settings(tmp_path / f"run-{len(runs)}", diagnose=False, **own)),
                train_dataset=Dataset.from_dict({"text": TEXTS}),
                eval_dataset=Dataset.from_dict({"text": TEXTS[:8]}) if compute_metrics else None,
                processing_class=tiny_tokenizer,
                compute_metrics=compute_metrics,
                callbacks=[*others, *([watcher] if watcher else [])],
            )
        prepare(trainer)
        trainer.train()
        return trainer

    return train


@pytest.fixture
def alone(sft):
    """Weights after the same training without diagnostics."""
    return [p.detach().clone() for p in sft(None).model.parameters()]


def same(trainer, weights):
    return all(torch.equal(a, b) for a, b in zip(trainer.model.parameters(), weights, strict=True))


def lines(trainer, name="metrics.jsonl"):
    with open(f"{trainer.args.output_dir}/outspoken/{name}", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def at(step, act):
    class At(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == step:
                act(args)

    return At()


def notes(capsys):
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("[outspoken] note:")]


def test_a_rule_that_raises(sft, alone, monkeypatch, capsys):
    known = dict(engines.all_rules())
    code = "NUM001"

    def broken(run, p):
        raise ZeroDivisionError("a planted mistake")

    known[code] = dataclasses.replace(known[code], check=broken)
    monkeypatch.setattr(engines, "all_rules", lambda: known)
    trainer = sft(DiagnosticsCallback())
    assert same(trainer, alone)
    assert [line["step"] for line in lines(trainer)] == list(range(1, 9))
    told = notes(capsys)
    assert len(told) == 1 and code in told[0] and "ZeroDivisionError: a planted mistake" in told[0]


class Broken:
    """A sink whose every method raises, and that has a good neighbour."""

    def __getattr__(self, name):
        def fail(*args):
            raise RuntimeError(f"{name} is broken")

        return fail


class Keeps:
    def __init__(self):
        self.steps, self.closed = [], 0

    def observation(self, step, signals):
        self.steps.append(step)

    def close(self):
        self.closed += 1

    def transition(self, transition):
        pass

    change = verdict = note = transition


def test_a_sink_that_raises(sft, alone, capsys):
    good = Keeps()
    trainer = sft(DiagnosticsCallback(sinks=[Broken(), good]))
    assert same(trainer, alone)
    assert good.steps == [line["step"] for line in lines(trainer)] == list(range(1, 9)) and good.closed == 1
    told = notes(capsys)
    assert len(told) == 1 and "Broken failed" in told[0]


def test_the_run_directory_is_a_file(sft, alone, tmp_path, capsys):
    place = tmp_path / "taken"
    place.write_text("mine")
    trainer = sft(DiagnosticsCallback(run_dir=place))
    assert same(trainer, alone) and place.read_text() == "mine"
    told = notes(capsys)
    assert len(told) == 1 and str(place) in told[0] and "Training goes on" in told[0]


def test_the_run_directory_vanishes(sft, alone, capsys):
    trainer = sft(DiagnosticsCallback(), at(3, lambda args: shutil.rmtree(f"{args.output_dir}/outspoken")))
    assert same(trainer, alone)
    steps = [line["step"] for line in lines(trainer)]
    assert steps[-1] == 8 and set(steps) <= set(range(3, 9))
    with open(f"{trainer.args.output_dir}/outspoken/run.json", encoding="utf-8") as file:
        record = json.load(file)
    schemas.validate(record)
    assert record["status"] == "finished"
    assert len(notes(capsys)) == 1


@pytest.mark.parametrize("failing", ("write", "open"))
def test_the_disk_is_full(sft, alone, monkeypatch, capsys, failing):
    real = getattr(os, failing)
    full = []

    def no_space(target, *args, **kwargs):
        name = str(target) if failing == "open" else os.readlink(f"/proc/self/fd/{target}")
        if full and "/outspoken/" in name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(target, *args, **kwargs)

    def prepare(args):
        full.append(1)
        if failing == "open":
            shutil.rmtree(f"{args.output_dir}/outspoken")  # what is open already stays writable

    monkeypatch.setattr(rundir.os, failing, no_space)
    trainer = sft(DiagnosticsCallback(), at(3, prepare))
    assert same(trainer, alone)
    told = notes(capsys)
    assert len([line for line in told if "No space left on device" in line]) == 1, told


def test_odd_metrics_of_an_evaluation(sft, capsys):
    """What `compute_metrics` returns is measured where it is a number, kept as text where it is not."""
    odd = {
        "nan": float("nan"),
        "huge": 10**400,
        "inf": 1e400,
        "text": "0.5 or so",
        "number": " 0.25 ",
        "list": [1, 2],
        "array": torch.ones(3).numpy(),
        "flag": True,
        "long": "x" * 10_000,
    }
    own = {"compute_metrics": lambda predictions: dict(odd), "eval_strategy": "steps", "eval_steps": 4}
    weights = [p.detach().clone() for p in sft(None, **own).model.parameters()]
    trainer = sft(DiagnosticsCallback(), **own)
    assert same(trainer, weights)
    found = next(line for line in lines(trainer) if "eval_loss" in line["signals"])
    schemas.validate(found)
    assert found["signals"]["eval_number"] == 0.25 and found["signals"]["eval_flag"] == 1.0
    assert found["nonfinite"] == {"eval_nan": "nan", "eval_huge": "inf", "eval_inf": "inf"}
    assert {"eval_text", "eval_list", "eval_array", "eval_long"} <= found["unreadable"].keys()
    assert max(map(len, found["unreadable"].values())) <= 500
    assert notes(capsys) == []


def test_odd_metrics_of_a_trainer(sft, alone, capsys):
    """Lists of metrics may hold anything."""

    odd = {"t": "text", "n": float("nan"), "h": 10**400, "l": [1], "o": None}

    def prepare(trainer):
        training_step, log = trainer.training_step, trainer.log

        def odd_step(*args, **kwargs):
            loss = training_step(*args, **kwargs)
            for name, value in odd.items():
                trainer._metrics["train"][name].append(value)
            return loss

        def careful_log(*args, **kwargs):
            for name in odd:
                trainer._metrics["train"].pop(name, None)
            return log(*args, **kwargs)

        trainer.training_step, trainer.log = odd_step, careful_log

    trainer = sft(DiagnosticsCallback(), prepare=prepare)
    assert same(trainer, alone)
    for line in lines(trainer):
        schemas.validate(line)
        assert line["unreadable"].keys() == {"t", "l"} and line["nonfinite"] == {"n": "nan", "h": "inf"}
        assert "o" not in line["signals"]
    assert notes(capsys) == []


@pytest.mark.parametrize(
    "value", (float("nan"), 1e400, 10**400, "text", [1.0], None, torch.tensor(2.0)), ids=lambda value: repr(value)[:12]
)
def test_odd_metrics_of_a_reward_function(tmp_path, tiny_model_factory, tiny_tokenizer, value):
    def rewarded(completion_ids, log_metric, **_):
        log_metric("odd", value)
        return [float(len(ids)) for ids in completion_ids]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = GRPOTrainer(
            tiny_model_factory(),
            rewarded,
            args=GRPOConfig(
                **settings(tmp_path, max_steps=2, num_generations=4, max_completion_length=4, logging_steps=1)
            ),
            train_dataset=Dataset.from_dict({"prompt": SENTENCES}),
            processing_class=tiny_tokenizer,
        )
    trainer.train()
    found = [line for line in lines(trainer) if "reward" in line["signals"]]
    assert [line["step"] for line in found] == [1, 2]
    for line in found:
        schemas.validate(line)


def test_a_hook_that_always_fails(sft, alone, monkeypatch, capsys):
    """After five failures the diagnostics are switched off, with one note for the failure and one for that."""
    calls = []

    def broken(self, state):
        calls.append(state.global_step)
        raise ValueError("cannot measure")

    monkeypatch.setattr(DiagnosticsCallback, "_measure", broken)
    callback = DiagnosticsCallback()
    trainer = sft(callback)
    assert same(trainer, alone) and calls == [1, 2, 3, 4, 5]
    told = notes(capsys)
    assert len(told) == 2 and "cannot measure" in told[0] and "switched off" in told[1]
    with open(f"{trainer.args.output_dir}/outspoken/run.json", encoding="utf-8") as file:
        assert json.load(file)["status"] == "finished"
    assert callback._recorder.take().signals == {}  # nothing piled up


@pytest.mark.parametrize("where", ("_start_run", "_instrument", "_look_at_labels", "_look_at_gradients", "_logged"))
def test_any_part_that_fails(sft, alone, monkeypatch, capsys, where):
    def broken(self, *args, **kwargs):
        raise KeyError(f"planted in {where}")

    inside = hasattr(getattr(DiagnosticsCallback, where), "__wrapped__")  # then plant it inside the guard
    monkeypatch.setattr(DiagnosticsCallback, where, guarded(broken) if inside else broken)
    trainer = sft(DiagnosticsCallback())
    assert same(trainer, alone)
    told = notes(capsys)
    assert 1 <= len(told) <= 2 and f"planted in {where}" in told[0], told


def test_wrong_settings_are_told_before_training(sft):
    with pytest.raises(ValueError, match="did you mean NUM001"):
        sft(DiagnosticsCallback(ignore=["NUM0001"]))
    with pytest.raises(ValueError, match="limits"):
        sft(DiagnosticsCallback(params={"NUM001": {"limits": 1}}))
