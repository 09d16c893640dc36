"""Images in chat messages: found in a row, checked, and decoded when their batch is needed.

    "a.png", bytes, {"bytes", "path"}, data: URL   the value in a row
    -> `read_images`: every value becomes an `Image`: a file on disk, its size and its hash
    -> `Image.load`: the pixels, for one batch

Every image is decoded once when the data is read, so that a broken one is reported with its row and not after hours of
training. JPEG files are decoded at an eighth of their size for that. Images that are not files are kept in the cache
folder under their hash (`store_images`), so that memory does not grow with the data.
"""

import base64
import binascii
import hashlib
import struct
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from threading import BoundedSemaphore
from typing import Any
from uuid import uuid4

from tailora.core.cache import cache_folder
from tailora.data.messages import IMAGE, IMAGE_VALUES, Messages, image_parts, short_repr
from tailora.errors import DataError, WriteError, listing

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # JPEG includes MPO, which phones write
MOST_PIXELS = 64_000_000
DECODING = BoundedSemaphore(2)  # images at a time, in all threads; each may need several hundred MB
MOST_BYTES = 64 << 20  # of a file
PIXELS_OF_ROW = 200_000_000  # of all its images; decoded, they need 600 MB
THUMBNAIL = 96  # pixels of the longer side
DEEPEST = 8  # objects and lists around an image in a row; messages/0/content/0/image_url/url has 6
KEYS = (*IMAGE_VALUES, "image_url", "images")  # of data: URLs in a row
IS_URL = "is a URL, but images must be files"
TO_DOWNLOAD = """\nDownload the images, and replace their URLs in the rows, for example:
    from urllib.request import urlretrieve
    for number, row in enumerate(rows):
        row["image"], _ = urlretrieve(row["image"], f"images/{number}.jpg")"""
ORIENTATION = 0x0112  # EXIF tag
TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # its value -> PIL.Image.Transpose
SIDEWAYS = (5, 6, 7, 8)  # values that swap width and height
BROKEN = (OSError, SyntaxError, ValueError, EOFError, TypeError, LookupError, ArithmeticError, struct.error)  # of PIL


@dataclass(frozen=True, slots=True)
class Image:
    """An image that was read once without errors."""

    path: Path | None
    sha256: str  # of its bytes, in hexadecimal
    width: int  # both after rotation by its EXIF tag
    height: int
    name: str  # its value in the row, for messages
    content: bytes | None = field(default=None, repr=False)  # of an image without a file

    def to_dict(self) -> dict[str, Any]:
        """Returns everything but the pixels."""
        return {name: getattr(self, name) for name in ("sha256", "width", "height", "name")} | {"path": str(self.path)}

    def thumbnail(self) -> str:
        """Returns a small JPEG as a data: URL; "" if the file has changed since the image was read."""
        try:
            image = self.load()
        except DataError:
            return ""
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        file = BytesIO()
        image.save(file, "JPEG")
        return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"

    def load(self) -> Any:
        """Returns the image in RGB, as PIL's class. Raises DataError if the file changed since it was read."""
        if self.content is not None:
            return _decode(self.content, self.name)
        assert self.path is not None
        content = _file_bytes(self.path, self.name)
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise DataError(f"image {self.name} changed after it was read; start again, and leave the file unchanged")
        return _decode(content, self.name)


def images_of(messages: Messages) -> tuple[Image, ...]:
    """Returns the images of messages that `read_images` returned, in order."""
    return tuple(part[IMAGE] for part in image_parts(messages))


def read_images(messages: Messages, folder: Path | None) -> Messages:
    """Returns the messages with an `Image` for every value of an image; unchanged without images.

    folder: paths are relative to it and must not lead out of it; None if the data is not in a folder.
    Raises DataError with all images that cannot be used.
    """
    images = _read_all(lambda part: read_image(part[IMAGE], folder), image_parts(messages))
    if (pixels := sum(image.width * image.height for image in images)) > PIXELS_OF_ROW:
        raise DataError(
            f"the row's images have {pixels:,} pixels in total; expected at most {PIXELS_OF_ROW:,}. Use smaller "
            "images, or split the row into several"
        )
    return replace_images(messages, images)


