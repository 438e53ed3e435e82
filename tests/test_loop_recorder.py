"""`outspoken.Recorder`: what a plain loop hands over is judged at once and stands on disk, whatever happens to the run."""

import argparse
import dataclasses
import errno
import json
import math
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from outspoken import Recorder, schemas
from outspoken.agent_api.gate import gate
from outspoken.agent_api.run import RequestRefused, Run
from outspoken.cli.main import main
from outspoken.diagnostics import rundir
from outspoken.diagnostics.diagnose import diagnose
from outspoken.diagnostics.engine import Engine
from outspoken.diagnostics.sources import read
from outspoken.diagnostics.sources.names import Derived, Family
from outspoken.diagnostics.sources.translate import Translator, flat


class Told:
    """A sink that keeps what it is told."""

    def __init__(self):
        self.notes, self.codes, self.verdicts, self.closed = [], [], [], 0

    def transition(self, transition):
        self.codes.append((transition.record["code"], transition.record["state"], transition.record["step"]))

    def change(self, record): ...

    def verdict(self, record):
        self.verdicts.append(record["state"])

    def note(self, text):
        self.notes.append(text)

    def observation(self, step, signals): ...

    def close(self):
        self.closed += 1


@pytest.fixture
def told():
    return Told()


def lines(folder, name="metrics.jsonl"):
    with open(folder / "outspoken" / name, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def card(folder):
    return json.loads((folder / "outspoken" / "run.json").read_text(encoding="utf-8"))


def loss_at(step, rng):
    """A loss that falls as losses do: 2/sqrt(step) with noise."""
    return 2 / math.sqrt(step) + rng.gauss(0, 0.02)


# ------------------------------------------------------------------------------------------ a whole run


def test_a_healthy_run(tmp_path, told):
    rng = random.Random(0)
    config = {"learning_rate": 1e-3, "api_key": "sk-1", "api_base": "here"}
    with Recorder(tmp_path, method="sft", config=config, total_steps=120, sinks=[told]) as recorder:
        for step in range(1, 121):
            recorder.log({"train/loss": loss_at(step, rng), "lr": 1e-3, "mine": step}, step=step, epoch=step / 60)
    record = card(tmp_path)
    schemas.validate(record)
    assert (record["status"], record["step"], record["total_steps"], record["method"]) == ("finished", 120, 120, "sft")
    assert record["config"] == {"learning_rate": 1e-3, "api_key": "<masked>", "api_base": "here"}
    assert record["verdict"]["state"] == "improving" == told.verdicts[-1]
    assert record["id"] == recorder.run_id and recorder.verdict == record["verdict"]
    observed = lines(tmp_path)
    for line in observed:
        schemas.validate(line)
    assert [line["step"] for line in observed] == list(range(1, 121))
    again = random.Random(0)
    assert [line["signals"]["loss"] for line in observed] == [loss_at(step, again) for step in range(1, 121)]
    assert set(observed[0]["signals"]) == {"loss", "learning_rate", "mine"}
    assert observed[59]["epoch"] == 1.0
    assert told.notes == [
        "Read under our names: train/loss as loss, lr as learning_rate. "
        "Kept under their own names, no rule reads them: mine."
    ]
    assert told.closed == 1 and not [code for code, state, _ in told.codes if state == "firing"]
    assert gate(tmp_path).exit_code == 0


def test_a_run_that_breaks_is_told_while_it_trains_and_read_by_everything(tmp_path, told, capsys):
    """Gradient descent on (w^2 + |x|) with a rate above 1 grows without bound: each step multiplies w by 1 - 2*rate."""
    torch.manual_seed(0)
    weight = torch.ones(4, requires_grad=True)
    fired = []
    with Recorder(tmp_path, method="sft", config={"learning_rate": 40.0}, sinks=[told]) as recorder:
        for step in range(1, 60):
            loss = (weight**2).sum()
            loss.backward()
            with torch.no_grad():
                norm = weight.grad.norm()
                weight -= 40.0 * weight.grad
            weight.grad = None
            fired += [
                (t.record["code"], step)
                for t in recorder.log({"loss": loss, "grad_norm": norm}, step=step)
                if t.record["state"] == "firing"
            ]
    # w grows by 79 a step from 1: the float32 sum of squares, 4 * 79^2n, leaves its range (3.4e38) at n = 11.
    first = next(line for line in lines(tmp_path) if line["nonfinite"])
    assert first["step"] == 1 + math.ceil((math.log(3.4e38 / 4) / math.log(79)) / 2) and "loss" in first["nonfinite"]
    assert ("NUM001", first["step"]) in fired
    assert [(code, step) for code, state, step in told.codes if state == "firing"] == fired

    assert gate(tmp_path).exit_code == 1
    assert main(["gate", str(tmp_path)]) == 1
    assert main(["watch", "--once", str(tmp_path)]) == 1
    shown = capsys.readouterr().out
    assert f"ERROR NUM001 step {first['step']}" in shown and "RUN finished at step 59" in shown
    assert main(["diagnose", str(tmp_path)]) == 1
    assert "NUM001" in capsys.readouterr().out


SYSTEMS = {
    None: lambda step, bad: {"loss": 1.5, "reward": 0.4, "completions/clipped_ratio": 0.1, "entropy": 0.5},
    "verl": lambda step, bad: {
        "training/global_step": step,
        "actor/pg_loss": 0.01 * math.sin(step),
        "actor/grad_norm": 0.2 + 0.01 * math.cos(step),
        "actor/lr": 1e-6,
        "actor/entropy": 0.6,
        "critic/score/mean": 0.0 if bad else 0.5 + 0.05 * math.sin(3 * step),
        "critic/score/max": 0.0 if bad else 1.0,
        "critic/score/min": 0.0,
        "critic/advantages/max": 0.0 if bad else 1.0,
        "critic/advantages/min": 0.0 if bad else -1.0,
        "response_length/mean": 200.0,
        "response_length/clip_ratio": 0.9 if bad else 0.1,
    },
    "openrlhf": lambda step, bad: {
        "train/policy_loss": 0.01 * math.sin(step),
        "train/actor_grad_norm": math.nan if bad else 0.2,
        "train/actor_lr": 1e-6,
        "train/rollout/reward_mean": 0.5,
        "train/rollout/truncated_rate": 0.9 if bad else 0.1,
    },
}


def summary(diagnostics):
    keys = ("code", "state", "severity", "first_step", "fired_step", "onset_step", "last_step", "count", "message")
    return sorted(tuple(record[key] for key in keys) for record in diagnostics)


@pytest.mark.parametrize("system", SYSTEMS, ids=str)
def test_reading_the_run_again_gives_the_same_diagnostics(tmp_path, system):
    """Recorded live, reported as recorded, and judged anew from metrics.jsonl: one and the same."""
    with Recorder(tmp_path, method="grpo", system=system, sinks=[]) as recorder:
        for step in range(1, 101):
            recorder.log(SYSTEMS[system](step, 60 < step <= 90), step=step)
            if step % 25 == 0:
                recorder.log({"val/loss": 1.0 if step < 90 else math.inf}, step=step)
    live = summary(recorder.engine.diagnostics().values())
    if system is not None:
        assert any(record[1] in ("firing", "resolved") for record in live)
    anew = diagnose(tmp_path, replay=True)
    assert summary(anew["diagnostics"]) == live
    assert anew["verdict"]["state"] == recorder.verdict["state"]
    written = {line["code"]: line for line in lines(tmp_path, "diagnostics.jsonl")}
    as_recorded = diagnose(tmp_path)["diagnostics"]
    assert {(r["code"], r["state"]) for r in as_recorded} == {(c, r["state"]) for c, r in written.items()}


@pytest.mark.parametrize("system", ["verl", "openrlhf"])
def test_the_same_signals_as_from_a_log_of_the_same_rows(tmp_path, system):
    rows = [SYSTEMS[system](step, step > 20) for step in range(1, 41)]
    with Recorder(tmp_path / "run", method="grpo", system=system, sinks=[]) as recorder:
        for step, row in enumerate(rows, start=1):
            recorder.log(row, step=step)
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps({"step": step, **row}) + "\n" for step, row in enumerate(rows, start=1)))
    from_log = read(log, method="grpo", format=system)
    ours = read(tmp_path / "run")

    def plain(observation):
        return observation.step, {k: v for k, v in observation.signals.items() if "#" not in k}, observation.nonfinite

    assert [plain(o) for o in ours.observations] == [plain(o) for o in from_log.observations]


