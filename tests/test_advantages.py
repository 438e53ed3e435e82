"""Advantages against the papers' formulas, written out in numpy and plain Python."""

import itertools
import math
import statistics
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from outspoken.trainers import advantages
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


# One number a completion, from rewards of groups that stand next to each other

CASES = {
    **GROUPS,
    "one a group": [[1.0], [0.0], [NAN]],
    "two a group": [[1.0, 0.0], [2.0, 2.0], [NAN, 1.0]],
    "nothing scorable": [[NAN, NAN], [NAN, NAN]],
    "all equal": [[0.1, 0.1, 0.1], [0.1, 0.1, 0.1]],
    "negative": [[-3.0, 5.0, -1.0], [0.5, -0.5, 0.0]],
}
LENGTHS = [3, 1, 0, 7, 2, 5, 4, 9, 1, 6]


def lengths_of(groups):
    flat = [LENGTHS[i % len(LENGTHS)] for i in range(sum(map(len, groups)))]
    return [flat[i * len(groups[0]) : (i + 1) * len(groups[0])] for i in range(len(groups))]


def known(rewards):
    return [r for r in rewards if not math.isnan(r)]


def rloo_by_hand(groups):
    """r_i less the mean of the others; NaN where there is nothing to compare."""
    rows = []
    for group in groups:
        for i, r in enumerate(group):
            others = known(group[:i] + group[i + 1 :])
            rows.append(r - sum(others) / len(others) if others and not math.isnan(r) else NAN)
    return rows


def opo_by_hand(groups):
    rows = []
    for group, lengths in zip(groups, lengths_of(groups)):
        pairs = [(r, n) for r, n in zip(group, lengths) if not math.isnan(r)]
        tokens = sum(n for _, n in pairs)
        rows += [r - sum(x * n for x, n in pairs) / tokens if tokens else NAN for r in group]
    return rows


def centred_by_hand(groups):
    return [r - sum(known(group)) / len(known(group)) if known(group) else NAN for group in groups for r in group]


def useless(group):
    return len(set(known(group))) < 2


def gpg_by_hand(groups):
    total = sum(len(known(group)) for group in groups)
    useful = sum(len(known(group)) for group in groups if not useless(group))
    return [x * total / useful if useful else 0.0 for x in centred_by_hand(groups)]


def best_by_hand(groups):
    """max of all less max of all but i."""
    rows = []
    for group in groups:
        for i, r in enumerate(group):
            others = known(group[:i] + group[i + 1 :])
            rows.append(max(known(group)) - max(others) if others and not math.isnan(r) else 0.0)
    return rows


def z_scored_by_hand(values, weights):
    """(x - mean) / population std, by weights, over what is known; the std is at least 1e-4."""
    pairs = [(x, w) for x, w in zip(values, weights) if not math.isnan(x)]
    count = sum(w for _, w in pairs)
    if not count:
        return [0.0] * len(values)
    mean = sum(x * w for x, w in pairs) / count
    std = max(math.sqrt(sum(w * (x - mean) ** 2 for x, w in pairs) / count), 1e-4)
    return [(x - mean) / std for x in values]


def flat(groups):
    return torch.tensor(groups, dtype=torch.float64).flatten()


