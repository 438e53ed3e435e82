"""The statistics against hand arithmetic, against scipy, and against properties they must have."""

import math

import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.signal
import scipy.stats
from hypothesis import assume, example, given, settings

from outspoken.diagnostics import stats

finite = st.floats(-1e6, 1e6, allow_nan=False).map(lambda x: round(x, 6))
lists = st.lists(finite, min_size=1, max_size=60)


# ------------------------------------------------------------------------------------------------ short lists


def test_median_and_quantile_by_hand():
    assert stats.median([3, 1, 2]) == 2
    assert stats.median([4, 1, 2, 3]) == 2.5
    assert stats.quantile([10, 0, 20], 0.25) == 5  # position 0.5 between 0 and 10
    assert stats.quantile([7], 0.9) == 7


@given(lists, st.floats(0, 1))
def test_median_and_quantile_agree_with_numpy(values, q):
    assert stats.median(values) == pytest.approx(np.median(values), rel=1e-12, abs=1e-9)
    assert stats.quantile(values, q) == pytest.approx(np.quantile(values, q), rel=1e-9, abs=1e-6)


@given(lists)
def test_mad_agrees_with_scipy(values):
    oracle = scipy.stats.median_abs_deviation(values, scale="normal")
    assert stats.mad_sd(values) == pytest.approx(oracle, rel=1e-4, abs=1e-9)  # 1.4826 is a rounded constant


def test_block_means_drop_the_oldest_remainder():
    assert stats.block_means([100, 1, 3, 5, 7], 2) == [2, 6]
    assert stats.block_means([1, 2], 5) == []
    with pytest.raises(ValueError, match="size=0"):
        stats.block_means([1.0], 0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "call",
    [
        lambda v: stats.median(v),
        lambda v: stats.quantile(v, 0.5),
        lambda v: stats.robust_z(1.0, v, 0.1),
        lambda v: stats.robust_z(v[-1], [1.0] * 9, 0.1),
        lambda v: stats.zlog(1.0, v),
        lambda v: stats.zlog(v[-1], [1.0] * 9),
        lambda v: stats.lag1(v),
        lambda v: stats.theil_sen(v),
        lambda v: stats.mann_kendall(v),
        lambda v: stats.two_window(v, v),
        lambda v: stats.block_means(v, 2),
        lambda v: stats.Cusum.fit(v),
        lambda v: stats.Cusum(0.0, 1.0).update(v[-1]),
        lambda v: stats.pool(v, [1.0] * len(v)),
    ],
)
def test_non_finite_values_are_refused(call, bad):
    with pytest.raises(ValueError, match=r"nan|inf"):
        call([1.0, 2.0, 3.0, 4.0] * 6 + [bad])


@pytest.mark.parametrize("call", [stats.median, lambda v: stats.quantile(v, 0.5)])
def test_an_empty_list_has_no_median(call):
    with pytest.raises(ValueError, match="at least one value"):
        call([])


def test_numpy_views_are_accepted():
    values = np.arange(40.0)[::2]
    assert stats.median(values) == stats.median(values.tolist()) == 19
    assert stats.mann_kendall(values) == stats.mann_kendall(values.tolist())


# ----------------------------------------------------------------------------------------------------- spikes


def test_robust_z_by_hand():
    # median 3, deviations 2 1 0 1 2 -> MAD 1
    assert stats.robust_z(9, [1, 2, 3, 4, 5], 0.1) == pytest.approx(6 / 1.4826)
    assert stats.robust_z(9, [1, 2, 3, 4, 5], 3.0) == 2
    assert stats.robust_z(-3, [1, 2, 3, 4, 5], 3.0) == -2


def test_robust_z_of_a_pinned_metric():
    assert stats.robust_z(7, [7] * 10, 0.0) == 0
    assert stats.robust_z(8, [7] * 10, 0.0) == stats.CAP
    assert stats.robust_z(6, [7] * 10, 0.0) == -stats.CAP
    assert stats.robust_z(8, [7] * 10, 0.5) == 2


def test_robust_z_needs_history_and_a_sane_floor():
    assert stats.robust_z(1, [1, 2, 3, 4], 0.1) is None
    with pytest.raises(ValueError, match="floor=-1"):
        stats.robust_z(1, [1, 2, 3, 4, 5], -1)


