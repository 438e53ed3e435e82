"""SFT001: held-out loss up, training loss down."""

import jsonpatch
import numpy as np
import pytest

from outspoken.diagnostics.engine import Engine
from outspoken.diagnostics.records import Observation
from outspoken.diagnostics.rules.registry import PAGE_SECTIONS, all_rules

RULE = all_rules()["SFT001"]
CONFIG = {"learning_rate": 2e-5, "num_train_epochs": 5, "load_best_model_at_end": False}
TRAIN = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5]


def watch(evals, train=TRAIN, every=10, config=CONFIG, method="sft", epochs=5.0, more=None):
    """One evaluation after each `every` steps of constant training loss, and its transitions without reminders."""
    total = every * len(evals)
    engine = Engine(method=method, config=config, total_steps=total, rules={"SFT001": RULE})
    transitions = []
    for step in range(1, total + 1):
        i = (step - 1) // every
        signals = {"loss": train[i], **(more or {})}
        if step % every == 0 and evals[i] is not None:
            signals["eval_loss"] = evals[i]
        transitions += engine.observe(Observation(step, signals, epoch=epochs * step / total if epochs else None))
    assert engine.failed_rules() == {}
    return engine, [t.record for t in transitions if t.kind == "transition"]


def test_page():
    assert [line[3:] for line in RULE.page.splitlines() if line.startswith("## ")] == list(PAGE_SECTIONS)


def test_overfitting():
    _, (record,) = watch([1.2, 1.0, 1.05, 1.1])
    assert (record["step"], record["onset_step"], record["severity"]) == (40, 20, "warning")
    # (1.1 - 1.0)/1.0 = 10 %
    assert record["message"] == (
        "eval_loss rose from 1 (step 20) to 1.1 (step 40), by 10.0% (limit 1%), while loss fell from 0.9 to 0.7."
    )
    # 40 steps are 5 epochs, so step 20 is epoch 2.5: 3
    assert record["advice"] == (
        "Stop and keep the checkpoint of step 20; consider changing num_train_epochs from 5 to 3 and "
        "load_best_model_at_end from False to True."
    )
    config = dict(CONFIG)
    for suggestion in record["suggestions"]:
        config = jsonpatch.apply_patch(config, suggestion["patch"])
    assert config == {"learning_rate": 1e-5, "num_train_epochs": 3, "load_best_model_at_end": True}
    assert record["suggestions"][0]["when"] == "earlier_checkpoint"


def test_the_epoch_is_reckoned_where_it_is_not_logged():
    _, (record,) = watch([1.2, 1.0, 1.05, 1.1], epochs=None)
    assert record["suggestions"][0]["patch"][1]["value"] == 3  # 20 of 40 steps of 5 epochs


def test_without_config_in_words():
    _, (record,) = watch([1.2, 1.0, 1.05, 1.1], config={})
    assert record["advice"].endswith("train less long, or at half the learning_rate.")
    assert all(not s["patch"] for s in record["suggestions"])


@pytest.mark.parametrize(
    ("evals", "train"),
    [
        ([1.2, 1.1, 1.0, 0.9, 0.85, 0.84], TRAIN),  # still falling
        ([1.2, 1.0, 1.005, 1.009, 1.005, 1.009], TRAIN),  # flat within 1 %
        ([1.2, 1.0, 1.05, 0.99, 1.03, 0.98], TRAIN),  # never twice in a row
        ([1.2, 1.0, 1.05, 1.1, 1.15, 1.2], [1.0, 0.9, 0.95, 1.0, 1.05, 1.1]),  # both rise: that is NUM009's
        ([1.0, 1.0, 1.0, 1.0, 1.0, 1.0], TRAIN),
    ],
    ids=["falling", "flat", "wobble", "both rise", "constant"],
)
def test_healthy_evaluations(evals, train):
    assert watch(evals, train)[1] == []


def test_three_evaluations_are_too_few():
    engine, records = watch([1.0, 1.1, 1.2])
    assert records == [] and engine.not_checked()[0]["reason"] == "eval_loss: 3 evaluations, 4 needed"


def test_without_evaluation_it_is_not_judged():
    engine, records = watch([None] * 4)
    assert records == [] and engine.not_checked()[0]["reason"] == "eval_loss is not measured"


def test_a_known_standard_error_widens_the_limit():
    assert watch([1.2, 1.0, 1.05, 1.1], more={"eval_loss_se": 0.06})[1] == []  # 1 + 2*0.06 = 1.12
    assert watch([1.2, 1.0, 1.05, 1.1], more={"eval_loss_se": 0.02})[1]  # 1.04


def test_it_resolves_when_a_better_evaluation_comes():
    _, records = watch([1.2, 1.0, 1.05, 1.1, 0.9, 0.8])
    assert [r["state"] for r in records] == ["firing", "resolved"]


def test_rl_has_no_held_out_loss_that_means_anything():
    assert watch([1.2, 1.0, 1.05, 1.1], method="unknown", more={"reward": 1.0})[1] == []
    assert watch([1.2, 1.0, 1.05, 1.1], method="unknown")[1]


def test_healthy_runs_of_noisy_evaluations():
    """200 runs of 10 evaluations that fall by half and wobble by 0.3 %, as on a fixed set of some hundred rows."""
    alarms = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        level = 1 + np.exp(-np.arange(10) / 3)
        evals = level * (1 + 0.003 * rng.normal(size=10))
        train = 1.5 * np.exp(-np.arange(10) / 20)
        alarms += bool(watch([float(v) for v in evals], [float(v) for v in train], every=2)[1])
    assert alarms <= 2
