"""Losses that hold the logits of a few hundred rows at most, and gradients that are known as soon as the losses are.

With p = softmax(logits) the gradient of -log p[y] by the logits is p - onehot(y). So it is written over the logits
while they are in the cache, and three ways lead on from there:

    frozen_head      the head is a plain matrix: dh = (p - onehot) W at once; dh is all that the backward needs
    recomputed_head  the head is trained or adapted: its logits are computed again in the backward
    cross_entropy    the logits exist already: they become their gradient

Losses are one per row, and so are the gradients that come back: the backward scales rows. In half precision that is
one rounding more, unless frozen_head is told beforehand what will come back.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_BYTES = 30 << 20  # of logits at a time; malloc gives blocks of 32 MB and more back at once, and pages cost time
DEVICE_CHUNK_BYTES = 256 << 20  # likewise beside a CPU, where every chunk reads the head from the device's memory
FEWEST_ROWS = 64  # of a chunk: every product reads the whole head
BLOCK_ELEMENTS = 1 << 18  # float32 numbers at a time and core, 1 MB: what a core's own cache holds


def frozen_head(
    hidden: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None = None, expected: float = 1.0
) -> Tensor:
    """-log softmax(hidden weight^T + bias)[targets] in nats, at least float32.

    (rows, hidden), (rows,), (vocabulary, hidden), (vocabulary,) -> (rows,). expected: the gradient that each loss will
    get, if known; another one is right too. Raises ValueError for a head that asks for a gradient.
    """
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError("frozen_head gives the head no gradient, and this one asks for it; take recomputed_head")
    if not (torch.is_grad_enabled() and hidden.requires_grad):
        return _through_head(hidden, targets, weight, bias, 1.0, into=None)
    losses: Tensor = _FrozenHead.apply(hidden, targets, weight, bias, expected or 1.0)  # type: ignore[no-untyped-call]
    return losses


def recomputed_head(hidden: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor], vocabulary: int) -> Tensor:
    """The same through any `head`: (rows, hidden) -> (rows, vocabulary), row by row. (rows,), at least float32."""

    def losses_of(rows: Tensor, wanted: Tensor) -> Tensor:
        return cross_entropy(head(rows), wanted)

    size = chunk_rows(vocabulary, hidden)
    parts = zip(torch.split(hidden, size), torch.split(targets, size), strict=True)
    if torch.is_grad_enabled():
        return torch.cat([checkpoint(losses_of, *part, use_reentrant=False) for part in parts])
    return torch.cat([losses_of(*part) for part in parts])


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(logits)[targets] in nats: (rows, vocabulary), (rows,) -> (rows,), at least float32.

    The values of `logits` are overwritten where a gradient will be asked for.
    """
    if not (torch.is_grad_enabled() and logits.requires_grad):
        return _log_loss(logits, targets, 1.0, into=None)
    losses: Tensor = _CrossEntropy.apply(logits, targets)  # type: ignore[no-untyped-call]
    return losses


def chunk_rows(vocabulary: int, hidden: Tensor) -> int:
    """How many rows have their logits at once, in the precision and on the device of `hidden`."""
    size = CHUNK_BYTES if hidden.device.type == "cpu" else DEVICE_CHUNK_BYTES
    return max(size // (vocabulary * hidden.dtype.itemsize), FEWEST_ROWS)


def _through_head(
    hidden: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None, scale: float, into: Tensor | None
) -> Tensor:
    """Losses, chunk by chunk in one buffer; their gradients by `hidden`, scaled, go into `into`, (rows, hidden)."""
    losses = hidden.new_empty(len(targets), dtype=_wide(hidden.dtype))
    size = chunk_rows(len(weight), hidden)
    buffer = hidden.new_empty(min(size, len(targets)), len(weight))
    for part in _slices(len(targets), size):
        rows = hidden[part]
        logits = buffer[: len(rows)]  # (chunk, vocabulary)
        if bias is None:
            torch.mm(rows, weight.T, out=logits)
        else:
            torch.addmm(bias, rows, weight.T, out=logits)
        losses[part] = _log_loss(logits, targets[part], scale, into=None if into is None else logits)
        if into is not None:
            torch.mm(logits, weight, out=into[part])
    return losses


def _log_loss(logits: Tensor, targets: Tensor, scale: float, into: Tensor | None) -> Tensor:
    """Losses, (rows,); scale (p - onehot) goes `into` a tensor like the logits, which may be the logits."""
    wide = _wide(logits.dtype)
    losses = logits.new_empty(len(targets), dtype=wide)
    size = _block_rows(logits)
    scratch = logits.new_empty(min(size, len(targets)), logits.shape[1], dtype=wide)
    for part in _slices(len(targets), size):
        wanted = targets[part, None]  # (block, 1)
        shifted = scratch[: len(wanted)].copy_(logits[part])  # (block, vocabulary)
        shifted -= shifted.amax(dim=1, keepdim=True)
        own = shifted.gather(1, wanted)
        total = shifted.exp_().sum(dim=1, keepdim=True)
        losses[part] = (total.log() - own)[:, 0]
        if into is not None:
            torch.mul(shifted, scale / total, out=into[part])
            into[part].scatter_(1, wanted, (scale * (own.exp() / total - 1)).to(into.dtype))
    return losses


def _block_rows(logits: Tensor) -> int:
    """How many rows are widened at once: on a CPU what the caches hold, elsewhere all."""
    if logits.device.type != "cpu":
        return max(len(logits), 1)
    return max(BLOCK_ELEMENTS * torch.get_num_threads() // logits.shape[1], 1)


def _slices(rows: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, rows, size))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _refuse_second_order() -> None:
    if torch.is_grad_enabled():  # in a backward only with create_graph
        raise RuntimeError("this loss has no second derivative; leave create_graph out")


class _FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None, expected: float
    ) -> Tensor:
        gradient = torch.empty_like(hidden)  # (rows, hidden), of each row's loss times `expected`
        losses = _through_head(hidden, targets, weight, bias, expected, into=gradient)
        ctx.save_for_backward(gradient)
        ctx.expected = expected
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_order()
        (gradient,) = ctx.saved_tensors
        factors = gradients[0][:, None] / ctx.expected  # (rows, 1)
        return (gradient * factors).to(gradient.dtype), None, None, None, None


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        gradient = logits.detach()  # shares memory and version: a backward that needs the logits complains
        losses = _log_loss(logits, targets, 1.0, into=gradient)
        ctx.save_for_backward(gradient)
        ctx.spent = False
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        _refuse_second_order()
        if ctx.spent:
            raise RuntimeError("the loss was already sent backward once; its gradient's memory is spent")
        ctx.spent = True
        (gradient,) = ctx.saved_tensors
        for part in _slices(len(gradient), _block_rows(gradient)):  # of two dtypes, a product makes wide copies of both
            gradient[part].mul_(gradients[0][part, None])
        return gradient, None