def test_zlog_by_hand():
    # All logs 0, so the floor 0.1 decides: log(e)/0.1 = 10.
    assert stats.zlog(math.e, [1.0] * 5) == pytest.approx(10)
    assert stats.zlog(math.e, [0.0, -3.0, *[1.0] * 5]) == pytest.approx(10)  # zeros and negatives do not count
    assert stats.zlog(math.e, [0.0] * 20 + [1.0] * 4) is None
    assert stats.zlog(0.0, [1.0] * 5) is None
    assert stats.zlog(-1.0, [1.0] * 5) is None


@given(st.lists(st.floats(1e-3, 1e3), min_size=5, max_size=50), st.floats(1e-3, 1e3), st.floats(1e-2, 1e2))
def test_zlog_ignores_the_unit(history, x, unit):
    assert stats.zlog(x * unit, [v * unit for v in history]) == pytest.approx(stats.zlog(x, history), abs=1e-6)


@given(st.lists(finite, min_size=5, max_size=50), finite, st.floats(0.01, 10))
def test_robust_z_moves_with_x(history, x, floor):
    z = stats.robust_z(x, history, floor)
    assert math.copysign(1, z) == math.copysign(1, x - stats.median(history)) or z == 0
    assert stats.robust_z(x + 1, history, floor) >= z
    assert abs(z) <= stats.CAP


# ----------------------------------------------------------------------------------------- serial correlation


def test_lag1_by_hand():
    # mean 2.5, d = -1.5 -.5 .5 1.5: products .75 -.25 .75 over squares 2.25 .25 .25 2.25
    assert stats.lag1([1, 2, 3, 4]) == pytest.approx(1.25 / 5)
    assert stats.lag1([1, -1, 1, -1]) == pytest.approx(-3 / 4)
    assert stats.lag1([5, 5, 5, 5]) is None
    assert stats.lag1([1, 2]) is None


def test_effective_phi_is_bias_corrected_and_bounded():
    assert stats.effective_phi(0.5, 50) == pytest.approx(0.5 + 2.5 / 50)
    assert stats.effective_phi(-0.6, 50) == 0
    assert stats.effective_phi(0.99, 50) == stats.MAX_PHI
    assert stats.effective_phi(None, 50) == 0
    assert stats.design_effect(0.5) == 3


def test_the_bias_correction_centres_the_estimate():
    """Simulated AR(1) series of 50: the mean estimate comes within 4 standard errors + the O(1/n^2) rest of phi."""
    rng = np.random.default_rng(3)
    phi, n, repeats = 0.5, 50, 2000
    x = rng.normal(size=(n, repeats))
    x[0] /= math.sqrt(1 - phi**2)
    for t in range(1, n):
        x[t] += phi * x[t - 1]
    raw = np.array([stats.lag1(series) for series in x.T])
    corrected = np.array([stats.effective_phi(r, n) for r in raw])
    tolerance = 4 * corrected.std() / math.sqrt(repeats) + 4 / n**2
    assert raw.mean() < phi - 0.03  # (1 + 3 * .5)/50 = .05 low
    assert abs(corrected.mean() - phi) < tolerance


# ------------------------------------------------------------------------------------------------------ CUSUM

BASELINE = [0.0, 1.0, -1.0, 0.5, -0.5] * 10


def test_cusum_scale_by_hand():
    drift = stats.Cusum.fit(BASELINE)
    # median 0, MAD 0.5, n = 50; raw variance (0 + 1 + 1 + .25 + .25) * 10 / 49; the lag-1 correlation is negative.
    assert drift.center == 0
    assert drift.sd == pytest.approx(1.4826 * 0.5 * 50 / 49.2)
    # A majority of equal values: MAD 0, so half the raw sd decides. 10 ones of 50: variance 10 * .8 * 50/49/50.
    mostly_equal = [0.0, 0.0, 1.0, 0.0, 0.0] * 10
    assert stats.Cusum.fit(mostly_equal).sd == pytest.approx(math.sqrt(0.2 * 0.8 * 50 / 49) / 2)
    assert stats.Cusum.fit(BASELINE, sd_floor=4.0).sd == 4.0


