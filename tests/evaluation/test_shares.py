import numpy as np
import pytest

from tailora.evaluation.statistics import share_difference, wilson_interval


def test_the_interval_is_wilson_s() -> None:
    assert wilson_interval([1] * 7 + [0] * 3) == pytest.approx((0.7, 0.3968, 0.8922), abs=1e-4)
    assert wilson_interval([0] * 20)[1:] == pytest.approx((0, 0.161125), abs=1e-6)


def test_a_change_needs_rows_that_differ() -> None:
    before, after = np.array([1, 0] * 20), np.array([1, 1] * 20)
    gained = share_difference(before, after)
    assert gained.value == 0.5
    assert 0 < gained.low < 0.5 < gained.high < 1
    same = share_difference(before, before)
    assert same.value == 0
    assert same.low == pytest.approx(-same.high)
    assert same.high > 0.03  # 40 rows cannot show that nothing changes anywhere


@pytest.mark.parametrize(("share", "n"), [(0.02, 20), (0.1, 50), (0.5, 100)])
def test_nineteen_of_twenty_intervals_hold_the_truth(share: float, n: int) -> None:
    hits = np.random.default_rng(0).random((400, n)) < share
    held = [low <= share <= high for _, low, high in map(wilson_interval, hits)]
    assert np.mean(held) > 0.92


@pytest.mark.parametrize("hits", [[], [2], [0.5], [[0, 1]]])
def test_other_numbers_are_refused(hits: list[float]) -> None:
    with pytest.raises(ValueError, match="a share needs at least one example"):
        wilson_interval(hits)
    with pytest.raises(ValueError, match="both must be of the same"):
        share_difference([0, 1], [0])
