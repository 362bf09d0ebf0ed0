"""How sure a comparison is: intervals, paired tests, corrections, ranks. Pure functions, numpy and scipy only.

A value is one run's metric; the runs of a group differ by their seeds and are taken to be independent. Everything random
is drawn from a fixed seed: the same values give the same numbers.

Sources: Efron 1987 (BCa); Agarwal et al. 2021 (rliable, arXiv:2108.13264); Fisher 1935 and Phipson & Smyth 2010
(permutation tests); Holm 1979; Hedges 1981; Demšar 2006 (comparisons over several data sets).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats

Array = NDArray[np.float64]

LEVEL = 0.95  # of all intervals
ALPHA = 0.05  # of all tests
# Fewer values than this get Student's interval, more the BCa bootstrap. Measured coverage of nominal 95 % intervals
# (2,000 draws; normal / exponential values): n = 5: t 0.95 / 0.88, BCa 0.83 / 0.80; n = 10: t 0.96 / 0.90, BCa 0.91 / 0.88;
# n = 20: t 0.96 / 0.92, BCa 0.93 / 0.92. From 20 on they agree, and BCa need not be symmetric.
FEWEST_FOR_BOOTSTRAP = 20
FEWEST_FOR_IQM = 4  # a quarter of fewer is no value at all: the interquartile mean would be the mean
RESAMPLES = 9_999
MOST_PAIRS_EXACT = 16  # 2^16 sign patterns are enumerated; of more pairs as many are drawn


@dataclass(frozen=True)
class Interval:
    """A confidence interval (level `LEVEL`), in the unit of the values."""

    low: float
    high: float
    method: Literal["t", "BCa", "percentile"]


def mean_interval(values: Sequence[float]) -> Interval | None:
    """Confidence interval of the mean: Student's below `FEWEST_FOR_BOOTSTRAP` values, BCa from there on.

    None for fewer than two values.
    """
    return t_interval(values) if len(values) < FEWEST_FOR_BOOTSTRAP else bca_interval(values)


def t_interval(values: Sequence[float]) -> Interval | None:
    """x̄ ± t_{n−1, 1−α/2} · s/√n (Student 1908), s with n − 1. Exact for normal values of any number ≥ 2; else None."""
    x = np.asarray(values, dtype=float)
    if x.size < 2:
        return None
    half = stats.t.ppf((1 + LEVEL) / 2, x.size - 1) * x.std(ddof=1) / math.sqrt(x.size)
    return Interval(float(x.mean() - half), float(x.mean() + half), "t")


def bca_interval(values: Sequence[float]) -> Interval | None:
    """Bias-corrected and accelerated bootstrap interval of the mean (Efron 1987), by `scipy.stats.bootstrap`.

    None for fewer than two values. Too narrow for few values: see `FEWEST_FOR_BOOTSTRAP`.
    """
    x = np.asarray(values, dtype=float)
    if x.size < 2:
        return None
    if np.ptp(x) == 0:
        return Interval(float(x[0]), float(x[0]), "BCa")
    generator: dict[str, Any] = {
        "random_state": np.random.default_rng(0)
    }  # `rng` from SciPy 1.15 on, which takes the old name too
    interval = stats.bootstrap(
        (x,), np.mean, n_resamples=RESAMPLES, batch=1_000, confidence_level=LEVEL, method="BCa", **generator
    ).confidence_interval
    return Interval(float(interval.low), float(interval.high), "BCa")


def interquartile_mean(values: ArrayLike) -> float:
    """Mean of what is left without the lowest and the highest ⌊n/4⌋ values (IQM of Agarwal et al. 2021)."""
    return float(stats.trim_mean(np.asarray(values, dtype=float).ravel(), 0.25))


def interquartile_interval(strata: Sequence[Sequence[float]]) -> Interval | None:
    """Percentile interval of the IQM of all values under the stratified bootstrap (Agarwal et al. 2021, Section 4.3).

    Args:
        strata: the runs of each task (here: stream). Runs are drawn with replacement within their task, so that every
            task keeps its weight.

    Returns:
        None where there are fewer than `FEWEST_FOR_IQM` values, or a task with fewer than two. Too narrow for few runs in
        all: the source takes several tasks together, and about ten runs of one task are needed.
    """
    parts = [np.asarray(values, dtype=float) for values in strata]
    if sum(part.size for part in parts) < FEWEST_FOR_IQM or min(part.size for part in parts) < 2:
        return None
    rng = np.random.default_rng(0)
    drawn = np.concatenate([part[rng.integers(0, part.size, (RESAMPLES, part.size))] for part in parts], axis=1)
    low, high = np.quantile(stats.trim_mean(drawn, 0.25, axis=1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(low), float(high), "percentile")


@dataclass(frozen=True)
class Paired:
    """Two groups over the same seeds and class orders; differences are first minus second, in the unit of the values.

    `p_exact` of the sign-flip test, `p_t` of the paired t-test; `effect` in standard deviations of the differences;
    `superiority` the share of pairs in which the first is higher. None: not defined for so few pairs, or for
    differences that are all the same.
    """

    n: int
    difference: float
    interval: Interval | None
    p_exact: float
    p_t: float | None
    effect: float | None
    superiority: float


def paired(first: Sequence[float], second: Sequence[float]) -> Paired | None:
    """Everything that is said of two groups of values that belong together pair by pair; None without a pair."""
    d = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)
    if not d.size:
        return None
    varied = d.size > 1 and float(np.ptp(d)) > 1e-12
    test: Any = stats.ttest_1samp(d, 0.0) if varied else None
    return Paired(
        n=d.size,
        difference=float(d.mean()),
        interval=mean_interval(d.tolist()),
        p_exact=sign_flip_test(d),
        p_t=float(test.pvalue) if varied else None,
        effect=effect_size(d) if varied else None,
        superiority=float(((d > 0) + 0.5 * (d == 0)).mean()),
    )


def sign_flip_test(differences: ArrayLike) -> float:
    """Two-sided p of the paired permutation test on the mean (Fisher 1935): the share of all 2^n patterns of signs whose
    |mean| is at least the one seen.

    Assumes only that a difference is as likely positive as negative where the two groups are the same. With n pairs the
    smallest p that is possible is 2 / 2^n (`smallest_p`). From `MOST_PAIRS_EXACT` + 1 pairs on, patterns are drawn, and p is
    (hits + 1) / (draws + 1) (Phipson & Smyth 2010).
    """
    d = np.asarray(differences, dtype=float)
    n = min(d.size, MOST_PAIRS_EXACT)
    if d.size > MOST_PAIRS_EXACT:
        signs = np.random.default_rng(0).integers(0, 2, (2**n - 1, d.size))
    else:
        signs = np.arange(2**n)[:, None] >> np.arange(n) & 1
    sums = np.abs((2.0 * signs - 1.0) @ d)
    # A pattern that gives the same sum in another order of addition counts as equal.
    hits = int((sums >= abs(d.sum()) - 1e-12 * max(float(np.abs(d).sum()), 1e-300)).sum())
    return (hits + 1) / (len(signs) + 1) if d.size > MOST_PAIRS_EXACT else hits / len(signs)


def smallest_p(n: int) -> float:
    """The smallest two-sided p that `sign_flip_test` can give for n pairs: 2 / 2^n."""
    return min(1.0, 2.0 / 2 ** min(n, MOST_PAIRS_EXACT))


def pairs_needed(comparisons: int = 1, alpha: float = ALPHA) -> int:
    """The fewest pairs with which `sign_flip_test` can be significant after `holm` over so many comparisons."""
    return math.ceil(math.log2(2 * max(comparisons, 1) / alpha) - 1e-12)


def effect_size(differences: ArrayLike) -> float | None:
    """Cohen's d_z = mean / standard deviation of the differences, times Hedges' exact correction
    J = Γ(m/2) / (√(m/2) · Γ((m−1)/2)), m = n − 1 (Hedges 1981). None for fewer than three pairs or equal differences."""
    d = np.asarray(differences, dtype=float)
    deviation = float(d.std(ddof=1)) if d.size > 2 else 0.0
    if deviation <= 1e-12:
        return None
    m = d.size - 1
    correction = math.exp(special.gammaln(m / 2) - special.gammaln((m - 1) / 2)) / math.sqrt(m / 2)
    return float(d.mean()) / deviation * correction


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjusted p-values of Holm 1979: in ascending order max_{l≤k} min(1, (m − l + 1) · p_(l)); None stays, uncounted."""
    known = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, i) in enumerate(known):
        highest = max(highest, min(1.0, (len(known) - rank) * p))
        adjusted[i] = highest
    return adjusted