def assert_close(found, expected):
    np.testing.assert_allclose(found.numpy(), np.nan_to_num(expected), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", CASES)
class TestEveryCase:
    def test_rloo(self, case):
        groups = CASES[case]
        assert_close(advantages.rloo(flat(groups), len(groups[0])), rloo_by_hand(groups))

    def test_rloo_normalised(self, case):
        groups = CASES[case]
        raw = rloo_by_hand(groups)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = (raw - np.nanmean(raw)) / (np.nanstd(raw, ddof=1) + 1e-4)
        assert_close(advantages.rloo(flat(groups), len(groups[0]), normalize=True), expected)

    def test_opo(self, case):
        groups = CASES[case]
        lengths = torch.tensor(lengths_of(groups)).flatten()
        assert_close(advantages.opo(flat(groups), lengths, len(groups[0])), opo_by_hand(groups))

    def test_gpg(self, case):
        groups = CASES[case]
        assert_close(advantages.gpg(flat(groups), len(groups[0])), gpg_by_hand(groups))

    def test_best_of_group(self, case):
        groups = CASES[case]
        assert_close(advantages.best_of_group(flat(groups), len(groups[0])), best_by_hand(groups))

    def test_reinforce_plus_plus_baseline(self, case):
        groups = CASES[case]
        centred = centred_by_hand(groups)
        lengths = [n for group in lengths_of(groups) for n in group]
        found = advantages.reinforce_plus_plus_baseline(flat(groups), len(groups[0]), torch.tensor(lengths))
        assert_close(found, z_scored_by_hand(centred, lengths))
        unweighted = advantages.reinforce_plus_plus_baseline(flat(groups), len(groups[0]))
        assert_close(unweighted, z_scored_by_hand(centred, [1] * len(centred)))

    def test_zero_variance(self, case):
        groups = CASES[case]
        found = advantages.zero_variance_groups(flat(groups), len(groups[0]))
        assert found.tolist() == [useless(group) for group in groups]

    def test_std_of_each_group(self, case):
        groups = CASES[case]
        expected = [statistics.stdev(known(group)) if len(known(group)) > 1 else 0.0 for group in groups]
        assert_close(advantages.group_std(flat(groups), len(groups[0])), expected)

    def test_remax(self, case):
        groups = CASES[case]
        greedy = [0.5, NAN, -1.0][: len(groups)]
        expected = [r - g for group, g in zip(groups, greedy) for r in group]
        found = advantages.remax(flat(groups), torch.tensor(greedy, dtype=torch.float64), len(groups[0]))
        assert_close(found, expected)


def test_gpg_divided_by_the_std():
    """Half of the groups give no gradient: twice GRPO's advantages."""
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 2.0, 2.0, 2.0, 2.0])
    grpo = sum_then_normalize(rewards[:, None], torch.ones(1), 4, "group").advantages
    torch.testing.assert_close(advantages.gpg(rewards, 4, scale="group"), 2 * grpo)


def test_two_completions_a_group():
    """2-GRPO: with two completions, the sign of their difference is what is left, +-1/sqrt(2)."""
    found = sum_then_normalize(torch.tensor([[1.0], [0.0], [5.0], [9.0], [2.0], [2.0]]), torch.ones(1), 2, "group")
    expected = [1 / math.sqrt(2), -1 / math.sqrt(2), -1 / math.sqrt(2), 1 / math.sqrt(2), 0.0, 0.0]
    assert found.advantages.tolist() == pytest.approx(expected, rel=1e-3)


rewards_of_groups = st.integers(2, 5).flatmap(
    lambda size: st.lists(
        st.lists(st.one_of(st.just(NAN), st.integers(-4, 4).map(lambda x: x / 2)), min_size=size, max_size=size),
        min_size=1,
        max_size=4,
    )
)


@given(groups=rewards_of_groups)
@settings(max_examples=150, deadline=None)
def test_what_holds_of_all_advantages(groups):
    """Finite; 0 where not scorable; unmoved when all rewards move alike; the same in another order of groups."""
    size, rewards = len(groups[0]), flat(groups)
    lengths = torch.tensor(lengths_of(groups)).flatten() + 1
    swapped = torch.arange(len(rewards)).view(-1, size).flip(0).flatten()
    functions = {
        "rloo": lambda r, n: advantages.rloo(r, size),
        "rloo, normalised": lambda r, n: advantages.rloo(r, size, normalize=True),
        "opo": lambda r, n: advantages.opo(r, n, size),
        "gpg": lambda r, n: advantages.gpg(r, size),
        "best of group": lambda r, n: advantages.best_of_group(r, size),
        "reinforce++ baseline": lambda r, n: advantages.reinforce_plus_plus_baseline(r, size, n),
    }
    for name, function in functions.items():
        found = function(rewards, lengths)
        assert torch.isfinite(found).all(), name
        assert (found[torch.isnan(rewards)] == 0).all(), name
        torch.testing.assert_close(function(rewards + 8, lengths), found, msg=lambda m, n=name: f"{n}: {m}")
        torch.testing.assert_close(function(rewards[swapped], lengths[swapped]), found[swapped])
    if not torch.isnan(rewards).any():
        sums = advantages.rloo(rewards, size).view(-1, size).sum(1)
        torch.testing.assert_close(sums, torch.zeros_like(sums))
        # r less the mean of the others is G / (G - 1) times r less the mean of all.
        centred = sum_then_normalize(rewards[:, None], rewards.new_ones(1), size, "none").advantages
        torch.testing.assert_close(advantages.rloo(rewards, size), size / (size - 1) * centred)


