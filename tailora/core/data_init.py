"""What layers see in the user's data, without any full gradient: a probe is an update of rank k that stays zero.

With B = 0 its gradient is G A^T, with A = 0 it is B^T G, for the gradient G of the layer's weight: the two sides from
which subspace iteration (arXiv:0909.4061, alg. 4.4) finds the leading triplets of G. So the memory is that of training
at rank k, the model computes what the base computes, and no kind of layer needs a formula of its own.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tailora.core.attach import attach
from tailora.core.layer import LoRALayer
from tailora.core.spectra import EXACT, EXTRA, Spectrum, gaussian, orthonormal, within
from tailora.core.targets import Target
from tailora.errors import DataError

GRADIENT_PASSES = 4  # over the data, each forward and backward
INPUT_PASSES = 3  # each forward
Pass = Callable[[], None]  # calls the model on all of the data


def gradient_spectra(targets: Mapping[str, Target], run: Pass, wanted: int) -> dict[str, Spectrum]:
    """Leading triplets of each layer's gradient at the base, `wanted` per group and more, exact where k is the size.

    run: forward and backward over all of the data; called GRADIENT_PASSES times.
    """
    probes = {path: _probe(target, wanted) for path, target in targets.items()}
    left: dict[str, Tensor] = {}
    right = {path: gaussian(_rows(probe, probe.lora_A).shape, probe.lora_A) for path, probe in probes.items()}
    with _attached(probes, targets):
        for _ in range(GRADIENT_PASSES // 2):
            for path, probe in probes.items():
                _pose(probe, "A", orthonormal(right[path].mT).mT)
            run()
            _check_finite(probes)
            for path, probe in probes.items():
                left[path] = orthonormal(_columns(probe, _gradient(probe.lora_B)))  # G A^T
                _pose(probe, "B", left[path])
            run()
            _check_finite(probes)
            right = {path: _rows(probe, _gradient(probe.lora_A)) for path, probe in probes.items()}  # B^T G
    return {path: within(left[path], right[path]) for path in targets}


@dataclass(frozen=True)
class Variances:
    """Of a layer's inputs, about their mean: along each principal direction (k,), the directions (k, n), and in all."""

    along: Tensor
    directions: Tensor
    total: float


def input_variances(targets: Mapping[str, Target], run: Pass, wanted: int) -> dict[str, Variances]:
    """Leading principal components of what each layer reads (of a convolution's patches), `wanted` and some more.

    run: forward over all of the data; called INPUT_PASSES times. Layers in groups are not for it.
    """
    found = {path: _Inputs(target, wanted) for path, target in targets.items()}
    for _ in range(INPUT_PASSES):
        hooks = [found[path].watch(target.layer) for path, target in targets.items()]
        try:
            run()
        finally:
            for hook in hooks:
                hook.remove()
        for path, each in found.items():
            if not each.products.isfinite().all():
                raise DataError(f"on these batches the inputs of {path} are not finite")
            each.turn()
    return {path: each.variances() for path, each in found.items()}


