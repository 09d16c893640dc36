"""AdamW over flat buffers: parameter groups, LoRA+, learning rate, clipping, loss scaling.

Nothing here makes the host wait for the device. Learning rates are functions of the step alone, so that a continued run
needs no scheduler state.
"""

import math
from collections.abc import Callable, Container, Mapping, Sequence

import torch
from torch import Tensor, nn

from tailora.core.layer import names_with_higher_lr
from tailora.kernels.flat_parameters import FlatBuffer, Group
from tailora.train.config import TrainConfig
from tailora.train.parallel import gradient_norm_over_ranks


def parameter_groups(module: nn.Module, config: TrainConfig, sharded: Container[str] = ()) -> list[Group]:
    """Returns groups by learning rate, since B has its own with LoRA+ (arXiv:2402.12354), and by being sharded."""
    fast = names_with_higher_lr(module) if config.loraplus_lr_ratio != 1 else set()
    groups: dict[tuple[bool, bool], dict[str, nn.Parameter]] = {(False, False): {}}  # whether B's own rate, and sharded
    for name, parameter in module.named_parameters():
        groups.setdefault((name in fast, name in sharded), {})[name] = parameter
    return [
        Group(parameters, config.loraplus_lr_ratio if is_fast else 1.0, config.weight_decay, is_sharded)
        for (is_fast, is_sharded), parameters in groups.items()
        if parameters
    ]


def adamw(buffers: Sequence[FlatBuffer]) -> torch.optim.AdamW:
    """Returns AdamW (arXiv:1711.05101, alg. 2) with one fused pass per buffer; `optimizer_step` sets its learning rate.

    The gradient of a parameter that a step does not use is zero: its moments and weight decay still change it.
    """
    groups = [
        {"params": [buffer.parameter], "rate_factor": buffer.rate_factor, "weight_decay": buffer.weight_decay}
        for buffer in buffers
    ]
    return torch.optim.AdamW(groups, lr=0.0, fused=True)


def optimizer_step(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Takes one step at `rate` times each group's factor. With `optimizer.found_inf` 1 nothing changes."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate_factor"]
    found_inf: Tensor | None = getattr(optimizer, "found_inf", None)
    if found_inf is not None and found_inf.device.type == "mps" and found_inf:  # which ignores it; the host waits
        return
    optimizer.step()


def clip_gradients(buffers: Sequence[FlatBuffer], max_norm: float, loss_scale: "LossScale | None" = None) -> Tensor:
    """Scales the gradients down to `max_norm` and returns the norm that they had before, 0-dimensional.

    loss_scale: what the gradients are divided by first. If the norm is not finite, they stay as they are.
    """
    scale = 1.0 if loss_scale is None else loss_scale.value
    norm = gradient_norm_over_ranks(buffers) / scale
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0) / scale  # as torch's clip_grad_norm_
    factor = torch.where(norm.isfinite(), factor, 1.0)
    if factor.device.type != "cpu" or factor != 1:  # on a CPU, asking costs nothing and spares a pass
        for buffer in buffers:
            buffer.gradient.mul_(factor.to(buffer.gradient.device))
    return norm


class LossScale:
    """The factor of a loss whose gradients are computed in float16, where small ones would be zero (arXiv:1710.03740).

    torch.amp.GradScaler's rule: half after a step whose gradients overflow, double after `INTERVAL` good ones. All on
    the device, so that the host need not wait.
    """

    FIRST, LEAST, INTERVAL = 2.0**16, 1.0, 2000

    def __init__(self, device: torch.device) -> None:
        self.value = torch.full((), self.FIRST, device=device)
        self.good_steps = torch.zeros((), dtype=torch.int32, device=device)  # in a row

    def update(self, overflow: Tensor) -> None:
        """overflow: whether a gradient of the step was not finite, 0-dimensional."""
        good_steps = torch.where(overflow, 0, self.good_steps + 1)
        grows = good_steps == self.INTERVAL
        factor = torch.where(overflow, 0.5, torch.where(grows, 2.0, 1.0))
        self.value.mul_(factor)
        self.good_steps.copy_(torch.where(grows, 0, good_steps))

    def state_dict(self) -> dict[str, Tensor]:
        return {"value": self.value, "good_steps": self.good_steps}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        self.value.copy_(tensors["value"])
        self.good_steps.copy_(tensors["good_steps"])


# ---- Learning rate


DECAYS: dict[str, Callable[[float], float]] = {  # share of the steps after warm-up, 0..1 -> share of the peak
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "linear": lambda done: 1 - done,
    "constant": lambda _done: 1.0,
}


def learning_rate(step: int, total: int, peak: float, warmup_ratio: float, decay: str) -> float:
    """Returns the rate of a step (0..total-1): it rises to `peak` in the warm-up, then decays towards 0 at `total`."""
    warmup = math.ceil(warmup_ratio * total)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    return peak * DECAYS[decay]((step - warmup) / max(total - warmup, 1))
