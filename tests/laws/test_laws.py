"""Every law, over every layer type and slot: y = g (W x + s B A x) + b."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import ALL_LAYERS, ALL_PAIRS, UNMERGEABLE, LayerCase, all_of, check_copies, config, pairs_of, trained
from tiny import stirred_model
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

from tailora import LoRAModel
from tailora.core.attach import Swapped
from tailora.formats.peft import layer_to_peft, slot_shapes

layer_cases = all_of(ALL_LAYERS)
pairs = pairs_of(ALL_PAIRS)
MERGEABLE = [(case, slot) for case, slot in ALL_PAIRS if (case.name, slot) not in UNMERGEABLE]
mergeable = pairs_of(MERGEABLE)


@pairs
def test_a_fresh_adapter_computes_the_base(case: LayerCase, slot: str) -> None:
    base, x = case.net(), case.batch()
    base.requires_grad_(False)  # torch chooses its attention, and how it multiplies, by what requires gradients
    with torch.no_grad():
        expected = base(x)
        model = LoRAModel(base, config(case, slot))
        torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    assert len(model.lora_layers) == 1


@mergeable
def test_the_folded_weight_computes_what_the_adapted_layer_does(case: LayerCase, slot: str) -> None:
    model, x = trained(case, slot), case.batch()
    expected, plain = model(x), case.net()(x)
    assert (expected - plain).abs().max() > 0.05  # the adapter does something
    with model.merged() as report:
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert 0 <= report.worst < 1e-5


def as_dense(case: LayerCase, layer: Any, adapter: Any) -> dict[str, Tensor]:
    """The layer's weight and bias by the equation, formed whole, the norm a constant (arXiv:2402.09353, sec. 4.3)."""
    weight = layer.get_parameter(case.parameter) + adapter.delta_weight(layer)
    if adapter.lora_magnitude_vector is not None:
        columns = adapter.layer_type.is_transposed(layer)
        rows = weight.mT if columns else weight if adapter.layer_type.is_stacked else weight.flatten(1)  # (..., out, n)
        own = slice(None) if adapter.output_slice is None else adapter.output_slice.take(torch.arange(len(rows)))
        gain = adapter.lora_magnitude_vector / rows[own].detach().norm(dim=-1).flatten()
        scaled = torch.ones(rows.shape[:-1], dtype=gain.dtype)
        scaled[own] = gain.view(scaled[own].shape)
        rows = rows * scaled[..., None]
        weight = rows.mT if columns else rows.view(weight.shape)
    if case.parameter != "weight":
        return {f"block.target.{case.parameter}": weight}
    bias = adapter.bias if adapter.bias is not None else getattr(layer, "bias", None)
    if adapter.lora_bias is not None:
        bias = adapter.scaling * adapter.lora_bias + (0 if bias is None else bias)
    return {"block.target.weight": weight} | ({} if bias is None else {"block.target.bias": bias})


@pairs
def test_the_gradient_is_that_of_the_dense_weight(case: LayerCase, slot: str) -> None:
    model, x = trained(case, slot, torch.float64), case.batch(torch.float64)
    layer = model.base_model.block["target"]
    adapter: Any = next(iter(model.lora_layers.values()))
    parameters = list(model.lora_layers.parameters())
    through_layer = torch.autograd.grad((model(x) - 1).square().sum(), parameters)

    dense: Tensor = torch.func.functional_call(case.net(torch.float64), as_dense(case, layer, adapter), (x,))
    torch.testing.assert_close(
        through_layer, torch.autograd.grad((dense - 1).square().sum(), parameters), rtol=1e-9, atol=1e-9
    )


