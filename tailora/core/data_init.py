"""What layers see in the user's data, without any full gradient: a probe is an update of rank k that stays zero.

With B = 0 its gradient is G A^T, with A = 0 it is B^T G, for the gradient G of the layer's weight: the two sides from
which subspace iteration (arXiv:0909.4061, alg. 4.4) finds the leading triplets of G. So the memory is that of training
at rank k, the model computes what the base computes, and no kind of layer needs a formula of its own.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tailora.core.adalora import scale_kept, with_ranks
from tailora.core.adapter import Adapter, low_rank_layer
from tailora.core.attach import attach
from tailora.core.config import LoRAConfig
from tailora.core.init import FROM_GRADIENT, MOVED
from tailora.core.layer import LoRALayer
from tailora.core.low_rank import EXACT, EXTRA, Spectrum, gaussian, orthonormal, within
from tailora.core.targets import Target, target_at
from tailora.errors import ConfigError, DataError

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
    layer, layer_type = target.layer, target.layer_type
    groups = layer_type.groups(layer)
    in_features, out_features = layer_type.dims(layer)
    k = groups * _count(min(in_features, out_features) // groups, wanted)
    return LoRALayer(
        in_features,
        out_features,
        k,
        lora_alpha=k,  # scale 1
        init_lora_weights=None,
        layer_type=layer_type,
        shapes=layer_type.shapes(layer, k),
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
        self.layer_type = target.layer_type
        size = target.layer_type.dims(target.layer)[0]
        k = _count(size, wanted)
        like = torch.empty((), device=target.weight.device, dtype=_dtype(target))
        shape, _ = target.layer_type.shapes(target.layer, k)
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
            h = self.layer_type.update(layer, x, A, self.one)
            (products,) = torch.autograd.grad(h, A, h.detach(), retain_graph=True)
            (sums,) = torch.autograd.grad(h, A, torch.ones_like(h))
        self.products += products
        self.sums += sums[:1]
        self.count += h.numel() // len(A)
        ones = torch.ones_like(self.A[:1])
        self.squares += float(self.layer_type.update(layer, x.square(), ones, self.one[:1, :1]).double().sum())

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


# ---- Starting an adapter from the user's data: the gradient's directions (LoRA-GA, LoRA-One), the inputs' (EVA).


Loss = Callable[[Any, Any], Tensor]  # (model, batch) -> scalar


def started(adapter: Adapter, base_model: nn.Module, run: Pass, rho: float) -> Adapter:
    """The adapter with the start that its config names; `run` calls the base on the data, backward included.

    Gradient starts fill the layers in place; EVA makes new ones of the ranks that it finds.
    Raises DataError where the data says nothing about a layer, ConfigError for rho below 1.
    """
    if rho < 1:
        raise ConfigError(f"rho = {rho}: a layer may get up to rho r ranks; take 1 (none moves) or more")
    targets = {
        path: replace(target_at(base_model, path, adapter.config), r=layer.r, lora_alpha=layer.lora_alpha)
        for path, layer in adapter.low_rank.items()
    }
    name = adapter.config.init_lora_weights
    if name == "eva":
        return _eva(adapter, targets, run, rho)
    spectra = gradient_spectra(targets, run, 2 * max(target.r for target in targets.values()))
    _check_reached({path: found.S[..., 0].min() for path, found in spectra.items()}, "gradient")
    for path, layer in adapter.low_rank.items():
        _start_at_gradient(layer, spectra[path], name)
    return replace(adapter, waits=False)


@torch.no_grad()
def _start_at_gradient(layer: LoRALayer, gradient: Spectrum, name: str) -> None:
    A, B = FROM_GRADIENT[name](gradient, layer.r // layer.groups)
    A, B = A.reshape(layer.lora_A.shape), B.reshape(layer.lora_B.shape)
    if name in MOVED:
        layer.start_from(A, B)
    else:
        layer.lora_A.copy_(A)
        layer.lora_B.copy_(B)


def _eva(adapter: Adapter, targets: Mapping[str, Target], run: Pass, rho: float) -> Adapter:
    """A: the first principal directions of the inputs; ranks where they explain most (arXiv:2410.07170, sec. 3)."""
    found = input_variances(targets, run, int(rho * max(target.r for target in targets.values())))
    _check_reached({path: each.along[0] for path, each in found.items()}, "varying input")
    most = {path: min(int(rho * target.r), *target.dims) for path, target in targets.items()}
    ranks = shared_out(found, {path: target.r for path, target in targets.items()}, most)
    config = with_ranks(adapter.config, adapter.low_rank, ranks)
    layers = {}
    for path, target in targets.items():
        old = adapter.low_rank[path]
        resized = replace(target, r=ranks[path], lora_alpha=scale_kept(old, ranks[path]))
        layers[path] = low_rank_layer(resized, config, fresh=False)
        layers[path].lora_A.data.copy_(found[path].directions[: ranks[path]].reshape(layers[path].lora_A.shape))
        layers[path].train(old.training)
    return Adapter(config, layers, adapter.saved, adapter.extras)


def shared_out(found: Mapping[str, Variances], ranks: Mapping[str, int], most: Mapping[str, int]) -> dict[str, int]:
    """As many ranks in all as before, to the components that explain the largest share of their layer's variance.

    arXiv:2410.07170, eq. 5 and alg. 1; a layer keeps one at least and gets `most` at most.
    """
    shares = [
        (float(variance) / found[path].total, path) for path in ranks for variance in found[path].along[1 : most[path]]
    ]
    best = sorted(shares, key=lambda share: -share[0])[: sum(ranks.values()) - len(ranks)]
    return {path: 1 + sum(owner == path for _, owner in best) for path in ranks}


def _check_reached(largest: Mapping[str, Tensor], what: str) -> None:
    if silent := [path for path, value in largest.items() if value == 0]:
        raise DataError(
            f"these batches say nothing about {', '.join(silent[:5])} ({len(silent)} layers): the {what} is zero. "
            "Give more batches, exclude_modules, or init_lora_weights='kaiming'"
        )


def passes(model: nn.Module, batches: Iterable[Any], loss: Loss | None, config: LoRAConfig) -> Pass:
    """One call of the result runs the model, in evaluation mode, on every batch. Raises DataError without any."""
    held: Sequence[Any] = list(batches)
    if not held:
        raise DataError("start_from_data got no batch; give a few, such as list(islice(loader, 8))")
    backward = config.init_lora_weights in FROM_GRADIENT

    def run() -> None:
        with torch.set_grad_enabled(backward):
            for batch in held:
                if loss is not None:
                    value = loss(model, batch)
                else:
                    value = called(model, batch) if not backward else own_loss(called(model, batch))
                if backward:
                    value.backward()  # type: ignore[no-untyped-call]

    return run


def called(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    raise DataError(
        f"a batch is a {type(batch).__name__}, which does not say how to call the model; give tensors or mappings of "
        "its arguments, or loss=lambda model, batch: ..."
    )


def own_loss(output: Any) -> Tensor:
    """The loss that a model returns itself."""
    value = output if isinstance(output, Tensor) else getattr(output, "loss", None)
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise DataError(
            "the model returned no loss for these batches; put labels into them, or give "
            "loss=lambda model, batch: ..., which returns one number"
        )
    return value
