"""What becomes of a change: verified, failed and taken back, or kept; by arithmetic on planted series and in runs."""

import json
import math
import os
import warnings

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import TrainerCallback

from outspoken import DiagnosticsCallback, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer, schemas
from outspoken.agent_api.run import Run
from outspoken.diagnostics import changes
from outspoken.diagnostics.engine import Engine
from outspoken.diagnostics.records import Observation, change_field
from outspoken.diagnostics.rules.registry import all_rules

# ------------------------------------------------------------------------------------------ judging, on planted series


class Watched:
    """An engine without rules, fed by hand."""

    def __init__(self, method="grpo", config=None):
        self.engine = Engine(method=method, config=config or {"num_generations": 8}, rules={})
        self.step = 0

    def feed(self, **series):
        """One observation for each value of the series; `a__b` stands for the signal `a/b`."""
        for values in zip(*series.values(), strict=True):
            self.step += 1
            signals = {name.replace("__", "/"): value for name, value in zip(series, values)}
            self.engine.observe(Observation.from_raw(self.step, signals))

    def change(self, expect=None, errors=(), fields=None):
        record = {"id": "c", "fields": fields or {}, "expect": expect}
        trial = changes.start_trial(record, self.engine.view, frozenset(errors))
        self.engine.open_segment(self.step, "change")
        return trial

    def judge(self, trial, errors=()):
        return changes.judge(trial, self.engine.view, frozenset(errors))


def test_a_goal_whose_unit_changes():
    """Margins are in units of beta: a quarter of beta, a quarter of the margin, and no harm done. A loss that is
    redefined says nothing."""
    rng = np.random.default_rng(0)
    for kept, outcome in ((0.25, None), (0.1, "failed")):
        run = Watched("dpo", {"beta": 0.4})
        run.feed(rewards__margins=list(rng.normal(2, 0.1, 30)))
        trial = run.change(fields={"beta": {"old": 0.4, "new": 0.1}})
        run.feed(rewards__margins=list(rng.normal(2 * kept, 0.1 * kept, 12)))
        judgement = run.judge(trial)
        assert (judgement and judgement.outcome) == outcome, kept
    for fields, goal in (({"loss_type": {"old": "nll", "new": "dft"}}, None), ({"learning_rate": {}}, "loss")):
        run = Watched("sft", {})
        run.feed(loss=[1.0] * 20)
        assert run.change(fields=fields).goal == goal


def expect(signal, direction, value, within_steps=10, min_n=5):
    return {"signal": signal, "direction": direction, "value": value, "within_steps": within_steps, "min_n": min_n}


def test_a_promise_kept():
    """The median of the newest five points since the change, and no sooner than there are five."""
    run = Watched()
    run.feed(entropy=[0.1] * 20)
    trial = run.change(expect("entropy", "above", 0.5))
    for value in (0.2, 0.6, 0.7):
        run.feed(entropy=[value])
        assert run.judge(trial) is None
    run.feed(entropy=[0.4])
    assert run.judge(trial) is None
    run.feed(entropy=[0.9])  # 0.2 0.4 0.6 0.7 0.9: median 0.6
    judgement = run.judge(trial)
    assert judgement.outcome == "verified" and judgement.observed["value"] == 0.6 and judgement.observed["n"] == 5
    assert judgement.reason == "entropy is 0.6 (promised: above 0.5), as promised"


def test_a_promise_of_a_share_is_pooled():
    """Shares are pooled over completions: 64 a step, 128 wanted. Two steps with 8 and 4 of 64 make 12 of 128."""
    run = Watched()
    run.feed(completions__clipped_ratio=[1.0] * 20, num_completions=[64] * 20)
    trial = run.change(expect("completions/clipped_ratio", "below", 0.1, min_n=128))
    run.feed(completions__clipped_ratio=[8 / 64], num_completions=[64])
    assert run.judge(trial) is None
    run.feed(completions__clipped_ratio=[4 / 64], num_completions=[64])
    judgement = run.judge(trial)
    assert judgement.outcome == "verified"
    assert judgement.observed["value"] == pytest.approx(12 / 128) and judgement.observed["n"] == 128


