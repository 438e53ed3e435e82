"""Runs of the offline methods that really train, ours and TRL's, watched: signals, method, verdict.

A pair can be told apart by its words: those of the sky against those of the fox. With random labels it cannot.
"""

import math
import random

import pytest
from datasets import Dataset
from transformers import PrinterCallback

from outspoken import schemas
from outspoken.diagnostics.signals import SIGNALS, impossible, lookup, weight_of

SKY, FOX = ("blue", "green", "sky", "grass"), ("dog", "fox", "lazy", "brown")
STEPS, BATCH = 50, 8


def answers(rows, noise=0.0, seed=0):
    """(prompt, chosen, rejected); with probability `noise` a pair's order is random."""
    rng = random.Random(seed)
    for _ in range(rows):
        pair = [f" {rng.choice(words)} {rng.choice(words)}" for words in (SKY, FOX)]
        if rng.random() < noise:
            rng.shuffle(pair)
        yield f"What is {rng.randrange(100)} + {rng.randrange(100)}?", *pair


def pairs(rows, noise=0.0, seed=0):
    return Dataset.from_list([{"prompt": p, "chosen": c, "rejected": r} for p, c, r in answers(rows, noise, seed)])


def unpaired(rows, noise=0.0, seed=0):
    """Every other row holds the chosen answer, labelled true, the rest the rejected one."""
    made = enumerate(answers(rows, noise, seed))
    return Dataset.from_list(
        [{"prompt": p, "completion": (r, c)[i % 2], "label": bool(i % 2)} for i, (p, c, r) in made]
    )


