"""Batches of tensors: examples packed into one row, or padded to the longest one."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tailora.data.dataset import IGNORED, Example

WORTH = 0.05  # smallest share of the tokens to save, because a shortened row costs copies in every layer


def collate_packed(examples: Sequence[Example], *, share: bool = False) -> dict[str, Any]:
    """Puts all examples into one row as separate documents.

    input_ids, labels, position_ids: (1, total) int64. Positions restart with every document. `Example.of_text` never
    trains the first token, so shifted labels do not predict one document from another.
    cu_seq_lens_q, cu_seq_lens_k: (documents + 1,) int32, the start of each document and the end of the last.
    max_length_q, max_length_k: tokens of the longest document, a Python int.

    share: compute the tokens with which a document begins like the one before it, such as a system message, only once,
        if that saves enough. The row is then shorter than its documents, and two tensors map one to the other:
    document_tokens: (tokens of all documents,) int64, where each document's tokens are in the row.
    row_tokens: (total,) int64, the first position in the documents of each token of the row.
    """
    lengths = [len(example.input_ids) for example in examples]
    shared = shared_beginnings(examples) if share else [0] * len(examples)
    own = [np.arange(start, length) for start, length in zip(shared, lengths, strict=True)]  # tokens in the row

    def in_row(values: Sequence[NDArray[Any]]) -> Tensor:
        parts = [of_document[tokens] for of_document, tokens in zip(values, own, strict=True)]
        return torch.from_numpy(np.concatenate(parts).astype(np.int64))[None]

    ends = np.cumsum([0, *lengths])
    row: dict[str, Any] = {
        "input_ids": in_row([example.input_ids for example in examples]),
        "position_ids": in_row([np.arange(length) for length in lengths]),
        "labels": in_row([example.labels for example in examples]),
        **dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), torch.from_numpy(ends.astype(np.int32))),
        **dict.fromkeys(("max_length_q", "max_length_k"), max(lengths)),
    }
    firsts = np.cumsum([0, *map(len, own)])[:-1]  # where each document's own tokens begin in the row
    assert (row["labels"][0, firsts] == IGNORED).all(), "documents must be made by Example.of_text"
    if not any(shared):
        return row
    positions: list[NDArray[np.int64]] = [np.zeros(0, np.int64)]
    for first, start, tokens in zip(firsts, shared, own, strict=True):
        positions.append(np.concatenate([positions[-1][:start], np.arange(first, first + len(tokens))]))
    first_positions = in_row([np.arange(*bounds) for bounds in pairwise(ends)])[0]
    return {**row, "document_tokens": torch.from_numpy(np.concatenate(positions)), "row_tokens": first_positions}


def shared_beginnings(examples: Sequence[Example]) -> list[int]:
    """Returns the number of tokens with which each document begins like the one before it; 0 if that saves too little.

    They end before the first trained token of both documents, so that every prediction has its own position.
    """
    lengths = [len(example.input_ids) for example in examples]
    untrained = [int(np.argmax([*(example.labels != IGNORED), True])) - 1 for example in examples]
    shared = [0]
    for (before, most), (example, own_most) in pairwise(zip(examples, untrained, strict=True)):
        most = max(min(most, own_most), 0)
        same = before.input_ids[:most] == example.input_ids[:most]
        shared.append(most if same.all() else int(same.argmin()))
    return shared if sum(shared) >= WORTH * sum(lengths) else [0] * len(lengths)


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
