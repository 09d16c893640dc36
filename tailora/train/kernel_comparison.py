"""Kernels compared with transformers' own computation, on the user's model: attention, loss and layers.

    obstacle_to_provider   documents of a packed row give the results that each gives alone
    obstacle_to_sharing    so they do if a beginning that they share is computed once
    obstacle_to_form       the loss in chunks equals the loss from the model's logits
    compare_layers         compiled layers give what the layers of transformers give

`train.kernel_choice` chooses by these comparisons. All ranks of a run choose what every rank can do. They agree after
each forward that is tried, because with a sharded base every forward needs all ranks.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tailora.core.attach import Adapted, attached_parts, evaluating
from tailora.core.layer import LoRALayer
from tailora.data.collate import collate_packed
from tailora.data.dataset import Example
from tailora.kernels.attention import PackingError, packed_rows
from tailora.kernels.compiled_layers import CompiledLayers, decoder_layers
from tailora.kernels.device_attention import PROVIDERS
from tailora.kernels.loss import FORMS, Batch, LossForm
from tailora.train.loss import CAUSAL_LM, BatchLayout, make_batch
from tailora.train.parallel import first_of_ranks, forget_forward
from tailora.train.trainable import Trainable, trained_module

TOLERANCES = {  # what is compared -> allowed in float32, float64, and 16 bits, relative to the norm
    # two orders of summation give the demo's model, of 30 layers, logits that differ by .01 to .02 in 16 bits, and
    # gradients that differ by .05 to .09; documents that attend to each other: logits by .13 and more, gradients by .38
    "packed logits": (1e-4, 1e-8, 5e-2),
    "packed gradients": (1e-4, 1e-8, 0.2),
    "loss": (1e-4, 1e-8, 5e-2),  # decoder's states, losses, gradients
    "layers": (1e-3, 1e-5, 0.1),  # float64: transformers computes norms in float32
}


def tolerance(compared: str, dtype: torch.dtype) -> float:
    """Returns the largest relative difference of this kind that is only rounding. compared: a key of TOLERANCES."""
    single, double, half = TOLERANCES[compared]
    return {torch.float32: single, torch.float64: double}.get(dtype, half)


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    difference, norm = float((actual - expected).norm()), float(expected.norm())
    return difference / norm if norm else difference


# ---- Examples to try a model on


LENGTHS = (9, 14)
LONG = 260  # tokens of another document, more than a kernel reads at a time
LONGEST = 512  # of the documents that show a sliding window


def random_documents(config: Any, further: tuple[int, ...] = ()) -> list[Example]:
    """Returns documents of random tokens: of `further` lengths, and two longer than a short sliding window."""
    config = config.get_text_config()
    most = getattr(config, "max_position_embeddings", None) or LONG
    window = getattr(config, "sliding_window", None) or 0
    lengths = [
        *(min(length, most) for length in further),
        *(max(length, window + 2 if window <= LONGEST else 0) for length in LENGTHS),
    ]
    random = np.random.default_rng(0)
    return [Example.of_text(random.integers(config.vocab_size, size=length).astype(np.int32)) for length in lengths]


def parts_of_sample(sample: Example, base: PreTrainedModel) -> list[Example]:
    """Returns two documents from the start of the sample, longer than a sliding window unless that is long."""
    lengths = [len(document.input_ids) for document in random_documents(base.config)]
    parts = np.split(sample.input_ids[: sum(lengths)], [min(lengths[0], len(sample.input_ids) // 2)])
    return [Example.of_text(ids) for ids in parts]


def short_examples(base: PreTrainedModel) -> list[Example]:
    """Returns two short examples of random tokens, of different lengths, partly supervised."""
    ids = np.random.default_rng(0).integers(base.config.get_text_config().vocab_size, size=24).astype(np.int32)
    return [Example.of_text(part, np.arange(len(part)) % 3 > 0) for part in (ids[:10], ids[10:])]


# ---- Attention of packed rows


# What a provider may raise that does not fit the model, the device or the installed packages
REFUSALS = (ValueError, TypeError, RuntimeError, ImportError, OSError)


def obstacle_to_provider(model: PreTrainedModel, provider: str, *, compare: bool, trains: bool = True) -> str | None:
    """Returns why packed rows are not safe with it; None if documents give the results that each gives alone."""
    name, row, refusal = type(model).__name__, PROVIDERS.get(provider), None
    if row is not None and compare and (missing := first_of_ranks(row.obstacle(model.device, model.dtype))):
        return missing
    documents = random_documents(model.config, () if row is None else (LONG,))
    refusals = (PackingError, TypeError) if row is None else REFUSALS  # TypeError: forward has no such parameter
    with evaluating(model):
        try:
            with packed_rows(model, provider):
                together = _packed_results(model, documents, packed=True, gradient=compare and trains)
                if row is not None and compare and not row.has_dropout:
                    model.train()  # the provider raises if the model asks for dropout
                    _packed_results(model, documents, packed=True, gradient=False)
                    model.eval()
        except torch.OutOfMemoryError:
            raise
        except refusals as error:
            forget_forward(model)
            cause, _, _ = str(error).partition("\n")
            refusal = f"{name} does not support them ({cause})"
        if not compare:
            return refusal
        if (refusal := first_of_ranks(refusal)) is not None:
            return refusal
        alone = [_packed_results(model, [document], packed=False, gradient=trains) for document in documents]
    return first_of_ranks(_packing_difference(model, together, alone))


def _packing_difference(
    model: PreTrainedModel, together: tuple[Tensor, ...], alone: Sequence[tuple[Tensor, ...]]
) -> str | None:
    """Returns how the results of packed documents differ from separate ones; None if they do not."""
    for what, actual, parts in zip(("logits", "gradients"), together, zip(*alone, strict=True), strict=False):
        difference, allowed = relative_difference(actual, torch.cat(parts)), tolerance(f"packed {what}", model.dtype)
        if not difference <= allowed:
            refusal = f"{type(model).__name__} returns different {what} for packed documents"
            return f"{refusal} (difference {difference:.1e}, allowed {allowed:.0e})"
    return None


SHARED = 4  # tokens with which the documents begin that show whether beginnings can be shared


def obstacle_to_sharing(model: PreTrainedModel, provider: str) -> str | None:
    """Returns why beginnings that packed documents share are not computed once; None if the logits are the same."""
    first, second = (document.input_ids for document in random_documents(model.config))
    documents = [
        Example.of_text(ids, np.arange(len(ids)) > SHARED)
        for ids in (first, np.concatenate([first[:SHARED], second[SHARED:]]))
    ]
    refusal, results = None, list[tuple[Tensor, ...]]()
    with evaluating(model), packed_rows(model, provider):
        try:
            for share in (False, True):
                results.append(_packed_results(model, documents, packed=True, gradient=False, share=share))
        except torch.OutOfMemoryError:
            raise
        except REFUSALS as error:
            forget_forward(model)
            cause, _, _ = str(error).partition("\n")
            refusal = f"{type(model).__name__} does not support it ({cause})"
    if (refusal := first_of_ranks(refusal)) is not None:
        return refusal
    return first_of_ranks(_packing_difference(model, results[1], results[:1]))


def _packed_results(
    model: PreTrainedModel, documents: list[Example], packed: bool, gradient: bool, share: bool = False
) -> tuple[Tensor, ...]:
    """Returns logits (total, vocabulary), and the gradient of weighted logits by the embeddings, (total, hidden)."""
    row = collate_packed(documents, share=share)
    names = row.keys() - {"labels"} if packed else {"input_ids"}
    inputs = {name: row[name].to(model.device) if isinstance(row[name], Tensor) else row[name] for name in names}
    states: list[Tensor] = []

    def after_embedding(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        states.append(output.detach().requires_grad_())
        return states[-1]

    hook = model.get_input_embeddings().register_forward_hook(after_embedding) if gradient else nullcontext()
    with torch.set_grad_enabled(gradient), hook:
        logits = model(**inputs, use_cache=False).logits[0].float()
    if share:
        logits = logits.index_select(0, row["document_tokens"])
    if not states:  # or the model reads its embeddings without calling them
        return (logits.detach(),)
    weights = torch.linspace(-1, 1, logits.shape[1], device=logits.device)
    (slope,) = torch.autograd.grad((logits @ weights).sum(), states[:1])
    return logits.detach(), slope[0].float()


# ---- Form of the loss


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
RAMP = 1e3  # logits from -RAMP to RAMP show a soft cap, a scale or a bound that small ones do not


def obstacle_to_form(model: Any, batch: Batch, chunked: LossForm, own: LossForm, *, compare: bool) -> str | None:
    """Returns why a chunked form does not give the losses and gradients of the model's own; None if it does.

    compare: see `kernel_choice.choose_layout`; without it all ranks see the same.
    """
    if not compare:
        return _structural_obstacle(model, batch) or _change_around_head(model, batch, compare)
    return (
        first_of_ranks(_structural_obstacle(model, batch))
        or first_of_ranks(_change_around_head(model, batch, compare))
        or first_of_ranks(_loss_difference(model, batch, chunked, own))
    )


def _structural_obstacle(model: Any, batch: Batch) -> str | None:
    """Returns why decoder and head cannot be called alone; None if they can."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    head = model.get_output_embeddings()
    if decoder is None or decoder is model:
        return "has no separate decoder"
    if head is None:
        return "has no output head"
    if _hooked(model) or _hooked(head):
        return "or its head has hooks"
    try:
        inspect.signature(decoder.forward).bind(**batch.inputs, use_cache=False)
    except TypeError as error:
        return f"passes different inputs to its decoder ({error})"
    return None


