"""Intervals and tests against simulations, and against tables of other tools."""

import numpy as np
import pytest

from tailora.evaluation.statistics import (
    describe_change,
    difference_over_seeds,
    interval_over_seeds,
    mean_interval,
    wilson_interval,
)
from tailora.train.significance import change_of


def conversations(generator: np.random.Generator, size: int, rate: float = 4.0) -> tuple[np.ndarray, np.ndarray]:
    """(sums, counts) of skewed lengths and of losses that differ between conversations; their true ratio is `rate`."""
    counts = generator.geometric(1 / 30, size=size)
    own = generator.gamma(8, rate / 8, size=size)
    return generator.gamma(counts * own), counts


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    found = [mean_interval(*conversations(generator, 100)) for _ in range(2000)]
    assert np.mean([low <= 4 <= high for _, low, high in found]) == pytest.approx(0.95, abs=0.02)


def test_pairs_are_surer_than_two_separate_runs() -> None:
    generator = np.random.default_rng(5)
    before, counts = conversations(generator, 80)
    after = before - 0.4 * counts + generator.normal(0, 0.05, size=80) * counts
    value, low, high = change_of(before, after, counts).interval
    separate = [mean_interval(sums, counts) for sums in (before, after)]
    apart = np.hypot(*[high - low for _, low, high in separate])
    assert value == pytest.approx(separate[1].value - separate[0].value)
    assert low < -0.4 < high < 0
    assert high - low < apart / 5


def test_examples_without_tokens_do_not_count() -> None:
    sums, counts = conversations(np.random.default_rng(8), 30)
    padded = np.append(sums, [0.0, 0.0]), np.append(counts, [0, 0])
    assert mean_interval(*padded) == mean_interval(sums, counts)


def test_one_example_has_no_spread_to_see() -> None:
    value, low, high = mean_interval([6.0], [2])
    assert value == 3
    assert np.isnan([low, high]).all()


@pytest.mark.parametrize(
    ("sums", "counts", "words"),
    [
        ([1.0, 2.0], [1], "one number per example"),
        ([], [], "at least one example"),
        ([0.0], [0], "at least one example"),
    ],
)
def test_what_cannot_be_answered_is_refused(sums: list[float], counts: list[int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        mean_interval(sums, counts)


# ---- The difference of two arms over seeds and examples: known truths, and how often the interval holds them


EFFECTS = [(0.3, 0.0, 0.1), (0.3, 0.15, 0.15), (0.05, 0.2, 0.1)]  # sizes of examples, seeds and rest


def share_of_studies_that_hold(seeds: int, arms: int, studies: int, effects: tuple[float, float, float]) -> float:
    """Of studies that compare several arms with one reference, the share in which every interval holds the truth.

    Half of the arms differ from the reference. With one seed there is no effect of seeds, which it cannot show.
    """
    rng = np.random.default_rng(seeds * 10 + arms)
    by_example, by_seed, rest = effects if seeds > 1 else (effects[0], 0.0, effects[2])

    def losses() -> np.ndarray:
        parts = rng.standard_normal(40), rng.standard_normal((seeds, 1)), rng.standard_normal((seeds, 40))
        return by_example * parts[0] + by_seed * parts[1] + rest * parts[2]

    good = 0
    for _ in range(studies):
        counts, reference = rng.integers(5, 60, size=40), losses()  # which all differences share
        results = []
        for truth in (0.5 * (arm % 2) for arm in range(arms)):
            arm_losses = truth + losses()
            found = difference_over_seeds(reference * counts, arm_losses * counts, counts, comparisons=arms)
            assert (found.p_value < 0.05) == (found.low > 0 or found.high < 0)
            results.append(found.low <= truth <= found.high)
        good += all(results)
    return good / studies


@pytest.mark.parametrize("seeds", [1, 2, 5])
def test_all_intervals_of_a_study_hold_the_truth_as_often_as_they_say(seeds: int) -> None:
    shares = [share_of_studies_that_hold(seeds, arms, 60, effects) for arms in range(1, 7) for effects in EFFECTS[:2]]
    assert np.mean(shares) > 0.935  # 720 studies
    assert min(shares) > 0.86


@pytest.mark.parametrize("effects", EFFECTS)
def test_two_seeds_that_happen_to_be_alike_are_not_taken_for_certain(effects: tuple[float, float, float]) -> None:
    assert share_of_studies_that_hold(2, 1, 600, effects) > 0.93


def test_the_interval_adds_up_what_examples_and_seeds_contribute() -> None:
    from scipy import stats

    rng = np.random.default_rng(0)
    seeds, examples = 4, 12
    apart = 0.5 + rng.normal(0, 0.3, examples) + rng.normal(0, 0.2, (seeds, 1)) + rng.normal(0, 0.05, (seeds, examples))
    of_examples, of_seeds = (stats.sem(apart.mean(axis)) for axis in (0, 1))
    for comparisons in (1, 3):
        found = difference_over_seeds(np.zeros_like(apart), apart, np.ones(examples), comparisons=comparisons)
        tail = 0.025 / comparisons
        half = np.hypot(of_examples * stats.t.isf(tail, examples - 1), of_seeds * stats.t.isf(tail, seeds - 1))
        assert found.value == pytest.approx(apart.mean())
        assert (found.low, found.high) == pytest.approx((apart.mean() - half, apart.mean() + half))
        assert found.from_examples == pytest.approx((of_examples * stats.t.isf(tail, examples - 1) / half) ** 2)
        tail = found.p_value / comparisons / 2  # at this level the interval ends at 0
        half = np.hypot(of_examples * stats.t.isf(tail, examples - 1), of_seeds * stats.t.isf(tail, seeds - 1))
        assert half == pytest.approx(abs(apart.mean()))


@pytest.mark.parametrize(
    ("first", "second", "counts", "told"),
    [
        (np.ones(3), np.ones(3), np.ones(3), r"\(seeds, examples\) twice"),
        (np.ones((2, 3)), np.ones((3, 3)), np.ones(3), r"\(seeds, examples\) twice"),
        (np.ones((2, 3)), np.ones((2, 3)), [1, 0, 0], "at least two examples"),
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


def test_the_interval_is_wilson_s() -> None:
    assert wilson_interval([1] * 7 + [0] * 3) == pytest.approx((0.7, 0.3968, 0.8922), abs=1e-4)
    assert wilson_interval([0] * 20)[1:] == pytest.approx((0, 0.161125), abs=1e-6)


@pytest.mark.parametrize("hits", [[], [2], [0.5], [[0, 1]]])
def test_other_numbers_are_refused(hits: list[float]) -> None:
    with pytest.raises(ValueError, match="expected at least one example"):
        wilson_interval(hits)


def test_a_change_is_described_as_its_finding() -> None:
    def words(after: list[float]) -> str:
        change = change_of(np.ones(len(after)), after, higher_is_better=False)
        return describe_change(change, "7 held-out examples, 3 distinct", "nats per token")

    assert words([0.1, 0.2, 0.3, 0.4, 0.5, 0.1]) == (
        "Held-out loss went down by 0.733 nats per token (95% interval 0.562 to 0.905, over 7 held-out examples, "
        "3 distinct)."
    )
    assert words([1.1, 1.2, 1.3, 1.4, 1.5, 1.1]).startswith("Held-out loss went UP by 0.267 nats per token")
    assert words([0.1, 1.9, 1.0, 1.0, 1.0, 1.1]).startswith("No change shown: +0.017 nats per token (95% interval -0.")
    assert words([0.1, 0.2, 0.3, 0.4, 0.5]).endswith("3 distinct: too little data to tell whether it worked.")