def test_a_promise_broken():
    run = Watched()
    run.feed(entropy=[0.1] * 20)
    trial = run.change(expect("entropy", "above", 0.5, within_steps=8))
    for _ in range(7):
        run.feed(entropy=[0.3])
        assert run.judge(trial) is None
    run.feed(entropy=[0.3])
    judgement = run.judge(trial)
    assert judgement.outcome == "failed" and run.step == trial.deadline == 28
    assert judgement.reason == "entropy is 0.3 (promised: above 0.5) at step 28"


@pytest.mark.parametrize("gone", (math.nan, None), ids=("not finite", "not measured"))
def test_a_promise_that_cannot_be_judged(gone):
    run = Watched()
    run.feed(entropy=[0.1] * 20, other=[1] * 20)
    trial = run.change(expect("entropy", "above", 0.5, within_steps=8))
    run.feed(entropy=[0.6] * 3 + [gone] * 5, other=[1] * 8)
    judgement = run.judge(trial)
    assert judgement.outcome == "failed" and judgement.reason == "entropy gave 3 of the 5 values needed by step 28"


@pytest.mark.parametrize(("method", "goal", "sign"), (("grpo", "reward", 1), ("sft", "loss", -1)))
def test_harm(method, goal, sign):
    """A goal that moves the wrong way by more than four standard errors fails the change, whatever was promised."""
    rng = np.random.default_rng(0)
    for worse in (True, False):
        run = Watched(method)
        run.feed(**{goal: list(rng.normal(0, 0.1, 30)), "entropy": [0.1] * 30})
        trial = run.change(expect("entropy", "above", 0.5, within_steps=15))
        assert (trial.goal, trial.goal_sign) == (goal, sign)
        moved = -sign if worse else sign
        run.feed(**{goal: list(rng.normal(0.5 * moved, 0.1, 9)), "entropy": [0.1] * 9})
        assert run.judge(trial) is None, "ten points are needed to speak of harm"
        run.feed(**{goal: [0.5 * moved], "entropy": [0.1]})
        judgement = run.judge(trial)
        if worse:
            assert judgement.outcome == "failed" and judgement.reason.startswith(f"{goal} went from")
            assert judgement.observed["goal_before"] == pytest.approx(0, abs=0.1)
            assert judgement.observed["goal_after"] == pytest.approx(0.5 * moved, abs=0.1)
        else:
            assert judgement is None


@pytest.mark.parametrize(("correlation", "called_harm"), ((0.0, 0.01), (0.6, 0.06)))
def test_noise_is_no_harm(correlation, called_harm):
    """Changes that did nothing to a noisy reward, independent or correlated from step to step, are rarely blamed."""
    rng = np.random.default_rng(1)
    outcomes = []
    for _ in range(200):
        noise = 0.0

        def next_reward():
            nonlocal noise
            noise = correlation * noise + math.sqrt(1 - correlation**2) * rng.normal(0, 0.1)
            return 0.5 + noise

        run = Watched()
        run.feed(reward=[next_reward() for _ in range(40)])
        trial = run.change()
        while (judgement := run.judge(trial)) is None:
            run.feed(reward=[next_reward()])
        outcomes.append(judgement.outcome)
    assert outcomes.count("failed") <= called_harm * 200


def test_a_new_error():
    run = Watched()
    run.feed(loss=[1.0] * 5)
    trial = run.change(expect("loss", "below", 5.0, min_n=1), errors={"NUM001"})
    run.feed(loss=[1.0])
    assert run.judge(trial, {"NUM001"}).outcome == "verified", "this error was there before"
    judgement = run.judge(trial, {"NUM001", "RL004", "NUM002"})
    assert judgement.outcome == "failed" and judgement.reason == "NUM002, RL004 fired after the change"


def test_without_a_promise():
    run = Watched()
    run.feed(reward=[0.5] * 5)
    trial = run.change()
    for _ in range(changes.WITHOUT_PROMISE - 1):
        run.feed(reward=[0.5])
        assert run.judge(trial) is None
    run.feed(reward=[0.5])
    judgement = run.judge(trial)
    assert judgement.outcome == "verified" and "no harm within 30 steps" in judgement.reason


# ------------------------------------------------------------------------------------------ what holds after a resume


def observed(*steps_by_segment):
    return [
        {"step": step, "segment": segment, "signals": {"time/step": 1.0}}
        for segment, steps in steps_by_segment
        for step in steps
    ]


def applied(step, segment, state="applied", **fields):
    pairs = {name: {"old": old, "new": new} for name, (old, new) in fields.items()}
    return {"state": state, "step": step, "segment": segment, "fields": pairs}


