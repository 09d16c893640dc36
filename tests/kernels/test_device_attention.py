"""The attention of devices, computed on the CPU and compared with the definition."""

import math
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode

from tailora.kernels.device_attention import (
    BLOCK,
    DeviceRow,
    Documents,
    FlexRow,
    Options,
    PaddedRow,
    block_mask,
    first_keys,
)

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


@pytest.fixture(autouse=True)
def flex_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch refuses the backward of flex_attention on a CPU, though its definition in plain operators computes it."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        yield


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("provider", [FlexRow, PaddedRow])
def test_attention_and_gradients_are_the_definitions(
    provider: type[DeviceRow], key_heads: int, window: int | None
) -> None:
    inputs, row = heads_of(LENGTHS, torch.float64, key_heads), row_of(provider, LENGTHS, window)
    expected = results(lambda *heads: definition(*heads, LENGTHS, 0.3, window, {}), inputs)
    actual = results(lambda *heads: row.attend(*heads, Options(0.3, 0.0, window)), inputs)
    for ours, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-9)


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
    inputs, row = heads_of(LENGTHS), row_of(FlexRow, LENGTHS, window)
    expected = results(lambda *heads: definition(*heads, LENGTHS, 1.0, window, options), inputs)
    actual = results(lambda *heads: row.attend(*heads, Options(1.0, 0.0, window, **options)), inputs)
    for ours, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)


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
        ends = ends_of(lengths)
        with Operators() as seen:
            provider(Documents(ends, max(lengths), sum(lengths), {None, window}))
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
