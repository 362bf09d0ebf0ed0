"""Intervals, tests and ranks against numbers worked out by hand, SciPy's own, statsmodels' and Demšar's paper."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from clplatform.metric.statistics import (
    ALPHA,
    FEWEST_FOR_BOOTSTRAP,
    bca_interval,
    critical_difference,
    effect_size,
    holm,
    interquartile_interval,
    interquartile_mean,
    mean_interval,
    paired,
    pairs_needed,
    rank,
    sign_flip_test,
    smallest_p,
    t_interval,
)

FIRST, SECOND = [0.83, 0.85, 0.81, 0.90, 0.88], [0.80, 0.84, 0.82, 0.85, 0.86]

# Demšar 2006, Table 6: C4.5 with none, one or both of two parameters tuned, on 14 data sets.
# (0.9751 is printed as 0.975, but ranked before the 0.975 beside it.)
DEMSAR = [
    [0.763, 0.768, 0.771, 0.798], [0.599, 0.591, 0.590, 0.569], [0.954, 0.971, 0.968, 0.967], [0.628, 0.661, 0.654, 0.657],
    [0.882, 0.888, 0.886, 0.898], [0.936, 0.931, 0.916, 0.931], [0.661, 0.668, 0.609, 0.685], [0.583, 0.583, 0.563, 0.625],
    [0.775, 0.838, 0.866, 0.875], [1.000, 1.000, 1.000, 1.000], [0.940, 0.962, 0.965, 0.962], [0.619, 0.666, 0.614, 0.669],
    [0.972, 0.981, 0.9751, 0.975], [0.957, 0.978, 0.946, 0.970],
]  # fmt: skip


# -- intervals ------------------------------------------------------------------------------------------------------


def test_students_interval():
    interval = t_interval(FIRST)
    assert interval is not None
    # statsmodels' DescrStatsW(...).tconfint_mean(0.05)
    assert (interval.low, interval.high) == pytest.approx((0.8087175507034015, 0.8992824492965987), abs=1e-12)
    by_hand = t_interval([1.0, 3.0])  # t_{1, 0.975} = 12.706, s/√n = 1
    assert by_hand is not None
    assert by_hand.high == pytest.approx(2 + 12.7062, abs=1e-4)


def test_few_values_get_students_interval_and_many_the_bootstrap():
    values = np.random.default_rng(0).random(FEWEST_FOR_BOOTSTRAP).tolist()
    few, many = mean_interval(values[:-1]), mean_interval(values)
    assert few is not None
    assert many is not None
    assert (few.method, many.method) == ("t", "BCa")
    assert mean_interval(values) == many  # the same values, the same numbers


@pytest.mark.parametrize("interval", [t_interval, bca_interval, mean_interval])
def test_one_value_has_no_interval_and_equal_values_an_empty_one(interval):
    assert interval([]) is interval([0.5]) is None
    equal = interval([0.5] * 25)
    assert equal.low == equal.high == 0.5


def bca_by_the_book(x: np.ndarray, draws: int) -> tuple[float, float]:
    """Efron 1987 as it is written, with another generator."""
    means = x[np.random.default_rng(7).integers(0, x.size, (draws, x.size))].mean(1)
    bias = stats.norm.ppf(((means < x.mean()).mean() + (means <= x.mean()).mean()) / 2)
    left_out = (x.sum() - x) / (x.size - 1)
    away = left_out.mean() - left_out
    acceleration = (away**3).sum() / (6 * (away**2).sum() ** 1.5)
    z = stats.norm.ppf([0.025, 0.975])
    low, high = np.quantile(means, stats.norm.cdf(bias + (bias + z) / (1 - acceleration * (bias + z))))
    return float(low), float(high)


def test_bca_is_that_of_its_source():
    x = np.random.default_rng(1).exponential(size=30)
    interval = bca_interval(x.tolist())
    assert interval is not None
    assert (interval.low, interval.high) == pytest.approx(bca_by_the_book(x, 200_000), abs=0.03)
    assert interval.high - x.mean() > 1.1 * (x.mean() - interval.low)  # skewed values, a skewed interval


def test_the_interval_of_few_normal_values_keeps_its_level():
    """What is said in `FEWEST_FOR_BOOTSTRAP`: of five values Student's interval holds the mean 95 times of 100."""
    drawn = np.random.default_rng(2).standard_normal((2_000, 5))
    intervals = [mean_interval(row.tolist()) for row in drawn]
    held = np.mean([i is not None and i.low <= 0 <= i.high for i in intervals])
    assert held == pytest.approx(0.95, abs=0.02)


