"""Policy losses against the papers' formulas, written out token by token in plain Python."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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
        ("gpg", lambda rows: sum(map(sum, rows)) / 21),
        ("luspo", lambda rows: sum(map(sum, rows)) / len(rows)),
        ("reinforce", lambda rows: sum(map(sum, rows)) / len(rows)),
        ("gmpo", lambda rows: sum(sum(row) / len(row) for row in rows) / len(rows)),
    ],
)
def test_losses(loss_type, expected, delta):
    new, old, _, mask, advantages = tensors()
    token_loss = policy.clipped_surrogate((new - old).exp(), advantages, LOW, HIGH, delta)
    by = policy.Normaliser(micro_batches=2, active_tokens=torch.tensor(21.0), max_completion_length=50)
    logged, backward = policy.POLICY_LOSSES[loss_type](token_loss, mask, by)
    assert logged.item() == pytest.approx(expected(token_losses(delta)))
    share = 1 if loss_type in ("dapo", "gpg") else 2  # their token count already covers the whole step
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


@pytest.mark.parametrize("loss_type", policy.POLICY_LOSSES)
def test_nothing_to_train_on(loss_type):
    """All completions masked out: loss 0 and no NaN in the gradient."""
    logps = torch.tensor(NEW, requires_grad=True)
    mask = torch.zeros(3, 4, dtype=torch.long)
    by = policy.Normaliser(micro_batches=1, active_tokens=torch.tensor(1.0), max_completion_length=4)
    reported, scaled = policy.POLICY_LOSSES[loss_type](policy.reinforce(logps, torch.ones(3, 1)), mask, by)
    scaled.backward()
    assert reported.item() == 0.0 and logps.grad.abs().max() == 0.0


def test_one_loss_a_completion_is_averaged_as_it_is():
    """(N, 1) losses: `grpo` takes their mean over completions, `luspo` weighs them by length."""
    mask, losses = torch.tensor(MASK), torch.tensor([[1.0], [10.0], [100.0]])
    by = policy.Normaliser(micro_batches=1, active_tokens=torch.tensor(8.0), max_completion_length=4)
    assert policy.grpo(losses, mask, by)[0].item() == pytest.approx(111 / 3)
    assert policy.luspo(losses, mask, by)[0].item() == pytest.approx((3 * 1 + 4 * 10 + 1 * 100) / 3)


def test_metrics_of_each_loss():
    clip = {f"clip_ratio/{name}" for name in ("low_mean", "low_min", "high_mean", "high_max", "region_mean")}
    for loss_type in policy.POLICY_LOSSES:
        expected = {"cispo": {"cispo_clip_ratio"}, "vespo": {"vespo/phi_seq_mean"}}.get(loss_type, clip)
        if loss_type in ("sapo", "gpg", "reinforce"):
            expected = set()
        assert set(policy.loss_metrics(loss_type)) == expected


# Losses of one token or completion, with their gradients


def check(loss_of, derivative_of, points):
    """Loss and d loss / d log pi at log pi_old = 0, against formulas in plain numbers."""
    for x, advantage, loss in points:
        logp = torch.tensor([[x]], dtype=torch.float64, requires_grad=True)
        found = loss_of(logp, torch.tensor([[advantage]], dtype=torch.float64))
        (gradient,) = torch.autograd.grad(found.sum(), logp)
        assert found.item() == pytest.approx(loss)
        assert gradient.item() == pytest.approx(derivative_of(x, advantage), abs=1e-12)


POINTS = [(x, a) for x in (-1.2, -0.3, -0.05, 0.0, 0.1, 0.6, 2.5) for a in (-1.5, 0.7)]


def test_reinforce():
    check(policy.reinforce, lambda x, a: -a, [(x, a, -a * x) for x, a in POINTS])


def test_cispo():
    """Gradient -min(rho, cap) A everywhere: no token loses it."""
    cap = 1.5
    check(
        lambda logp, a: policy.cispo(logp.exp(), logp, a, cap),
        lambda x, a: -min(math.exp(x), cap) * a,
        [(x, a, -min(math.exp(x), cap) * a * x) for x, a in POINTS],
    )
    ratio = torch.tensor([[2.0, 1.2, 2.0]])
    advantages = torch.tensor([[1.0, 1.0, -1.0]])
    assert policy.cispo_clip_fraction(ratio, advantages, cap).tolist() == [[1.0, 0.0, 0.0]]


def test_sapo():
    """Gradient -A rho sech^2(tau (rho - 1) / 2): that of the plain surrogate at rho = 1, fading away from it."""

    def tau(a):
        return 1.3 if a > 0 else 2.0

    check(
        lambda logp, a: policy.sapo(logp.exp(), a, 1.3, 2.0),
        lambda x, a: -a * math.exp(x) / math.cosh(tau(a) * (math.exp(x) - 1) / 2) ** 2,
        [(x, a, -a * 4 / tau(a) / (1 + math.exp(-tau(a) * (math.exp(x) - 1)))) for x, a in POINTS],
    )


def test_dual_clip():
    """max(min(rho A, clip(rho) A), c A) where A < 0, and nothing else changed."""
    c = 3.0

    def objective(x, a):
        rho = math.exp(x)
        clipped = min(rho * a, clip(rho, 0.8, 1.2) * a)
        return max(clipped, c * a) if a < 0 else clipped

    def derivative(x, a):
        rho = math.exp(x)
        flat = rho > 1.2 if a > 0 else (rho < 0.8 or rho > c)
        return 0.0 if flat else -a * rho

    check(
        lambda logp, a: policy.clipped_surrogate(logp.exp(), a, 0.2, 0.2, dual_clip=c),
        derivative,
        [(x, a, -objective(x, a)) for x, a in POINTS],
    )


numbers = st.floats(-3, 3, allow_nan=False).map(lambda x: round(x, 3))


@given(x=numbers, advantage=numbers, low=st.floats(0, 0.9), high=st.floats(0, 2), more=st.floats(0, 3))
@settings(max_examples=200, deadline=None)
def test_two_sided_clip_and_dual_clip_bound_alike(x, advantage, low, high, more):
    bound = 1 + high + more
    ratio, a = torch.tensor([[x]], dtype=torch.float64).exp(), torch.tensor([[advantage]], dtype=torch.float64)
    two_sided = policy.clipped_surrogate(ratio, a, low, high, delta=bound)
    dual = policy.clipped_surrogate(ratio, a, low, high, dual_clip=bound)
    torch.testing.assert_close(two_sided, dual)
    assert two_sided.item() <= max(bound, 1.0) * abs(advantage) + 1e-9


def test_gspo_token():
    """In value the sequence's ratio on each token, in gradient `s_i` times each token's own."""
    new, old, _, mask, advantages = tensors()
    new.requires_grad_()
    weights = policy.importance_log_weights(new - old, mask, "sequence_token").exp()
    means = [sum(n - o for n, o, m in zip(*row) if m) / sum(row[2]) for row in zip(NEW, OLD, MASK)]
    for row, mean in zip(weights.tolist(), means):
        assert row == pytest.approx([math.exp(mean)] * 4)
    token_advantages = torch.arange(12, dtype=torch.float64).view(3, 4) - 5  # each token its own
    (gradient,) = torch.autograd.grad((weights * token_advantages * mask).sum(), new)
    for i, j in [(i, j) for i in range(3) for j in range(4)]:
        expected = math.exp(means[i]) * (4 * i + j - 5) * MASK[i][j]
        assert gradient[i, j].item() == pytest.approx(expected)

    # With one advantage a completion, the gradient of the completion's mean is GSPO's.
    by = policy.Normaliser(micro_batches=1, active_tokens=torch.tensor(8.0), max_completion_length=4)
    found = []
    for level in ("sequence", "sequence_token"):
        ratio = policy.importance_log_weights(new - old, mask, level).exp()
        loss, scaled = policy.grpo(policy.clipped_surrogate(ratio, advantages, 0.3, 0.3), mask, by)
        found.append((loss, *torch.autograd.grad(scaled, new)))
    torch.testing.assert_close(*found)


def test_vespo():
    """phi(W) = e^lambda W^k e^(-lambda W) with W the product of the ratios; the gradient is -phi A on each token."""
    new, old, _, mask, advantages = tensors()
    new.requires_grad_()
    sampler = torch.tensor([[0.9, 1.1, 1.0, 7.0], [1.2, 1.0, 0.8, 1.3], [0.5, 7.0, 7.0, 7.0]], dtype=torch.float64)
    loss, phi = policy.vespo(new - old, new, advantages, mask, sampler, 1.5, 2.5, 3.5, 0.5)
    (gradient,) = torch.autograd.grad((loss * mask).sum(), new)
    for i, (n, o, m, a) in enumerate(zip(NEW, OLD, MASK, ADVANTAGES)):
        w = math.prod(math.exp(n[j] - o[j]) * sampler[i, j].item() for j in range(4) if m[j])
        k, lam = (1.5, 2.5) if a >= 0 else (3.5, 0.5)
        expected = math.exp(lam) * w**k * math.exp(-lam * w)
        assert phi[i].item() == pytest.approx(expected)
        assert gradient[i].tolist() == pytest.approx([-expected * a * x for x in m])
        assert loss[i].tolist() == pytest.approx([-expected * a * x for x in n])
    _, at_one = policy.vespo(new - new.detach(), new, advantages, mask)
    assert at_one.flatten().tolist() == pytest.approx([1.0, 1.0, 1.0])
    _, dropped = policy.vespo(new - old, new, advantages, mask, sampler * torch.tensor([0.0, 1.0, 1.0, 1.0]))
    assert dropped.max() < 1e-10  # a token that masking weighs 0 takes its sequence out


def test_vespo_takes_a_weight_of_the_whole_completion():
    new, old, _, mask, advantages = tensors()
    by_token = torch.tensor([[0.9, 1.1, 1.0, 1.0], [1.2, 1.0, 0.8, 1.3], [0.5, 1.0, 1.0, 1.0]], dtype=torch.float64)
    _, expected = policy.vespo(new - old, new, advantages, mask, by_token)
    _, found = policy.vespo(new - old, new, advantages, mask, by_token.prod(dim=1, keepdim=True))
    torch.testing.assert_close(found, expected)


def test_gmpo():
    """`prod_t min(rho_t^sgn, clip(rho_t, e^-low, e^high)^sgn)^(sgn / |o|)`: the paper's objective, sign by sign."""
    low, high = 0.25, 0.4
    new, old, _, mask, advantages = tensors()
    new.requires_grad_()
    found = policy.gmpo(new - old, advantages, mask, low, high)
    assert found.shape == (3, 1)
    (gradient,) = torch.autograd.grad(found.sum(), new)
    for i, (n, o, m, a) in enumerate(zip(NEW, OLD, MASK, ADVANTAGES)):
        sign = 1 if a > 0 else -1
        length, product, free = sum(m), 1.0, []
        for j in range(4):
            if m[j]:
                rho = math.exp(n[j] - o[j])
                clipped = clip(rho, math.exp(-low), math.exp(high))
                product *= min(rho**sign, clipped**sign) ** (sign / length)
                free.append(rho**sign <= clipped**sign)
            else:
                free.append(False)
        assert found[i].item() == pytest.approx(-product * a)
        assert gradient[i].tolist() == pytest.approx([-product * a / length * x for x in free])
    assert policy.gmpo(new - old, advantages, mask * 0, low, high).flatten().tolist() == [-a for a in ADVANTAGES]


