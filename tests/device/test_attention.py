"""Attention of packed rows on a device: one call per layer for any number of documents, and the host never waits.

tests/gpu/test_attention.py compares its results with those of each document alone, here too.
"""

from typing import Any

import pytest
import torch
from pretend_accelerator import Counts, counted, no_synchronisation
from tiny import GROUPED, packed_row
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, LlamaConfig, MistralConfig, PreTrainedModel

from tailora.kernels.attention import packed_rows

pytestmark = pytest.mark.device

CONFIGS = {
    "llama": LlamaConfig(**GROUPED),
    "gpt2": GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4),
    "mistral": MistralConfig(**GROUPED, sliding_window=10),
    "gemma3": Gemma3TextConfig(
        **GROUPED, head_dim=8, sliding_window=3, layer_types=["sliding_attention", "full_attention"]
    ),
}
LENGTHS = [16, 2, 1, 5, 3, 1, 7, 4]


def made(name: str, device: torch.device) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name]).eval().to(device)


def step(model: PreTrainedModel, row: dict[str, Any]) -> None:
    with no_synchronisation():
        model(**row).logits.sum().backward()


@pytest.mark.parametrize("name", CONFIGS)
def test_eight_documents_take_the_kernels_of_three(device: torch.device, name: str) -> None:
    model = made(name, device)

    def counts(lengths: list[int]) -> Counts:
        row = packed_row(lengths, device)
        model.zero_grad()
        with packed_rows(model), counted() as found:
            step(model, row)
        return found

    few, many = counts([16, 16, 7]), counts(LENGTHS)
    assert few.kernels == many.kernels
    assert (
        sum(number for kernel, number in many.kernels.items() if kernel.endswith("scaled_dot_product_attention")) == 2
    )
    assert not many.synchronisations
    if name == "llama":
        assert many.kernels == counts([sum(LENGTHS)]).kernels
