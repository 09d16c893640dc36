"""Curves of loss by amount of data: power laws with a limit and without, and the start of fine-tuning."""

import numpy as np
import pytest

from tailora.study.data_scaling import shape

SIZES = np.array([100.0, 200.0, 400.0, 800.0, 1600.0])
DOUBLINGS = np.log2(SIZES / SIZES[-1])


@pytest.mark.parametrize(("factor", "alpha", "limit"), [(5.0, 0.3, 1.2), (20.0, 0.7, 0.4)])
def test_a_power_law_with_a_limit(factor: float, alpha: float, limit: float) -> None:
    # Hestness et al. 2017, arXiv:1712.00409, section 3: loss(N) = limit + factor N^-alpha
    losses = limit + factor * SIZES**-alpha
    gain = losses[-2] - losses[-1]
    np.testing.assert_allclose(losses[-1] + gain * shape(alpha, DOUBLINGS), losses)
    assert losses[-1] - gain / (2**alpha - 1) == pytest.approx(limit)


def test_a_power_law_without_a_limit() -> None:
    # Kaplan et al. 2020, arXiv:2001.08361, eq. 1.2: loss(D) = (D_c / D)^alpha
    losses = (5.4e13 / SIZES) ** 0.095
    gain = losses[-2] - losses[-1]
    alpha = np.log2(1 + gain / losses[-1])
    assert alpha == pytest.approx(0.095)
    np.testing.assert_allclose(losses[-1] + gain * shape(alpha, DOUBLINGS), losses)


def test_at_the_start_of_fine_tuning_each_doubling_brings_more_than_the_one_before() -> None:
    # Lin et al. 2024, arXiv:2402.02314: loss(D) = B / (D_l + D^beta) + E, which is almost flat while D^beta < D_l
    losses = 1 / (2e3 + SIZES**0.9) + 1
    assert np.all(np.diff(losses, 2) < 0)
    assert np.all(np.diff(shape(-0.5, DOUBLINGS), 2) < 0)
    assert np.all(np.diff(shape(0.5, DOUBLINGS), 2) > 0)
