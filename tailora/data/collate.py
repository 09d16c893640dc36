"""Batches of tensors: examples packed into one row, or padded to the longest one."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tailora.data.dataset import IGNORED, Example


def collate_packed(examples: Sequence[Example]) -> dict[str, Any]:
    """Puts all examples into one row as separate documents.

    input_ids, labels, position_ids: (1, total) int64. Positions restart with every document. `Example.of_text` never
    trains the first token, so shifted labels do not predict one document from another.
    cu_seq_lens_q, cu_seq_lens_k: (documents + 1,) int32, the start of each document and the end of the last.
    max_length_q, max_length_k: tokens of the longest document, a Python int.
    """
    lengths = [len(example.input_ids) for example in examples]
    input_ids = np.concatenate([example.input_ids for example in examples])  # (total,)
    labels = np.concatenate([example.labels for example in examples])
    ends = np.cumsum([0, *lengths])
    assert (labels[ends[:-1]] == IGNORED).all(), "documents must be made by Example.of_text"
    positions = np.concatenate([np.arange(length) for length in lengths])
    return {
        "input_ids": torch.from_numpy(input_ids.astype(np.int64))[None],
        "position_ids": torch.from_numpy(positions.astype(np.int64))[None],
        "labels": torch.from_numpy(labels.astype(np.int64))[None],
        **dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), torch.from_numpy(ends.astype(np.int32))),
        **dict.fromkeys(("max_length_q", "max_length_k"), max(lengths)),
    }


def collate_padded(examples: Sequence[Example], pad_id: int) -> dict[str, Tensor]:
    """Puts one example into each row, padded on the right: input_ids, attention_mask, labels (batch, longest) int64."""
    shape = (len(examples), max(len(example.input_ids) for example in examples))
    input_ids, labels = np.full(shape, pad_id, np.int64), np.full(shape, IGNORED, np.int64)
    mask = np.zeros(shape, np.int64)
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        input_ids[row, :length], labels[row, :length] = example.input_ids, example.labels
        mask[row, :length] = 1
    batch = {"input_ids": input_ids, "attention_mask": mask, "labels": labels}
    return {name: torch.from_numpy(array) for name, array in batch.items()}
