"""How a run ends and goes on: exceptions, exits, kill -9 and resume, and two processes that train together."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import warnings

import pytest
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from outspoken import DiagnosticsCallback, SFTConfig, SFTTrainer, schemas
from outspoken.agent_api.run import Run
from outspoken.diagnostics import rundir

SENTENCES = ["The sky is blue and", "What is 2 + 2? It", "green grass", "the quick brown fox jumps", "It is", "dog"]


def common(folder, **own):
    return {
        "output_dir": str(folder),
        "max_steps": 5,
        "per_device_train_batch_size": 8,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        **own,
    }


class Raises(TrainerCallback):
    """Raises at a step, in the hook named."""

    def __init__(self, error, hook="on_step_end"):
        self.error = error
        setattr(self, hook, self.at)

    def at(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise self.error


@pytest.mark.parametrize("ours", (True, False), ids=("ours", "plain"))
@pytest.mark.parametrize(
    ("error", "status"),
    ((ValueError("planted"), "failed"), (KeyboardInterrupt(), "interrupted"), (SystemExit(3), "interrupted")),
    ids=("exception", "ctrl-c", "exit"),
)
def test_status(tmp_path, tiny_model_factory, tiny_tokenizer, ours, error, status):
    """The record tells how training ended, the exception is the caller's, and no wrapper is left on the trainer."""
    hook = "on_step_end" if ours else "on_step_begin"
    model, more = tiny_model_factory(), {"processing_class": tiny_tokenizer}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if ours:
            data = Dataset.from_dict({"text": SENTENCES * 8})
            args = SFTConfig(**common(tmp_path, gradient_checkpointing=False))
            trainer = SFTTrainer(model, args=args, train_dataset=data, callbacks=[Raises(error, hook)], **more)
        else:
            data = Dataset.from_list([{"input_ids": list(range(9)), "labels": list(range(9))}] * 48)
            callbacks = [Raises(error, hook), DiagnosticsCallback()]
            args = TrainingArguments(**common(tmp_path))
            trainer = Trainer(model, args=args, train_dataset=data, callbacks=callbacks, **more)
    with pytest.raises(type(error)):
        trainer.train()
    run = json.loads((tmp_path / "outspoken" / "run.json").read_text())
    schemas.validate(run)
    done = 2 if ours else 3  # in the former the third step ended, but was not observed before the exception
    assert (run["status"], run["verdict"]["state"]) == (status, "unknown") and run["step"] == done
    assert [line["step"] for line in rundir.read_jsonl(tmp_path / "outspoken" / "metrics.jsonl")[0]] == list(
        range(1, done + 1)
    )
    assert not {"training_step", "_run_epoch", "_save_checkpoint", "evaluate", "_evaluate"} & vars(trainer).keys()
    trainer.pop_callback(Raises)
    trainer.train()  # and it trains again
    assert json.loads((tmp_path / "outspoken" / "run.json").read_text())["status"] == "finished"


SCRIPT = """
    import json, os, sys, warnings
    warnings.simplefilter("ignore")
    import torch
    torch.set_num_threads(1)
    from transformers import TrainerCallback
    from outspoken import DiagnosticsCallback, SFTConfig, SFTTrainer
    from outspoken.agent_api import Run
    from outspoken.cli.demo_task import build_model, build_tokenizer, solved_examples

    out, resume = sys.argv[1], sys.argv[2] == "resume"
    rank = int(os.environ.get("RANK", 0))
    settings = {
        "output_dir": out, "seed": 0, "report_to": [], "use_cpu": True, "disable_tqdm": True, "learning_rate": 1e-3,
        "gradient_checkpointing": False, "per_device_train_batch_size": 8, "logging_steps": 5,
    }
"""


def script(tmp_path, body):
    path = tmp_path / "train.py"
    path.write_text(textwrap.dedent(SCRIPT) + textwrap.dedent(body))
    return str(path)


def environment(**own):
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **own}


def has_whole_checkpoint(folder):
    """Whether there is one to resume from; what a kill left of another is removed: transformers would choose it."""
    for checkpoint in folder.glob("checkpoint-*"):
        if not (checkpoint / "trainer_state.json").is_file():
            shutil.rmtree(checkpoint)
    return any(folder.glob("checkpoint-*"))


