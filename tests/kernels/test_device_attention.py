"""The attention of devices, computed on the CPU and compared with the definition."""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Gemma2Config, GptOssConfig, LlamaConfig

from tailora.kernels.attention import sliding_windows
from tailora.kernels.device_attention import (
    PROVIDERS,
    DeviceRow,
    Documents,
    Options,
    PaddedRow,
    VarlenRow,
    _varlen_parameters,
)
from tailora.train.kernel_choice import choose_packing

CUDA = torch.device("cuda")
LENGTHS = [7, 300, 1, 140, 13]


def definition(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float, window: int | None) -> Tensor:
    """softmax(scores) v over the tokens of the same document that are no later and within the window."""
    total, heads = q.shape[2], q.shape[1]
    document = torch.repeat_interleave(torch.tensor(lengths))
    position = torch.arange(total)
    back = position[:, None] - position
    allowed = (document[:, None] == document) & (back >= 0) & (back < (window or total))
    k, v = (part.repeat_interleave(heads // part.shape[1], dim=1) for part in (k, v))
    scores = (q @ k.mT * scale).masked_fill(~allowed, -math.inf)
    return (scores.softmax(dim=-1) @ v).transpose(1, 2)


def heads_of(lengths: list[int], dtype: torch.dtype = torch.float32, key_heads: int = 2) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, sum(lengths), count, 16, dtype=dtype).transpose(1, 2) for count in (4, key_heads, key_heads)]


def ends_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def row_of(provider: type[DeviceRow], lengths: list[int], window: int | None) -> DeviceRow:
    return provider(Documents(ends_of(lengths), max(lengths), sum(lengths), {None, window}))


def results(attend: Any, inputs: list[Tensor]) -> list[Tensor]:
    """The output and the gradients of the inputs."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    output = attend(*leaves)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    return [output, *torch.autograd.grad(output, leaves, weights)]


def assert_is_definition(row: DeviceRow, inputs: list[Tensor], window: int | None, tolerance: float) -> None:
    expected = results(lambda *heads: definition(*heads, LENGTHS, 0.3, window), inputs)
    actual = results(lambda *heads: row.attend(*heads, Options(0.3, 0.0, window)), inputs)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("window", [None, 5, 200])
@pytest.mark.parametrize("key_heads", [2, 4])
def test_attention_and_gradients_are_the_definitions(key_heads: int, window: int | None) -> None:
    inputs = heads_of(LENGTHS, torch.float64, key_heads)
    assert_is_definition(row_of(PaddedRow, LENGTHS, window), inputs, window, 1e-9)


def test_bfloat16_is_as_exact_as_torchs_own_attention() -> None:
    exact, lengths = heads_of([150]), [150]
    row = row_of(PaddedRow, lengths, None)
    truth = results(lambda *heads: definition(*heads, lengths, 0.25, None), exact)
    half = [tensor.bfloat16() for tensor in exact]
    ours = results(lambda *heads: row.attend(*heads, Options(0.25, 0.0, None)), half)
    plain = torch.nn.functional.scaled_dot_product_attention
    torchs = results(lambda *heads: plain(*heads, is_causal=True, scale=0.25, enable_gqa=True).transpose(1, 2), half)
    for wanted, own, other in zip(truth, ours, torchs, strict=True):
        assert (own - wanted).norm() <= 1.5 * (other - wanted).norm() + 1e-2 * wanted.norm()


class Operators(TorchDispatchMode):
    """Notes the names of operators."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func).removesuffix(".default"))
        return func(*args, **(kwargs or {}))


READS = (
    "aten._local_scalar_dense",
    "aten.nonzero",
    "aten.equal",
    "aten.repeat_interleave.Tensor",
    "aten.masked_select",
)


@pytest.mark.parametrize("window", [None, 5])
def test_a_row_is_prepared_by_the_same_operators_for_any_number_of_documents(window: int | None) -> None:
    def operators(lengths: list[int]) -> list[str]:
        documents = Documents(ends_of(lengths), max(lengths), sum(lengths), {None, window})
        with Operators() as seen:
            PaddedRow(documents)
        return seen.names

    one, eight = operators([64]), operators([64, *[8] * 7])
    assert one == eight
    assert not set(one) & set(READS)


@pytest.mark.parametrize("window", [None, 5])
def test_padded_documents_take_one_call_of_attention(window: int | None) -> None:
    def operators(lengths: list[int]) -> list[str]:
        row, inputs = row_of(PaddedRow, lengths, window), heads_of(lengths)
        with Operators() as seen:
            results(lambda *heads: row.attend(*heads, Options(0.3, 0.0, window)), inputs)
        return seen.names

    few, many = (operators([64, *[8] * others]) for others in (1, 7))
    assert few == many
    if window is None:
        assert operators([64]) == many
    assert sum("attention" in name and "backward" not in name for name in many) == 1
    assert not set(many) & set(READS)


# ---- Flash attention cannot run here. Stand-ins compute the definition from the arguments that it would get.


