"""Cross entropy in float32 that never holds more than a few float32 rows, and turns the logits into their gradient.

With p = softmax(logits) the gradient of -log p[y] is p - onehot(y): it is known as soon as the loss is. So the forward
writes it over the logits, chunk by chunk, and the backward only scales it: one buffer (rows, vocabulary) in the model's
precision is all that ever exists. torch's own needs the logits, their float32 copy, and two more of that size.
"""

from typing import Any

import torch
from torch import Tensor

ROWS = 64  # float32 rows at a time: 12 MB at a vocabulary of 49,152, which a core's cache still helps with


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(logits)[targets] in nats: (rows, vocabulary), (rows,) -> (rows,) float32.

    The values of `logits` are overwritten where a gradient will be asked for.
    """
    if not (torch.is_grad_enabled() and logits.requires_grad):
        return _chunks(logits, targets, into=None)
    losses: Tensor = _CrossEntropy.apply(logits, targets)  # type: ignore[no-untyped-call]
    return losses


def _chunks(logits: Tensor, targets: Tensor, into: Tensor | None) -> Tensor:
    losses = torch.empty(len(targets), dtype=torch.float32, device=logits.device)
    for start in range(0, len(targets), ROWS):
        part = slice(start, start + ROWS)
        wanted = targets[part, None]
        log_p = torch.log_softmax(logits[part], dim=-1, dtype=torch.float32)  # (chunk, vocabulary)
        losses[part] = -log_p.gather(1, wanted)[:, 0]
        if into is not None:
            p = log_p.exp_()
            into[part] = p.scatter_add_(1, wanted, torch.full_like(wanted, -1, dtype=torch.float32))
    return losses


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        ctx.gradient = logits.detach()  # shares memory and version: a backward that needs the logits complains
        return _chunks(logits, targets, into=ctx.gradient)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        if ctx.gradient is None:
            raise RuntimeError("the loss was already sent backward once; its gradient's memory is spent")
        gradient, ctx.gradient = ctx.gradient, None
        return gradient.mul_(gradients[0][:, None]), None
