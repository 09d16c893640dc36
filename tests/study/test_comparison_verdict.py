"""Runs are judged on the examples that chose nothing, and the sentences follow from the numbers."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from tailora.data.dataset import evaluation_half, selection_half
from tailora.evaluation.statistics import Difference, difference_over_seeds
from tailora.report.files import page_of
from tailora.report.html import html
from tailora.study.comparison_verdict import (
    choose_finalists,
    compare_verdict,
    evaluate_arms,
    evaluate_finalists,
    sample_size_advice,
    search_verdict,
)
from tailora.study.config import CompareConfig
from tailora.study.learning_rate_search import LearningRateSearch
from tailora.study.results import ArmResult, Candidate, Finalist, measure_of
from tailora.study.trial import Trial

# ---- compare


def trial(losses: np.ndarray, counts: np.ndarray, seed: int, parameters: int) -> Trial:
    numbers = {"train_tokens": 100, "tokens_per_second": 10.0, "peak_memory_bytes": 9, "steps": 5, "seed": seed}
    numbers |= {"trainable_parameters": parameters, "output_dir": "there"}
    forgotten = {"kl": 0.1, "loss_before": 1.0, "loss_after": 1.1, "tokens": 7}
    before = (counts * 4).tolist()
    return Trial("done", "", numbers, (losses * counts).tolist(), before, counts.tolist(), forgotten, 12)


def rates(best: float) -> LearningRateSearch:
    search = LearningRateSearch(best, 3)
    for factor, loss in ((1, 2.0), (4, 3.0), (0.25, 3.0)):
        search.record(best * factor, loss)
    return search


def test_arms_are_judged_on_the_half_that_did_not_choose() -> None:
    rng = np.random.default_rng(0)
    counts = rng.integers(5, 50, size=40)
    losses = rng.normal(3, 0.5, size=40)
    first = trial(losses, counts, 1, 1000)
    for_rates, for_arms = selection_half(len(first.counts)), evaluation_half(len(first.counts))
    assert sorted([*for_rates, *for_arms]) == list(range(40))
    better = losses.copy()
    better[for_rates] -= 1  # on the other half there is no difference
    study = CompareConfig(arms={"lora": {}, "full": {"method": "full"}})
    runs = {
        "lora": [trial(better + rng.normal(0, 0.001, 40), counts, seed, 10) for seed in (1, 2, 3)],
        "full": [trial(losses + rng.normal(0, 0.001, 40), counts, seed, 1000) for seed in (1, 2, 3)],
    }
    found = evaluate_arms(study, {arm: rates(1e-3) for arm in runs}, runs, notes=[], settings={}, seconds=1.0)
    assert "lora and full are equally good: they differ by less than 0.02 nats per token" in found.verdict
    assert "100x fewer" in found.verdict
    assert found.base_loss == pytest.approx(4)
    assert found.seeds == [1, 2, 3]


def test_differences_are_from_the_reference_and_adjusted_for_all_arms() -> None:
    rng, counts = np.random.default_rng(0), np.full(80, 2)
    study = CompareConfig(arms={"good": {}, "bad": {"r": 2}, "full": {"method": "full"}})
    shifts, chances = {"good": -0.2, "bad": 0.2, "full": 0.0}, {"good": 0.9, "bad": 0.5, "full": 0.7}
    runs = {
        arm: [
            replace(
                trial(rng.normal(3 + shifts[arm], 0.1, 80), counts, seed, 10),
                hits=rng.binomial(counts, chances[arm]).tolist(),
            )
            for seed in (1, 2, 3)
        ]
        for arm in study.arms
    }
    found = evaluate_arms(study, {arm: rates(1e-3) for arm in runs}, runs, notes=[], settings={}, seconds=1.0)
    assert found.reference == "full"
    half = evaluation_half(80)
    for arm in found.arms[:2]:
        for name, difference in (("sums", arm.difference), ("hits", arm.further["accuracy"].difference)):
            own, other = (np.array([getattr(run, name) for run in runs[each]])[:, half] for each in (arm.name, "full"))
            assert difference == difference_over_seeds(other, own, counts[half], comparisons=2)
        assert found.p_values[arm.name] == arm.difference.p_value
    good, bad = (arm.further["accuracy"].difference for arm in found.arms[:2])
    assert bad.value < 0 < good.value
    assert found.arms[2].further["accuracy"].difference is None


def test_an_arm_that_failed_keeps_its_reason() -> None:
    counts = np.full(10, 5)
    failed = LearningRateSearch(1e-3, 1)
    failed.record(1e-3, np.inf)
    study = CompareConfig(arms={"lora": {}, "full": {"method": "full"}})
    runs = {"lora": [trial(np.linspace(1, 2, 10), counts, seed, 10) for seed in (1, 2)]}
    found = evaluate_arms(study, {"lora": rates(1e-3), "full": failed}, runs, notes=[], settings={}, seconds=1.0)
    assert found.arms[1].outcome == "failed at every learning rate tried: 0.001"
    large = LearningRateSearch(1e-3, 5)
    large.record(1e-3, np.inf, fits=False)
    assert large.next_rate() is None  # another rate needs as much
    found_large = evaluate_arms(study, {"lora": rates(1e-3), "full": large}, runs, notes=[], settings={}, seconds=1.0)
    assert "full ran out of memory." in found_large.verdict
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert plain["arms"][1]["rates"] == {"0.001": None}
    assert "failed" in html(page_of({"kind": "compare", **plain}, "report.json"))
    assert "full failed at every learning rate tried" in found.verdict
    assert found.p_value is None


# ---- search


OTHERS = {
    "trials": [],
    "importances": {},
    "steps": 9,
    "notes": [],
    "settings": {},
    "seconds": 1.0,
    "config": "best.yaml",
}


def candidate(number: int, loss: float, parameters: int, state: str = "done") -> Candidate:
    return Candidate(number, state, {"r": parameters}, loss, parameters, 1.0)


def test_finalists_are_the_best_and_what_is_cheaper_within_reach() -> None:
    tried = [
        candidate(0, 2.00, 100),
        candidate(1, 2.01, 40),
        candidate(2, 2.02, 50),  # worse than 1 and dearer
        candidate(3, 2.03, 10),
        candidate(4, 2.50, 1),  # out of reach
        candidate(5, 1.90, 1, "pruned"),
    ]
    assert [finalist.number for finalist in choose_finalists(tried, 0.02, 3)] == [0, 1, 3]
    assert [finalist.number for finalist in choose_finalists(tried, 0.02, 2)] == [0, 1]
    assert [finalist.number for finalist in choose_finalists(tried, 0.02, 1)] == [0]
    assert choose_finalists([tried[5]], 0.02, 3) == []


def runs_with(apart: dict[int, float], spread: float = 0.001, seeds: int = 3) -> dict[int, list[Trial]]:
    rng = np.random.default_rng(0)
    counts = rng.integers(5, 50, size=80)
    losses = rng.normal(3, 0.5, size=80)
    shifted = {number: losses + shift for number, shift in apart.items()}
    shifted[1][selection_half(80)] -= 9  # says nothing: that half has chosen
    return {
        number: [trial(values + rng.normal(0, spread, 80), counts, seed, 1) for seed in range(1, seeds + 1)]
        for number, values in shifted.items()
    }


@pytest.mark.parametrize(
    ("apart", "spread", "seeds", "cheapest", "message"),
    [
        (
            {0: 0.0, 1: 0.005},
            0.001,
            3,
            1,
            "Use trial 1: it has 10x fewer .* trial 0.*is at most 0.00. nats per token worse",
        ),
        ({0: 0.0, 1: -0.1}, 0.001, 3, 1, "Use trial 1.*and did better"),
        (
            {0: 0.0, 1: 0.1},
            0.001,
            3,
            0,
            "Use trial 0.*smaller trials are worse: .*trial 1 with 10x fewer .*differs by .0.100",
        ),
        ({0: 0.0, 1: 0.0}, 0.9, 3, 0, "Use trial 0.*Cannot tell whether trial 1 or trial 0.*Most of the uncertainty"),
        ({0: 0.0, 1: 0.0}, 0.001, 1, 1, "Cannot tell.*--seeds 3"),
    ],
)
def test_the_cheapest_is_shown_to_be_within_the_margin(
    apart: dict[int, float], spread: float, seeds: int, cheapest: int, message: str
) -> None:
    chosen = [candidate(0, 2.0, 1000), candidate(1, 2.01, 100)]
    found = evaluate_finalists(chosen, runs_with(apart, spread, seeds), 0.02, **OTHERS)
    assert (found.best.number, found.cheapest.number) == (0, cheapest)
    assert found.judged_examples == len(evaluation_half(80)) == 40
    assert found.base_loss == pytest.approx(4)
    assert re.search(f"(?s){message}", found.verdict), found.verdict


# ---- Sentences

FULL = ArmResult("full", {}, "done", learning_rate=1e-4, trainable_parameters=1_000_000, bracketed=True)


def arm(
    low: float, high: float, *, seeds: int = 3, name: str = "lora", parameters: int = 10_000, bracketed: bool = True
) -> ArmResult:
    difference = Difference((low + high) / 2, low, high, 0.04, 60, seeds, 0.9)
    result = ArmResult(name, {}, "done", trainable_parameters=parameters, difference=difference, bracketed=bracketed)
    return replace(result, learning_rate=1e-3)


def verdict_of(*arms: ArmResult) -> tuple[str, str | None]:
    return compare_verdict(arms, "full", 0.02, measure_of("nats per token"))


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
        (-0.05, 0.01, "lora is at most 0.010 nats per token worse than full, and may even be better"),
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
    assert ("100x fewer parameters" in verdict) == ("Use lora" in verdict)


@pytest.mark.parametrize(("others", "seeds"), [(1, 2), (6, 3)])
def test_of_equal_arms_hardly_any_is_called_better(others: int, seeds: int) -> None:
    """300 studies of runs that differ by examples, seeds and chance alone."""
    rng, claims = np.random.default_rng(others * 10 + seeds), 0
    counts = np.full(40, 5.0)
    for _ in range(300):
        losses = [
            rng.normal(0, 0.3, 40) + rng.normal(0, 0.15, (seeds, 1)) + rng.normal(0, 0.15, (seeds, 40))
            for _ in range(others + 1)
        ]
        arms = [FULL]
        for number, own in enumerate(losses[1:]):
            difference = difference_over_seeds(losses[0] * counts, own * counts, counts, comparisons=others)
            arms.append(replace(arm(0, 0, name=f"lora{number}"), difference=difference))
        verdict, _ = verdict_of(*arms)
        if " is better than " in verdict:
            claims += 1
            assert float(re.findall(r"p = ([.\d]+)", verdict.replace("p below", "p ="))[0]) <= 0.05
    assert claims <= 22  # 15 of 300 are 5%; their standard error is 3.8


def test_one_seed_tells_nothing() -> None:
    verdict, _ = verdict_of(FULL, arm(-0.01, 0.01, seeds=1))
    assert verdict.startswith("Cannot tell")
    assert "--seeds 3" in verdict


def test_the_cheapest_arm_that_is_good_enough_is_recommended() -> None:
    arms = [arm(-0.01, 0.01, name="r64", parameters=9), arm(-0.01, 0.015, name="r8", parameters=3)]
    arms += [arm(0.1, 0.2, name="r1", parameters=1)]
    verdict, subject = verdict_of(FULL, *arms)
    assert subject == "r8"
    assert "Use r8" in verdict


@pytest.mark.parametrize("best", [8e-3, 5e-4])
def test_each_arm_with_its_best_rate_at_the_edge_has_a_sentence(best: float) -> None:
    rates: dict[float, float | None] = {5e-4: 1.0, 2e-3: 0.9, 8e-3: 0.8}
    lora, full = (replace(it, bracketed=False, rates=rates, learning_rate=best) for it in (arm(-0.05, -0.03), FULL))
    assert verdict_of(FULL, lora)[0].startswith("lora is better than full")  # it may be better still
    verdict, _ = verdict_of(full, lora)
    for name in ("lora", "full"):
        assert f"The best learning rate of {name}, {best:g}, is at the edge of those tried (0.0005, " in verdict


@pytest.mark.parametrize(
    ("low", "high", "untuned", "so_far"),
    [
        (-0.05, -0.03, "full", "lora is better than full"),
        (0.03, 0.05, "lora", "full is better than lora"),
        (-0.01, 0.012, "lora", "lora and full are equally good"),
        (-0.01, 0.012, "full", "lora and full are equally good"),
        (-0.05, 0.01, "full", "lora is at most 0.010 nats per token worse than full"),
    ],
)
def test_an_arm_that_was_not_tuned_has_not_lost(low: float, high: float, untuned: str, so_far: str) -> None:
    full = replace(FULL, bracketed=untuned != "full")
    verdict, _ = verdict_of(full, arm(low, high, bracketed=untuned != "lora"))
    assert verdict.startswith(
        f"Cannot tell yet: {untuned} may do better at a learning rate that was not tried. "
        f"At the rates tried so far, {so_far}"
    )
    assert "Use " not in verdict
    assert "use a higher --rate-tries" in verdict


def test_arms_that_failed_are_mentioned() -> None:
    verdict, subject = verdict_of(FULL, ArmResult("lora", {}, "failed at every rate tried"))
    assert verdict == "lora failed at every rate tried. There is nothing to compare."
    assert subject is None


SOURCE = "Most of the uncertainty comes from the"


@pytest.mark.parametrize(
    ("low", "examples", "seeds", "from_examples", "text"),
    [
        (-0.04, 50, 3, 0.9, f"{SOURCE} examples: about 800 evaluation examples would be enough."),  # 16 times as many
        (-0.3, 50, 2, 0.9, f"{SOURCE} examples: about 45,000 evaluation examples would be enough."),
        (-0.02, 50, 3, 0.1, f"{SOURCE} seeds: about 5 seeds would be enough."),
        (-0.049, 5, 2, 0.1, f"{SOURCE} seeds: about 4 seeds would be enough."),
        (
            *(-2.4, 5, 2, 0.1),
            f"{SOURCE} seeds, and no practical number of seeds would be enough; use longer runs or more held-out "
            "examples (--eval-data or --validation-split).",
        ),
        (
            *(-2.0, 5, 2, 0.9),
            f"{SOURCE} examples, and no practical number of evaluation examples would be enough; try longer runs or a "
            "larger --margin.",
        ),
    ],
)
def test_what_it_would_take_is_of_the_larger_source_if_anybody_can_run_it(
    low: float, examples: int, seeds: int, from_examples: float, text: str
) -> None:
    assert sample_size_advice(Difference(0, low, -low, 0.5, examples, seeds, from_examples), 0.02) == text


def test_of_two_equal_arms_the_smaller_one_is_recommended() -> None:
    large = arm(-0.01, 0.01, name="r64", parameters=2_000_000)
    verdict, _ = verdict_of(FULL, large)
    assert verdict.endswith("Use full: it trains 2x fewer parameters.")
    better, _ = verdict_of(FULL, arm(-0.05, -0.03, name="r64", parameters=2_000_000))
    assert better.endswith("Use r64.")


@pytest.mark.parametrize(("low", "high"), [(-0.05, -0.03), (-0.01, 0.012), (-0.05, 0.01), (-0.05, 0.05)])
def test_differences_are_in_the_unit_of_the_losses(low: float, high: float) -> None:
    verdict, _ = compare_verdict([FULL, arm(low, high)], "full", 0.02, measure_of("per example"))
    assert "per example" in verdict
    assert "token" not in verdict


WHOLE = "so it is also the cheapest."
EARLY = "All trials with fewer trained parameters ended early, so none was compared at full length"


@pytest.mark.parametrize(
    ("smaller", "words"),
    [
        (
            {0: "close"},
            "It may not be the cheapest: trial 0 came close with fewer trained parameters, but has no final runs "
            "(see the notes and --finalists).",
        ),
        ({}, f"No trial with fewer trained parameters came close, {WHOLE}"),
        ({0: "done", 3: "pruned"}, f"No trial with fewer trained parameters came close (1 of 2 ended early), {WHOLE}"),
        ({1: "pruned", 3: "out of memory"}, f"{EARLY} (trial 1 pruned; trial 3 out of memory)."),
    ],
    ids=str,
)
def test_a_smaller_trial_that_ended_early_is_not_called_worse(smaller: dict[int, str], words: str) -> None:
    best = Finalist(2, {}, 1000, 2.0, 2.0, (1.9, 2.1), None, None, 1.0, 1, [])
    trials = [Candidate(2, "done", {}, 2.0, 1000), Candidate(4, "pruned", {}, 2.5, 1000), Candidate(5, "diverged", {})]
    trials += [Candidate(number, state, {}, 2.4, 100) for number, state in smaller.items() if state != "close"]
    trials += [Candidate(number, "done", {}, 2.01, 100) for number, state in smaller.items() if state == "close"]
    verdict = search_verdict([best], best, 0.02, measure_of("nats per token"), trials)
    assert verdict == f"Use trial 2: held-out loss 2.000 (95% interval 1.900 to 2.100). {words}"
