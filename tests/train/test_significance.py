"""The one rule for better, worse and cannot tell, against brute force, scipy and simulated runs without a change."""

import json
from itertools import product

import numpy as np
import pytest
from scipy import stats

from benchmarks.studies import significance
from tailora.train.significance import FEWEST, change_of, share_difference, sign_flip_test, t_975


@pytest.mark.parametrize("seed", range(6))
def test_the_p_value_is_the_share_of_signs_that_are_as_extreme(seed: int) -> None:
    random = np.random.default_rng(seed)
    sums = random.normal(0.5, 1, size=8) if seed % 3 else random.integers(-2, 4, size=9) / 4.0  # with ties and zeros
    choices = [abs(np.dot(signs, sums)) for signs in product((-1, 1), repeat=len(sums))]
    expected = np.mean([choice >= abs(sums.sum()) - 1e-9 for choice in choices])
    assert sign_flip_test(sums) == pytest.approx(expected)
    assert sign_flip_test(-random.permutation(sums)) == sign_flip_test(sums)


@pytest.mark.parametrize(("rose", "fell"), [(5, 0), (6, 0), (12, 3), (3, 12), (7, 7), (140, 100), (0, 0)])
def test_of_right_and_wrong_answers_it_is_mcnemar_s(rose: int, fell: int) -> None:
    sums = np.repeat([1.0, -1.0, 0.0], [rose, fell, 4])
    expected = stats.binomtest(rose, rose + fell).pvalue if rose + fell else 1.0
    assert sign_flip_test(sums) == pytest.approx(expected)


@pytest.mark.parametrize("clusters", [20, 300])
def test_many_clusters_are_sampled_always_with_the_same_signs(clusters: int) -> None:
    sums = np.random.default_rng(1).normal(1.9 / np.sqrt(clusters), 1, size=clusters)
    p = sign_flip_test(sums)
    assert p == sign_flip_test(-sums[::-1])
    assert p == pytest.approx(stats.ttest_1samp(sums, 0).pvalue, abs=0.012)
    assert 0 < sign_flip_test(np.arange(1.0, clusters)) < 2e-4  # never 0: the observed signs are a choice, too


def test_the_interval_is_student_s_over_clusters() -> None:
    assert max(abs(t_975(degrees) - stats.t.isf(0.025, degrees)) for degrees in range(1, 400)) < 3e-4
    random = np.random.default_rng(2)
    before, after = random.normal(size=(2, 9))
    change = change_of(4 * before, 4 * after, np.full(9, 4))
    expected = stats.ttest_1samp(after - before, 0)
    assert change.interval == pytest.approx((np.mean(after - before), *expected.confidence_interval()), abs=1e-4)


def test_a_large_cluster_counts_by_its_distance_from_the_others() -> None:
    """As in the jackknife: the value without each cluster. Clusters without answers do not count."""
    counts, sums = np.array([50.0, 5, 8, 6, 4]), np.array([20.0, 0.5, 0, 1.2, 0.4])
    change = change_of(np.zeros(7), [*sums, 3, 4], [*counts, 0, 0])
    without = [np.delete(sums, i).sum() / np.delete(counts, i).sum() for i in range(5)]
    error = np.sqrt(4 / 5 * np.sum((np.array(without) - sums.sum() / counts.sum()) ** 2))
    assert change.interval.value == pytest.approx(sums.sum() / counts.sum())
    assert change.interval.high - change.interval.value == pytest.approx(2.776445 * error, rel=1e-4)


def test_shares_have_the_interval_of_agresti_and_min_for_equal_clusters_alone() -> None:
    before, after = np.array([0, 0, 1, 0, 1, 1, 0, 0.0]), np.array([1, 1, 1, 1, 1, 0, 1, 1.0])
    up, down = 5.5 / 10, 1.5 / 10  # half an example is added to each of four outcomes
    half = 1.959964 * np.sqrt((up + down - (up - down) ** 2) / 10)
    expected = (0.5, up - down - half, up - down + half)
    for completions in (1, 8):
        counts = np.full(8, completions)
        found = change_of(completions * before, completions * after, counts).interval
        assert found == pytest.approx(expected) == share_difference(before, after)
    uneven = np.array([1, 2, 1, 1, 1, 1, 1, 1])
    assert change_of(before * uneven, after * uneven, uneven).interval.value == pytest.approx(5 / 9)


