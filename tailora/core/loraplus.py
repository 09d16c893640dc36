"""LoRA+: B learns faster than A (arXiv:2402.12354)."""

from typing import Any

from torch import nn

from tailora.core.layer import LoRALayer
from tailora.errors import ConfigError


def names_with_higher_lr(module: nn.Module) -> set[str]:
    """Returns the names of the parameters that LoRA+ gives the higher learning rate: B of every update.

    Embeddings are left out: their A looks up ids, and the ratio is derived for an A that sums over inputs (sec. 3).
    """
    return {
        f"{path}.lora_B".removeprefix(".")
        for path, layer in module.named_modules()
        if isinstance(layer, LoRALayer) and layer.layer_type.zero_factor == "B"
    }


def loraplus_groups(lora_layers: nn.Module, lr: float, loraplus_lr_ratio: float) -> list[dict[str, Any]]:
    """Returns parameter groups for any torch optimizer: lr for all that is trained, lr * loraplus_lr_ratio for B.

    torch.optim.AdamW(loraplus_groups(model.lora_layers, lr=1e-4, loraplus_lr_ratio=16)); the paper takes 16 and more
    at a rate below LoRA's own (sec. 5). Raises ConfigError for a ratio below 1.
    """
    if not loraplus_lr_ratio >= 1:
        raise ConfigError(f"loraplus_lr_ratio = {loraplus_lr_ratio}; B learns at least as fast as A: take 1 or more")
    higher = names_with_higher_lr(lora_layers)
    named = dict(lora_layers.named_parameters())
    groups = [
        {"params": [p for name, p in named.items() if name not in higher], "lr": lr},
        {"params": [p for name, p in named.items() if name in higher], "lr": lr * loraplus_lr_ratio},
    ]
    return [group for group in groups if group["params"]]
