"""Attention for packed rows on devices other than the CPU: one call per layer, whatever the number of documents.

A provider is a class. An instance of it is made once per forward, on the device and without reading anything back to
the host; its `attend` is then called by every layer. `train.kernel_choice` tries the providers on the user's model, in
this order, and takes the first that gives the right results:

    VarlenRow   the flash attention that torch brings along for documents of several lengths
    FlexRow     torch's flex_attention with a mask of blocks: blocks outside documents and windows cost nothing
    PaddedRow   torch's SDPA, every document padded to the longest one

Shapes: q (1, heads, total, width), k and v (1, key heads, total, width); the result is (1, total, heads, width).
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._dynamo import config as dynamo_config
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers.integrations.flex_attention import get_flex_attention_lse_kwargs

from tailora.core.device import HALF

BLOCK = 128  # tokens of a block of flex_attention's mask
COMPILER = "inductor"  # torch.compile's backend for flex_attention
NOT_COMPILED = ("cpu",)  # devices where flex_attention is called as it is: their compiler makes no backward of it
# of one function, at most. Torch's own limit is 8; a model takes two for each kind of mask or score of its layers, two
# more without gradients, and as many again for rows within one block
MOST_GRAPHS = 64

Window = int | None  # tokens that a token attends to, itself included; None: all before it


class Documents(NamedTuple):
    ends: Tensor  # (documents + 1,) int32, where they begin and the last ends
    longest: int  # tokens of a document
    total: int
    windows: Collection[Window]  # of the model's layers


class Options(NamedTuple):
    scale: float
    dropout: float
    window: Window
    softcap: float | None = None  # scores are softcap * tanh(score / softcap)
    s_aux: Tensor | None = None  # attention sinks: the score of a key without a value, (heads,)


class DeviceRow(ABC):
    """One packed row as a provider needs it."""

    description: str  # for the run's header
    supports: tuple[str, ...] = ()  # of `Options`, beyond the first three
    device_types: tuple[str, ...] = ()  # empty: any, as far as torch can
    half_precision: bool = False  # True if it computes nothing else
    has_dropout: bool = True
    windows: Collection[Window] | None = None  # those that it was prepared for; None: any

    @classmethod
    def obstacle(cls, device: torch.device, dtype: torch.dtype) -> str | None:
        """Returns why this provider need not be tried; None if it may work."""
        if cls.device_types and device.type not in cls.device_types:
            return f"it does not support {device.type}"
        if cls.half_precision and dtype not in HALF:
            return f"it needs bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"
        return cls.missing()

    @staticmethod
    def missing() -> str | None:
        """Returns what is not installed; None if all is there."""
        return None

    def __init__(self, documents: Documents) -> None:
        self.ends, self.longest = documents.ends, documents.longest

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor, options: Options) -> Tensor:
        """Returns causal attention within each document. Raises ValueError for what the provider cannot do."""


class VarlenRow(DeviceRow):
    description = "torch's flash attention for documents of different lengths"
    device_types = ("cuda",)
    half_precision = True
    has_dropout = False

    @staticmethod
    def missing() -> str | None:
        return None if "window_size" in _varlen_parameters() else f"it is incomplete in torch {torch.__version__}"

    def attend(self, q: Tensor, k: Tensor, v: Tensor, options: Options) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        if options.dropout:
            raise ValueError("torch's varlen_attn does not support dropout")
        compute: Callable[..., Tensor] = varlen_attn  # type: ignore[assignment]  # not for all of its options
        if "enable_gqa" in _varlen_parameters():
            compute = partial(compute, enable_gqa=True)
        else:
            k, v = repeated(k, q.shape[1]), repeated(v, q.shape[1])
        rows = [heads[0].transpose(0, 1) for heads in (q, k, v)]  # (total, heads, width)
        bounds = (self.ends, self.ends, self.longest, self.longest)
        before = -1 if options.window is None else options.window - 1  # tokens that count; -1: all
        return compute(*rows, *bounds, scale=options.scale, window_size=(before, 0))[None]


@lru_cache
def _varlen_parameters() -> Collection[str]:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return ()
    return inspect.signature(varlen_attn).parameters.keys()


class FlexRow(DeviceRow):
    description = "torch's flex_attention with a block mask"
    supports = ("softcap", "s_aux")
    device_types = ("cuda", "xpu", "mps")  # on a CPU torch computes no gradients of it
    has_dropout = False

    def __init__(self, documents: Documents) -> None:
        ends, _, total, self.windows = documents
        self.masks = {window: block_mask(first_keys(ends, total, window)) for window in self.windows}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, options: Options) -> Tensor:
        if options.dropout:
            raise ValueError("torch's flex_attention does not support dropout")
        cap, sinks = options.softcap, options.s_aux
        is_fused = q.device.type not in NOT_COMPILED and not torch.compiler.is_compiling()  # which traces it itself
        compute: Any = _fused_flex if is_fused else flex_attention
        compute = partial(
            compute,
            *(q, k, v),
            # as a tensor, because the compiler would take the number for a variable, which flex_attention refuses
            score_mod=None if cap is None else partial(_capped, q.new_full((), cap, dtype=torch.float32)),
            block_mask=self.masks[options.window],
            scale=options.scale,
            enable_gqa=k.shape[1] != q.shape[1],
        )
        if sinks is None:
            output: Tensor = compute()
            return output.transpose(1, 2)
        output, sums = compute(**get_flex_attention_lse_kwargs(True))
        log_sums: Tensor = getattr(sums, "lse", sums)  # (1, heads, total), itself before torch 2.9
        # softmax over the keys and the sink: each probability times sum / (sum + exp(sink))
        share = torch.sigmoid(log_sums - sinks[:, None])[..., None]
        return (output * share).to(output.dtype).transpose(1, 2)


def _capped(cap: Tensor, score: Tensor, _batch: Tensor, _head: Tensor, _query: Tensor, _key: Tensor) -> Tensor:
    return cap * torch.tanh(score / cap)


def _fused_flex(*args: Any, **kwargs: Any) -> Any:
    """flex_attention, compiled for any lengths. Beyond torch's own limit of graphs it would store all scores."""
    with dynamo_config.patch(recompile_limit=MOST_GRAPHS):
        return _compiled_flex(COMPILER)(*args, **kwargs)


