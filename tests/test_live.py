"""Live changes: which fields, on which trainers, and that a change takes effect as if the run had begun with it."""

import ast
import copy
import dataclasses
import inspect
import json
import math
import os
import textwrap
import warnings

import pytest
import torch
from datasets import Dataset
from torch.optim.lr_scheduler import LambdaLR, LinearLR, OneCycleLR, SequentialLR, StepLR
from transformers import LlamaForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from outspoken import DiagnosticsCallback, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer, schemas
from outspoken.agent_api.run import RequestRefused, Run
from outspoken.diagnostics import live
from outspoken.diagnostics.records import change_field
from outspoken.trainers.config import live_fields

GROUP, ROWS = 4, 8
SENTENCES = ["The sky is blue and", "What is 2 + 2? It", "green grass", "the quick brown fox jumps", "It is", "dog"]
AT_ONCE = {"signal": "time/step", "direction": "above", "value": 0, "within_steps": 5, "min_n": 1}  # surely comes
NEVER = {"signal": "time/step", "direction": "below", "value": 0, "within_steps": 1, "min_n": 1}


class Agent(TrainerCallback):
    """Does `plan[step](run)` when that step has ended, and keeps what came back."""

    def __init__(self, plan):
        self.plan, self.said, self.rates = plan, [], {}

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        self.rates[state.global_step + 1] = [group["lr"] for group in optimizer.param_groups]
        if state.global_step in self.plan:
            self.said.append(self.plan[state.global_step](Run(args.output_dir)))


class Scores:
    """Two reward functions that keep the completions they saw."""

    def __init__(self):
        self.seen = []

    def functions(self):
        def spread(completion_ids, **_):
            self.seen.append([list(ids) for ids in completion_ids])
            return [(sum(ids) % 9 - 4) / 4 for ids in completion_ids]

        def shortness(completion_ids, **_):
            return [-float(len(ids)) / 4 for ids in completion_ids]

        return [spread, shortness]


@pytest.fixture
def make(tmp_path, tiny_model_factory, tiny_tokenizer_factory):
    """`make(kind, agent=None, **settings)`: a watched trainer; the agent acts before the diagnostics look."""
    made = []

    def build(kind, agent=None, scores=None, optimizers=(None, None), watcher=None, **settings):
        made.append(kind)
        common = {
            "output_dir": str(tmp_path / f"{kind}-{len(made)}"),
            "max_steps": 6,
            "per_device_train_batch_size": ROWS,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": True,
            "bf16": False,
            "disable_tqdm": True,
            **settings,
        }
        callbacks = [agent] if agent else []
        if kind not in ("sft", "grpo") or watcher:
            callbacks.append(watcher or DiagnosticsCallback())
        model, tokenizer = tiny_model_factory(), tiny_tokenizer_factory()
        texts = Dataset.from_dict({"text": [s + t for s in SENTENCES for t in SENTENCES]})
        prompts = Dataset.from_dict({"prompt": [s + t[:5] for s in SENTENCES for t in SENTENCES]})
        functions = (scores or Scores()).functions()
        more = {"callbacks": callbacks, "processing_class": tokenizer, "optimizers": optimizers}
        if kind != "plain":
            common["gradient_checkpointing"] = False
        if kind.endswith("grpo"):
            common = {"num_generations": GROUP, "max_completion_length": 6} | common
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if kind == "sft":
                return SFTTrainer(model, args=SFTConfig(**common), train_dataset=texts, **more)
            if kind == "grpo":
                return GRPOTrainer(model, functions, args=GRPOConfig(**common), train_dataset=prompts, **more)
            if kind == "plain":
                rows = [
                    {"input_ids": ids, "labels": ids} for ids in tokenizer([s * 2 for s in SENTENCES])["input_ids"]
                ]
                shortest = min(len(row["input_ids"]) for row in rows)
                rows = [{k: v[:shortest] for k, v in row.items()} for row in rows] * 6
                data = Dataset.from_list(rows)
                return Trainer(model, args=TrainingArguments(**common), train_dataset=data, **more)
            import trl

            if kind == "trl-grpo":
                trainer = _with_reference(trl.GRPOTrainer, tiny_model_factory)
                return trainer(model, functions, args=trl.GRPOConfig(**common), train_dataset=prompts, **more)
            pairs = {"prompt": SENTENCES * 6, "chosen": [" yes it is"] * 36, "rejected": [" no", " never ever"] * 18}
            data, reference = Dataset.from_dict(pairs), tiny_model_factory(seed=1)
            if kind == "trl-kto":
                data = data.rename_column("chosen", "completion").remove_columns("rejected")
                data = data.add_column("label", [True, True, False] * 12)
                return trl.KTOTrainer(model, reference, args=trl.KTOConfig(**common), train_dataset=data, **more)
            if kind == "trl-reward":
                config = type(model.config)(**{**model.config.to_dict(), "id2label": {0: "score"}, "label2id": {}})
                with torch.random.fork_rng():
                    torch.manual_seed(0)
                    model = LlamaForSequenceClassification(config)
                return trl.RewardTrainer(model, args=trl.RewardConfig(**common), train_dataset=data, **more)
            return trl.DPOTrainer(model, reference, args=trl.DPOConfig(**common), train_dataset=data, **more)

    return build


