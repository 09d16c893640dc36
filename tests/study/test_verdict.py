"""The sentences follow from the numbers, and say so when the runs cannot tell."""

from dataclasses import replace

import pytest

from tailora.evaluation.statistics import Difference
from tailora.study.results import ArmResult, Candidate, Finalist
from tailora.study.verdict import compare_verdict, search_verdict, what_would_tell

FULL = ArmResult("full", {}, "done", learning_rate=1e-4, trainable_parameters=1_000_000, bracketed=True)


def arm(
    low: float, high: float, *, seeds: int = 3, name: str = "lora", parameters: int = 10_000, bracketed: bool = True
) -> ArmResult:
    difference = Difference((low + high) / 2, low, high, 0.04, 60, seeds, 0.9)
    result = ArmResult(name, {}, "done", trainable_parameters=parameters, difference=difference, bracketed=bracketed)
    return replace(result, learning_rate=1e-3)


def verdict_of(*arms: ArmResult) -> tuple[str, str | None]:
    return compare_verdict(arms, dict.fromkeys([arm.name for arm in arms], 0.04), "full", 0.02, "nats per token")


@pytest.mark.parametrize(
    ("low", "high", "start"),
    [
        (
            -0.05,
            -0.03,
            "lora is better than full (lora - full = -0.040 nats per token, 95% interval -0.050 to -0.030, p = 0.040",
        ),
        (0.03, 0.05, "full is better than lora"),
        (
            -0.01,
            0.012,
            "lora and full are equally good: they differ by less than 0.02 nats per token (lora - full = +0.001",
        ),
        (-0.05, 0.01, "lora is worse than full by at most 0.010 nats per token, and may be better"),
        (
            -0.05,
            0.05,
            "Cannot tell whether lora or full is better: the 95% interval is too wide for a margin of 0.02 nats",
        ),
        (0.01, 0.05, "Cannot tell whether lora or full is better"),  # perhaps worse, perhaps by too little to matter
    ],
)
def test_each_finding_has_its_words(low: float, high: float, start: str) -> None:
    verdict, subject = verdict_of(FULL, arm(low, high))
    assert verdict.startswith(start)
    assert subject == "lora"
    assert ("100x fewer parameters" in verdict) == ("Take lora" in verdict)


def test_one_seed_tells_nothing() -> None:
    verdict, _ = verdict_of(FULL, arm(-0.01, 0.01, seeds=1))
    assert verdict.startswith("Cannot tell")
    assert "--seeds 3" in verdict


def test_the_cheapest_arm_that_is_good_enough_is_taken() -> None:
    arms = [arm(-0.01, 0.01, name="r64", parameters=9), arm(-0.01, 0.015, name="r8", parameters=3)]
    arms += [arm(0.1, 0.2, name="r1", parameters=1)]
    verdict, subject = verdict_of(FULL, *arms)
    assert subject == "r8"
    assert "Take r8" in verdict


def test_a_rate_at_the_edge_is_mentioned() -> None:
    lora = replace(arm(-0.05, -0.03, bracketed=False), rates={1e-3: 0.9}, learning_rate=1e-3)
    verdict, _ = verdict_of(FULL, lora)
    assert verdict.startswith("lora is better than full")  # it may be better still
    assert "Only one learning rate of lora was tried, 0.001: try more with --rate-tries." in verdict
    verdict, _ = compare_verdict([FULL, lora], {"lora": 0.04}, "full", 0.02, "", cut_short=["lora"])
    assert "Only one learning rate of lora was tried, 0.001: try more with a higher --minutes." in verdict


@pytest.mark.parametrize(("best", "words"), [(8e-3, "the highest that was tried, and a higher"), (5e-4, "the lowest")])
def test_each_arm_with_its_best_rate_at_the_edge_has_a_sentence(best: float, words: str) -> None:
    rates: dict[float, float | None] = {5e-4: 1.0, 2e-3: 0.9, 8e-3: 0.8}
    lora, full = (replace(it, bracketed=False, rates=rates, learning_rate=best) for it in (arm(-0.05, -0.03), FULL))
    verdict, _ = verdict_of(full, lora)
    for name in ("lora", "full"):
        assert f"The best learning rate of {name}, {best:g}, is {words}" in verdict


@pytest.mark.parametrize(
    ("low", "high", "untuned", "so_far"),
    [
        (-0.05, -0.03, "full", "lora is better than full"),
        (0.03, 0.05, "lora", "full is better than lora"),
        (-0.01, 0.012, "lora", "lora and full are equally good"),
        (-0.01, 0.012, "full", "lora and full are equally good"),
        (-0.05, 0.01, "full", "lora is worse than full by at most 0.010"),
    ],
)
def test_an_arm_that_was_not_tuned_has_not_lost(low: float, high: float, untuned: str, so_far: str) -> None:
    full = replace(FULL, bracketed=untuned != "full")
    verdict, _ = verdict_of(full, arm(low, high, bracketed=untuned != "lora"))
    assert verdict.startswith(
        f"Cannot tell yet: {untuned} may do better at a learning rate that was not tried. "
        f"At the rates that were tried, {so_far}"
    )
    assert "Take" not in verdict
    assert "try more with --rate-tries" in verdict


