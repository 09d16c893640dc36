"""AdaLoRA (arXiv:2303.10512): moves ranks to the layers where they matter, during training.

The update is s B diag(E) A. After every optimizer step the least important E_i of all layers are set to zero, down to
a budget that decreases from the initial ranks to target_r per layer. The result is plain LoRA (`as_plain_lora`).
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from tailora.core.adapter import Adapter
from tailora.core.config import AdaLoRA, LoRAConfig
from tailora.core.layer import LoRALayer
from tailora.core.patterns import exactly
from tailora.errors import CheckpointError, ConfigError

FACTORS = ("lora_A", "lora_B", "lora_E")


def budget(step: int, total: int, tinit: int, tfinal: int, initial: int, target: int) -> int:
    """Returns the total number of ranks after optimizer step `step`.

    `initial` up to tinit, `target` from total - tfinal on, a cubic between (sec. 3.3):
    (1 - (t - tinit) / (total - tfinal - tinit))^3, which meets both ends.
    """
    if step < tinit:
        return initial
    if step >= total - tfinal:
        return target
    remaining = 1 - (step - tinit) / (total - tfinal - tinit)
    return target + round((initial - target) * remaining**3)


class RankAllocator:
    """Moves the ranks of an adapter with hooks on its optimizer; training needs no further calls.

    Before each step it adds the gradient of the penalty and measures sensitivities. After each step it disables the
    ranks beyond the budget; they may come back until the budget is final.

    final_masks: path -> mask (r,) of the remaining ranks; empty until the budget is final.
    Raises ConfigError if the schedule leaves no steps, or if the target is above the initial number of ranks.
    """

    def __init__(
        self, layers: Mapping[str, LoRALayer], optimizer: torch.optim.Optimizer, config: AdaLoRA, total_steps: int
    ) -> None:
        self.config, self.total, self.step = config, total_steps, 0
        self.tinit = total_steps // 10 if config.tinit is None else config.tinit
        self.tfinal = total_steps * 3 // 10 if config.tfinal is None else config.tfinal
        if self.tinit + self.tfinal >= total_steps:
            raise ConfigError(
                f"tinit + tfinal = {self.tinit} + {self.tfinal} must be less than {total_steps} steps; lower them"
            )
        self.layers = dict(layers)
        self.initial = sum(layer.r for layer in self.layers.values())
        self.target = config.target_r * len(self.layers)
        if self.target > self.initial:
            raise ConfigError(
                f"target_r = {config.target_r} is above the average initial rank; raise r or lower target_r"
            )
        self.sensitivity = {name: torch.zeros_like(p) for name, p in self._parameters()}
        self.uncertainty = {name: torch.zeros_like(p) for name, p in self._parameters()}
        self.final_masks: dict[str, Tensor] = {}
        optimizer.register_step_pre_hook(lambda used, *_: self.before_step(getattr(used, "found_inf", None)))
        optimizer.register_step_post_hook(lambda *_: self.after_step())

    @property
    def final(self) -> bool:
        """True if the ranks no longer change."""
        return bool(self.final_masks)

    def _parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [(f"{path}.{name}", getattr(layer, name)) for path, layer in self.layers.items() for name in FACTORS]

    @torch.no_grad()
    def before_step(self, found_inf: Tensor | None = None) -> None:
        """found_inf: 0-dimensional, 1.0 if the optimizer skips this step because a gradient is not finite."""
        for layer in self.layers.values():
            _add_penalty_gradient(layer, self.config.orth_reg_weight)
        if self.final:
            return
        for name, parameter in self._parameters():
            if parameter.grad is None:
                continue
            sensitivity = (parameter * parameter.grad).abs()  # |w dL/dw|
            smooth = self.sensitivity[name].lerp(sensitivity, 1 - self.config.beta1)
            uncertainty = self.uncertainty[name].lerp((sensitivity - smooth).abs(), 1 - self.config.beta2)
            for mean, new in ((self.sensitivity[name], smooth), (self.uncertainty[name], uncertainty)):
                mean.copy_(new if found_inf is None else torch.where(found_inf.bool(), mean, new))

    @torch.no_grad()
    def after_step(self) -> None:
        self.step += 1
        if self.final:
            self._apply_masks(self.final_masks)
        elif self.step >= self.total - self.tfinal:
            self.final_masks = self._most_important(self.target)
            self._apply_masks(self.final_masks)
        elif self.step >= self.tinit and (self.step - self.tinit) % self.config.deltaT == 0:
            ranks = budget(self.step, self.total, self.tinit, self.tfinal, self.initial, self.target)
            self._apply_masks(self._most_important(ranks))

    def importance(self, path: str) -> Tensor:
        """(r,): s(E_i) + the means of s over row i of A and column i of B, s = sensitivity * uncertainty (sec. 3.2)."""
        A, B, E = (self.sensitivity[f"{path}.{name}"] * self.uncertainty[f"{path}.{name}"] for name in FACTORS)
        return E + A.flatten(1).mean(1) + B.mean(0)

    def _most_important(self, ranks: int) -> dict[str, Tensor]:
        """Returns path -> mask (r,) of the layer's ranks among the `ranks` most important ones of all layers."""
        importance = torch.cat([self.importance(path) for path in self.layers])
        mask = torch.zeros_like(importance, dtype=torch.bool)
        mask[importance.topk(ranks).indices] = True
        masks = torch.split(mask, [layer.r for layer in self.layers.values()])
        return dict(zip(self.layers, masks, strict=True))

    def _apply_masks(self, masks: Mapping[str, Tensor]) -> None:
        for path, layer in self.layers.items():
            cast(nn.Parameter, layer.lora_E).mul_(masks[path])

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the tensors that `load_state_dict` needs to resume bit for bit, by name."""
        return {
            "step": torch.tensor(self.step, device="cpu"),
            **{f"{name}|sensitivity": tensor for name, tensor in self.sensitivity.items()},
            **{f"{name}|uncertainty": tensor for name, tensor in self.uncertainty.items()},
            **{f"{path}|kept": mask for path, mask in self.final_masks.items()},
        }

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Raises CheckpointError for the state of a different adapter."""
        current = self.state_dict()
        masks = {name: tensor for name, tensor in tensors.items() if name.endswith("|kept")}
        if {*current, *masks} != {*tensors, *(f"{path}|kept" for path in self.final_masks)} or any(
            tensors[name].shape != current[name].shape for name in current.keys() & tensors.keys()
        ):
            raise CheckpointError(
                "the checkpoint's rank allocation is from a different adapter; resume with the settings of its run"
            )
        self.step = int(tensors["step"])
        for name in self.sensitivity:
            self.sensitivity[name].copy_(tensors[f"{name}|sensitivity"])
            self.uncertainty[name].copy_(tensors[f"{name}|uncertainty"])
        device = next(iter(self.sensitivity.values())).device
        self.final_masks = {name.removesuffix("|kept"): mask.to(device) for name, mask in masks.items()}


