"""The preference losses against the papers' formulas, written out here with plain numbers, one pair at a time."""

import math
from math import exp, log

import pytest
import torch

from outspoken.trainers.losses import preference as losses

CHOSEN = [1.3, -0.4, 0.0, -7.5, 12.0]
REJECTED = [-0.2, 0.9, 0.0, 3.0, -20.0]
MARGINS = [c - r for c, r in zip(CHOSEN, REJECTED)]
BETA, EPSILON = 0.3, 0.1


def s(x):
    return 1 / (1 + exp(-x))


def tensor(values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def close(found, expected):
    torch.testing.assert_close(found.detach(), torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)


MARGIN_LOSSES = {
    "dpo": (lambda d: losses.sigmoid_loss(d, BETA), lambda d: -log(s(BETA * d))),
    "cdpo": (
        lambda d: losses.sigmoid_loss(d, BETA, EPSILON),
        lambda d: -(1 - EPSILON) * log(s(BETA * d)) - EPSILON * log(s(-BETA * d)),
    ),
    "hinge": (lambda d: losses.hinge_loss(d, BETA), lambda d: max(0.0, 1 - BETA * d)),
    "ipo": (lambda d: losses.ipo_loss(d, BETA), lambda d: (d - 1 / (2 * BETA)) ** 2),
    "exo": (
        lambda d: losses.exo_pair_loss(d, BETA, EPSILON),
        # The KL divergence of (q, 1 - q) from (1 - e, e).
        lambda d: sum(q * log(q / p) for q, p in ((s(BETA * d), 1 - EPSILON), (s(-BETA * d), EPSILON))),
    ),
    "robust": (
        lambda d: losses.robust_loss(d, BETA, EPSILON),
        lambda d: ((1 - EPSILON) * -log(s(BETA * d)) - EPSILON * -log(s(-BETA * d))) / (1 - 2 * EPSILON),
    ),
    "discopop": (
        lambda d: losses.discopop_loss(d, BETA, 0.5),
        lambda d: (1 - s(BETA * d / 0.5)) * -log(s(BETA * d)) + s(BETA * d / 0.5) * exp(-BETA * d),
    ),
}


@pytest.mark.parametrize("name", MARGIN_LOSSES)
def test_losses_of_the_margin(name):
    ours, formula = MARGIN_LOSSES[name]
    close(ours(tensor(MARGINS)), [formula(d) for d in MARGINS])


BOTH_LOSSES = {
    "nca": (
        lambda c, r: losses.nca_pair_loss(c, r, BETA),
        lambda c, r: -log(s(BETA * c)) - log(s(-BETA * c)) / 2 - log(s(-BETA * r)) / 2,
    ),
    "bco": (
        lambda c, r: losses.bco_pair_loss(c, r, BETA),
        lambda c, r: -log(s(BETA * c)) - log(1 - s(BETA * r)),
    ),
    "bco-shifted": (
        lambda c, r: losses.bco_pair_loss(c, r, BETA, 0.7),
        lambda c, r: -log(s(BETA * c - 0.7)) - log(1 - s(BETA * r - 0.7)),
    ),
    "sppo": (
        lambda c, r: losses.sppo_hard_loss(c, r, BETA),
        lambda c, r: (c - 1 / BETA * (1 - 0.5)) ** 2 + (r - 1 / BETA * (0 - 0.5)) ** 2,
    ),
    "apo-zero": (
        lambda c, r: losses.apo_zero_loss(c, r, BETA),
        lambda c, r: 1 - s(BETA * c) + s(BETA * r),
    ),
    "apo-down": (
        lambda c, r: losses.apo_down_loss(c, r, BETA),
        lambda c, r: s(BETA * c) + 1 - s(BETA * (c - r)),
    ),
}


@pytest.mark.parametrize("name", BOTH_LOSSES)
def test_losses_of_both_answers(name):
    ours, formula = BOTH_LOSSES[name]
    close(ours(tensor(CHOSEN), tensor(REJECTED)), [formula(c, r) for c, r in zip(CHOSEN, REJECTED)])


def test_aot_compares_quantiles():
    policy, reference = [3.0, -1.0, 0.5], [0.2, 0.1, -4.0]
    pairs = [(-1.0, -4.0), (0.5, 0.1), (3.0, 0.2)]  # both sorted
    expected = [-0.9 * log(s(BETA * (p - q))) - 0.1 * log(s(BETA * (q - p))) for p, q in pairs]
    close(losses.aot_loss(tensor(policy), tensor(reference), BETA, 0.1), expected)
    close(losses.aot_unpaired_loss(tensor(policy), tensor(reference), BETA, 0.1), expected)
    # With a single pair it is DPO.
    close(losses.aot_loss(tensor([2.0]), tensor([0.5]), BETA), [-log(s(BETA * 1.5))])


@pytest.mark.parametrize("u", [0.01, 0.5, 1.0, 3.0, 40.0])
def test_divergences(u):
    """f'(u) of the f-DPO paper's table 1, up to a constant that cancels in the margin."""
    log_ratio = tensor([log(u)])
    close(losses.f_divergence_score(log_ratio), [log(u)])
    close(losses.f_divergence_score(log_ratio, "forward_kl"), [-1 / u + 1])
    close(losses.f_divergence_score(log_ratio, "js_divergence"), [log(2 * u / (1 + u))])
    for alpha in (0.3, 0.5, 0.9):
        paper = (1 - u**-alpha) / alpha
        close(losses.f_divergence_score(log_ratio, "alpha_divergence", 1 - alpha), [paper])
    # Its limits: the reverse KL at alpha = 1, the forward KL at alpha = 0.
    close(losses.f_divergence_score(log_ratio, "alpha_divergence", 1.0), [log(u)])
    close(losses.f_divergence_score(log_ratio, "alpha_divergence", 0.0), [1 - 1 / u])
    with pytest.raises(ValueError, match="`f_divergence_type` is 'kl'"):
        losses.f_divergence_score(log_ratio, "kl")


def test_answers_far_from_the_reference_give_finite_losses_and_gradients():
    for log_ratio in (-5000.0, 5000.0):
        found = [
            losses.discopop_loss,
            lambda x, beta, tau: losses.exo_pair_loss(x, beta, 1e-3),
            lambda x, beta, tau: losses.f_divergence_score(x, "forward_kl"),
            lambda x, beta, tau: losses.f_divergence_score(x, "js_divergence"),
            lambda x, beta, tau: losses.f_divergence_score(x, "alpha_divergence", 0.5),
        ]
        for function in found:
            x = torch.tensor([log_ratio], requires_grad=True)
            loss = function(x, 0.1, 0.05)
            loss.sum().backward()
            assert loss.isfinite().all() and x.grad.isfinite().all()


def test_length_and_positive_terms():
    close(losses.length_margin(tensor([10.0, 3.0]), tensor([4.0, 5.0]), 0.02, 0.1), [0.2 * 6, 0.2 * -2])
    # R-DPO: sigmoid(beta margin + alpha (|y_w| - |y_l|))
    margin = tensor([1.5]) + losses.length_margin(tensor([10.0]), tensor([4.0]), 0.02, 0.1)
    close(losses.sigmoid_loss(margin, 0.1), [-log(s(0.1 * 1.5 + 0.02 * 6))])
    close(losses.dpop_penalty(tensor([2.0, -0.5]), 5.0), [0.0, 2.5])


LOGPS = [[-1.0, -2.0, -3.0, 0.0], [-0.5, 0.0, 0.0, 0.0], [-0.1, -0.2, 0.0, 0.0], [-1.5, -2.5, -3.5, -4.5]]
MASK = [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]]


