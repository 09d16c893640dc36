"""Cross-entropy without the logits of all tokens: a chunk of tokens at a time goes through the output head.

With p = softmax(logits) the gradient of -log p[y] by the logits is p - onehot(y). It is computed in the forward, in the
memory of the logits, while they are in the cache:

    frozen_head      the head is a plain matrix: the gradient of the hidden states, (p - onehot) W, follows at once and
                     is all that the backward needs
    recomputed_head  the head is trained or adapted: its logits are computed again in the backward
    cross_entropy    the logits exist already: their gradient overwrites them

Each row (token) has its own loss, so the backward multiplies rows by the gradients of the losses. In half precision
that rounds once more, unless frozen_head gets the expected gradient.

The second part of the file computes the loss of a model in one of these forms; `train.kernel_choice` chooses it.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from tailora.core.device import copies_by_itself
from tailora.core.float32_products import checkpoint_contexts
from tailora.data.dataset import IGNORED

CHUNK_BYTES = 12 << 20  # of logits: 128 rows of 49,152 tokens, which take 1.1 times as long as 320 in 30 MB
DEVICE_CHUNK_BYTES = 256 << 20  # on a GPU, where every chunk reads the head from the device's memory
FEWEST_ROWS = 64  # of a chunk: every product reads the whole head
BLOCK_ELEMENTS = 1 << 18  # float32 numbers at a time and core: 1 MB, which a core's own cache holds


def frozen_head(
    hidden: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None = None, expected: float | Tensor = 1.0
) -> Tensor:
    """Returns -log softmax(hidden weight^T + bias)[targets] in nats, at least float32.

    (rows, hidden), (rows,), (vocabulary, hidden), (vocabulary,) -> (rows,). expected: the gradient that each loss will
    get, if known, not 0; the result is right for any other. Raises ValueError for a head that requires a gradient.
    """
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError("frozen_head computes no gradient for the head, but this one needs it; use recomputed_head")
    if not (torch.is_grad_enabled() and hidden.requires_grad):
        return _through_head(hidden, targets, weight, bias, 1.0, into=None)
    losses: Tensor = _FrozenHead.apply(hidden, targets, weight, bias, expected)  # type: ignore[no-untyped-call]
    return losses


def recomputed_head(hidden: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor], vocabulary: int) -> Tensor:
    """Returns the same for any `head`, (rows, hidden) -> (rows, vocabulary), that treats rows separately."""

    def losses_of(rows: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(head(rows), labels)

    size = chunk_rows(vocabulary, hidden)
    parts = zip(torch.split(hidden, size), torch.split(targets, size), strict=True)
    if torch.is_grad_enabled():
        options: dict[str, Any] = {"use_reentrant": False, "context_fn": checkpoint_contexts}
        return torch.cat([checkpoint(losses_of, *part, **options) for part in parts])
    return torch.cat([losses_of(*part) for part in parts])


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Returns -log softmax(logits)[targets] in nats: (rows, vocabulary), (rows,) -> (rows,), at least float32.

    The values of `logits` are overwritten if they require a gradient.
    """
    if not (torch.is_grad_enabled() and logits.requires_grad):
        return _log_loss(logits, targets, 1.0, into=None)
    losses: Tensor = _CrossEntropy.apply(logits, targets)  # type: ignore[no-untyped-call]
    return losses