# -- interquartile mean ---------------------------------------------------------------------------------------------


def test_interquartile_mean_leaves_out_a_quarter_at_each_end():
    assert interquartile_mean([8, 1, 2, 3, 4, 5, 6, 7]) == 4.5
    assert interquartile_mean([[100, 0], [2, 10], [1, 1]]) == pytest.approx((1 + 1 + 2 + 10) / 4)
    assert interquartile_mean([0, 1, 2, 10, 100]) == pytest.approx(13 / 3)  # ⌊5/4⌋ = 1 at each end


def test_runs_are_drawn_within_their_stream():
    """Were they drawn from all, the share of the two streams would vary, and with it the mean."""
    interval = interquartile_interval([[0.1] * 4, [0.9] * 4])
    assert interval is not None
    assert interval.low == interval.high == pytest.approx(0.5)


def test_the_interval_of_the_interquartile_mean():
    values = np.random.default_rng(3).normal(0.7, 0.1, 40)
    interval = interquartile_interval([values[:20].tolist(), values[20:].tolist()])
    assert interval is not None
    assert interval.low < interquartile_mean(values) < interval.high
    assert 0.02 < interval.high - interval.low < 0.12  # about 4 · 0.1 · √1.2 / √40
    assert interquartile_interval([[0.1, 0.2, 0.3]]) is None
    assert interquartile_interval([[0.1, 0.2, 0.3], [0.4]]) is None


# -- pairs ----------------------------------------------------------------------------------------------------------


def test_two_groups_over_the_same_seeds():
    result = paired(FIRST, SECOND)
    assert result is not None
    assert (result.n, result.difference, result.superiority) == (5, pytest.approx(0.02), 0.8)
    assert result.p_t == pytest.approx(stats.ttest_rel(FIRST, SECOND).pvalue)
    assert result.p_exact == 6 / 32
    assert result.interval is not None
    assert result.interval.low < 0 < result.interval.high  # as p_t > 0.05 says
    turned = paired(SECOND, FIRST)
    assert turned is not None
    assert (turned.difference, turned.p_exact) == (pytest.approx(-0.02), result.p_exact)
    assert turned.superiority == pytest.approx(0.2)