def finding(sums: list[float], counts: int = 1, **options: object) -> str:
    after, before = np.array(sums), np.zeros(len(sums))
    findings = {
        change_of(*sides, np.full(len(sums), counts), **options).finding  # type: ignore[arg-type]
        for sides in ((before, after), (before + 0.3, after + 0.3))
    }
    opposite = change_of(after, before, np.full(len(sums), counts), **options).finding  # type: ignore[arg-type]
    (found,) = findings
    assert opposite == {"better": "worse", "worse": "better"}.get(found, found)
    return found


def test_both_an_interval_and_a_p_value_are_needed() -> None:
    noise = [0.1, -0.1, 0.05, -0.05, 0.02, -0.02]
    assert finding([1 + x for x in noise]) == "better"
    assert finding([1 + x for x in noise], higher_is_better=False) == "worse"
    assert finding([1 + x for x in noise[1:]]) == "cannot tell"  # as clear, but FEWEST clusters are needed
    assert FEWEST == 6
    five_to_none = change_of([0.0] * 20, [1.0] * 5 + [0.0] * 15)
    assert five_to_none.interval.low > 0  # the interval alone would say so
    assert five_to_none.p_value == pytest.approx(0.0625)
    assert five_to_none.finding == "cannot tell"
    assert ", p = 0.062" in five_to_none.numbers
    assert finding([1.0] * 6 + [0.0] * 14) == "better"
    far = change_of(np.zeros(9), [1.0] * 8 + [30.0])  # p = 2 / 2^9, but one cluster makes the interval wide
    assert (far.p_value, far.finding) == (pytest.approx(2 / 2**9), "cannot tell")


def test_more_than_one_in_twenty_answers_without_a_score_decide_nothing() -> None:
    assert finding([8.0] * 19, 8, missing=8) == "better"  # 8 of 160
    assert finding([8.0] * 19, 8, missing=9) == "cannot tell"


@pytest.mark.parametrize("values", [np.nan, np.inf])
def test_values_that_are_not_finite_decide_nothing(values: float) -> None:
    with np.errstate(invalid="ignore"):
        assert change_of(np.zeros(8), [values] * 8).finding == "cannot tell"


def test_clusters_without_answers_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one cluster"):
        change_of([0.0], [0.0], [0])


@pytest.mark.parametrize("runs", [300, pytest.param(2000, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("prompts", [10, 50, pytest.param(200, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("name", significance.SAME)
def test_answers_of_one_distribution_are_rarely_better_or_worse(name: str, prompts: int, runs: int) -> None:
    """benchmarks/results/significance.json has 2,000 runs of each. The margin is three standard errors of a share."""
    case, error = significance.SAME[name], 3 / np.sqrt(runs)
    shares = significance.simulate(case, prompts, runs, seed=1)
    assert shares["better"] + shares["worse"] < 0.05 + 0.22 * error
    if case.is_continuous:
        low, high = (0.93, 0.97) if prompts >= 50 else (0.91, 1)
        assert low - 0.22 * error < shares["coverage"] < high + 0.22 * error
    if prompts >= 50:
        halves = significance.simulate_best_of_ten(case, prompts, runs, seed=1)["halves"]
        assert halves < 0.05 + 0.22 * error


def test_the_recorded_simulation_keeps_its_promises() -> None:
    recorded = json.loads(significance.RESULT.read_text())
    for sizes in recorded["same"].values():
        assert max(shares["better"] + shares["worse"] for shares in sizes.values()) <= 0.06
    assert max(shares["halves"] for sizes in recorded["best of ten"].values() for shares in sizes.values()) <= 0.06
    for part, cases in (("same", significance.SAME), ("changed", significance.CHANGED)):
        for name, case in cases.items():
            for prompts, shares in recorded[part][name].items() if case.is_continuous else ():
                allowed = (0.93, 0.97) if int(prompts) >= 50 else (0.91, 1.0)
                assert allowed[0] <= shares["coverage"] <= allowed[1] or name == "long tail, doubled"
    assert recorded["changed"]["0/1, 40% to 60%"]["200"]["better"] > 0.9
