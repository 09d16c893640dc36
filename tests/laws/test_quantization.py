"""The laws on quantised bases: W is what the stored weight dequantises to; a plain layer with that is the oracle."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import _convert_weight_packed_for_cpu
from cases import (
    QUANTIZED,
    QUANTIZED_PAIRS,
    STORAGES,
    UNMERGEABLE,
    LayerCase,
    Net,
    StorageCase,
    all_of,
    bitsandbytes_4bit,
    check_copies,
    config,
    pairs_of,
    trained,
)
from packed_layers import AwqLinear, BlockLinear, GptqLinear
from tiny import stir
from torch import Tensor, nn

from tailora import LoRAConfig, LoRAModel
from tailora.core.quantization import (
    caught_weight,
    dense_weight,
    in_file_layout,
    is_quantized,
    storage_of,
    stored_bytes,
    stored_tensors,
    stored_weight,
    weight_count,
)
from tailora.errors import BaseMismatchError, FormatError, MergeError, TargetError
from tailora.formats.fingerprint import TOLERANCE

layer_cases = all_of(QUANTIZED)
pairs = pairs_of(QUANTIZED_PAIRS)
MERGEABLE = [(case, slot) for case, slot in QUANTIZED_PAIRS if (case.name.split(", ")[0], slot) not in UNMERGEABLE]
mergeable = pairs_of(MERGEABLE)


def oracle(case: LayerCase, dtype: torch.dtype = torch.float32) -> Net:
    """The case's plain layer with the dequantised weight."""
    stored = case.net(dtype).block["target"]
    plain: Any = LayerCase.net(LayerCase("", case.layer), dtype)
    plain.block["target"].weight.data = in_file_layout(stored, dense_weight(stored)).to(dtype).contiguous()
    return plain


def held(module: nn.Module) -> list[Tensor]:
    return [tensor.clone() for tensor in stored_tensors(module)]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


@pairs
def test_a_fresh_adapter_computes_the_base(case: LayerCase, slot: str) -> None:
    net, x = case.net().eval(), case.batch()
    assert is_quantized(net.block["target"])
    before = held(net)
    model = LoRAModel(net, config(case, slot)).eval()
    torch.testing.assert_close(model(x), oracle(case)(x), rtol=case.tolerance, atol=case.tolerance)
    assert same(held(net), before)  # evaluation repacks nothing


@pairs
@pytest.mark.slow
def test_the_output_and_all_gradients_are_those_of_the_dense_weight(case: LayerCase, slot: str) -> None:
    model, plain = trained(case, slot), LoRAModel(oracle(case), config(case, slot))
    stir(plain)
    model(case.batch())  # an evaluation first, as training does
    found = []
    for each in (model.train(), plain.train()):
        torch.manual_seed(3)  # dropout
        x = case.batch().requires_grad_()
        y = each(x)
        found.append([y, *torch.autograd.grad((y - 1).square().sum(), [x, *each.lora_layers.parameters()])])
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() <= 2e-5 * other.norm()
    assert found[0][1].any()


@mergeable
@pytest.mark.slow
def test_the_merged_model_is_plain_and_computes_the_same_and_unmerging_gives_back_the_same_objects(
    case: LayerCase, slot: str
) -> None:
    model, x = trained(case, slot), case.batch()
    layer: Any = model.base_model.block["target"]
    expected = model(x)
    weight, cls, before, own = stored_weight(layer), type(layer), held(model.base_model), dict(vars(layer))
    plain = LoRAModel(oracle(case), config(case, slot)).eval()
    stir(plain)
    with model.merged() as report, plain.merged() as other:
        torch.testing.assert_close(layer.weight, plain.base_model.block["target"].weight, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            model(x), expected, rtol=case.tolerance, atol=case.tolerance * expected.abs().max().item()
        )
        assert model.base_model.state_dict().keys() == plain.base_model.state_dict().keys()
        assert report.rounding_error.keys() == other.rounding_error.keys()
        assert report.worst < 1e-5
    assert stored_weight(layer) is weight
    assert type(layer) is cls
    assert {name: value for name, value in vars(layer).items() if name != "adapter_parts"} == {
        name: value for name, value in own.items() if name != "adapter_parts"
    }
    assert same(held(model.base_model), before)
    assert torch.equal(model(x), expected)


