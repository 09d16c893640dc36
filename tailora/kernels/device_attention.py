"""Attention for packed rows on devices other than the CPU: one call per layer, whatever the number of documents.

A provider is a class. An instance of it is made once per forward, on the device and without reading anything back to
the host; its `attend` is then called by every layer. `train.kernel_choice` tries the providers on the user's model, in
this order, and takes the first that gives the right results:

    VarlenRow   the flash attention that torch brings along for documents of several lengths
    PaddedRow   torch's SDPA, every document padded to the longest one

Shapes: q (1, heads, total, width), k and v (1, key heads, total, width); the result is (1, total, heads, width).
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tailora.core.device import HALF

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


class DeviceRow(ABC):
    """One packed row as a provider needs it."""

    description: str  # for the run's header
    has_dropout: bool = True
    windows: Collection[Window] | None = None  # those that it was prepared for; None: any

    @staticmethod
    def obstacle(_device: torch.device, _dtype: torch.dtype) -> str | None:
        """Returns why this provider need not be tried; None if it may work."""
        return None

    @abstractmethod
    def __init__(self, documents: Documents) -> None: ...

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor, options: Options) -> Tensor:
        """Returns causal attention within each document. Raises ValueError for what the provider cannot do."""


class VarlenRow(DeviceRow):
    description = "torch's flash attention for documents of different lengths"
    has_dropout = False

    @staticmethod
    def obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != "cuda":
            return f"it does not support {device.type}"
        if dtype not in HALF:
            return f"it needs bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"
        return None if "window_size" in _varlen_parameters() else f"it is incomplete in torch {torch.__version__}"

    def __init__(self, documents: Documents) -> None:
        self.ends, self.longest, _, _ = documents

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


PROVIDERS: dict[str, type[DeviceRow]] = {"varlen_attn": VarlenRow, "sdpa": PaddedRow}
