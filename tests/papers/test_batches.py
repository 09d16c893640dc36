"""Accumulated gradients of packed and padded rows, on a model that is being adapted."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from tiny import VOCABULARY, chat_model
from torch import Tensor

from tailora import LoRAConfig, LoRAModel
from tailora.data.dataset import Example
from tailora.kernels.attention import packed_rows
from tailora.kernels.loss import FROZEN
from tailora.train.loss import BatchLayout, ModelWithLoss, make_batch
from tailora.train.trainer import accumulate_gradients

LENGTHS = (3, 5, 40, 60)


def examples() -> list[Example]:
    random = np.random.default_rng(0)
    made = []
    for length in LENGTHS:
        ids = random.integers(VOCABULARY, size=length).astype(np.int32)
        made.append(Example.of_text(ids, np.arange(length) >= length // 3))
    return made


@pytest.mark.parametrize("packed", [True, False])
def test_the_accumulated_gradient_is_that_of_the_full_batch(packed: bool) -> None:
    """Summed loss / supervised tokens of the whole step: to 1e-6, at lengths 3, 5, 40, 60."""
    model = LoRAModel(chat_model(initializer_range=0.2), LoRAConfig(r=4)).eval()
    for layer in model.lora_layers.values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    rows, data = BatchLayout(packed, FROZEN, 0), examples()
    supervised = sum(example.supervised for example in data)

    def gradient(batches: list[list[Example]]) -> Tensor:
        model.zero_grad()
        forward = ModelWithLoss(model, rows)
        made = [make_batch(batch, rows, torch.device("cpu")) for batch in batches]
        accumulate_gradients(forward, made, supervised)
        return torch.cat([parameter.grad.flatten() for parameter in model.lora_layers.parameters()])

    with packed_rows(model.base_model) if packed else nullcontext():
        whole = gradient([data])
        for batches in ([[each] for each in data], [data[:1], data[1:]], [data[2:], data[:2]]):
            torch.testing.assert_close(gradient(batches), whole, rtol=0, atol=1e-6)
    assert whole.abs().max() > 1e-2