@lru_cache
def _compiled_flex(compiler: str) -> Callable[..., Any]:
    return torch.compile(flex_attention, fullgraph=True, dynamic=True, backend=compiler)


def first_keys(ends: Tensor, total: int, window: Window) -> Tensor:
    """Returns the first token that each token attends to, (total,) int32: of its document, and of its window."""
    tokens = torch.arange(total, dtype=torch.int32, device=ends.device)
    starts = ends[torch.searchsorted(ends[1:], tokens, right=True)]
    return starts if window is None else torch.maximum(starts, tokens - (window - 1))


def block_mask(first: Tensor) -> BlockMask:
    """Returns the mask of flex_attention for tokens that attend to `first` (total,) up to themselves.

    `first` never falls from one token to the next. So a block of queries reads the blocks of keys from its first
    token's first key to itself, and those from its last token's first key on, except itself, without a look at single
    tokens.
    """
    total, device = len(first), first.device
    blocks = torch.arange(-(-total // BLOCK), device=device)  # (blocks,)
    opening = first[blocks * BLOCK] // BLOCK  # block of keys, (blocks,)
    closing = -(-first[(blocks * BLOCK + BLOCK - 1).clamp(max=total - 1)] // BLOCK)
    before = blocks < blocks[:, None]  # (blocks of queries, blocks of keys)
    whole = before & (blocks >= closing[:, None])
    partly = (before | (blocks == blocks[:, None])) & (blocks >= opening[:, None]) & ~whole

    def attends(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= first[query])

    return BlockMask.from_kv_blocks(
        *_listed(partly), *_listed(whole), BLOCK_SIZE=BLOCK, mask_mod=attends, seq_lengths=(total, total)
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Returns how many are True in each row, and their columns, before all others."""
    count = blocks.sum(dim=-1, dtype=torch.int32)
    columns = blocks.to(torch.int32).argsort(dim=-1, descending=True, stable=True)
    return count[None, None], columns[None, None].to(torch.int32)


class PaddedRow(DeviceRow):
    description = "torch's SDPA, documents padded to the longest one"

    def __init__(self, documents: Documents) -> None:
        ends, self.longest, total, self.windows = documents
        tokens = torch.arange(total, dtype=torch.int32, device=ends.device)
        document = torch.searchsorted(ends[1:], tokens, right=True)  # (total,)
        self.count = len(ends) - 1
        self.token_index = document * self.longest + tokens - ends[document]  # where each is among the padded ones
        self.masks = {window: self._mask(window, ends.device) for window in self.windows}

    def _mask(self, window: Window, device: torch.device) -> Tensor | None:
        """Returns which keys each query attends to, (longest, longest); None for all keys up to its own."""
        if window is None or window >= self.longest:
            return None
        position = torch.arange(self.longest, device=device)
        back = position[:, None] - position
        return (back >= 0) & (back < window)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, options: Options) -> Tensor:
        mask = self.masks[options.window]
        if not (q.device.type == "cuda" and q.dtype in HALF and mask is None):
            # elsewhere only that kernel of torch supports grouped heads which stores all scores, or none does
            k, v = repeated(k, q.shape[1]), repeated(v, q.shape[1])
        q, k, v = (self._padded(heads) for heads in (q, k, v))
        output = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=options.dropout,
            is_causal=mask is None,
            scale=options.scale,
            enable_gqa=k.shape[1] != q.shape[1],
        )  # (documents, heads, longest, width)
        return output.transpose(1, 2).flatten(0, 1).index_select(0, self.token_index)[None]

    def _padded(self, heads: Tensor) -> Tensor:
        """(1, heads, total, width) -> (documents, heads, longest, width), zero behind the end of each document."""
        rows = heads[0].transpose(0, 1)  # (total, heads, width)
        padded = rows.new_zeros(self.count * self.longest, *rows.shape[1:]).index_copy(0, self.token_index, rows)
        return padded.view(self.count, self.longest, *rows.shape[1:]).transpose(1, 2)


def repeated(heads: Tensor, count: int) -> Tensor:
    """Repeats heads for the query heads that read them: (1, key heads, total, width) -> (1, count, total, width)."""
    return heads if heads.shape[1] == count else heads.repeat_interleave(count // heads.shape[1], dim=1)


PROVIDERS: dict[str, type[DeviceRow]] = {"varlen_attn": VarlenRow, "flex_attention": FlexRow, "sdpa": PaddedRow}
