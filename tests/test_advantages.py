"""Group-relative advantages against the formulas, written out in numpy."""

import math
import warnings

import numpy as np
import pytest
import torch

from outspoken.trainers.advantages import nan_std, normalize_then_sum, sum_then_normalize, weighted_sum

NAN = math.nan


def by_hand(groups, scale):
    """(r - mean_g) / (std + 1e-4) with numpy's ddof=1, unscorable completions left out and given 0."""
    groups = np.asarray(groups, dtype=np.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy warns of groups without two values
        centred = groups - np.nanmean(groups, axis=1, keepdims=True)
        std = {
            "group": np.nanstd(groups, axis=1, ddof=1, keepdims=True),
            "batch": np.nanstd(groups, ddof=1),
            "none": None,
        }[scale]
    advantages = centred if std is None else centred / (std + 1e-4)
    return np.nan_to_num(advantages).reshape(-1)


GROUPS = {
    "plain": [[1.0, 0.0, 0.0, 1.0], [3.0, 1.0, 2.0, 0.0]],
    "no spread in one": [[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 1.0]],
    "some not scorable": [[1.0, NAN, 0.0, 0.5], [NAN, NAN, 2.0, 4.0]],
    "one scorable": [[NAN, 3.0, NAN, NAN], [0.0, 1.0, 1.0, 0.0]],
    "none scorable": [[NAN, NAN, NAN, NAN], [0.0, 1.0, 1.0, 0.0]],
}


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("case", GROUPS)
def test_formula(case, scale):
    groups = torch.tensor(GROUPS[case])
    found = sum_then_normalize(groups.reshape(-1, 1), torch.ones(1), group_size=4, scale=scale)
    np.testing.assert_allclose(found.advantages.numpy(), by_hand(GROUPS[case], scale), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found.rewards.numpy(), groups.reshape(-1).numpy())


def test_worked_example():
    """Rewards 1 0 0 1: mean 1/2, Bessel-corrected variance 4 * 1/4 / 3 = 1/3."""
    found = sum_then_normalize(torch.tensor([[1.0], [0.0], [0.0], [1.0]]), torch.ones(1), 4, "group")
    z = 0.5 / (math.sqrt(1 / 3) + 1e-4)
    assert found.advantages.tolist() == pytest.approx([z, -z, -z, z])
    assert found.std.tolist() == pytest.approx([math.sqrt(1 / 3)] * 4)


def test_advantages_of_a_group_sum_to_zero():
    rewards = torch.randn(24, 1, generator=torch.Generator().manual_seed(0))
    for scale in ("group", "batch", "none"):
        sums = sum_then_normalize(rewards, torch.ones(1), 6, scale).advantages.view(-1, 6).sum(1)
        assert sums.abs().max() < 1e-4


def test_weights_and_functions_that_do_not_apply():
    rewards = torch.tensor([[1.0, 10.0], [NAN, 20.0], [2.0, NAN], [NAN, NAN]])
    total = weighted_sum(rewards, torch.tensor([2.0, 0.1]))
    assert total[:3].tolist() == pytest.approx([3.0, 2.0, 4.0]) and math.isnan(total[3])


def test_normalize_then_sum_formula():
    """Each function's z-scores within the group, weighted, summed, then z-scored over the batch."""
    rewards = np.array([[1.0, 100.0], [0.0, 300.0], [0.5, 200.0], [2.0, 0.0], [1.0, 0.0], [4.0, 50.0]])
    weights = np.array([1.0, 0.5])
    z = np.empty_like(rewards)
    for start in (0, 3):
        group = rewards[start : start + 3]
        z[start : start + 3] = (group - group.mean(0)) / (group.std(0, ddof=1) + 1e-4)
    combined = z @ weights
    expected = (combined - combined.mean()) / (combined.std(ddof=1) + 1e-4)
    found = normalize_then_sum(
        torch.tensor(rewards, dtype=torch.float32), torch.tensor(weights, dtype=torch.float32), 3
    )
    np.testing.assert_allclose(found.advantages.numpy(), expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.rewards.numpy(), rewards @ weights, rtol=1e-6)


def test_normalize_then_sum_leaves_unscorable_at_zero():
    rewards = torch.tensor([[1.0, NAN], [0.0, 2.0], [NAN, NAN], [3.0, 1.0]])
    found = normalize_then_sum(rewards, torch.ones(2), 2)
    assert found.advantages[2] == 0.0 and math.isnan(found.rewards[2])
    assert torch.isfinite(found.advantages).all()


def test_one_completion_per_prompt():
    """As evaluation allows: nothing to compare with, advantage 0."""
    found = sum_then_normalize(torch.tensor([[1.0], [5.0]]), torch.ones(1), 1, "group")
    assert found.advantages.tolist() == [0.0, 0.0] and found.std.tolist() == [0.0, 0.0]
    lone = sum_then_normalize(torch.tensor([[1.0]]), torch.ones(1), 1, "batch")
    assert lone.advantages.tolist() == [0.0] and lone.std.tolist() == [0.0]


@pytest.mark.parametrize("dim", [None, 0, 1])
def test_nan_std_is_numpys(dim):
    x = np.random.default_rng(0).normal(size=(5, 4))
    x[1, 2] = x[3, 0] = x[3, 1] = np.nan
    np.testing.assert_allclose(nan_std(torch.tensor(x), dim).numpy(), np.nanstd(x, axis=dim, ddof=1), rtol=1e-6)


def test_nan_std_of_fewer_than_two_values_is_unknown():
    assert torch.isnan(nan_std(torch.tensor([[1.0, NAN], [NAN, NAN]]), dim=1)).all()


def test_unknown_scale_is_refused():
    with pytest.raises(ValueError, match="scale_rewards is 'sum'; use 'group', 'batch' or 'none'"):
        sum_then_normalize(torch.zeros(4, 1), torch.ones(1), 2, "sum")
