"""Every column of docs/architectures.md, on a few architectures of transformers; with -m exhaustive on all of them."""

import json
from pathlib import Path
from typing import Any

import pytest
from architecture_checks import CHECKS, outcome

pytestmark = pytest.mark.filterwarnings("ignore")  # those of transformers, PEFT and the compiler
RESULTS = Path(__file__).parent.parent.parent / "benchmarks" / "results" / "architectures.json"
QUICK = (
    *("RobertaForSequenceClassification", "LlamaForSequenceClassification"),
    *("ViTForImageClassification", "GPT2LMHeadModel"),
)


@pytest.mark.parametrize("class_name", QUICK)
@pytest.mark.slow
def test_an_architecture_does_all_that_an_adapter_must(class_name: str) -> None:
    assert {name: check(class_name) for name, check in CHECKS.items()} == dict.fromkeys(CHECKS, "yes")


def test_peft_reads_an_adapter_of_a_model_that_takes_no_tokens_first() -> None:
    assert CHECKS["PEFT reads"]("WhisperForConditionalGeneration") == "yes"  # with a task, PEFT would pass input_ids


def recorded() -> dict[str, dict[str, Any]]:
    architectures: dict[str, dict[str, Any]] = json.loads(RESULTS.read_text())["architectures"]
    return {name: cells for name, cells in architectures.items() if "base" not in cells}


@pytest.mark.exhaustive
@pytest.mark.parametrize("column", CHECKS)
@pytest.mark.parametrize("class_name", recorded())
def test_every_architecture_does_what_the_table_says(class_name: str, column: str) -> None:
    expected, found = recorded()[class_name][column], outcome(column, class_name)
    assert found.startswith("yes") == expected.startswith("yes"), found
