"""The tokens of images, their placeholders: the text of an example has as many as its images have tokens."""

from collections.abc import Sequence
from itertools import islice

from transformers import ProcessorMixin

from tailora.errors import DataError


def media_ids(processor: ProcessorMixin | None) -> list[int]:
    """Returns the ids of the tokens that stand for images, videos and audio."""
    groups = (getattr(processor, f"{medium}_token_ids", []) for medium in ("image", "video", "audio"))
    return [token for ids in groups for token in ids if token is not None]


def image_placeholders(processor: ProcessorMixin, sizes: Sequence[tuple[int, int]]) -> list[str]:
    """Returns the text that replaces each image of a chat. sizes: width and height of all its images.

    It is the same for all images of these sizes, so blank ones are processed. Some processors give an image fewer
    tokens if there are others. Raises DataError if the processor refuses the sizes.
    """
    import PIL.Image

    blank, text = [PIL.Image.new("RGB", size) for size in sizes], processor.image_token * len(sizes)
    try:
        output = processor(images=[blank], text=[text], return_text_replacement_offsets=True)
    except (ValueError, ZeroDivisionError, RuntimeError) as error:
        named = " and ".join(f"{width:,} x {height:,}" for width, height in dict.fromkeys(sizes))
        raise DataError(f"the model's processor rejects an image of {named} pixels: {error}") from None
    if "text_replacement_offsets" not in output:
        raise DataError(f"{type(processor).__name__} does not return the text that replaces an image")
    (replacements,) = output["text_replacement_offsets"]
    return [str(replacement["replacement"]) for replacement in replacements]


def image_owners(processor: ProcessorMixin, input_ids: Sequence[int], sizes: Sequence[tuple[int, int]]) -> list[int]:
    """Returns which image each token belongs to, -1 for text. sizes: width and height of each image.

    An image has all tokens from its first image token to its last one. What surrounds them counts as text, because
    tokenizers may merge it with its neighbours and truncation may remove it.
    """
    owners, image_ids = [-1] * len(input_ids), set(processor.image_token_ids)
    positions = (index for index, token in enumerate(input_ids) if token in image_ids)
    for number, text in enumerate(image_placeholders(processor, sizes) if sizes else ()):
        ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        own = list(islice(positions, sum(token in image_ids for token in ids)))
        owners[own[0] : own[-1] + 1] = [number] * (own[-1] + 1 - own[0])
    return owners
