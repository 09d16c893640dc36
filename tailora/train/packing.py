"""Whether a model may be given packed rows: tried on the model itself."""

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


def choose_packing(model: PreTrainedModel, setting: str, *, compare: bool = True) -> tuple[bool, str | None]:
    """Returns whether to pack, and why not. Raises ConfigError for the setting `on` if packing would change results.

    setting: auto, on or off.    compare: False for a model without contents, whose logits mean nothing.
    """
    if setting == "off":
        return False, None
    obstacle = obstacle_to_packing(model, compare=compare)
    if obstacle is None:
        return True, None
    if setting == "on":
        raise ConfigError(f"packing = 'on', but {obstacle}; take packing = 'auto' or 'off' for padded batches")
    return False, f"padded batches instead of packed rows: {obstacle}"


def obstacle_to_packing(model: PreTrainedModel, *, compare: bool) -> str | None:
    """Returns why packed rows are not safe, or None if two documents give the logits that each gives alone."""
    documents, name = random_documents(model.config), type(model).__name__
    with torch.no_grad(), evaluating(model):
        try:
            with packed_rows(model):
                together = _logits(model, documents, packed=True)
        except (PackingError, TypeError) as error:  # TypeError: forward has no such parameter
            return f"{name} does not support them ({error})"
        if not compare:
            return None
        alone = torch.cat([_logits(model, [document], packed=False) for document in documents])
    difference = float((together - alone).norm() / alone.norm())
    tolerance = TOLERANCE.get(model.dtype, HALF_TOLERANCE)
    if difference <= tolerance:
        return None
    return f"{name} gives other logits for packed documents (by {difference:.1e}, allowed {tolerance:.0e})"


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
    extra = {}
    if packed:
        extra = {"position_ids": batch["position_ids"].to(model.device), "cu_seq_lens_q": batch["cu_seq_lens"]}
    logits: Tensor = model(input_ids=batch["input_ids"].to(model.device), use_cache=False, **extra).logits[0]
    return logits.float()
