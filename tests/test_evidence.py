"""benchmarks/studies: rules of verdicts on made-up numbers, and studies that `tailora compare` accepts."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import LlamaForCausalLM

from benchmarks import measure
from benchmarks.speed.shapes import SHAPES
from benchmarks.studies import evidence, markov
from benchmarks.studies import evidence_data as data
from benchmarks.studies import evidence_rules as rules
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


def test_the_stored_findings_are_what_the_rules_make_of_the_stored_results(tmp_path: Path) -> None:
    """All statements, with each verdict."""
    path = Path(shutil.copy(measure.RESULTS / "evidence.json", tmp_path))
    stored = json.loads(path.read_text())["findings"]
    evidence.write_findings(path)
    found = json.loads(path.read_text())["findings"]
    assert {finding["statement"] for finding in found} == rules.STATEMENTS.keys()
    for ours, theirs in zip(found, stored, strict=True):
        numbers, expected = ([finding.pop(name) for name in ("value", "low", "high")] for finding in (ours, theirs))
        assert numbers == pytest.approx(expected, rel=1e-6), "run benchmarks/studies/evidence.py --judge"
        assert ours == theirs


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