@pytest.mark.slow
def test_kill_and_resume(tmp_path):
    """Killed at random moments, resumed each time: it ends as if nothing had been, and no line was lost."""
    path = script(
        tmp_path,
        """
        class Tells(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                if not self.told:
                    self.told = True
                    watcher = next(c for c in trainer.callback_handler.callbacks if isinstance(c, DiagnosticsCallback))
                    view = watcher.engine.view
                    known = {"from": state.global_step, "points": view.points, "segment": view.segment}
                    known["losses"] = len(view.first("loss", 50))
                    known["good"] = len(watcher._checkpoints)
                    print("TELLS", json.dumps(known), flush=True)
            told = False

        tokenizer = build_tokenizer()
        trainer = SFTTrainer(
            build_model(tokenizer, 0),
            args=SFTConfig(**settings, max_steps=120, save_strategy="steps", save_steps=7, save_total_limit=2),
            train_dataset=solved_examples(400, 1), processing_class=tokenizer, callbacks=[Tells()],
        )
        trainer.train(resume_from_checkpoint=resume)
        torch.save(trainer.model.state_dict(), out + "/final.pt")
        """,
    )
    out, whole = tmp_path / "killed", tmp_path / "whole"
    metrics = out / "outspoken" / "metrics.jsonl"
    rng = random.Random(7)
    lines_before, run_id, told, kills = [], None, [], 0
    while kills < 4:
        resumable = has_whole_checkpoint(out)
        process = subprocess.Popen(
            [sys.executable, path, str(out), "resume" if resumable else "anew"],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        wanted = len(lines_before) + rng.randint(9, 20)
        while process.poll() is None and count(metrics) < wanted:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.02)
        process.send_signal(signal.SIGKILL)
        output, _ = process.communicate()
        assert process.returncode == -signal.SIGKILL, output
        kills += 1
        told += [json.loads(line.removeprefix("TELLS ")) for line in output.splitlines() if line.startswith("TELLS")]
        records, notes = rundir.read_jsonl(metrics)
        assert records[: len(lines_before)] == lines_before, "a complete line was lost"
        assert len(notes) <= kills
        lines_before = records
        run = Run(out)
        assert run.status == "running" and not run.alive
        assert run_id in (None, run.id)
        run_id = run.id
        for record in records:
            schemas.validate(record)

    assert has_whole_checkpoint(out)
    for target, how in ((out, "resume"), (whole, "anew")):
        subprocess.run([sys.executable, path, str(target), how], env=environment(), check=True, capture_output=True)
    run = Run(out)
    assert (run.status, run.id, run.step, run.segment) == ("finished", run_id, 120, 4)
    records, _ = rundir.read_jsonl(metrics)
    segments = [record["segment"] for record in records]
    assert segments == sorted(segments) and set(segments) == {0, 1, 2, 3, 4}
    for segment, begun in zip(range(1, 4), told[1:]):
        steps = [r["step"] for r in records if r["segment"] == segment and "time/step" in r["signals"]]
        assert steps == list(range(begun["from"] + 1, begun["from"] + 1 + len(steps)))
        assert begun["from"] % 7 == 0 and begun["segment"] == segment
        # The engine knows all steps before the checkpoint (and the lines of saving), and the checkpoints still there.
        assert begun["losses"] == min(50, begun["from"]) and begun["points"] >= begun["from"]
        assert 1 <= begun["good"] <= 2
    assert digest(out / "final.pt") == digest(whole / "final.pt")
    losses = [Run(folder).metrics("loss")["loss"].tolist() for folder in (out, whole)]
    assert losses[0] == losses[1] and len(losses[0]) == 120