def test_sequence_weights_are_geometric_means():
    new, old, _, mask, _ = tensors()
    weights = policy.importance_log_weights(new - old, mask, "sequence")
    expected = [sum(n - o for n, o, m in zip(*row) if m) / sum(row[2]) for row in zip(NEW, OLD, MASK)]
    assert weights.squeeze(1).tolist() == pytest.approx(expected)
    torch.testing.assert_close(policy.importance_log_weights(new - old, mask, "token"), new - old)


def test_sequence_weight_of_a_masked_completion_is_zero_not_nan():
    assert policy.importance_log_weights(torch.ones(1, 3), torch.zeros(1, 3), "sequence").item() == 0.0


def test_unknown_level_is_refused():
    with pytest.raises(
        ValueError, match="importance_sampling_level is 'word'; use 'token', 'sequence' or 'sequence_token'"
    ):
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


def test_k1_and_k2():
    new, _, ref, _, _ = tensors()
    differences = [n - r for row in zip(REF, NEW) for r, n in zip(*row)]
    assert policy.KL_ESTIMATORS["k1"](ref, new).flatten().tolist() == pytest.approx(differences)
    assert policy.KL_ESTIMATORS["k2"](ref, new).flatten().tolist() == pytest.approx([d * d / 2 for d in differences])
    assert policy.KL_ESTIMATORS["k3"] is policy.k3


