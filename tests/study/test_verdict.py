"""The sentence follows from the numbers, and says so when they cannot tell."""

import pytest

from tailora.evaluation.statistics import Difference
from tailora.study.judging import Standing, needed, verdict

FULL = Standing("full", 1_000_000, None, None, True)


def arm(low: float, high: float, *, seeds: int = 3, name: str = "lora", parameters: int = 10_000, **changes: object):
    found = Difference((low + high) / 2, low, high, 0.04, 60, seeds, 0.9)
    return Standing(name, parameters, found, 0.04, bool(changes.get("bracketed", True)))


@pytest.mark.parametrize(
    ("low", "high", "told"),
    [
        (-0.05, -0.03, "lora is better than full: -0.040 nats per token, 95% interval -0.050 to -0.030, p = 0.040"),
        (0.03, 0.05, "full is better than lora"),
        (-0.01, 0.012, "No difference that matters between lora and full"),
        (-0.05, 0.01, "lora is at most 0.010 worse than full, or better"),
        (-0.05, 0.05, "Cannot tell lora from full to 0.02"),
        (0.01, 0.05, "Cannot tell lora from full to 0.02"),  # perhaps worse, perhaps by too little to matter
    ],
)
def test_each_kind_of_finding_has_its_words(low: float, high: float, told: str) -> None:
    said, about = verdict([FULL, arm(low, high)], "full", 0.02, {})
    assert said.startswith(told)
    assert about == "lora"
    assert ("100x fewer parameters" in said) == ("Take lora" in said)


def test_one_seed_tells_nothing() -> None:
    said, _ = verdict([FULL, arm(-0.01, 0.01, seeds=1)], "full", 0.02, {})
    assert said.startswith("Cannot tell")
    assert "--seeds 3" in said


def test_the_cheapest_arm_that_is_good_enough_is_taken() -> None:
    arms = [arm(-0.01, 0.01, name="r64", parameters=9), arm(-0.01, 0.015, name="r8", parameters=3)]
    arms += [arm(0.1, 0.2, name="r1", parameters=1)]
    said, about = verdict([FULL, *arms], "full", 0.02, {})
    assert about == "r8"
    assert "Take r8" in said


def test_a_rate_at_the_edge_is_said() -> None:
    said, _ = verdict([FULL, arm(-0.05, -0.03, bracketed=False)], "full", 0.02, {})
    assert said.startswith("lora is better than full")  # it may be better still
    assert "best learning rate of lora lies at the edge" in said


@pytest.mark.parametrize(
    ("low", "high", "untuned", "so_far"),
    [
        (-0.05, -0.03, "full", "lora is better than full"),
        (0.03, 0.05, "lora", "full is better than lora"),
        (-0.01, 0.012, "lora", "no difference that matters"),
        (-0.01, 0.012, "full", "no difference that matters"),
        (-0.05, 0.01, "full", "lora is at most 0.010 worse than full"),
    ],
)
def test_an_arm_that_was_not_tuned_has_not_lost(low: float, high: float, untuned: str, so_far: str) -> None:
    full = Standing("full", 1_000_000, None, None, untuned != "full")
    said, _ = verdict([full, arm(low, high, bracketed=untuned != "lora")], "full", 0.02, {})
    assert said.startswith(f"Cannot tell yet, since {untuned} may do better at another learning rate. So far {so_far}")
    assert "Take" not in said
    assert "more --rate-tries would tell" in said


def test_arms_that_failed_are_said() -> None:
    said, about = verdict([FULL], "full", 0.02, {"lora": "failed at every rate tried"})
    assert said == "lora failed at every rate tried. There is nothing to compare."
    assert about is None


def test_what_it_would_take_is_of_the_larger_source() -> None:
    of_examples = Difference(0, -0.04, 0.04, 0.5, 50, 3, 0.9)
    assert "about 800 to judge by" in needed(of_examples, 0.02)  # a quarter of the width: 16 times as many
    of_seeds = Difference(0, -0.02, 0.02, 0.5, 50, 3, 0.1)
    assert "about 12 would do" in needed(of_seeds, 0.02)


def test_of_two_that_do_as_well_the_one_that_trains_less_is_taken() -> None:
    large = arm(-0.01, 0.01, name="r64", parameters=2_000_000)
    said, _ = verdict([FULL, large], "full", 0.02, {})
    assert said.endswith("Take full: it trains 2x fewer parameters.")
    better, _ = verdict([FULL, arm(-0.05, -0.03, name="r64", parameters=2_000_000)], "full", 0.02, {})
    assert better.endswith("Take r64.")
