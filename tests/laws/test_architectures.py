"""Every column of docs/architectures.md, on a few architectures of transformers; with -m exhaustive on all of them."""

import pytest
from architectures import CHECKS

pytestmark = pytest.mark.filterwarnings("ignore")  # those of transformers, PEFT and the compiler

QUICK = (
    "RobertaForSequenceClassification",
    "LlamaForSequenceClassification",
    "ViTForImageClassification",
    "GPT2LMHeadModel",
)


@pytest.mark.parametrize("class_name", QUICK)
@pytest.mark.slow
def test_an_architecture_does_all_that_an_adapter_must(class_name: str) -> None:
    assert {name: check(class_name) for name, check in CHECKS.items()} == dict.fromkeys(CHECKS, "yes")
