"""What adapters cost on a device: kernels of an evaluation, and DoRA's norms, which never wait for the device.

tests/core/test_inference.py counts those of a decoded token, here too.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pretend_accelerator import counted, no_synchronisation
from tiny import chat_model
from torch import nn

from tailora import LoRAConfig, LoRAModel
from tailora.core.attach import Adapted
from tailora.core.layer import LoRALayer
from tailora.data.dataset import Example, Examples
from tailora.evaluation.forgetting import forgetting
from tailora.kernels.loss import FROZEN
from tailora.train.loss import BatchLayout, evaluate

pytestmark = pytest.mark.device

PROJECTIONS = 14  # of the chat model's two layers
DORA = LoRAConfig(r=4, use_dora=True)


def stirred(device: torch.device, config: LoRAConfig, dtype: torch.dtype = torch.float32) -> LoRAModel:
    model = LoRAModel(chat_model(initializer_range=0.3, attention_bias=True).to(device, dtype), config).eval()
    for parameter in model.lora_layers.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


# ---- Evaluation

LAYOUT = BatchLayout(packed=True, loss=FROZEN, pad_id=0, attention="sdpa")


def example(length: int) -> Example:
    ids = np.arange(1, length + 1, dtype=np.int32)
    return Example.of_text(ids, ids > length - 4)


def held_out(model: LoRAModel, count: int) -> Any:
    return evaluate(model, Examples.of([example(40)] * count), layout=LAYOUT, token_budget=40).sums


def other_text(model: LoRAModel, count: int) -> Any:
    return forgetting(model, [list(range(40))] * count).loss_after


@pytest.mark.parametrize("evaluation", [held_out, other_text])
@pytest.mark.parametrize(("config", "most"), [(LoRAConfig(r=4), 2), (DORA, 3)], ids=["LoRA", "DoRA"])
def test_an_evaluation_computes_norms_once_and_adds_as_few_kernels_as_decoding(
    device: torch.device, config: LoRAConfig, most: int, evaluation: Callable[[LoRAModel, int], Any]
) -> None:
    model = stirred(device, config, torch.bfloat16)

    def kernels_of_a_batch() -> int:
        totals = []
        for batches in (1, 2):
            with counted() as counts:
                evaluation(model, batches)
            totals.append(counts.kernels.total())
        return totals[1] - totals[0]

    adapted = kernels_of_a_batch()
    layers = [module for module in model.base_model.modules() if isinstance(module, Adapted)]
    assert {type(part) for layer in layers for part in layer.adapter_parts} == {LoRALayer}
    model.set_adapter(None)
    assert adapted - kernels_of_a_batch() == most * PROJECTIONS


# ---- DoRA's norms


def test_the_norms_wait_for_nothing_and_widen_no_weight(device: torch.device) -> None:
    layer = nn.Linear(512, 256).to(device, torch.bfloat16)
    model = LoRAModel(nn.Sequential(layer), DORA)
    (adapter,) = model.lora_layers.values()
    adapter.lora_B.data.normal_(std=0.05)
    x, module = torch.randn(3, 512, device=device, dtype=torch.bfloat16), torch.get_device_module(device)
    model(x)
    before = module.memory_allocated()
    module.reset_peak_memory_stats()
    with no_synchronisation(), counted() as counts:
        adapter.gain(layer)
    assert module.max_memory_allocated() - before < layer.weight.numel()  # half of the weight's 16 bits
    assert counts.kernels.total() <= 16
    with no_synchronisation():
        model(x).float().sum().backward()
