"""EVA: initial values of A from the principal components of each layer's inputs (arXiv:2410.07170).

`start_from_data` initializes an adapter. It calls the model on all batches a few times (`passes`), and computes the
components with subspace iteration, without a full covariance matrix (arXiv:0909.4061, alg. 4.4).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tailora.core.adapter import Adapter, adapter_dtype, low_rank_layer
from tailora.core.config import LoRAConfig
from tailora.core.device import wide_dtype
from tailora.core.layer_types import computing_device
from tailora.core.low_rank import EXACT, EXTRA, gaussian
from tailora.core.patterns import exactly
from tailora.core.targets import Target, target_at
from tailora.errors import AdapterError, ConfigError, DataError

INPUT_PASSES = 3  # over the data
Pass = Callable[[], None]  # calls the model on all data
Loss = Callable[[Any, Any], Tensor]  # (model, batch) -> scalar


def start_from_data(adapter: Adapter, base_model: nn.Module, run: Pass, rho: float) -> Adapter:
    """Returns the adapter with new layers: A contains principal directions of the inputs (arXiv:2410.07170, sec. 3).

    rho: maximum factor by which a layer's rank grows.
    Raises DataError if the input of a layer is constant, ConfigError for rho below 1.
    """
    if rho < 1:
        raise ConfigError(f"expected rho >= 1 (1 leaves ranks unchanged), got {rho}")
    targets = {
        path: replace(target_at(base_model, path, adapter.config), r=layer.r, lora_alpha=layer.lora_alpha)
        for path, layer in adapter.low_rank.items()
    }
    variances = input_variances(targets, run, int(rho * max(target.r for target in targets.values())))
    if constant := [path for path, inputs in variances.items() if inputs.along[0] == 0]:
        raise DataError(
            f"the inputs of {', '.join(constant[:5])} ({len(constant)} in total) are constant in these batches; use "
            "more batches, exclude these layers, or set init_lora_weights='kaiming'"
        )
    limits = {path: min(int(rho * target.r), *target.dims) for path, target in targets.items()}
    ranks = distribute_ranks(variances, {path: target.r for path, target in targets.items()}, limits)
    alphas = {
        path: adapter.config.alpha_at_rank(target.lora_alpha, target.r, ranks[path]) for path, target in targets.items()
    }
    config = adapter.config.replaced(
        rank_pattern={exactly(path): r for path, r in ranks.items() if r != adapter.config.r},
        alpha_pattern={exactly(path): alpha for path, alpha in alphas.items() if alpha != adapter.config.lora_alpha},
    )
    layers = {}
    for path, target in targets.items():
        old, r = adapter.low_rank[path], ranks[path]
        layer = low_rank_layer(replace(target, r=r, lora_alpha=alphas[path]), config, fresh=False)
        layer.lora_A.data.copy_(variances[path].directions[:r].reshape(layer.lora_A.shape))
        layer.lora_B.data.zero_()
        layers[path] = layer.train(old.training)
    return Adapter(config, layers, adapter.saved, adapter.extras)


# ---- Calling the model on the data


def passes(model: nn.Module, batches: Iterable[Any], loss: Loss | None, name: str, config: LoRAConfig) -> Pass:
    """Returns a function that calls the model on every batch, for adapter `name`. Raises AdapterError, DataError."""
    if config.init_lora_weights != "eva":
        raise AdapterError(f"init_lora_weights={config.init_lora_weights!r} of {name!r} uses no data; only 'eva' does")
    all_batches = list(batches)
    if not all_batches:
        raise DataError("no batches to initialize from; pass a few, such as list(islice(loader, 8))")

    @torch.no_grad()
    def run() -> None:
        for batch in all_batches:
            if loss is not None:
                loss(model, batch)
            elif isinstance(batch, Tensor):
                model(batch)
            elif isinstance(batch, Mapping):
                model(**batch)
            else:
                raise DataError(
                    f"expected tensors or mappings of the model's arguments as batches, got {type(batch).__name__}; "
                    "convert them, or pass loss=lambda model, batch: ..."
                )

    return run


# ---- Inputs


class InputVariances:
    """The principal components of one layer's inputs x, by subspace iteration on their covariance C.

    A x is computed by the layer type's update, so that this works for any layer type: with h = A x, the gradient of
    |h|^2 / 2 is A x x^T, and the gradient of the sum of h is x^T in every row.

    along, total: variances along them (k,), and over all directions; on the CPU after `decompose`.
    """

    along: Tensor
    directions: Tensor  # (k, n), of the last pass, on the layer's device; principal ones after `decompose`
    total: Tensor

    def __init__(self, target: Target, count: int) -> None:
        self.layer_type = target.layer_type
        size = target.layer_type.dims(target.layer)[0]
        k = size if size <= EXACT else min(size, count + EXTRA)  # all directions of a narrow layer
        like = torch.empty((), device=computing_device(target.weight), dtype=adapter_dtype(target.weight.dtype))
        shape, _ = target.layer_type.shapes(target.layer, k)
        self.A = torch.linalg.qr(gaussian((size, k), like)).Q.T.reshape(shape)
        self.identity = torch.eye(k, dtype=like.dtype, device=like.device)  # the B that makes the update A x
        self.wide = wide_dtype(like.device)
        self._reset()

    def _reset(self) -> None:
        """Sums over the inputs of a pass: A x x^T, x^T, |x|^2 and 1."""
        self.products, self.sums = torch.zeros_like(self.A), torch.zeros_like(self.A[:1])
        self.squares, self.count = self.A.new_zeros((), dtype=self.wide), 0

    def add_inputs(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook."""
        x = (args[0] if args else next(iter(kwargs.values()))).detach().to(self.A.dtype)
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
        """Stores the results for the current directions, and computes the next ones."""
        self.directions = A = self.A.detach().flatten(1)
        products = self.products.flatten(1)
        mean = self.sums.flatten(1) / max(self.count, 1)  # (1, n)
        spread = products - self.count * (A @ mean.T) @ mean  # A C, (k, n)
        self.total = self.squares - self.count * mean.square().sum().to(self.wide)
        self.projected = spread @ A.T  # A C A^T, (k, k)
        self.A = torch.linalg.qr(spread.T).Q.T.reshape(self.A.shape)
        self._reset()

    def decompose(self) -> None:
        """Rotates the directions of the last pass to principal directions, and computes their variances."""
        along, rotation = torch.linalg.eigh(self.projected.cpu())  # ascending
        self.along, self.total = along.flip(-1).clamp(min=0), self.total.cpu()
        self.directions = rotation.flip(-1).T.to(self.directions) @ self.directions


