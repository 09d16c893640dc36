"""Chats with images: the losses of a vision-language model.

Batches are padded, and the model computes its own logits, because packed rows and chunked losses would have to know
where each architecture puts its images. The processor decodes the images of a batch when the batch is made.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn
from transformers import ProcessorMixin

from tailora.data.chat_template import ChatTokenizer
from tailora.data.collate import collate_padded
from tailora.data.dataset import Example, Int32
from tailora.data.image_processor import (
    TOKEN_TYPES,
    Tokenizer,
    accepted_inputs,
    base_of,
    image_inputs,
    image_tokens,
    pixel_inputs,
)
from tailora.errors import ConfigError, DataError
from tailora.kernels.loss import FORMS, Batch, own_form
from tailora.train.config import NATS_PER_TOKEN
from tailora.train.loss import CAUSAL_LM, BatchLayout, Outputs, Task, next_tokens_of


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
        form = FORMS[own_form(base_of(model))]
        return Outputs(form(model, replace(batch, inputs=accepted_inputs(model, batch.inputs))))

    def call(self, model: nn.Module, batch: Batch) -> Any:
        return model(**accepted_inputs(model, batch.inputs))

    def start_of(self, example: Example, tokens: int, *, supervised: bool = True) -> Example:
        """Leaves the images out: a part of one would be no input, and frozen towers keep nothing for the backward."""
        return Example.of_text(example.input_ids[~self.is_image(example.input_ids)][:tokens], supervised)

    def as_text(self, example: Example) -> Example:
        """Returns an example of text with as many tokens."""
        is_image = self.is_image(example.input_ids)
        return replace(
            example, input_ids=np.where(is_image, example.input_ids[~is_image][0], example.input_ids), images=()
        )

    def is_image(self, input_ids: Int32) -> npt.NDArray[np.bool_]:
        """Returns which tokens are placeholders of images; the same shape."""
        return np.isin(input_ids, self.processor.image_token_ids)


def language_model_task(tokenizer: Tokenizer) -> Task:
    return ImageTextToText(tokenizer) if isinstance(tokenizer, ProcessorMixin) else CAUSAL_LM


# ---- Which processors are supported

SIZES = ((48, 40), (60, 110))  # width, height of the images that a processor is tried on


def check_processor(processor: ProcessorMixin, name: str) -> None:
    """Raises ConfigError unless our inputs for chats with two images, one and none equal the processor's own.

    They differ if placeholders depend on more than the sizes of a chat's images, or an input for images on its text.
    name: of the model, for messages.
    """
    try:
        tokenizer = ChatTokenizer.of(processor)
        if tokenizer.template is not None:
            _check_template(tokenizer, name)
        expected, actual = _inputs_in_two_ways(tokenizer, processor)
    except ConfigError:
        raise
    except (DataError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"model {name!r}: {type(processor).__name__} is not supported ({error}); use a different --model"
        ) from error
    unused = {key for key in TOKEN_TYPES if key not in actual and not np.any(expected.get(key, 0))}  # of the tokenizer
    wrong = sorted(
        key
        for key in expected.keys() | actual.keys() - {*TOKEN_TYPES}
        if key not in unused and not np.array_equal(expected.get(key, np.nan), actual.get(key, np.nan))
    )
    if wrong:
        raise ConfigError(
            f"model {name!r}: {type(processor).__name__} is not supported, because its {', '.join(wrong)} cannot be "
            "computed from single images; use a different --model"
        )


def _check_template(tokenizer: ChatTokenizer, name: str) -> None:
    """Raises ConfigError if the chat template does not render images: tokenizers often have one for text."""
    cause, image = "it writes no placeholder", getattr(tokenizer.processor, "image_token", "")
    try:
        content = [{"type": "image"}, {"type": "text", "text": "a"}]
        if image in tokenizer.render([{"role": "user", "content": content}], add_generation_prompt=True, expand=False):
            return
    except DataError as error:
        cause = str(error)
    raise ConfigError(
        f"model {name!r}: the chat template does not render images ({cause}); copy chat_template.jinja of the original "
        "model to the folder of this one"
    )


def _inputs_in_two_ways(
    tokenizer: ChatTokenizer, processor: ProcessorMixin
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Returns the inputs that the processor computes from three chats, and those that we do."""
    import PIL.Image

    numbers = np.random.default_rng(0)
    images = [PIL.Image.fromarray(numbers.integers(0, 256, (*size[::-1], 3), np.uint8)) for size in SIZES]
    if tokenizer.template is None:  # reads texts only
        images, ids = [], [tokenizer.bos_ids + tokenizer.token_ids("a")]
        expected = processor(text=["a"], return_tensors="pt")
    else:
        parts = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": "a"}]
        chats = [[{"role": "user", "content": content}] for content in (parts, parts[1:], parts[-1:])]
        expected = processor.apply_chat_template(
            chats,
            chat_template=tokenizer.template,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "right"},
        )
        ids = [tokenizer.prompt_ids(chat) for chat in chats]
    batch = collate_padded([Example.of_text(np.array(row)) for row in ids], tokenizer.tokenizer.pad_token_id)
    del batch["labels"]
    pixels = pixel_inputs(processor, [images, images[1:], []][: len(ids)])
    return expected, batch | pixels | image_tokens(processor, batch["input_ids"])
