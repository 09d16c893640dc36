"""A mixed batch on a device: few kernels, and no wait of the host after the first forward of a block."""

from typing import Any

import pytest
import torch
from pretend_accelerator import counted
from torch import nn

from tailora import LoRAConfig, LoRAModel
from tests.device.test_adapters import PROJECTIONS
from tests.tiny import chat_model

pytestmark = pytest.mark.device

SLOTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "DoRA": {"use_dora": True},
    "dropout": {"lora_dropout": 0.5},
    "trained biases": {"bias": "all"},
    "embedding": {"target_modules": ["embed_tokens", "v_proj"]},
    "token rows": {"trainable_token_indices": [3, 5]},
    "module trained whole": {"modules_to_save": ["norm"]},
}
NAMES = ["b", None, "a", "b"]


def mixed(device: torch.device, **settings: Any) -> LoRAModel:
    model = LoRAModel(chat_model(initializer_range=0.3, attention_bias=True), LoRAConfig(r=4, **settings), "a").eval()
    model.add_adapter("b", LoRAConfig(r=2, **settings))
    model.set_adapter(["a", "b"] if "modules_to_save" not in settings else "a")
    for parameter in model.lora_layers.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.to(device)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("slot", SLOTS)
def test_the_host_waits_for_the_first_forward_alone(device: torch.device, slot: str, training: bool) -> None:
    """Afterwards no more than the base makes it wait, for transformers' mask."""
    model, ids = mixed(device, **SLOTS[slot]).train(training), torch.full((4, 5), 7, device=device)

    def waits() -> int:
        with counted() as counts, torch.set_grad_enabled(training):
            logits = model(input_ids=ids, use_cache=False).logits
            if training and logits.requires_grad:
                logits.sum().backward()
        return counts.synchronisations.total()

    with model.adapter_rows(NAMES):
        first, *later = waits(), waits(), waits()
    model.set_adapter(None)
    assert later == [waits()] * 2
    assert first > later[0]


def kernels_of_a_token(model: Any, prompt: torch.Tensor) -> int:
    totals = []
    for tokens in (3, 4):
        with counted() as counts:
            model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
        totals.append(counts.kernels.total())
    return totals[1] - totals[0]


@pytest.mark.parametrize("names", [["a"] * 4, ["a", "b", "a", "b"], ["a", None, "b", "b"]])
@pytest.mark.parametrize(("slot", "most"), [("plain", 2), ("DoRA", 4)])
def test_a_decoded_token_takes_few_kernels_whatever_the_number_of_adapters(
    device: torch.device, slot: str, most: int, names: list[str | None]
) -> None:
    model, prompt = mixed(device, **SLOTS[slot]), torch.full((4, 3), 7, device=device)
    with model.adapter_rows(names):
        adapted = kernels_of_a_token(model, prompt)
    model.set_adapter(None)
    assert adapted - kernels_of_a_token(model, prompt) <= most * PROJECTIONS


def test_a_training_forward_takes_few_kernels(device: torch.device) -> None:
    model, ids = mixed(device), torch.full((4, 3), 7, device=device)

    def kernels() -> int:
        with counted() as counts:
            model(input_ids=ids, use_cache=False).logits.sum().backward()
        return counts.kernels.total()

    with model.adapter_rows(NAMES):
        adapted = kernels()
    model.set_adapter("a")
    one = kernels()
    assert adapted - one <= 40 * PROJECTIONS
