"""Adapters of the tiny chat model that do something, and their logits."""

from typing import Any

import torch
from tiny import chat_model, stirred_model
from torch import Tensor, nn

from tailora import LoRAConfig, LoRAModel


def token_ids() -> Tensor:
    """(2, 12), on the device that is the default now: not on that of the moment of the first import."""
    return torch.arange(24).view(2, 12)


def adapted(settings: dict[str, Any] | None = None, base: nn.Module | None = None) -> LoRAModel:
    """r = 4, alpha = 6, unless the settings say otherwise; in evaluation mode."""
    model = stirred_model(base or chat_model(), LoRAConfig(**{"r": 4, "lora_alpha": 6, **(settings or {})}))
    return model.eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        result: Tensor = model.eval()(input_ids=token_ids()).logits
    return result
