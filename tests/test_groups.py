"""The signals of the reward matrix, by arithmetic and against TRL's own standard deviation."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outspoken.diagnostics.groups import RewardRange, group_signals
from outspoken.diagnostics.signals import lookup

NAN = math.nan


def signals(*groups, seen=None, functions=None):
    return group_signals(list(groups), functions or {}, seen if seen is not None else RewardRange())


def test_signals_of_four_groups_by_hand():
    found = signals([1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1], [0.5, 0.5, 0.51, 0.5])
    # First group: mean 0.5, deviations +-0.5, variance 4 * 0.25 / 3. Last: mean 0.5025, deviations 3 times -0.0025 and
    # once 0.0075, variance (3 * 6.25e-6 + 5.625e-5) / 3 = 2.5e-5.
    first, last = math.sqrt(1 / 3), 0.005
    assert found["groups/count"] == 4
    assert found["groups/zero_std"] == 0.5
    assert found["groups/all_failed"] == 0.25
    assert found["groups/all_passed"] == 0.25
    assert found["groups/tiny_std"] == 0.25  # 0 < 0.005 < 2 % of the range of 1
    assert found["groups/std_mean"] == pytest.approx((first + last) / 4, rel=1e-9)
    assert found["groups/attenuation"] == pytest.approx((first / (first + 1e-4) + last / (last + 1e-4)) / 4, rel=1e-9)
    assert (found["rewards/min_seen"], found["rewards/max_seen"], found["rewards/range"]) == (0, 1, 1)
    assert found["rewards/unscored"] == 0


def test_every_signal_stands_in_the_table():
    found = signals([1.0, NAN, 0.0], functions={"accuracy": [[1.0, NAN, 0.0]]})
    assert [name for name in found if lookup(name) is None] == []


def test_what_cannot_be_scored_is_left_out_and_counted():
    found = signals(
        [1.0, NAN, 1.0, 1.0],  # ties among those that were scored
        [0.0, NAN, NAN, NAN],  # one score is no group
        [NAN, NAN, NAN, NAN],
        [0.0, 1.0, NAN, math.inf],  # infinite is not scorable
        functions={"a": [[1, NAN, 1, 1], [0, NAN, NAN, NAN], [NAN] * 4, [0, 1, NAN, 2]]},
    )
    assert found["groups/count"] == 2
    assert found["groups/zero_std"] == 0.5
    assert found["groups/all_passed"] == 0.5
    assert found["groups/std_mean"] == pytest.approx(math.sqrt(0.5) / 2)  # of 0 and 1: 0.7071, and of the tie: 0
    assert found["rewards/unscored"] == 10 / 16
    assert found["rewards/a/none_share"] == 9 / 16
    assert found["rewards/max_seen"] == 1


def test_no_group_no_shares():
    found = signals([NAN, NAN], [1.0, NAN])
    assert found["groups/count"] == 0
    assert not [name for name in found if name.startswith("groups/") and name != "groups/count"]
    assert found["rewards/unscored"] == 0.75
    assert "rewards/range" not in signals([NAN, NAN])


def test_sums_that_differ_by_rounding_tie():
    assert 0.1 + 0.2 != 0.3
    assert signals([0.1 + 0.2, 0.3])["groups/zero_std"] == 1
    summed, whole = np.float32(0.1) + np.float32(0.8), np.float32(0.9)
    assert summed != whole
    assert signals([float(summed), float(whole)])["groups/zero_std"] == 1
    assert signals([1000.0, 1000.01])["groups/zero_std"] == 0


@pytest.mark.parametrize(("value", "failed"), [(0.0, True), (-1.0, True), (1.0, False), (0.2, False)])
def test_with_one_value_ever_seen_its_sign_decides(value, failed):
    found = signals([value] * 4, [value] * 4)
    assert found["groups/all_failed"] == (1 if failed else 0)
    assert found["groups/all_passed"] == (0 if failed else 1)


def test_the_range_is_that_of_the_whole_run():
    seen = RewardRange()
    signals([-1.0, 3.0], seen=seen)
    found = signals([0.5, 0.5], [2.97, 2.96], [-1.0, -0.96], [-1.0, -0.95], seen=seen)
    assert found["rewards/range"] == 4
    assert found["groups/all_passed"] == 0.25  # at least 3 - 1 % of 4 = 2.96
    assert found["groups/all_failed"] == 0.25  # at most -1 + 0.04 = -0.96; -0.95 is not
    assert found["groups/zero_std"] == 0.25
    assert found["groups/tiny_std"] == 0.75  # spreads of 0.01, 0.04 and 0.05: std 0.035 at most, below 0.08


def test_shapes_are_checked():
    with pytest.raises(
        ValueError, match=r"rewards must be a matrix of B groups by G completions, but have shape \(2,\)"
    ):
        group_signals([1.0, 2.0], {}, RewardRange())
    with pytest.raises(ValueError, match=r"rewards of f have shape \(1, 2\), but the total has \(2, 1\)"):
        group_signals([[1.0], [2.0]], {"f": [[1.0, 2.0]]}, RewardRange())


def test_an_empty_batch_says_only_that_it_is_empty():
    assert group_signals(np.empty((0, 4)), {}, RewardRange()) == {"groups/count": 0.0}


REWARDS = st.lists(
    st.lists(st.one_of(st.sampled_from([0.0, 1.0, 0.5, NAN]), st.floats(-3, 3)), min_size=4, max_size=4),
    min_size=1,
    max_size=6,
)


@settings(max_examples=150, deadline=None)
@given(REWARDS, st.randoms(use_true_random=False))
def test_shares_are_shares_and_order_does_not_matter(rewards, random):
    found = signals(*rewards)
    for name, value in found.items():
        assert math.isfinite(value)
        row = lookup(name)
        assert row.low <= value <= row.high + 1e-12, name
    if found["groups/count"]:
        assert found["groups/zero_std"] + found["groups/tiny_std"] <= 1 + 1e-12
        assert found["groups/all_failed"] + found["groups/all_passed"] <= 1 + 1e-12
        assert found["groups/attenuation"] <= 1 - found["groups/zero_std"] + 1e-12
    shuffled = [random.sample(group, len(group)) for group in random.sample(rewards, len(rewards))]
    assert signals(*shuffled) == pytest.approx(found)


@settings(max_examples=60, deadline=None)
@given(REWARDS, st.sampled_from([0.25, 4.0, 64.0]))
def test_counts_do_not_depend_on_the_unit_of_the_reward(rewards, unit):
    matrix = np.round(np.array(rewards), 3)  # no differences near the tolerance of a tie
    seen, scaled_seen = RewardRange(-3.0, 3.0), RewardRange(-3.0 * unit, 3.0 * unit)
    found, scaled = group_signals(matrix, {}, seen), group_signals(matrix * unit, {}, scaled_seen)
    for name in ("groups/zero_std", "groups/tiny_std", "groups/all_failed", "groups/all_passed"):
        assert found.get(name) == pytest.approx(scaled.get(name)), name


@pytest.mark.slow  # imports TRL
def test_standard_deviations_and_ties_are_those_of_trl():
    import torch
    from trl.trainer.utils import nanstd

    generator = np.random.default_rng(0)
    for _ in range(50):
        rewards = generator.choice([0.0, 0.25, 1.0, NAN], size=(6, 4), p=[0.5, 0.1, 0.3, 0.1])
        rewards[:, :2] = np.nan_to_num(rewards[:, :2])  # two scored completions at least in each group
        std = nanstd(torch.tensor(rewards), dim=1)
        found = signals(*rewards.tolist())
        assert found["groups/std_mean"] == pytest.approx(std.mean().item(), rel=1e-6)
        tied = torch.isclose(std, torch.zeros_like(std)).double().mean().item()
        assert found["groups/zero_std"] == pytest.approx(tied)
        assert found["groups/attenuation"] == pytest.approx((std / (std + 1e-4)).mean().item(), rel=1e-6)
