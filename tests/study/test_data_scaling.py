"""Forecasts of synthetic curves with known truth: how often the interval contains it, and how wide it is."""

from collections.abc import Callable

import numpy as np
import pytest

from tailora.evaluation.statistics import Floats
from tailora.study import data_scaling
from tailora.study.data_scaling import fit, shape

CASES = 350  # of a test, 70 of each family


def power_law(random: np.random.Generator, gain: float) -> Callable[[Floats], Floats]:
    share = 2 ** -np.exp(random.uniform(np.log(0.05), np.log(1.2)))
    return lambda k: 1 - gain * (1 - share**k) / (1 - share)


def to_zero(random: np.random.Generator, _: float) -> Callable[[Floats], Floats]:
    alpha = random.uniform(0.02, 0.3)
    return lambda k: 2.0 ** (-alpha * k)


def log_linear(_: np.random.Generator, gain: float) -> Callable[[Floats], Floats]:
    return lambda k: 1 - gain * k


def flat(_: np.random.Generator, __: float) -> Callable[[Floats], Floats]:
    return np.ones_like


def slow_start(random: np.random.Generator, _: float) -> Callable[[Floats], Floats]:
    """The rectified law of arXiv:2402.02314: at first each doubling brings more than the one before."""
    beta, begin, limit = random.uniform(0.3, 1.0), 2 ** random.uniform(-1, 2.5), random.uniform(0.3, 0.9)
    return lambda k: limit + (1 - limit) / (1 + 2**k / begin) ** beta


FAMILIES = (power_law, to_zero, log_linear, flat, slow_start)


def synthetic(number: int, sizes: int, seeds: int, deviation: float = 0.3) -> Floats:
    """Returns losses (sizes + 1, seeds): the sizes to fit, and the next one to predict.

    Seeds differ from each other at all sizes and at each; every size also deviates from the curve, in all seeds.
    """
    random = np.random.default_rng([7, number])
    gain = 10 ** random.uniform(-2.2, -0.8)
    truth = FAMILIES[number % len(FAMILIES)](random, gain)(np.arange(sizes + 1.0))
    spread = max(float(np.ptp(truth[:-1])), gain / 10) * 10 ** random.uniform(-2, -0.3)
    of_size = spread * 2.0 ** (-np.arange(sizes + 1) * random.choice([0, 0.25]))
    noise = spread / 2 * random.normal(size=seeds) + of_size[:, None] * random.normal(size=(sizes + 1, seeds))
    off = random.uniform(0, deviation) * float(np.ptp(truth[:-1])) / (sizes - 1) * random.normal(size=sizes + 1)
    return np.asarray(truth[:, None] + noise + off[:, None])


def scale_of(losses: Floats) -> float:
    """Returns the unit of a naive forecast's error: the last change, or what the seeds explain of it."""
    last = float(np.diff(losses.mean(1))[-1])
    residuals = losses - losses.mean(1)[:, None] - losses.mean(0) + losses.mean()
    sizes, seeds = losses.shape
    return float(np.hypot(last, 2 * np.sqrt((residuals**2).sum() / ((sizes - 1) * (seeds - 1) * seeds))))


@pytest.mark.parametrize(("sizes", "seeds"), [(3, 2), (3, 3), (4, 3)])
def test_the_interval_contains_the_truth_and_is_narrower_than_naive_ones(sizes: int, seeds: int) -> None:
    inside, widths, no_change, line = [], [], [], []
    for number in range(CASES):
        losses = synthetic(number, sizes, seeds)
        known, truth = losses[:-1], float(losses[-1].mean())
        forecast = fit(2.0 ** np.arange(sizes), known).forecast(2.0**sizes, seeds)
        inside.append(forecast.low <= truth <= forecast.high)
        unit, (before, last) = scale_of(known), known.mean(1)[-2:]
        widths.append((forecast.high - forecast.low) / unit)
        no_change.append(abs(truth - last) / unit)
        line.append(abs(truth - (2 * last - before)) / unit)
    assert 0.85 <= np.mean(inside) <= 0.95
    for family in range(len(FAMILIES)):
        assert np.mean(inside[family :: len(FAMILIES)]) >= 0.8
    for errors in (no_change, line):  # an interval that contains 90% of these cases, chosen with hindsight
        assert np.mean(widths) < 0.9 * 2 * np.quantile(errors, 0.9)


def test_a_precise_power_law_is_continued() -> None:
    sizes = np.array([100, 200, 400, 800])
    losses = 1.2 + 6 * sizes[:, None] ** -0.5 + np.array([[0.01, -0.01]]) + 1e-5 * np.array([[1, -1], [-1, 1]] * 2)
    found = fit(sizes, losses)
    assert found.forecast(1600, seeds=2).value == pytest.approx(1.2 + 6 / 40, abs=0.005)
    assert found.change(2).value == pytest.approx(6 / 40 - 6 / 800**0.5, abs=0.005)
    assert found.change(2).high < 0
    assert found.weights["flat"] < 1e-6
    assert sum(found.weights.values()) == pytest.approx(1)


def test_noise_cannot_be_told_from_flat() -> None:
    losses = 2 + 0.01 * np.random.default_rng(3).normal(size=(4, 3))
    found = fit([10, 20, 40, 80], losses)
    assert found.weights["flat"] > data_scaling.PRIORS["flat"]
    assert found.change(2).high == 0
    assert found.change(2, error=0.05).low < found.change(2).low - 0.05


def test_the_shape_is_continuous_at_a_line() -> None:
    doublings = np.array([-3.0, -1.0, 0.0, 1.0])
    np.testing.assert_allclose(shape(0.0, doublings), [3, 1, 0, -1])
    np.testing.assert_allclose(shape(1e-5, doublings), shape(0.0, doublings), atol=1e-4)
    np.testing.assert_allclose(shape(1.0, doublings), [7, 1, 0, -0.5])


def test_a_seed_that_is_better_everywhere_changes_no_forecast() -> None:
    losses = np.array([[1.0, 1.02], [0.9, 0.91], [0.83, 0.85]])
    change = fit([1, 2, 4], losses).change(2)
    shifted = fit([1, 2, 4], losses + np.array([0.0, 0.3])).change(2)
    np.testing.assert_allclose(change, shifted, atol=1e-3)  # a loss is at least 0, so its level matters a little


def test_equal_losses_and_wrong_shapes() -> None:
    assert fit([1, 2, 4], np.ones((3, 2))).change(2).value == pytest.approx(0, abs=1e-4)
    assert fit([1, 2, 4], np.ones((3, 2))).weights["log-linear"] < 0.5
    for losses in (np.ones((2, 2)), np.ones((3, 1)), np.ones(3)):
        with pytest.raises(ValueError, match="3 sizes and 2 seeds or more"):
            fit([1, 2, 4][: len(losses)], losses)