def test_cusum_pays_for_serial_correlation():
    slow = [0.0] * 5 + [1.0] * 5 + [0.0] * 5 + [-1.0] * 5 + [0.0] * 5 + [1.0] * 5 + [0.0] * 5 + [-1.0] * 5
    shuffled = [slow[(7 * i) % 40] for i in range(40)]
    phi = stats.effective_phi(stats.lag1(slow), 40)
    assert phi > 0.5
    assert stats.effective_phi(stats.lag1(shuffled), 40) == 0
    ratio = stats.Cusum.fit(slow).sd / stats.Cusum.fit(shuffled).sd
    assert ratio == pytest.approx(math.sqrt((1 + phi) / (1 - phi)))


def test_cusum_sums_by_hand():
    drift = stats.Cusum(center=10.0, sd=2.0)
    sums = []
    for x in [10, 14, 20, 8, 14, 15]:  # z = 0, 2, 5 -> 3, -1, 2, 2.5
        drift.update(x)
        sums.append(drift.statistic)
    assert sums == [0, 1, 3, 1, 2, 3.5]
    assert drift.onset == 1  # the sum was zero before the second value and never again


def test_cusum_alarm_onset_and_recovery():
    drift = stats.Cusum(0.0, 1.0)
    healthy = [0.5, -0.5, 1.5, -2.0]
    assert not any(drift.update(x) for x in healthy)
    # +3 or more adds 2 a value: 2 4 6 8 10, and the alarm is strictly above 8
    assert drift.first_alarm([3.0, 9.0, 100.0, 3.0, 3.0, 3.0]) == 4
    assert drift.onset == len(healthy)
    assert not drift.update(-1.0)  # S falls from 10 to 8
    assert not drift.alarm


@pytest.mark.parametrize(
    ("direction", "up", "down"), [("up", True, False), ("down", False, True), ("both", True, True)]
)
def test_cusum_direction(direction, up, down):
    def fires(x):
        return stats.Cusum(0.0, 1.0, direction=direction).first_alarm([x] * 20) is not None

    assert (fires(3.0), fires(-3.0)) == (up, down)


def test_cusum_both_reports_the_onset_of_the_side_that_alarms():
    drift = stats.Cusum(0.0, 1.0, direction="both")
    drift.first_alarm([2.0, 2.0, *[-3.0] * 9])
    assert drift.alarm and drift.down > drift.up
    assert drift.onset == 2


def test_cusum_unfit_baselines():
    assert stats.Cusum.fit(BASELINE[:19]) is None
    assert stats.Cusum.fit([0.1] * 50) is None
    assert stats.Cusum.fit([0.1] * 50, sd_floor=0.5).sd == 0.5


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"sd": 0.0}, "sd=0"),
        ({"center": math.nan}, "center=nan"),
        ({"direction": "sideways"}, "sideways"),
        ({"k": 3.0}, "k=3"),
    ],
)
def test_cusum_refuses_nonsense(kwargs, message):
    with pytest.raises(ValueError, match=message):
        stats.Cusum(**{"center": 0.0, "sd": 1.0, **kwargs})


@given(st.lists(finite, min_size=20, max_size=40), st.lists(finite, max_size=60), st.floats(0.1, 100), finite)
def test_cusum_does_not_care_about_units(baseline, values, scale, shift):
    assume(np.std(baseline) > 1e-3)
    one = stats.Cusum.fit(baseline)
    other = stats.Cusum.fit([scale * x + shift for x in baseline])
    for x in values:
        one.update(x)
        other.update(scale * x + shift)
    assert other.statistic == pytest.approx(one.statistic, rel=1e-3, abs=1e-3)


@given(st.lists(finite, max_size=80))
def test_cusum_mirrors(values):
    up, down = stats.Cusum(0.0, 1.0), stats.Cusum(0.0, 1.0, direction="down")
    both = stats.Cusum(0.0, 1.0, direction="both")
    for x in values:
        alarm = up.update(x), down.update(-x)
        assert alarm[0] == alarm[1]
        assert both.update(x) == (both.up > 8 or both.down > 8)
    assert (up.statistic, up.onset) == (down.statistic, down.onset)
    assert both.up == up.statistic


# ------------------------------------------------------------------------------------------------------ trend


