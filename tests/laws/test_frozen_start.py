"""A frozen start: y = W x + s (B A - B0 A0) x + b, over every layer type."""

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from cases import ALL_LAYERS, LayerCase, all_of, config
from tiny import stir
from torch import Tensor

from tailora import LoRALayer, LoRAModel

layer_cases = all_of(ALL_LAYERS)


def started(case: LayerCase, dtype: torch.dtype = torch.float32) -> LoRAModel:
    model = LoRAModel(case.net(dtype), config(case))
    (layer,) = model.lora_layers.values()
    generator = torch.Generator(torch.get_default_device()).manual_seed(4)
    layer.start_from(*(torch.randn(factor.shape, generator=generator) for factor in (layer.lora_A, layer.lora_B)))
    return model


@layer_cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_the_update_is_exactly_zero_at_the_start(case: LayerCase, dtype: torch.dtype, training: bool) -> None:
    model, x = started(case, dtype).train(training), case.batch(dtype)
    with torch.no_grad():  # see test_initial_values_from_the_weight in tests/core/test_init.py
        assert torch.equal(model(x), case.net(dtype).requires_grad_(False)(x))
    assert (
        torch.count_nonzero(next(iter(model.lora_layers.values())).delta_weight(model.base_model.block["target"])) == 0
    )


@layer_cases
def test_the_gradients_are_those_of_s_times_ba_minus_the_start(case: LayerCase) -> None:
    model, x = started(case, torch.float64), case.batch(torch.float64)
    (layer,) = model.lora_layers.values()
    base, weight = model.base_model.block["target"], case.weight(model.base_model)
    kept = copy.deepcopy((layer.lora_A, layer.lora_B))
    stir(model)
    through_layer = torch.autograd.grad((model(x) - 1).square().sum(), [layer.lora_A, layer.lora_B])

    def product(A: Tensor, B: Tensor) -> Tensor:
        left, right = layer.layer_type.factors(
            base, A, B if layer.output_slice is None else layer.output_slice.spread(B.mT).mT
        )
        return (left @ right).reshape(weight.shape)

    update = layer.scaling * (product(layer.lora_A, layer.lora_B) - product(*kept).detach())
    torch.testing.assert_close(layer.delta_weight(base), update)
    dense: Any = torch.func.functional_call(
        case.net(torch.float64), {f"block.target.{case.parameter}": weight + update}, (x,)
    )
    torch.testing.assert_close(
        through_layer, torch.autograd.grad((dense - 1).square().sum(), [layer.lora_A, layer.lora_B])
    )
    with model.merged() as report:
        torch.testing.assert_close(model(x), dense)
    assert report.worst < 1e-12


@layer_cases
def test_a_start_survives_copies_the_state_dict_and_a_move(case: LayerCase) -> None:
    model, x = started(case), case.batch()
    stir(model)
    expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), started(case)):
        twin.load_state_dict(model.state_dict())
        torch.testing.assert_close(twin(x), expected)
    torch.testing.assert_close(model.double()(case.batch(torch.float64)).float(), expected, rtol=1e-4, atol=1e-4)


@layer_cases
def test_a_start_survives_its_file_and_is_a_plain_adapter_for_peft(case: LayerCase, tmp_path: Path) -> None:
    model, x = started(case), case.batch()
    stir(model)
    (layer,) = model.lora_layers.values()
    model.save_adapter(tmp_path / "one")
    loaded = LoRAModel.from_pretrained(case.net(), tmp_path / "one")
    (again,) = loaded.lora_layers.values()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in layer.state_dict().items())
    assert loaded.adapters == model.adapters
    assert torch.equal(loaded.eval()(x), model.eval()(x))
    loaded.save_adapter(tmp_path / "two")
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
    if not case.peft_is_wrong and case.name != "attention out":  # which PEFT adds twice
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = peft.PeftModel.from_pretrained(case.net(), str(tmp_path / "one")).eval()
        torch.testing.assert_close(theirs(x), model(x), rtol=5e-5, atol=5e-5)


def test_reset_parameters_removes_the_frozen_start() -> None:
    layer = LoRALayer(6, 5)
    layer.start_from(torch.randn(4, 6), torch.randn(5, 4))
    assert layer.is_plain
    layer.reset_parameters()
    assert layer.start_A is layer.start_B is None
    assert torch.count_nonzero(layer.lora_B) == 0
