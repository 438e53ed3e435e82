"""How often the detectors cry wolf, by simulation.

Each case is a documented rate: the share of healthy 1000-step runs with at least one alarm, first measured
over `REFERENCE_RUNS` runs with another implementation. A simulation here over R runs must agree within 4 standard
errors of the difference, 4 sqrt(p (1 - p) (1/R + 1/REFERENCE_RUNS)): with about 30 cases a correct detector fails one of
them by chance in 1 of 500 runs of the seeds, and the seeds are fixed.
"""

import math

import numpy as np
import pytest

from outspoken.diagnostics import stats

STEPS = 1000
REFERENCE_RUNS = 1000


def ar1(runs, steps, phi, seed):
    """Stationary AR(1) series with unit innovations, (runs, steps)."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(runs, steps))
    x[:, 0] /= math.sqrt(1 - phi**2)
    for t in range(1, steps):
        x[:, t] += phi * x[:, t - 1]
    return x


def assert_rate(alarms, runs, expected, reference_runs=REFERENCE_RUNS):
    p = min(max(expected, 1 / reference_runs), 1 - 1 / reference_runs)  # a rate of .000 means below 1 in the reference
    tolerance = 4 * math.sqrt(p * (1 - p) * (1 / runs + 1 / reference_runs))
    assert abs(alarms / runs - expected) <= tolerance, f"{alarms}/{runs} against {expected} +- {tolerance:.3f}"


def cusum_alarms(series, baseline, h):
    return sum(stats.Cusum.fit(x[:baseline], h=h).first_alarm(x[baseline:]) is not None for x in series.tolist())


CUSUM_RATES = [  # frozen baseline, h, phi, share of runs
    (20, 8, 0.0, 0.035),
    (50, 8, 0.0, 0.006),
    (50, 8, 0.6, 0.042),
]
MORE_CUSUM_RATES = [
    (20, 8, 0.3, 0.108),
    (20, 8, 0.6, 0.183),
    (20, 8, 0.9, 0.388),
    (50, 8, 0.3, 0.029),
    (50, 8, 0.9, 0.135),
    (50, 12, 0.0, 0.000),
    (50, 12, 0.6, 0.018),
    (50, 12, 0.9, 0.104),
    (100, 8, 0.0, 0.000),
    (100, 8, 0.3, 0.004),
    (100, 8, 0.6, 0.005),
    (100, 8, 0.9, 0.024),
    (100, 10, 0.6, 0.001),
]


@pytest.mark.parametrize(("baseline", "h", "phi", "expected"), CUSUM_RATES)
def test_cusum_false_alarms(baseline, h, phi, expected):
    runs = 300
    assert_rate(cusum_alarms(ar1(runs, STEPS, phi, seed=1), baseline, h), runs, expected)


@pytest.mark.slow
@pytest.mark.parametrize(("baseline", "h", "phi", "expected"), CUSUM_RATES + MORE_CUSUM_RATES)
def test_cusum_false_alarms_at_full_size(baseline, h, phi, expected):
    runs = 2000
    assert_rate(cusum_alarms(ar1(runs, STEPS, phi, seed=2), baseline, h), runs, expected)


@pytest.mark.slow
@pytest.mark.parametrize(("baseline", "expected"), [(20, 0.059), (50, 0.019), (100, 0.011)])
def test_cusum_false_alarms_with_heavy_tails(baseline, expected):
    runs = 2000
    series = np.random.default_rng(3).standard_t(3, size=(runs, STEPS))
    assert_rate(cusum_alarms(series, baseline, 8), runs, expected)


@pytest.mark.slow
def test_without_its_corrections_cusum_is_useless():
    """The same sums with a plain sd, no cut at 3, k=.5, h=5: 59 % of healthy independent runs alarm, 96 % at phi .6."""
    runs = 400
    for phi, expected in ((0.0, 0.59), (0.6, 0.96)):
        alarms = 0
        for x in ar1(runs, STEPS, phi, seed=4):
            plain = stats.Cusum(np.median(x[:50]), np.std(x[:50]), k=0.5, h=5, clip=1e9, direction="both")
            alarms += plain.first_alarm(x[50:].tolist()) is not None
        assert alarms / runs > expected - 0.15  # which sd and centre the reference took is not known


@pytest.mark.parametrize(("shift", "delay"), [(1.5, 16), (2, 8), (3, 5)])
def test_cusum_delay(shift, delay):
    """Median steps until a shift is seen, in sd. From S = 0 it is never under 5: at most 3 - 1 a step, above 8."""
    delays = []
    for x in ar1(200, 350, 0.0, seed=5).tolist():
        drift = stats.Cusum.fit(x[:50])
        if drift.first_alarm(x[50:150]) is None:
            alarm = drift.first_alarm([v + shift for v in x[150:]])
            delays.append(math.inf if alarm is None else alarm + 1)
    assert abs(np.median(delays) - delay) <= 3


def test_cusum_onset_is_close_to_the_change():
    errors = []
    for x in ar1(150, 250, 0.0, seed=6).tolist():
        drift = stats.Cusum.fit(x[:50])
        if drift.first_alarm(x[50:150]) is None and drift.first_alarm([v + 2 for v in x[150:]]) is not None:
            errors.append(drift.onset - 100)
    assert len(errors) > 140
    assert abs(np.median(errors)) <= 1
    assert np.mean(np.abs(errors) <= 10) > 0.85


def test_cusum_always_alarms_on_a_healthy_trend():
    """A metric that relaxes by 3 sd over 300 steps: 96-100 % alarms. Hence never CUSUM alone on entropy or KL."""
    runs = 100
    relaxing = 3 * np.minimum(np.arange(STEPS - 50) / 300, 1)
    series = ar1(runs, STEPS, 0.0, seed=7)
    series[:, 50:] += relaxing
    assert cusum_alarms(series, 50, 8) >= 0.96 * runs


def test_two_metrics_together_hardly_ever_alarm():
    """Both above h at the same step, phi .6, correlation .8: .007 of runs against .042 for one."""
    runs = 300
    a, b = ar1(runs, STEPS, 0.6, seed=8), ar1(runs, STEPS, 0.6, seed=9)
    b = 0.8 * a + 0.6 * b
    both = 0
    for x, y in zip(a.tolist(), b.tolist()):
        first, second = stats.Cusum.fit(x[:50]), stats.Cusum.fit(y[:50])
        both += any(first.update(v) & second.update(w) for v, w in zip(x[50:], y[50:]))
    assert_rate(both, runs, 0.007)


# ------------------------------------------------------------------------------------------------------ trend


def mann_kendall_every(series, window, every):
    """(corrected z, uncorrected z) of each window, (windows,) each."""
    trends = [stats.mann_kendall(series[end - window : end]) for end in range(window, len(series) + 1, every)]
    z = np.array([t.z for t in trends])
    return z, z * np.sqrt([stats.design_effect(t.phi) for t in trends])


def test_testing_for_a_trend_at_every_step_alarms_on_nearly_every_healthy_run():
    """p < .01 (|z| > 2.576), window 50, every step: .91 of independent runs (400 reference runs)."""
    runs = 25
    alarms = sum(np.abs(mann_kendall_every(x, 50, 1)[1]).max() > 2.576 for x in ar1(runs, STEPS, 0.0, seed=10))
    assert_rate(alarms, runs, 0.91, reference_runs=400)


@pytest.mark.parametrize(
    ("runs", "phi", "uncorrected", "corrected"),
    [
        (200, 0.0, 0.01, 0.01),
        (200, 0.6, 0.90, 0.13),
        pytest.param(1000, 0.0, 0.01, 0.01, marks=pytest.mark.slow),
        pytest.param(1000, 0.3, 0.20, 0.05, marks=pytest.mark.slow),
        pytest.param(1000, 0.6, 0.90, 0.13, marks=pytest.mark.slow),
        pytest.param(1000, 0.9, 1.00, 0.42, marks=pytest.mark.slow),
    ],
)
def test_trend_false_alarms_every_25_steps(runs, phi, uncorrected, corrected):
    z = [mann_kendall_every(x, 50, 25) for x in ar1(runs, STEPS, phi, seed=11)]
    assert_rate(sum(np.abs(plain).max() > 3.5 for _, plain in z), runs, uncorrected, reference_runs=400)
    assert_rate(sum(np.abs(fixed).max() > 3.5 for fixed, _ in z), runs, corrected, reference_runs=400)


@pytest.mark.slow
@pytest.mark.parametrize(("phi", "expected"), [(0.0, 0.01), (0.3, 0.02), (0.6, 0.06)])
def test_trend_false_alarms_on_block_means(phi, expected):
    runs = 300
    alarms = 0
    for x in ar1(runs, STEPS, phi, seed=12):
        alarms += np.abs(mann_kendall_every(stats.block_means(x, 5), 50, 5)[0]).max() > 3.3
    assert_rate(alarms, runs, expected, reference_runs=400)


def test_a_real_trend_is_found():
    """A rise of 2 sd over 50 steps in independent noise: z > 3.5 in nearly all windows, and the change is unbiased."""
    trends = [stats.mann_kendall(x + np.linspace(0, 2, 50)) for x in ar1(300, 50, 0.0, seed=13)]
    changes = np.array([t.change for t in trends])
    expected = 2 * 50 / 49  # the slope is 2/49 a step
    assert abs(changes.mean() - expected) < 4 * changes.std() / math.sqrt(300)
    assert np.mean([t.z > 2.576 for t in trends]) > 0.8


# ------------------------------------------------------------------------------------------------ two windows


@pytest.mark.parametrize(
    ("window", "phi", "most"),
    [  # share of single comparisons of a healthy run with |t| > 3.5: the worst that the docstring owns up to
        (25, 0.0, 0.005),
        (25, 0.6, 0.02),
        (50, 0.6, 0.01),
        (10, 0.6, 0.06),
    ],
)
def test_two_window_false_alarms(window, phi, most):
    runs = 1000
    two = [stats.two_window(x[:window], x[window:]) for x in ar1(runs, 2 * window, phi, seed=14).tolist()]
    alarms = sum(abs(t.t) > 3.5 for t in two)
    assert alarms <= most * runs + 4 * math.sqrt(most * (1 - most) * runs)


def test_ignoring_serial_correlation_costs_the_two_window_test_its_meaning():
    series = ar1(500, 50, 0.6, seed=15).tolist()
    plain = sum(abs(stats.two_window(x[:25], x[25:], deff=1.0).t) > 3.5 for x in series)
    corrected = sum(abs(stats.two_window(x[:25], x[25:]).t) > 3.5 for x in series)
    assert plain > 3 * corrected


@pytest.mark.parametrize(("n_per_step", "window"), [(64, 25), (256, 10)])
def test_the_minimum_detectable_change_is_detected_4_times_in_5(n_per_step, window):
    """0/1 rewards in groups of 8 with correlation .5 around .5: a change of `mde_binary` has 80 % power at 5 %.

    A group's success rate is Beta(a, b) with a + b = 1/rho - 1 = 1, which gives rewards correlated by rho.
    """
    runs, groups, rho = 600, n_per_step // 8, 0.5
    mde = stats.mde_binary(0.5, n_per_step, window, 8, rho)
    rng = np.random.default_rng(16)

    def step_means(p):
        rate = rng.beta(p, 1 - p, size=(runs, window, groups))
        return (rng.binomial(8, rate) / 8).mean(axis=2).tolist()

    pairs = [stats.two_window(a, b, deff=1.0) for a, b in zip(step_means(0.5 - mde / 2), step_means(0.5 + mde / 2))]
    # With windows of 10 the variance is itself estimated: the exact 5 % point is t(18), 2.10 rather than 1.96.
    point = {10: 2.101, 25: 2.011}[window]
    power = np.mean([pair.t > point for pair in pairs])
    assert abs(power - 0.80) <= 4 * math.sqrt(0.8 * 0.2 / runs) + 0.04  # 0.04: what the t quantile costs
    assert np.mean([pair.mde for pair in pairs]) == pytest.approx(mde, rel=0.05)


# ----------------------------------------------------------------------------------------------------- counts


@pytest.mark.parametrize(("p0", "p1", "expected"), [(0.6, 0.9, 48), (0.6, 0.8, 120), (0.3, 0.6, 60), (0.2, 0.4, 116)])
def test_pooled_sample_sizes(p0, p1, expected):
    """Trials until a rate of p1 is told from p0 at alpha 1e-3 with 95 % power, computed exactly.

    Power is saw-toothed in n because counts are whole: it first reaches 95 % at some n and stays there from a larger
    one on. The documented sizes lie between, give or take 2.
    """

    def power(n):
        critical = next((k for k in range(n + 1) if stats.Pooled(k, n).exceeds(p0)), None)
        return 0.0 if critical is None else stats.binomial_tail(critical, n, p1)

    powers = {n: power(n) for n in range(expected - 12, expected + 13)}
    first = min(n for n, value in powers.items() if value >= 0.95)
    last = max(n for n, value in powers.items() if value < 0.95) + 1
    assert first - 2 <= expected <= last + 2
    assert first > expected - 12 and last < expected + 12


def test_a_single_pooled_look_keeps_its_level():
    """Exact: P(exceeds) at the boundary p = p0 never passes alpha."""
    for n in (48, 120, 500):
        for p0 in (0.1, 0.5, 0.9):
            alarms = [k for k in range(n + 1) if stats.Pooled(k, n).exceeds(p0)]
            assert not alarms or stats.binomial_tail(alarms[0], n, p0) < 1e-3
            assert alarms or p0**n > 1e-3  # 48 of 48 is no surprise at .9


@pytest.mark.parametrize(
    ("groups", "expected"), [(1, 0.07), (4, 0.18), pytest.param(16, 0.27, marks=pytest.mark.slow)]
)
def test_looking_at_every_step_at_the_boundary_alarms_too_often(groups, expected):
    """The newest 48 groups at a rate of exactly p0 = .6, looked at after each of 1000 steps; at a rate of .4, never."""
    runs, trials = 300, 48
    critical = next(k for k in range(trials + 1) if stats.Pooled(k, trials).exceeds(0.6))
    rng = np.random.default_rng(17)
    for rate, share in ((0.6, expected), (0.4, 0.0)):
        hits = np.cumsum(rng.random((runs, STEPS * groups)) < rate, axis=1)
        pooled = (hits[:, trials:] - hits[:, :-trials])[:, ::groups]
        alarms = int((pooled >= critical).any(axis=1).sum())
        assert_rate(alarms, runs, share, reference_runs=400)