def _probe(target: Target, wanted: int) -> LoRALayer:
    """An update that follows `wanted` directions per group and some more."""
    layer, kind = target.layer, target.kind
    groups = kind.groups(layer)
    in_features, out_features = kind.dims(layer)
    k = groups * _count(min(in_features, out_features) // groups, wanted)
    return LoRALayer(
        in_features,
        out_features,
        k,
        lora_alpha=k,  # scale 1
        init_lora_weights=None,
        kind=kind,
        shapes=kind.shapes(layer, k),
        groups=groups,
        device=target.weight.device,
        dtype=_dtype(target),
    )


def _count(size: int, wanted: int) -> int:
    """Directions to carry along: more than wanted, or all where these are few."""
    return size if size <= EXACT else min(size, wanted + EXTRA)


def _dtype(target: Target) -> torch.dtype:
    return torch.float64 if target.weight.dtype == torch.float64 else torch.float32


def _rows(probe: LoRALayer, A: Tensor) -> Tensor:
    """A (k, in/groups, ...) as (groups, k/groups, n)."""
    return A.reshape(probe.groups, probe.r // probe.groups, -1)


def _columns(probe: LoRALayer, B: Tensor) -> Tensor:
    """B (out, k/groups) as (groups, out/groups, k/groups)."""
    return B.reshape(probe.groups, -1, B.shape[-1])


def _pose(probe: LoRALayer, name: str, value: Tensor) -> None:
    """Set one factor, which is fixed; the other is zero and gets a gradient."""
    fixed, free = (probe.lora_A, probe.lora_B) if name == "A" else (probe.lora_B, probe.lora_A)
    fixed.requires_grad_(False).copy_(value.reshape(fixed.shape)).grad = None
    free.requires_grad_(True).grad = None
    free.data.zero_()


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _check_finite(probes: Mapping[str, LoRALayer]) -> None:
    broken = [
        path
        for path, probe in probes.items()
        if not all(_gradient(factor).isfinite().all() for factor in (probe.lora_A, probe.lora_B))
    ]
    if broken:
        raise DataError(
            f"on these batches the gradient of {', '.join(broken[:5])} ({len(broken)} layers) is not finite; look at "
            "the loss of each batch"
        )


@contextmanager
def _attached(probes: Mapping[str, LoRALayer], targets: Mapping[str, Target]) -> Iterator[None]:
    """Within the block each layer runs with its probe alone."""
    before = {path: vars(target.layer)["active_adapters"] for path, target in targets.items()}
    try:
        for path, target in targets.items():
            attach(target.layer, (probes[path],))
        yield
    finally:
        for path, target in targets.items():
            attach(target.layer, before[path])


class _Inputs:
    """Subspace iteration on the covariance C of one layer's inputs: with h = A x, d |h|^2/2 = A x x^T."""

    def __init__(self, target: Target, wanted: int) -> None:
        self.kind = target.kind
        size = target.kind.dims(target.layer)[0]
        k = _count(size, wanted)
        like = torch.empty((), device=target.weight.device, dtype=_dtype(target))
        shape, _ = target.kind.shapes(target.layer, k)
        self.A = orthonormal(gaussian((size, k), like)).T.reshape(shape)
        self.one = torch.eye(k).to(like)  # the B that passes h on
        self._clear()

    def _clear(self) -> None:
        self.products, self.sums = torch.zeros_like(self.A), torch.zeros_like(self.A[:1])  # A sum x x^T, sum x^T
        self.squares, self.count = 0.0, 0

    def watch(self, layer: nn.Module) -> torch.utils.hooks.RemovableHandle:
        return layer.register_forward_pre_hook(lambda module, inputs: self._add(module, inputs[0]))

    def _add(self, layer: nn.Module, x: Tensor) -> None:
        x = x.detach().to(self.A.dtype)
        with torch.enable_grad():
            A = self.A.requires_grad_()
            h = self.kind.update(layer, x, A, self.one)
            (products,) = torch.autograd.grad(h, A, h.detach(), retain_graph=True)
            (sums,) = torch.autograd.grad(h, A, torch.ones_like(h))
        self.products += products
        self.sums += sums[:1]
        self.count += h.numel() // len(A)
        ones = torch.ones_like(self.A[:1])
        self.squares += float(self.kind.update(layer, x.square(), ones, self.one[:1, :1]).double().sum())

    def turn(self) -> None:
        """The next directions, from the pass that is over; and what the present ones have shown."""
        A, products = self.A.detach().flatten(1), self.products.flatten(1)
        mean = self.sums.flatten(1) / max(self.count, 1)  # (1, n)
        spread = products - self.count * (A @ mean.T) @ mean  # A C, (k, n)
        self.total = self.squares - self.count * float(mean.square().sum())
        self.along, turned = torch.linalg.eigh(spread @ A.T)
        self.found = turned.flip(-1).T @ A
        self.along = self.along.flip(-1).clamp(min=0)
        self.A = orthonormal(spread.T).T.reshape(self.A.shape)
        self._clear()

    def variances(self) -> Variances:
        return Variances(self.along, self.found, self.total)