def _with_reference(trainer, tiny_model_factory):
    """TRL loads GRPO's reference model by name; here it is made, like the model."""
    module = inspect.getmodule(trainer)

    def build(*args, **kwargs):
        original = module.create_model_from_path
        module.create_model_from_path = lambda *a, **k: tiny_model_factory()
        try:
            return trainer(*args, **kwargs)
        finally:
            module.create_model_from_path = original

    return build


def record_of(trainer, name="run.json"):
    with open(f"{trainer.args.output_dir}/outspoken/{name}", encoding="utf-8") as file:
        return json.load(file)


def changes_of(trainer):
    """Change id -> states in order, and the latest record; each line valid."""
    states, latest = {}, {}
    with open(f"{trainer.args.output_dir}/outspoken/changes.jsonl", encoding="utf-8") as file:
        for line in file:
            record = json.loads(line)
            schemas.validate(record)
            states.setdefault(record["id"], []).append(record["state"])
            latest[record["id"]] = record
    return states, latest


def metrics_of(trainer):
    with open(f"{trainer.args.output_dir}/outspoken/metrics.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def weights(trainer):
    return [p.detach().clone() for p in trainer.model.parameters()]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ------------------------------------------------------------------------------------------ the learning rate


def cosine(step, peak, warmup, total):
    """The rate of a step: linear warm-up, then half a cosine to 0 (transformers' `get_cosine_schedule_with_warmup`)."""
    done = step - 1
    if done < warmup:
        return peak * done / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (done - warmup) / (total - warmup)))


@pytest.mark.parametrize("kind", ("sft", "plain", "trl-grpo"))
@pytest.mark.parametrize("changed_at", (2, 6), ids=("in the warm-up", "after it"))
def test_learning_rate(make, kind, changed_at):
    agent = Agent({changed_at: lambda run: run.apply({"learning_rate": 4e-4}, actor="test")})
    trainer = make(kind, agent, max_steps=10, warmup_steps=4, lr_scheduler_type="cosine")
    trainer.train()
    logged = {log["step"]: log["learning_rate"] for log in trainer.state.log_history if "learning_rate" in log}
    observed = {line["step"]: line["signals"]["learning_rate"] for line in metrics_of(trainer)}
    for step in range(1, 11):
        rate = cosine(step, 1e-3 if step <= changed_at else 4e-4, 4, 10)
        assert logged[step] == pytest.approx(rate, rel=1e-9, abs=1e-15), step
        assert observed[step] == pytest.approx(rate, rel=1e-9, abs=1e-15), step
    assert trainer.args.learning_rate == 4e-4

    run = record_of(trainer)
    assert run["config"]["learning_rate"] == 4e-4 and run["segment"] == 1
    assert [line["segment"] for line in metrics_of(trainer)] == [0] * changed_at + [1] * (10 - changed_at)
    states, latest = changes_of(trainer)
    change = latest[agent.said[0]]
    assert states == {agent.said[0]: ["requested", "applied"]}  # the run ended during the trial
    assert change["step"] == changed_at and change["fields"] == {"learning_rate": {"old": 1e-3, "new": 4e-4}}
    assert change["segment"] == 1 and change["config_rev"] == run["config_rev"]