def test_it_needs_no_torch(tmp_path):
    code = (
        "import sys; from outspoken import Recorder\n"
        f"with Recorder({str(tmp_path)!r}, sinks=[]) as r: r.log({{'loss': 1.0}})\n"
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'verl', 'ray', 'lightning')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert card(tmp_path)["status"] == "finished"


# ------------------------------------------------------------------------------------------ the end of a run


@pytest.mark.parametrize(
    ("error", "status"),
    [(ValueError, "failed"), (KeyboardInterrupt, "interrupted"), (SystemExit, "interrupted"), (None, "finished")],
)
def test_how_a_block_ends(tmp_path, told, error, status):
    try:
        with Recorder(tmp_path, sinks=[told]) as recorder:
            recorder.log({"loss": 1.0}, step=1)
            if error is not None:
                raise error("planted")
    except BaseException as raised:
        assert type(raised) is error
    assert card(tmp_path)["status"] == status
    recorder.finish("failed")
    recorder.log({"loss": 1.0}, step=2)
    assert card(tmp_path)["status"] == status and len(lines(tmp_path)) == 1 and told.closed == 1


SCRIPT = """
import sys, time
from outspoken import Recorder
recorder = Recorder(sys.argv[1], method="sft", sinks=[])
for step in range(1, 100000):
    recorder.log({"loss": 1 / step, "grad_norm": 1.0}, step=step)
    if step == 50:
        print("going", flush=True)
        if sys.argv[2] == "exit":
            sys.exit(3)
    if step > 50:
        time.sleep(0.001)
"""


