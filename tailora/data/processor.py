"""The processor of a vision-language model, which turns images into pixel values and placeholders.

The text of an example contains as many placeholders as its images have tokens, so that everything else treats them like
other tokens. The pixel values of a batch are computed when the batch is needed.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from tailora.data.images import Image
from tailora.errors import DataError

Tokenizer: TypeAlias = PreTrainedTokenizerBase | ProcessorMixin  # a processor for vision-language models
TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


def text_tokenizer(tokenizer: Any) -> Any:
    """Returns the tokenizer of a processor; a tokenizer unchanged."""
    return tokenizer.tokenizer if isinstance(tokenizer, ProcessorMixin) else tokenizer


def image_placeholders(processor: ProcessorMixin, width: int, height: int) -> str:
    """Returns the text that replaces an image of this size in a chat.

    It is the same for every image of the size, so a blank one is processed. Raises DataError if the processor refuses
    the size.
    """
    import PIL.Image

    blank, text = PIL.Image.new("RGB", (width, height)), [processor.image_token]
    try:
        output = processor(images=[[blank]], text=text, return_text_replacement_offsets=True)
    except (ValueError, ZeroDivisionError, RuntimeError) as error:
        raise DataError(f"the model's processor rejects an image of {width:,} x {height:,} pixels: {error}") from None
    ((replacement,),) = output["text_replacement_offsets"]
    return str(replacement["replacement"])


def pixel_inputs(processor: ProcessorMixin, images: Sequence[Sequence[Image]]) -> dict[str, Tensor]:
    """Decodes the images of each example and returns the model's inputs for them, such as pixel_values."""
    loaded = [[image.load() for image in of_example] for of_example in images if of_example]
    if not loaded:
        return {}
    texts = [processor.image_token * len(of_example) for of_example in loaded]
    output = processor(images=loaded, text=texts, padding=True, return_tensors="pt")
    return {name: value for name, value in output.items() if name not in TEXT_INPUTS}


def token_types(processor: ProcessorMixin, input_ids: Tensor) -> Tensor:
    """Returns 1 for the tokens of images and 0 for others, (batch, length), for models that need it."""
    return torch.tensor(processor.create_mm_token_type_ids(input_ids.tolist()))