@layer_cases
def test_merging_and_unloading_leaves_nothing_of_the_quantisation(case: LayerCase) -> None:
    model, x = trained(case), case.batch()
    expected = model(x)
    net = model.merge_and_unload()
    layer: Any = net.block["target"]  # type: ignore[index]
    fresh = case.layer()
    assert type(layer) is type(fresh)
    assert vars(layer).keys() <= vars(fresh).keys() | {"in_features", "out_features"}
    assert not is_quantized(layer)
    again = pickle.dumps(net)
    assert b"bitsandbytes" not in again
    assert b"torchao" not in again
    torch.testing.assert_close(net(x), expected, rtol=case.tolerance, atol=case.tolerance * expected.abs().max().item())


@layer_cases
def test_the_merged_weight_has_the_precision_that_was_quantised(case: LayerCase) -> None:
    model = trained(case, dtype=torch.bfloat16)
    report = model.merge()
    is_unknown = case.name == "linear without bias, int8" or case.name.endswith(("gptq", "awq"))
    wanted = torch.float32 if is_unknown else torch.bfloat16  # no other parameter has it
    assert model.base_model.block["target"].weight.dtype == wanted  # type: ignore[union-attr, index]
    assert 0 <= report.worst < 0.2


@pairs
@pytest.mark.slow
def test_training_moves_the_adapter_and_nothing_of_the_base(case: LayerCase, slot: str) -> None:
    model = LoRAModel(case.net(), config(case, slot)).train()
    before = held(model.base_model)
    optimizer = torch.optim.AdamW(model.lora_layers.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = (model(case.batch()) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        model.eval()(case.batch())
        model.train()
    assert losses[-1] < losses[0]
    assert same(held(model.base_model), before)
    assert {parameter.dtype for parameter in model.lora_layers.parameters()} == {torch.float32}


@layer_cases
def test_unload_gives_back_class_object_and_attributes(case: LayerCase) -> None:
    net = case.net()
    layer: Any = net.block["target"]
    weight, cls, own, before = stored_weight(layer), type(layer), dict(vars(layer)), held(net)
    assert LoRAModel(net, config(case)).unload() is net
    assert stored_weight(layer) is weight
    assert type(layer) is cls
    assert vars(layer) == own
    assert same(held(net), before)


@pairs
@pytest.mark.slow
def test_an_adapter_moves_between_the_quantised_base_and_its_original(
    case: LayerCase, slot: str, tmp_path: Path
) -> None:
    model, x = trained(case, slot), case.batch()
    model.save_adapter(tmp_path / "quantised")
    loaded = LoRAModel.from_pretrained(case.net(), tmp_path / "quantised").eval()
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-6, atol=1e-6)
    original = LoRAModel.from_pretrained(LayerCase.net(LayerCase("", case.layer)), tmp_path / "quantised")
    original.save_adapter(tmp_path / "original")
    back = LoRAModel.from_pretrained(case.net(), tmp_path / "original").eval()
    torch.testing.assert_close(back(x), model(x), rtol=1e-6, atol=1e-6)


@layer_cases
def test_an_adapter_of_another_base_is_told_from_one_of_the_original(case: LayerCase, tmp_path: Path) -> None:
    trained(case).save_adapter(tmp_path)
    with pytest.raises(BaseMismatchError, match="quantization explains"):
        LoRAModel.from_pretrained(LayerCase.net(LayerCase("", case.layer), seed=1), tmp_path)
    with pytest.raises(BaseMismatchError, match="quantization explains"):
        LoRAModel.from_pretrained(case.net(seed=1), tmp_path)


@pytest.mark.parametrize("base", STORAGES, ids=lambda base: base.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("small", [0, 40])  # rows, whose scales the double quantization rounds by those of the others
def test_no_weight_is_farther_from_the_original_than_the_spread_says(
    base: StorageCase, dtype: torch.dtype, small: int
) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(192, 160).to(dtype)
    plain.weight.data[:small] *= torch.linspace(0.001, 0.05, small)[:, None]
    plain.weight.data[0] *= 1 if small else 20  # a row, and single weights, that stand out
    plain.weight.data[:, 3] *= 1 if small else 8
    original = plain.weight.detach().clone().float()
    layer = base.store(plain)
    weight = dense_weight(layer)
    apart = (weight.float() - original).abs()
    spread = storage_of(layer).spread(layer, weight).expand(160, 192)
    assert (apart <= spread + (TOLERANCE if dtype == torch.bfloat16 else 1e-6) * original.abs()).all()
    assert spread.mean() < 50 * apart.mean()  # and it is not just large
    assert weight_count(layer) == 160 * 192 + 160
    assert stored_bytes(layer) < 0.6 * original.nbytes


@pytest.mark.parametrize("cls", [GptqLinear, AwqLinear, BlockLinear])
@pytest.mark.parametrize("inputs", [64, 1344])  # more than one batch of unit vectors
def test_the_dense_weight_is_caught_in_the_forward_or_computed_from_unit_vectors(cls: Any, inputs: int) -> None:
    layer = cls(nn.Linear(inputs, 64, bias=False))
    scales = storage_of(layer).tensors(layer)[-1]
    assert (caught_weight(layer, scales.float()) is None) == (cls is BlockLinear)
    assert torch.equal(dense_weight(layer), layer.dequantize_weight().T)


@pairs
@pytest.mark.slow
def test_a_copy_and_a_pickle_are_models_of_their_own(case: LayerCase, slot: str) -> None:
    check_copies(trained(case, slot), case.batch())


def test_evaluation_repacks_nothing_while_an_adapter_is_attached() -> None:
    net = Net(bitsandbytes_4bit("nf4", double=True)(nn.Linear(64, 32)))
    layer: Any = net.block["target"]
    layer.support_avx512bf16_for_cpu = True  # as on a CPU that has it
    model = LoRAModel(net, LoRAConfig(r=2)).eval()
    before = held(net)
    model(torch.randn(3, 64))
    assert same(held(net), before)
    assert model.unload() is net
    assert layer.support_avx512bf16_for_cpu


def test_a_weight_that_was_repacked_already_is_refused() -> None:
    net = Net(bitsandbytes_4bit("nf4", double=True)(nn.Linear(64, 32)))
    weight: Any = net.block["target"].weight
    weight.data, weight.quant_state = _convert_weight_packed_for_cpu(weight.data, weight.quant_state)
    with pytest.raises(TargetError, match="before evaluating it"):
        LoRAModel(net, LoRAConfig(r=2))


def test_a_quantised_layer_is_not_trained_whole(tmp_path: Path) -> None:
    plain = Net(nn.Linear(64, 32))
    plain.head = nn.Linear(32, 16)
    net = copy.deepcopy(plain)
    net.block["target"] = bitsandbytes_4bit("nf4", double=True)(net.block["target"])
    settings = LoRAConfig(r=2, target_modules=["head"], modules_to_save=["target"])
    with pytest.raises(TargetError, match=r"block\.target is quantized and cannot be trained in full"):
        LoRAModel(net, settings)
    LoRAModel(plain, settings).save_adapter(tmp_path)
    with pytest.raises(FormatError, match=r"block\.target is quantized and cannot be trained in full"):
        LoRAModel.from_pretrained(net, tmp_path)


def test_a_merged_quantised_base_stays_where_it_is() -> None:
    model = LoRAModel(Net(bitsandbytes_4bit("nf4", double=True)(nn.Linear(64, 32))), LoRAConfig(r=2))
    model.merge()
    with pytest.raises(MergeError, match="unmerge"):
        model.double()
    model.unmerge()
