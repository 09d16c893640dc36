"""Whether a file computes what the live model computes: its logits, read back, against the model's.

In float32, whatever the weights are in: a bfloat16 forward of the demo's model is 3% (text) to 8% (random tokens) off
its float32 one, and one of 4 bits on a CPU rounds more, which would hide what a file has wrong. A layer's weights are
wide while it runs, and no longer; a quantised one is a plain one with the dequantised weight while its parent runs.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tailora.core.adapter import Adapter, by_host
from tailora.core.attach import Swapped, attach
from tailora.core.dequantize import Change, as_linear
from tailora.core.layer_types import host_path
from tailora.core.modes import evaluating
from tailora.core.quantization import quantized_layers
from tailora.errors import FormatError

TOLERANCE = 1e-4  # of the logits' size: float32 sums in another order
ROWS, LENGTH = 2, 16


@dataclass(frozen=True)
class Comparison:
    """Root mean squares over all logits of a small batch, as shares of the live model's.

    difference: between the file and the live model.    effect: between the live model and its base.
    """

    difference: float
    effect: float
    tolerance: float

    def check(self, what: str, remedy: str) -> None:
        """Raises FormatError above the tolerance, and for what is not a number."""
        if not self.difference <= self.tolerance:
            raise FormatError(
                f"{what}: read back, its logits differ from the live model's by {self.difference:.2g} of their size; "
                f"allowed is {self.tolerance:.2g}, and the adapter's own effect is {self.effect:.2g}. Nothing was "
                f"written; {remedy}"
            )


def compare(live: Tensor, base: Tensor, again: Tensor, *, rounded: bool) -> Comparison:
    """Three times the logits of one batch. Raises FormatError for logits that are not finite.

    rounded: the update was added to weights of 16 bits; half of its effect may go.
    """
    size = _rms(live)
    if not 0 < size < math.inf:
        raise FormatError(f"the live model's logits have a size of {size}: there is nothing to compare with")
    effect = _rms(live - base) / size
    return Comparison(_rms(again - live) / size, effect, max(TOLERANCE, effect / 2 if rounded else 0))


def probe(base_model: Any) -> Tensor:
    """(rows, length) ids from all over the vocabulary. Raises FormatError for a model that takes no ids."""
    vocabulary = getattr(getattr(base_model, "config", None), "vocab_size", None)
    if not isinstance(vocabulary, int):
        raise FormatError(
            f"{type(base_model).__name__} has no config.vocab_size, so there is nothing to compare it with after "
            "export; save_adapter and merge work for every module"
        )
    ids = torch.arange(1, ROWS * LENGTH + 1) * 7919 % vocabulary  # a prime: no pattern
    return ids.view(ROWS, LENGTH).to(next(base_model.parameters()).device)


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    """(rows, length, vocabulary), float32, in evaluation; modes and weights of all modules are put back."""
    with evaluating(model), widened(model):
        found: Tensor = model(input_ids=ids, use_cache=False).logits
    return found.float()


@contextmanager
def widened(model: nn.Module) -> Iterator[None]:
    """Every module's own parameters are float32 while it runs, and its quantised children plain layers of float32."""
    handles = []
    packed = {id(layer) for layer in quantized_layers(model).values()}
    for module in model.modules():
        narrow = {name: each for name, each in module._parameters.items() if each is not None}
        if id(module) in packed:
            del narrow["weight"]
        if any(each.dtype != torch.float32 for each in narrow.values()):
            handles.append(module.register_forward_pre_hook(partial(_widen, narrow)))
            handles.append(module.register_forward_hook(partial(_narrow, narrow), always_call=True))
        if children := [child for child in module.children() if id(child) in packed]:
            undo: list[Change] = []
            handles.append(module.register_forward_pre_hook(partial(_unpack, children, undo)))
            handles.append(module.register_forward_hook(partial(_pack, undo), always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _widen(narrow: dict[str, nn.Parameter], module: nn.Module, _: Any) -> None:
    module._parameters.update({name: nn.Parameter(each.float(), False) for name, each in narrow.items()})


def _narrow(narrow: dict[str, nn.Parameter], module: nn.Module, *_: Any) -> None:
    module._parameters.update(narrow)


def _unpack(children: list[nn.Module], undo: list[Change], *_: Any) -> None:
    for child in children:
        undo += [change.make() for change in as_linear(child)]


def _pack(undo: list[Change], *_: Any) -> None:
    while undo:
        undo.pop().make()


@contextmanager
def only(base_model: nn.Module, adapter: Adapter | None) -> Iterator[nn.Module]:
    """The base with this adapter and no other within the block; its layers must be those of an adapter it has."""
    before = {module: vars(module)["active_adapters"] for module in base_model.modules() if isinstance(module, Swapped)}
    parts = adapter.parts if adapter else {}
    try:
        for module in before:
            attach(module, ())
        hosts = {path: host_path(base_model, path) for path in parts}
        for host, each in by_host(hosts, {path: (part,) for path, part in parts.items()}).items():
            attach(base_model.get_submodule(host), each)
        with evaluating(nn.ModuleList(parts.values())):
            yield base_model
    finally:
        for module, active in before.items():
            attach(module, active)


def _rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())