def test_what_each_estimator_pulls_at():
    """Expected gradients over a whole distribution: of KL(pi || ref) for k2 and for k1, k3 times the ratio; of the other
    direction for k3; none for k1. Also where the tokens are of an earlier policy, with the ratio.
    """
    g = torch.Generator().manual_seed(0)
    logits, old_logits, ref_logits = torch.randn(3, 6, generator=g, dtype=torch.float64)
    logits.requires_grad_()
    ref, old = ref_logits.log_softmax(-1), old_logits.log_softmax(-1)

    def gradient(value):
        return torch.autograd.grad(value, logits)[0]

    def logps():
        return logits.log_softmax(-1)

    def expected(term, weights):
        return gradient((weights * term).sum())

    here = logps().detach().exp()
    reverse = gradient((logps().exp() * (logps() - ref)).sum())
    forward = gradient((ref.exp() * (ref - logps())).sum())
    assert (reverse - forward).abs().max() > 0.05
    torch.testing.assert_close(expected(policy.k1(ref, logps()), here), torch.zeros(6, dtype=torch.float64))
    torch.testing.assert_close(expected(policy.k2(ref, logps()), here), reverse)
    torch.testing.assert_close(expected(policy.k3(ref, logps()), here), forward)
    for estimator in (policy.k1, policy.k3):
        for sampler in (logps().detach(), old):
            ratio = (logps() - sampler).exp()
            unbiased = policy.unbiased_kl(estimator(ref, logps()), ratio)
            torch.testing.assert_close(expected(unbiased, sampler.exp()), reverse)


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


