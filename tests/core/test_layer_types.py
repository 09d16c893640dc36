"""Layer types that the user registers: the code in docs/layer_types.md runs."""

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import stir
from torch import nn

import tailora
from benchmarks.site.page_blocks import blocks, run_python
from tailora import LoRAConfig, LoRAModel
from tailora.core.layer_types import LAYER_TYPES
from tailora.errors import ConfigError

PAGE = Path(__file__).parents[2] / "docs" / "layer_types.md"


@pytest.fixture
def documented() -> Iterator[dict[str, Any]]:
    """The names that the page's code makes; its registrations end with the test."""
    names: dict[str, Any] = {"__name__": __name__}
    before = dict(LAYER_TYPES)
    for block in blocks(PAGE):
        if block.is_run:
            run_python(block.text, names)
    globals().update(Scaled=names["Scaled"], Pair=names["Pair"])  # where pickles look for them
    yield names
    for name in LAYER_TYPES.keys() - before.keys():
        del LAYER_TYPES[name]


def test_a_registered_matrix_trains_merges_and_comes_back(documented: dict[str, Any], tmp_path: Path) -> None:
    model, x = documented["model"], torch.randn(4, 8)
    plain = model(x)
    stir(model)
    y = model.eval()(x)
    assert (y - plain).abs().max() > 0.05
    with model.merged():
        torch.testing.assert_close(model(x), y)
    base = nn.Sequential(documented["Scaled"](8, 6))
    base.load_state_dict(model.base_model.state_dict())
    model.save_adapter(tmp_path)
    torch.testing.assert_close(LoRAModel.from_pretrained(base, tmp_path).eval()(x), y)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), y)
    y.sum().backward()
    assert all(parameter.grad is not None for parameter in model.lora_layers.parameters())
    assert type(model.unload()[0]) is documented["Scaled"]


@torch.no_grad()
def test_a_single_vector_gets_the_registered_update(documented: dict[str, Any]) -> None:
    model, x = documented["model"].eval(), torch.randn(8)
    stir(model)
    torch.testing.assert_close(model(x), model(x[None])[0])
    with model.merged():
        expected = model(x)
    torch.testing.assert_close(model(x), expected)


def test_a_registered_forward_is_what_the_merged_layer_computes(documented: dict[str, Any]) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = documented["Pair"](5)

        def forward(self, x: torch.Tensor) -> Any:
            return self.pair(x, x.flip(0))

    model, x = LoRAModel(Both(), LoRAConfig(r=2, target_modules=["pair"])), torch.randn(3, 5)
    plain = model(x)
    stir(model)
    y = model.eval()(x)
    assert (y - plain).abs().max() > 0.05
    with model.merged():
        torch.testing.assert_close(model(x), y)


def test_all_linear_means_registered_classes_that_say_so(documented: dict[str, Any]) -> None:
    net = nn.Sequential(documented["Scaled"](8, 6), nn.Linear(6, 6))
    assert list(LoRAModel(net, LoRAConfig(r=2)).lora_layers) == ["1"]
    tailora.register_layer_type(
        documented["Scaled"], lambda layer: layer.kernel.shape, weight="kernel", linear=True, replace=True
    )
    net = nn.Sequential(documented["Scaled"](8, 6), nn.Linear(6, 6))
    assert list(LoRAModel(net, LoRAConfig(r=2)).lora_layers) == ["0", "1"]


def test_registering_twice_and_over_tailora_s_own_is_refused(documented: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="Scaled is already registered; pass replace=True"):
        tailora.register_layer_type(documented["Scaled"], lambda layer: layer.kernel.shape)
    for cls in (nn.Linear, nn.MultiheadAttention):
        with pytest.raises(ConfigError, match="is a built-in layer type"):
            tailora.register_layer_type(cls, lambda _: (1, 1), replace=True)
    with pytest.raises(ConfigError, match="either update or forward"):
        tailora.register_layer_type(nn.ReLU, lambda _: (1, 1), update=lambda *_: None, forward=lambda *_: None)  # type: ignore[arg-type,return-value]
    tailora.unregister_layer_type(documented["Scaled"])
    with pytest.raises(ConfigError, match="is not registered"):
        tailora.unregister_layer_type(documented["Scaled"])
    with pytest.raises(ConfigError, match="is not registered"):
        tailora.unregister_layer_type(nn.Linear)