def test_surviving_observations():
    """Killed after step 8, resumed from 5, evaluated and killed after 7, resumed from 6."""
    evaluation = {"step": 7, "segment": 1, "signals": {"eval_loss": 1.0}}
    records = [
        *observed((0, range(1, 9)), (1, [6, 7])),
        evaluation,
        *observed((2, range(7, 10))),
        {**evaluation, "step": 9},
    ]
    kept = changes.surviving(records, 9)
    assert [(r["step"], r["segment"]) for r in kept] == [(s, 0) for s in range(1, 6)] + [
        (6, 1),
        (7, 2),
        (8, 2),
        (9, 2),
        (9, 1),
    ]
    assert changes.surviving(records[:11], 9)[-2:] == [records[9], evaluation]
    assert [r["step"] for r in changes.surviving(records, 4)] == [1, 2, 3, 4]
    odd = [{"step": "1", "signals": {}}, {"signals": {}}, {"step": 1, "signals": 3}, {"step": 1, "signals": {}}]
    assert changes.surviving(odd, 9) == odd[3:]


def test_lasting_changes():
    seen = observed((0, range(1, 4)), (1, range(4, 9)))
    made = [applied(3, 1, lr=(1.0, 0.5)), applied(8, 2, lr=(0.5, 0.1), beta=(0, 1))]
    assert changes.lasting(made, seen, 8) == {"lr": (1.0, 0.1), "beta": (0, 1)}
    assert changes.lasting(made, seen, 7) == {"lr": (1.0, 0.5)}, "the second came after the checkpoint"
    assert changes.lasting(made, seen, 2) == {}
    back = [*made, applied(9, 3, "rolled_back", lr=(0.5, 0.1), beta=(0, 1))]
    assert changes.lasting(back, [*seen, *observed((2, [9]))], 9) == {"lr": (1.0, 0.5)}
    # Resumed from step 5, where only the first change was in force; the second is of steps that were thrown away.
    again = [*seen, *observed((3, range(6, 20)))]
    assert changes.lasting(made, again, 12) == {"lr": (1.0, 0.5)}
    assert changes.lasting([{"state": "requested"}, {"state": "rejected"}], seen, 9) == {}


# ------------------------------------------------------------------------------------------ in runs that train

SENTENCES = ["The sky is blue and", "What is 2 + 2? It", "green grass", "the quick brown fox jumps", "It is", "dog"]
TEXTS = [s + t for s in SENTENCES for t in SENTENCES]
SURE = expect("time/step", "above", 0, within_steps=5, min_n=1)
NEVER = expect("time/step", "below", 0, within_steps=2, min_n=1)
NO_RULES = sorted(all_rules())


class At(TrainerCallback):
    """Does `plan[step](state)` when that step has ended."""

    def __init__(self, plan):
        self.plan, self.said = plan, []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in self.plan:
            self.said.append(self.plan[state.global_step](Run(args.output_dir), **kwargs))


def common(folder, **own):
    return {
        "output_dir": str(folder),
        "max_steps": 8,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "linear",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "diagnostics_ignore": NO_RULES,
        **own,
    }


@pytest.fixture
def sft(tmp_path, tiny_model_factory, tiny_tokenizer):
    """`sft(plan, late=plan)`: a trainer; `plan` is done before the diagnostics look at a step, `late` after them."""

    def build(plan=None, late=None, folder="run", peft_config=None, **own):
        trainer = SFTTrainer(
            tiny_model_factory(),
            args=SFTConfig(**common(tmp_path / folder, **own)),
            train_dataset=Dataset.from_dict({"text": TEXTS}),
            processing_class=tiny_tokenizer,
            callbacks=[At(plan or {})],
            peft_config=peft_config,
        )
        trainer.add_callback(At(late or {}))
        return trainer

    return build


