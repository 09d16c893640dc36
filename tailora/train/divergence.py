"""The messages for a loss or gradient that is not finite: where it began, and what helps."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tailora.core.attach import evaluating
from tailora.kernels.loss import Batch
from tailora.train.loss import BatchLayout
from tailora.train.parallel import first_of_ranks, is_sharded

REMEDIES = (
    "what helps: a tenth of the --learning-rate, a longer --warmup-ratio, a smaller --max-grad-norm, --dtype float32; "
    "and look at the data of this step for broken rows"
)


def broken_gradients(parameters: Mapping[str, nn.Parameter]) -> str:
    """Returns which gradients are not finite on the first rank that has such gradients, for a message."""
    names = first_of_ranks(_not_finite(parameters))
    if names is None:
        return "the norm of all gradients overflows, though each is finite"
    return f"the gradient of {len(names)} of {len(parameters)} parameters is not finite, first {', '.join(names[:3])}"


def _not_finite(parameters: Mapping[str, nn.Parameter]) -> list[str] | None:
    names = [
        name.replace("/", ".")
        for name, parameter in parameters.items()
        if parameter.grad is not None and not parameter.grad.isfinite().all()
    ]
    return names or None


def broken_loss(model: nn.Module, batches: Sequence[Batch], layout: BatchLayout) -> str:
    """Computes the step's losses again and returns which module's output is not finite, for a message.

    All ranks call it with their batches, and all get the module of the first rank that has one.
    """
    module = first_of_ranks(_broken_module(model, batches, layout))
    if module is None:
        return "the loss is not finite, though the output of every module that ran is: the logits are too large"
    return f"the loss is not finite; the first module with such an output is {module}"


def _broken_module(model: nn.Module, batches: Sequence[Batch], layout: BatchLayout) -> str | None:
    modules: list[str] = []

    def check(name: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.is_floating_point() and not output.isfinite().all():
            modules.append(name)

    with torch.no_grad(), evaluating(model), ExitStack() as hooks:
        for name, module in model.named_modules():
            if name:
                hooks.enter_context(module.register_forward_hook(partial(check, name)))
        for batch in batches:
            layout.task.outputs(model, batch, layout)
            if modules and not is_sharded(model):  # ranks with a sharded base run the same forwards
                break
    return next(iter(modules), None)