def test_kill_9_leaves_a_readable_run(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path), "on"], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "going\n"
    run = Run(tmp_path)
    assert run.alive and run.status == "running"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not run.alive and Run(tmp_path).status == "running"
    steps = [line["step"] for line in lines(tmp_path)]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= 50
    assert diagnose(tmp_path, replay=True)["source"]["last_step"] == steps[-1]
    assert gate(tmp_path).exit_code == 2  # it cannot be judged: it never ended

    with Recorder(tmp_path, method="sft", sinks=[], resume=True) as recorder:
        recorder.log({"loss": 0.5})
    assert [line["step"] for line in lines(tmp_path)] == [*steps, steps[-1] + 1]
    assert (card(tmp_path)["id"], card(tmp_path)["status"]) == (run.id, "finished")


def test_a_script_that_just_ends(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), "exit"], stdout=subprocess.DEVNULL, check=False
    )
    assert done.returncode == 3
    assert (card(tmp_path)["status"], card(tmp_path)["step"]) == ("interrupted", 50)


# ------------------------------------------------------------------------------------------ wrong arguments


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"method": "grop"}, ValueError, "method 'grop' is not known; choose one of grpo"),
        ({"system": "vrl"}, ValueError, "system 'vrl' is not known; choose one of "),
        ({"ignore": ["NUM0001"]}, ValueError, "did you mean NUM001"),
        ({"params": {"NUM001": {"limits": 1}}}, ValueError, "limits"),
        ({"config": 3}, TypeError, "config must hold settings by name, as a mapping does, not int"),
        ({"resume": "yes"}, ValueError, "resume='yes' is not known"),
        ({"live": {"a": (0, 1)}}, ValueError, "live and apply belong together"),
        ({"apply": print}, ValueError, "live and apply belong together"),
        ({"live": {"a": (0, 1)}, "apply": print}, ValueError, "live names 'a', which config does not hold"),
        ({"live": {"a": 1}, "apply": print, "config": {"a": 1}}, ValueError, "must be \\(lowest, highest\\)"),
    ],
)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_mistake_is_told_at_once_on_every_rank(tmp_path, wrong, error, message, rank):
    with pytest.raises(error, match=message):
        Recorder(tmp_path / "run", rank=rank, **wrong)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 2],), "log takes a mapping of names to numbers, not list"),
        (({"loss": 1.0}, "three"), "step='three' is no count of optimizer steps"),
        (({"loss": 1.0}, -1), "step=-1 is no count"),
        (({"loss": 1.0}, 2.5), "step=2.5 is no count"),
        (({"loss": 1.0}, True), "step=True is no count"),
        (({"loss": 1.0}, math.nan), "step=nan is no count"),
    ],
)
def test_log_never_raises(tmp_path, told, arguments, message):
    with Recorder(tmp_path, method="sft", sinks=[told]) as recorder:
        assert recorder.log(*arguments) == []
        assert recorder.log(*arguments) == []
        recorder.log({"loss": 2.0}, step=7)
    assert len(told.notes) == 1 and message in told.notes[0] and "training goes on" in told.notes[0]
    assert [line["step"] for line in lines(tmp_path)] == [7]


