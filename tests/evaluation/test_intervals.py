import numpy as np
import pytest

from tailora.evaluation.statistics import mean_interval, paired_difference


def conversations(generator: np.random.Generator, size: int, rate: float = 4.0) -> tuple[np.ndarray, np.ndarray]:
    """(sums, counts) of skewed lengths and of losses that differ between conversations; their true ratio is `rate`."""
    counts = generator.geometric(1 / 30, size=size)
    own = generator.gamma(8, rate / 8, size=size)
    return generator.gamma(counts * own), counts


def test_the_value_is_nats_over_tokens_not_the_mean_of_means() -> None:
    assert mean_interval([2.0, 90.0], [1, 9]).value == pytest.approx(9.2)


@pytest.mark.parametrize(("level", "tolerance"), [(0.95, 0.04), (0.5, 0.09)])
def test_the_interval_holds_the_truth_as_often_as_it_says(level: float, tolerance: float) -> None:
    generator = np.random.default_rng(0)
    found = [mean_interval(*conversations(generator, 100), draws=400, seed=i, level=level) for i in range(300)]
    covered = np.mean([low <= 4 <= high for _, low, high in found])
    assert covered == pytest.approx(level, abs=tolerance)


def test_equal_lengths_give_the_textbook_interval_of_a_mean() -> None:
    losses = np.random.default_rng(2).normal(3, 0.5, size=400)
    value, low, high = mean_interval(losses * 10, np.full(400, 10))
    half = 1.96 * losses.std(ddof=1) / 20
    assert (value - low, high - value) == pytest.approx((half, half), rel=0.1)


def test_conversations_are_drawn_not_tokens() -> None:
    losses = np.repeat(np.random.default_rng(3).normal(3, 0.5, size=40), 25)  # 25 tokens each, all alike
    _, low, high = mean_interval(losses, np.ones(1000))
    _, low_grouped, high_grouped = mean_interval(losses.reshape(40, 25).sum(axis=1), np.full(40, 25))
    assert high_grouped - low_grouped > 4 * (high - low)


def test_a_long_upper_tail_reaches_further_up() -> None:
    sums = np.random.default_rng(4).lognormal(0, 1.2, size=40)
    value, low, high = mean_interval(sums, np.ones(40))
    assert high - value > 1.2 * (value - low)


def test_pairs_are_surer_than_two_separate_runs() -> None:
    generator = np.random.default_rng(5)
    before, counts = conversations(generator, 80)
    after = before - 0.4 * counts + generator.normal(0, 0.05, size=80) * counts
    value, low, high = paired_difference(before, after, counts)
    separate = [mean_interval(sums, counts) for sums in (before, after)]
    apart = np.hypot(*[high - low for _, low, high in separate])
    assert value == pytest.approx(separate[1].value - separate[0].value)
    assert low < -0.4 < high < 0
    assert high - low < apart / 5


def test_no_change_at_all_is_an_interval_of_nothing() -> None:
    sums, counts = conversations(np.random.default_rng(6), 20)
    assert paired_difference(sums, sums, counts) == (0, 0, 0)


def test_the_seed_decides() -> None:
    data = conversations(np.random.default_rng(7), 30)
    assert mean_interval(*data, seed=1) == mean_interval(*data, seed=1)
    assert mean_interval(*data, seed=1) != mean_interval(*data, seed=2)


def test_examples_without_tokens_do_not_count() -> None:
    sums, counts = conversations(np.random.default_rng(8), 30)
    padded = np.append(sums, [0.0, 0.0]), np.append(counts, [0, 0])
    assert mean_interval(*padded) == mean_interval(sums, counts)


def test_one_example_has_no_spread_to_see() -> None:
    value, low, high = mean_interval([6.0], [2])
    assert value == 3
    assert np.isnan([low, high]).all()


@pytest.mark.parametrize(
    ("sums", "counts", "level", "words"),
    [
        ([1.0, 2.0], [1], 0.95, "one number per example"),
        ([], [], 0.95, "no example"),
        ([0.0], [0], 0.95, "no example"),
        ([1.0], [1], 95, "level 95"),
    ],
)
def test_what_cannot_be_answered_is_refused(sums: list[float], counts: list[int], level: float, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        mean_interval(sums, counts, level=level)


def test_before_and_after_must_be_of_the_same_examples() -> None:
    with pytest.raises(ValueError, match="the same examples"):
        paired_difference([1.0], [1.0, 2.0], [1])
