"""Where PEFT's file keeps what is a matrix of its own here: parts of fused layers, attention, named parameters.

part q of c_attn                  rows of A and columns of B of c_attn; in the rows of other parts B is zero, and a
                                  magnitude is the base's norm
attn.in_proj_weight               attn
attn.out_proj                     attn.base_layer.out_proj
experts.gate_up_proj, .down_proj  experts.base_layer, experts: wrappers, the first parameter in the innermost
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from tailora.core.dora import RowNorms
from tailora.core.fused_layers import OutputSlice
from tailora.core.layer import LoRALayer
from tailora.core.layer_types import host_path, projections


@dataclass(frozen=True)
class Stem:
    """One wrapper of PEFT. `key` is the path that PEFT's patterns for rank and alpha match."""

    name: str
    key: str
    members: dict[str, LoRALayer]  # path -> layer; several are parts of one layer
    scale: float  # that PEFT gives it
    norms: Tensor | None = None  # ||W|| of every row of the layer (out,), where parts of it have magnitudes

    @property
    def is_parameter(self) -> bool:
        return next(iter(self.members.values())).layer_type.stacked

    @property
    def r(self) -> int:
        return sum(layer.r for layer in self.members.values())

    def ratio(self, path: str) -> float:
        """Of the member's scale to the wrapper's."""
        return self.members[path].configured_scaling / self.scale

    def join(self, slot: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """Path -> tensor of the slot, for every member; the wrapper's."""
        if slot == "A":
            return torch.cat(list(tensors.values()), 0)
        if slot == "magnitude" and self.norms is not None:
            return self._with_magnitudes(self.norms, tensors)
        if slot != "B":
            (tensor,) = tensors.values()
            return tensor
        return torch.cat([self._spread(path, B) * self.ratio(path) for path, B in tensors.items()], 1)

    def _with_magnitudes(self, norms: Tensor, magnitudes: Mapping[str, Tensor]) -> Tensor:
        norms = norms.clone()
        for path, magnitude in magnitudes.items():
            norms[self._rows(path).take(torch.arange(len(norms), device=norms.device))] = magnitude.to(norms)
        return norms

    def _rows(self, path: str) -> OutputSlice:
        return cast(OutputSlice, self.members[path].rows)

    def _spread(self, path: str, B: Tensor) -> Tensor:
        rows = self.members[path].rows
        return B if rows is None else rows.spread(B.mT).mT

    def split(self, slot: str, tensor: Tensor, times: int) -> dict[str, Tensor] | None:
        """The inverse of `join`, with ranks `times` those of the members; None for what no `join` gives."""
        if len(self.members) == 1 and next(iter(self.members.values())).rows is None:
            path = next(iter(self.members))
            return {path: tensor / self.ratio(path) if slot == "B" else tensor}
        if slot == "magnitude":
            fits = all(tensor.shape == (self._rows(path).total,) for path in self.members)
            return {path: self._rows(path).take(tensor) for path in self.members} if fits else None
        ranks = [times * layer.r for layer in self.members.values()]
        dim = 0 if slot == "A" else 1
        if tensor.ndim != 2 or tensor.shape[dim] != sum(ranks):
            return None
        pieces = dict(zip(self.members, torch.split(tensor, ranks, dim), strict=True))
        if slot == "A":
            return pieces
        taken = {path: self._taken(path, B) for path, B in pieces.items()}
        return {path: B for path, B in taken.items() if B is not None} if None not in taken.values() else None

    def _taken(self, path: str, B: Tensor) -> Tensor | None:
        rows = self.members[path].rows
        if rows is None or len(B) != rows.total:
            return None
        part = rows.take(B.mT).mT
        return part / self.ratio(path) if self._spread(path, part).equal(B) else None


def stems(model: nn.Module, layers: Mapping[str, LoRALayer]) -> dict[str, Stem]:
    """The wrappers that hold these layers, by name, in the order of the layers."""
    hosts = {path: host_path(model, path) for path in layers}
    together: dict[str, list[str]] = {}
    for path, host in hosts.items():
        together.setdefault(host, []).append(path)
    found: dict[str, Stem] = {}
    scales: dict[str, float] = {}
    for path, layer in layers.items():
        host = hosts[path]
        name = _name(path, host, model.get_submodule(host), layer, together[host])
        key = path if layer.layer_type.stacked else host
        if name in found:
            found[name].members[path] = layer
        else:
            scale = scales.setdefault(key, layer.configured_scaling)
            found[name] = Stem(name, key, {path: layer}, scale, _norms(layer, model.get_submodule(host)))
    return found


def _norms(layer: LoRALayer, host: nn.Module) -> Tensor | None:
    if layer.rows is None or layer.lora_magnitude_vector is None:
        return None
    return RowNorms(host, layer.layer_type, layer.lora_A.dtype).squares.sqrt()


def _name(path: str, host_of: str, host: nn.Module, layer: LoRALayer, together: list[str]) -> str:
    if layer.rows is not None or path == host_of:
        return host_of
    if layer.layer_type.stacked:
        order = [f"{host_of}.{name}" for name, _ in host.named_parameters(recurse=False)]
        outer = [other for other in together if order.index(other) > order.index(path)]
        return host_of + ".base_layer" * len(outer)
    if path.endswith("out_proj"):
        return f"{host_of}.base_layer.out_proj".removeprefix(".")
    return host_of if "in_proj_weight" in projections(host) else path
