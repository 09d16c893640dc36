"""Whether training made a metric better: one rule, which the sentence, the JSON and the exit code read.

    sums before and after, of each cluster -> Change: its value, 95% interval and p-value -> "better", "worse" or
    "cannot tell"

A cluster is what was drawn independently of the others: a prompt with all its answers, or an example with its tokens.
Better and worse need two things:

    p < .05                   by a two-sided sign-flip test of the clusters' sums (Fisher, The Design of Experiments,
                              1935, sec. 21). If all sums have the same size, as for right and wrong answers to one
                              prompt each, it is the exact test of McNemar (Psychometrika 12, 1947).
    an interval without 0     a t interval over clusters; Agresti and Min's if the answers of each cluster are all right
                              or all wrong

Fewer clusters than FEWEST cannot have such a p-value. The test does not depend on the order of the clusters.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import sqrt
from statistics import NormalDist
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats: TypeAlias = NDArray[np.float64]
Finding: TypeAlias = Literal["better", "worse", "cannot tell"]
Z = NormalDist().inv_cdf(0.975)  # half the width of a 95% interval, in standard errors
LEVEL = 0.05
FEWEST = 6  # clusters: the smallest p-value of 5 is 2 / 2^5 = .0625
MOST_MISSING = 0.05  # share of the answers without a score; above it, those that have one may be a special choice
MOST_EXACT = 14  # clusters whose signs are all tried; for more clusters, DRAWS random choices are
DRAWS, DRAWS_AT_ONCE = 9999, 2**21  # DRAWS_AT_ONCE: signs
FIRST_T = (12.7062, 4.3027, 3.1824, 2.7764)  # 97.5% quantiles of Student's t with 1 to 4 degrees of freedom


class Interval(NamedTuple):
    """An estimate and the ends of its confidence interval, which are NaN if fewer than two examples have tokens."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Change:
    """after - before."""

    interval: Interval  # per answer, 95%
    sums: Floats  # of each cluster
    missing: float  # share of the answers that are left out, because they have no score before or after
    higher_is_better: bool

    @cached_property
    def p_value(self) -> float:
        return sign_flip_test(self.sums)

    @property
    def numbers(self) -> str:
        """The interval in words, and the p-value if the interval alone would show a change."""
        _, low, high = self.interval
        p = "" if low <= 0 <= high else f", p = {self.p_value:.3f}" if self.p_value >= 0.001 else ", p below .001"
        return f"95% interval {low:+.3f} to {high:+.3f}{p}"

    @property
    def is_too_few(self) -> bool:
        return len(self.sums) < FEWEST

    @cached_property
    def finding(self) -> Finding:
        _, low, high = self.interval
        if not (low > 0 or high < 0) or self.is_too_few or self.missing > MOST_MISSING or self.p_value >= LEVEL:
            return "cannot tell"
        return "better" if (low > 0) == self.higher_is_better else "worse"


def change_of(
    before: ArrayLike,
    after: ArrayLike,
    counts: ArrayLike | None = None,
    *,
    missing: int = 0,
    higher_is_better: bool = True,
) -> Change:
    """Compares the scores of the same clusters. Raises ValueError if there are none.

    before, after: sums over the answers of each cluster, counts: how many it has, by default one; all (clusters,).
    missing: number of answers that are left out.
    """
    counts = np.ones(np.shape(before)) if counts is None else counts
    first, second, answers = (np.asarray(values, dtype=np.float64) for values in (before, after, counts))
    first, second, answers = (values[answers > 0] for values in (first, second, answers))
    if not len(answers):
        raise ValueError("expected at least one cluster with answers")
    if (answers == answers[0]).all() and np.isin([first / answers, second / answers], (0, 1)).all():
        interval = share_difference(first / answers, second / answers)
    else:
        interval = ratio_interval(second - first, answers)
    share = missing / (missing + float(answers.sum()))
    return Change(interval, second - first, share, higher_is_better)


# ---- The test


