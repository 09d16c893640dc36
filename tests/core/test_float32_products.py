"""16-bit products in float32: results, gradients, what is kept for the backward, and the choice by measurement."""

import json
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from tiny import tiny_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from tailora import LoRAConfig, LoRAModel
from tailora.core import float32_products
from tailora.core.attach import attached_parts
from tailora.core.device import HALF
from tailora.core.float32_products import Float32Products, checkpoint_contexts, fastest_products, use_fastest_products
from tailora.core.layer import LoRALayer
from tailora.core.layer_types import LINEAR
from tailora.kernels import cpu_attention

TOKENS = 4


def random(*shape: int, dtype: torch.dtype = torch.bfloat16, grad: bool = False) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_(grad)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("block", [1, 40, 1 << 20])  # elements: one row of the weight, some rows, all
def test_a_product_is_rounded_once(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, block: int) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(float32_products, "BLOCK_ELEMENTS", block)
    x, weight, bias = (random(*shape, dtype=dtype, grad=True) for shape in ((2, 3, 12), (10, 12), (10,)))
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, weight, bias)]
    dy = random(2, 3, 10, dtype=dtype)
    expected = F.linear(*wide)
    expected.backward(dy.double())
    with Float32Products(TOKENS):
        y = F.linear(x, weight, bias)
    y.backward(dy)
    torch.testing.assert_close(y, expected.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)
    for tensor, reference in zip((x, weight, bias), wide, strict=True):
        assert tensor.grad is not None
        assert reference.grad is not None
        torch.testing.assert_close(tensor.grad, reference.grad.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_fewer_tokens_and_other_precisions_are_left_to_torch() -> None:
    torch.manual_seed(0)
    weight, x = random(64, 64), random(TOKENS - 1, 64)
    wide = x.float(), weight.float()
    expected, expected_wide = F.linear(x, weight), F.linear(*wide)
    with Float32Products(TOKENS):
        assert torch.equal(F.linear(x, weight), expected)
        assert torch.equal(F.linear(*wide), expected_wide)


def test_the_backward_keeps_the_frozen_weight_and_no_copy() -> None:
    weight, x, kept = random(8, 8), random(TOKENS, 8, grad=True), list[Tensor]()

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with Float32Products(TOKENS), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        F.linear(x, weight)
    assert [tensor.data_ptr() for tensor in kept] == [weight.data_ptr()]


def conv1d(x: Tensor) -> Tensor:
    torch.manual_seed(1)
    y: Tensor = Conv1D(6, 8).bfloat16().to(x.dtype).requires_grad_(False)(x)
    return y


def sdpa(x: Tensor) -> Tensor:
    heads = x.view(1, 2, -1, 4)
    return F.scaled_dot_product_attention(heads, heads, heads, is_causal=True)


def packed_attention(x: Tensor) -> Tensor:
    heads = x.view(-1, 2, 4)
    return cpu_attention.attention(heads, heads, heads, torch.tensor([0, 24, len(heads)]), 0.5, None)


class Operators(TorchDispatchMode):
    """Notes the precision of what torch's products and attention are called with."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[str, torch.dtype]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "_scaled_dot_product_flash_attention_for_cpu"):
            self.seen |= {(name, arg.dtype) for arg in args if isinstance(arg, Tensor)}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("function", "operator"), [(conv1d, "addmm"), (sdpa, "_scaled_dot_product_flash_attention_for_cpu")]
)
def test_other_products_are_computed_in_float32_too(function: Any, operator: str) -> None:
    x = random(TOKENS * 2, 8, grad=True)
    with Float32Products(TOKENS), Operators() as operators:
        y = function(x)
    assert operators.seen == {(operator, torch.float32)}
    assert y.dtype == x.dtype
    y.sum().backward()
    assert x.grad is not None


def test_attention_of_packed_rows_is_computed_in_float32_too() -> None:
    """Its blocks round no probabilities then; outputs and gradients are closer to float64."""
    torch.manual_seed(0)
    x, results = torch.randn(64, 8).bfloat16(), {}
    for name, dtype, tokens in (("exact", torch.float64, 99), ("half", x.dtype, 99), ("ours", x.dtype, TOKENS)):
        leaf = x.to(dtype, copy=True).requires_grad_()
        with Float32Products(tokens):
            y = packed_attention(leaf)
        y.backward(torch.linspace(-1, 1, y.numel()).bfloat16().view(y.shape).to(y.dtype))
        assert leaf.grad is not None
        results[name] = torch.cat([y.detach().flatten(), leaf.grad.flatten()]).double()
    errors = {name: float((results[name] - results["exact"]).norm()) for name in ("half", "ours")}
    assert 0 < errors["ours"] < errors["half"]


@pytest.mark.parametrize("class_name", ["LlamaForCausalLM", "GPT2LMHeadModel", "MixtralForCausalLM"])
def test_a_model_and_its_adapter_compute_as_well_as_in_16_bits(class_name: str) -> None:
    """Gradients of the factors, beside those of the same weights in float32: the median of six models."""

    def gradients(dtype: torch.dtype, tokens: int, seed: int) -> Tensor:
        base = tiny_model(class_name).bfloat16().to(dtype)
        torch.manual_seed(seed)
        ids = torch.randint(80, (2, 20))
        model = LoRAModel(base, LoRAConfig(r=4)).eval()
        for parameter in model.lora_layers.parameters():
            parameter.data.normal_(std=0.1)
        with Float32Products(tokens):
            model(input_ids=ids, labels=ids).loss.backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.lora_layers.parameters()])

    errors: dict[int, list[float]] = {999: [], TOKENS: []}
    for seed in range(6):
        exact = gradients(torch.float32, 999, seed)
        for tokens, found in errors.items():
            found.append(float((gradients(torch.bfloat16, tokens, seed) - exact).norm() / exact.norm()))
    assert errors[TOKENS] != errors[999]
    assert median(errors[TOKENS]) < 1.1 * median(errors[999])


@pytest.mark.parametrize("class_name", ["LlamaForCausalLM", "GPT2LMHeadModel"])
def test_a_layer_and_its_adapter_are_rounded_once(class_name: str) -> None:
    """As the same layer in float32; a third of the casts, and no copy of a factor in 16 bits."""
    torch.manual_seed(0)
    base = tiny_model(class_name).bfloat16()
    model = LoRAModel(base, LoRAConfig(r=4, use_rslora=True)).train()
    part = next(module for module in model.lora_layers.modules() if isinstance(module, LoRALayer))
    nn.init.normal_(part.lora_B)
    layer = next(m for m in base.modules() if attached_parts(m) == (part,))
    x, dy = random(2, 3, part.in_features, grad=True), random(2, 3, part.out_features)
    weight = layer.weight if part.layer_type is LINEAR else layer.weight.mT
    A, B = (factor.detach().clone().requires_grad_() for factor in (part.lora_A, part.lora_B))
    wide = x.detach().float().requires_grad_()
    bias = None if layer.bias is None else layer.bias.float()
    expected = F.linear(wide, weight.float(), bias) + part.scaling * (wide @ A.mT @ B.mT)
    expected.backward(dy.float())
    with Float32Products(TOKENS):
        y = layer(x)
    y.backward(dy)
    eps = torch.finfo(torch.bfloat16).eps
    for found, reference in ((y, expected), (x.grad, wide.grad)):
        torch.testing.assert_close(found, reference.bfloat16(), rtol=eps, atol=1e-5)
    for factor, reference in ((part.lora_A, A), (part.lora_B, B)):
        torch.testing.assert_close(factor.grad, reference.grad, rtol=1e-4, atol=1e-5)


def test_forwards_of_enough_tokens_use_the_faster_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Single tokens of `generate` do not, and an error in a forward leaves nothing behind."""
    monkeypatch.setattr(float32_products, "fastest_products", lambda _: 8)
    base = tiny_model("LlamaForCausalLM").bfloat16()
    use_fastest_products(base)
    for tokens, dtype in ((8, torch.float32), (7, torch.bfloat16)):
        with Operators() as operators, torch.no_grad():
            base(input_ids=torch.zeros(1, tokens, dtype=torch.long))
        assert ("mm", dtype) in operators.seen
        assert {precision for _, precision in operators.seen} == {dtype}
    with pytest.raises(IndexError):
        base(input_ids=torch.full((1, 8), 10**6))
    assert len(_get_current_function_mode_stack()) == 0


def test_what_checkpointing_computes_again_is_the_same() -> None:
    """torch leaves all modes in a backward, so without contexts it would recompute in 16 bits, or fail."""
    torch.manual_seed(0)
    weight, x = random(8, 8), random(TOKENS, 8, grad=True)
    with Float32Products(TOKENS), Operators() as operators:
        y = checkpoint(lambda x: F.linear(x, weight).exp(), x, use_reentrant=False, context_fn=checkpoint_contexts)
        torch.autograd.backward(y.sum())
    assert {precision for _, precision in operators.seen} == {torch.float32}


# ---- The choice


@pytest.fixture
def products_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("TAILORA_HOME", str(tmp_path))
    return tmp_path / "products.json"


@pytest.mark.parametrize(("shares", "fewest"), [((0.5, 0.5, 0.5), 4), ((2, 0.5, 0.5), 16), ((0.5, 0.5, 1), None)])
def test_float32_is_taken_from_where_on_it_is_always_faster(
    monkeypatch: pytest.MonkeyPatch, products_file: Path, shares: tuple[float, ...], fewest: int | None
) -> None:
    """shares: of the time in 16 bits that float32 takes, for each of TOKENS."""
    clock = [0.0]
    seconds = dict(zip(float32_products.TOKENS, shares, strict=True))
    ways = (
        lambda *_: clock.__setitem__(0, clock[0] + 1),
        lambda x, *_: clock.__setitem__(0, clock[0] + seconds[len(x)]),
    )
    monkeypatch.setattr(float32_products, "WAYS", ways)
    monkeypatch.setattr(float32_products.time, "perf_counter", lambda: clock[0])
    assert fastest_products(tiny_model("LlamaForCausalLM").bfloat16()) == fewest
    assert list(json.loads(products_file.read_text()).values()) == [fewest]


def test_a_machine_is_measured_once(monkeypatch: pytest.MonkeyPatch, products_file: Path) -> None:
    base, measured = tiny_model("LlamaForCausalLM").bfloat16(), list[object]()
    monkeypatch.setattr(float32_products, "_measure", lambda *arguments: measured.append(arguments) or 16)
    assert fastest_products(base) == fastest_products(base) == 16
    assert measured == [(torch.bfloat16, 64, 32)]  # the shape of most weights
    products_file.write_text("{")  # damaged: measured again
    assert fastest_products(base) == 16
    assert len(measured) == 2
    assert fastest_products(base.float()) is None


def test_a_read_only_home_is_no_obstacle(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file where the folder should be")
    monkeypatch.setenv("TAILORA_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(float32_products, "_measure", lambda *_: 16)
    assert fastest_products(tiny_model("LlamaForCausalLM").bfloat16()) == 16
