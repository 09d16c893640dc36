"""Packed batches: each token computes with its own adapter, and nothing of the others reaches it."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from tailora.core.layer import LoRALayer
from tailora.core.packed_batch import PackedBatch, PackedLayer, segments_of

RANKS = {"a": 2, "b": 5, "c": 3}
LAYER = nn.Linear(6, 4)


def parts(names: Sequence[str] = tuple(RANKS)) -> dict[str, tuple[LoRALayer]]:
    torch.manual_seed(0)
    result = {}
    for name in names:
        part = LoRALayer(6, 4, min(RANKS.get(name, 1), 4)).eval()
        nn.init.normal_(part.lora_B)
        result[name] = (part,)
    return result


def outputs(layer: PackedLayer, names: Sequence[str | None], x: Tensor) -> Tensor:
    layer.batch.set_tokens(segments_of((name, 1) for name in names), ())
    with torch.inference_mode():
        y = LAYER(x)
        return layer.add_to(y, y, x, LAYER).clone()


@pytest.mark.parametrize(
    "batches",
    [
        [["a"], ["a", "a", "b"], [None, "b", "c", "a"], ["c"]],
        [["a", "b", "c"], [None, None], ["unknown", "a", "c"], ["b", "a"]],
    ],
)
def test_every_token_has_its_adapter_whoever_joins_and_leaves(batches: list[list[str | None]]) -> None:
    layer = PackedLayer("layer", parts(), PackedBatch())
    for names in batches:
        x = torch.randn(1, len(names), 6)
        for token, name in enumerate(names):
            own = x[:, token : token + 1]
            expected = LAYER(own) + (parts()[name][0](own) if name in RANKS else 0)
            torch.testing.assert_close(outputs(layer, names, x)[:, token : token + 1], expected)


def test_an_adapter_that_overflows_leaves_the_tokens_of_others_alone() -> None:
    layer = PackedLayer("layer", parts(), PackedBatch())
    x = torch.randn(1, 3, 6)
    expected = outputs(layer, ["a", "b", None], x)
    layer = PackedLayer("layer", parts(), PackedBatch())
    nn.init.constant_(layer.parts["b"][0].lora_A, torch.inf)
    assert torch.equal(outputs(layer, ["a", "b", None], x)[:, ::2], expected[:, ::2])


def test_adapters_that_left_do_not_stay_for_ever() -> None:
    batch = PackedBatch()
    names = [str(number) for number in range(20)]
    for name in names:
        batch.set_tokens(segments_of([(name, 1)]), ())
        assert name in batch.together
        assert len(batch.together) <= 6
    batch.set_tokens(segments_of((name, 1) for name in names), ())
    assert set(batch.together) == set(names)
    batch.set_tokens(segments_of([("0", 1)]), ())
    assert batch.together == ("0",)