def read_image_files(paths: Sequence[Path]) -> list[Image]:
    """Returns the images of files that the user named. Raises DataError with all that cannot be used."""
    return _read_all(lambda path: _checked(_file_bytes(path, str(path)), path.absolute(), str(path)), paths)


def read_data_url(url: str, formats: Sequence[str], most_pixels: int) -> Image:
    """Returns the image of a data: URL without storing it. Raises DataError unless it can be used."""
    content, name = _from_data_url(url), short_repr(url)
    return replace(_checked(content, None, name, formats, most_pixels), content=content)


def _read_all(read: Callable[[Any], Image], values: Sequence[Any]) -> list[Image]:
    images, problems = [], []
    for value in values:
        try:
            images.append(read(value))
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError(listing(problems))
    return images


def replace_images(messages: Messages, images: Sequence[Any] | None = None) -> Messages:
    """Returns the messages with these values for their images, in order; without values, as templates read them."""
    values = iter(images) if images is not None else None

    def replaced(part: dict[str, Any]) -> dict[str, Any]:
        if part["type"] != IMAGE:
            return part
        return {"type": IMAGE} if values is None else {"type": IMAGE, IMAGE: next(values)}

    return [
        {**message, "content": [replaced(part) for part in message["content"]]}
        if isinstance(message["content"], list)
        else message
        for message in messages
    ]


def store_images(value: Any, key: str, *, is_used: bool, depth: int = 1) -> Any:
    """Returns a value of a row with its images in the cache folder instead of in memory: bytes and data: URLs.

    An image that cannot be used becomes its DataError, which `read_image` raises.
    key: of the value, or of its list.
    is_used: False for columns that are not read, whose images become None.
    depth: objects and lists around it.
    """
    if depth > DEEPEST:
        return value
    if isinstance(value, dict) and ("type" in value or not isinstance(value.get("bytes"), bytes)):
        return {name: store_images(inner, name, is_used=is_used, depth=depth + 1) for name, inner in value.items()}
    if isinstance(value, list):
        return [store_images(inner, key, is_used=is_used, depth=depth + 1) for inner in value]
    is_url = isinstance(value, str) and key in KEYS and value.startswith("data:")
    if not is_url and not isinstance(value, bytes | dict):
        return value
    try:
        return read_image(value, None) if is_used else None
    except DataError as error:
        return error


def read_image(value: Any, folder: Path | None) -> Image:
    """Returns the image of a value in a row. Raises DataError if it cannot be used.

    value: path, data: URL, bytes, what `datasets` stores ({"bytes", "path"}), or what `store_images` returned.
    folder: of paths; None if the data is not in a folder.
    """
    if isinstance(value, Image):
        return value
    if isinstance(value, DataError):
        raise value
    name = None
    if isinstance(value, dict):
        name = value.get("path")
        value = next((value[key] for key in IMAGE_VALUES if value.get(key) is not None), None)
    if isinstance(value, bytes):
        return _stored(value, str(name or f"of {len(value):,} bytes"))
    if not isinstance(value, str) or not value:
        raise DataError(f"image: expected a path, a data: URL or bytes, got {short_repr(value)}")
    if value.startswith("data:"):
        return _stored(_from_data_url(value), short_repr(value))
    path = _path_inside(value.removeprefix("file://"), folder)
    name = _printable(value)
    return _checked(_file_bytes(path, name), path, name)


def _printable(path: str) -> str:
    return path if path.isprintable() else repr(path)


def _path_inside(value: str, folder: Path | None) -> Path:
    if "://" in value:
        raise DataError(f"image {short_repr(value)} {IS_URL}")
    if folder is None:
        raise DataError(f"image {short_repr(value)}: the data is not in a folder; set --image-folder for its paths")
    try:
        path, root = (folder / value).resolve(), folder.resolve()
        is_inside = path.is_relative_to(root)
    except (OSError, ValueError, RuntimeError) as error:  # a null byte, a loop of links
        raise DataError(f"image {short_repr(value)} is not a path: {error}") from None
    if not is_inside:
        raise DataError(
            f"image {short_repr(value)} is outside of {folder}; move it there, or set --image-folder to a folder that "
            "contains all images"
        )
    return path


