"""Arms of a comparison and finalists of a search are judged on the held-out examples that chose nothing."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from tailora.report.files import page_of
from tailora.report.html import html
from tailora.study.config import CompareConfig
from tailora.study.judging import choose_finalists, judge_arms, judge_finalists
from tailora.study.lr_search import LearningRateSearch
from tailora.study.results import Candidate
from tailora.study.trial import Trial, choosing_half, judging_half

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
    for_rates, for_arms = choosing_half(len(first.counts)), judging_half(len(first.counts))
    assert sorted([*for_rates, *for_arms]) == list(range(40))
    better = losses.copy()
    better[for_rates] -= 1  # on the other half there is no difference
    study = CompareConfig(arms={"lora": {}, "full": {"method": "full"}})
    runs = {
        "lora": [trial(better + rng.normal(0, 0.001, 40), counts, seed, 10) for seed in (1, 2, 3)],
        "full": [trial(losses + rng.normal(0, 0.001, 40), counts, seed, 1000) for seed in (1, 2, 3)],
    }
    found = judge_arms(study, {arm: rates(1e-3) for arm in runs}, runs, notes=[], settings={}, seconds=1.0)
    assert "lora and full are equally good: they differ by less than 0.02 nats per token" in found.verdict
    assert "100x fewer" in found.verdict
    assert found.base_loss == pytest.approx(4)
    assert found.seeds == [1, 2, 3]


def test_arms_have_the_unit_of_their_runs() -> None:
    counts = np.full(40, 1)
    losses = np.random.default_rng(0).normal(3, 0.5, size=40)
    study = CompareConfig(arms={"lora": {}, "full": {"method": "full"}})
    runs = {
        arm: [replace(trial(losses + seed / 1000, counts, seed, size), loss_unit="per example") for seed in (1, 2)]
        for arm, size in (("lora", 10), ("full", 1000))
    }
    found = judge_arms(study, {arm: rates(1e-3) for arm in runs}, runs, notes=[], settings={}, seconds=1.0)
    assert found.loss_unit == "per example"
    assert "differ by less than 0.02 per example" in found.verdict
    assert "loss, per example" in html(page_of({"kind": "compare", **json.loads(json.dumps(found.to_dict()))}, "file"))


@pytest.mark.parametrize(("tries", "remedy"), [(1, "--rate-tries"), (2, "a higher --minutes")])
def test_tries_that_ended_early_were_cut_short_by_the_minutes(tries: int, remedy: str) -> None:
    search = LearningRateSearch(1e-3, tries)
    search.record(1e-3, 2.0)
    counts = np.full(10, 5)
    runs = {arm: [trial(np.linspace(1, 2, 10), counts, seed, 10) for seed in (1, 2)] for arm in ("a", "b")}
    study = CompareConfig(arms={"a": {}, "b": {"r": 2}}, rate_tries=tries)
    found = judge_arms(study, {"a": rates(1e-3), "b": search}, runs, notes=[], settings={}, seconds=1.0)
    assert f"Only one learning rate of b was tried, 0.001: try more with {remedy}." in found.verdict


def test_an_arm_that_failed_keeps_its_reason() -> None:
    counts = np.full(10, 5)
    failed = LearningRateSearch(1e-3, 1)
    failed.record(1e-3, np.inf)
    study = CompareConfig(arms={"lora": {}, "full": {"method": "full"}})
    runs = {"lora": [trial(np.linspace(1, 2, 10), counts, seed, 10) for seed in (1, 2)]}
    found = judge_arms(study, {"lora": rates(1e-3), "full": failed}, runs, notes=[], settings={}, seconds=1.0)
    assert found.arms[1].outcome == "failed at every rate tried, 0.001"
    large = LearningRateSearch(1e-3, 5)
    large.record(1e-3, np.inf, fits=False)
    assert large.next_rate() is None  # another rate needs as much
    found_large = judge_arms(study, {"lora": rates(1e-3), "full": large}, runs, notes=[], settings={}, seconds=1.0)
    assert "full ran out of memory." in found_large.verdict
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert plain["arms"][1]["rates"] == {"0.001": None}
    assert "failed" in html(page_of({"kind": "compare", **plain}, "report.json"))
    assert "full failed at every rate tried" in found.verdict
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


def run_of(losses: np.ndarray, counts: np.ndarray, seed: int) -> Trial:
    numbers = {"train_tokens": 100, "tokens_per_second": 10.0, "peak_memory_bytes": 9, "seed": seed}
    before = (counts * 4).tolist()
    return Trial(
        "done", "", numbers | {"output_dir": "there"}, (losses * counts).tolist(), before, counts.tolist(), None, 1
    )


def runs_with(apart: dict[int, float], spread: float = 0.001, seeds: int = 3) -> dict[int, list[Trial]]:
    rng = np.random.default_rng(0)
    counts = rng.integers(5, 50, size=80)
    losses = rng.normal(3, 0.5, size=80)
    shifted = {number: losses + shift for number, shift in apart.items()}
    shifted[1][choosing_half(80)] -= 9  # says nothing: that half has chosen
    return {
        number: [run_of(values + rng.normal(0, spread, 80), counts, seed) for seed in range(1, seeds + 1)]
        for number, values in shifted.items()
    }


@pytest.mark.parametrize(
    ("apart", "spread", "seeds", "cheapest", "message"),
    [
        ({0: 0.0, 1: 0.005}, 0.001, 3, 1, "Take trial 1: it has 10x fewer .* trial 0.*worse by at most 0.00."),
        ({0: 0.0, 1: -0.1}, 0.001, 3, 1, "Take trial 1.*and is better"),
        ({0: 0.0, 1: 0.1}, 0.001, 3, 0, "Take trial 0.*smaller trials are worse: .*trial 1 with 10x fewer .*is .0.100"),
        ({0: 0.0, 1: 0.0}, 0.9, 3, 1, "Cannot tell whether trial 1 or trial 0.*Most of the uncertainty"),
        ({0: 0.0, 1: 0.0}, 0.001, 1, 1, "Cannot tell.*--seeds 3"),
    ],
)
def test_the_cheapest_is_not_shown_to_be_worse(
    apart: dict[int, float], spread: float, seeds: int, cheapest: int, message: str
) -> None:
    chosen = [candidate(0, 2.0, 1000), candidate(1, 2.01, 100)]
    found = judge_finalists(chosen, runs_with(apart, spread, seeds), 0.02, **OTHERS)
    assert (found.best.number, found.cheapest.number) == (0, cheapest)
    assert found.judged_examples == len(judging_half(80)) == 40
    assert found.base_loss == pytest.approx(4)
    assert re.search(f"(?s){message}", found.verdict), found.verdict
