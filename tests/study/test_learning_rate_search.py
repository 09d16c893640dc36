"""The search for the best learning rate of a variant, on made-up losses."""

import math

import pytest

from tailora.study.learning_rate_search import LearningRateSearch


def searched(first: float, tries: int, best: float, cliff: float = math.inf) -> LearningRateSearch:
    """On a loss that is a parabola in log rate and diverges from `cliff` on."""
    rates = LearningRateSearch(first, tries)
    while (rate := rates.next_rate()) is not None:
        assert rate not in rates.tried
        rates.record(rate, math.inf if rate >= cliff else 3 + 0.1 * math.log(rate / best) ** 2)
    return rates


@pytest.mark.parametrize(
    ("best", "tries"), [(1e-6, 20), (4e-5, 20), (5e-4, 20), (8e-4, 5), (9e-4, 20), (3e-3, 20), (0.5, 20)]
)
def test_it_ends_within_a_factor_of_two_and_knows_that(best: float, tries: int) -> None:
    rates = searched(5e-4, tries, best)
    assert rates.best is not None
    assert max(rates.best / best, best / rates.best) <= 2
    assert rates.bracketed
    assert len(rates.tried) <= tries


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


@pytest.mark.parametrize(("above", "below", "following"), [(1.1, 2.0, 2e-3), (2.0, 1.1, 5e-4)])
def test_the_finer_step_is_towards_the_better_neighbour(above: float, below: float, following: float) -> None:
    rates = LearningRateSearch(1e-3, 9)
    for rate, loss in ((1e-3, 1.0), (4e-3, above), (2.5e-4, below)):
        rates.record(rate, loss)
    assert rates.next_rate() == pytest.approx(following)