def _file_bytes(path: Path, name: str) -> bytes:
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):  # a pipe or a device has no end
            raise DataError(f"image {name} is not a file")
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise DataError(f"image {name}: {error.strerror or error}; its path is {_printable(str(path))}") from None
    return content


def _from_data_url(url: str) -> bytes:
    header, comma, data = url.partition(",")
    try:
        if not comma or not header.endswith(";base64"):
            raise ValueError("it does not begin with data:image/...;base64,")
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"image {short_repr(url)} is not a base64 data URL: {error}") from None


def _stored(content: bytes, name: str) -> Image:
    """Writes an image that is not a file to the cache folder."""
    path = cache_folder() / "images" / hashlib.sha256(content).hexdigest()
    image = _checked(content, path, name)
    if not path.exists():
        temporary = path.with_suffix(f".{uuid4().hex}")  # other processes may write the same image
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(content)
            temporary.replace(path)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink()
            raise WriteError(
                f"image {name} cannot be kept in {path.parent}: {error.strerror or error}; set TAILORA_HOME to a "
                "folder that you may write to"
            ) from None
    return image


def _checked(
    content: bytes, path: Path | None, name: str, formats: Sequence[str] = FORMATS, most_pixels: int = MOST_PIXELS
) -> Image:
    """Decodes an image to see that it is complete. Raises DataError."""
    if len(content) > MOST_BYTES:
        raise DataError(f"image {name} has more than {MOST_BYTES >> 20} MiB; save it with a smaller size")
    with _opened(content, name, formats, most_pixels) as (image, orientation):
        width, height = image.size
        size = (height, width) if orientation in SIDEWAYS else (width, height)
        image.draft("RGB", (max(width // 8, 1), max(height // 8, 1)))  # JPEG is read completely, but computed smaller
        image.load()
    return Image(path, hashlib.sha256(content).hexdigest(), *size, name)


@contextmanager
def _opened(
    content: bytes, name: str, formats: Sequence[str] = FORMATS, most_pixels: int = MOST_PIXELS
) -> Iterator[tuple[Any, int]]:
    """Yields a still image of an expected format and size, and the orientation in its EXIF data.

    PIL's errors within the block become DataError.
    """
    import PIL.Image

    if not content:
        raise DataError(f"image {name} is not an image: it is empty")
    try:
        with warnings.catch_warnings(action="ignore", category=PIL.Image.DecompressionBombWarning):
            image = PIL.Image.open(BytesIO(content), formats=tuple(formats))
        width, height = image.size
        if width * height > most_pixels:
            size = f"{width:,} x {height:,} pixels"
            raise DataError(f"image {name} has {size}; expected at most {most_pixels:,}. Save it with a smaller size")
        frames = getattr(image, "n_frames", 1)
        if frames > 1 and image.format != "MPO":
            raise DataError(f"image {name} is an animation of {frames:,} frames; save one of them as an image")
        with DECODING:
            yield image, image.getexif().get(ORIENTATION, 1)
    except DataError:
        raise
    except PIL.UnidentifiedImageError:
        raise DataError(f"image {name} is not an image; expected one of {', '.join(formats)}") from None
    except PIL.Image.DecompressionBombError:
        raise DataError(f"image {name} has too many pixels; expected at most {most_pixels:,}") from None
    except BROKEN as error:
        raise DataError(f"image {name} cannot be decoded: {error}; repair or remove it") from None


def _decode(content: bytes, name: str) -> Any:
    """Returns an image in RGB, rotated by its EXIF tag. Transparent pixels become white, 16 bits become 8."""
    import numpy as np
    import PIL.Image

    with _opened(content, name) as (image, orientation):
        if orientation in TURNS:
            image = image.transpose(TURNS[orientation])
        if image.mode.startswith("I"):  # 16 bits of gray, which PIL would clip at 255
            image = PIL.Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            white = PIL.Image.new("RGBA", image.size, "white")
            image = PIL.Image.alpha_composite(white, image.convert("RGBA"))
        return image.convert("RGB")
