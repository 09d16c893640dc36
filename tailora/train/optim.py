"""AdamW over the adapter, and a learning rate that is a function of the step alone."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from tailora.core.loraplus import names_with_higher_lr
from tailora.kernels.flat_parameters import Flat, Group, norm
from tailora.train.config import TrainConfig

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


def scheduled(config: TrainConfig) -> Callable[[int, int], float]:
    """step, of steps -> learning rate, as the settings say."""
    return lambda step, total: learning_rate(
        step, total, config.learning_rate, config.warmup_ratio, config.lr_scheduler_type
    )


def rising(step: int, total: int, low: float, high: float) -> float:
    """Rate of step `step` (0..total-1) of a range test: from low to high by one factor a step (arXiv:1506.01186)."""
    return float(low * (high / low) ** (step / max(total - 1, 1)))


def groups(module: nn.Module, config: TrainConfig) -> list[Group]:
    """All that is trained, by what sets its rate and decay: with LoRA+ (arXiv:2402.12354), B has its own."""
    named = dict(module.named_parameters())
    fast = names_with_higher_lr(module) if config.loraplus_lr_ratio != 1 else set()
    slow = Group({name: p for name, p in named.items() if name not in fast}, weight_decay=config.weight_decay)
    if not fast:
        return [slow]
    quick = {name: p for name, p in named.items() if name in fast}
    both = [slow, Group(quick, config.loraplus_lr_ratio, config.weight_decay)]
    return [group for group in both if group.parameters]


def adamw(flats: Sequence[Flat]) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101, alg. 2), one fused pass per buffer; its learning rate is set at every step.

    A parameter that a step does not use has a zero gradient there: its moments fade and move it still, as those of
    all others do, and weight decay reaches it. One that was never used stays what it was, but for weight decay.
    """
    each = [
        {"params": [flat.whole], "rate_factor": flat.rate_factor, "weight_decay": flat.weight_decay} for flat in flats
    ]
    return torch.optim.AdamW(each, lr=0.0, fused=True)


def take_step(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """One step at `rate` times each group's factor; the gradients are zero afterwards, and still views."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate_factor"]
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)


def clip(flats: Sequence[Flat], max_norm: float) -> float:
    """Scale the gradients down to `max_norm`; returns the norm that they had.

    When that is not finite they are left as they are, so that one can see which of them it came from.
    """
    before = float(norm(flats))
    scale = max_norm / (before + 1e-6)  # as torch's clip_grad_norm_
    if math.isfinite(before) and scale < 1:
        for flat in flats:
            flat.gradient.mul_(scale)
    return before
