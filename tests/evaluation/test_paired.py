"""The difference of two arms over seeds and examples: known truths, and how often the interval holds them."""

import numpy as np
import pytest

from tailora.evaluation.statistics import difference_over_seeds, holm, interval_over_seeds


def simulated(rng: np.random.Generator, seeds: int, examples: int, effects: tuple[float, float, float], mu: float):
    """Losses of two arms, (seeds, examples) each, and token counts: examples, seeds and rest all vary."""
    counts = rng.integers(5, 60, size=examples).astype(float)
    by_example, by_seed, rest = effects
    apart = (
        mu
        + by_example * rng.standard_normal(examples)
        + by_seed * rng.standard_normal((seeds, 1))
        + rest * rng.standard_normal((seeds, examples))
    )
    first = (3 + rng.standard_normal(examples)) * counts * np.ones((seeds, 1))
    return first, first + apart * counts, counts


@pytest.mark.parametrize("effects", [(0.3, 0.0, 0.1), (0.05, 0.1, 0.05), (0.2, 0.05, 0.2)])
@pytest.mark.parametrize("seeds", [3, 5])
def test_the_interval_holds_the_truth_as_often_as_it_says(effects: tuple[float, float, float], seeds: int) -> None:
    rng = np.random.default_rng(0)
    found = [difference_over_seeds(*simulated(rng, seeds, 40, effects, 0.07)) for _ in range(400)]
    held = np.mean([each.low <= 0.07 <= each.high for each in found])
    assert 0.92 <= held <= 0.995


def test_without_a_difference_p_below_5_percent_is_as_rare_as_it_should_be() -> None:
    rng = np.random.default_rng(1)
    found = [difference_over_seeds(*simulated(rng, 4, 40, (0.1, 0.05, 0.1), 0.0)) for _ in range(400)]
    assert 0.005 <= np.mean([each.p_value < 0.05 for each in found]) <= 0.08


def test_what_limits_the_certainty_is_named() -> None:
    rng = np.random.default_rng(2)
    assert difference_over_seeds(*simulated(rng, 5, 50, (0.5, 0.001, 0.01), 0)).from_examples > 0.9
    assert difference_over_seeds(*simulated(rng, 5, 50, (0.001, 0.5, 0.01), 0)).from_examples < 0.1


def test_one_seed_is_the_paired_t_test_of_the_examples() -> None:
    from scipy import stats

    rng = np.random.default_rng(3)
    first, second, _ = simulated(rng, 1, 30, (0.2, 0, 0.1), 0.05)
    found = difference_over_seeds(first, second, np.ones(30))
    expected = stats.ttest_rel(second[0], first[0])
    assert found.p_value == pytest.approx(expected.pvalue)
    low, high = expected.confidence_interval()
    assert (found.low, found.high) == pytest.approx((low, high))
    assert found.seeds == 1


def test_examples_without_tokens_do_not_count() -> None:
    first, second = np.array([[1.0, 5.0, 2.0]]), np.array([[2.0, 9.0, 4.0]])
    found = difference_over_seeds(first, second, [1, 0, 1])
    assert found.value == pytest.approx(1.5)
    assert found.examples == 2


def test_equal_arms_have_no_difference() -> None:
    same = np.ones((2, 4))
    found = difference_over_seeds(same, same, np.ones(4))
    assert (found.value, found.low, found.high, found.p_value) == (0, 0, 0, 1)


@pytest.mark.parametrize(
    ("first", "second", "counts", "told"),
    [
        (np.ones(3), np.ones(3), np.ones(3), "shapes"),
        (np.ones((2, 3)), np.ones((3, 3)), np.ones(3), "shapes"),
        (np.ones((2, 3)), np.ones((2, 3)), [1, 0, 0], "fewer than two"),
        (np.ones((1, 2)), [[1, np.nan]], [1, 1], "not finite"),
    ],
)
def test_what_cannot_be_compared_is_refused(first: object, second: object, counts: object, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        difference_over_seeds(first, second, counts)


def test_the_loss_is_the_ratio_and_its_interval_covers_seeds_and_examples() -> None:
    rng = np.random.default_rng(4)
    counts = rng.integers(1, 9, size=50)
    sums = counts * (2 + rng.standard_normal((3, 50)) * 0.5)
    found = interval_over_seeds(sums, counts)
    assert found.value == pytest.approx(sums.sum() / (3 * counts.sum()))
    assert found.low < found.value < found.high
    shifted = interval_over_seeds(sums + counts * np.array([[-1], [0], [1]]), counts)
    assert shifted.high - shifted.low > 2 * (found.high - found.low)


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9]) == [0.9]