@pytest.mark.parametrize("n", [3, 6, 9])
def test_the_sign_flip_test_is_scipys(n: int):
    d = np.round(np.random.default_rng(n).normal(0.3, 1, n), 1)  # with ties
    exact = stats.permutation_test((d,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert sign_flip_test(d) == pytest.approx(exact.pvalue, abs=1e-12)


def test_many_pairs_are_drawn():
    d = np.random.default_rng(4).normal(0.4, 1, 18)
    signs = 2.0 * (np.arange(2**18)[:, None] >> np.arange(18) & 1) - 1
    exact = (np.abs(signs @ d) >= abs(d.sum()) - 1e-12).mean()
    assert sign_flip_test(d) == pytest.approx(exact, abs=0.005)
    assert sign_flip_test(d) == sign_flip_test(d)
    assert 0 < sign_flip_test(np.ones(30)) < 1e-4  # never zero


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_the_smallest_p_that_is_possible(n: int):
    assert sign_flip_test(np.arange(1, n + 1)) == smallest_p(n) == pytest.approx(2 / 2**n)


def test_no_difference_is_no_evidence():
    same = paired(FIRST, FIRST)
    assert same is not None
    assert (same.p_exact, same.p_t, same.effect, same.superiority) == (1.0, None, None, 0.5)
    assert paired([], []) is None


@pytest.mark.parametrize(("comparisons", "pairs"), [(1, 6), (2, 7), (4, 8), (5, 8), (7, 9), (100, 12)])
def test_how_many_pairs_it_takes(comparisons: int, pairs: int):
    assert pairs_needed(comparisons) == pairs
    assert comparisons * smallest_p(pairs) <= ALPHA < comparisons * smallest_p(pairs - 1)


def test_hedges_correction():
    assert effect_size([1.0, 2.0, 3.0]) == pytest.approx(2 / math.sqrt(math.pi))  # d_z = 2; Γ(1) / Γ(1/2) = 1/√π
    n, d = 50, np.random.default_rng(5).normal(1, 1, 50)
    assert effect_size(d) == pytest.approx(d.mean() / d.std(ddof=1) * (1 - 3 / (4 * (n - 1) - 1)), rel=1e-3)
    assert effect_size([1.0, 2.0]) is None  # the correction is zero
    assert effect_size([0.5, 0.5, 0.5]) is None


def test_holm():
    # statsmodels' multipletests(..., method="holm")
    assert holm([0.01, 0.04, 0.03, 0.005, 0.2]) == pytest.approx([0.04, 0.09, 0.09, 0.025, 0.2])
    assert holm([0.4, None, 0.6]) == [0.8, None, 0.8]  # never above 1, never falling; None is no comparison
    assert holm([]) == []


# -- ranks ----------------------------------------------------------------------------------------------------------


def test_the_example_of_demsar():
    result = rank(DEMSAR)
    assert result.average == pytest.approx([3.143, 2.000, 2.893, 1.964], abs=5e-4)
    assert result.critical_difference == pytest.approx(1.25, abs=5e-3)
    n, k = 14, 4
    uncorrected = 12 * n / (k * (k + 1)) * ((result.average**2).sum() - k * (k + 1) ** 2 / 4)
    assert uncorrected == pytest.approx(9.28, abs=5e-3)  # the paper's, which does not correct for ties
    assert result.statistic == pytest.approx(stats.friedmanchisquare(*np.array(DEMSAR).T).statistic)
    assert result.p == pytest.approx(stats.chi2.sf(result.statistic, k - 1), abs=0.01)


@pytest.mark.parametrize(("k", "q"), [(2, 1.960), (3, 2.343), (4, 2.569), (5, 2.728), (10, 3.164)])
def test_nemenyis_critical_values(k: int, q: float):
    """Demšar 2006, Table 5a."""
    assert critical_difference(k, 1) / math.sqrt(k * (k + 1) / 6) == pytest.approx(q, abs=1.1e-3)


def test_lower_may_be_better_on_some_streams():
    result = rank([[0.9, 0.8, 0.7], [10.0, 20.0, 30.0]], [True, False])
    assert result.ranks.tolist() == [[1, 2, 3], [1, 2, 3]]
    assert rank([[0.9, 0.9, 0.7]]).ranks.tolist() == [[1.5, 1.5, 3]]


def test_few_streams_have_a_p_value_of_their_own():
    """Three streams that agree on three groups: 6 of the 6³ orders are as extreme; χ² with 2 degrees would say 0.0498."""
    assert rank([[3, 2, 1]] * 3).p == pytest.approx(1 / 36, abs=0.006)
    assert rank([[3, 2, 1], [1, 3, 2], [2, 1, 3]]).p == 1.0
    assert rank([[1, 1, 1]] * 4).p == 1.0


def test_two_groups_have_the_sign_test():
    assert rank([[2, 1]] * 5).p == 2 / 32
    assert rank([[2, 1]] * 5 + [[1, 1]]).p == 2 / 32  # a tie says nothing
    assert rank([[1, 1]]).p == 1.0