# Tokens with advantages of their own


def reinforce_plus_plus_by_hand(rewards, kl, mask, beta):
    """Token by token: the reward at the end less the penalties from here on, z-scored over all tokens."""
    rows = []
    for r, penalties, m in zip(rewards, kl, mask):
        last = max((t for t in range(len(m)) if m[t]), default=None)
        row = []
        for t in range(len(m)):
            later = [(r if s == last else 0.0) - beta * penalties[s] for s in range(t, len(m)) if m[s]]
            row.append(sum(later) if m[t] else NAN)
        rows.append(row)
    known_values = [x for row in rows for x in row if not math.isnan(x)]
    mean, std = statistics.fmean(known_values), statistics.pstdev(known_values)
    return [[0.0 if math.isnan(x) else (x - mean) / std for x in row] for row in rows]


RF_REWARDS = [1.0, 0.0, NAN, -0.5, 2.0]
RF_MASK = [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 1], [0, 0, 0, 0]]  # one with a tool's token, one empty
RF_KL = [[0.5, -0.2, 0.1, 9.0], [0.3, 9.0, 9.0, 9.0], [0.1, 0.1, 9.0, 9.0], [0.2, 9.0, 0.4, -0.6], [9.0] * 4]


@pytest.mark.parametrize("beta", [0.0, 0.7])
def test_reinforce_plus_plus(beta):
    rewards, kl, mask = torch.tensor(RF_REWARDS), torch.tensor(RF_KL), torch.tensor(RF_MASK)
    found = advantages.reinforce_plus_plus(rewards, kl, mask, beta)
    expected = reinforce_plus_plus_by_hand(RF_REWARDS, RF_KL, RF_MASK, beta)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-6)
    assert found.dtype == torch.float32
    used = found[mask.bool() & ~torch.isnan(rewards)[:, None]]
    assert used.mean().item() == pytest.approx(0.0, abs=1e-6)
    assert used.std(correction=0).item() == pytest.approx(1.0, abs=1e-5)


def test_reinforce_plus_plus_without_a_reference():
    rewards, mask = torch.tensor(RF_REWARDS), torch.tensor(RF_MASK)
    found = advantages.reinforce_plus_plus(rewards, None, mask, beta=0.7)
    torch.testing.assert_close(found, advantages.reinforce_plus_plus(rewards, torch.zeros(5, 4), mask, beta=0.7))
    scored = z_scored_by_hand([r for r, m in zip(RF_REWARDS, RF_MASK) for _ in range(sum(m))], [1] * 9)
    assert found[mask.bool()].tolist() == pytest.approx(list(np.nan_to_num(scored)), rel=1e-5, abs=1e-6)


def test_reinforce_plus_plus_over_two_processes():
    """Each holds some completions, padded to its own longest; the moments are summed."""
    rewards, kl, mask = torch.tensor(RF_REWARDS), torch.tensor(RF_KL), torch.tensor(RF_MASK)
    whole = advantages.reinforce_plus_plus(rewards, kl, mask, 0.7)
    parts = [(rewards[:2], kl[:2, :3], mask[:2, :3]), (rewards[2:], kl[2:], mask[2:])]
    moments = []
    for part in parts:
        advantages.reinforce_plus_plus(*part, 0.7, reduce=lambda x: moments.append(x) or x)
    total = moments[0] + moments[1]
    assert total[2] == 7  # tokens of scorable completions
    first, second = (advantages.reinforce_plus_plus(*part, 0.7, reduce=lambda _: total) for part in parts)
    torch.testing.assert_close(first, whole[:2, :3])
    torch.testing.assert_close(second, whole[2:])


