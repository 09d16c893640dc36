"""The run's model without its weights: what would be trained, how it would be computed, what its weights would take.

Everything is made by the code that makes the real one, on tensors without contents (`train.ledger`), from config.json
alone. What a run decides by comparing numbers is foreseen from the model's structure, and may turn out otherwise.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from tailora.core.layer_types import CONV1D, kind_of
from tailora.core.modes import evaluating
from tailora.core.quantization import held_parts
from tailora.errors import ConfigError
from tailora.formats.load import settings_of
from tailora.formats.recognise import read_any
from tailora.kernels.attention import packed_rows
from tailora.kernels.forms import foreseen_form, own_form
from tailora.model import LoRAModel
from tailora.train.config import TrainConfig
from tailora.train.kernel_choice import Kernels, described, obstacle_to_kernels
from tailora.train.ledger import without_contents
from tailora.train.load import check_unquantized, precision_of
from tailora.train.loss import Rows, as_batch
from tailora.train.model_loading import STORED, Stored
from tailora.train.packing import choose, packed_logits, probes
from tailora.train.setup import some_examples
from tailora.train.subject import Subject
from tailora.train.trainable import FullModel


@dataclass(frozen=True)
class Weights:
    """Bytes of the base. On a CPU, what the files hold in the precision asked for is not copied but mapped, page by
    page, and a mapping stays as long as one tensor of it does.
    """

    held: int  # as stored
    while_read: int  # on top, until all is there
    left_mapped: int  # on top, afterwards: of a quantised base what was quantised


@dataclass(frozen=True, eq=False)
class Skeleton:
    """model: what trains.    notes: what was foreseen about how."""

    model: Subject
    rows: Rows
    kernels: Kernels
    weights: Weights
    notes: list[str]

    @property
    def base(self) -> PreTrainedModel:
        return cast(PreTrainedModel, self.model.base_model)


@contextmanager
def skeleton(config: TrainConfig, shape: PretrainedConfig, device: torch.device) -> Iterator[Skeleton]:
    """The model of this shape that `config` would train on `device`; nothing has contents within the block.

    Raises ConfigError, TargetError, FormatError.
    """
    if config.quantize is not None:
        check_unquantized(shape, config.model, config.quantize)
    with without_contents():
        model, weights = subject(config, shape, device)
        base = cast(PreTrainedModel, model.base_model)
        rows, notes = _rows(config, model)
        reason = obstacle_to_kernels(config.fast, base, rows, device)
        kernels = described(base, rows, device, reason, "to be verified")
        yield Skeleton(model, rows, kernels, weights, notes)


def subject(config: TrainConfig, shape: PretrainedConfig, device: torch.device) -> tuple[Subject, Weights]:
    """What trains, and what its base takes. Raises as `skeleton`."""
    base = _base(config, shape, device)
    weights = _weights(base, _stored_in(shape), None if config.quantize is None else STORED[config.quantize])
    return _subject(config, base), weights


def _base(config: TrainConfig, shape: PretrainedConfig, device: torch.device) -> PreTrainedModel:
    precision = precision_of(config.dtype, device.type)
    try:
        with device:
            base: PreTrainedModel = AutoModelForCausalLM.from_config(shape, dtype=precision)
    except ValueError as error:
        raise ConfigError(f"model {config.model!r} is no causal language model: {error}") from error
    return base.eval()


def _subject(config: TrainConfig, base: PreTrainedModel) -> Subject:
    if config.method == "full":
        return FullModel(base, cast(Any, None), lambda: base).train()
    own = settings_of(read_any(Path(config.adapter), base), base) if config.adapter else config.lora()
    return LoRAModel(base, own, fresh=False).train()


def _rows(config: TrainConfig, model: Subject) -> tuple[Rows, list[str]]:
    """How examples will be read and losses computed, as far as the model's structure tells."""
    base = cast(PreTrainedModel, model.base_model)
    plain = model.disable_adapter() if isinstance(model, LoRAModel) else nullcontext()  # they change neither
    with evaluating(model), torch.no_grad(), plain:
        packing = choose(base, config.packing, _refusal)
        batch, _ = as_batch(some_examples(base), packing.on, 0, base.device)
        with packed_rows(base) if packing.on else nullcontext():
            loss, obstacle = foreseen_form(base, batch) if config.fast == "auto" else (own_form(base), None)
    told = [packing.note, obstacle and f"the loss is computed {loss}, which takes more memory: {obstacle}"]
    return Rows(packing.on, loss, 0), [note for note in told if note]


def _refusal(base: PreTrainedModel) -> str | None:
    found = packed_logits(base, probes(base.config))
    return found if isinstance(found, str) else None


# ---- weights, and quantised layers by what they take


def _stored_in(shape: PretrainedConfig) -> torch.dtype:
    """The precision of the files, as config.json tells it."""
    told = getattr(shape, "dtype", None) or torch.float32
    dtype: torch.dtype = getattr(torch, told) if isinstance(told, str) else told
    return dtype


def _weights(base: PreTrainedModel, stored_in: torch.dtype, stored: Stored | None) -> Weights:
    """With `stored`, lets the linear layers compute as quantised ones do."""
    head = base.get_output_embeddings()
    layers = [module for module in base.modules() if stored and module is not head and _linear(module)]
    packed = {id(layer.weight): stored.bytes(cast(Tensor, layer.weight)) for layer in layers if stored}
    for layer in layers:
        layer.__class__ = _thawing(type(layer))
        layer.__dict__["stored"] = stored
    tensors = [tensor for _, tensor, _ in held_parts(base)]
    held = sum(packed.get(id(tensor), tensor.nbytes) for tensor in tensors)
    if base.dtype != stored_in:  # converted, and the files let go
        return Weights(held, sum(parameter.numel() for parameter in base.parameters()) * stored_in.itemsize, 0)
    apart = sum(tensor.nbytes for tensor in tensors if id(tensor) in packed)
    return Weights(held, apart, apart)


def _linear(module: nn.Module) -> bool:
    kind = kind_of(module)
    return kind is not None and kind.linear


class _Thawing:
    """A linear layer that makes its dense weight anew for every product."""

    stored: Stored

    def forward(self, x: Tensor) -> Tensor:
        layer = cast(Any, self)
        columns = kind_of(layer) is CONV1D
        y: Tensor = _Thawed.apply(x, layer.weight.T if columns else layer.weight, layer.bias, self.stored)  # type: ignore[no-untyped-call]
        return y


class _Thawed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stored: Stored) -> Tensor:
        dense = torch.empty_like(weight)
        ctx.save_for_backward(*([dense] if stored.keeps_dense else []))
        ctx.like = weight
        y = F.linear(x, dense, bias)
        del dense
        torch.empty(int(stored.per_output * y.numel()), dtype=torch.uint8, device=y.device)  # gone at once
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        dense = ctx.saved_tensors[0] if ctx.saved_tensors else torch.empty_like(ctx.like)
        return gradients[0] @ dense, None, None, None


def _derive(cls: type[nn.Module]) -> type[nn.Module]:
    return type(f"Thawing{cls.__name__}", (_Thawing, cls), {"__module__": __name__})


_thawing: Callable[[type[nn.Module]], type[nn.Module]] = cast(Any, cache(_derive))
