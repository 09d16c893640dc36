"""The rules for the forecasts of `tailora curve`, on ladders whose truth is known."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.studies.scaling_rules import CASES, DATA, Case, cases_of, judge, ladders


def ladder(number: int) -> list[Case]:
    """A power law with noise between seeds, and deviations that all seeds share."""
    random = np.random.default_rng([1, number])
    examples = 16 * 2 ** np.arange(7)
    losses = 1 + random.uniform(0.5, 2) * examples[:, None] ** -random.uniform(0.2, 0.8)
    gain = float(losses[-2, 0] - losses[-1, 0])
    losses = losses + 0.15 * gain * random.normal(size=(7, 3)) + 0.2 * gain * random.normal(size=(7, 1))
    parts = [slice(0, 4), slice(1, 5), slice(2, 6), slice(6, 7)]
    return cases_of(str(number), [{"sizes": examples[p].tolist(), "losses": losses[p].tolist()} for p in parts])


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return [case for number in range(len(ladders())) for case in ladder(number)]


def test_there_are_enough_cases(cases: list[Case]) -> None:
    assert len(cases) == 3 * len(ladders()) >= CASES
    assert {name for name, _ in ladders()[:7]} == set(DATA)


def test_the_hidden_size_is_the_largest_of_the_next_curve() -> None:
    curves = [{"sizes": [4, 8, 16, 32], "losses": [[4.0, 4.1], [3.0, 3.1], [2.5, 2.6], [2.2, 2.3]]}]
    (case,) = cases_of("a", [*curves, {"sizes": [64], "losses": [[2.0, 2.1]]}])
    assert case.truth == pytest.approx(2.05)
    assert case.errors == pytest.approx({"no change": -0.2, "line": 0.1})
    assert case.low < case.truth < case.high


def test_power_laws_are_forecast_better_than_naively(cases: list[Case]) -> None:
    judged = judge(cases)
    assert judged.coverage.low < judged.coverage.value < judged.coverage.high
    assert judged.ratios["no change"].high < 1
    assert judged.scores["curve"] < min(judged.scores["no change"], judged.scores["line"])


@pytest.mark.parametrize(("factor", "honest"), [(0.2, False), (20.0, False)])
def test_other_intervals_are_not_accepted(cases: list[Case], factor: float, honest: bool) -> None:
    def scaled(case: Case) -> Case:
        middle, half = (case.low + case.high) / 2, factor * (case.high - case.low) / 2
        return replace(case, low=middle - half, high=middle + half)

    judged = judge([scaled(case) for case in cases])
    assert judged.is_honest is honest
    assert not judged.is_useful
    assert (judged.ratios["line"].value > 1) is (factor > 1)


def test_few_cases_allow_no_forecast(cases: list[Case]) -> None:
    assert not judge(cases[:30]).is_useful