@pytest.mark.parametrize(
    "rewards, mask",
    [
        ([NAN, NAN], [[1, 1], [1, 0]]),
        ([1.0, 2.0], [[0, 0], [0, 0]]),
        ([0.3, 0.3], [[1, 1], [1, 0]]),
        ([5.0], [[1, 1]]),
        ([5.0], [[1]]),
    ],
)
def test_reinforce_plus_plus_with_nothing_to_tell_apart(rewards, mask):
    found = advantages.reinforce_plus_plus(torch.tensor(rewards), None, torch.tensor(mask))
    assert found.abs().max() == 0.0


def test_reinforce_plus_plus_of_large_rewards():
    """Moments in double precision: 1e4 +- 0.01 in single precision keeps its spread."""
    rewards = torch.tensor([10000.0, 10000.01, 10000.0, 10000.01])
    found = advantages.reinforce_plus_plus(rewards, None, torch.ones(4, 50))
    assert found[:, 0].tolist() == pytest.approx([-1.0, 1.0, -1.0, 1.0], rel=1e-3)


def test_tokens_that_the_policy_did_not_write_are_not_penalised():
    kl, mask = torch.tensor([[1.0, NAN, 2.0]]), torch.tensor([[1, 0, 1]])
    returns = advantages.token_returns(torch.tensor([10.0]), kl, mask, beta=0.5)
    assert returns[0, [0, 2]].tolist() == [8.5, 9.0]


# pass@k


def pass_at_k_by_sampling(group, k, passed=1.0):
    """All samples of k out of the group: score 1 if one passes, normalised by mean and population std; a completion's
    advantage is the mean over the samples with it in."""
    places = [i for i, r in enumerate(group) if not math.isnan(r)]
    samples = list(itertools.combinations(places, min(k, len(places)))) if places else []
    scores = [float(any(group[i] >= passed for i in sample)) for sample in samples]
    if len(set(scores)) < 2:
        return [0.0] * len(group)
    mean, std = statistics.fmean(scores), statistics.pstdev(scores)
    normalised = [(score - mean) / std for score in scores]
    return [
        statistics.fmean([x for x, sample in zip(normalised, samples) if i in sample]) if i in places else 0.0
        for i in range(len(group))
    ]


@pytest.mark.parametrize("k", [1, 2, 3, 6, 9])
def test_pass_at_k(k):
    for bits in itertools.product([0.0, 1.0, NAN], repeat=6):
        if bits != tuple(sorted(bits, key=str)):  # the order within the group does not matter
            continue
        found = advantages.pass_at_k(torch.tensor(bits, dtype=torch.float64), 6, k)
        assert found.tolist() == pytest.approx(pass_at_k_by_sampling(bits, k)), bits


def test_pass_at_k_of_several_groups_and_another_threshold():
    groups = [[0.2, 0.9, 0.5, 0.1], [0.0, 0.0, 0.0, 0.0], [0.5, 0.6, 0.7, 0.8], [NAN, 0.9, 0.1, 0.3]]
    found = advantages.pass_at_k(flat(groups), 4, 2, passed=0.5)
    expected = [x for group in groups for x in pass_at_k_by_sampling(group, 2, 0.5)]
    assert found.tolist() == pytest.approx(expected)
    assert found[4:12].abs().max() == 0.0 and found[:4].abs().min() > 0.0


def test_pass_at_1_is_grpo_with_the_population_std():
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0])
    expected = (rewards - rewards.mean()) / rewards.std(correction=0)
    torch.testing.assert_close(advantages.pass_at_k(rewards, 5, 1), expected)


def test_pass_at_k_of_no_completion_is_refused():
    with pytest.raises(ValueError, match="k is 0; choose at least 1"):
        advantages.pass_at_k(torch.zeros(4), 4, 0)


# Groups