def test_off_policy_failures_with_unknown_tokens():
    """A token without the sampler's log-probability counts as no drift; advantages may be each token's own."""
    log_ratio = torch.tensor([[-1.0, math.nan], [-1.0, -1.0]])
    kept = policy.on_policy_sequences(torch.full((2, 1), -1.0), log_ratio, torch.ones(2, 2), 0.6)
    assert kept.tolist() == [[1.0], [0.0]]
    per_token = torch.tensor([[1.0, -1.0], [1.0, -1.0]])
    kept = policy.on_policy_sequences(per_token, log_ratio, torch.ones(2, 2), 0.6)
    assert kept.tolist() == [[1.0, 1.0], [1.0, 0.0]]


@given(values=st.lists(st.floats(0, 10, width=32), min_size=1, max_size=30), share=st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_entropy_limit_is_the_quantile(values, share):
    x = torch.tensor(values)
    limit = policy.entropy_limit(x, share)
    assert limit.item() == pytest.approx(torch.quantile(x.double(), 1 - share).item(), rel=1e-5, abs=1e-6)


def test_entropy_limit_over_several_processes():
    """Each keeps what reaches the limit of all: 5 6 7 8 of 1 ... 8."""
    ours, theirs = torch.tensor([[1.0, 6.0, 3.0, 5.0]]), torch.tensor([[2.0, 4.0, 8.0, 7.0]])
    limit = policy.entropy_limit(torch.cat([ours.flatten(), theirs.flatten()]), 0.5)
    assert limit.item() == 4.5
    mask = torch.tensor([[1, 1, 1, 0]])
    assert policy.high_entropy_tokens(ours, mask, 0.5, limit).tolist() == [[0, 1, 0, 0]]
    assert policy.entropy_limit(torch.zeros(0), 0.5).item() == math.inf


def test_entropy_limit_of_very_many_tokens():
    x = torch.arange(2**24 + 2, dtype=torch.float32) / 2**24  # more than torch.quantile takes
    assert policy.entropy_limit(x, 0.25).item() == pytest.approx(0.75, abs=1e-6)


# Covariance of log-probability and advantage


def covariances(logps, advantages, mask):
    """(log pi - mean) (A - mean) of every masked-in token, by its place."""
    places = [(i, j) for i, row in enumerate(mask) for j, m in enumerate(row) if m]
    mean_logp = sum(logps[i][j] for i, j in places) / len(places)
    mean_advantage = sum(advantages[i] for i, j in places) / len(places)
    return {(i, j): (logps[i][j] - mean_logp) * (advantages[i] - mean_advantage) for i, j in places}


def batch(seed, rows=6, columns=20):
    rng = random.Random(seed)
    logps = [[-abs(rng.gauss(0, 2)) for _ in range(columns)] for _ in range(rows)]
    mask = [[int(j < length) for j in range(columns)] for length in (rng.randint(1, columns) for _ in range(rows))]
    return logps, [rng.gauss(0, 3) for _ in range(rows)], mask


@pytest.mark.parametrize("seed", range(5))
def test_clip_cov(seed):
    logps, advantages, mask = batch(seed)
    expected = covariances(logps, advantages, mask)
    low, high, share = 0.3, 4.0, 0.08
    eligible = {place for place, value in expected.items() if low < value < high}
    number = int(share * len(expected))
    assert len(eligible) > number > 1
    x, a, m = torch.tensor(logps), torch.tensor(advantages)[:, None], torch.tensor(mask)
    drawn = set()
    for repeat in range(30):
        generator = torch.Generator().manual_seed(repeat)
        keep = policy.clip_cov(x, a, m, share=share, low=low, high=high, generator=generator)
        dropped = {tuple(place) for place in (keep == 0).nonzero().tolist()}
        assert len(dropped) == number and dropped <= eligible
        drawn |= dropped
    assert drawn == eligible  # at random, not the first ones

    clipped = torch.zeros(m.shape)
    for place in eligible:
        clipped[place] = 1.0
    assert policy.clip_cov(x, a, m, clipped, share=share, low=low, high=high).all()


def test_clip_cov_takes_at_least_one_and_only_between_its_bounds():
    logps, advantages, mask = batch(0)
    x, a, m = torch.tensor(logps), torch.tensor(advantages)[:, None], torch.tensor(mask)
    assert (policy.clip_cov(x, a, m) == 0).sum() == 1  # 2e-4 of some 60 tokens
    assert policy.clip_cov(x, a, m, low=1e6, high=1e7).all()
    assert policy.clip_cov(x, a, torch.zeros_like(m)).all()
    assert policy.clip_cov(x, torch.ones(6, 1), m).all()  # no covariance with a constant


@pytest.mark.parametrize("seed", range(5))
def test_kl_cov(seed):
    logps, advantages, mask = batch(seed)
    expected = covariances(logps, advantages, mask)
    number = max(int(0.1 * len(expected)), 1)
    highest = set(sorted(expected, key=expected.get)[-number:])
    x = torch.tensor(logps, dtype=torch.float64, requires_grad=True)
    old = torch.tensor(logps, dtype=torch.float64) - 0.3 * torch.arange(1, 21) * torch.tensor([1.0, -1.0] * 10)
    a, m = torch.tensor(advantages, dtype=torch.float64)[:, None], torch.tensor(mask)
    penalty = policy.kl_cov(x - old, x, a, m, share=0.1, coef=0.7)
    (gradient,) = torch.autograd.grad(penalty.sum(), x)
    for i in range(6):
        for j in range(20):
            difference = (x - old)[i, j].item()
            chosen = (i, j) in highest
            assert penalty[i, j].item() == pytest.approx(0.7 * abs(difference) if chosen else 0.0)
            assert gradient[i, j].item() == pytest.approx(math.copysign(0.7, difference) if chosen else 0.0)


def test_kl_cov_of_nothing():
    x, a, m = torch.randn(2, 3), torch.ones(2, 1), torch.zeros(2, 3)
    assert policy.kl_cov(x, x, a, m).tolist() == [[0.0] * 3] * 2


def test_kl_cov_goes_with_the_surrogate_without_a_clip():
    ratio, a = torch.tensor([[0.1, 5.0]]), torch.tensor([[-2.0]])
    assert policy.clipped_surrogate(ratio, a, math.inf, math.inf).tolist() == [[pytest.approx(0.2), 10.0]]


# Entropy coefficient


def test_entropy_coefficient():
    step = {"target": 0.5, "delta": 0.1, "minimum": 0.0, "maximum": 0.25}
    assert policy.adaptive_entropy_coef(0.1, 0.4, **step) == pytest.approx(0.2)
    assert policy.adaptive_entropy_coef(0.1, 0.5, **step) == pytest.approx(0.2)  # at the target: raised
    assert policy.adaptive_entropy_coef(0.2, 0.1, **step) == 0.25
    assert policy.adaptive_entropy_coef(0.1, 0.6, **step) == pytest.approx(0.0)
    assert policy.adaptive_entropy_coef(0.05, 0.6, **step) == 0.0
    assert policy.adaptive_entropy_coef(0.1, math.nan, **step) == 0.1
    assert [policy.applied_entropy_coef(0.1, x, 0.5) for x in (0.4, 0.5, 0.6, math.inf)] == [0.1, 0.1, 0.0, 0.0]


# Trainer beside sampler

TRAINER = [[-1.0, -2.0, -0.5, -9.0], [-0.7, -1.1, -0.2, -2.0], [-3.0, -9.0, -9.0, -9.0]]
SAMPLER = [[-1.5, -1.8, -0.5, -1.0], [-0.7, math.nan, -1.2, -1.0], [math.nan, -9.0, -9.0, math.nan]]
KNOWN = [[0.5, -0.2, 0.0, 0.0], [0.0, 0.0, 1.0, -1.0], [0.0, 0.0, 0.0, 0.0]]  # difference, 0 where unknown or padding


@pytest.mark.parametrize("high, low", [(3.0, None), (1.5, 0.5), (None, 0.9), (None, None), (1.2, None)])
def test_sampler_importance_weights(high, low):
    trainer, sampler, mask = torch.tensor(TRAINER), torch.tensor(SAMPLER), torch.tensor(MASK)
    trainer.requires_grad_()
    top, bottom = high or math.inf, low or 0.0
    tokens = [[math.exp(x) for x in row] for row in KNOWN]
    sequences = [[math.exp(sum(row))] for row in KNOWN]

    def masked(rho):
        return rho if bottom <= rho <= top else 0.0

    for mode, ratios, bound in (
        ("token_truncate", tokens, lambda rho: clip(rho, bottom, top)),
        ("token_mask", tokens, masked),
        ("sequence_truncate", sequences, lambda rho: clip(rho, bottom, top)),
        ("sequence_mask", sequences, masked),
    ):
        found = policy.sampler_importance_weights(trainer, sampler, mask, mode, high, low)
        assert not found.requires_grad
        for row, expected in zip(found.tolist(), ratios, strict=True):
            assert row == pytest.approx([bound(rho) for rho in expected])


def test_sampler_weights_of_a_token_the_trainer_would_never_draw():
    """Infinite log-ratios are bounded like any other."""
    trainer, sampler, mask = torch.tensor([[-1.0, -math.inf]]), torch.tensor([[-math.inf, -1.0]]), torch.ones(1, 2)
    assert policy.sampler_importance_weights(trainer, sampler, mask, "token_truncate", 2.0).tolist() == [[2.0, 0.0]]
    assert policy.sampler_importance_weights(trainer, sampler, mask, "token_mask", 2.0).tolist() == [[0.0, 0.0]]


def test_unknown_sampler_correction_is_refused():
    with pytest.raises(
        ValueError, match="vllm_importance_sampling_mode is 'word_mask'; choose one of 'token_truncate'"
    ):
        policy.sampler_importance_weights(torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1), "word_mask")