def _hooked(module: nn.Module) -> bool:
    """True if a call of the module runs something else: hooks, or a replaced `forward`."""
    return "forward" in vars(module) or any(vars(module)[name] for name in HOOKS)


def _change_around_head(model: Any, batch: Batch, compare: bool) -> str | None:
    """Returns what the model does to the states before its head, or to the logits after it; None if nothing.

    The head's output is replaced by a ramp, which has to come out of the model unchanged.
    """

    def same(a: Tensor, b: Tensor) -> bool:
        return a.dtype == b.dtype and torch.equal(a, b) if compare else a.untyped_storage() is b.untyped_storage()

    seen: dict[str, Tensor] = {}

    def after_decoder(_module: nn.Module, _inputs: Any, output: Any) -> None:
        seen["states"] = output[0]

    def after_head(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen.update(zip(["head_input"], inputs, strict=False))
        seen["ramp"] = torch.linspace(-RAMP, RAMP, output.numel(), device=output.device).view_as(output).to(output)
        return seen["ramp"]

    decoder, head = model.get_decoder(), model.get_output_embeddings()
    with torch.no_grad(), decoder.register_forward_hook(after_decoder), head.register_forward_hook(after_head):
        logits = model(**batch.inputs, use_cache=False).logits
    if seen.keys() != {"states", "head_input", "ramp"}:
        return "does not call both its decoder and its head"
    if not same(seen["states"], seen["head_input"]):
        return "changes the decoder's hidden states before the head"
    if not same(seen["ramp"], logits.to(seen["ramp"].dtype)):
        return "scales or caps the logits after its head"
    return None


def _loss_difference(model: Any, batch: Batch, chunked: LossForm, own: LossForm) -> str | None:
    """Returns how states, losses or gradients differ when the decoder is called alone; None if they do not."""
    expected = _loss_results(model, batch, own)
    for name, actual in _loss_results(model, batch, chunked).items():
        difference, allowed = relative_difference(actual, expected[name]), tolerance("loss", actual.dtype)
        if not difference <= allowed:
            sizes = f"difference {difference:.1e}, allowed {allowed:.0e}"
            return f"returns different {name} when its decoder is called alone ({sizes})"
    return None


def _loss_results(model: Any, batch: Batch, form: LossForm) -> dict[str, Tensor]:
    """Returns the decoder's states, the losses in their precision, and the gradient of weighted losses by them."""
    states: list[Tensor] = []

    def after_decoder(_module: nn.Module, _inputs: Any, output: Any) -> None:
        states.append(output[0] if output[0].requires_grad else output[0].requires_grad_())

    with torch.enable_grad(), model.get_decoder().register_forward_hook(after_decoder):
        losses = FORMS[form](model, batch)
        weights = torch.linspace(1, 2, len(losses), dtype=losses.dtype, device=losses.device)
        (gradient,) = torch.autograd.grad(losses @ weights, states)
    return {"states": states[0].detach(), "losses": losses.detach().to(gradient.dtype), "gradients": gradient}


# ---- Layers


SPREAD = 0.02  # standard deviation of factors that start at zero, while gradients are compared


def compare_layers(
    model: Trainable, examples: Sequence[Example], layout: BatchLayout, compiled: CompiledLayers
) -> tuple[str | None, str]:
    """Returns why the layers are not right on this model, and how it is known that they are.

    Compared are what each layer adds to its input, and the gradients of the input and of the factors.
    """
    base, differences = cast(PreTrainedModel, model.base_model), [0.0]
    # nothing is drawn at random; a model without dropout stays in training mode, for which compiled code is made
    in_mode = evaluating(model) if has_dropout(base) else nullcontext()
    with in_mode, zeros_randomized(model), layout.used_by(base):
        for layer, inputs, arguments in calls_of_layers(model, decoder_layers(base), examples, layout):
            plain = outputs_and_gradients(layer, inputs, arguments)
            with compiled.used_by([layer]):
                other = outputs_and_gradients(layer, inputs, arguments)
            if any((a is None) != (b is None) for a, b in zip(plain, other, strict=True)):
                return "transformers' layers do not call every adapted layer, but compiled ones would", ""
            pairs = [(a, b) for a, b in zip(plain, other, strict=True) if a is not None and b is not None and a.any()]
            differences += [relative_difference(b, a) for a, b in pairs]
    largest, allowed = float(np.max(differences)), tolerance("layers", base.dtype)  # NaN if one of them is
    if not largest <= allowed:
        return f"their results differ from transformers' layers by {largest:.0e} (allowed: {allowed:.0e})", ""
    return None, (
        "checked against the layers of transformers: outputs and gradients differ by at most "
        f"{largest:.0e} (relative, allowed: {allowed:.0e})"
    )


def has_dropout(base: nn.Module) -> bool:
    adapters = (part for module in base.modules() if isinstance(module, Adapted) for part in module.adapter_parts)
    return (
        any(isinstance(adapter, LoRALayer) and adapter.lora_dropout > 0 for adapter in adapters)
        or any(isinstance(module, nn.Dropout) and module.p > 0 for module in base.modules())
        or any(getattr(module, "attention_dropout", 0) for module in base.modules())
    )


LayerCall = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]  # its inputs: x (batch, tokens, hidden), others


