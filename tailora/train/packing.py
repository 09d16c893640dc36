"""Whether this model may be given packed rows: tried on it, not assumed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tailora.core.attach import evaluating
from tailora.data.collate import collate_packed
from tailora.data.dataset import Example
from tailora.errors import ConfigError
from tailora.kernels.attention import PackingError, packed_rows

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}  # relative to the logits' norm
HALF_TOLERANCE = 5e-2  # bfloat16, float16: two orders of summation differ by about 1e-2
LENGTHS = (9, 14)
LONGEST = 512  # of the documents that show a sliding window


@dataclass(frozen=True)
class Packing:
    on: bool
    note: str | None = None


def choose(model: PreTrainedModel, wanted: str, find: Callable[[PreTrainedModel], str | None] | None = None) -> Packing:
    """`wanted` is auto, on or off. Raises ConfigError for `on` where packed rows would change the results.

    find: what tells why packed rows are not safe; by default `obstacle_to_packing`.
    """
    if wanted == "off":
        return Packing(False)
    obstacle = (find or obstacle_to_packing)(model)
    if obstacle is None:
        return Packing(True)
    if wanted == "on":
        raise ConfigError(f"packing = 'on', but {obstacle}; take packing = 'auto' or 'off' for padded batches")
    return Packing(False, f"padded batches instead of packed rows: {obstacle}")


def obstacle_to_packing(model: PreTrainedModel) -> str | None:
    """Why packed rows are not safe on this model, or None: two documents give the logits that each gives alone."""
    documents = probes(model.config)
    with torch.no_grad(), evaluating(model):
        alone = torch.cat([_logits(model, [document], packed=False) for document in documents])
        together = packed_logits(model, documents)
    if isinstance(together, str):
        return together
    difference = float((together - alone).norm() / alone.norm())
    tolerance = TOLERANCE.get(model.dtype, HALF_TOLERANCE)
    if difference <= tolerance:
        return None
    return (
        f"{type(model).__name__} gives other logits for packed documents (by {difference:.1e}, allowed {tolerance:.0e})"
    )


def packed_logits(model: PreTrainedModel, documents: list[Example]) -> Tensor | str:
    """Of the documents in one row, (total, vocabulary); or why the model does not take them."""
    try:
        with packed_rows(model):
            return _logits(model, documents, packed=True)
    except (PackingError, TypeError) as error:  # TypeError: forward takes no such keyword
        return f"{type(model).__name__} does not take them ({error})"


def probes(config: Any) -> list[Example]:
    """Two documents of random tokens to try a model on, long enough to show a sliding window unless that is long."""
    window = getattr(config, "sliding_window", None) or 0
    lengths = [max(length, window + 2 if window <= LONGEST else 0) for length in LENGTHS]
    random = np.random.default_rng(0)
    vocabulary = config.get_text_config().vocab_size
    ids = [random.integers(vocabulary, size=length).astype(np.int32) for length in lengths]
    return [Example(input_ids, input_ids.copy()) for input_ids in ids]


def _logits(model: PreTrainedModel, documents: list[Example], packed: bool) -> Tensor:
    """(total, vocabulary) float32."""
    batch = collate_packed(documents)
    extra = (
        {"position_ids": batch["position_ids"].to(model.device), "cu_seq_lens_q": batch["cu_seq_lens"]}
        if packed
        else {}
    )
    logits: Tensor = model(input_ids=batch["input_ids"].to(model.device), use_cache=False, **extra).logits[0]
    return logits.float()