def test_groups_keep_their_ratio(make, tiny_model_factory):
    """Two parameter groups, the second at a tenth of the rate."""
    agent = Agent({3: lambda run: run.apply({"learning_rate": 5e-4}, actor="test")})
    trainer = make("sft", agent, max_steps=6)
    first, *rest = trainer.model.parameters()
    optimizer = torch.optim.AdamW([{"params": rest, "lr": 1e-3}, {"params": [first], "lr": 1e-4}])
    trainer.optimizer, trainer.lr_scheduler = optimizer, LambdaLR(optimizer, lambda n: 1 - n / 10)
    trainer.train()
    for step in range(2, 7):
        share = 1 - (step - 1) / 10
        peak = 1e-3 if step <= 3 else 5e-4
        if step != 4:  # at step 4 the agent looked before the change
            assert agent.rates[step] == pytest.approx([peak * share, peak / 10 * share]), step
    lines = metrics_of(trainer)
    assert lines[3]["signals"]["learning_rate"] == pytest.approx(5e-4 * 0.7)


@pytest.mark.parametrize("name", ("lambda", "step", "sequential", "one_cycle", "none"))
def test_schedules_keep_their_shape(name):
    """Twice the peak from the fourth step on: the rates of the untouched schedule, doubled from there."""
    make = {
        "lambda": lambda o: LambdaLR(o, lambda n: 1 / (n + 1)),
        "step": lambda o: StepLR(o, 2, gamma=0.5),
        "sequential": lambda o: SequentialLR(o, [LinearLR(o, 0.1, 1, 5), LambdaLR(o, lambda n: 0.9**n)], [6]),
        "one_cycle": lambda o: OneCycleLR(o, [1e-2, 1e-3], total_steps=20, cycle_momentum=False),
        "none": lambda o: None,
    }[name]

    def run(change):
        args = type("Args", (), {"learning_rate": 1e-2})()
        parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
        optimizer = torch.optim.SGD([{"params": [p], "lr": 1e-2 / 10**i} for i, p in enumerate(parameters)])
        scheduler, rates = make(optimizer), []
        for step in range(12):
            if step == 4 and change:
                live.set_learning_rate(args, 2e-2, optimizer, scheduler)
                assert args.learning_rate == 2e-2
                if scheduler is not None:
                    assert scheduler.get_last_lr() == [group["lr"] for group in optimizer.param_groups]
            rates.append([group["lr"] for group in optimizer.param_groups])
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
        return rates

    untouched, changed = run(False), run(True)
    for step, (a, b) in enumerate(zip(untouched, changed)):
        assert b == pytest.approx([rate * (1 if step < 4 else 2) for rate in a]), step


# ------------------------------------------------------------------------------------------ as if begun with it

# Field -> (value at start, value after step 1, further settings). The learning rate is 0 in step 1 and the optimizer
# keeps no moments, so that a run changed after step 1 must end with the weights of one that began with the new value.
OBJECTIVE = {
    "beta": (0.1, 2.0, {}),
    "epsilon": (0.2, 0.001, {"num_iterations": 2, "beta": 0.0}),
    "epsilon_high": (0.2, 0.001, {"num_iterations": 2, "beta": 0.0}),
    "epsilon_high from unset": (None, 0.001, {"num_iterations": 2, "beta": 0.0}),
    "scale_rewards": ("group", "none", {"beta": 0.0}),
    "mask_truncated_completions": (False, True, {"beta": 0.0}),
    "reward_weights": ([1.0, 1.0], [0.2, 3.0], {"beta": 0.0}),
    "reward_weights from unset": (None, [0.2, 3.0], {"beta": 0.0}),
    "max_grad_norm": (1.0, 0.1, {"beta": 0.0}),
    "learning_rate": (0.5, 0.25, {"beta": 0.0}),
}
CASES = [(kind, name) for kind in ("grpo", "trl-grpo") for name in OBJECTIVE]
CASES += [("grpo", "loss_type"), ("grpo", "delta"), ("sft", "loss_type"), ("sft", "label_smoothing_factor")]
CASES += [("trl-kto", name) for name in ("beta", "desirable_weight", "undesirable_weight")]
CASES += [("trl-reward", "center_rewards_coefficient")]
CASES += [("trl-dpo", "beta"), ("trl-dpo", "max_grad_norm"), ("plain", "max_grad_norm"), ("plain", "learning_rate")]
OTHER = {
    # Long enough for some completions to end by themselves: at equal lengths the losses are equal.
    # a rate at which completions go on ending: those of one length would score alike under both
    ("grpo", "loss_type"): ("dapo", "grpo", {"max_completion_length": 64, "learning_rate": 0.02}),
    ("grpo", "delta"): (None, 0.5, {}),
    ("sft", "loss_type"): ("nll", "dft", {}),
    ("sft", "label_smoothing_factor"): (0.0, 0.3, {}),
    ("trl-dpo", "beta"): (0.1, 0.7, {}),
    ("trl-kto", "beta"): (0.1, 0.7, {}),
    ("trl-kto", "desirable_weight"): (1.0, 1.5, {}),
    ("trl-kto", "undesirable_weight"): (1.0, 0.0, {}),
    ("trl-reward", "center_rewards_coefficient"): (0.01, 1.0, {}),
}


