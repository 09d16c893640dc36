"""Images in chat requests: data: URLs within limits. The server fetches no addresses and writes no images to disk."""

from tailora.data.images import Image, read_data_url, replace_images
from tailora.data.messages import IMAGE, Messages
from tailora.engine.interface import PIXELS_OF_REQUEST, pixel_count
from tailora.errors import DataError
from tailora.serve.schemas import RequestError

FORMATS_OF_REQUEST = ("PNG", "JPEG", "WEBP", "GIF")  # as in OpenAI's API
IMAGES_OF_REQUEST = 16
LARGEST_IMAGE = 10 * 2**20  # bytes of a file
MOST_ELONGATED = 200  # ratio of the sides; processors scale up the shorter one


def decode_images(messages: Messages, obstacle: str, most_pixels: int) -> Messages:
    """Returns the messages with an `Image` for every data: URL.

    obstacle: why the model cannot read images; "" if it can.
    most_pixels: of an image.
    Raises RequestError, which names the part.
    """
    parts = {
        f"messages.{index}.content.{number}": part[IMAGE]
        for index, message in enumerate(messages)
        if isinstance(message["content"], list)
        for number, part in enumerate(message["content"])
        if part["type"] == IMAGE
    }
    if not parts:
        return messages
    if obstacle:
        message = f"this model cannot answer questions about images: {obstacle}; remove the images"
        raise RequestError(400, message, "messages")
    if len(parts) > IMAGES_OF_REQUEST:
        raise RequestError(400, f"the request has {len(parts):,} images; use at most {IMAGES_OF_REQUEST}", "messages")
    images: list[Image] = []
    for name, url in parts.items():
        try:
            images.append(_decoded(url, most_pixels))
            if pixel_count(images) > PIXELS_OF_REQUEST:
                raise DataError(f"the images have more than {PIXELS_OF_REQUEST:,} pixels in total; send smaller ones")
        except DataError as error:
            raise RequestError(400, f"{name}: {error}", "messages") from error
    return replace_images(messages, images)


def _decoded(url: str, most_pixels: int) -> Image:
    if len(url) > LARGEST_IMAGE * 4 // 3 + 100:  # base64, and what precedes it
        raise DataError(f"the image has more than {LARGEST_IMAGE >> 20} MiB; send a smaller one")
    image = read_data_url(url, FORMATS_OF_REQUEST, most_pixels)
    if max(image.width, image.height) > MOST_ELONGATED * min(image.width, image.height):
        raise DataError(
            f"the image has {image.width:,} x {image.height:,} pixels; one side may be at most {MOST_ELONGATED} times "
            "as long as the other"
        )
    return image