def test_what_fails_inside_is_told_once_and_given_up_after_five_times(tmp_path, told, monkeypatch):
    monkeypatch.setattr(Engine, "observe", lambda self, observation: 1 / 0)
    with Recorder(tmp_path, method="sft", sinks=[told]) as recorder:
        for step in range(1, 20):
            assert recorder.log({"loss": 1.0}, step=step) == []
    assert len(told.notes) == 2 and "ZeroDivisionError" in told.notes[0] and "switched off" in told.notes[1]
    assert card(tmp_path)["status"] == "finished"


class Exploding:
    def __getattr__(self, name):
        raise RuntimeError(f"planted in {name}")


def test_sinks_that_fail_hurt_nobody(tmp_path, capsys):
    with Recorder(tmp_path, method="sft", sinks=[Exploding()]) as recorder:
        for step in range(1, 4):
            recorder.log({"loss": math.nan, "weird": 1}, step=step)
    assert len(lines(tmp_path)) == 3
    assert capsys.readouterr().err.count("Exploding failed") == 1


def test_a_directory_that_cannot_be_written(tmp_path, told):
    (tmp_path / "file").write_text("")
    with Recorder(tmp_path / "file", method="sft", sinks=[told]) as recorder:
        found = [recorder.log({"loss": math.nan if step == 9 else 1.0}, step=step) for step in range(1, 12)]
    assert [t.record["code"] for t in found[8]] == ["NUM001"]  # it is judged all the same
    assert len(told.notes) == 1 and "cannot be written" in told.notes[0]


def test_a_disk_that_is_full_for_a_while(tmp_path, told, monkeypatch):
    full = threading.Event()
    write = os.write

    def limited(fd, data):
        if full.is_set():
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, data)

    monkeypatch.setattr(rundir.os, "write", limited)
    monkeypatch.setattr(rundir, "RETRY_WRITES", 3)
    with Recorder(tmp_path, method="sft", sinks=[told]) as recorder:
        for step in range(1, 31):
            (full.set if 10 <= step < 20 else full.clear)()
            recorder.log({"loss": 1.0}, step=step)
    assert ["cannot be written" in told.notes[0], "can be written again" in told.notes[1]] == [True, True]
    steps = [line["step"] for line in lines(tmp_path)]
    assert steps[:9] == list(range(1, 10)) and steps[-1] == 30 and 10 not in steps


def test_only_rank_0_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with Recorder(tmp_path / "run", method="sft") as recorder:
        assert recorder.log({"loss": math.nan}, step=1) == []
        recorder.change_config({"a": 1})
    assert not (tmp_path / "run").exists() and recorder.verdict is None
    with Recorder(tmp_path / "run", method="sft", rank=0, sinks=[]) as recorder:
        recorder.log({"loss": 1.0}, step=1)
    assert card(tmp_path / "run")["world_size"] == 4


# ------------------------------------------------------------------------------------------ steps


def steps_and_names(folder):
    return [(line["step"], line["segment"], sorted(line["signals"])) for line in lines(folder)]


def test_steps_count_up_by_themselves(tmp_path):
    with Recorder(tmp_path, method="sft", sinks=[]) as recorder:
        recorder.log({"loss": 1.0})
        recorder.log({"loss": 1.0})
        recorder.log({"eval_loss": 1.0})  # of the step that training is at
        recorder.log({"loss": 1.0, "step": 10})
        recorder.log({"loss": 1.0, "step": 99}, step=11)  # the argument wins
        recorder.log({"loss": 1.0}, step=np.int64(12))
        recorder.log({"loss": 1.0}, step=torch.tensor(13))
    assert steps_and_names(tmp_path) == [
        *((1, 0, ["loss"]), (2, 0, ["loss"]), (2, 0, ["eval_loss"]), (10, 0, ["loss"]), (11, 0, ["loss"])),
        *((12, 0, ["loss"]), (13, 0, ["loss"])),
    ]