def _add_penalty_gradient(layer: LoRALayer, weight: float) -> None:
    """Adds the gradient of weight (||B^T B - I||^2 + ||A A^T - I||^2) to the factors' gradients.

    The penalty keeps B diag(E) A near a singular value decomposition (eq. 4). Its gradient is 4 B (B^T B - I) and
    4 (A A^T - I) A.
    """
    A, B = layer.lora_A.flatten(1), layer.lora_B
    eye = torch.eye(len(A), dtype=A.dtype, device=A.device)
    if layer.lora_A.grad is not None and layer.lora_B.grad is not None:
        layer.lora_A.grad.add_(((A @ A.T - eye) @ A).view(layer.lora_A.shape), alpha=4 * weight)
        layer.lora_B.grad.add_(B @ (B.T @ B - eye), alpha=4 * weight)


# ---- Conversion to plain LoRA


def as_plain_lora(adapter: Adapter) -> Adapter:
    """Returns the update as plain LoRA: E multiplied into B, without disabled ranks (at least one is left)."""
    if adapter.config.adalora is None:
        return adapter
    layers = {}
    for path, layer in adapter.low_rank.items():
        E = cast(nn.Parameter, layer.lora_E).detach()
        indices = E.nonzero().flatten() if E.any() else torch.zeros(1, dtype=torch.long, device=E.device)
        plain = layers[path] = copy.deepcopy(layer)
        plain.r, plain.lora_alpha = len(indices), alpha_at_same_scale(layer, len(indices))
        plain.lora_A = nn.Parameter(layer.lora_A.detach()[indices])
        plain.lora_B = nn.Parameter((layer.lora_B.detach() * E)[:, indices])
        plain.lora_E = None
    config = with_ranks(adapter.config, adapter.low_rank, {path: layer.r for path, layer in layers.items()})
    return replace(adapter, config=config.replaced(adalora=None), low_rank=layers)


def with_ranks(config: LoRAConfig, layers: Mapping[str, LoRALayer], ranks: Mapping[str, int]) -> LoRAConfig:
    """Returns the config with the rank of each path in `ranks`, at its layer's configured scale."""
    alphas = {path: alpha_at_same_scale(layers[path], r) for path, r in ranks.items()}
    return config.replaced(
        rank_pattern={exactly(path): r for path, r in ranks.items() if r != config.r},
        alpha_pattern={exactly(path): alpha for path, alpha in alphas.items() if alpha != config.lora_alpha},
    )


def alpha_at_same_scale(layer: LoRALayer, r: int) -> float:
    """Returns the alpha for rank r with the layer's current scale."""
    return layer.lora_alpha * (math.sqrt(r / layer.r) if layer.use_rslora else r / layer.r)