def test_mann_kendall_by_hand():
    # 8 rising values: S = 28, var = 8*7*21/18, z = 27/sqrt(var); a straight line has no residual to correlate.
    trend = stats.mann_kendall([1, 2, 3, 4, 5, 6, 7, 8])
    assert trend.z == pytest.approx(27 / math.sqrt(8 * 7 * 21 / 18))
    assert (trend.slope, trend.change, trend.n, trend.phi) == (1, 8, 8, 0)
    # 1 1 2 2 3 3 4 4: 28 pairs less 4 ties = 24; var = (8*7*21 - 4 * 2*1*9)/18 = (1176 - 72)/18
    tied = stats.mann_kendall([1, 1, 2, 2, 3, 3, 4, 4])
    assert tied.phi == 0  # the residuals alternate
    assert tied.z == pytest.approx(23 / math.sqrt((1176 - 72) / 18))


def test_mann_kendall_corrects_for_serial_correlation():
    wave = [math.sin(2 * math.pi * t / 20) + 0.01 * t for t in range(50)]
    trend = stats.mann_kendall(wave)
    slope = stats.theil_sen(wave)
    ranks = scipy.stats.rankdata([x - slope * t for t, x in enumerate(wave)])
    phi = stats.effective_phi(stats.lag1(ranks), 50)
    assert phi > 0.8
    assert trend.phi == pytest.approx(phi)
    s = sum(np.sign(b - a) for i, a in enumerate(wave) for b in wave[i + 1 :])
    assert trend.z == pytest.approx((s - 1) / math.sqrt(50 * 49 * 105 / 18) / math.sqrt((1 + phi) / (1 - phi)))


def test_constants_and_short_series_have_no_trend():
    flat = stats.mann_kendall([0.1] * 30)
    assert (flat.z, flat.slope, flat.change) == (0, 0, 0)
    assert stats.mann_kendall([1, 2, 3, 4, 5, 6, 7]) is None
    assert stats.theil_sen([1]) is None
    assert stats.theil_sen([1, 3]) == 2


@given(st.lists(st.integers(-20, 20), min_size=8, max_size=40).map(lambda v: [float(x) for x in v]))
@settings(max_examples=60)
@example([0.0] * 7 + [1.0])
def test_trend_agrees_with_scipy(values):
    trend = stats.mann_kendall(values)
    n = len(values)
    assert trend.slope == pytest.approx(scipy.stats.theilslopes(values).slope, abs=1e-12)
    assert trend.change == pytest.approx(trend.slope * n)
    assume(min(values) < max(values))
    # Kendall's tau-b against time has S as its numerator: S = tau * sqrt(pairs * (pairs - tied pairs)).
    pairs = n * (n - 1) / 2
    sizes = np.unique(values, return_counts=True)[1]
    s = scipy.stats.kendalltau(range(n), values).statistic * math.sqrt(
        pairs * (pairs - (sizes * (sizes - 1) / 2).sum())
    )
    variance = (n * (n - 1) * (2 * n + 5) - (sizes * (sizes - 1) * (2 * sizes + 5)).sum()) / 18
    z = np.sign(round(s)) * max(abs(s) - 1, 0) / math.sqrt(variance) / math.sqrt((1 + trend.phi) / (1 - trend.phi))
    assert trend.z == pytest.approx(z, abs=1e-9)


@given(st.lists(finite, min_size=8, max_size=40), st.floats(0.5, 50))
def test_trend_is_odd_and_scales(values, scale):
    trend = stats.mann_kendall(values)
    mirrored = stats.mann_kendall([-x for x in values])
    assert mirrored.z == pytest.approx(-trend.z, abs=1e-9)
    assert mirrored.slope == pytest.approx(-trend.slope, abs=1e-9)
    assert 0 <= trend.phi <= stats.MAX_PHI
    assert stats.mann_kendall([scale * x for x in values]).slope == pytest.approx(scale * trend.slope, abs=1e-6)


# -------------------------------------------------------------------------------------------------- two windows


def test_two_window_by_hand():
    # means 2 and 6, both variances 1 over 3 values: se = sqrt(2/3)
    two = stats.two_window([1, 2, 3], [5, 6, 7], deff=1.0)
    assert (two.mean1, two.mean2, two.diff, two.n1, two.n2) == (2, 6, 4, 3, 3)
    assert two.se == pytest.approx(math.sqrt(2 / 3))
    assert two.t == pytest.approx(4 / math.sqrt(2 / 3))
    assert two.mde == pytest.approx(2.8 * two.se)
    assert stats.two_window([1, 2, 3], [5, 6, 7], deff=4.0).t == pytest.approx(two.t / 2)


