"""Whether a model may be given packed rows: tried on the model itself."""

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


def choose_packing(
    model: PreTrainedModel, setting: str, find_obstacle: Callable[[PreTrainedModel], str | None] | None = None
) -> Packing:
    """Returns whether to pack. Raises ConfigError for the setting `on` if packed rows would change the results.

    setting: auto, on or off.
    find_obstacle: returns why packed rows are not safe, or None; by default `obstacle_to_packing`.
    """
    if setting == "off":
        return Packing(False)
    obstacle = (find_obstacle or obstacle_to_packing)(model)
    if obstacle is None:
        return Packing(True)
    if setting == "on":
        raise ConfigError(f"packing = 'on', but {obstacle}; take packing = 'auto' or 'off' for padded batches")
    return Packing(False, f"padded batches instead of packed rows: {obstacle}")


def obstacle_to_packing(model: PreTrainedModel) -> str | None:
    """Returns why packed rows are not safe, or None if two documents give the logits that each gives alone."""
    documents = random_documents(model.config)
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
    """Returns the logits of the documents in one row, (total, vocabulary); or why the model does not accept them."""
    try:
        with packed_rows(model):
            return _logits(model, documents, packed=True)
    except (PackingError, TypeError) as error:  # TypeError: forward has no such parameter
        return f"{type(model).__name__} does not support them ({error})"


def random_documents(config: Any) -> list[Example]:
    """Returns two documents of random tokens to try a model on, longer than a sliding window unless that is long."""
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
