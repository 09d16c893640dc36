"""The interval and p-value of a comparison, from a table of squares worked out in full."""

import math

import numpy as np
import pytest
from scipy import stats

from tailora.evaluation.statistics import difference_over_seeds


def test_the_variance_comes_from_mean_squares_and_its_degrees_from_satterthwaite() -> None:
    """nu = (sum MS)^2 / sum(MS^2 / nu_i) (Biometrics 2, 1946), for crossed examples and seeds."""
    rng = np.random.default_rng(0)
    seeds, examples = 4, 12
    apart = 0.1 + rng.normal(0, 0.3, examples) + rng.normal(0, 0.2, (seeds, 1)) + rng.normal(0, 0.05, (seeds, examples))
    found = difference_over_seeds(np.zeros_like(apart), apart, np.ones(examples))
    grand = apart.mean()
    rows, columns = apart.mean(1), apart.mean(0)
    MS_seeds = sum(examples * (row - grand) ** 2 for row in rows) / (seeds - 1)
    MS_examples = sum(seeds * (column - grand) ** 2 for column in columns) / (examples - 1)
    MS_rest = sum((apart[j, i] - rows[j] - columns[i] + grand) ** 2 for j in range(seeds) for i in range(examples)) / (
        (seeds - 1) * (examples - 1)
    )
    squares = MS_seeds + MS_examples - MS_rest
    degrees = squares**2 / (MS_seeds**2 / (seeds - 1) + MS_examples**2 / (examples - 1))
    error = math.sqrt(squares / (seeds * examples))
    assert found.value == pytest.approx(grand)
    assert found.p_value == pytest.approx(2 * stats.t.sf(abs(grand) / error, degrees))
    half = stats.t.ppf(0.975, degrees) * error
    assert (found.low, found.high) == pytest.approx((grand - half, grand + half))