def test_arms_that_failed_are_mentioned() -> None:
    verdict, subject = verdict_of(FULL, ArmResult("lora", {}, "failed at every rate tried"))
    assert verdict == "lora failed at every rate tried. There is nothing to compare."
    assert subject is None


def test_what_it_would_take_is_of_the_larger_source() -> None:
    of_examples = Difference(0, -0.04, 0.04, 0.5, 50, 3, 0.9)
    assert "about 800 judging examples" in what_would_tell(
        of_examples, 0.02
    )  # a quarter of the width: 16 times as many
    of_seeds = Difference(0, -0.02, 0.02, 0.5, 50, 3, 0.1)
    assert "about 12 seeds would be enough" in what_would_tell(of_seeds, 0.02)


def test_no_number_is_advised_that_nobody_can_run() -> None:
    """Two seeds with 5 examples asked for 118,638 seeds."""
    of_seeds = Difference(0, -0.049, 0.049, 0.5, 5, 2, 0.1)
    assert "about 49 seeds would be enough" in what_would_tell(of_seeds, 0.02)
    assert what_would_tell(replace(of_seeds, low=-2.4, high=2.4), 0.02) == (
        "Most of the uncertainty comes from the seeds, and no practical number of seeds would be enough: longer runs "
        "help, and more held-out examples (--eval-data or --validation-split)."
    )
    of_examples = Difference(0, -2, 2, 0.5, 5, 2, 0.9)
    assert what_would_tell(of_examples, 0.02) == (
        "Most of the uncertainty comes from the examples, and no practical number of judging examples would be "
        "enough: longer runs may help, or a larger --margin."
    )
    assert "about 45,000 judging examples" in what_would_tell(
        replace(of_examples, low=-0.3, high=0.3, examples=50), 0.02
    )


def test_of_two_that_do_as_well_the_one_that_trains_less_is_taken() -> None:
    large = arm(-0.01, 0.01, name="r64", parameters=2_000_000)
    verdict, _ = verdict_of(FULL, large)
    assert verdict.endswith("Take full: it trains 2x fewer parameters.")
    better, _ = verdict_of(FULL, arm(-0.05, -0.03, name="r64", parameters=2_000_000))
    assert better.endswith("Take r64.")


@pytest.mark.parametrize(("low", "high"), [(-0.05, -0.03), (-0.01, 0.012), (-0.05, 0.01), (-0.05, 0.05)])
def test_differences_are_in_the_unit_of_the_losses(low: float, high: float) -> None:
    verdict, _ = compare_verdict([FULL, arm(low, high)], {"lora": 0.04}, "full", 0.02, "per example")
    assert "per example" in verdict
    assert "token" not in verdict


STOPPED, WHOLE = "in the worse half at step 4", "so it is also the cheapest."


@pytest.mark.parametrize(
    ("smaller", "words"),
    [
        ({}, f"No trial had fewer trained parameters, {WHOLE}"),
        ({0: "done"}, f"No trial with fewer trained parameters came close, {WHOLE}"),
        ({0: "done", 3: "pruned"}, f"No trial with fewer trained parameters came close (1 of 2 ended early), {WHOLE}"),
        (
            {1: "pruned"},
            f"The only trial with fewer trained parameters, trial 1, ended early ({STOPPED}; a whole trial has 11 "
            "steps), so it was not compared at full length.",
        ),
        (
            {3: "out of memory"},
            "The only trial with fewer trained parameters, trial 3, ended early (out of memory; a whole trial has 11 "
            "steps), so it was not compared at full length.",
        ),
        (
            {1: "pruned", 3: "diverged"},
            "The 2 trials with fewer trained parameters ended early, so none was compared at full length.",
        ),
    ],
    ids=str,
)
def test_a_smaller_trial_that_ended_early_is_not_called_worse(smaller: dict[int, str], words: str) -> None:
    best = Finalist(2, {}, 1000, 2.0, 2.0, (1.9, 2.1), None, None, 1.0, 1, [])
    trials = [Candidate(2, "done", {}, 2.0, 1000), Candidate(4, "pruned", {}, 2.5, 1000), Candidate(5, "diverged", {})]
    trials += [Candidate(number, state, {}, 2.4, 100, message=STOPPED) for number, state in smaller.items()]
    verdict = search_verdict([best], best, 0.02, "nats per token", trials, 11)
    assert verdict == f"Take trial 2: held-out loss 2.000 (95% interval 1.900 to 2.100). {words}"
