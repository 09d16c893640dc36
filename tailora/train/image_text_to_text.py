"""Chats with images: the losses of a vision-language model.

Batches are padded, and the model computes its own logits, because packed rows and chunked losses would have to know
where each architecture puts its images. The processor decodes the images of a batch when the batch is made.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
from torch import Tensor, nn
from transformers import PreTrainedModel, ProcessorMixin

from tailora.data.collate import collate_padded
from tailora.data.dataset import Example
from tailora.data.images import Image
from tailora.data.processor import Tokenizer, pixel_inputs, token_types
from tailora.kernels.loss import FORMS, Batch, own_form
from tailora.model import LoRAModel
from tailora.train.config import NATS_PER_TOKEN
from tailora.train.loss import CAUSAL_LM, BatchLayout, Outputs, Task, next_tokens_of
from tailora.train.trainable import FullModel

TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")  # Gemma 3; Gemma 4, Qwen-VL, GLM-V


@dataclass(frozen=True, eq=False)
class ImageTextToText(Task):
    """Predicts the next token of chats with or without images: a loss for each supervised token."""

    processor: ProcessorMixin

    loss_unit = NATS_PER_TOKEN
    is_plain = True

    @property
    def description(self) -> str:
        return "chats with images"

    def make_batch(self, examples: Sequence[Example], layout: BatchLayout) -> Batch:
        inputs: dict[str, Any] = dict(collate_padded(examples, layout.pad_id))
        labels = inputs.pop("labels").numpy()
        owners = np.broadcast_to(np.arange(len(examples))[:, None], labels.shape)
        inputs |= image_inputs(self.processor, inputs["input_ids"], [example.images for example in examples])
        return Batch.of(inputs, next_tokens_of(labels), owners)

    def outputs(self, model: nn.Module, batch: Batch, layout: BatchLayout) -> Outputs:  # noqa: ARG002
        form = FORMS[own_form(_base_of(model))]
        return Outputs(form(model, replace(batch, inputs=accepted_inputs(model, batch.inputs))))

    def call(self, model: nn.Module, batch: Batch) -> Any:
        return model(**accepted_inputs(model, batch.inputs))

    def start_of(self, example: Example, tokens: int, *, supervised: bool = True) -> Example:
        """Leaves the images out: a part of one would be no input, and frozen towers keep nothing for the backward."""
        is_text = ~np.isin(example.input_ids, self.processor.image_token_ids)
        return Example.of_text(example.input_ids[is_text][:tokens], supervised)


def language_model_task(tokenizer: Tokenizer) -> Task:
    return ImageTextToText(tokenizer) if isinstance(tokenizer, ProcessorMixin) else CAUSAL_LM


def _base_of(model: nn.Module) -> PreTrainedModel:
    return cast(PreTrainedModel, model.base_model if isinstance(model, LoRAModel | FullModel) else model)


def image_inputs(processor: ProcessorMixin, input_ids: Tensor, images: Sequence[Sequence[Image]]) -> dict[str, Tensor]:
    """Returns the inputs other than input_ids, (batch, length), on the CPU: pixels, and which tokens are images.

    images: of each row. Raises DataError if one cannot be read anymore.
    """
    return pixel_inputs(processor, images) | dict.fromkeys(TOKEN_TYPES, token_types(processor, input_ids))


def accepted_inputs(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the inputs with the types of tokens under the model's name for them, and pixels in its precision."""
    base = _base_of(model)
    unknown = set(TOKEN_TYPES) - inspect.signature(base.forward).parameters.keys()
    return {
        name: value.to(base.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
        if name not in unknown
    }
