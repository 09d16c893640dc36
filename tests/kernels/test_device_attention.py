"""The attention of devices, computed on the CPU and compared with the definition."""

import math
import warnings
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention, varlen
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, GptOssConfig, LlamaConfig

from tailora.kernels import device_attention
from tailora.kernels.attention import sliding_windows
from tailora.kernels.device_attention import (
    BLOCK,
    PROVIDERS,
    DeviceRow,
    Documents,
    FlexRow,
    Options,
    PaddedRow,
    VarlenRow,
    _varlen_parameters,
    block_mask,
    first_keys,
)
from tailora.train.kernel_choice import choose_packing

CPU = torch.device("cpu")
LENGTHS = [7, 300, 1, 140, 13]  # blocks of keys that a block of queries needs in part, as a whole, and not at all
WINDOWS = [None, 1, 5, 130, 200, 1000]


def definition(
    q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float, window: int | None, options: dict[str, Any]
) -> Tensor:
    """softmax(scores) v over the tokens of the same document that are no later and within the window."""
    total, heads = q.shape[2], q.shape[1]
    document = torch.repeat_interleave(torch.tensor(lengths))
    position = torch.arange(total)
    back = position[:, None] - position
    allowed = (document[:, None] == document) & (back >= 0) & (back < (window or total))
    k, v = (part.repeat_interleave(heads // part.shape[1], dim=1) for part in (k, v))
    scores = q @ k.mT * scale
    if cap := options.get("softcap"):
        scores = cap * torch.tanh(scores / cap)
    scores = scores.masked_fill(~allowed, -math.inf)
    if (sinks := options.get("s_aux")) is not None:
        scores = torch.cat([scores, sinks.to(scores)[None, :, None, None].expand(1, -1, total, 1)], dim=-1)
        return (scores.softmax(dim=-1)[..., :-1] @ v).transpose(1, 2)
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


def assert_is_definition(
    row: DeviceRow, inputs: list[Tensor], window: int | None, tolerance: float, dropout: float = 0.0, **options: Any
) -> None:
    """dropout: what a stand-in is asked for, which it leaves out."""
    expected = results(lambda *heads: definition(*heads, LENGTHS, 0.3, window, options), inputs)
    actual = results(lambda *heads: row.attend(*heads, Options(0.3, dropout, window, **options)), inputs)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.fixture(autouse=True)
def flex_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch refuses the backward of flex_attention on a CPU, though its definition in plain operators computes it."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")  # torch's own
        yield


@pytest.mark.parametrize("window", [None, 5, 200])
@pytest.mark.parametrize("key_heads", [2, 4])
@pytest.mark.parametrize("provider", [FlexRow, PaddedRow])
def test_attention_and_gradients_are_the_definitions(
    provider: type[DeviceRow], key_heads: int, window: int | None
) -> None:
    inputs = heads_of(LENGTHS, torch.float64, key_heads)
    assert_is_definition(row_of(provider, LENGTHS, window), inputs, window, 1e-9)


@pytest.mark.parametrize("provider", [FlexRow, PaddedRow])
def test_bfloat16_is_as_exact_as_torchs_own_attention(provider: type[DeviceRow]) -> None:
    exact, lengths = heads_of([150]), [150]
    row = row_of(provider, lengths, None)
    truth = results(lambda *heads: definition(*heads, lengths, 0.25, None, {}), exact)
    half = [tensor.bfloat16() for tensor in exact]
    ours = results(lambda *heads: row.attend(*heads, Options(0.25, 0.0, None)), half)
    plain = torch.nn.functional.scaled_dot_product_attention
    torchs = results(lambda *heads: plain(*heads, is_causal=True, scale=0.25, enable_gqa=True).transpose(1, 2), half)
    for wanted, own, other in zip(truth, ours, torchs, strict=True):
        assert (own - wanted).norm() <= 1.5 * (other - wanted).norm() + 1e-2 * wanted.norm()


@pytest.mark.parametrize("options", [{"softcap": 2.0}, {"s_aux": torch.randn(4)}], ids=["soft cap", "sinks"])
@pytest.mark.parametrize("window", [None, 5])
def test_flex_attention_computes_soft_caps_and_sinks(options: dict[str, Any], window: int | None) -> None:
    assert_is_definition(row_of(FlexRow, LENGTHS, window), heads_of(LENGTHS), window, 1e-4, **options)


@pytest.mark.slow
def test_two_graphs_of_flex_attention_serve_all_lengths_and_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """One for rows within a block of the mask. torch's own limit of graphs does not count."""
    monkeypatch.setattr(device_attention, "NOT_COMPILED", ())
    monkeypatch.setattr(device_attention, "COMPILER", "eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(recompile_limit=1):
        for lengths in ([7, 300, 1], [40], [130] * 3, [5, 5]):
            for window in (None, 5):
                inputs, row = heads_of(lengths), row_of(FlexRow, lengths, window)
                attend = partial(row.attend, options=Options(0.3, 0.0, window))
                expected = results(partial(definition, lengths=lengths, scale=0.3, window=window, options={}), inputs)
                torch.testing.assert_close(results(attend, inputs), expected, rtol=1e-4, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("window", WINDOWS)
def test_the_mask_of_blocks_reads_what_is_needed_and_no_more(window: int | None) -> None:
    """A block is read whole if no pair in it is masked, in part if some pair counts, and else not at all."""
    total = sum(LENGTHS)
    first = first_keys(ends_of(LENGTHS), total, window)
    mask = block_mask(first)
    position = torch.arange(total)
    allowed = (position <= position[:, None]) & (position >= first[:, None])
    size = -(-total // BLOCK)
    padded = torch.zeros(size * BLOCK, size * BLOCK, dtype=torch.bool)
    padded[:total, :total] = allowed
    padded[total:] = padded[total - 1]  # rows behind the end ask for nothing of their own
    pairs = padded.unflatten(0, (size, BLOCK)).unflatten(2, (size, BLOCK)).transpose(1, 2)
    some, every = pairs.flatten(2).any(dim=-1), pairs.flatten(2).all(dim=-1)
    read = mask.to_dense()[0, 0].bool()
    assert torch.equal(read, some)
    assert mask.full_kv_num_blocks is not None
    assert mask.full_kv_indices is not None
    whole = torch.zeros(size, size, dtype=torch.bool)
    for query, (count, keys) in enumerate(zip(mask.full_kv_num_blocks[0, 0], mask.full_kv_indices[0, 0], strict=True)):
        whole[query, keys[:count].long()] = True
    assert torch.equal(whole, every)
    assert mask.seq_lengths == (total, total)


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
@pytest.mark.parametrize("provider", [FlexRow, PaddedRow])
def test_a_row_is_prepared_by_the_same_operators_for_any_number_of_documents(
    provider: type[DeviceRow], window: int | None
) -> None:
    def operators(lengths: list[int]) -> list[str]:
        documents = Documents(ends_of(lengths), max(lengths), sum(lengths), {None, window})
        with Operators() as seen:
            provider(documents)
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
        return self.attention(q, k, v, cu_seq_q, scale, window_size[0], {})

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, ends: Tensor, scale: float | None, before: int, options: dict[str, Any]
    ) -> Tensor:
        heads = [rows.transpose(0, 1)[None] for rows in (q, k, v)]
        return definition(*heads, ends.diff().tolist(), scale or 1, None if before < 0 else before + 1, options)[0]


@pytest.fixture
def torchs_flash(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    stand_in = StandIn()
    monkeypatch.setattr(varlen, "varlen_attn", stand_in.varlen_attn)
    monkeypatch.setattr(VarlenRow, "device_types", ("cpu",))
    _varlen_parameters.cache_clear()
    yield stand_in
    _varlen_parameters.cache_clear()


@pytest.mark.parametrize("window", [None, 5])
def test_torchs_flash_attention_gets_the_documents(torchs_flash: StandIn, window: int | None) -> None:
    assert VarlenRow.obstacle(CPU, torch.bfloat16) is None
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
    ("row", "device", "dtype", "reason"),
    [
        (VarlenRow, "xpu", torch.float16, "it does not support xpu"),
        (VarlenRow, "cuda", torch.float32, "needs bfloat16 or float16"),
        (FlexRow, "other", torch.float32, "it does not support other"),
    ],
)
def test_an_obstacle_says_what_is_missing(row: type[DeviceRow], device: str, dtype: torch.dtype, reason: str) -> None:
    assert reason in str(row.obstacle(SimpleNamespace(type=device), dtype))  # type: ignore[arg-type]


@pytest.mark.usefixtures("torchs_flash")
def test_torchs_flash_attention_without_windows_is_an_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    def varlen_attn(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool = False) -> None:
        """As in torch 2.10."""

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    assert "it is incomplete in torch" in str(VarlenRow.obstacle(CPU, torch.bfloat16))


# ---- In a model


SIZES: dict[str, Any] = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2}
KINDS = ["sliding_attention", "full_attention"]
MODELS = {
    "llama": LlamaConfig(**GROUPED),
    "gpt2": GPT2Config(vocab_size=300, n_embd=64, n_layer=2, n_head=4, attn_pdrop=0.0),
    "gemma 2": Gemma2Config(**GROUPED, head_dim=16, sliding_window=9, layer_types=KINDS, attn_logit_softcapping=0.2),
    "gpt-oss": GptOssConfig(**GROUPED, head_dim=16, sliding_window=9, layer_types=KINDS, num_local_experts=4),
}


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that lets a model choose among providers that the CPU would not be offered."""

    def force(name: str) -> None:
        monkeypatch.setattr("tailora.train.kernel_choice.candidates", lambda _: [name])
        monkeypatch.setattr(PROVIDERS[name], "device_types", ("cpu",))

    return force


@pytest.mark.parametrize("name", MODELS)
def test_models_are_packed_by_flex_attention(name: str, forced: Any) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[name], attn_implementation="eager")
    for layer, parameter in model.named_parameters():
        if layer.endswith("sinks"):
            parameter.data.normal_()
    forced("flex_attention")
    assert choose_packing(model, "auto") == ("flex_attention", None)


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
