"""Divergence: updates only while loss and gradients are finite, and the message for one that is not.

FiniteUpdates      takes the optimizer's steps, and keeps the last parameters with a finite loss
broken_loss        where a loss that is not finite began
"""

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from tailora.core.attach import evaluating
from tailora.kernels.flat_parameters import FlatBuffer
from tailora.kernels.loss import Batch
from tailora.train.loss import BatchLayout, Task
from tailora.train.optimizer import LossScale, optimizer_step
from tailora.train.parallel import first_of_ranks, is_sharded

REMEDIES = (
    "try a tenth of the --learning-rate, a higher --warmup-ratio, a lower --max-grad-norm or --dtype float32, and "
    "check the data of this step for broken rows"
)


class FiniteUpdates:
    """Takes optimizer steps whose loss and gradients are finite; decides it on the device, without the host.

    diverged: 0-dimensional, True from the first step on that was not finite. Nothing changes any more after it.
    last_good: the last parameters with a finite loss, by buffer.
    A gradient that is not finite only because of the loss scale is no divergence: the step is left out and the scale is
    halved, down to LossScale.LEAST.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, buffers: Sequence[FlatBuffer], loss_scale: LossScale | None
    ) -> None:
        self.optimizer, self.buffers, self.loss_scale = optimizer, buffers, loss_scale
        device = buffers[0].parameter.device
        self.keep_parameters()
        self.diverged = torch.zeros((), dtype=torch.bool, device=device)
        self.skipped = torch.zeros((), device=device)  # 1.0 if the last step changed nothing
        cast(Any, optimizer).found_inf = self.skipped  # which fused optimizers look at

    def keep_parameters(self) -> None:
        self.last_good = [buffer.parameter.detach().clone() for buffer in self.buffers]

    def step(self, loss: Tensor, norm: Tensor, rate: float) -> None:
        """loss, norm: of the step and of its gradients, 0-dimensional."""
        loss_is_finite, overflow = loss.isfinite().to(norm.device), ~norm.isfinite()
        good_parameters = loss_is_finite & ~self.diverged
        for copy, buffer in zip(self.last_good, self.buffers, strict=True):
            good, now = good_parameters.to(copy.device), buffer.parameter.detach()
            if copy.device.type != "cpu":
                torch.where(good, now, copy, out=copy)
            elif good:  # there reading it costs nothing, and copying is faster
                copy.copy_(now)
        fatal = overflow if self.loss_scale is None else overflow & (self.loss_scale.value <= LossScale.LEAST)
        self.diverged |= fatal | ~loss_is_finite
        self.skipped.copy_(self.diverged | overflow)
        if self.loss_scale is not None:
            self.loss_scale.update(overflow)
        optimizer_step(self.optimizer, rate)

    def restore_last_good(self) -> None:
        for copy, buffer in zip(self.last_good, self.buffers, strict=True):
            buffer.parameter.detach().copy_(copy)


def broken_loss(model: nn.Module, batches: Sequence[Batch], task: Task, layout: BatchLayout) -> str:
    """Computes the step's losses again on all ranks; returns, for a message, the first module that is not finite."""
    modules: list[str] = []

    def check(name: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.is_floating_point() and not output.isfinite().all():
            modules.append(name)

    with torch.no_grad(), evaluating(model), ExitStack() as hooks:
        for name, module in model.named_modules():
            if name:
                hooks.enter_context(module.register_forward_hook(partial(check, name)))
        for batch in batches:
            task.outputs(model, batch, layout)
            if modules and not is_sharded(model):  # ranks with a sharded base run the same forwards
                break
    first = first_of_ranks(next(iter(modules), None))
    if first is None:
        return "the loss is not finite, although every module that ran returned finite values: the logits are too large"
    return f"the loss is not finite; the first module with non-finite output is {first}"