@dataclass(frozen=True)
class Ranking:
    """Groups over several streams. `ranks` [streams, groups], 1 is best, ties share; `average` [groups].

    `statistic` is Friedman's χ²_F (two groups: not defined), `p` that of the null hypothesis that the groups are the
    same; two average ranks that differ by at least `critical_difference` do so significantly (Nemenyi).
    """

    ranks: Array
    average: Array
    statistic: float | None
    p: float
    critical_difference: float


def rank(scores: ArrayLike, higher_is_better: ArrayLike = True) -> Ranking:
    """Average ranks of k groups over N streams, Friedman's test and Nemenyi's critical difference (Demšar 2006, Section 3.2).

    The p-value is that of χ²_F under permutations within streams (`RESAMPLES` draws), because the χ² distribution needs
    about N > 10 and k > 5; of two groups that of the exact sign test, which is the same test for k = 2.

    Args:
        scores: [N, k], one value for each stream and group.
        higher_is_better: for all streams, or for each [N].
    """
    values = np.asarray(scores, dtype=float)
    sign = np.where(np.broadcast_to(np.asarray(higher_is_better, dtype=bool), len(values)), -1.0, 1.0)
    ranks = stats.rankdata(sign[:, None] * values, axis=1)
    n, k = ranks.shape
    if k == 2:
        wins, losses = int((ranks[:, 0] < ranks[:, 1]).sum()), int((ranks[:, 0] > ranks[:, 1]).sum())
        statistic, p = None, float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
    elif np.ptp(ranks, axis=1).max() == 0:  # all tied everywhere
        statistic, p = 0.0, 1.0
    else:
        statistic = float(stats.friedmanchisquare(*ranks.T).statistic)
        p = _permuted(ranks)
    return Ranking(ranks, ranks.mean(0), statistic, p, critical_difference(k, n))


def _permuted(ranks: Array) -> float:
    """p of Friedman's statistic, which rises with the sum of squared rank sums, under permutations within rows."""
    rng = np.random.default_rng(0)
    k = ranks.shape[1]
    sums = np.zeros((RESAMPLES, k))
    for row in ranks:
        sums += rng.permuted(np.broadcast_to(row, (RESAMPLES, k)), axis=1)
    hits = int(((sums**2).sum(1) >= (ranks.sum(0) ** 2).sum() - 1e-9).sum())
    return (hits + 1) / (RESAMPLES + 1)


def critical_difference(k: int, n: int, alpha: float = ALPHA) -> float:
    """Nemenyi's critical difference of average ranks: q_α · √(k(k+1) / 6N), q_α the Studentized range for k groups and
    infinite degrees of freedom divided by √2 (Demšar 2006, Table 5a)."""
    q = float(stats.studentized_range.ppf(1 - alpha, k, np.inf)) / math.sqrt(2)
    return q * math.sqrt(k * (k + 1) / (6 * n))