def test_two_window_estimates_the_design_effect_within_windows():
    first = [0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0]
    second = [x + 100 for x in first]  # the step between the windows is no correlation
    r1 = stats.lag1(scipy.signal.detrend(first))
    phi = r1 + (1 + 3 * r1) / 20  # the same in both windows
    assert phi > 0.2
    two = stats.two_window(first, second)
    v = 20 * 0.25 / 19
    assert two.se == pytest.approx(math.sqrt((1 + phi) / (1 - phi) * 2 * v / 20))
    alternating = [0.0, 1.0] * 10
    assert stats.two_window(alternating, alternating).se == pytest.approx(math.sqrt(2 * v / 20))  # deff stays at 1


def test_two_window_of_constants():
    assert stats.two_window([1.0] * 5, [1.0] * 5).t == 0
    assert stats.two_window([0.1] * 5, [0.0] * 5).t == -stats.CAP
    assert stats.two_window([1.0] * 4, [2.0] * 4, deff=1.0, sd_floor=1.0).t == pytest.approx(1 / math.sqrt(2 / 4))


def test_two_window_refuses_too_little_and_nonsense():
    assert stats.two_window([1, 2], [1, 2, 3]) is None
    with pytest.raises(ValueError, match=r"deff=0\.5"):
        stats.two_window([1, 2, 3], [1, 2, 3], deff=0.5)


windows = st.lists(st.integers(-50, 50), min_size=3, max_size=30)


@given(windows, windows)
def test_two_window_agrees_with_welch(first, second):
    assume(len(set(first)) > 1 and len(set(second)) > 1)
    oracle = scipy.stats.ttest_ind(second, first, equal_var=False)
    assert stats.two_window(first, second, deff=1.0).t == pytest.approx(oracle.statistic, abs=1e-9)
    estimated = stats.two_window(first, second)
    assert abs(estimated.t) <= abs(oracle.statistic) + 1e-9
    assert stats.two_window(second, first).t == pytest.approx(-estimated.t)


@pytest.mark.parametrize(
    ("n_per_step", "row"),
    [  # p = rho = .5, groups of 8: the design effect is 1 + 7 * .5 = 4.5
        (8, (0.47, 0.30, 0.21)),
        (16, (0.33, 0.21, 0.15)),
        (64, (0.17, 0.10, 0.07)),
        (256, (0.08, 0.05, 0.04)),
        (512, (0.06, 0.04, 0.03)),
    ],
)
def test_mde_binary_table(n_per_step, row):
    for window, expected in zip((10, 25, 50), row):
        by_hand = 2.8 * math.sqrt(2 * 0.25 * 4.5 / (n_per_step * window))
        assert stats.mde_binary(0.5, n_per_step, window, 8, 0.5) == pytest.approx(by_hand)
        assert by_hand == pytest.approx(expected, abs=0.0051)  # the table has two decimals


@pytest.mark.parametrize(
    "bad", [(1.5, 8, 10, 8, 0.5), (0.5, 0, 10, 8, 0.5), (0.5, 8, 10, 0, 0.5), (0.5, 8, 10, 8, -1)]
)
def test_mde_binary_refuses_nonsense(bad):
    with pytest.raises(ValueError, match="mde_binary needs"):
        stats.mde_binary(*bad)


# ----------------------------------------------------------------------------------------------------- counts


def test_binomial_tail_by_hand():
    assert stats.binomial_tail(3, 3, 0.5) == pytest.approx(1 / 8)
    assert stats.binomial_tail(2, 3, 0.5) == pytest.approx(4 / 8)
    assert stats.binomial_tail(1, 10, 0.1) == pytest.approx(1 - 0.9**10)
    assert stats.binomial_tail(0, 10, 0.1) == 1
    assert stats.binomial_tail(1, 10, 0.0) == 0
    assert stats.binomial_tail(10, 10, 1.0) == 1


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(1e-6, 1 - 1e-6))
def test_binomial_tail_agrees_with_scipy(kn, p):
    k, n = kn
    oracle = scipy.stats.binom.sf(k - 1, n, p)
    assume(oracle > 1e-280)
    assert stats.binomial_tail(k, n, p) == pytest.approx(oracle, rel=1e-8)


