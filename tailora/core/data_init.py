"""Initial values of A and B from the user's data: directions of the gradient (LoRA-GA, LoRA-One) or of inputs (EVA).

`start_from_data` initialises an adapter. It calls the model on all batches a few times (`passes`), and finds

    gradient_spectra     the leading singular triplets of the gradient G of every layer's weight
    input_variances      the principal components of every layer's inputs

without any full gradient or covariance, by subspace iteration (arXiv:0909.4061, alg. 4.4) on a probe: an update of
rank k with one factor zero, so that the model computes what the base computes. With B = 0 the gradient of B is G A^T,
with A = 0 that of A is B^T G. So the memory is that of training at rank k, for any layer type.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tailora.core.adalora import alpha_at_same_scale, with_ranks
from tailora.core.adapter import Adapter, adapter_dtype, low_rank_layer
from tailora.core.attach import attached
from tailora.core.config import LoRAConfig
from tailora.core.device import read_together, wide_dtype
from tailora.core.init import DATA_INITS, GRADIENT_INITS, WITH_FROZEN_START
from tailora.core.layer import LoRALayer
from tailora.core.layer_types import computing_device
from tailora.core.low_rank import EXACT, EXTRA, Spectrum, gaussian, orthonormal, triplets_in_basis
from tailora.core.targets import Target, target_at
from tailora.errors import AdapterError, ConfigError, DataError

GRADIENT_PASSES = 4  # over the data, each forward and backward
INPUT_PASSES = 3  # each forward
Pass = Callable[[], None]  # calls the model on all of the data
Loss = Callable[[Any, Any], Tensor]  # (model, batch) -> scalar


def start_from_data(adapter: Adapter, base_model: nn.Module, run: Pass, rho: float) -> Adapter:
    """Returns the adapter with the initial values that its config names.

    Gradients fill its layers in place; EVA makes new layers, of the ranks that it finds.
    run: calls the base on the data, backward included.    rho: EVA gives a layer up to rho times its rank.
    Raises DataError if the gradient of a layer is zero or its input does not vary, ConfigError for rho below 1.
    """
    if rho < 1:
        raise ConfigError(f"rho = {rho}: a layer may get up to rho r ranks; take 1 (none moves) or more")
    targets = {
        path: replace(target_at(base_model, path, adapter.config), r=layer.r, lora_alpha=layer.lora_alpha)
        for path, layer in adapter.low_rank.items()
    }
    init = adapter.config.init_lora_weights
    if init == "eva":
        return _init_from_inputs(adapter, targets, run, rho)
    spectra = gradient_spectra(targets, run, 2 * max(target.r for target in targets.values()))
    _check_not_zero({path: gradient.S[..., 0].min() for path, gradient in spectra.items()}, "gradient")
    for path, layer in adapter.low_rank.items():
        A, B = GRADIENT_INITS[init](spectra[path], layer.r // layer.groups)
        A, B = A.reshape(layer.lora_A.shape), B.reshape(layer.lora_B.shape)
        if init in WITH_FROZEN_START:
            layer.start_from(A, B)
        else:
            layer.lora_A.data.copy_(A)
            layer.lora_B.data.copy_(B)
    return replace(adapter, waits_for_data=False)


def _init_from_inputs(adapter: Adapter, targets: Mapping[str, Target], run: Pass, rho: float) -> Adapter:
    """EVA: A holds principal directions of the inputs, ranks go where they explain most (arXiv:2410.07170, sec. 3)."""
    variances = input_variances(targets, run, int(rho * max(target.r for target in targets.values())))
    _check_not_zero({path: inputs.along[0] for path, inputs in variances.items()}, "varying input")
    limits = {path: min(int(rho * target.r), *target.dims) for path, target in targets.items()}
    ranks = distribute_ranks(variances, {path: target.r for path, target in targets.items()}, limits)
    config = with_ranks(adapter.config, adapter.low_rank, ranks)
    layers = {}
    for path, target in targets.items():
        old, r = adapter.low_rank[path], ranks[path]
        layer = low_rank_layer(replace(target, r=r, lora_alpha=alpha_at_same_scale(old, r)), config, fresh=False)
        layer.lora_A.data.copy_(variances[path].directions[:r].reshape(layer.lora_A.shape))
        layer.lora_B.data.zero_()
        layers[path] = layer.train(old.training)
    return Adapter(config, layers, adapter.saved, adapter.extras)


def _check_not_zero(largest: Mapping[str, Tensor], quantity: str) -> None:
    values = read_together(list(largest.values()))
    if zero := [path for path, value in zip(largest, values, strict=True) if value == 0]:
        raise DataError(
            f"these batches say nothing about {', '.join(zero[:5])} ({len(zero)} layers): the {quantity} is zero. "
            "Give more batches, exclude_modules, or init_lora_weights='kaiming'"
        )


def _check_finite(values: Mapping[str, Tensor], quantity: str) -> None:
    """Raises DataError with every layer whose value is not finite. quantity: what it is of the layer."""
    flags = read_together([value.isfinite().all() for value in values.values()])
    if broken := [path for path, flag in zip(values, flags, strict=True) if not flag]:
        raise DataError(
            f"on these batches {quantity} {', '.join(broken[:5])} ({len(broken)} layers) is not finite; look at the "
            "loss of each batch"
        )


# ---- Calling the model on the data


def passes(model: nn.Module, batches: Iterable[Any], loss: Loss | None, name: str, config: LoRAConfig) -> Pass:
    """Returns a function that calls the model on every batch, for the initial values of the adapter `name`.

    A batch is a tensor, a mapping of the model's arguments, or anything that `loss` takes.
    Raises AdapterError for an adapter that needs no data, DataError without any batch; and when it is called,
    DataError for a batch that is none of these, and where there is no loss.
    """
    init = config.init_lora_weights
    if init not in DATA_INITS:
        raise AdapterError(
            f"{name!r} starts from {init!r}, which needs no data; those that do: {', '.join(DATA_INITS)}"
        )
    all_batches = list(batches)
    if not all_batches:
        raise DataError("start_from_data got no batch; give a few, such as list(islice(loader, 8))")
    backward = init in GRADIENT_INITS

    def run() -> None:
        with torch.set_grad_enabled(backward):
            for batch in all_batches:
                if loss is not None:
                    output = loss(model, batch)
                elif isinstance(batch, Tensor):
                    output = model(batch)
                elif isinstance(batch, Mapping):
                    output = model(**batch)
                else:
                    raise DataError(
                        f"a batch is a {type(batch).__name__}, which does not say how to call the model; give tensors "
                        "or mappings of its arguments, or loss=lambda model, batch: ..."
                    )
                if not backward:
                    continue
                value = output if isinstance(output, Tensor) else getattr(output, "loss", None)
                if not isinstance(value, Tensor) or value.numel() != 1:
                    raise DataError(
                        "the model returned no loss for these batches; put labels into them, or give "
                        "loss=lambda model, batch: ..., which returns one number"
                    )
                torch.autograd.backward(value)

    return run


# ---- Gradients


def gradient_spectra(targets: Mapping[str, Target], run: Pass, count: int) -> dict[str, Spectrum]:
    """Returns the leading triplets of each layer's gradient at the base, at least `count` per group.

    They are exact for layers so small that all triplets are computed.
    run: forward and backward over all of the data; called GRADIENT_PASSES times.
    """
    probes = {}  # updates of scale 1, for `count` directions per group and EXTRA more
    for path, target in targets.items():
        groups = target.layer_type.groups(target.layer)
        k = groups * _directions(min(target.dims) // groups, count)
        probes[path] = low_rank_layer(replace(target, r=k, lora_alpha=k), LoRAConfig(), fresh=False)
    left: dict[str, Tensor] = {}
    right = {path: gaussian(_by_group(probe, probe.lora_A).shape, probe.lora_A) for path, probe in probes.items()}
    with attached({target.layer: (probes[path],) for path, target in targets.items()}):
        for _ in range(GRADIENT_PASSES // 2):
            for path, probe in probes.items():
                _fix(probe, "A", orthonormal(right[path].mT).mT)
            run()
            _check_finite({path: _gradient(probe.lora_B) for path, probe in probes.items()}, "the gradient of")
            for path, probe in probes.items():
                left[path] = orthonormal(_by_group(probe, _gradient(probe.lora_B)))  # G A^T
                _fix(probe, "B", left[path])
            run()
            _check_finite({path: _gradient(probe.lora_A) for path, probe in probes.items()}, "the gradient of")
            right = {path: _by_group(probe, _gradient(probe.lora_A)) for path, probe in probes.items()}  # B^T G
    return {path: triplets_in_basis(left[path], right[path]) for path in targets}


def _directions(size: int, count: int) -> int:
    """How many directions to iterate on: more than `count`, or all of a small matrix."""
    return size if size <= EXACT else min(size, count + EXTRA)


def _by_group(probe: LoRALayer, factor: Tensor) -> Tensor:
    """A (k, in/groups, ...) as (groups, k/groups, n), or B (out, k/groups) as (groups, out/groups, k/groups)."""
    return factor.reshape(probe.groups, len(factor) // probe.groups, -1)


def _fix(probe: LoRALayer, name: str, value: Tensor) -> None:
    """Sets one factor, which stays fixed; the other is zero and gets a gradient."""
    fixed, free = (probe.lora_A, probe.lora_B) if name == "A" else (probe.lora_B, probe.lora_A)
    fixed.requires_grad_(False).copy_(value.reshape(fixed.shape)).grad = None
    free.requires_grad_(True).grad = None
    free.data.zero_()


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


# ---- Inputs


class InputVariances(NamedTuple):
    """Variances of a layer's inputs: along each principal direction (k,), the directions (k, n), and the total.

    The directions are on the layer's device, what ranks are chosen by is on the CPU.
    """

    along: Tensor
    directions: Tensor
    total: float


def input_variances(targets: Mapping[str, Target], run: Pass, count: int) -> dict[str, InputVariances]:
    """Returns the leading principal components of what each layer reads (of a convolution's patches).

    There are at least `count`. run: forward over all of the data; called INPUT_PASSES times. No layer may have groups.
    """
    covariances = {path: _InputCovariance(target, count) for path, target in targets.items()}
    for _ in range(INPUT_PASSES):
        hooks = [
            target.layer.register_forward_pre_hook(covariances[path].add_inputs) for path, target in targets.items()
        ]
        try:
            run()
        finally:
            for hook in hooks:
                hook.remove()
        _check_finite({path: covariance.products for path, covariance in covariances.items()}, "what is read by")
        for covariance in covariances.values():
            covariance.end_pass()
    projected = read_together([covariance.projected for covariance in covariances.values()])
    totals = read_together([covariance.total for covariance in covariances.values()])
    return {
        path: covariance.variances(matrix, float(total))
        for (path, covariance), matrix, total in zip(covariances.items(), projected, totals, strict=True)
    }


class _InputCovariance:
    """Subspace iteration on the covariance C of one layer's inputs x.

    A x is computed by the layer type's update, so that this works for any layer type: with h = A x, the gradient of
    |h|^2 / 2 is A x x^T, and that of the sum of h is x^T in every row.
    """

    def __init__(self, target: Target, count: int) -> None:
        self.layer_type = target.layer_type
        size = target.layer_type.dims(target.layer)[0]
        k = _directions(size, count)
        like = torch.empty((), device=computing_device(target.weight), dtype=adapter_dtype(target.weight.dtype))
        shape, _ = target.layer_type.shapes(target.layer, k)
        self.A = orthonormal(gaussian((size, k), like)).T.reshape(shape)
        self.identity = torch.eye(k, dtype=like.dtype, device=like.device)  # the B that makes the update A x
        self.wide = wide_dtype(like.device)
        self._reset()

    def _reset(self) -> None:
        """Sums over the inputs of a pass: A x x^T, x^T, |x|^2 and 1."""
        self.products, self.sums = torch.zeros_like(self.A), torch.zeros_like(self.A[:1])
        self.squares, self.count = self.A.new_zeros((), dtype=self.wide), 0

    def add_inputs(self, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        """A forward pre-hook."""
        x = inputs[0].detach().to(self.A.dtype)
        with torch.enable_grad():
            A = self.A.requires_grad_()
            h = self.layer_type.update(layer, x, A, self.identity)
            (products,) = torch.autograd.grad(h, A, h.detach(), retain_graph=True)
            (sums,) = torch.autograd.grad(h, A, torch.ones_like(h))
        self.products += products
        self.sums += sums[:1]
        self.count += h.numel() // len(A)
        ones = torch.ones_like(self.A[:1])
        self.squares += self.layer_type.update(layer, x.square(), ones, self.identity[:1, :1]).to(self.wide).sum()

    def end_pass(self) -> None:
        """Keeps what the pass says about its directions, and takes the next directions."""
        self.directions = A = self.A.detach().flatten(1)
        products = self.products.flatten(1)
        mean = self.sums.flatten(1) / max(self.count, 1)  # (1, n)
        spread = products - self.count * (A @ mean.T) @ mean  # A C, (k, n)
        self.total = self.squares - self.count * mean.square().sum().to(self.wide)
        self.projected = spread @ A.T  # A C A^T, (k, k)
        self.A = orthonormal(spread.T).T.reshape(self.A.shape)
        self._reset()

    def variances(self, projected: Tensor, total: float) -> InputVariances:
        """Returns the variances along the directions of the last pass, from what `end_pass` left, on the CPU."""
        along, rotation = torch.linalg.eigh(projected)  # ascending
        directions = rotation.flip(-1).T.to(self.directions) @ self.directions
        return InputVariances(along.flip(-1).clamp(min=0), directions, total)


def distribute_ranks(
    variances: Mapping[str, InputVariances], ranks: Mapping[str, int], limits: Mapping[str, int]
) -> dict[str, int]:
    """Gives the same total of ranks to the components that explain the largest shares of their layers' variance.

    arXiv:2410.07170, eq. 5 and alg. 1; a layer keeps at least one and gets at most its limit.
    """
    shares = [
        (float(variance) / variances[path].total, path)
        for path in ranks
        for variance in variances[path].along[1 : limits[path]]
    ]
    best = sorted(shares, key=lambda share: -share[0])[: sum(ranks.values()) - len(ranks)]
    return {path: 1 + sum(owner == path for _, owner in best) for path in ranks}
