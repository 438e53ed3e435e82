"""Verdicts: the table of docs/architecture.md, state by state, on made series."""

import math
import random

import pytest

from outspoken.diagnostics.engine import Engine
from outspoken.diagnostics.records import Observation
from outspoken.diagnostics.verdict import STATES, decide, nothing_yet, progress


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
