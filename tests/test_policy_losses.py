"""Policy losses against the papers' formulas, written out token by token in plain Python."""

import math

import pytest
import torch

from outspoken.trainers.losses import policy

# Three completions of up to four tokens; 0 in the mask is padding.
NEW = [[-1.0, -2.0, -0.5, -9.0], [-0.7, -1.1, -0.2, -2.0], [-3.0, -9.0, -9.0, -9.0]]
OLD = [[-1.3, -1.8, -0.5, -4.0], [-0.9, -1.0, -1.2, -1.5], [-2.2, -1.0, -1.0, -1.0]]
REF = [[-1.1, -2.5, -0.4, -1.0], [-0.6, -1.3, -0.1, -2.2], [-2.9, -1.0, -1.0, -1.0]]
MASK = [[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
ADVANTAGES = [0.8, -1.2, 0.5]
LOW, HIGH = 0.2, 0.28


def tensors():
    new, old, ref = (torch.tensor(x, dtype=torch.float64) for x in (NEW, OLD, REF))
    return new, old, ref, torch.tensor(MASK), torch.tensor(ADVANTAGES, dtype=torch.float64).unsqueeze(1)


def clip(x, low, high):
    return max(low, min(high, x))


def token_losses(delta=None):
    """-min(rho A, clip(rho, 1-low, 1+high) A) of every token that is not padding, one list per completion."""
    losses = []
    for new, old, mask, advantage in zip(NEW, OLD, MASK, ADVANTAGES):
        row = []
        for n, o, m in zip(new, old, mask):
            if m:
                rho = math.exp(n - o)
                bounded = rho if delta is None else min(rho, delta)
                row.append(-min(bounded * advantage, clip(rho, 1 - LOW, 1 + HIGH) * advantage))
        losses.append(row)
    return losses


@pytest.mark.parametrize("delta", [None, 1.5])
@pytest.mark.parametrize(
    "loss_type, expected",
    [
        ("grpo", lambda rows: sum(sum(row) / len(row) for row in rows) / len(rows)),
        ("bnpo", lambda rows: sum(map(sum, rows)) / sum(map(len, rows))),
        ("dr_grpo", lambda rows: sum(map(sum, rows)) / (len(rows) * 50)),
        ("dapo", lambda rows: sum(map(sum, rows)) / 21),
    ],
)
def test_losses(loss_type, expected, delta):
    new, old, _, mask, advantages = tensors()
    token_loss = policy.clipped_surrogate((new - old).exp(), advantages, LOW, HIGH, delta)
    by = policy.Normaliser(micro_batches=2, active_tokens=torch.tensor(21.0), max_completion_length=50)
    logged, backward = policy.POLICY_LOSSES[loss_type](token_loss, mask, by)
    assert logged.item() == pytest.approx(expected(token_losses(delta)))
    share = 1 if loss_type == "dapo" else 2  # dapo's token count already covers the whole step
    assert backward.item() == pytest.approx(logged.item() / share)


def test_delta_bounds_what_clipping_leaves_open():
    """rho = 5 with A = -1: PPO's clip keeps -5, two-sided clipping stops at delta."""
    ratio, advantage = torch.tensor([[5.0]]), torch.tensor([[-1.0]])
    assert policy.clipped_surrogate(ratio, advantage, 0.2, 0.2).item() == 5.0
    assert policy.clipped_surrogate(ratio, advantage, 0.2, 0.2, delta=3.0).item() == 3.0


def test_gradient_stops_where_clipped():
    """Above 1 + eps with A > 0, and below 1 - eps with A < 0, the loss is flat; elsewhere it is -A rho."""
    logps = torch.tensor([[0.5, -0.5, 0.1], [0.5, -0.5, 0.1]], requires_grad=True)
    advantages = torch.tensor([[2.0], [-2.0]])
    ratio = logps.exp()
    policy.clipped_surrogate(ratio, advantages, 0.2, 0.2).sum().backward()
    rho = [math.exp(x) for x in (0.5, -0.5, 0.1)]
    expected = [[0.0, -2 * rho[1], -2 * rho[2]], [2 * rho[0], 0.0, 2 * rho[2]]]
    torch.testing.assert_close(logps.grad, torch.tensor(expected))
    low, high, either = policy.clip_fractions(ratio, advantages, 0.2, 0.2)
    assert low.tolist() == [[0, 0, 0], [0, 1, 0]]
    assert high.tolist() == [[1, 0, 0], [0, 0, 0]]
    assert either.tolist() == [[1, 0, 0], [0, 1, 0]]


def test_sequence_weights_are_geometric_means():
    new, old, _, mask, _ = tensors()
    weights = policy.importance_log_weights(new - old, mask, "sequence")
    expected = [sum(n - o for n, o, m in zip(*row) if m) / sum(row[2]) for row in zip(NEW, OLD, MASK)]
    assert weights.squeeze(1).tolist() == pytest.approx(expected)
    torch.testing.assert_close(policy.importance_log_weights(new - old, mask, "token"), new - old)


def test_sequence_weight_of_a_masked_completion_is_zero_not_nan():
    assert policy.importance_log_weights(torch.ones(1, 3), torch.zeros(1, 3), "sequence").item() == 0.0


def test_unknown_level_is_refused():
    with pytest.raises(ValueError, match="importance_sampling_level is 'word'; use 'token', 'sequence' or 'sequence_token'"):
        policy.importance_log_weights(torch.zeros(1, 1), torch.ones(1, 1), "word")


def test_k3():
    new, _, ref, _, _ = tensors()
    expected = [[math.exp(r - n) - (r - n) - 1 for r, n in zip(*row)] for row in zip(REF, NEW)]
    torch.testing.assert_close(policy.k3(ref, new), torch.tensor(expected, dtype=torch.float64))
    assert (policy.k3(ref, new) >= 0).all() and policy.k3(new, new).abs().max() == 0


def test_k3_estimates_the_divergence():
    """Its mean over the policy's own distribution is KL(pi || ref), here of two distributions over 5 tokens."""
    generator = torch.Generator().manual_seed(0)
    policy_logps, ref_logps = torch.randn(2, 5, generator=generator, dtype=torch.float64).log_softmax(-1)
    p = policy_logps.exp()
    exact = (p * (policy_logps - ref_logps)).sum()
    assert (p * policy.k3(ref_logps, policy_logps)).sum().item() == pytest.approx(exact.item())


def test_off_policy_failures_are_dropped():
    """Kept: A >= 0, or mean log pi_old - log pi at most the threshold."""
    log_ratio = torch.tensor([[-1.0, -1.0, 5.0], [-1.0, -1.0, 5.0], [-0.1, -0.2, 0.0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 0], [1, 1, 1]])
    advantages = torch.tensor([[1.0], [-1.0], [-1.0]])
    assert policy.on_policy_sequences(advantages, log_ratio, mask, 0.5).tolist() == [[1], [0], [1]]


def test_high_entropy_tokens():
    entropies = torch.tensor([[0.1, 0.9, 0.5, 9.0], [0.3, 0.7, 0.2, 0.8]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    # 7 tokens: the 0.6-quantile of .1 .2 .3 .5 .7 .8 .9 is at position 3.6, i.e. 0.5 + 0.6 * 0.2 = 0.62.
    assert policy.high_entropy_tokens(entropies, mask, 0.4).tolist() == [[0, 1, 0, 0], [0, 1, 0, 1]]
    assert policy.high_entropy_tokens(entropies, torch.zeros_like(mask), 0.4).sum() == 0


def test_log_ratio_statistics():
    new, old, _, mask, _ = tensors()
    x = [n - o for row in zip(NEW, OLD, MASK) for n, o, m in zip(*row) if m]
    w = [math.exp(v) for v in x]
    found = policy.log_ratio_statistics(new - old, mask)
    assert found["n"] == len(x) == 8
    assert found["abs_mean"] == pytest.approx(sum(map(abs, x)) / 8, rel=1e-5)
    assert found["approx_kl"] == pytest.approx(sum(b - a - 1 for a, b in zip(x, w)) / 8, rel=1e-5)
    assert found["ess"] == pytest.approx(sum(w) ** 2 / (8 * sum(b * b for b in w)), rel=1e-5)
    low, second = sorted(x)[:2]
    assert found["p01"] == pytest.approx(low + 0.07 * (second - low), rel=1e-5)  # position 0.01 * 7
    assert policy.log_ratio_statistics(new, torch.zeros_like(mask)) == {}


def test_log_ratio_statistics_of_many_tokens_look_at_some():
    x = torch.linspace(-1, 1, 10_001).unsqueeze(0)
    found = policy.log_ratio_statistics(x, torch.ones_like(x), max_tokens=1000)
    assert found["n"] <= 1000
    assert found["p99"] == pytest.approx(0.98, abs=0.01)


def test_masked_means():
    values, mask = torch.tensor([[1.0, 3.0, 9.0], [5.0, 9.0, 9.0]]), torch.tensor([[1, 1, 0], [1, 0, 0]])
    total, count = policy.masked_mean(values, mask)
    assert (total.item(), count.item()) == (9.0, 3.0)
    assert policy.masked_mean_by_sequence(values, mask).tolist() == [2.0, 5.0]
    total, count = policy.masked_mean(torch.tensor([[2.0], [4.0]]), mask)  # one value per completion
    assert (total.item(), count.item()) == (6.0, 2.0)
    assert torch.isnan(policy.masked_mean_by_sequence(values, torch.zeros_like(mask))).all()
