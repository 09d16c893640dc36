"""benchmarks/studies: rules of verdicts on made-up numbers, and studies that `tailora compare` accepts."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from transformers import LlamaForCausalLM

from benchmarks.site import evidence_tables as tables
from benchmarks.speed.shapes import SHAPES
from benchmarks.studies import evidence_data as data
from benchmarks.studies import evidence_rules as rules
from benchmarks.studies import markov
from tailora.study.config import CompareConfig, arm_settings
from tailora.train.config import TrainConfig


def arm(name: str, best: float = 0.01, tried: tuple[float, ...] = (0.005, 0.01, 0.02)) -> dict[str, Any]:
    return {"name": name, "learning_rate": best, "rates": {repr(rate): 2.0 for rate in tried}}


def result(losses: dict[str, float], spread: float = 0.001, **arms: dict[str, Any]) -> dict[str, Any]:
    """Two seeds and 50 examples of 10 tokens; all arms have the same hard and easy examples."""
    hard = np.random.default_rng(0).normal(size=(1, 50))
    noise = np.random.default_rng(1)
    return {
        "report": {"arms": [arms.get(name, arm(name)) for name in losses]},
        "counts": [10] * 50,
        "sums": {
            name: (10 * (loss + hard + spread * noise.normal(size=(2, 50)))).tolist() for name, loss in losses.items()
        },
    }


@pytest.mark.parametrize(
    ("numbers", "better", "equal"),
    [
        ((-0.05, -0.06, -0.04), "holds", "does not hold"),
        ((-0.01, -0.015, -0.005), "does not hold", "holds"),
        ((0.00, -0.01, 0.01), "does not hold", "holds"),
        ((0.05, 0.04, 0.06), "does not hold", "does not hold"),
        ((-0.05, -0.11, 0.01), "cannot tell", "cannot tell"),
        ((-0.015, -0.025, -0.005), "cannot tell", "cannot tell"),
        ((0.01, -0.01, 0.03), "does not hold", "cannot tell"),
    ],
)
def test_a_verdict_is_made_of_the_interval_and_the_margin(
    numbers: tuple[float, float, float], better: str, equal: str
) -> None:
    assert rules.better(*numbers) == better
    assert rules.equal(*numbers) == equal


def test_a_range_holds_inside_and_fails_outside() -> None:
    assert rules.inside(6.0, 19.0, 5.0, 20.0) == "holds"
    assert rules.inside(2.0, 4.0, 5.0, 20.0) == rules.inside(21.0, 30.0, 5.0, 20.0) == "does not hold"
    assert rules.inside(4.0, 6.0, 5.0, 20.0) == "cannot tell"


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        ({"markov": "holds", "reviews": "holds", "chats": "cannot tell"}, "holds"),
        ({"markov": "holds", "tiny_lm": "holds"}, "cannot tell"),
        ({"markov": "does not hold", "reviews": "cannot tell"}, "does not hold"),
        ({"markov": "holds", "reviews": "does not hold"}, "depends"),
        ({}, "cannot tell"),
    ],
)
def test_a_statement_needs_both_models_to_hold_and_one_place_to_fail(verdicts: dict[str, str], expected: str) -> None:
    found = [rules.Finding("dora", setting, "", 0, 0, 0, verdict) for setting, verdict in verdicts.items()]
    assert rules.overall(found) == expected


def findings(**results: Any) -> dict[str, rules.Finding]:
    """Statement -> what these studies of the tiny model show of it."""
    return {finding.statement: finding for finding in rules.findings({"markov": results})}


def test_differences_are_first_minus_second_and_need_tuned_arms() -> None:
    losses = {"dora": 1.9, "pissa": 2.0, "loraplus": 2.1}
    found = findings(**{name: result({"lora": 2.0, name: loss}) for name, loss in losses.items()})
    verdicts = {name: finding.verdict for name, finding in found.items()}
    assert verdicts == {"dora": "holds", "pissa": "does not hold", "loraplus": "does not hold"}
    assert found["dora"].value == pytest.approx(-0.1, abs=1e-3)
    assert found["dora"].low < found["dora"].value < found["dora"].high < -0.09
    assert not findings(dora={"sums": {"lora": [[1.0]]}, "report": {"arms": []}})  # one that failed
    untuned = findings(dora=result({"lora": 2.0, "dora": 1.9}, dora=arm("dora", best=0.02)))["dora"]
    assert (untuned.verdict, untuned.remark) == ("cannot tell", "the rate of dora is not tuned")


@pytest.mark.parametrize(("of_r", "verdict"), [(2.1, "holds"), (2.0, "does not hold")])
def test_alpha_fails_if_one_other_alpha_is_as_good(of_r: float, verdict: str) -> None:
    study = result({"lora": 2.0, "alpha-r": of_r, "alpha-16r": 2.1})
    found = rules.findings({"markov": {"alpha": study}})
    assert [finding.verdict for finding in found] == [verdict] * 2


def test_the_gap_of_batches_is_a_difference_of_differences() -> None:
    small, large = result({"full": 2.0, "lora": 2.1}), result({"full": 2.5, "lora": 2.9})
    assert rules.gap_of_batches(small, large)[0] == pytest.approx(0.3, abs=1e-3)
    assert findings(batch=large, full={**small, **of_full()})["batch"].verdict == "holds"
    assert findings(batch=small, full={**large, **of_full()})["batch"].verdict == "does not hold"


def of_full(lora: float = -8.0, full: float = -11.0) -> dict[str, Any]:
    """Rates whose losses have their lowest point at 2^lora and 2^full, with examples that differ a little."""
    noise = 0.01 * np.random.default_rng(2).normal(size=40)
    return {
        "rate_counts": [10] * 40,
        "rate_sums": {
            name: {
                repr(2.0**octave): (10 * (2 + 0.05 * (octave - vertex) ** 2 + noise * octave)).tolist()
                for octave in range(-14, -4)
            }
            for name, vertex in (("lora", lora), ("full", full))
        },
        "kl": {"lora": [0.2, 0.21], "full": [0.4, 0.41]},
    }


def test_the_best_rates_are_compared_between_those_that_were_tried() -> None:
    value, low, high = rules.rate_ratio(of_full(-8.4, -11.6))
    assert low < value < high
    assert value == pytest.approx(2**3.2, rel=0.05)
    assert (low, high) == pytest.approx((value, value), rel=0.2)
    assert rules.vertex({0.25: 2.0, 0.5: 2.1}) == -2  # too few for a parabola
    found = findings(full={**result({"full": 2.0, "lora": 2.0}), **of_full()})
    assert (found["rate"].verdict, found["forgetting"].verdict) == ("holds", "holds")
    assert found["forgetting"].value == pytest.approx(0.506, abs=0.01)


@pytest.mark.parametrize(("of_lora", "value", "verdict"), [(1, 2.5, "holds"), (0, 0, "does not hold")])
def test_intruders_are_compared_matrix_by_matrix(of_lora: int, value: float, verdict: str) -> None:
    matrices = {f"m{i}": {"lora": of_lora * (2 + i % 2), "full": 0} for i in range(20)}
    (found,) = findings(intruders={"matrices": matrices}).values()
    assert (found.value, found.verdict) == (value, verdict)


def test_every_study_is_one_that_compare_accepts() -> None:
    for setting, names in data.STUDIES.items():
        for name in names:
            settings = data.study(setting, name)
            of_study = {key: settings.pop(key) for key in tuple(settings) if key in CompareConfig.model_fields}
            comparison, train = CompareConfig(**of_study), TrainConfig(**settings)
            for arm_name in comparison.arms:
                arm_settings(train, comparison, arm_name, learning_rate=comparison.first_rate(arm_name))
            assert comparison.rate_tries >= 5  # as many as an arm needs whose first rate is near its best


@pytest.mark.parametrize("model", data.ATTENTION_RANKS)
def test_attention_and_mlp_train_about_as_many_parameters_as_all_layers(model: str) -> None:
    small = replace(SHAPES["S"], layers=1, vocabulary=8).config()
    base = LlamaForCausalLM(markov.model_config() if model == "tiny model" else small)
    counts = [
        markov.trainable_parameters(
            base, {"r": 8, **{key: value for key, value in arm.items() if key != "learning_rate"}}
        )
        for arm in data.arms("layers", model).values()
    ]
    assert min(counts) > 0.97 * max(counts)


def test_the_grid_of_experiment_6_has_intervals_over_its_seeds() -> None:
    best = {"r4": (2.1, -7), "r8": (2.0, -7), "dora": (1.9, -7), "pissa": (2.0, -5), "full": (2.0, -10)}
    best |= {"attention": (2.3, -7), "mlp": (2.1, -7)}
    cells = [
        {
            "cell": {"arm": name},
            "result": {"losses": {str(o): loss + 0.001 * seed + 0.1 * (o - octave) ** 2 for o in range(-11, -4)}},
        }
        for seed in range(2)
        for name, (loss, octave) in best.items()
    ]
    found = {finding.statement: finding for finding in rules.of_grid("tiny_lm", cells)}
    verdicts = {name: finding.verdict for name, finding in found.items()}
    assert verdicts == dict.fromkeys(("layers", "mlp", "rate", "dora"), "holds") | {"pissa": "cannot tell"}
    assert found["pissa"].remark == "the rate of pissa is not tuned"
    assert found["dora"].value == pytest.approx(-0.1)
    assert found["rate"].value == pytest.approx(8)


def test_the_page_says_what_was_not_measured_and_why_there_is_no_verdict() -> None:
    found = [
        rules.Finding("dora", "markov", "dora - lora, nats per token", -0.001, -0.004, 0.002, "does not hold"),
        rules.Finding("dora", "reviews", "dora - r8, nats per token", -0.1, -0.2, 0.0, "cannot tell", "not tuned"),
    ]
    content = {"findings": [vars(finding) for finding in found], "cells": []}
    overall = tables.verdicts(content).splitlines()
    assert "| DoRA is better than LoRA | **does not hold** | does not hold (1) | cannot tell (1) |" in overall
    assert (
        sum("| not measured | not measured | not measured |" in line for line in overall) == len(rules.STATEMENTS) - 1
    )
    rows = tables.statement(content, "dora").splitlines()
    assert "-0.001 (-0.004 to +0.002) | does not hold |" in rows[2]
    assert "-0.100 (-0.200 to +0.000) | cannot tell: not tuned |" in rows[3]
    assert [row.endswith("| not measured |") for row in rows[4:]] == [True]
