"""SYS012: sensors that fell silent or froze."""

import math

import numpy as np
import pytest

from outspoken.diagnostics.engine import Engine
from outspoken.diagnostics.records import Observation
from outspoken.diagnostics.rules.registry import PAGE_SECTIONS, all_rules

RULE = all_rules()["SYS012"]


def watch(row, steps, method="sft", config=None):
    """The engine after `steps` steps of row(step), and its transitions without reminders."""
    engine = Engine(method=method, config=config or {}, rules={"SYS012": RULE})
    transitions = []
    for step in range(1, steps + 1):
        transitions += engine.observe(Observation.from_raw(step, row(step)))
    assert engine.failed_rules() == {}
    return engine, [t.record for t in transitions if t.kind == "transition"]


def lively(step):
    """What jitters in a living run."""
    noise = np.random.default_rng(step).normal(size=3)
    return {"loss": 2 + 0.1 * noise[0], "grad_norm": math.exp(0.3 * noise[1]), "step_time": 1 + 0.01 * noise[2] ** 2}


def test_page():
    assert [line[3:] for line in RULE.page.splitlines() if line.startswith("## ")] == list(PAGE_SECTIONS)


def test_a_signal_that_falls_silent_is_named_with_the_rules_that_need_it():
    def row(step):
        full = lively(step)
        return full if step <= 100 else {"loss": full["loss"]}

    _, records = watch(row, 200)
    record = records[0]
    assert (record["severity"], record["state"]) == ("info", "firing")
    assert 100 < record["step"] <= 160
    absent = record["step"] - 100
    assert record["message"] == f"grad_norm has not been logged for {absent} steps (usually every 1)."
    # step_time fell silent too, but no rule needs it.
    assert "NUM005" in record["advice"] and "NUM008" in record["advice"]
    assert record["suggestions"][0]["applicability"] == "inspect" and record["suggestions"][0]["patch"] == []


def test_it_resolves_when_the_signal_returns():
    def row(step):
        full = lively(step)
        return {"loss": full["loss"]} if 100 < step <= 180 else full

    _, records = watch(row, 300)
    assert [r["state"] for r in records] == ["firing", "resolved"]


def test_evaluations_and_sparse_logging_are_not_silence():
    def row(step):
        full = {"loss": lively(step)["loss"]}
        if step % 10 == 0:
            full["grad_norm"] = lively(step)["grad_norm"]
        if step % 50 == 0:
            full["eval_loss"] = 1.0 + 1 / step
        return full

    assert watch(row, 700)[1] == []


def test_a_signal_that_turned_into_nan_is_not_silent():
    def row(step):
        return {**lively(step), **({"grad_norm": math.nan} if step > 100 else {})}

    assert watch(row, 200)[1] == []


def test_a_frozen_gradient_norm():
    def row(step):
        return {**lively(step), **({"grad_norm": 0.73125} if step > 100 else {})}

    _, records = watch(row, 200)
    assert records[0]["message"] == "grad_norm is exactly 0.73125 on the last 20 points."
    assert 120 <= records[0]["step"] <= 160


@pytest.mark.parametrize(
    "frozen",
    [
        {"grad_norm": 0.0},  # NUM008's business
        {"grad_norm": 1.0},  # few digits: logged after clipping, or rounded
        {"kl": 0.0001},
        {"clip_ratio/region_mean": 0.0},
        {"completions/max_length": 2048.0},
        {"completions/mean_length": 2047.8125},
        {"learning_rate": 1.2345678e-6},
        {"reward": 0.123456},
        {"memory/peak_reserved": 27.123456},
        {"frac_reward_zero_std": 0.96875},
    ],
)
def test_what_may_stand_still(frozen):
    for method in ("sft", "grpo"):
        assert watch(lambda step: {**lively(step), **frozen}, 120, method=method)[1] == []


def test_the_loss_of_rl_may_stand_still():
    def row(step):
        return {**lively(step), "loss": 0.123456, "reward": 0.5}

    assert watch(row, 120, method="grpo")[1] == []
    assert watch(row, 120, method="unknown")[1] == []
    assert watch(lambda step: {**lively(step), "loss": 0.123456}, 120)[1]


def test_what_cannot_exist_is_not_missed():
    def row(step):
        return {**lively(step), "reward": 0.1 * (step % 7), **({"kl": 0.01 * (1 + step % 5)} if step < 50 else {})}

    silent = watch(row, 300, method="grpo", config={"beta": 0.04})[1]
    assert any("kl has not been logged" in r["message"] for r in silent)
    assert watch(row, 300, method="grpo", config={"beta": 0})[1] == []


def test_50_healthy_runs():
    for seed in range(50):
        rng = np.random.default_rng(seed)
        every = int(rng.integers(1, 6))

        def row(step, every=every, seed=seed):
            full = lively(1000 * seed + step)
            return full if step % every == 0 else {"step_time": full["step_time"]}

        assert watch(row, 150)[1] == []
