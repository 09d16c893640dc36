"""A loss or gradient that is not finite: where it began, and what helps."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tailora.core.attach import evaluating
from tailora.train.dataloader import MicroBatch
from tailora.train.loss import BatchLayout, token_losses

REMEDIES = (
    "what helps: a tenth of the --learning-rate, a longer --warmup-ratio, a smaller --max-grad-norm, --dtype float32; "
    "and look at the data of this step for broken rows"
)


def broken_gradients(parameters: Mapping[str, nn.Parameter]) -> str:
    """Which gradients are not finite, for a message."""
    names = [
        name.replace("/", ".")
        for name, parameter in parameters.items()
        if parameter.grad is not None and not parameter.grad.isfinite().all()
    ]
    if not names:
        return "the norm of all gradients overflows, though each is finite"
    return f"the gradient of {len(names)} of {len(parameters)} parameters is not finite, first {', '.join(names[:3])}"


def broken_loss(model: nn.Module, batches: Sequence[MicroBatch], rows: BatchLayout, device: torch.device) -> str:
    """The first module whose output is not finite, for a message; found by computing the step's losses again."""
    found: list[str] = []
    with torch.no_grad(), evaluating(model), _watched(model, found):
        for batch in batches:
            token_losses(model, batch.examples, rows, device)
            if found:
                return f"the loss is not finite; the first module with such an output is {found[0]}"
    return "the loss is not finite, though the output of every module that ran is: the logits are too large"


@contextmanager
def _watched(model: nn.Module, found: list[str]) -> Iterator[None]:
    """Modules whose output is not finite are added to `found` as they compute."""

    def watch(name: str) -> Any:
        def check(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.is_floating_point() and not output.isfinite().all():
                found.append(name)

        return check

    hooks = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
