"""Batches change nothing: packed rows, accumulated gradients, evaluations, on a model that is being adapted."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from tiny import VOCABULARY, chat_model
from torch import Tensor

from tailora import LoRAConfig, LoRAModel
from tailora.data.collate import collate_packed
from tailora.data.dataset import Example, Examples
from tailora.kernels.attention import packed_rows
from tailora.kernels.loss import FROZEN
from tailora.train.loss import BatchLayout, ModelWithLoss, evaluate, make_batch
from tailora.train.trainer import accumulate_gradients

LENGTHS = (3, 5, 40, 60)
ROWS = {
    "packed": BatchLayout(True, FROZEN, 0),
    "padded": BatchLayout(False, FROZEN, 0),
}
rows_of = pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)


@pytest.fixture
def model() -> LoRAModel:
    made = LoRAModel(chat_model(initializer_range=0.2), LoRAConfig(r=4, lora_dropout=0.1))
    for layer in made.lora_layers.values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    return made


def examples() -> list[Example]:
    random = np.random.default_rng(0)
    made = []
    for length in LENGTHS:
        ids = random.integers(VOCABULARY, size=length).astype(np.int32)
        made.append(Example.of_text(ids, np.arange(length) >= length // 3))
    return made


@torch.no_grad()
def test_packed_logits_are_those_of_each_document_alone(model: LoRAModel) -> None:
    """Attention isolated, positions reset: to 1e-5."""
    model.eval()
    alone = [model(torch.from_numpy(each.input_ids).long()[None], use_cache=False).logits[0] for each in examples()]
    row = collate_packed(examples())
    del row["labels"]
    with packed_rows(model.base_model):
        together = model(**row, use_cache=False).logits[0]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-5)


@rows_of
def test_the_accumulated_gradient_is_that_of_the_full_batch(model: LoRAModel, rows: BatchLayout) -> None:
    """Summed loss / supervised tokens of the whole step: to 1e-6, at lengths 3, 5, 40, 60."""
    model.eval()  # dropout draws for each forward
    data = examples()
    supervised = sum(example.supervised for example in data)

    def gradient(batches: list[list[Example]]) -> Tensor:
        model.zero_grad()
        forward = ModelWithLoss(model, rows)
        made = [make_batch(batch, rows, torch.device("cpu")) for batch in batches]
        accumulate_gradients(forward, made, supervised)
        return torch.cat([parameter.grad.flatten() for parameter in model.lora_layers.parameters()])

    with packed_rows(model.base_model) if rows.packed else nullcontext():
        whole = gradient([data])
        for batches in ([[each] for each in data], [data[:1], data[1:]], [data[2:], data[:2]]):
            torch.testing.assert_close(gradient(batches), whole, rtol=0, atol=1e-6)
    assert whole.abs().max() > 1e-2


@rows_of
def test_evaluation_gives_the_same_bits_each_time(model: LoRAModel, rows: BatchLayout) -> None:
    model.train()
    held_out = Examples.of(examples())
    first, again = (evaluate(model, held_out, layout=rows, token_budget=64) for _ in range(2))
    assert (first.sums == again.sums).all()
    assert first.sums.min() > 0
    assert model.training