QUICK = [("grpo", "beta"), ("trl-grpo", "epsilon_high"), ("trl-dpo", "beta"), ("sft", "loss_type")]
QUICK += [("trl-reward", "center_rewards_coefficient")]


@pytest.mark.parametrize(
    ("kind", "name"), [pytest.param(*case, marks=[pytest.mark.slow] if case not in QUICK else []) for case in CASES]
)
def test_as_if_the_run_had_begun_with_it(make, kind, name):
    old, new, more = OTHER.get((kind, name)) or OBJECTIVE[name]
    field = name.split()[0]
    more = {k: v for k, v in more.items() if kind.endswith("grpo")}
    settings = {"optim": "sgd", "learning_rate": 0.5, "warmup_steps": 1, "max_steps": 4} | more

    def train(value, plan=None):
        own = {} if value is None else {field: value}
        agent = Agent(plan or {})
        trainer = make(kind, agent, **settings | own)
        trainer.train()
        return trainer, agent

    changed, agent = train(old, {1: lambda run: run.apply({field: new}, actor="test")})
    states, latest = changes_of(changed)
    assert states[agent.said[0]] == ["requested", "applied"], latest
    assert getattr(changed.args, field) == new == record_of(changed)["config"][field]
    begun, _ = train(new)
    untouched, _ = train(old)
    assert equal(weights(changed), weights(begun))
    assert not equal(weights(changed), weights(untouched)), "the field made no difference: the test shows nothing"


SAMPLING = {
    "max_completion_length": (6, 3),
    "temperature": (1.0, 0.5),
    "top_p": (1.0, 0.9),
    "top_k": (0, 5),
    "min_p": (None, 0.05),
    "repetition_penalty": (1.0, 1.3),
}


@pytest.mark.parametrize("kind", ("grpo", "trl-grpo"))
def test_sampling(make, kind):
    """All fields of sampling at once: what `generate` is given from the next step on."""
    wanted = {name: new for name, (_, new) in SAMPLING.items()}
    if kind == "trl-grpo":
        del wanted["temperature"]  # its head keeps the temperature that it was built with
    agent = Agent({2: lambda run: run.apply(wanted, actor="test")})
    scores, used = Scores(), []
    trainer = make(kind, agent, scores, max_steps=4)
    if kind == "grpo":
        sample = trainer.rollouts.generate
        trainer.rollouts.generate = lambda ids, params, **k: used.append(params) or sample(ids, params, **k)
    else:
        generate = trainer.model.generate

        def spy(*args, generation_config=None, **kwargs):
            used.append(copy.deepcopy(generation_config))
            return generate(*args, generation_config=generation_config, **kwargs)

        trainer.model.generate = spy
    trainer.train()
    assert len(used) == 4
    for step, config in enumerate(used, 1):
        for name in wanted:
            given = getattr(config, "max_new_tokens" if name == "max_completion_length" else name)
            assert given == SAMPLING[name][step > 2] or (name == "top_k" and step <= 2 and not given), (name, step)
    longest = [max(map(len, completions)) for completions in scores.seen]
    assert longest == [6, 6, 3, 3]
    assert trainer.args.max_completion_length == 3


def test_temperature_of_sampling_and_scoring(make):
    """At 0.01 the samples of a prompt are nearly all equal, and so sure that their entropy is nothing."""
    agent = Agent({2: lambda run: run.apply({"temperature": 0.01}, actor="test")})
    scores = Scores()
    trainer = make("grpo", agent, scores, max_steps=4)
    trainer.train()
    entropies = [line["signals"]["entropy"] for line in metrics_of(trainer)]
    assert min(entropies[:2]) > 1 and max(entropies[2:]) < 0.1
    different = [
        [len({tuple(ids) for ids in batch[i : i + GROUP]}) for i in range(0, ROWS, GROUP)] for batch in scores.seen
    ]
    assert different[:2] == [[4, 4], [4, 4]] and max(different[2] + different[3]) <= 2


