"""Verdicts: the table of docs/architecture.md, state by state, on made series."""

import math
import random

import numpy as np
import pytest

from outspoken.diagnostics.engine import Engine
from outspoken.diagnostics.progress import progress
from outspoken.diagnostics.records import Observation
from outspoken.diagnostics.verdict import STATES, decide, nothing_yet


def engine_after(values, name="reward", method="grpo", more=None, seed=0):
    """An engine without rules that has seen a series, with other constant signals beside it."""
    e = Engine(method=method, config={}, rules={})
    for step, value in enumerate(values, 1):
        e.observe(Observation(step, {name: value, **(more or {})}))
    return e


def noisy(means, sd, seed=0):
    rng = random.Random(seed)
    return [m + rng.gauss(0, sd) for m in means]


RISING = noisy([0.2 + 0.4 * i / 100 for i in range(100)], 0.05)
FLAT = noisy([0.5] * 100, 0.01)
NOISY = noisy([0.5] * 60, 0.2)
RANGE = {"rewards/range": 1.0, "rewards/min_seen": 0.0, "rewards/max_seen": 1.0}


def state(values, firing=(), held=(), final=False, **kwargs):
    e = engine_after(values, **kwargs)
    return decide(e.view, dict(firing), dict(held), final).state


@pytest.mark.parametrize(
    ("expected", "arguments"),
    [
        ("warming_up", {"values": RISING[:10]}),
        ("unknown", {"values": RISING[:5], "final": True}),
        ("improving", {"values": RISING}),
        ("improving", {"values": [-v for v in RISING], "name": "loss", "method": "sft"}),
        ("plateauing", {"values": FLAT, "more": RANGE}),
        ("unknown", {"values": NOISY, "more": RANGE}),  # a change of 5 % of the range could not have shown
        ("converged", {"values": [v + 0.48 for v in FLAT], "more": RANGE}),
        ("broken", {"values": RISING, "firing": {"NUM001": "error"}}),
        ("broken", {"values": RISING, "firing": {"RL004": "error"}}),
        ("improving", {"values": RISING, "firing": {"RL004": "warning"}}),  # one constant function of several
        ("collapsing", {"values": RISING, "firing": {"RL033": "error"}}),
        ("collapsing", {"values": FLAT, "firing": {"RL006": "warning", "NUM006": "warning"}}),
        ("stalled_no_signal", {"values": FLAT, "firing": {"RL001": "error"}}),
        ("stalled_no_signal", {"values": FLAT, "firing": {"RL016": "error"}, "held": {"RL003": "error"}}),
        ("improving", {"values": RISING, "firing": {"RL001": "warning"}}),
        ("converged", {"values": FLAT, "firing": {"RL002": "info"}}),
        ("drifting", {"values": FLAT, "firing": {"RL007": "warning"}, "more": RANGE}),
        (
            "over_optimising",
            {"values": [-v for v in RISING], "name": "loss", "method": "sft", "firing": {"SFT001": "warning"}},
        ),
    ],
)
def test_states(expected, arguments):
    assert state(**arguments) == expected


def test_over_optimising_needs_a_held_out_reward_that_falls():
    e = Engine(method="grpo", config={}, rules={})
    for step, value in enumerate(RISING, 1):
        e.observe(Observation(step, {"reward": value}))
        if step % 10 == 0:
            e.observe(Observation(step, {"eval_reward": 0.6 - 0.004 * step + 0.01 * math.sin(step)}))
    assert decide(e.view, {}, {}).state == "over_optimising"


def test_held_out_improvement_raises_confidence():
    e = Engine(method="grpo", config={}, rules={})
    for step, value in enumerate(RISING, 1):
        e.observe(Observation(step, {"reward": value}))
        if step % 10 == 0:
            e.observe(Observation(step, {"eval_reward": 0.2 + 0.004 * step + 0.01 * math.sin(step)}))
    verdict = decide(e.view, {}, {})
    assert (verdict.state, verdict.confidence) == ("improving", "high")


def test_a_gain_that_came_at_once_is_seen():
    values = noisy([0.2] * 10 + [0.6] * 90, 0.1)
    p = progress(engine_after(values).view)
    assert p.up() and p.total.n1 == 10


def test_a_new_state_must_last_but_a_collapse_counts_at_once():
    e = engine_after(RISING)
    assert e.verdict()["state"] == "improving"
    tracker = e.tracker
    flat = decide(e.view, {"RL007": "warning"}, {})  # still rising: drifting is not said
    assert flat.state == "improving"
    assert tracker.update(e.view, {"RL033": "error"}, {}).state == "collapsing"
    assert tracker.update(e.view, {}, {}).state == "collapsing"  # the way back has to last
    e.view.step += 25
    assert tracker.update(e.view, {}, {}).state == "improving"


def test_every_state_is_known():
    assert nothing_yet().state in STATES and len(set(STATES)) == 10


@pytest.mark.parametrize("seed", range(20))
def test_stationary_noise_is_not_called_a_change(seed):
    """|T| > 3.5 against two widths of beginning and one neighbour; a verdict of change on noise is a false one."""
    values = noisy([0.5] * 120, 0.1, seed)
    assert decide(engine_after(values, more=RANGE).view, {}, {}).state in ("unknown", "plateauing")


