"""Losses that hold the logits of a few hundred rows at most, and gradients that are known as soon as the losses are.

With p = softmax(logits) the gradient of -log p[y] by the logits is p - onehot(y). So it is written over the logits
while they are in the cache, and three ways lead on from there:

    frozen_head      the head is a plain matrix: dh = (p - onehot) W at once; dh is all that the backward needs
    recomputed_head  the head is trained or adapted: its logits are computed again in the backward
    cross_entropy    the logits exist already: they become their gradient

Losses are one per row, and so are the gradients that come back: the backward scales rows. In half precision that is
one rounding more, unless frozen_head is told beforehand what will come back.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tailora.core.quantization import is_quantized

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


# ---- From a model and a batch to losses, without logits of all rows where the model allows it.
#
# The lean forms call the decoder, keep its states at supervised positions, and go through the head in chunks. They hold
# when the model's logits are head(decoder(...)) and nothing else: no scale, no soft cap. That is found out on the model
# itself. What fails takes the model's own logits.


@dataclass(frozen=True, eq=False)
class Batch:
    """What the model is given, and what it shall predict where."""

    inputs: dict[str, Any]  # keyword arguments; input_ids (batch, length)
    supervised: Tensor  # (batch, length), True where the prediction has a loss
    targets: Tensor  # (supervised,), in the order of the mask
    expected_gradient: float = 1.0  # of each loss, if known


Model = Any  # of transformers, or a LoRAModel around one
Form = Callable[[Model, Batch], Tensor]  # losses, (supervised,), float32 at least


def _frozen(model: Model, batch: Batch) -> Tensor:
    head = model.get_output_embeddings()
    return frozen_head(_states(model, batch), batch.targets, head.weight, head.bias, batch.expected_gradient)


def _recomputed(model: Model, batch: Batch) -> Tensor:
    vocabulary = model.config.get_text_config().vocab_size
    return recomputed_head(_states(model, batch), batch.targets, model.get_output_embeddings(), vocabulary)


def _states(model: Model, batch: Batch) -> Tensor:
    """The decoder's states at supervised positions: (supervised, hidden)."""
    states = model.get_decoder()(**batch.inputs, use_cache=False)[0]  # (batch, length, hidden)
    return _rows(states, batch.supervised)


def _rows(values: Tensor, mask: Tensor) -> Tensor:
    """Where the mask (batch, length) is true. By numbers: a mask as index has no length for a plan to know."""
    return values.flatten(0, 1).index_select(0, mask.flatten().nonzero()[:, 0])


def _own(model: Model, batch: Batch) -> Tensor:
    columns = batch.supervised.any(dim=0).nonzero()[:, 0]  # where some row of the batch is judged
    logits = model(**batch.inputs, use_cache=False, logits_to_keep=columns).logits  # (batch, columns, vocabulary)
    judged = batch.supervised[:, columns]
    return cross_entropy(logits.flatten(0, 1) if judged.all() else _rows(logits, judged), batch.targets)


def _whole(model: Model, batch: Batch) -> Tensor:
    return cross_entropy(_rows(model(**batch.inputs, use_cache=False).logits, batch.supervised), batch.targets)


FROZEN = "chunked, head frozen"
RECOMPUTED = "chunked, head trained"
OWN = "from the model's own logits"
WHOLE = "from the model's own logits at all positions"
FORMS: dict[str, Form] = {FROZEN: _frozen, RECOMPUTED: _recomputed, OWN: _own, WHOLE: _whole}

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}  # of states, losses and gradients, relative to their norm
HALF_TOLERANCE = 5e-2  # bfloat16, float16
RAMP = 1e3  # logits from -RAMP to RAMP show a soft cap, a scale or a bound that small ones do not


def choose_form(model: Model, batch: Batch) -> tuple[str, str | None]:
    """The leanest form that gives the model's own losses and gradients, and why it is not a chunked one.

    A few tokens are enough for `batch`. The model is in evaluation mode, without dropout.
    """
    own, lean = own_form(model), _lean_form(model)
    obstacle = _out_of_reach(model, batch) or _changed_between(model, batch) or _difference(model, batch, lean, own)
    return (own, f"{type(model).__name__} {obstacle}") if obstacle else (lean, None)