def test_beta_off_and_on_again(make):
    """TRL: rollouts sampled while beta was 0 lack the reference's log-probabilities; they are sampled anew."""
    agent = Agent(
        {
            2: lambda run: run.apply({"beta": 0.0}, actor="test", expect=AT_ONCE),
            3: lambda run: run.apply({"beta": 0.2}, actor="test", expect=AT_ONCE),
        }
    )
    trainer = make("trl-grpo", agent, num_iterations=2, beta=0.1, max_steps=6)
    trainer.train()
    states, _ = changes_of(trainer)
    assert [states[name] for name in agent.said] == [["requested", "applied", "verified"]] * 2
    kl = [line["signals"].get("kl") is not None for line in metrics_of(trainer)]
    assert kl == [True, True, False, True, True, True]


def test_a_rollback_to_unset(make):
    """`epsilon_high` was unset: taken back, the trainer's copy is that of `epsilon` again."""
    for kind in ("trl-grpo", "grpo"):
        agent = Agent({1: lambda run: run.apply({"epsilon_high": 0.4}, actor="test", expect=NEVER)})
        trainer = make(kind, agent, max_steps=4)
        trainer.train()
        states, _ = changes_of(trainer)
        assert states[agent.said[0]] == ["requested", "applied", "failed", "rolled_back"]
        assert trainer.args.epsilon_high is None and record_of(trainer)["config"]["epsilon_high"] is None
        assert getattr(trainer, "epsilon_high", 0.2) == trainer.args.epsilon == 0.2


# ------------------------------------------------------------------------------------------ what is refused


def request(run, patch, name="r1", **more):
    """A request as a program without our agent API would write it."""
    record = {
        "schema": "outspoken.request/1",
        "id": name,
        "kind": "apply",
        "actor": "somebody",
        "patch": patch,
        "suggestion": None,
        "diagnostic": None,
        "expect": None,
        "rollback_on_failure": True,
        "time": 0.0,
        **more,
    }
    (run.path / "control" / f"{name}.json").write_text(json.dumps(record))
    return name


REFUSED = {
    "a stale test": (change_field("learning_rate", 2e-3, 1e-4), "learning_rate is 0.001 now, not 0.002"),
    "out of bounds": (change_field("temperature", 1.0, 11.0), "above its maximum 10.0"),
    "of another type": (change_field("temperature", 1.0, "hot"), "temperature must be a number"),
    "an unknown field": (change_field("learning_rat", 1e-3, 1e-4), "no field of this run's config"),
    "not live": (change_field("num_generations", GROUP, 2), "num_generations cannot be changed while the run trains"),
    "no such choice": (change_field("scale_rewards", "group", "median"), "none of 'group', 'batch', 'none'"),
    "no reference": (change_field("beta", 0.0, 0.1), "no reference model was loaded"),
    "too few weights": (change_field("reward_weights", None, [1.0]), "each of the 2 reward functions"),
    "no weights": (change_field("reward_weights", None, ["a", 1.0]), "each of the 2 reward functions"),
    "a rate of 0": (change_field("learning_rate", 1e-3, 0), "learning_rate=0 stops training"),
    "longer than the model reads": (
        change_field("max_completion_length", 6, 5000),
        "exceeds the model's max_position_embeddings=4096",
    ),
    "nothing to do": (change_field("learning_rate", 1e-3, 1e-3), "learning_rate is 0.001 already"),
    "no checkpoint": (change_field("learning_rate", 1e-3, 1e-4), "no good checkpoint from before"),
    "another operation": ([{"op": "remove", "path": "/learning_rate"}], "patch/0 lacks 'value'"),
}