def test_an_evaluation_that_comes_late_counts_where_training_is(tmp_path, told):
    with Recorder(tmp_path, method="sft", sinks=[told]) as recorder:
        for step in range(1, 6):
            recorder.log({"loss": 1.0}, step=step)
        recorder.log({"val_loss": 2.0}, step=2)
        recorder.log({"loss": 1.0}, step=6)
    assert steps_and_names(tmp_path)[4:] == [(5, 0, ["loss"]), (5, 0, ["eval_loss"]), (6, 0, ["loss"])]


def test_a_step_that_goes_back_begins_a_segment(tmp_path):
    with Recorder(tmp_path, method="sft", sinks=[]) as recorder:
        for step in (1, 2, 3, 4, 3, 4, 5):
            recorder.log({"loss": float(step)}, step=step)
    assert [(step, segment) for step, segment, _ in steps_and_names(tmp_path)] == [
        *((1, 0), (2, 0), (3, 0), (4, 0), (3, 1), (4, 1), (5, 1))
    ]
    assert card(tmp_path)["segment"] == 1
    frame = Run(tmp_path).metrics("loss")
    assert list(frame.index) == [1, 2, 3, 4, 5]


def test_a_step_that_is_logged_in_several_calls_is_one_observation(tmp_path, told):
    with Recorder(tmp_path, method="grpo", sinks=[told]) as recorder:
        for step in range(1, 31):
            recorder.log({"loss": 1.0, "learning_rate": 1e-3}, step=step)
            recorder.log({"reward": 0.5 * step, "learning_rate": 1e-3}, step=step)
            recorder.log({"eval_reward": 1.0} if step % 10 == 0 else {}, step=step)
    names = ["learning_rate", "loss", "reward"]
    observed = [(step, [n for n in found if "#" not in n]) for step, _, found in steps_and_names(tmp_path)]
    assert observed[:3] == [(1, ["learning_rate", "loss"]), (1, ["learning_rate", "reward"]), (2, names)]
    assert [step for step, _ in observed] == [1, *range(1, 31)]
    assert dict(observed[2:])[10] == sorted([*names, "eval_reward"])
    assert sum("several calls" in note for note in told.notes) == 1


def test_other_values_for_one_step_are_observations_of_their_own(tmp_path):
    """Micro-batches under one step: neither is lost, and no segment begins."""
    with Recorder(tmp_path, method="sft", sinks=[]) as recorder:
        for step in (1, 1, 2, 2):
            recorder.log({"loss": step + len(lines(tmp_path))}, step=step)
    assert [(line["step"], line["signals"]["loss"], line["segment"]) for line in lines(tmp_path)] == [
        *((1, 1.0, 0), (1, 2.0, 0), (2, 4.0, 0), (2, 5.0, 0))
    ]


def test_what_counts_as_a_number(tmp_path, told):
    values = {
        "loss": torch.tensor(1.5, requires_grad=True),
        "grad_norm": np.float32(0.25),
        "learning_rate": "1e-3",
        "reward": math.nan,
        "kl": -math.inf,
        "entropy": None,
        "epoch": 2,
        "time/step": [1, 2],
        "table": [[1]],
        "name": "a",
        "nested": {"a": {"b": 1}},
    }
    with Recorder(tmp_path, method="grpo", sinks=[told]) as recorder:
        recorder.log(values, step=1, time=12.5)
    (line,) = lines(tmp_path)
    assert line["signals"] == {
        "loss": 1.5,
        "grad_norm": 0.25,
        "learning_rate": 1e-3,
        "nested/a/b": 1.0,
        "reward": None,
        "kl": None,
    }
    assert line["nonfinite"] == {"reward": "nan", "kl": "-inf"} and line["unreadable"] == {"time/step": "'<list>'"}
    assert (line["epoch"], line["time"]) == (2.0, 12.5)
    assert "No numbers, so left out: table, name." in told.notes[0]