@pytest.fixture
def train(tmp_path, tiny_model_factory, tiny_model_dir, tiny_tokenizer, watched_run):
    """`train(method, theirs=False, noise=0, evaluated=None, **settings)`: a `WatchedRun`.

    `evaluated`: rows of a held-out set, or name -> rows of several.
    """
    made = []

    def go(method, theirs=False, noise=0.0, rows=STEPS * BATCH, evaluated=None, **settings):
        import outspoken
        from outspoken import DiagnosticsCallback

        if theirs:
            import trl as source
        else:
            source = outspoken
        name = {"dpo": "DPO", "kto": "KTO", "reward": "Reward", "sft": "SFT"}[method]
        make = unpaired if method == "kto" else pairs
        dataset = make(rows, noise)
        held_out = make(evaluated, noise, seed=1) if isinstance(evaluated, int) else evaluated
        if isinstance(evaluated, dict):
            held_out = {name: make(number, noise, seed=1) for name, number in evaluated.items()}
        if method == "sft":
            dataset = dataset.rename_column("chosen", "completion").remove_columns("rejected")
        defaults = {
            "output_dir": str(tmp_path / f"run-{len(made)}"),
            "max_steps": STEPS,
            "per_device_train_batch_size": BATCH,
            "per_device_eval_batch_size": 64,
            "learning_rate": 1e-3 if method == "reward" else 3e-4,
            "lr_scheduler_type": "constant",
            "logging_steps": 10,
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": True,
            "bf16": False,
            "disable_tqdm": True,
            "gradient_checkpointing": False,
        }
        if held_out is not None:
            defaults |= {"eval_strategy": "steps", "eval_steps": 10}
        made.append(method)
        trainer = getattr(source, f"{name}Trainer")(
            _scorer(tiny_model_factory()) if method == "reward" else tiny_model_dir,
            args=getattr(source, f"{name}Config")(**defaults | settings),
            train_dataset=dataset,
            eval_dataset=held_out,
            processing_class=tiny_tokenizer,
            callbacks=[DiagnosticsCallback(sinks=[])],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return watched_run(trainer.args.output_dir, trainer.args)

    return go


def _scorer(model):
    """A reward model of the same size."""
    import torch
    from transformers import AutoModelForSequenceClassification

    config = type(model.config)(**{**model.config.to_dict(), "num_labels": 1, "architectures": None})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_config(config)


METHODS = ("sft", "reward", "dpo", "kto")
slow = pytest.mark.slow
# What our trainers measure beside TRL's metrics.
LABELS = {"samples/no_supervised", "samples/supervised_eos", "samples/truncated", "tokens/supervised_share"}
ANSWERS = {"lengths/chosen", "lengths/rejected"}
REFERENCE = {"shift/chosen", "shift/rejected", "reference/initial_gap", "rewards/length_correlation"}
OURS = {
    "sft": LABELS,
    "dpo": LABELS | ANSWERS | REFERENCE | {"pairs/identical"},
    "kto": LABELS | ANSWERS | REFERENCE | {"samples/desirable"},
    "reward": ANSWERS | {"pairs/identical", "scores/mean", "scores/std", "scores/length_correlation"},
}


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_learns(train, method):
    """The verdict, and that each signal is in the table, for this method and within its bounds."""
    run = train(method)
    assert run.run["method"] == method
    assert run.verdict["state"] == "improving", run.verdict
    schemas.validate(run.run)
    seen = {name for record in run.metrics for name in record["signals"]}
    assert seen >= OURS[method]
    for name in seen:
        row = lookup(name.removesuffix("#n"), method)
        assert row is not None and method in row.methods, name
        values = [record["signals"].get(name) for record in run.metrics]
        low, high = (0, math.inf) if name.endswith("#n") else (row.low, row.high)
        assert all(low <= value <= high for value in values if value is not None), name
    emitted = {name.removesuffix("#n") for name in seen}
    weights = {row.weight for name in emitted if (row := lookup(name, method)) is not None} - {None}
    assert weights <= seen, "a share without its trials"
    rows = run.series("samples/no_supervised#n" if method != "reward" else "pairs/identical#n")
    assert {n for _, n in rows} == {BATCH * (2 if method == "dpo" else 1)}
    assert [d for d in run.diagnostics if d["state"] == "firing" and d["severity"] != "info"] == []


@pytest.mark.parametrize("method", ["dpo", pytest.param("kto", marks=slow), pytest.param("reward", marks=slow)])
def test_a_run_with_random_labels_does_not_learn(train, method):
    assert train(method, noise=1.0).verdict["state"] == "unknown"


@slow
@pytest.mark.parametrize("method", ["dpo", "kto", "reward"])
def test_labels_learned_by_heart_are_not_learning(train, method):
    """32 pairs, seen 12 times: told apart in training, and not where they are new."""
    run = train(method, noise=1.0, rows=32, evaluated=256, learning_rate=1e-3)
    name = "margin" if method == "reward" else "rewards/margins"
    assert run.series(name)[-1][1] > 5 * abs(run.series(f"eval_{name}")[-1][1])
    assert run.verdict["state"] in ("unknown", "stalled_no_signal", "over_optimising"), run.verdict


@slow
@pytest.mark.parametrize("method", ["dpo", "reward"])
def test_held_out_pairs_make_it_sure(train, method):
    """Also where the first pass is too short to tell: 48 pairs, 8 passes."""
    verdict = train(method, rows=48, evaluated=64).verdict
    assert (verdict["state"], verdict["confidence"]) == ("improving", "high")


@pytest.mark.parametrize("method", [pytest.param("sft", marks=slow), "reward", pytest.param("dpo", marks=slow), "kto"])
def test_trls_trainers_are_watched_unchanged(train, method):
    run = train(method, theirs=True)
    assert run.run["trainer"].startswith("trl.") and run.run["method"] == method
    assert run.verdict["state"] == "improving", run.verdict
    seen = {name for record in run.metrics for name in record["signals"] if not name.endswith("#n")}
    assert [name for name in seen if (row := lookup(name, method)) is None or method not in row.methods] == []


@slow
@pytest.mark.parametrize("method", ["dpo", "kto", "reward"])
def test_trls_trainers_with_random_labels(train, method):
    assert train(method, theirs=True, noise=1.0).verdict["state"] == "unknown"


@slow
@pytest.mark.parametrize("method", METHODS)
def test_the_log_of_a_trl_run_tells_the_method(train, method):
    """`trainer_state.json` alone: the method, and TRL's metrics under their names."""
    from outspoken.diagnostics.sources import read

    run = train(method, theirs=True, save_strategy="steps", save_steps=STEPS)
    log = read(run.path.parent / f"checkpoint-{STEPS}")
    assert log.method == method
    assert not any("Kept under their own names" in note for note in log.notes), log.notes
    if method == "reward":
        assert "mean_reward" in log.signals and "reward" not in log.signals


@slow
def test_an_eval_dataset_of_several_pairs_sets(train):
    """Nothing trips over names that carry a dataset's name; accuracies without a number of pairs confirm nothing."""
    run = train("dpo", evaluated={"near": 16, "far": 16})
    assert run.verdict["state"] == "improving"
    assert (run.verdict["confidence"], len(run.series("eval_near_loss"))) == ("medium", STEPS // 10)


def test_the_table_is_sound():
    """Shares lie within [0, 1], the trials behind them are signals, and a divergence of KTO's is not RL's."""
    for row in SIGNALS.values():
        assert row.low <= row.high and row.methods, row.name
        if row.unit.startswith("share"):
            assert (row.low, row.high) == (0, 1), row.name
        if row.weight is not None:
            assert row.unit.startswith("share") and row.weight.removesuffix("#n") in SIGNALS, row.name
        assert (row.impossible is None) == (row.impossible_when == ""), row.name
    assert lookup("kl", "kto").unit == "nats/sequence" and lookup("eval_kl", "kto").unit == "nats/sequence"
    assert lookup("kl").unit == lookup("kl", "grpo").unit == "nats/token"
    assert impossible("kl", "kto", {"loss_type": "apo_zero_unpaired"}) and not impossible("kl", "kto", {})
    assert not impossible("kl", "kto", {"loss_type": "kto", "beta": 0})  # beta=0 removes the reference in RL only
    assert impossible("kl", "dpo", {}) and impossible("entropy", "reward", {}) and impossible("accuracy", "dpo", {})
    assert not impossible("entropy", "gkd", {}) and not impossible("loss", "reward", {})
    assert impossible("samples/truncated", "dpo", {"max_length": None})
    assert not impossible("samples/truncated", "dpo", {"max_length": 8}) and not impossible(
        "samples/truncated", "dpo", {}
    )
    assert weight_of("rewards/accuracies") == "pairs/identical#n"
    assert weight_of("eval_rewards/accuracies") == "eval_pairs/identical#n"  # not those of the training step