def predict_form(model: Model, batch: Batch) -> tuple[str, str | None]:
    """The same for a model without contents: what is passed on as it is shares its memory; numbers are not compared."""
    obstacle = _out_of_reach(model, batch) or _changed_between(model, batch, _shares_memory)
    return (own_form(model), f"{type(model).__name__} {obstacle}") if obstacle else (_lean_form(model), None)


def _lean_form(model: Model) -> str:
    return FROZEN if _is_frozen(model.get_output_embeddings()) else RECOMPUTED


def own_form(model: Model) -> str:
    """The form that holds for every model: by its own logits, at supervised positions if it computes those alone."""
    return OWN if "logits_to_keep" in inspect.signature(model.forward).parameters else WHOLE


def _is_frozen(head: nn.Module | None) -> bool:
    """A plain linear layer (an adapted one has a class of its own) of plain weights, without gradients."""
    plain = type(head) is nn.Linear and not is_quantized(head)
    return plain and head is not None and not any(parameter.requires_grad for parameter in head.parameters())


def _out_of_reach(model: Model, batch: Batch) -> str | None:
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    head = model.get_output_embeddings()
    if decoder is None or decoder is model:
        return "has no decoder of its own"
    if head is None:
        return "has no output head"
    if _hooked(model) or _hooked(head):
        return "or its head carries hooks"
    try:
        inspect.signature(decoder.forward).bind(**batch.inputs, use_cache=False)
    except TypeError as error:
        return f"gives its decoder other inputs than its own ({error})"
    return None


def _hooked(module: nn.Module) -> bool:
    """Whether something else runs when the module is called: hooks, or a `forward` put in its place."""
    return "forward" in vars(module) or any(vars(module)[name] for name in HOOKS)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def _shares_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage() is other.untyped_storage()


def _changed_between(model: Model, batch: Batch, same: Callable[[Tensor, Tensor], bool] = _same) -> str | None:
    """What the model does to the decoder's states before its head, or to the logits after it; None for nothing.

    The head's output is exchanged for a ramp, which has to come out of the model as it is.
    """
    seen: dict[str, Tensor] = {}

    def after_decoder(_module: nn.Module, _inputs: Any, output: Any) -> None:
        seen["states"] = output[0]

    def after_head(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen.update(zip(["taken"], inputs, strict=False))
        seen["ramp"] = torch.linspace(-RAMP, RAMP, output.numel(), device=output.device).view_as(output).to(output)
        return seen["ramp"]

    hooks = [(model.get_decoder(), after_decoder), (model.get_output_embeddings(), after_head)]
    with torch.no_grad(), _watched(hooks):
        logits = model(**batch.inputs, use_cache=False).logits
    if seen.keys() != {"states", "taken", "ramp"}:
        return "does not call its decoder and its head"
    if not same(seen["states"], seen["taken"]):
        return "changes its decoder's states before the head"
    if not same(seen["ramp"], logits.to(seen["ramp"].dtype)):
        return "changes the logits after its head, by a scale or a cap"
    return None


def _difference(model: Model, batch: Batch, lean: str, own: str) -> str | None:
    names = ("states", "losses", "gradients")
    for name, found, expected in zip(names, _tried(model, batch, lean), _tried(model, batch, own), strict=True):
        apart, norm = float((found - expected).norm()), float(expected.norm())
        allowed = TOLERANCE.get(expected.dtype, HALF_TOLERANCE) * norm
        if not apart <= allowed:
            return f"gives other {name} when its decoder is called alone (by {apart:.1e}, allowed {allowed:.1e})"
    return None


def _tried(model: Model, batch: Batch, form: str) -> tuple[Tensor, ...]:
    """The decoder's states, the losses in their precision, and the gradient of differently weighted losses by them."""
    states: list[Tensor] = []

    def after_decoder(_module: nn.Module, _inputs: Any, output: Any) -> None:
        states.append(output[0] if output[0].requires_grad else output[0].requires_grad_())

    with torch.enable_grad(), _watched([(model.get_decoder(), after_decoder)]):
        losses = FORMS[form](model, batch)
        weights = torch.linspace(1, 2, len(losses), dtype=losses.dtype, device=losses.device)
        (gradient,) = torch.autograd.grad(losses @ weights, states)
    return states[0].detach(), losses.detach().to(gradient.dtype), gradient


@contextmanager
def _watched(hooks: list[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