# ------------------------------------------------------------------------------------------ settings


@dataclasses.dataclass
class Settings:
    learning_rate: float = 1e-4
    hidden: object = dataclasses.field(default_factory=object)


@pytest.mark.parametrize("given", [Settings(), argparse.Namespace(learning_rate=1e-4), {"learning_rate": 1e-4}])
def test_settings_of_any_kind(tmp_path, given):
    with Recorder(tmp_path, config=given, method="sft", sinks=[]):
        pass
    assert card(tmp_path)["config"]["learning_rate"] == 1e-4


def test_settings_and_method_in_a_systems_own_words(tmp_path):
    config = {
        "algorithm": {"adv_estimator": "grpo"},
        "actor_rollout_ref": {"rollout": {"n": 8, "temperature": 0.7}, "actor": {"optim": {"lr": 2e-6}}},
    }
    with Recorder(tmp_path, config=config, system="verl", sinks=[]):
        pass
    record = card(tmp_path)
    assert record["method"] == "grpo" and record["trainer"] == "verl"
    assert record["config"] == {"num_generations": 8, "temperature": 0.7, "learning_rate": 2e-6}


def test_an_unknown_method_is_said(tmp_path, told):
    with Recorder(tmp_path, sinks=[told]):
        pass
    assert "only what holds for any training is judged" in told.notes[0]


def test_settings_that_the_loop_changes_open_a_segment(tmp_path, told):
    with Recorder(tmp_path, method="sft", config={"learning_rate": 1e-3, "max_length": 64}, sinks=[told]) as recorder:
        for step in range(1, 5):
            recorder.log({"loss": 1.0}, step=step)
        recorder.change_config({"learning_rate": 1e-3})  # nothing new
        recorder.change_config({"learning_rate": 5e-4, "packing": True})
        recorder.change_config([])  # told, no more
        recorder.log({"loss": 1.0}, step=5)
    record = card(tmp_path)
    assert record["config"] == {"learning_rate": 5e-4, "max_length": 64, "packing": True} and record["segment"] == 1
    assert [line["segment"] for line in lines(tmp_path)] == [0, 0, 0, 0, 1]
    (change,) = lines(tmp_path, "changes.jsonl")
    schemas.validate(change)
    assert (change["state"], change["step"], change["segment"]) == ("applied", 4, 1)
    assert change["fields"] == {"learning_rate": {"old": 1e-3, "new": 5e-4}, "packing": {"old": None, "new": True}}
    assert sum("change_config takes a mapping" in note for note in told.notes) == 1


# ------------------------------------------------------------------------------------------ agents


def ask(folder, expect=None, **fields):
    """Send a request without the checks that the asking side makes."""
    run = Run(folder)
    name = f"request-{len(list((folder / 'outspoken' / 'control').iterdir()))}-{time.monotonic_ns()}"
    record = {
        "schema": "outspoken.request/1",
        "id": name,
        "kind": "apply",
        "actor": "test",
        "patch": [
            op
            for field, new in fields.items()
            for op in (
                {"op": "test", "path": f"/{field}", "value": run.config[field]},
                {"op": "replace", "path": f"/{field}", "value": new},
            )
        ],
        "suggestion": None,
        "diagnostic": None,
        "expect": expect,
        "rollback_on_failure": True,
        "restore": False,
        "time": time.time(),
    }
    schemas.validate(record)
    (folder / "outspoken" / "control" / f"{name}.json").write_text(json.dumps(record))
    return name


def states(folder, name):
    return [(r["state"], r["reason"]) for r in lines(folder, "changes.jsonl") if r["id"] == name]


def test_a_loop_that_takes_no_requests_says_so(tmp_path):
    with Recorder(tmp_path, method="sft", config={"learning_rate": 1e-3}, sinks=[]) as recorder:
        recorder.log({"loss": 1.0}, step=1)
        with pytest.raises(RequestRefused):
            Run(tmp_path).apply({"learning_rate": 5e-4}, actor="agent")
        name = ask(tmp_path, learning_rate=5e-4)
        recorder.log({"loss": 1.0}, step=2)
        late = ask(tmp_path, learning_rate=5e-4)
    assert [state for state, _ in states(tmp_path, name)] == ["requested", "rejected"]
    assert "takes no requests" in states(tmp_path, name)[1][1]
    assert states(tmp_path, late) == [("rejected", "the run has finished")]
    assert not list((tmp_path / "outspoken" / "control").iterdir())