@pairs
def test_training_moves_the_adapter_and_nothing_of_the_base(case: LayerCase, slot: str) -> None:
    model = LoRAModel(case.net(), config(case, slot))
    before = copy.deepcopy(model.base_model.state_dict())
    start = [parameter.clone() for parameter in model.lora_layers.parameters()]
    optimizer = torch.optim.AdamW(model.lora_layers.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = (model(case.batch()) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(not torch.equal(old, new) for old, new in zip(start, model.lora_layers.parameters(), strict=True))
    assert all(torch.equal(value, before[name]) for name, value in model.base_model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.base_model.parameters())


@layer_cases
def test_unload_gives_back_class_bits_and_requires_grad(case: LayerCase) -> None:
    base = case.net()
    case.weight(base).requires_grad = False
    reference = case.net()
    layer = base.block["target"]
    cls, attributes = type(layer), set(vars(layer))
    model = stirred_model(base, config(case))
    assert isinstance(layer, cls)
    assert model.state_dict().keys() == {f"base_model.{key}" for key in reference.state_dict()} | {
        f"lora_layers.{key}" for key in model.lora_layers.state_dict()
    }
    returned = model.unload()
    assert returned is base
    assert type(layer) is cls
    assert set(vars(layer)) == attributes
    assert all(torch.equal(value, reference.state_dict()[name]) for name, value in base.state_dict().items())
    assert [p.requires_grad for _, p in base.named_parameters()] == [
        name != f"block.target.{case.parameter}" for name, _ in base.named_parameters()
    ]


@layer_cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unmerge_gives_back_the_same_bits(case: LayerCase, dtype: torch.dtype) -> None:
    model = trained(case, dtype=dtype)
    before = case.weight(model.base_model).detach().clone()
    report = model.merge()
    assert not torch.equal(case.weight(model.base_model), before)
    if dtype != torch.float32:
        assert 0 < report.worst < 0.2
    model.unmerge()
    assert torch.equal(case.weight(model.base_model), before)


@mergeable
@pytest.mark.parametrize("in_place", [False, True])
def test_merge_and_unload_leaves_a_plain_module_that_computes_the_same(
    case: LayerCase, slot: str, in_place: bool
) -> None:
    model, x = trained(case, slot), case.batch()
    expected = model(x)
    base = model.merge_and_unload(in_place=in_place)
    assert not any(isinstance(module, Swapped) for module in base.modules())
    torch.testing.assert_close(base(x), expected, rtol=1e-5, atol=1e-5)


@pairs
def test_the_shapes_that_a_file_must_have_are_those_that_are_written(case: LayerCase, slot: str) -> None:
    for layer in trained(case, slot).lora_layers.values():
        for with_start in (False, True):
            written = {name: tensor.shape for name, tensor in layer_to_peft(layer, with_start).items()}
            assert slot_shapes(layer, with_start) == written


@pytest.mark.filterwarnings(
    "ignore:.*only tailora can load this adapter, not PEFT:UserWarning"
)  # DoRA on attention and experts
@pairs
def test_an_adapter_survives_its_file(case: LayerCase, slot: str, tmp_path: Path) -> None:
    model, x = trained(case, slot), case.batch()
    model.save_adapter(tmp_path / "one")
    loaded = LoRAModel.from_pretrained(case.net(), tmp_path / "one").eval()
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-6, atol=1e-6)
    assert loaded.adapters == model.adapters
    loaded.save_adapter(tmp_path / "two")
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    if "learned scale" not in slot:  # dividing the folded scale out and in again rounds
        for name in files:
            assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pairs
def test_a_copy_and_a_pickle_are_models_of_their_own(case: LayerCase, slot: str) -> None:
    check_copies(trained(case, slot), case.batch())


@pairs_of(ALL_PAIRS, per_slot=1)
@pytest.mark.slow
def test_a_step_is_one_graph_forward_and_one_backward_for_adapters_of_equal_shape(case: LayerCase, slot: str) -> None:
    torch._dynamo.reset()
    model, x = trained(case, slot, torch.float64), case.batch(torch.float64)
    model.add_adapter("other", config(case, slot))
    graphs = []

    def count(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    compiled: Any = torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=count))
    for name in ("default", "other", "default"):
        model.set_adapter(name)
        parameters = list(model.lora_layers.parameters())
        outputs = compiled(x), model(x)
        found, expected = ([y, *torch.autograd.grad((y - 1).square().sum(), parameters)] for y in outputs)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert len(graphs) == 2


@layer_cases
def test_on_a_bfloat16_base_adapters_are_float32_and_no_float32_copy_of_the_input_is_kept(case: LayerCase) -> None:
    model, x = trained(case, dtype=torch.bfloat16).train(), case.batch(torch.bfloat16)
    x = torch.cat([x] * 3) if x.ndim > 1 else x  # larger than any factor
    assert {parameter.dtype for parameter in model.lora_layers.parameters()} == {torch.float32}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = model(x)
    assert y.dtype == torch.bfloat16
    factors = {parameter.data_ptr() for parameter in model.lora_layers.parameters()}
    wide = [tensor for tensor in kept if tensor.dtype == torch.float32 and tensor.data_ptr() not in factors]
    assert all(tensor.numel() < max(x.numel(), 2) for tensor in wide if x.is_floating_point())
    assert kept
    y.float().sum().backward()
    assert all(parameter.grad is not None for parameter in model.lora_layers.parameters())


@layer_cases
def test_eval_is_deterministic_and_dropout_acts_in_training_only(case: LayerCase) -> None:
    drops = case.name != "embedding" and (case, "dropout") in ALL_PAIRS  # ids have nothing to drop
    model, x = trained(case, "dropout" if (case, "dropout") in ALL_PAIRS else "plain"), case.batch()
    assert torch.equal(model(x), model(x))
    model.train()
    assert torch.equal(model(x), model(x)) is not drops
