"""Whether a model may be given packed rows, and what computes their attention: tried on the model itself.

All ranks of a run choose the same, what every rank can do. They agree after each forward that is tried, because with a
sharded base every forward needs all ranks.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tailora.core.attach import evaluating
from tailora.data.collate import collate_packed
from tailora.data.dataset import Example
from tailora.errors import ConfigError
from tailora.kernels.attention import CPU, PackingError, packed_rows
from tailora.kernels.device_attention import BLOCK, HALF, PROVIDERS
from tailora.train.parallel import first_of_ranks, forget_forward

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}  # relative to the norm of logits and gradients
# bfloat16, float16: two orders of summation give the demo's model, of 30 layers, logits that differ by .01 to .02 and
# gradients that differ by .05 to .09. Documents that attend to each other: logits by .13 and more, gradients by .38
HALF_TOLERANCE = {"logits": 5e-2, "gradients": 0.2}
LENGTHS = (9, 14)
LONG = 2 * BLOCK + 4  # tokens of another document, which the providers of devices cut into blocks
LONGEST = 512  # of the documents that show a sliding window
# What a provider may raise that does not fit the model, the device or the installed packages
REFUSALS = (ValueError, TypeError, RuntimeError, ImportError, OSError)


def choose_packing(model: PreTrainedModel, setting: str, *, compare: bool = True) -> tuple[str | None, str | None]:
    """Returns what computes the attention of packed rows, None for padded batches; and why not something better.

    Raises ConfigError for the setting `on` if packing would change results.

    setting: auto, on or off.    compare: False for a model without contents, whose logits mean nothing.
    """
    if setting == "off":
        return None, None
    obstacles: dict[str, str] = {}
    device_type = model.device.type
    for provider in candidates(device_type) if compare else [predicted_provider(device_type, model.dtype)]:
        obstacle = obstacle_to_provider(model, provider, compare=compare)
        if obstacle is None:
            passed_over = "; ".join(f"not by {name}, because {reason}" for name, reason in obstacles.items())
            return provider, f"attention is computed by {provider}; {passed_over}" if passed_over else None
        obstacles[provider] = obstacle
    reasons = "; ".join(dict.fromkeys(obstacles.values()))
    if setting == "on":
        raise ConfigError(f"packing = 'on', but {reasons}; take packing = 'auto' or 'off' for padded batches")
    return None, f"padded batches instead of packed rows: {reasons}"


def candidates(device_type: str) -> list[str]:
    """Returns the providers to try, the best first."""
    return [CPU] if device_type == "cpu" else [*PROVIDERS]


def predicted_provider(device_type: str, dtype: torch.dtype) -> str:
    """Returns the provider that a model without contents is reckoned with."""
    if device_type == "cpu":
        return CPU
    return "varlen_attn" if device_type == "cuda" and dtype in HALF else "sdpa"


def obstacle_to_provider(model: PreTrainedModel, provider: str, *, compare: bool) -> str | None:
    """Returns why packed rows are not safe with it, or None if documents give the results that each gives alone.

    Without `compare` the structure of the model alone decides, which is the same on every rank.
    """
    name, row, refusal = type(model).__name__, PROVIDERS.get(provider), None
    if row is not None and compare and (missing := first_of_ranks(row.obstacle(model.device, model.dtype))):
        return missing
    documents = random_documents(model.config, () if row is None else (LONG,))
    refusals = (PackingError, TypeError) if row is None else REFUSALS  # TypeError: forward has no such parameter
    with evaluating(model):
        try:
            with packed_rows(model, provider):
                together = _results(model, documents, packed=True, gradient=compare)
                if row is not None and compare and not row.has_dropout:
                    model.train()  # the provider raises if the model asks for dropout
                    _results(model, documents, packed=True, gradient=False)
                    model.eval()
        except torch.OutOfMemoryError:
            raise
        except refusals as error:
            forget_forward(model)
            refusal = f"{name} does not support them ({str(error).splitlines()[0]})"
        if not compare:
            return refusal
        if (refusal := first_of_ranks(refusal)) is not None:
            return refusal
        alone = [_results(model, [document], packed=False, gradient=True) for document in documents]
    return first_of_ranks(_difference(model, together, alone))


def _difference(
    model: PreTrainedModel, together: tuple[Tensor, ...], alone: Sequence[tuple[Tensor, ...]]
) -> str | None:
    """Returns how the results of packed documents differ from those of each alone; None if they are the same."""
    for what, actual, parts in zip(("logits", "gradients"), together, zip(*alone, strict=True), strict=False):
        expected = torch.cat(parts)
        difference = float((actual - expected).norm() / expected.norm())
        tolerance = TOLERANCE.get(model.dtype, HALF_TOLERANCE[what])
        if not difference <= tolerance:
            name = type(model).__name__
            return f"{name} gives other {what} for packed documents (by {difference:.1e}, allowed {tolerance:.0e})"
    return None


def random_documents(config: Any, further: tuple[int, ...] = ()) -> list[Example]:
    """Returns two documents of random tokens to try a model on, longer than a sliding window unless that is long.

    further: lengths of other documents, which come first, cut to what the model has positions for.
    """
    config = config.get_text_config()
    most = getattr(config, "max_position_embeddings", None) or LONG
    window = getattr(config, "sliding_window", None) or 0
    lengths = [
        *(min(length, most) for length in further),
        *(max(length, window + 2 if window <= LONGEST else 0) for length in LENGTHS),
    ]
    random = np.random.default_rng(0)
    return [Example.of_text(random.integers(config.vocab_size, size=length).astype(np.int32)) for length in lengths]


def _results(model: PreTrainedModel, documents: list[Example], packed: bool, gradient: bool) -> tuple[Tensor, ...]:
    """Returns logits (total, vocabulary), and the gradient of weighted logits by the embeddings, (total, hidden)."""
    row = collate_packed(documents)
    names = row.keys() - {"labels"} if packed else {"input_ids"}
    inputs = {name: row[name].to(model.device) if isinstance(row[name], Tensor) else row[name] for name in names}
    states: list[Tensor] = []

    def after_embedding(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        states.append(output.detach().requires_grad_())
        return states[-1]

    hook = model.get_input_embeddings().register_forward_hook(after_embedding) if gradient else nullcontext()
    with torch.set_grad_enabled(gradient), hook:
        logits = model(**inputs, use_cache=False).logits[0].float()
    if not states:  # or the model reads its embeddings without calling them
        return (logits.detach(),)
    weights = torch.linspace(-1, 1, logits.shape[1], device=logits.device)
    (slope,) = torch.autograd.grad((logits @ weights).sum(), states[:1])
    return logits.detach(), slope[0].float()