def count(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def digest(path):
    import torch

    state = torch.load(path, weights_only=True)
    return {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in state.items()}


@pytest.mark.slow
def test_exit_without_a_word(tmp_path):
    """The interpreter ends while a run is open, after an exception that no hook could see."""
    path = script(
        tmp_path,
        """
        class Bad(TrainerCallback):
            def on_train_begin(self, args, state, control, **kwargs):
                raise RuntimeError("after the diagnostics have begun")

        tokenizer = build_tokenizer()
        trainer = SFTTrainer(
            build_model(tokenizer, 0), args=SFTConfig(**settings, max_steps=2, save_strategy="no"),
            train_dataset=solved_examples(40, 1), processing_class=tokenizer,
        )
        trainer.add_callback(Bad())
        trainer.train()
        """,
    )
    done = subprocess.run(
        [sys.executable, path, str(tmp_path / "run"), "anew"], env=environment(), capture_output=True
    )
    assert done.returncode == 1
    assert Run(tmp_path / "run").status == "interrupted"


@pytest.mark.slow
def test_two_processes(tmp_path):
    """Rank 0 alone writes; a live change, and its rollback to a checkpoint, happen on both ranks at the same step."""
    path = script(
        tmp_path,
        """
        import hashlib

        class Early(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if rank:
                    return
                if state.global_step == 3:
                    Run(out).apply({"learning_rate": 4e-4, "max_grad_norm": 0.5}, actor="agent", expect={
                        "signal": "loss", "direction": "above", "value": 0, "within_steps": 9, "min_n": 1})
                if state.global_step == 6:
                    Run(out).apply({"learning_rate": 2e-4}, actor="agent", expect={
                        "signal": "loss", "direction": "below", "value": 0, "within_steps": 2, "min_n": 1})

        class Late(TrainerCallback):
            seen = []
            def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
                data = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
                norm = args.max_grad_norm
                self.seen.append([optimizer.param_groups[0]["lr"], args.learning_rate, norm,
                                  hashlib.sha256(data).hexdigest()])

        tokenizer = build_tokenizer()
        trainer = SFTTrainer(
            build_model(tokenizer, 0),
            args=SFTConfig(**settings, max_steps=12, save_strategy="steps", save_steps=5, lr_scheduler_type="constant"),
            train_dataset=solved_examples(400, 1), processing_class=tokenizer, callbacks=[Early()],
        )
        trainer.add_callback(Late())
        trainer.train()
        with open(f"{out}/rank-{rank}.json", "w") as file:
            json.dump({"seen": Late.seen, "engine": any(
                getattr(c, "engine", None) is not None for c in trainer.callback_handler.callbacks)}, file)
        """,
    )
    out = tmp_path / "run"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--standalone"]
    done = subprocess.run([*launch, path, str(out), "anew"], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((out / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    assert [rank["engine"] for rank in ranks] == [True, False]
    assert ranks[0]["seen"] == ranks[1]["seen"]
    rates = [[live, peak, norm] for live, peak, norm, _ in ranks[0]["seen"]]
    old, new, newer = [1e-3, 1e-3, 1.0], [4e-4, 4e-4, 0.5], [2e-4, 2e-4, 0.5]
    assert rates == [pytest.approx(r) for r in [old] * 2 + [new] * 3 + [newer] * 2 + [new] * 5]
    steps = [
        r["step"] for r in rundir.read_jsonl(out / "outspoken" / "metrics.jsonl")[0] if "time/step" in r["signals"]
    ]
    assert steps == list(range(1, 13))
    run = Run(out)
    assert run.record["world_size"] == 2 and run.status == "finished"
    assert [(c["state"], c["step"]) for c in run.changes()] == [("verified", 4), ("rolled_back", 8)]
    assert "checkpoint-5" in run.changes()[1]["reason"]
    # After the rollback the weights are those that were saved after step 5.
    assert ranks[0]["seen"][7][3] == ranks[0]["seen"][4][3]


@pytest.mark.slow
@pytest.mark.parametrize("whose", ("ours", "trl"))
def test_rewards_of_two_processes(tmp_path, whose):
    """Rank 0 sees the completions of both ranks: 16 a step, in the groups that the trainer compares."""
    path = script(
        tmp_path,
        """
        from outspoken import GRPOConfig, GRPOTrainer
        from outspoken.cli.demo_task import problems
        import trl

        ours = sys.argv[2] == "ours"
        def reward(completion_ids, **_):
            return [float(sum(ids) % 5) for ids in completion_ids]

        tokenizer = build_tokenizer()
        config, trainer_class = (GRPOConfig, GRPOTrainer) if ours else (trl.GRPOConfig, trl.GRPOTrainer)
        settings["logging_steps"] = 1
        trainer = trainer_class(
            build_model(tokenizer, 0), reward,
            args=config(**settings, max_steps=3, save_strategy="no", num_generations=4, max_completion_length=6, bf16=False),
            train_dataset=problems(64, 1), processing_class=tokenizer,
            callbacks=[] if ours else [DiagnosticsCallback()],
        )
        trainer.train()
        if rank == 0:
            with open(f"{out}/log.json", "w") as file:
                json.dump([log for log in trainer.state.log_history if "reward" in log], file)
        """,
    )
    out = tmp_path / "run"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    done = subprocess.run([*launch, path, str(out), whose], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    logs = json.loads((out / "log.json").read_text())
    records = rundir.read_jsonl(out / "outspoken" / "metrics.jsonl")[0]
    assert [record["step"] for record in records] == [1, 2, 3]
    for record, log in zip(records, logs, strict=True):
        signals = record["signals"]
        assert (signals["num_completions"], signals["groups/count"]) == (16, 4)
        for name in ("reward", "reward_std", "frac_reward_zero_std", "entropy", "grad_norm"):
            assert signals[name] == pytest.approx(log[name], rel=1e-5), name
        assert signals["groups/zero_std"] == log["frac_reward_zero_std"]
