"""AdamW over the adapter, and a learning rate that is a function of the step alone."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

DECAYS: dict[str, Callable[[float], float]] = {  # share of the steps after warm-up, 0..1 -> share of the peak
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "linear": lambda done: 1 - done,
    "constant": lambda _done: 1.0,
}


def learning_rate(step: int, total: int, peak: float, warmup_ratio: float, kind: str) -> float:
    """Rate of step `step` (0..total-1): rises to the peak over the warm-up, then decays towards 0 at `total`."""
    warmup = math.ceil(warmup_ratio * total)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    return peak * DECAYS[kind]((step - warmup) / max(total - warmup, 1))


def adamw(parameters: Sequence[nn.Parameter], weight_decay: float) -> torch.optim.AdamW:
    """AdamW in one fused pass; its learning rate is set at every step."""
    return torch.optim.AdamW(parameters, lr=0.0, weight_decay=weight_decay, fused=True)


def take_step(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def clip(parameters: Sequence[Tensor], max_norm: float) -> Tensor:
    """Scale the gradients down to `max_norm`; returns the norm that they had, 0-dimensional."""
    return nn.utils.clip_grad_norm_(parameters, max_norm)