class StandIn:
    """Takes arguments as flash attention does and notes them."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def varlen_attn(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
    ) -> Tensor:
        """As in torch 2.11, which does not group heads."""
        assert window_size[1] == 0  # causal
        assert (cu_seq_q.dtype, cu_seq_k.dtype) == (torch.int32, torch.int32)
        assert q.shape[1] == k.shape[1] == v.shape[1]
        self.calls.append({"longest": (max_q, max_k)})
        heads = [rows.transpose(0, 1)[None] for rows in (q, k, v)]
        before = window_size[0]
        return definition(*heads, cu_seq_q.diff().tolist(), scale or 1, None if before < 0 else before + 1)[0]


@pytest.fixture
def torchs_flash(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    stand_in = StandIn()
    monkeypatch.setattr(varlen, "varlen_attn", stand_in.varlen_attn)
    _varlen_parameters.cache_clear()
    yield stand_in
    _varlen_parameters.cache_clear()


@pytest.mark.parametrize("window", [None, 5])
def test_torchs_flash_attention_gets_the_documents(torchs_flash: StandIn, window: int | None) -> None:
    assert VarlenRow.obstacle(CUDA, torch.bfloat16) is None
    inputs, row = heads_of(LENGTHS), row_of(VarlenRow, LENGTHS, window)
    assert_is_definition(row, inputs, window, 1e-4)
    assert torchs_flash.calls == [{"longest": (300, 300)}]
    with pytest.raises(ValueError, match="does not support dropout"):
        row.attend(*inputs, Options(0.3, 0.1, window))


def test_the_operator_of_torchs_flash_attention_takes_our_arguments() -> None:
    """On tensors without contents, which is all that can be done without a card."""
    inputs = [tensor.to("meta", torch.bfloat16).requires_grad_() for tensor in heads_of(LENGTHS)]
    row = VarlenRow(Documents(ends_of(LENGTHS).to("meta"), max(LENGTHS), sum(LENGTHS), {None}))
    output = row.attend(*inputs, Options(0.3, 0.0, 5))
    assert output.shape == (1, sum(LENGTHS), 4, 16)
    assert [gradient.shape for gradient in torch.autograd.grad(output.sum(), inputs)] == [x.shape for x in inputs]


@pytest.mark.parametrize(
    ("device", "dtype", "reason"),
    [("xpu", torch.float16, "it does not support xpu"), ("cuda", torch.float32, "needs bfloat16 or float16")],
)
def test_an_obstacle_says_what_is_missing(device: str, dtype: torch.dtype, reason: str) -> None:
    assert reason in str(VarlenRow.obstacle(torch.device(device), dtype))


@pytest.mark.usefixtures("torchs_flash")
def test_torchs_flash_attention_without_windows_is_an_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    def varlen_attn(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool = False) -> None:
        """As in torch 2.10."""

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    assert "it is incomplete in torch" in str(VarlenRow.obstacle(CUDA, torch.bfloat16))


# ---- In a model


SIZES: dict[str, Any] = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2}
KINDS = ["sliding_attention", "full_attention"]
MODELS = {
    "llama": LlamaConfig(**GROUPED),
    "gemma 2": Gemma2Config(**GROUPED, head_dim=16, sliding_window=9, layer_types=KINDS, attn_logit_softcapping=0.2),
    "gpt-oss": GptOssConfig(**GROUPED, head_dim=16, sliding_window=9, layer_types=KINDS, num_local_experts=4),
}


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that lets a model choose among providers that the CPU would not be offered."""

    def force(name: str) -> None:
        monkeypatch.setattr("tailora.train.kernel_choice.candidates", lambda _: [name])
        monkeypatch.setattr(PROVIDERS[name], "obstacle", lambda *_: None)

    return force


@pytest.mark.usefixtures("torchs_flash")
@pytest.mark.parametrize(("name", "option"), [("llama", None), ("gemma 2", "softcap"), ("gpt-oss", "s_aux")])
def test_models_with_caps_or_sinks_are_not_packed_by_torchs_flash_attention(
    name: str, option: str | None, forced: Any
) -> None:
    model = AutoModelForCausalLM.from_config(MODELS[name], attn_implementation="eager")
    forced("varlen_attn")
    attention, note = choose_packing(model.bfloat16(), "auto")
    assert attention == ("varlen_attn" if option is None else None)
    assert str(option) in str(note)


def test_windows_are_found_in_the_config_and_in_modules(forced: Any) -> None:
    model = AutoModelForCausalLM.from_config(MODELS["gemma 2"])
    assert sliding_windows(model) == (None, 9)
    model.model.layers[0].self_attn.sliding_window = 4
    assert sliding_windows(model) == (None, 4, 9)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**GROUPED))
    forced("sdpa")
    for layer in model.model.layers:
        layer.self_attn.forward = partial(layer.self_attn.forward, sliding_window=7)  # by no attribute
    attention, note = choose_packing(model, "auto")
    assert attention is None
    assert "a sliding window of 7" in str(note)