def calls_of_layers(
    model: Trainable, layers: Sequence[nn.Module], examples: Sequence[Example], layout: BatchLayout
) -> list[LayerCall]:
    calls: list[LayerCall] = []

    def note(layer: nn.Module, inputs: tuple[Any, ...], arguments: dict[str, Any]) -> None:
        calls.append((layer, inputs, arguments))

    with ExitStack() as hooks, torch.no_grad():
        for layer in layers:
            hooks.enter_context(layer.register_forward_pre_hook(note, with_kwargs=True))
        CAUSAL_LM.outputs(model, make_batch(examples, layout, next(model.parameters()).device), layout)
    return calls


def outputs_and_gradients(layer: nn.Module, inputs: tuple[Any, ...], arguments: dict[str, Any]) -> list[Tensor | None]:
    """Returns what the layer adds to its input and to its gradient, and its factors' gradients (None: unused)."""
    parts = [part for module in layer.modules() if isinstance(module, Adapted) for part in attached_parts(module)]
    factors = [parameter for part in parts for parameter in part.parameters()]
    x, others = inputs[0].detach(), inputs[1:]
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), device="cpu").to(x)
    with torch.enable_grad():
        x = x.requires_grad_()
        y = layer(x, *others, **arguments)
        y = y[0] if isinstance(y, tuple) else y
        dx, *gradients = torch.autograd.grad(y, [x, *factors], weights, allow_unused=True)
    return [(y - x).detach().float(), (dx - weights).float(), *gradients]


@contextmanager
def zeros_randomized(model: Trainable) -> Iterator[None]:
    """Within the block, factors that are zero are random, so that no gradient that is compared is zero."""
    layers = [layer for layer in trained_module(model).modules() if isinstance(layer, LoRALayer)]
    factors = [factor for layer in layers for factor in (layer.lora_A, layer.lora_B)]
    zeros = [factor for factor in factors if not factor.any()]
    generator = torch.Generator().manual_seed(0)
    try:
        for factor in zeros:
            factor.data.copy_(torch.randn(factor.shape, generator=generator, device="cpu").mul_(SPREAD))
        yield
    finally:
        for factor in zeros:
            factor.data.zero_()
