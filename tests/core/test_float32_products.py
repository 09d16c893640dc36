"""16-bit products in float32: results, gradients, what is kept for the backward, and the choice by measurement."""

import copy
import json
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from threading import Event
from typing import Any

import pytest
import torch
from tiny import tiny_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from tailora import LoRAConfig, LoRAModel
from tailora.core import float32_products
from tailora.core.attach import attached_parts
from tailora.core.device import HALF
from tailora.core.float32_products import Float32Products, fastest_products, use_fastest_products
from tailora.core.layer import LoRALayer
from tailora.core.layer_types import LINEAR
from tailora.kernels import cpu_attention
from tailora.train.kernel_choice import checkpointed_layers

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


@pytest.mark.parametrize("half", HALF)
@pytest.mark.parametrize("class_name", ["LlamaForCausalLM", "GPT2LMHeadModel", "MixtralForCausalLM"])
def test_a_model_and_its_adapter_compute_as_well_as_in_16_bits(class_name: str, half: torch.dtype) -> None:
    """Gradients of the factors, beside those of the same weights in float32: the median of six models.

    Checkpointing changes no bit. torch leaves all modes in a backward, which it has to enter again.
    """

    def gradients(dtype: torch.dtype, tokens: int | None, seed: int, *, checkpointed: bool = False) -> Tensor:
        base = tiny_model(class_name).to(half).to(dtype)
        torch.manual_seed(seed)
        ids = torch.randint(80, (2, 20))
        model = LoRAModel(base, LoRAConfig(r=4)).train()  # or layers are not checkpointed
        for parameter in model.lora_layers.parameters():
            parameter.data.normal_(std=0.1)
        again = checkpointed_layers(base) if checkpointed else nullcontext()
        with again, float32_products.float32_products(tokens):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.lora_layers.parameters()])

    errors: dict[int | None, list[float]] = {None: [], TOKENS: []}
    for seed in range(6):
        exact = gradients(torch.float32, None, seed)
        for tokens, found in errors.items():
            ours = gradients(half, tokens, seed)
            assert seed or torch.equal(gradients(half, tokens, seed, checkpointed=True), ours)
            found.append(float((ours - exact).norm() / exact.norm()))
    assert errors[TOKENS] != errors[None]
    assert median(errors[TOKENS]) < 1.1 * median(errors[None])


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


def test_two_threads_use_one_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward that begins first ends first. A copy of the model computes with its own weights."""
    monkeypatch.setattr(float32_products, "fastest_products", lambda _: 8)
    base, inside, left = tiny_model("LlamaForCausalLM").bfloat16().eval(), Event(), Event()
    few, many = torch.arange(7)[None], torch.arange(8)[None]
    alone = [base(few).logits]
    with Float32Products(8):
        alone.append(base(many).logits)
    use_fastest_products(base)
    with ThreadPoolExecutor(1) as thread:

        def wait(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if inputs[0].numel() == few.numel():
                inside.set()
                assert left.wait(9)
            else:
                second.append(thread.submit(base, few))
                assert inside.wait(9)

        second = list[Future[Any]]()
        with base.get_input_embeddings().register_forward_pre_hook(wait):
            found = base(many).logits
            left.set()
            assert torch.equal(second[0].result().logits, alone[0])
        assert thread.submit(_get_current_function_mode_stack).result() == _get_current_function_mode_stack() == []
    assert torch.equal(found, alone[1])
    copied = copy.deepcopy(base)
    copied.get_output_embeddings().weight.data.zero_()
    assert not copied(many).logits.any()
    assert torch.equal(base(many).logits, alone[1])


@pytest.mark.parametrize("outer", [None, TOKENS, 64])
@pytest.mark.parametrize("inner", [None, TOKENS, 64])
def test_the_innermost_block_decides(outer: int | None, inner: int | None) -> None:
    x, weight = random(TOKENS, 8), random(8, 8)

    def precision() -> torch.dtype:
        with Operators() as operators:
            F.linear(x, weight)
        ((_, dtype),) = operators.seen
        return dtype

    expected = {None: torch.bfloat16, TOKENS: torch.float32, 64: torch.bfloat16}
    block = float32_products.float32_products
    with block(outer):
        for _ in range(2):  # the same within, and afterwards
            with block(inner):
                assert precision() == expected[inner]
            assert precision() == expected[outer]


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