@pytest.mark.parametrize("p", [1e-5, 0.1, 0.5, 0.93])
@pytest.mark.parametrize("sigmas", [-6, -1, 0, 1, 6, 20])
def test_binomial_tail_of_a_million_trials(p, sigmas):
    n = 1_000_000
    k = min(max(round(n * p + sigmas * math.sqrt(n * p * (1 - p))), 0), n)
    assert stats.binomial_tail(k, n, p) == pytest.approx(scipy.stats.binom.sf(k - 1, n, p), rel=1e-7)


def test_binomial_tail_underflows_to_zero_quietly():
    assert stats.binomial_tail(1_000_000, 1_000_000, 0.01) == 0


@pytest.mark.parametrize("bad", [(-1, 3, 0.5), (4, 3, 0.5), (1, 3, 1.5), (math.nan, 3, 0.5), (1, 3, math.nan)])
def test_binomial_tail_refuses_nonsense(bad):
    with pytest.raises(ValueError, match="binomial_tail needs"):
        stats.binomial_tail(*bad)


@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.sampled_from([0.9, 0.95]))
@settings(max_examples=50)
def test_clopper_pearson_agrees_with_scipy(kn, confidence):
    k, n = kn
    oracle = scipy.stats.binomtest(k, n).proportion_ci(confidence, method="exact")
    assert stats.clopper_pearson(k, n, confidence) == pytest.approx((oracle.low, oracle.high), abs=1e-9)


def test_no_alarm_in_sixty_runs_bounds_the_rate_at_five_percent():
    # One-sided 95 %: 1 - .05**(1/60) = .0487 (the rule of three says 3/60).
    assert stats.clopper_pearson(0, 60, 0.90)[1] == pytest.approx(1 - 0.05 ** (1 / 60))


def test_pooled():
    pooled = stats.Pooled(31, 100)
    assert pooled.mean == 0.31
    assert pooled.p_value(0.2) == pytest.approx(scipy.stats.binom.sf(30, 100, 0.2))  # .0061
    assert not pooled.exceeds(0.2)
    assert pooled.exceeds(0.2, alpha=0.01)
    assert pooled.interval() == stats.clopper_pearson(31, 100)
    # 69 of 100 against .8 is the same question upside down.
    assert stats.Pooled(69, 100).below(0.8, alpha=0.01)
    assert not stats.Pooled(69, 100).below(0.8)
    assert stats.Pooled(0, 100).exceeds(0.0) is False


def test_pooled_in_correlated_groups_counts_for_less():
    pooled = stats.Pooled(320, 800)
    assert pooled.exceeds(0.3)
    assert pooled.p_value(0.3, deff=8.0) == pytest.approx(stats.Pooled(40, 100).p_value(0.3))
    assert not pooled.exceeds(0.3, deff=8.0)
    with pytest.raises(ValueError, match="deff=0"):
        pooled.exceeds(0.3, deff=0)


@pytest.mark.parametrize("bad", [(1, 0), (3, 2), (-1, 2), (math.nan, 2)])
def test_pooled_refuses_nonsense(bad):
    with pytest.raises(ValueError, match="Pooled needs"):
        stats.Pooled(*bad)


def test_pool_restores_counts():
    # 3/7 + 2/7 + 9/49: 3 + 2 + 9 hits of 63
    assert stats.pool([3 / 7, 2 / 7, 9 / 49], [7, 7, 49]) == stats.Pooled(14.0, 63.0)
    assert stats.pool([], []) is None
    assert stats.pool([0.5], [0]) is None
    with pytest.raises(ValueError, match="2 rates but 1 counts"):
        stats.pool([0.5, 0.5], [1])


@given(st.floats(0, 40), st.floats(0.5, 40), st.floats(0.01, 0.99), st.floats(0, 5))
def test_the_tail_falls_with_k_and_rises_with_p(k, rest, p, more):
    n = k + rest + more
    tail = stats.binomial_tail(k, n, p)
    assert 0 <= stats.binomial_tail(k + more, n, p) <= tail + 1e-12
    assert stats.binomial_tail(k, n, min(1.0, p + 0.005)) >= tail - 1e-12