def test_refusals(make):
    """One request a step, each for another reason; then files that are no requests. Training does not notice."""
    trainer = make("grpo", max_steps=20, learning_rate=1e-3)
    trainer.train()
    expected = weights(trainer)

    plan = {}
    for i, (why, (patch, _)) in enumerate(REFUSED.items(), 1):
        plan[i] = lambda run, i=i, p=patch, r=why == "no checkpoint": request(run, p, f"r{i}", restore=r)
    n = len(REFUSED)

    def garbage(run):
        (run.path / "control" / "garbage.json").write_bytes(b"\x00\xff{not json")

    def huge(run):
        with open(run.path / "control" / "huge.json", "wb") as file:
            file.truncate(50_000_000)

    def link(run):
        secret = run.path.parent / "secret.json"
        secret.write_text(json.dumps({"a": "secret"}))
        os.symlink(secret, run.path / "control" / "link.json")

    def folder(run):
        (run.path / "control" / "folder.json").mkdir()

    plan |= {n + 1: garbage, n + 2: huge, n + 3: link, n + 4: folder}
    trainer = make("grpo", Agent(plan), max_steps=20, learning_rate=1e-3)
    trainer.train()
    assert equal(weights(trainer), expected)
    states, latest = changes_of(trainer)
    for i, (why, (_, reason)) in enumerate(REFUSED.items(), 1):
        unreadable = why == "another operation"  # the schema of requests has no such thing
        assert states[f"r{i}"] == ["requested", "rejected"][unreadable:], why
        assert reason in latest[f"r{i}"]["reason"] and latest[f"r{i}"]["step"] == i, (why, latest[f"r{i}"]["reason"])
    for name, reason in {
        "garbage": "not UTF-8",
        "huge": "larger than",
        "link": "symbolic link",
        "folder": "no regular file",
    }.items():
        assert states[name] == ["rejected"] and reason in latest[name]["reason"], latest[name]["reason"]
    run = record_of(trainer)
    assert run["segment"] == 0 and run["config"]["learning_rate"] == 1e-3 and run["config"]["beta"] == 0.0


def test_two_requests_at_once(make):
    """The first by name is tried; the second, and what comes while it is on trial, is refused."""

    def both(run):
        request(run, change_field("max_grad_norm", 1.0, 0.4), "b")
        return request(run, change_field("learning_rate", 1e-3, 5e-4), "a")

    later = {3: lambda run: request(run, change_field("max_grad_norm", 1.0, 0.3), "c")}
    trainer = make("sft", Agent({2: both} | later))
    trainer.train()
    states, latest = changes_of(trainer)
    assert states == {"a": ["requested", "applied"], "b": ["requested", "rejected"], "c": ["requested", "rejected"]}
    assert "change a was asked for first" in latest["b"]["reason"]
    assert "change a is on trial until step 32" in latest["c"]["reason"]
    assert (trainer.args.learning_rate, trainer.args.max_grad_norm) == (5e-4, 1.0)
    assert os.listdir(f"{trainer.args.output_dir}/outspoken/control") == []


def test_a_run_that_takes_no_requests(make):
    def ask(run):
        with pytest.raises(RequestRefused, match="Live fields: none"):
            run.apply({"learning_rate": 5e-4}, actor="test")
        return request(run, change_field("learning_rate", 1e-3, 5e-4))

    trainer = make("plain", Agent({2: ask}), watcher=DiagnosticsCallback(accept_requests=False))
    trainer.train()
    states, latest = changes_of(trainer)
    assert states == {"r1": ["requested", "rejected"]} and "takes no requests" in latest["r1"]["reason"]
    assert record_of(trainer)["live"] == {} and trainer.args.learning_rate == 1e-3


def test_a_change_that_cannot_be_made(make, monkeypatch):
    """An error halfway: what was set is set back, the record tells, training goes on."""
    apply_fields, calls = live.apply_fields, []

    def fails_once(trainer, args, fields, *rest):
        apply_fields(trainer, args, fields, *rest)
        calls.append(dict(fields))
        if len(calls) == 1:
            raise RuntimeError("planted")

    monkeypatch.setattr(live, "apply_fields", fails_once)
    agent = Agent({2: lambda run: run.apply({"learning_rate": 5e-4}, actor="test")})
    trainer = make("sft", agent)
    trainer.train()
    states, latest = changes_of(trainer)
    assert states[agent.said[0]] == ["requested", "failed"] and "planted" in latest[agent.said[0]]["reason"]
    assert calls == [{"learning_rate": 5e-4}, {"learning_rate": 1e-3}] and trainer.args.learning_rate == 1e-3
    assert record_of(trainer)["segment"] == 0


def test_generation_kwargs_win(make):
    agent = Agent({1: lambda run: request(run, change_field("top_p", 1.0, 0.5))})
    trainer = make("grpo", agent, generation_kwargs={"top_p": 0.8}, max_steps=2)
    trainer.train()
    _, latest = changes_of(trainer)
    assert "generation_kwargs sets top_p, which wins" in latest["r1"]["reason"]


