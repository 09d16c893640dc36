"""The processor of a vision-language model, which turns images into pixel values; image_tokens.py: into placeholders.

The pixel values of a batch are computed when the batch is needed.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

if TYPE_CHECKING:
    from tailora.data.images import Image

Tokenizer: TypeAlias = PreTrainedTokenizerBase | ProcessorMixin  # a processor for vision-language models
TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")  # Gemma 3; Gemma 4, Qwen-VL, GLM-V
TEXT_INPUTS = ("input_ids", "attention_mask", *TOKEN_TYPES)


def text_tokenizer(tokenizer: Any) -> Any:
    """Returns the tokenizer of a processor; a tokenizer unchanged."""
    return tokenizer.tokenizer if isinstance(tokenizer, ProcessorMixin) else tokenizer


def pixel_inputs(processor: ProcessorMixin, images: Sequence[Sequence[Any]]) -> dict[str, Tensor]:
    """Returns the model's inputs for the images of each row, such as pixel_values.

    images: PIL's, decoded. Rows without images have an empty list, because some processors return a tensor per row.
    """
    if not any(images):
        return {}
    texts = [processor.image_token * len(of_row) for of_row in images]
    output = processor(images=images, text=texts, padding=True, return_tensors="pt")
    return {name: value for name, value in output.items() if name not in TEXT_INPUTS}


def image_inputs(
    processor: ProcessorMixin, input_ids: Tensor, images: Sequence[Sequence["Image"]]
) -> dict[str, Tensor]:
    """Returns the inputs other than input_ids, (batch, length), on the CPU: pixels, and which tokens are images.

    images: of each row. Raises DataError if one cannot be read anymore.
    """
    pixels = pixel_inputs(processor, [[image.load() for image in of_row] for of_row in images])
    return pixels | image_tokens(processor, input_ids)


def image_tokens(processor: ProcessorMixin, input_ids: Tensor) -> dict[str, Tensor]:
    """Returns 1 for the tokens of images and 0 for others, (batch, length), under every name that models have for it.

    {} if the processor does not tell the model.
    """
    if {*TOKEN_TYPES}.isdisjoint(processor(text=["a"]).keys()):
        return {}
    return dict.fromkeys(TOKEN_TYPES, torch.tensor(processor.create_mm_token_type_ids(input_ids.tolist())))


def base_of(model: Any) -> PreTrainedModel:
    """Returns the model itself, or the one that a LoRAModel wraps."""
    base: PreTrainedModel = model if isinstance(model, PreTrainedModel) else model.base_model
    return base


def accepted_inputs(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the inputs with the types of tokens under the model's name for them, and pixels in its precision."""
    base = base_of(model)
    unknown = set(TOKEN_TYPES) - inspect.signature(base.forward).parameters.keys()
    return {
        name: value.to(base.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
        if name not in unknown
    }


def added_start(tokenizer: Tokenizer) -> list[int]:
    """Returns the ids that a tokenizer or processor adds before a text: [BOS] or nothing."""
    bare, full = (
        text_tokenizer(tokenizer)("a", add_special_tokens=False)["input_ids"],
        tokenizer(text=["a"])["input_ids"][0],
    )
    start = next((start for start in range(len(full)) if full[start : start + len(bare)] == bare), 0)
    return list(full[:start])
