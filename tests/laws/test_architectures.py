"""The columns of docs/compatibility.md: cheap ones on some architectures; with -m exhaustive all, on all of them."""

import json
from pathlib import Path
from typing import Any

import pytest
from architecture_checks import CHECKS, class_names, outcome

pytestmark = pytest.mark.filterwarnings("ignore")  # those of transformers, PEFT and the compiler
RESULTS = Path(__file__).parent.parent.parent / "benchmarks" / "results" / "architectures.json"
ALL_COLUMNS = (
    *("RobertaForSequenceClassification", "LlamaForSequenceClassification"),
    *("ViTForImageClassification", "GPT2LMHeadModel"),
)
CHEAP_COLUMNS = ("attach", "unmerge", "checkpointing", "rows", "generate")
REPRESENTATIVE = (
    *("LlamaForCausalLM", "Qwen3ForCausalLM", "Qwen3NextForCausalLM", "Gemma3nForCausalLM", "Gemma4ForCausalLM"),
    *("Phi3ForCausalLM", "GPT2LMHeadModel", "BartForCausalLM", "BigBirdForCausalLM", "DoryForCausalLM"),
    *("GptOssForCausalLM", "Qwen2MoeForCausalLM", "DeepseekV3ForCausalLM", "DbrxForCausalLM", "LagunaForCausalLM"),
    *("JambaForCausalLM", "BambaForCausalLM", "Lfm2ForCausalLM", "GraniteMoeHybridForCausalLM"),
    *("T5ForConditionalGeneration", "LlavaForConditionalGeneration", "SmolVLMForConditionalGeneration"),
    *("Qwen2_5_VLForConditionalGeneration", "InternVLForConditionalGeneration"),
)


@pytest.mark.parametrize("class_name", REPRESENTATIVE)
def test_a_representative_architecture_does_what_is_cheap_to_check(class_name: str) -> None:
    assert {name: outcome(name, class_name) for name in CHEAP_COLUMNS} == dict.fromkeys(CHEAP_COLUMNS, "yes")


@pytest.mark.parametrize("class_name", ALL_COLUMNS)
@pytest.mark.slow
def test_an_architecture_does_all_that_an_adapter_must(class_name: str) -> None:
    columns = [name for name in CHECKS if name not in ("generate", "serve") or class_name.endswith("LMHeadModel")]
    assert {name: CHECKS[name](class_name) for name in columns} == dict.fromkeys(columns, "yes")


def test_peft_reads_an_adapter_of_a_model_that_takes_no_tokens_first() -> None:
    assert CHECKS["PEFT reads"]("WhisperForConditionalGeneration") == "yes"  # with a task, PEFT would pass input_ids


def recorded() -> dict[str, dict[str, Any]]:
    architectures: dict[str, dict[str, Any]] = json.loads(RESULTS.read_text())["architectures"]
    return architectures


def tested() -> list[str]:
    """Returns the classes of the table, and those that transformers has added since."""
    known = recorded()
    return [name for name in class_names() if "base" not in known.get(name, {})]


@pytest.mark.exhaustive
@pytest.mark.parametrize("column", CHECKS)
@pytest.mark.parametrize("class_name", tested())
def test_every_architecture_does_what_the_table_says(class_name: str, column: str) -> None:
    expected = recorded().get(class_name, dict.fromkeys(CHECKS, "yes"))[column]
    found = outcome(column, class_name)
    assert found.startswith("yes") == expected.startswith("yes"), found