@pytest.fixture
def grpo(tmp_path, tiny_model_factory, tiny_tokenizer_factory):
    """`grpo(reward, plan, ours=True)`: our trainer or TRL's."""

    def build(reward, plan, ours=True, **own):
        settings = common(tmp_path, num_generations=4, **{"max_completion_length": 6} | own)
        more = {
            "train_dataset": Dataset.from_dict({"prompt": SENTENCES}),
            "processing_class": tiny_tokenizer_factory(),
        }
        if ours:
            return GRPOTrainer(tiny_model_factory(), reward, args=GRPOConfig(**settings), callbacks=[At(plan)], **more)
        import trl

        watcher = DiagnosticsCallback(ignore=settings.pop("diagnostics_ignore"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return trl.GRPOTrainer(
                tiny_model_factory(), reward, args=trl.GRPOConfig(**settings), callbacks=[At(plan), watcher], **more
            )

    return build


def ask(change, **more):
    return lambda run, **_: run.apply(change, actor="test", **more)


def states_of(trainer):
    with open(f"{trainer.args.output_dir}/outspoken/changes.jsonl", encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    for record in records:
        schemas.validate(record)
    return [(record["state"], record["step"]) for record in records], records


def record_of(trainer):
    with open(f"{trainer.args.output_dir}/outspoken/run.json", encoding="utf-8") as file:
        record = json.load(file)
    schemas.validate(record)
    return record


def rates(trainer):
    return {log["step"]: log["learning_rate"] for log in trainer.state.log_history if "learning_rate" in log}


def linear(step, peak, total=8):
    return peak * (total - (step - 1)) / total


def weights_in(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def is_checkpoint(found, optimizer_state, path, model):
    """Whether weights and optimizer moments are those of a checkpoint, bit by bit."""
    saved = load_file(os.path.join(path, "model.safetensors"))
    moments = torch.load(os.path.join(path, "optimizer.pt"), weights_only=True)["state"]
    return all(torch.equal(found[name], saved[name]) for name in saved) and all(
        torch.equal(value, moments[i][key])
        for i, state in optimizer_state.items()
        for key, value in state.items()
        if isinstance(value, torch.Tensor)
    )


def snapshot(run, model=None, optimizer=None, **_):
    state = {
        i: {k: v.clone() for k, v in s.items() if isinstance(v, torch.Tensor)}
        for i, s in optimizer.state_dict()["state"].items()
    }
    return weights_in(model), state


def test_verified(sft):
    trainer = sft({2: ask({"learning_rate": 5e-4}, expect=expect("loss", "below", 100, within_steps=5, min_n=2))})
    trainer.train()
    states, records = states_of(trainer)
    assert states == [("requested", 2), ("applied", 2), ("verified", 4)]
    assert records[-1]["observed"]["signal"] == "loss" and records[-1]["observed"]["n"] == 2
    assert record_of(trainer)["config"]["learning_rate"] == trainer.args.learning_rate == 5e-4


def test_not_met_and_taken_back_without_a_checkpoint(sft):
    """The settings go back, the weights stay; the schedule goes on as if nothing had been."""
    trainer = sft(
        {2: ask({"learning_rate": 5e-4, "max_grad_norm": 0.1}, expect=NEVER), 4: snapshot}, late={4: snapshot}
    )
    trainer.train()
    states, records = states_of(trainer)
    assert states == [("requested", 2), ("applied", 2), ("failed", 4), ("rolled_back", 4)]
    assert "settings only" in records[-1]["reason"]
    assert trainer.args.learning_rate == 1e-3 and trainer.args.max_grad_norm == 1.0
    for step, rate in rates(trainer).items():
        assert rate == pytest.approx(linear(step, 5e-4 if step in (3, 4) else 1e-3)), step
    run = record_of(trainer)
    assert (
        run["segment"] == 2
        and run["config"]["learning_rate"] == 1e-3
        and run["config_rev"] == records[0]["config_rev"]
    )
    before, after = (c.said[-1][0] for c in trainer.callback_handler.callbacks if isinstance(c, At))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_not_met_and_kept_when_no_rollback_was_wanted(sft):
    trainer = sft({2: ask({"learning_rate": 5e-4}, expect=NEVER, rollback_on_failure=False)})
    trainer.train()
    states, _ = states_of(trainer)
    assert states == [("requested", 2), ("applied", 2), ("failed", 4)] and trainer.args.learning_rate == 5e-4


def test_not_met_and_back_to_the_checkpoint(sft):
    """Weights and moments are those of the newest checkpoint from before the change; the schedule goes on."""
    trainer = sft(
        {3: ask({"learning_rate": 5e-4}, expect=NEVER)}, late={5: snapshot}, save_strategy="steps", save_steps=2
    )
    trainer.train()
    states, records = states_of(trainer)
    assert states == [("requested", 3), ("applied", 3), ("failed", 5), ("rolled_back", 5)]
    path = os.path.join(trainer.args.output_dir, "checkpoint-2")
    assert path in records[-1]["reason"]
    late = [c for c in trainer.callback_handler.callbacks if isinstance(c, At)][-1]
    assert is_checkpoint(*late.said[0], path, trainer.model)
    assert trainer.state.global_step == 8
    for step, rate in rates(trainer).items():
        assert rate == pytest.approx(linear(step, 5e-4 if step in (4, 5) else 1e-3)), step
    # A checkpoint written after that continues with the old peak.
    saved = torch.load(os.path.join(trainer.args.output_dir, "checkpoint-8", "optimizer.pt"), weights_only=True)
    assert saved["param_groups"][0]["initial_lr"] == pytest.approx(1e-3)


def test_an_adapter_goes_back_to_its_checkpoint(sft):
    from peft import LoraConfig

    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    settings = {"save_strategy": "steps", "save_steps": 2, "peft_config": adapter}
    trainer = sft({3: ask({"learning_rate": 5e-4}, expect=NEVER)}, late={4: snapshot, 5: snapshot}, **settings)
    trainer.train()
    states, _ = states_of(trainer)
    assert states[-1] == ("rolled_back", 5)
    saved = load_file(os.path.join(trainer.args.output_dir, "checkpoint-2", "adapter_model.safetensors"))
    late = [c for c in trainer.callback_handler.callbacks if isinstance(c, At)][-1]
    before, after = (weights for weights, _ in late.said)
    lora = {name.replace(".default", ""): name for name in after if "lora_" in name}
    assert lora.keys() == saved.keys()
    assert all(torch.equal(after[lora[name]], saved[name]) for name in saved)
    assert not all(torch.equal(before[lora[name]], saved[name]) for name in saved)


def test_a_checkpoint_of_the_step_of_the_change_is_from_before_it(sft):
    """It is written after the change was made, but no step was taken with it."""
    trainer = sft(
        {2: ask({"learning_rate": 5e-4}, expect=NEVER)}, late={4: snapshot}, save_strategy="steps", save_steps=2
    )
    trainer.train()
    _, records = states_of(trainer)
    assert "checkpoint-2" in records[-1]["reason"]
    for step, rate in rates(trainer).items():
        assert rate == pytest.approx(linear(step, 5e-4 if step in (3, 4) else 1e-3)), step


def test_a_deleted_checkpoint_is_no_checkpoint(sft):
    trainer = sft(
        {3: ask({"learning_rate": 5e-4}, expect=expect("time/step", "below", 0, within_steps=4, min_n=1))},
        save_strategy="steps",
        save_steps=2,
        save_total_limit=1,
    )
    trainer.train()
    _, records = states_of(trainer)
    assert records[-1]["state"] == "rolled_back" and "settings only" in records[-1]["reason"]


def test_harm_in_a_run(grpo):
    """Long completions are rewarded, and the change cuts them from 6 tokens to 3; no rule looks, the reward tells."""

    def length(completion_ids, **_):
        return [len(ids) + (sum(ids) % 9 - 4) / 4 for ids in completion_ids]

    promise = expect("completions/max_length", "below", 1, 30, 5)
    trainer = grpo(length, {12: ask({"max_completion_length": 3}, expect=promise)}, max_steps=24)
    trainer.train()
    states, records = states_of(trainer)
    assert states == [("requested", 12), ("applied", 12), ("failed", 22), ("rolled_back", 22)]
    failed = records[2]
    assert failed["reason"].startswith("reward went from")
    assert failed["observed"]["goal_before"] == pytest.approx(6, abs=0.5)
    assert failed["observed"]["goal_after"] == pytest.approx(3, abs=0.5) and failed["observed"]["goal_t"] < -4
    assert trainer.args.max_completion_length == 6


def test_a_new_error_in_a_run(sft):
    """The loss turns NaN two steps after the change: NUM001 fires, and the change is taken back."""
    trainer = sft({2: ask({"max_grad_norm": 0.5})}, diagnostics_ignore=None)
    compute_loss = trainer.compute_loss

    def planted(*args, **kwargs):
        loss = compute_loss(*args, **kwargs)
        return loss + math.nan if trainer.state.global_step == 3 else loss

    trainer.compute_loss = planted
    trainer.train()
    states, records = states_of(trainer)
    assert states == [("requested", 2), ("applied", 2), ("failed", 4), ("rolled_back", 4)]
    assert records[2]["reason"] == "NUM001 fired after the change" and trainer.args.max_grad_norm == 1.0


def test_thirty_harmless_steps(sft):
    trainer = sft({2: ask({"max_grad_norm": 0.5})}, max_steps=34, logging_steps=10)
    trainer.train()
    states, records = states_of(trainer)
    assert states == [("requested", 2), ("applied", 2), ("verified", 32)]
    assert "no harm within 30 steps" in records[-1]["reason"]


def test_the_run_ends_during_a_trial(sft):
    trainer = sft({6: ask({"max_grad_norm": 0.5}), 8: lambda run, **_: (run.path / "control" / "x.json").touch()})
    trainer.train()
    states, records = states_of(trainer)
    assert states[:2] == [("requested", 6), ("applied", 6)] and records[-1]["id"] == "x"
    assert record_of(trainer)["config"]["max_grad_norm"] == 0.5


def planted_nan(trainer, step):
    compute_loss = trainer.compute_loss

    def planted(*args, **kwargs):
        loss = compute_loss(*args, **kwargs)
        return loss + math.nan if trainer.state.global_step == step - 1 else loss

    trainer.compute_loss = planted


def go_back(run, name="back", **_):
    """Ask for the newest good checkpoint of before the NaN, and half the rate."""
    found = [d for d in run.diagnostics() if d["code"] == "NUM001"]
    request = {
        "schema": "outspoken.request/1",
        "id": name,
        "kind": "apply",
        "actor": "test",
        "patch": change_field("learning_rate", 1e-3, 5e-4),
        "suggestion": None,
        "diagnostic": found[0]["id"],
        "expect": None,
        "rollback_on_failure": True,
        "restore": True,
        "time": 0.0,
    }
    schemas.validate(request)
    (run.path / "control" / f"{name}.json").write_text(json.dumps(request))
    return found[0]


def test_going_back_to_before_the_trouble(sft):
    """Checkpoints at 2, 4 and 6; the NaN at 5. The one of 6 is bad, that of 4 from before the onset."""
    trainer = sft(
        {7: go_back}, late={7: snapshot}, save_strategy="steps", save_steps=2, diagnostics_ignore=None, max_steps=10
    )
    planted_nan(trainer, 5)
    trainer.train()
    states, records = states_of(trainer)
    assert states == [("requested", 7), ("applied", 7)]
    path = os.path.join(trainer.args.output_dir, "checkpoint-4")
    assert path in records[-1]["reason"]
    early, late = (c for c in trainer.callback_handler.callbacks if isinstance(c, At))
    assert early.said[0]["onset_step"] == 5
    assert is_checkpoint(*late.said[0], path, trainer.model)
    for step, rate in rates(trainer).items():
        assert rate == pytest.approx(linear(step, 1e-3 if step <= 7 else 5e-4, 10)), step


def test_going_back_further_than_there_are_checkpoints(sft):
    trainer = sft({7: go_back}, save_strategy="steps", save_steps=4, diagnostics_ignore=None)
    planted_nan(trainer, 3)
    trainer.train()
    states, records = states_of(trainer)
    assert states == [("requested", 7), ("rejected", 7)] and "no good checkpoint" in records[-1]["reason"]
    assert trainer.args.learning_rate == 1e-3 and record_of(trainer)["segment"] == 0


@pytest.mark.parametrize("ours", (True, False), ids=("ours", "TRL's"))
def test_rollouts_of_a_policy_that_was_thrown_away(grpo, ours):
    """Two passes over each batch of rollouts; taken back between them, the next step samples anew."""
    calls = []

    def rewarded(completion_ids, **_):
        calls.append(1)
        return [float(sum(ids) % 7) for ids in completion_ids]

    own = {"num_iterations": 2, "save_strategy": "steps", "save_steps": 2, "max_steps": 7}
    trainer = grpo(rewarded, {3: ask({"learning_rate": 5e-4}, expect=NEVER)}, ours, **own)
    trainer.train()
    states, _ = states_of(trainer)
    assert states == [("requested", 3), ("applied", 3), ("failed", 5), ("rolled_back", 5)]
    # Batches for steps 1-2, 3-4, 5, and after the rollback again for 6, and 7.
    assert len(calls) == 5


# ------------------------------------------------------------------------------------------ over a resume


def test_a_change_outlives_a_resume(sft, capsys):
    """Changed after step 2, saved at 4, started again with the script's own settings: the change holds."""
    settings = {"save_strategy": "steps", "save_steps": 4, "max_steps": 10}
    whole = sft({2: ask({"learning_rate": 5e-4, "max_grad_norm": 0.3})}, folder="whole", **settings)
    whole.train()

    def stop(run, **_):
        raise KeyboardInterrupt

    first = sft({2: ask({"learning_rate": 5e-4, "max_grad_norm": 0.3}), 6: stop}, **settings)
    with pytest.raises(KeyboardInterrupt):
        first.train()
    assert record_of(first)["status"] == "interrupted"
    capsys.readouterr()
    second = sft(**settings)
    second.train(resume_from_checkpoint=True)
    assert (
        "resumed with the changes made before step 4: learning_rate=0.0005, max_grad_norm=0.3"
        in capsys.readouterr().err
    )
    assert (second.args.learning_rate, second.args.max_grad_norm) == (5e-4, 0.3)
    run = record_of(second)
    assert run["id"] == record_of(first)["id"] and run["config"]["learning_rate"] == 5e-4
    assert {s: r for s, r in rates(second).items() if s > 4} == {s: r for s, r in rates(whole).items() if s > 4}
    for a, b in zip(second.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)
    segments = [line["segment"] for line in _metrics(second) if "time/step" in line["signals"]]
    assert segments == [0, 0, 1, 1, 1] + [2] * 6  # steps 1-2, 3-5 (5 was thrown away, 6 not observed), 5-10


def _metrics(trainer):
    with open(f"{trainer.args.output_dir}/outspoken/metrics.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_a_change_after_the_checkpoint_does_not_hold(sft):
    def stop(run, **_):
        raise KeyboardInterrupt

    settings = {"save_strategy": "steps", "save_steps": 2}
    first = sft({3: ask({"max_grad_norm": 0.3}), 4: stop}, **settings)
    with pytest.raises(KeyboardInterrupt):
        first.train()
    second = sft(**settings)
    second.train(resume_from_checkpoint=True)
    assert second.args.max_grad_norm == 1.0 and record_of(second)["config"]["max_grad_norm"] == 1.0


def test_an_edited_script_wins(sft):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    sft({1: ask({"max_grad_norm": 0.3})}, **settings).train()
    again = sft(max_grad_norm=0.7, **settings | {"max_steps": 6})
    again.train(resume_from_checkpoint=True)
    assert again.args.max_grad_norm == 0.7 and record_of(again)["config"]["max_grad_norm"] == 0.7


def test_a_resume_over_odd_lines(sft, capsys):
    """A history that cannot be replayed is told of; the run is watched all the same."""
    settings = {"save_strategy": "steps", "save_steps": 4}
    first = sft(**settings)
    first.train()
    path = f"{first.args.output_dir}/outspoken/metrics.jsonl"
    odd = [{"step": 2, "signals": {"loss": "x"}, "nonfinite": 3}, {"step": True, "signals": {}}, ["a list"], "\x00"]
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in odd)
        file.write('{"step": 9, "torn')
    capsys.readouterr()
    second = sft(**settings | {"max_steps": 10})
    second.train(resume_from_checkpoint=True)
    told = [line for line in capsys.readouterr().err.splitlines() if "note:" in line]
    assert len(told) == 1 and "diagnostics failed in replay" in told[0], told
    run = record_of(second)
    assert (run["status"], run["id"], run["step"]) == ("finished", record_of(first)["id"], 10)
    with open(path, "rb") as file:
        tail = [json.loads(line) for line in file.read().splitlines()[-3:]]
    assert [line["step"] for line in tail if "time/step" in line["signals"]] == [9, 10]
    assert {line["segment"] for line in tail} == {1}


def test_checkpoints_between_the_onset_of_an_error_and_its_alarm_are_not_good():
    from outspoken.diagnostics.callback import DiagnosticsCallback, _Checkpoint

    callback = DiagnosticsCallback()
    callback._checkpoints = [_Checkpoint(step, f"checkpoint-{step}", True) for step in (5, 9, 25)]
    callback._distrust_checkpoints({"state": "firing", "severity": "warning", "onset_step": 1})
    callback._distrust_checkpoints({"state": "resolved", "severity": "error", "onset_step": 1})
    assert all(c.good for c in callback._checkpoints)
    callback._distrust_checkpoints({"state": "firing", "severity": "error", "onset_step": 9})
    assert [c.good for c in callback._checkpoints] == [True, False, False]