def test_a_change_is_applied_tried_and_taken_back(tmp_path):
    """The promise, a loss below 0.5 within 12 steps, is kept by the first change and broken by the second."""
    applied = []
    config = {"learning_rate": 1e-3, "batch": 8}
    live = {"learning_rate": (0.0, 1e-2), "batch": [8, 16]}
    now = 1.0
    with Recorder(tmp_path, method="sft", config=config, live=live, apply=applied.append, sinks=[]) as recorder:
        promise = {"signal": "loss", "direction": "below", "value": 0.5, "within_steps": 12, "min_n": 5}
        for step in range(1, 81):
            recorder.log({"loss": now + 0.01 * math.sin(step)}, step=step)
            if step == 20:
                first = Run(tmp_path).apply({"learning_rate": 5e-3}, actor="agent", expect=promise)
                refused = ask(tmp_path, batch=12)
            if applied and step == 22:
                now = 0.2
            if step == 40:
                broken = {**promise, "value": 0.1}
                second = Run(tmp_path).apply({"batch": 16}, actor="agent", expect=broken, rollback_on_failure=True)
    assert applied == [{"learning_rate": 5e-3}, {"batch": 16}, {"batch": 8}]
    assert [state for state, _ in states(tmp_path, first)] == ["requested", "applied", "verified"]
    assert [state for state, _ in states(tmp_path, second)] == ["requested", "applied", "failed", "rolled_back"]
    assert [state for state, _ in states(tmp_path, refused)] == ["requested", "rejected"]
    record = card(tmp_path)
    assert record["config"] == {"learning_rate": 5e-3, "batch": 8} and record["segment"] == 3
    assert record["live"]["batch"]["choices"] == [8, 16] and record["facts"]["live_fields"] == [
        "batch",
        "learning_rate",
    ]
    for line in lines(tmp_path, "changes.jsonl"):
        schemas.validate(line)


def test_a_change_that_the_loop_cannot_make(tmp_path, told):
    calls = []

    def broken(fields):
        calls.append(fields)
        if fields["learning_rate"] != 1e-3:
            raise RuntimeError("no such optimizer")

    config, live = {"learning_rate": 1e-3}, {"learning_rate": (0.0, None)}
    with Recorder(tmp_path, method="sft", config=config, live=live, apply=broken, sinks=[told]) as recorder:
        recorder.log({"loss": 1.0}, step=1)
        name = ask(tmp_path, learning_rate=0.5)
        recorder.log({"loss": 1.0}, step=2)
        assert recorder.log({"loss": 1.0}, step=3) == []
    assert calls == [{"learning_rate": 0.5}, {"learning_rate": 1e-3}]
    assert states(tmp_path, name)[1] == ("failed", "could not be applied: RuntimeError: no such optimizer")
    assert card(tmp_path)["config"] == config and card(tmp_path)["segment"] == 0


# ------------------------------------------------------------------------------------------ going on


def train(folder, steps, loss=lambda step: 1.0, **settings):
    with Recorder(folder, method="sft", sinks=[], **settings) as recorder:
        for step in steps:
            recorder.log({"loss": loss(step)}, step=step)
    return recorder


def test_another_run_in_the_directory_sets_the_earlier_one_aside(tmp_path):
    first = train(tmp_path, range(1, 6))
    second = train(tmp_path, range(1, 4))
    assert first.run_id != second.run_id == card(tmp_path)["id"]
    assert len(lines(tmp_path)) == 3
    kept = tmp_path / "outspoken" / "earlier" / first.run_id / "metrics.jsonl"
    assert len(kept.read_text().splitlines()) == 5