def test_zero_variance_is_judged_on_the_rewards():
    """Also where advantages are divided by the std of the batch, which differs from 0; rounding is no difference."""
    rewards = torch.tensor([0.1 + 0.2, 0.3, 0.3, 0.3, 1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    assert rewards[0] != rewards[1]
    assert sum_then_normalize(rewards[:, None], rewards.new_ones(1), 4, "batch").std.min() > 0.1
    assert advantages.zero_variance_groups(rewards, 4).tolist() == [True, False]
    tiny = torch.tensor([1e-7, 2e-7, 0.0, 0.0])
    assert advantages.zero_variance_groups(tiny, 2).tolist() == [False, True]


def test_zero_variance_of_several_functions():
    """Every function has to be without spread: GDPO learns from groups whose sums are equal."""
    rewards = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 3.0], [2.0, 3.0], [NAN, 1.0], [NAN, NAN]])
    assert advantages.zero_variance_groups(rewards, 2).tolist() == [False, True, True]
    assert advantages.zero_variance_groups(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), 2).tolist() == [False]
    assert advantages.zero_variance_groups(rewards.nansum(1), 2).tolist() == [True, True, False]


def test_variance_shares():
    rewards = np.array(
        [[1.0, 0.2], [0.0, 0.4], [0.5, 0.6], [3.0, 3.0], [3.0, 3.0], [3.0, 3.0], [1.0, 5.0], [2.0, 1.0], [9.0, 4.0]]
    )
    weights = np.array([1.0, -0.5])
    shares = []
    for start in (0, 6):  # the group between has no spread
        parts = (rewards * weights)[start : start + 3]
        total = parts.sum(1)
        shares.append([np.cov(parts[:, j], total, ddof=0)[0, 1] / total.var() for j in range(2)])
    found = advantages.variance_shares(torch.tensor(rewards), torch.tensor(weights), 3)
    np.testing.assert_allclose(found.numpy(), np.mean(shares, axis=0))
    assert found.sum().item() == pytest.approx(1.0)


@given(groups=rewards_of_groups, weight=st.integers(-3, 3))
@settings(max_examples=100, deadline=None)
def test_shares_sum_to_one(groups, weight):
    first = flat(groups)
    both = torch.stack([first, torch.where(torch.arange(len(first)) % 3 == 0, torch.nan, first.flip(0))], dim=1)
    found = advantages.variance_shares(both, torch.tensor([1.0, weight], dtype=torch.float64), len(groups[0]))
    assert torch.isnan(found).all() or found.sum().item() == pytest.approx(1.0)
    alone = advantages.variance_shares(first[:, None], torch.ones(1, dtype=torch.float64), len(groups[0]))
    assert torch.isnan(alone).all() if all(map(useless, groups)) else alone.item() == pytest.approx(1.0)


def test_variance_shares_of_functions_that_do_not_apply():
    """One that does not apply adds 0; a completion that nothing scores is left out."""
    rewards = torch.tensor([[1.0, NAN], [0.0, 2.0], [NAN, NAN], [0.0, NAN]], dtype=torch.float64)
    parts = np.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    total = parts.sum(1)
    expected = [np.cov(parts[:, j], total, ddof=0)[0, 1] / total.var() for j in range(2)]
    found = advantages.variance_shares(rewards, torch.ones(2, dtype=torch.float64), 4)
    np.testing.assert_allclose(found.numpy(), expected)
    assert torch.isnan(advantages.variance_shares(torch.full((4, 2), NAN), torch.ones(2), 2)).all()


def test_informative_score():
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 2.0, 0.0, NAN, NAN])
    found = sum_then_normalize(rewards[:, None], torch.ones(1), 4, "none")
    std = advantages.group_std(rewards, 4)
    assert std.tolist() == pytest.approx([0.5, 0.0, math.sqrt(2)])
    scores = advantages.informative_score(found.advantages, std, 4)
    assert scores.tolist() == pytest.approx([(0.75 + 3 * 0.25) * 0.5, 0.0, 2 * math.sqrt(2)])


def test_unfinished_std_scores_nothing():
    scores = advantages.informative_score(torch.ones(4), torch.tensor([NAN, 2.0]), 2)
    assert scores.tolist() == [0.0, 4.0]