def chunk_rows(vocabulary: int, hidden: Tensor) -> int:
    """Returns how many rows go through the head at a time, in the precision and on the device of `hidden`."""
    size = CHUNK_BYTES if hidden.device.type == "cpu" else DEVICE_CHUNK_BYTES
    return max(size // (vocabulary * hidden.dtype.itemsize), FEWEST_ROWS)


def _through_head(
    hidden: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None, scale: float | Tensor, into: Tensor | None
) -> Tensor:
    """Returns losses, chunk by chunk in one buffer; writes their gradients by `hidden`, times `scale`, to `into`."""
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


def _log_loss(logits: Tensor, targets: Tensor, scale: float | Tensor, into: Tensor | None) -> Tensor:
    """Returns losses, (rows,); writes scale (p - onehot) to `into`, like the logits or the logits themselves."""
    wide = _wide(logits.dtype)
    losses = logits.new_empty(len(targets), dtype=wide)
    size = _block_rows(logits)
    scratch = logits.new_empty(min(size, len(targets)), logits.shape[1], dtype=wide)
    for part in _blocks(logits):
        labels = targets[part, None]  # (block, 1)
        shifted = scratch[: len(labels)].copy_(logits[part])  # (block, vocabulary)
        shifted -= shifted.amax(dim=1, keepdim=True)
        target = shifted.gather(1, labels)
        total = shifted.exp_().sum(dim=1, keepdim=True)
        losses[part] = (total.log() - target)[:, 0]
        if into is not None:
            torch.mul(shifted, scale / total, out=into[part])
            into[part].scatter_(1, labels, (scale * (target.exp() / total - 1)).to(into.dtype))
    return losses


def _block_rows(logits: Tensor) -> int:
    """Returns how many rows are converted to float32 at a time: on a CPU what the caches hold, elsewhere all."""
    if logits.device.type != "cpu":
        return max(len(logits), 1)
    return max(BLOCK_ELEMENTS * torch.get_num_threads() // logits.shape[1], 1)


def _blocks(logits: Tensor) -> Iterator[slice]:
    """Yields the blocks of rows. Without contents, only the first: it shows the memory of all, as for a plan."""
    size = _block_rows(logits)
    return _slices(min(size, len(logits)) if isinstance(logits, FakeTensor) else len(logits), size)


def _slices(rows: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, rows, size))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _refuse_second_order() -> None:
    if torch.is_grad_enabled():  # in a backward only with create_graph
        raise RuntimeError("second derivatives are not supported by this loss; remove create_graph=True")


class _FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None, expected: float | Tensor
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
        ctx.used = False
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        _refuse_second_order()
        if ctx.used:
            raise RuntimeError(
                "the backward pass of this loss has already run and freed its memory; compute the loss again"
            )
        ctx.used = True
        (gradient,) = ctx.saved_tensors
        # in blocks, because a product of two dtypes copies both to the wider
        for part in _blocks(gradient):
            gradient[part].mul_(gradients[0][part, None])
        return gradient, None


# ---- The loss of a model
#
# The chunked forms call the decoder, select its states at supervised positions, and go through the head in chunks. They
# are right if the model's logits are head(decoder(...)) and nothing else: no scale, no soft cap. `train.kernel_choice`
# tests this on the model itself. If the test fails, the loss is computed from the model's own logits.


@dataclass(frozen=True, eq=False)
class Batch:
    """The model's input, and the tokens that it is to predict, by index: the host would wait for a device's masks."""

    inputs: dict[str, Any]  # keyword arguments; input_ids (batch, length)
    supervised: Tensor  # (supervised,), positions in (batch * length) whose prediction has a loss
    targets: Tensor  # (supervised,), the tokens to predict there
    columns: Tensor  # (columns,), positions in a row that have a loss in some row of the batch
    within_columns: Tensor | None  # (supervised,), positions in (batch * columns); None if all have a loss, in order
    owners: NDArray[np.int64]  # (losses,), on the host: which example each belongs to
    weight: float = 1.0  # 0: computed to keep step with other ranks, not counted
    expected_gradient: float | Tensor = 1.0  # of each loss, if known; not 0
    loss_weights: Tensor | None = None  # (losses,), of their sum in training; None: all are 1
    temperature: float = 1.0  # that the logits are divided by
    extras: dict[str, Tensor] = field(default_factory=dict)  # what the loss of a task needs besides
    other: "Batch | None" = None  # what is computed without gradients for it

    @classmethod
    def of(cls, inputs: dict[str, Any], next_tokens: NDArray[np.int64], owners: NDArray[np.int64]) -> "Batch":
        """Returns the batch on the CPU. next_tokens, owners: (batch, length); IGNORED where nothing is predicted."""
        rows, columns = np.nonzero(next_tokens != IGNORED)  # (supervised,) each, in the order of rows
        used = np.unique(columns)
        indices = rows * len(used) + np.searchsorted(used, columns)
        return cls(
            inputs=inputs,
            supervised=torch.from_numpy(rows * next_tokens.shape[1] + columns),
            targets=torch.from_numpy(next_tokens[rows, columns]),
            columns=torch.from_numpy(used),
            within_columns=None if len(indices) == len(next_tokens) * len(used) else torch.from_numpy(indices),
            owners=owners[rows, columns],
        )

    def to(self, device: torch.device) -> "Batch":
        """Returns the batch on the device. The host does not wait, if the device can copy by itself."""
        if device.type == "cpu":
            return self

        def copy(value: Any) -> Any:
            if isinstance(value, Batch):
                return value.to(device)
            if not isinstance(value, Tensor) or value.device == device:
                return value
            if copies_by_itself(device):
                return value.pin_memory().to(device, non_blocking=True)
            return value.to(device)

        return replace(self, **{name: tree_map(copy, value) for name, value in vars(self).items()})


Model = Any  # of transformers, or a LoRAModel around one


def _frozen(model: Model, batch: Batch) -> Tensor:
    head, states = model.get_output_embeddings(), _tempered(_states(model, batch), batch)
    bias = None if head.bias is None else _tempered(head.bias, batch)
    return frozen_head(states, batch.targets, head.weight, bias, batch.expected_gradient)


def _recomputed(model: Model, batch: Batch) -> Tensor:
    vocabulary, head = model.config.get_text_config().vocab_size, model.get_output_embeddings()
    return recomputed_head(_states(model, batch), batch.targets, lambda rows: _tempered(head(rows), batch), vocabulary)


def _states(model: Model, batch: Batch) -> Tensor:
    """Returns the decoder's states at supervised positions, (supervised, hidden)."""
    states: Tensor = model.get_decoder()(**batch.inputs, use_cache=False)[0]  # (batch, length, hidden)
    return states.flatten(0, 1).index_select(0, batch.supervised)


def _tempered(logits: Tensor, batch: Batch) -> Tensor:
    return logits if batch.temperature == 1 else logits / batch.temperature


def _own_logits(model: Model, batch: Batch) -> Tensor:
    logits = model(**batch.inputs, use_cache=False, logits_to_keep=batch.columns).logits  # (batch, columns, vocabulary)
    rows = logits.flatten(0, 1)
    if batch.within_columns is not None:
        rows = rows.index_select(0, batch.within_columns)
    return cross_entropy(_tempered(rows, batch), batch.targets)


def _own_logits_everywhere(model: Model, batch: Batch) -> Tensor:
    logits = model(**batch.inputs, use_cache=False).logits  # (batch, length, vocabulary)
    rows = logits.flatten(0, 1).index_select(0, batch.supervised)
    return cross_entropy(_tempered(rows, batch), batch.targets)


class LossForm(StrEnum):
    """How losses are computed, and the text for a run's header. HEAD: of tasks without a form (`Task.is_plain`)."""

    FROZEN = "in chunks of tokens through the frozen output head"
    RECOMPUTED = "in chunks of tokens through a trained output head"
    OWN = "from the model's own logits"
    WHOLE = "from the model's own logits at all positions"
    HEAD = "from the model's own outputs"


FROZEN, RECOMPUTED, OWN, WHOLE, HEAD = LossForm
CHUNKED = {FROZEN, RECOMPUTED}
FORMS: dict[LossForm, Callable[[Model, Batch], Tensor]] = {  # -> losses, (supervised,), float32 at least
    FROZEN: _frozen,
    RECOMPUTED: _recomputed,
    OWN: _own_logits,
    WHOLE: _own_logits_everywhere,
}


def own_form(model: Model) -> LossForm:
    """Returns the form that is right for every model: its own logits, at supervised positions if it allows that."""
    return OWN if "logits_to_keep" in inspect.signature(model.forward).parameters else WHOLE
