"""Sequence to sequence (T5, BART): the encoder reads the prompt, and the decoder predicts each token of the completion.

An example's first sequence is what the encoder reads, its second what the decoder predicts: see `data.tokenize`.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tailora.data.collate import collate_padded
from tailora.data.dataset import Example
from tailora.kernels.loss import Batch
from tailora.model import LoRAModel
from tailora.train.loss import BatchLayout, Outputs, Task
from tailora.train.trainable import FullModel


class Seq2Seq(Task):
    """A loss for each token of the completion, of which the decoder has seen those before."""

    description = "sequence to sequence"
    loss_unit = "nats per token"
    is_plain = True

    def make_batch(self, examples: Sequence[Example], layout: BatchLayout) -> Batch:
        sources, targets = zip(*(example.sequences for example in examples), strict=True)
        inputs: dict[str, Any] = dict(collate_padded(sources, layout.pad_id))
        del inputs["labels"]
        labels = collate_padded(targets, layout.pad_id)["labels"]
        owners = np.broadcast_to(np.arange(len(examples))[:, None], labels.shape)
        return replace(Batch.of(inputs, labels.numpy(), owners), extras={"labels": labels})

    def call(self, model: nn.Module, batch: Batch) -> Any:
        base: Any = model.base_model if isinstance(model, LoRAModel | FullModel) else model
        shifted = base.prepare_decoder_input_ids_from_labels(labels=batch.extras["labels"])
        return model(**batch.inputs, decoder_input_ids=shifted, use_cache=False)

    def outputs(self, model: nn.Module, batch: Batch, layout: BatchLayout) -> Outputs:  # noqa: ARG002
        logits = self.call(model, batch).logits.flatten(0, 1).index_select(0, batch.supervised)
        wide = cast(Tensor, logits.to(torch.promote_types(logits.dtype, torch.float32)))
        return Outputs(F.cross_entropy(wide, batch.targets, reduction="none"))

    def start_of(self, example: Example, tokens: int, *, supervised: bool = True) -> Example:  # noqa: ARG002
        first, second = (part.beginning(tokens) for part in example.sequences)
        return Example.of_two(first, second)


SEQ2SEQ_TASK = Seq2Seq()