# ------------------------------------------------------------------- methods that learn which of two answers is better


def compared(
    method="dpo", seed=0, steps=120, batch=16, rows=None, noise=0.2, rate=0.3, every=0, held_out=256, config=None, more=None
):  # fmt: skip
    """An engine after a simulated run: a linear model learns from noisy comparisons in 64 dimensions by gradient descent.

    Each row is a difference x of two answers; its label is the sign of a fixed direction's product with x, or random
    with probability `noise`. Metrics are those of a batch before its update, as trainers log them. `rows` are visited
    again and again where they are fewer than `steps * batch`. `every`: steps between evaluations of new rows.
    """
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=64)

    def draw(n):
        x = rng.normal(size=(n, 64))
        return x, np.where(rng.random(n) < noise, rng.choice([-1.0, 1.0], n), np.sign(x @ truth))

    rows = rows or steps * batch
    (x, y), (new_x, new_y) = draw(rows), draw(held_out)
    weights = rng.normal(size=64) * 0.1 if method == "reward" else np.zeros(64)  # a reward model's head is random
    settings = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": 1, "beta": 0.1, **(config or {})}
    engine = Engine(method=method, config=settings, rules={}, total_steps=steps)

    def measured(margins, sides, prefix=""):
        loss = np.logaddexp(0, -margins).mean()
        if method == "kto":
            rewards = margins * sides
            found = {}
            if 0 < (sides > 0).sum() < len(sides):  # a batch may hold answers of one kind only
                found = {"rewards/margins": rewards[sides > 0].mean() - rewards[sides < 0].mean()}
            loss = (1 / (1 + np.exp(margins))).mean()
        else:
            margin, accuracy = MARGIN_AND_ACCURACY[method]
            found = {margin: margins.mean(), accuracy: (margins > 0).mean()}
        return {f"{prefix}{name}": float(value) for name, value in {**found, "loss": loss}.items()}

    for step in range(1, steps + 1):
        start = (step - 1) * batch % rows
        if start == 0:
            order = rng.permutation(rows)
        batch_x, batch_y = x[order[start : start + batch]], y[order[start : start + batch]]
        margins = batch_y * (batch_x @ weights)
        epoch = step * batch / rows
        engine.observe(Observation(step, {**measured(margins, batch_y), **(more(step) if more else {})}, epoch=epoch))
        pull = batch_y / (1 + np.exp(margins))
        weights = weights + rate * min(1, step / 10) * pull @ batch_x / batch
        if every and step % every == 0:
            found = measured(new_y * (new_x @ weights), new_y, "eval_")
            took = {"eval_runtime": 0.5, "eval_samples_per_second": 2.0 * held_out}
            engine.observe(Observation(step, {**found, **took}, epoch=epoch))
    engine.finish()
    return engine


MARGIN_AND_ACCURACY = {"dpo": ("rewards/margins", "rewards/accuracies"), "reward": ("margin", "accuracy")}
METHODS = ("dpo", "kto", "reward")
THREE_PASSES, TWENTY_PASSES = {"rows": 640}, {"rows": 96}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("settings", [{}, {"steps": 60}, THREE_PASSES], ids=("one pass", "short", "three passes"))
@pytest.mark.parametrize("seed", range(3))
def test_learning_to_compare_is_improving(method, settings, seed):
    verdict = compared(method, seed, **settings).verdict()
    assert (verdict["state"], verdict["confidence"]) == ("improving", "medium")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "settings",
    [{}, {"steps": 60, "batch": 4}, THREE_PASSES, TWENTY_PASSES, {"rate": 3.0}],
    ids=("one pass", "short", "three passes", "twenty passes", "high rate"),
)
@pytest.mark.parametrize("seed", range(3))
def test_random_labels_are_not_improving(method, settings, seed):
    """Also where they are learned by heart: after twenty passes the pairs trained on are told apart."""
    engine = compared(method, seed, noise=1.0, **settings)
    if settings is TWENTY_PASSES:
        assert progress(engine.view).up()
        if method != "kto":
            assert engine.view.median(MARGIN_AND_ACCURACY[method][1], 10) > 0.7
    assert engine.verdict()["state"] == "unknown"


@pytest.mark.parametrize("method", ["dpo", "reward"])
def test_held_out_pairs_decide_where_the_first_pass_is_too_short(method):
    short = {"rows": 96, "batch": 8, "steps": 60}
    learned = compared(method, **short)
    assert learned.verdict()["state"] == "unknown" and "held-out" in learned.verdict()["reason"]
    confirmed = compared(method, **short, every=10).verdict()
    assert (confirmed["state"], confirmed["confidence"]) == ("improving", "high")
    refuted = compared(method, **short, every=10, noise=1.0, held_out=1000).verdict()
    assert refuted["state"] == "stalled_no_signal"
    assert any(e["signal"].startswith("eval_") and e["n"] == 1000 for e in refuted["evidence"])