def input_variances(targets: Mapping[str, Target], run: Pass, count: int) -> dict[str, InputVariances]:
    """Returns at least `count` leading components of each layer's inputs. run: a forward over all data."""
    variances = {path: InputVariances(target, count) for path, target in targets.items()}
    for _ in range(INPUT_PASSES):
        hooks = [
            target.layer.register_forward_pre_hook(variances[path].add_inputs, with_kwargs=True)
            for path, target in targets.items()
        ]
        try:
            run()
        finally:
            for hook in hooks:
                hook.remove()
        for inputs in variances.values():
            inputs.end_pass()
    if broken := [path for path, inputs in variances.items() if not inputs.projected.isfinite().all()]:
        raise DataError(
            f"the inputs of {', '.join(broken[:5])} ({len(broken)} in total) contain NaN or infinity in these batches; "
            "check the loss of each batch"
        )
    for inputs in variances.values():
        inputs.decompose()
    return variances


def distribute_ranks(
    variances: Mapping[str, InputVariances], ranks: Mapping[str, int], limits: Mapping[str, int]
) -> dict[str, int]:
    """Distributes all ranks by share of variance, at least one per layer (arXiv:2410.07170, eq. 5, alg. 1)."""
    shares = [
        (float(variance / variances[path].total), path)
        for path in ranks
        for variance in variances[path].along[1 : limits[path]]
    ]
    best = sorted(shares, key=lambda share: -share[0])[: sum(ranks.values()) - len(ranks)]
    return {path: 1 + sum(owner == path for _, owner in best) for path in ranks}
