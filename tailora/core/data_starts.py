"""Starting an adapter from the user's data: the gradient's directions (LoRA-GA, LoRA-One), the inputs' (EVA)."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tailora.core.adapter import Adapter, low_rank_layer
from tailora.core.config import LoRAConfig
from tailora.core.data_init import Pass, Variances, gradient_spectra, input_variances
from tailora.core.init import FROM_GRADIENT, MOVED
from tailora.core.layer import LoRALayer
from tailora.core.ranks import scale_kept, with_ranks
from tailora.core.spectra import Spectrum
from tailora.core.targets import Target, target_at
from tailora.errors import ConfigError, DataError

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
