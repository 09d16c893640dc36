"""From a model and a batch to losses, without logits of all rows where the model allows it.

The lean forms call the decoder, keep its states at supervised positions, and go through the head in chunks. They hold
when the model's logits are head(decoder(...)) and nothing else: no scale, no soft cap. That is found out on the model
itself. What fails takes the model's own logits.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tailora.core.quantization import is_quantized
from tailora.kernels.loss import cross_entropy, frozen_head, recomputed_head


@dataclass(frozen=True, eq=False)
class Batch:
    """What the model is given, and what it shall predict where."""

    inputs: dict[str, Any]  # keyword arguments; input_ids (batch, length)
    wanted: Tensor  # (batch, length), true where a prediction is judged
    targets: Tensor  # (supervised,), in the order of `wanted`
    expected: float = 1.0  # the gradient that each loss will get, as far as known


Model = Any  # of transformers, or a LoRAModel around one
Form = Callable[[Model, Batch], Tensor]  # losses, (supervised,), float32 at least


def _frozen(model: Model, batch: Batch) -> Tensor:
    head = model.get_output_embeddings()
    return frozen_head(_states(model, batch), batch.targets, head.weight, head.bias, batch.expected)


def _recomputed(model: Model, batch: Batch) -> Tensor:
    vocabulary = model.config.get_text_config().vocab_size
    return recomputed_head(_states(model, batch), batch.targets, model.get_output_embeddings(), vocabulary)


def _states(model: Model, batch: Batch) -> Tensor:
    """The decoder's states at supervised positions: (supervised, hidden)."""
    states = model.get_decoder()(**batch.inputs, use_cache=False)[0]  # (batch, length, hidden)
    return _rows(states, batch.wanted)


def _rows(values: Tensor, mask: Tensor) -> Tensor:
    """Where the mask (batch, length) is true. By numbers: a mask as index has no length for a plan to know."""
    return values.flatten(0, 1).index_select(0, mask.flatten().nonzero()[:, 0])


def _own(model: Model, batch: Batch) -> Tensor:
    columns = batch.wanted.any(dim=0).nonzero()[:, 0]  # where some row of the batch is judged
    logits = model(**batch.inputs, use_cache=False, logits_to_keep=columns).logits  # (batch, columns, vocabulary)
    judged = batch.wanted[:, columns]
    return cross_entropy(logits.flatten(0, 1) if judged.all() else _rows(logits, judged), batch.targets)


def _whole(model: Model, batch: Batch) -> Tensor:
    return cross_entropy(_rows(model(**batch.inputs, use_cache=False).logits, batch.wanted), batch.targets)


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


def foreseen_form(model: Model, batch: Batch) -> tuple[str, str | None]:
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