# ------------------------------------------------------------------------------------------ the table of live fields


def test_live_fields_of_each_trainer(make):
    common = {"learning_rate", "max_grad_norm"}
    policy = {"beta", "epsilon", "epsilon_high", "mask_truncated_completions", "reward_weights", "scale_rewards"}
    sampling = SAMPLING.keys() - {"temperature"}
    for kind, expected in (
        ("plain", common),
        ("trl-dpo", common | {"beta"}),
        ("trl-kto", common | {"beta", "desirable_weight", "undesirable_weight"}),
        ("trl-reward", common | {"center_rewards_coefficient"}),
        ("trl-grpo", common | policy | sampling),
        ("grpo", {*live_fields(GRPOConfig)}),
    ):
        trainer = make(kind)
        found = live.live_fields(trainer, trainer.args)
        assert found.keys() == expected, kind
        for name, bounds in found.items():
            value = getattr(trainer.args, name)
            low, high = bounds["minimum"], bounds["maximum"]
            if isinstance(value, int | float) and not isinstance(value, bool):
                assert (low is None or low <= value) and (high is None or value <= high), name
    assert live.live_fields(trainer, trainer.args)["reward_weights"]["type"] == "list"
    assert live.live_fields(trainer, trainer.args)["min_p"]["type"] == "float"


def _reads(cls):
    """Names x of `self.x` that the methods of a class read, its constructor aside."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    return {
        node.attr
        for method in tree.body
        if isinstance(method, ast.FunctionDef) and method.name != "__init__"
        for node in ast.walk(method)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and _is_self(node.value)
    }


def _is_self(node):
    return isinstance(node, ast.Name) and node.id == "self"


@pytest.mark.parametrize("name", live.FOREIGN_LIVE)
def test_trl_reads_each_copy_anew(name):
    """By TRL's source: an attribute that only the constructor reads cannot be live. And temperature is such a one."""
    import trl
    from trl.generation.vllm_generation import VLLMGeneration

    trainer = getattr(trl, name)
    config = getattr(trl, name.replace("Trainer", "Config"))
    reads, sampled = _reads(trainer), _reads(VLLMGeneration)
    fields = {f.name for f in dataclasses.fields(config)}
    for field, foreign in live.FOREIGN_LIVE[name].items():
        assert field in fields, field
        if not foreign.copies:
            assert f"self.args.{field}" in inspect.getsource(trainer.compute_loss), field
        for path in foreign.copies:
            holder, _, attribute = path.rpartition(".")
            if holder == "vllm_generation":
                assert attribute in sampled and "vllm_generation" in reads, path
            elif holder == "generation_config":
                assert "generation_config" in reads
            elif attribute not in reads:  # its only use is in the generation config
                assert any(copy.startswith("generation_config.") for copy in foreign.copies), path
    assert "temperature" not in reads


# ------------------------------------------------------------------------------------------ the config on record


def test_config_of_masks_secrets_and_is_json(tmp_path):
    args = GRPOConfig(
        output_dir=str(tmp_path),
        hub_token="hf_secret1",
        use_cpu=True,
        bf16=False,
        num_generations=8,
        model_init_kwargs={"token": "hf_secret2", "dtype": "float32", "nested": {"password": "hf_secret3"}},
    )
    config = live.config_of(args)
    text = json.dumps(config, allow_nan=False)
    assert "hf_secret" not in text and config["hub_token"] == "<masked>"
    assert config["model_init_kwargs"]["dtype"] == "float32" and config["world_size"] == 1
    assert config["lr_scheduler_type"] == "linear" and isinstance(config["accelerator_config"], dict)
    assert not any(name.startswith("_") for name in config)


def test_config_of_anything():
    class Rude:
        def __repr__(self):
            raise ValueError("no")

    @dataclasses.dataclass
    class Args:
        a: object = dataclasses.field(default_factory=Rude)
        b: float = math.nan
        c: object = dataclasses.field(default_factory=lambda: {1: {2: [3, {4}]}})
        d: str = "x"

    assert live.config_of(Args()) == {
        "a": "<Rude>",
        "b": "nan",
        "c": {"1": {"2": [3, [4]]}},
        "d": "x",
        "world_size": 1,
    }
