"""Attention of packed rows on a device: one call per layer for any number of documents, and the host never waits."""

from typing import Any

import pytest
import torch
from pretend_accelerator import Counts, counted, no_synchronisation
from tiny import GROUPED
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, LlamaConfig, MistralConfig, PreTrainedModel

from tailora.kernels.attention import packed_rows
from tailora.train.packing import choose_packing

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


def row_of(lengths: list[int], device: torch.device) -> dict[str, Any]:
    ends = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    positions = torch.cat([torch.arange(length) for length in lengths])[None].to(device)
    ids = torch.randint(300, (1, sum(lengths)), generator=torch.Generator().manual_seed(0)).to(device)
    bounds = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": max(lengths), "max_length_k": max(lengths)}
    return {"input_ids": ids, "position_ids": positions, **bounds}


def step(model: PreTrainedModel, row: dict[str, Any]) -> Tensor:
    with no_synchronisation():
        logits: Tensor = model(**row, use_cache=False).logits
        logits.sum().backward()
    return logits.detach()


@pytest.mark.parametrize("name", CONFIGS)
def test_documents_have_the_logits_that_they_have_alone(device: torch.device, name: str) -> None:
    model, row = made(name, device), row_of(LENGTHS, device)
    with packed_rows(model):
        together = step(model, row)[0]
    documents = row["input_ids"][0].split(LENGTHS)
    with torch.no_grad():
        alone = torch.cat([model(document[None], use_cache=False).logits[0] for document in documents])
    torch.testing.assert_close(together.cpu(), alone.cpu(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_eight_documents_take_the_kernels_of_three(device: torch.device, name: str) -> None:
    model = made(name, device)

    def counts(lengths: list[int]) -> Counts:
        row = row_of(lengths, device)
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
        one = counts([sum(LENGTHS)])  # it is not padded, so that two views of a layer are no copies
        assert many.kernels - one.kernels == {"aten::copy_": 2 * 2}


def test_what_torch_cannot_compute_there_is_passed_over_with_its_reason(device: torch.device) -> None:
    attention, note = choose_packing(made("llama", device), "auto")
    assert attention == "sdpa"
    assert note is not None
    assert "not by flash_attention_2, because there is none for pretend" in note
    assert "not by flex_attention, because there is none for pretend" in note
