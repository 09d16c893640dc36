"""The search for a learning rate, on losses that are known."""

import math

import pytest

from tailora.study.lr_search import LearningRateSearch


def searched(first: float, tries: int, best: float, cliff: float = math.inf) -> LearningRateSearch:
    """On a loss that is a parabola in log rate and diverges from `cliff` on."""
    rates = LearningRateSearch(first, tries)
    while (rate := rates.next_rate()) is not None:
        assert rate not in rates.tried
        rates.record(rate, math.inf if rate >= cliff else 3 + 0.1 * math.log(rate / best) ** 2)
    return rates


@pytest.mark.parametrize("best", [1e-6, 4e-5, 5e-4, 9e-4, 3e-3, 0.5])
def test_it_ends_within_a_factor_of_two_and_knows_that(best: float) -> None:
    rates = searched(5e-4, 20, best)
    assert rates.best is not None
    assert max(rates.best / best, best / rates.best) <= 2
    assert rates.bracketed


def test_five_tries_are_enough_near_the_first_rate() -> None:
    rates = searched(5e-4, 5, 8e-4)
    assert len(rates.tried) <= 5
    assert rates.bracketed


def test_a_rate_that_diverges_bounds_the_search() -> None:
    rates = searched(5e-4, 20, 1e-2, cliff=4e-3)
    assert rates.best is not None
    assert rates.best < 4e-3
    assert rates.bracketed
    assert math.inf in rates.tried.values()


def test_when_all_diverge_it_goes_far_down_and_says_so() -> None:
    rates = searched(1.0, 2, 1e-9, cliff=1e-8)
    assert rates.best is None
    assert not rates.bracketed
    assert min(rates.tried) < 0.1


def test_out_of_tries_at_an_edge_is_not_bracketed() -> None:
    rates = searched(5e-4, 3, 1.0)
    assert not rates.bracketed