def test_sums_over_answers():
    logps, mask = tensor(LOGPS), torch.tensor(MASK).bool()
    close(losses.sequence_logps(logps, mask), [-6.0, -0.5, -0.3, -12.0])
    close(losses.sequence_logps(logps, mask, 1.0), [-6.0, -0.5, -0.3, -12.0])
    # Pairs (0, 2) and (1, 3) share 2 tokens and 1 token.
    close(losses.sequence_logps(logps, mask, 0.5), [-3.0 - 1.5, -0.5, -0.3, -1.5 - 0.5 * 10.5])
    close(losses.sequence_logps(logps, mask, 0.0), [-3.0, -0.5, -0.3, -1.5])


def test_wpo_weights():
    """Two tokens: one from (0.5, 0.5), one from (0.9, 0.1); the weight is relative to sampling from the policy."""
    probabilities = [[(0.5, 0.5), (0.9, 0.1)], [(0.2, 0.8), (0.5, 0.5)]]
    logps = tensor([[log(row[0]) for row in answer] for answer in probabilities])
    squares = tensor([[log(sum(p * p for p in row)) for row in answer] for answer in probabilities])
    mask = torch.tensor([[True, True], [True, False]])
    chosen = math.sqrt((0.5 / 0.5) * (0.9 / 0.82))
    rejected = 0.2 / 0.68
    found = losses.wpo_weights(logps, squares, mask)
    close(found, [chosen * rejected])
    assert not found.requires_grad


def test_exo_needs_smoothing():
    with pytest.raises(ValueError, match=r"`label_smoothing` is 0\.0, but 'exo_pair' needs it above 0"):
        losses.exo_pair_loss(tensor(MARGINS), BETA, 0.0)