def test_one_early_evaluation_at_chance_is_no_verdict():
    """The first may come before anything can be learned; three say it, or those there are when the run is over."""
    for evaluations, expected in ((2, "unknown"), (3, "stalled_no_signal")):
        e = Engine(method="dpo", config={}, rules={})
        for step in range(1, 41):
            e.observe(Observation(step, {"rewards/margins": 0.01 * (-1) ** step}, epoch=step / 60))
            if step > 40 - evaluations:
                held_out = {"eval_rewards/accuracies": 0.5, "eval_runtime": 1.0, "eval_samples_per_second": 400.0}
                e.observe(Observation(step, held_out, epoch=step / 60))
        assert decide(e.view, {}, {}).state == expected
        assert decide(e.view, {}, {}, final=True).state == "stalled_no_signal"


@pytest.mark.parametrize("method", ["dpo", "reward"])
def test_thousands_of_pairs_at_chance_carry_no_signal(method):
    verdict = compared(method, noise=1.0, steps=260).verdict()
    assert verdict["state"] == "stalled_no_signal"
    assert verdict["evidence"][-1]["n"] == 2080  # the newer half of 260 x 16


def test_memorised_after_the_window_moved_on():
    """520 steps after its first pass the engine's windows hold repeated pairs only; what the first pass told stands."""
    settings = {"steps": 700, "batch": 8, "rows": 8 * 120}
    assert compared("dpo", **settings).verdict()["state"] == "improving"
    assert compared("dpo", **settings, noise=1.0).verdict()["state"] == "unknown"


def test_the_margin_of_answers_that_all_become_unlikely_is_no_improvement():
    def shift(step):
        return {"shift/chosen": -0.005 * step, "shift/rejected": -0.01 * step}

    verdict = compared(more=shift).verdict()
    assert verdict["state"] == "drifting" and "0.58 nats a token" in verdict["reason"]  # median of steps 111 to 120
    assert verdict["evidence"][-1]["signal"] == "shift/chosen"
    assert compared(more=shift, config={"loss_type": ["apo_down"]}).verdict()["state"] == "improving"
    assert compared(more=lambda step: {"shift/chosen": -0.001 * step}).verdict()["state"] == "improving"


def test_the_same_without_lengths():
    """beta 0.1, reward -3: 30 nats lost of 50 that the reference gave, 60 %; or of 300."""
    lost = compared(more=lambda step: {"rewards/chosen": -3.0 * step / 120, "logps/chosen": -50 - 30.0 * step / 120})
    assert lost.verdict()["state"] == "drifting" and "fell by 5" in lost.verdict()["reason"]
    long = compared(more=lambda step: {"rewards/chosen": -3.0 * step / 120, "logps/chosen": -300 - 30.0 * step / 120})
    assert long.verdict()["state"] == "improving"


def test_a_margin_that_grows_with_the_loss_is_not_trusted():
    verdict = compared(more=lambda step: {"loss": 0.7 + 0.01 * step + 0.01 * (step % 3)}).verdict()
    assert verdict["state"] == "unknown" and "so does the loss" in verdict["reason"]


def test_losses_without_a_margin_are_judged_by_the_loss():
    """`sft` alone maximises likelihood, and its margin may do what it likes; `ipo` compares means per token."""
    falling, rising = noisy([1 - 0.004 * i for i in range(100)], 0.05), noisy([0.01 * i for i in range(100)], 0.05)
    for loss_type, expected in ((["sft"], "improving"), ("ipo", "improving"), (["sigmoid", "sft"], "drifting")):
        e = Engine(method="dpo", config={"loss_type": loss_type}, rules={})
        for step, (loss, margin) in enumerate(zip(falling, rising), 1):
            e.observe(Observation(step, {"loss": loss, "rewards/margins": -margin}, epoch=step / 100))
        e.finish()
        assert e.verdict()["state"] == expected, loss_type


def test_without_epochs_improving_is_a_guess():
    e = Engine(method="dpo", config={}, rules={})
    for step, value in enumerate(noisy([0.01 * i for i in range(100)], 0.1), 1):
        e.observe(Observation(step, {"rewards/margins": value}))
    e.finish()
    assert (e.verdict()["state"], e.verdict()["confidence"]) == ("improving", "low")


def test_a_moving_reference_takes_the_margin_back():
    """The reference moves at step 80, and margins start anew: no drift, unless nobody moved the reference."""
    values = noisy([0.02 * (i % 80) for i in range(110)], 0.05)
    states = []
    for moves in (False, True):
        e = Engine(method="dpo", config={"sync_ref_model": moves}, rules={})
        for step, value in enumerate(values, 1):
            e.observe(Observation(step, {"rewards/margins": value}, epoch=step / 110))
        states.append(decide(e.view, {}, {}).state)
    assert states == ["drifting", "unknown"]


@pytest.mark.parametrize("method", METHODS)
def test_over_optimising_when_held_out_pairs_get_worse(method):
    def evaluation(step):
        return (
            {f"eval_{'margin' if method == 'reward' else 'rewards/margins'}": 1 - 0.1 * step / 12}
            if step % 12 == 0
            else {}
        )

    verdict = compared(method, more=evaluation).verdict()
    assert verdict["state"] == "over_optimising"
