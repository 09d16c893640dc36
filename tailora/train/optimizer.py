"""AdamW over flat buffers, its parameter groups, and gradient clipping. The learning rate comes from `lr_schedule`."""

import math
from collections.abc import Sequence

import torch
from torch import nn

from tailora.core.loraplus import names_with_higher_lr
from tailora.kernels.flat_parameters import FlatBuffer, Group, gradient_norm
from tailora.train.config import TrainConfig


def parameter_groups(module: nn.Module, config: TrainConfig) -> list[Group]:
    """Returns the parameters of `module`, grouped by learning rate: with LoRA+ (arXiv:2402.12354), B has its own."""
    parameters = dict(module.named_parameters())
    fast = names_with_higher_lr(module) if config.loraplus_lr_ratio != 1 else set()
    factors = {False: 1.0, True: config.loraplus_lr_ratio}  # whether B's own rate -> its factor
    groups = [
        Group({name: p for name, p in parameters.items() if (name in fast) == is_fast}, factor, config.weight_decay)
        for is_fast, factor in factors.items()
    ]
    return [group for group in groups if group.parameters] if fast else groups[:1]


def adamw(buffers: Sequence[FlatBuffer]) -> torch.optim.AdamW:
    """Returns AdamW (arXiv:1711.05101, alg. 2) with one fused pass per buffer; `optimizer_step` sets its learning rate.

    A parameter that a step does not use has a zero gradient there: its moments fade and still move it, and weight
    decay reaches it. A parameter that was never used changes by weight decay alone.
    """
    groups = [
        {"params": [buffer.parameter], "rate_factor": buffer.rate_factor, "weight_decay": buffer.weight_decay}
        for buffer in buffers
    ]
    return torch.optim.AdamW(groups, lr=0.0, fused=True)


def optimizer_step(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Takes one step at `rate` times each group's factor; the gradients are zero afterwards, and still views."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate_factor"]
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)


def clip_gradients(buffers: Sequence[FlatBuffer], max_norm: float) -> float:
    """Scales the gradients down to `max_norm` and returns the norm that they had before.

    If that norm is not finite, the gradients are left as they are, so that one can see which of them caused it.
    """
    norm = float(gradient_norm(buffers))
    scale = max_norm / (norm + 1e-6)  # as torch's clip_grad_norm_
    if math.isfinite(norm) and scale < 1:
        for buffer in buffers:
            buffer.gradient.mul_(scale)
    return norm