def test_sampler_gap():
    found = policy.sampler_gap(torch.tensor(TRAINER), torch.tensor(SAMPLER), torch.tensor(MASK))
    x = [0.5, -0.2, 0.0, 0.0, 1.0, -1.0]
    assert found["n"] == 6
    assert found["k1"] == pytest.approx(-sum(x) / 6)
    assert found["k3"] == pytest.approx(sum(math.exp(v) - v - 1 for v in x) / 6)
    assert (found["abs_mean"], found["abs_max"]) == pytest.approx((2.7 / 6, 1.0))
    assert policy.sampler_gap(torch.ones(1, 2), torch.full((1, 2), math.nan), torch.ones(1, 2)) == {}
    assert policy.sampler_gap(torch.ones(1, 2), torch.ones(1, 2), torch.zeros(1, 2)) == {}


def test_sampler_gap_estimates_the_divergence():
    """k1 and k3 of tokens drawn from the sampler are KL(sampler || trainer) in the mean."""
    g = torch.Generator().manual_seed(0)
    trainer, sampler = torch.randn(2, 5, generator=g).log_softmax(-1)
    drawn = torch.multinomial(sampler.exp(), 200_000, replacement=True, generator=g)
    exact = (sampler.exp() * (sampler - trainer)).sum().item()
    found = policy.sampler_gap(trainer[drawn][None], sampler[drawn][None], torch.ones(1, 200_000))
    assert found["k1"] == pytest.approx(exact, rel=0.03) and found["k3"] == pytest.approx(exact, rel=0.03)


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