@pytest.mark.parametrize(
    ("resume", "steps"), [(True, range(21, 31)), (12, range(13, 31)), ("auto", range(13, 31))], ids=str
)
def test_a_run_that_goes_on(tmp_path, resume, steps):
    """The engine knows what was before the checkpoint, and not what was thrown away after it."""
    first = train(tmp_path, range(1, 21), loss=float)
    second = train(tmp_path, steps, loss=lambda step: step + 0.5, resume=resume)
    record = card(tmp_path)
    assert (record["id"], record["segment"], record["status"]) == (first.run_id, 1, "finished")
    assert [(line["step"], line["segment"]) for line in lines(tmp_path)] == [
        *((step, 0) for step in range(1, 21)),
        *((step, 1) for step in steps),
    ]
    assert second.engine.view.points == steps[0] - 1 + len(steps)
    frame = Run(tmp_path).metrics("loss")
    assert list(frame["loss"]) == [float(s) if s < steps[0] else s + 0.5 for s in range(1, 31)]
    # resumed once more, from within the second part: what that threw away is known from its segment
    third = train(tmp_path, range(26, 28), loss=float, resume=25)
    assert third.engine.view.points == 27 and card(tmp_path)["segment"] == 2


def test_auto_takes_a_first_step_for_another_run(tmp_path):
    """Logs every 10 steps: step 10 is where the earlier run began as well."""
    first = train(tmp_path, range(10, 60, 10), resume="auto")
    second = train(tmp_path, range(10, 40, 10), resume="auto")
    third = train(tmp_path, range(40, 60, 10), resume="auto")
    assert first.run_id != second.run_id == third.run_id
    assert [line["step"] for line in lines(tmp_path)] == [10, 20, 30, 40, 50]


# ------------------------------------------------------------------------------------------ the translator


def test_a_row_at_a_time():
    def follow():
        seen = []

        def add(observation):
            seen.append(observation.signals.get("reward", 0.0))
            observation.signals["sum"] = sum(seen)

        return add

    family = Family(
        "x",
        aliases={"score": "reward", "n": "num_completions"},
        scale={"score": 0.01},
        meanings={"score": "score is in percent."},
        not_measured={"gn": -1.0},
        zero_if_off=frozenset({"aux"}),
        derived={"reward_per": Derived(("reward", "num_completions"), lambda r, n: r / n)},
        follow=follow,
    )
    made = Translator(family)
    rows = [
        {"score": 50, "n": 4, "gn": -1, "aux": 0},
        {"score": 25.0, "gn": 3.0, "aux": 2},
        {"score": None, "aux": 0, "late": 1},
    ]
    notes, observed = [], []
    for step, row in enumerate(map(flat, rows)):
        notes.append(made.learn(row))
        observed.append(dict(made.observation(row, step).signals))
    assert observed == [
        {"reward": 0.5, "num_completions": 4.0, "reward_per": 0.125, "sum": 0.5},
        {"reward": 0.25, "gn": 3.0, "aux": 2.0, "sum": 0.75},
        {"aux": 0.0, "late": 1.0, "sum": 0.75},
    ]
    assert notes[0].startswith("Read under our names: score as reward, n as num_completions. Kept under their own")
    assert notes[0].endswith("score is in percent.") and notes[1] == ""
    assert notes[2] == "Kept under their own names, no rule reads them: late."


def test_the_trainers_closing_row_is_no_step():
    made = Translator(Family("other"))
    row = flat({"train_runtime": 3.0, "train_loss": 1.0, "epoch": 1.0})
    assert made.learn(row) == "" and made.signals(row) == {}
    assert made.learn(flat({"train_loss": 1.0})) == "" and set(made.signals({"train_loss": 1.0})) == {"train_loss"}


def test_a_loop_that_invents_names_does_not_grow_memory(tmp_path):
    with Recorder(tmp_path, method="sft", sinks=[]) as recorder:
        for step in range(1, 8):
            recorder.log({f"name-{step}-{i}": 1.0 for i in range(1000)} | {"loss": 1.0}, step=step)
    assert len(recorder._translator.columns) <= 5000
    assert len(recorder.engine.view.rings) <= 2000 and recorder.engine.view.last("loss") == 1.0


def test_the_doc_example_runs(tmp_path):
    """The first block of docs/recorder.md, as it stands there."""
    text = (Path(__file__).parent.parent / "docs" / "recorder.md").read_text(encoding="utf-8")
    block = textwrap.dedent(text.split("```python")[1].split("```")[0])
    done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert card(tmp_path / "out")["status"] == "finished" and len(lines(tmp_path / "out")) > 10