def sign_flip_test(sums: Floats) -> float:
    """Returns the share of all choices of signs whose sum is at least as far from 0: (clusters,) -> p."""
    sizes = np.sort(np.abs(sums[sums != 0]))
    clusters, apart = len(sizes), abs(float(sums.sum())) - 1e-9 * float(sizes.sum())  # sums may be rounded
    if not clusters:
        return 1.0
    if sizes[0] == sizes[-1]:
        return _binomial_test(clusters, round((clusters - abs(float(sums.sum())) / sizes[0]) / 2))
    if clusters <= MOST_EXACT:
        signs = np.arange(2**clusters)[:, None] >> np.arange(clusters) & 1
        return float((np.abs(2 * (signs @ sizes) - sizes.sum()) >= apart).mean())
    far = sum(int((np.abs(2 * (signs @ sizes) - sizes.sum()) >= apart).sum()) for signs in _random_signs(clusters))
    return (1 + far) / (1 + DRAWS)  # the observed signs are one of the choices


def _random_signs(clusters: int) -> Iterator[NDArray[np.int8]]:
    """Yields DRAWS rows of 0 and 1, some at a time."""
    generator, at_once = np.random.default_rng(0), max(1, DRAWS_AT_ONCE // clusters)
    for start in range(0, DRAWS, at_once):
        yield generator.integers(2, size=(min(at_once, DRAWS - start), clusters), dtype=np.int8)


def _binomial_test(n: int, fewer: int) -> float:
    """Returns twice the probability of at most `fewer` heads of n fair coins. fewer: at most half of n."""
    total = term = 1
    for k in range(fewer):
        term = term * (n - k) // (k + 1)  # n over k + 1
        total += term
    return float(min(1.0, 2 * total / 2**n))


# ---- Intervals


def ratio_interval(sums: Floats, counts: Floats) -> Interval:
    """Returns a sum over clusters, divided by the sum of their counts, with its t interval."""
    value = float(sums.sum() / counts.sum())
    if len(counts) < 2:
        return Interval(value, math.nan, math.nan)
    half = t_975(len(counts) - 1) * error_over_clusters(sums - value * counts, counts)
    return Interval(value, value - half, value + half)


def error_over_clusters(residuals: Floats, counts: Floats) -> float:
    """Returns the standard error of a ratio: a sum over clusters, divided by the sum of their counts.

    residuals: of each sum from the value for its count. Their mean is 0.
    """
    clusters = len(counts)
    # A large cluster pulls the value towards itself: its residual is the one from the value of all others
    residuals = residuals / counts.mean() * (1 - 1 / clusters) / (1 - counts / counts.sum())
    return float(np.sqrt((residuals**2).sum() / (clusters * (clusters - 1))))


def t_975(degrees: int) -> float:
    """Returns the 97.5% quantile of Student's t to 3e-4 (Abramowitz and Stegun, 1964, eq. 26.7.5)."""
    if degrees <= len(FIRST_T):
        return FIRST_T[degrees - 1]
    z, n = Z, float(degrees)
    terms = (
        (z**3 + z) / (4 * n),
        (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2),
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3),
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * n**4),
    )
    return z + sum(terms)


def share_difference(before: ArrayLike, after: ArrayLike) -> Interval:
    """Returns the change of the share, after - before, on the same examples (Agresti and Min, Stat. Med. 24, 2005).

    Only examples that one model got right and the other did not carry information; half an example is added to each
    of the four outcomes. Raises ValueError unless there are examples whose values are all 0 or 1.
    """
    first, second = checked_hits(before), checked_hits(after)
    gained, lost = int((second > first).sum()), int((first > second).sum())
    n = len(first)
    up, down = (gained + 0.5) / (n + 2), (lost + 0.5) / (n + 2)
    half = Z * sqrt((up + down - (up - down) ** 2) / (n + 2))
    return Interval((gained - lost) / n, max(-1.0, up - down - half), min(1.0, up - down + half))


def checked_hits(hits: ArrayLike) -> Floats:
    right = np.asarray(hits, dtype=np.float64)
    if right.ndim != 1 or not right.size or not np.isin(right, (0, 1)).all():
        raise ValueError("expected at least one example, each scored 0 (wrong) or 1 (right)")
    return right
