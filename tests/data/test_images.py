"""Images in rows: every common format, images that cannot be used, and files that change."""

import base64
import json
import os
import re
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from textwrap import dedent
from threading import Lock
from typing import Any

import datasets
import numpy as np
import PIL.Image
import PIL.ImageFile
import PIL.ImageOps
import pyarrow
import pyarrow.parquet
import pytest
from tiny_vision import COLORS, SIDE, data_url, png_header, save_image, tiny_llava, tiny_vlm
from transformers import ProcessorMixin

from tailora.data.chat_template import ChatTokenizer, DataSettings
from tailora.data.images import read_data_url, read_image
from tailora.data.prepare import encode_source, prepare
from tailora.data.readers import Row, read_hub
from tailora.data.tokenize import EncodedSample, preview
from tailora.errors import DataError, WriteError

TEXT_PART, IMAGE_PART = {"type": "text", "text": "Which?"}, {"type": "image"}
REPLY = {"role": "assistant", "content": "green"}


@pytest.fixture(scope="module")
def processor() -> ProcessorMixin:
    return tiny_llava()[1]


@pytest.fixture(autouse=True)
def colors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder with red.png, green.png and blue.png. The cache is next to it."""
    monkeypatch.setenv("TAILORA_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "data"
    folder.mkdir()
    for name, color in COLORS.items():
        save_image(folder / f"{name}.png", color)
    return folder


def content_of(image: PIL.Image.Image, format: str = "PNG", **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


RED = content_of(PIL.Image.new("RGB", (SIDE, SIDE), COLORS["red"]))
RED_URL = data_url(RED)


def write_rows(folder: Path, rows: list[Any]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


def as_read(source: str, processor: ProcessorMixin, **settings: Any) -> list[tuple[str, list[str]]]:
    """Returns the text of each example, with {} for each image, and the colors of its images."""
    names = {color: name for name, color in COLORS.items()}
    result = []
    for example in prepare(source, processor, DataSettings(validation_split=0, **settings)).train:
        text = processor.tokenizer.decode(example.input_ids.tolist()).replace("<image>" * 4, "{}")
        loaded = [image.load() for image in example.images]
        assert all(
            (image.width, image.height) == shown.size for image, shown in zip(example.images, loaded, strict=True)
        )
        result.append((text, [names[shown.getpixel((0, 0))] for shown in loaded]))
    return result


def asked(*messages: str) -> str:
    """Returns the text of the tiny model's chat: messages of user and assistant in turn."""
    roles = ("user", "assistant")
    texts = (f"<|im_start|>{roles[index % 2]}\n{text}<|im_end|>" for index, text in enumerate(messages))
    return "\n".join(texts)


# ---- Formats


def chat(content: Any, **columns: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}, REPLY], **columns}


SHAREGPT = [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": "green"}]


@pytest.mark.parametrize(
    ("row", "text", "names"),
    [
        (chat([{"type": "image", "image": "red.png"}, TEXT_PART]), "{}Which?", "red"),
        (chat([{"type": "image", "path": "./red.png"}, TEXT_PART]), "{}Which?", "red"),
        (chat([TEXT_PART, {"type": "image", "url": "blue.png"}]), "Which?{}", "blue"),
        (chat([{"type": "image_url", "image_url": {"url": RED_URL}}, TEXT_PART]), "{}Which?", "red"),
        (chat([{"type": "image_url", "image_url": RED_URL}, TEXT_PART]), "{}Which?", "red"),
        (chat([IMAGE_PART, TEXT_PART, IMAGE_PART], images=["red.png", "blue.png"]), "{}Which?{}", "red blue"),
        (chat([IMAGE_PART, {"type": "image", "path": "blue.png"}], images=["red.png"]), "{}{}", "red blue"),
        (chat("Which?", images=["red.png", "blue.png"]), "{}{}Which?", "red blue"),
        (chat("Which?", image="red.png"), "{}Which?", "red"),
        (chat("Which?", image={"path": "red.png"}), "{}Which?", "red"),
        (chat("<image>Which?<image>", images=["red.png", "blue.png"]), "{}Which?{}", "red blue"),
        (chat("Which?", images=[]), "Which?", ""),
        ({"prompt": "<image>Which?", "completion": "green", "image": "red.png"}, "{}Which?", "red"),
        ({"prompt": "Which?", "completion": "green", "images": ["red.png"]}, "{}Which?", "red"),
        (
            {"prompt": chat("Which?")["messages"][:1], "completion": [REPLY], "images": [RED_URL]},
            "{}Which?",
            "red",
        ),
        ({"instruction": "Which?", "output": "green", "image": "red.png"}, "{}Which?", "red"),
        ({"id": "7", "image": "blue.png", "conversations": SHAREGPT}, "{}\nWhich?", "blue"),
    ],
)
def test_images_are_read_in_every_format(
    colors: Path, processor: ProcessorMixin, row: dict[str, Any], text: str, names: str
) -> None:
    ((shown, images),) = as_read(write_rows(colors, [row]), processor)
    assert (shown, images) == (asked(text, "green"), names.split())


def test_turns_and_rows_keep_their_images(colors: Path, processor: ProcessorMixin) -> None:
    messages = [
        {"role": "system", "content": "Look."},
        {"role": "user", "content": "<image> or <image>?"},
        REPLY,
        {"role": "user", "content": "And <image>?"},
        REPLY,
    ]
    rows = [
        {"messages": messages, "images": ["blue.png", "red.png", "green.png"]},
        chat("No image."),
        chat("A", images=None),
    ]
    first, second, third = as_read(write_rows(colors, rows), processor)
    assert first[0].count("{}") == 3
    assert first[1] == ["blue", "red", "green"]
    assert second == (asked("No image.", "green"), [])
    assert third == (asked("A", "green"), [])


ROWS = [chat("<image>?", images=["red"]), chat("<image> <image>?", images=["blue", "green"]), chat("none", images=[])]
SHOWN = [
    (asked("{}?", "green"), ["red"]),
    (asked("{} {}?", "green"), ["blue", "green"]),
    (asked("none", "green"), []),
]


def stored(folder: Path, *, with_path: bool = True) -> list[dict[str, Any]]:
    """Returns ROWS with images as `datasets` stores them."""

    def value(name: str) -> dict[str, Any]:
        return {
            "bytes": (folder / f"{name}.png").read_bytes(),
            "path": f"/of/another/machine/{name}.png" if with_path else None,
        }

    return [{**row, "images": [value(name) for name in row["images"]]} for row in ROWS]


FEATURES = datasets.Features(
    messages=[{"role": datasets.Value("string"), "content": datasets.Value("string")}],
    images=datasets.List(datasets.Image()),
)


@pytest.mark.parametrize("with_path", [True, False])
def test_images_in_parquet_are_read(colors: Path, processor: ProcessorMixin, with_path: bool) -> None:
    path = colors / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(stored(colors, with_path=with_path)), path)
    assert as_read(str(path), processor) == SHOWN


@pytest.mark.parametrize("streaming", [True, False])
def test_images_of_the_hub_are_not_decoded_by_datasets(
    colors: Path, streaming: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.delattr(datasets.Image, "decode_example")
    (tmp_path / "hub").mkdir()
    datasets.Dataset.from_list(stored(colors), features=FEATURES).to_parquet(tmp_path / "hub" / "train.parquet")
    rows = list(read_hub(str(tmp_path / "hub"), "train", streaming))
    assert [row.fields for row in rows] == stored(colors)
    assert [row.number for row in rows] == [1, 2, 3]


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_images_in_tables_are_paths_or_lists_of_paths(colors: Path, processor: ProcessorMixin, suffix: str) -> None:
    tab = "," if suffix == ".csv" else "\t"
    path = colors / f"rows{suffix}"
    path.write_text(f"prompt{tab}completion{tab}image\n<image>?{tab}green{tab}red.png\nnone{tab}green{tab}\n")
    assert as_read(str(path), processor) == [SHOWN[0], SHOWN[2]]
    path.write_text(
        f'prompt{tab}completion{tab}images\n<image> <image>?{tab}green{tab}"[""blue.png"", ""green.png""]"\n'
    )
    assert as_read(str(path), processor) == [SHOWN[1]]


def test_an_image_is_one_piece_of_a_preview(colors: Path, processor: ProcessorMixin) -> None:
    save_image(colors / "wide.png", "red", (64, 48))
    data = write_rows(colors, [chat("<image><image>?", images=["red.png", "wide.png"])])
    (example,) = prepare(data, processor, DataSettings(validation_split=0)).train
    assert preview(example, processor) == [
        ("<|im_start|>user\n", False),
        ("[image 28x28]", False),
        ("[image 64x48]", False),
        ("?<|im_end|>\n<|im_start|>assistant\n", False),
        ("green<|im_end|>", True),
    ]


def test_the_tokens_of_images_are_never_trained(colors: Path, processor: ProcessorMixin) -> None:
    settings = DataSettings(validation_split=0, assistant_only_loss=False)
    data = write_rows(colors, [chat("<image>Which?", image="red.png")])
    (example,) = prepare(data, processor, settings).train
    assert [piece for piece in preview(example, processor) if not piece[1]] == [
        ("<|im_start|>", False),  # nothing precedes it
        ("[image 28x28]", False),
    ]


def test_a_thumbnail_is_small_and_missing_for_a_file_that_changed(colors: Path) -> None:
    save_image(colors / "wide.png", "red", (640, 480))
    image = read_image("wide.png", colors)
    content = base64.b64decode(image.thumbnail().removeprefix("data:image/jpeg;base64,"))
    assert PIL.Image.open(BytesIO(content)).size == (96, 72)
    assert len(content) < 2000
    (colors / "wide.png").unlink()
    assert not image.thumbnail()


def test_only_images_leave_the_rows_for_the_cache(colors: Path, processor: ProcessorMixin) -> None:
    row = chat([{"type": "text", "text": RED_URL}, {"type": "image", "path": "red.png"}])
    ((text, names),) = as_read(write_rows(colors, [row]), processor)
    assert RED_URL in text
    assert names == ["red"]


def test_deep_values_of_other_columns_are_left_alone(colors: Path, processor: ProcessorMixin) -> None:
    deep = json.loads("[" * 600 + "]" * 600)
    assert as_read(write_rows(colors, [chat("<image>?", image="red.png", other=deep)]), processor) == SHOWN[:1]


def test_images_of_columns_that_are_not_used_are_not_stored(colors: Path, processor: ProcessorMixin) -> None:
    green = content_of(PIL.Image.new("RGB", (SIDE, SIDE), COLORS["green"]))
    row = Row("rows", 1, chat("?", photo=RED, thumbnail=green, masks=[{"bytes": green, "path": None}], sound=b"RIFF"))
    items = iter([row])
    _, encoded = encode_source("rows", items, ChatTokenizer.of(processor, DataSettings(field={"image": "photo"})))
    (sample,) = encoded
    assert isinstance(sample, EncodedSample)
    assert sample.example.images[0].load().getpixel((0, 0)) == COLORS["red"]
    assert len([*(colors.parent / "cache" / "images").iterdir()]) == 1


def test_paths_are_relative_to_the_image_folder(colors: Path, processor: ProcessorMixin, tmp_path: Path) -> None:
    data = write_rows(tmp_path, [chat("<image>?", image="red.png")])
    assert as_read(data, processor, image_folder=str(colors)) == SHOWN[:1]


# ---- What cannot be used: the message of a row


def problems(source: str, processor: ProcessorMixin, **settings: Any) -> list[str]:
    with pytest.raises(DataError) as caught:
        prepare(source, processor, DataSettings(validation_split=0, **settings))
    return str(caught.value).splitlines()


def animation(format: str) -> bytes:
    frames = [PIL.Image.new("RGB", (8, 8), color) for color in COLORS.values()]
    return content_of(frames[0], format, save_all=True, append_images=frames[1:])


NOISE = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
UNUSABLE: dict[str, tuple[Callable[[], bytes], str]] = {
    "text": (lambda: b"GIF of a cat", "is not an image; expected one of PNG, JPEG, WEBP, GIF, BMP"),
    "tiff": (lambda: content_of(NOISE, "TIFF"), "is not an image; expected one of PNG, JPEG, WEBP, GIF, BMP"),
    "empty": (lambda: b"", "is not an image: it is empty"),
    "bomb": (lambda: png_header(50_000, 50_000), "has too many pixels; expected at most 64,000,000"),
    "large": (lambda: png_header(8_001, 8_000), "has 8,001 x 8,000 pixels; expected at most 64,000,000"),
    "largest": (lambda: png_header(8_000, 8_000), "cannot be decoded: .*; repair or remove it"),
    "half a PNG": (lambda: content_of(NOISE)[:3000], "cannot be decoded: .*; repair or remove it"),
    "half a JPEG": (lambda: content_of(NOISE, "JPEG")[:1000], "cannot be decoded: image file is truncated"),
    "GIF": (lambda: animation("GIF"), "is an animation of 3 frames; save one of them as an image"),
    "APNG": (lambda: animation("PNG"), "is an animation of 3 frames"),
    "long": (lambda: RED + bytes(64 << 20), "has more than 64 MiB; save it with a smaller size"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_an_unusable_image_is_reported_with_its_row(colors: Path, processor: ProcessorMixin, name: str) -> None:
    make, cause = UNUSABLE[name]
    (colors / "a.png").write_bytes(make())
    (problem,) = problems(write_rows(colors, [chat("?", image="red.png"), chat("?", image="a.png")]), processor)
    assert re.match(rf"{colors}/rows.jsonl:2: image a.png {cause}", problem)


def test_at_most_two_images_are_decoded_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether they are checked or used."""
    counts, lock = [0], Lock()
    load = PIL.ImageFile.ImageFile.load

    def slow(image: Any) -> Any:
        with lock:
            counts.append(counts[-1] + 1)
        time.sleep(0.01)
        with lock:
            counts.append(counts[-1] - 1)
        return load(image)

    monkeypatch.setattr(PIL.ImageFile.ImageFile, "load", slow)
    with ThreadPoolExecutor(6) as pool:
        images = pool.map(lambda _: read_data_url(RED_URL, ["PNG"], 10**6).load(), range(12))
        assert {image.size for image in images} == {(SIDE, SIDE)}
    assert max(counts) == 2


def test_all_problems_of_all_rows_are_reported_at_once(colors: Path, processor: ProcessorMixin) -> None:
    (colors / "a.png").write_bytes(b"no")
    rows = [
        chat("<image><image><image>", images=["a.png", "missing.png", "red.png"]),
        chat("fine", images=[]),
        chat("?", images=["../secret.png"]),
    ]
    text = "\n".join(problems(write_rows(colors, rows), processor))
    for expected in (
        f"{colors}/rows.jsonl:1: ",
        "image a.png is not an image",
        f"image missing.png: No such file or directory; its path is {colors}/missing.png",
        f"{colors}/rows.jsonl:3: image '../secret.png' is outside of {colors}; move it there, or set --image-folder",
    ):
        assert expected in text
    assert "red.png" not in text


@pytest.mark.parametrize(
    ("value", "cause"),
    [
        ("../secret.png", "is outside of"),
        ("/etc/passwd", "is outside of"),
        ("file:///etc/passwd", "is outside of"),
        ("link.png", "is outside of"),
        ("inside/../../secret.png", "is outside of"),
        ("loop.png", "loop|symbolic links"),
        ("a\0.png", "is not a path"),
        ("x" * 5000, "File name too long"),
        (".", "Is a directory"),
        ("a\nb.png", r"'a\\nb.png': No such file"),
        ("pipe", "is not a file"),
        ("data:image/png,abc", "is not a base64 data URL: it does not begin with data:image"),
        ("data:image/png;base64,a", "is not a base64 data URL"),
        ("data:image/png;base64,!!!!", "is not a base64 data URL"),
        (7, "expected a path, a data: URL or bytes, got 7"),
    ],
)
def test_a_path_or_url_that_must_not_be_read_is_refused(
    colors: Path, processor: ProcessorMixin, value: Any, cause: str
) -> None:
    save_image(colors.parent / "secret.png", "red")
    (colors / "link.png").symlink_to(colors.parent / "secret.png")
    (colors / "loop.png").symlink_to(colors / "loop.png")
    os.mkfifo(colors / "pipe")
    (problem,) = problems(write_rows(colors, [chat([{"type": "image", "image": value}])]), processor)
    assert re.match(rf"{colors}/rows.jsonl:1: image.*({cause})", problem)


def test_urls_are_refused_with_lines_that_download_them(colors: Path, processor: ProcessorMixin) -> None:
    urls = ["hf://datasets/a/b.png", "http://example.com/a.png"]
    _, first, second, *remedy = problems(write_rows(colors, [chat("<image>?", image=url) for url in urls]), processor)
    for number, (line, url) in enumerate(zip((first, second), urls, strict=True), 1):
        assert line.endswith(f"rows.jsonl:{number}: image '{url}' is a URL, but images must be files")
    assert remedy[0].startswith("Download the images")
    compile(dedent("\n".join(remedy[1:])), "remedy", "exec")


def test_a_link_to_a_file_in_the_folder_is_followed(colors: Path, processor: ProcessorMixin) -> None:
    (colors / "link.png").symlink_to(colors / "red.png")
    assert as_read(write_rows(colors, [chat("<image>?", image="link.png")]), processor) == SHOWN[:1]


@pytest.mark.parametrize(
    ("row", "cause"),
    [
        (chat("<image>?", images=["red.png", "blue.png"]), "images: expected 1, one for each <image> .* got 2"),
        (chat("<image><image>", images=["red.png"]), "images: expected 2, one for each <image> .* got 1"),
        (chat("<image>?", images=[]), "images: expected 1, one for each <image> .* got 0"),
        (chat([{"type": "image"}]), "images: expected 1, .* got 0"),
        (chat([{"type": "image", "path": "red.png"}], images=["red.png"]), "images: expected 0, .* got 1"),
        (chat("?", images=["red.png"], image="red.png"), "the row has images and image; use one column"),
        (
            chat([{"type": "image", "path": "red.png"}, {"type": "text", "text": "What does <image> mean?"}]),
            "images: expected 1, one for each <image> in the messages, got 0",
        ),
        (chat([{"type": "video", "path": "a.mp4"}]), r"messages\[0\].content\[0\]: only text and images are supported"),
        (
            {"messages": [REPLY, {"role": "user", "content": "a"}, {**REPLY, "content": [{"type": "image"}]}]},
            "only user messages can contain images, got role assistant",
        ),
        ({"messages": [{"role": "system", "content": "a"}, REPLY], "image": "red.png"}, "expected a user message"),
        (chat([TEXT_PART], image={"path": 7}), "expected a path, a data: URL or bytes, got 7"),
    ],
)
def test_a_row_whose_images_do_not_fit_its_messages_is_refused(
    colors: Path, processor: ProcessorMixin, row: dict[str, Any], cause: str
) -> None:
    (problem,) = problems(write_rows(colors, [row]), processor)
    assert re.match(rf"{colors}/rows.jsonl:1: .*{cause}", problem)


def test_the_pixels_of_a_row_are_limited(
    colors: Path, processor: ProcessorMixin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tailora.data.images.PIXELS_OF_ROW", 2 * SIDE**2)
    rows = [chat("?", images=["red.png"] * number) for number in (2, 3)]
    (problem,) = problems(write_rows(colors, rows), processor)
    assert "rows.jsonl:2: the row's images have 2,352 pixels in total; expected at most 1,568. Use smaller" in problem


def test_the_models_image_token_in_a_text_is_refused(colors: Path, processor: ProcessorMixin) -> None:
    rows = [
        chat("What does <image> mean?"),
        {"messages": [{"role": "user", "content": "a"}, {**REPLY, "content": "<image>"}]},
    ]
    _, first, second = problems(write_rows(colors, rows), processor)
    assert "rows.jsonl:1: images: expected 1, one for each <image> in the messages, got 0" in first
    assert "rows.jsonl:2: the text has 1 <image>, but there are 0 images; remove <image>" in second
    qwen = tiny_vlm("qwen2_vl")[1]
    rows = [chat("<image>"), chat("What does <|image_pad|> mean?"), chat("<image><|image_pad|>", image="red.png")]
    texts = problems(write_rows(colors, rows), qwen)
    assert [text.partition("rows.jsonl:")[2].partition(";")[0] for text in texts[1:]] == [
        "1: images: expected 1, one for each <image> in the messages, got 0",
        "2: the text has 1 <|image_pad|>, but there are 0 images",
        "3: the text has 2 <|image_pad|>, but there are 1 images",
    ]


def test_a_chat_template_that_leaves_images_out_is_refused(colors: Path) -> None:
    processor = tiny_llava()[1]
    processor.chat_template = processor.chat_template.replace("<image>", "")
    (problem,) = problems(write_rows(colors, [chat("?", image="red.png")]), processor)
    assert problem.endswith(
        "the text has 0 <image>, but there are 1 images; use a chat template that writes <image> for every image"
    )


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "?", "chosen": "a", "rejected": "b", "images": ["red.png"]},
        {"text": "A red square.", "image": "red.png"},
        {"prompt": "?", "choices": ["a", "b"], "answer": 0, "images": ["red.png"]},
    ],
)
def test_images_of_rows_that_cannot_have_any_are_refused(
    colors: Path, processor: ProcessorMixin, row: dict[str, Any]
) -> None:
    (problem,) = problems(write_rows(colors, [row]), processor)
    assert "rows cannot have images, but these have the column image" in problem


def test_a_text_model_refuses_images(colors: Path, processor: ProcessorMixin) -> None:
    tokenizer = processor.tokenizer
    tokenizer.chat_template = processor.chat_template
    rows = [chat("a", image="red.png"), chat("b", image=None), chat("c", image={"bytes": None, "path": "red.png"})]
    (_, *texts) = problems(write_rows(colors, rows), tokenizer)
    assert [text.partition("rows.jsonl:")[2] for text in texts] == [
        f"{number}: the row has images, but the model reads only text; use a vision-language model" for number in (1, 3)
    ]


def test_images_of_rows_that_are_not_files_need_a_folder() -> None:
    with pytest.raises(DataError, match="the data is not in a folder; set --image-folder for its paths"):
        read_image("red.png", None)


@pytest.mark.parametrize(
    ("family", "cause"), [("qwen2_vl", "absolute aspect ratio must be smaller than 200"), ("pixtral", "height=0")]
)
def test_a_size_that_the_processor_rejects_is_reported(colors: Path, family: str, cause: str) -> None:
    save_image(colors / "a.png", "red", (10_000, 1))
    save_image(colors / "b.png", "red", (1, 1))
    rows = [chat("?", image="a.png"), chat("?", image="b.png")]
    (problem,) = problems(write_rows(colors, rows), tiny_vlm(family)[1])
    start = f"{colors}/rows.jsonl:1: the model's processor rejects an image of 10,000 x 1 pixels: "
    assert problem.startswith(start)
    assert cause in problem


# ---- Pixels


@pytest.mark.parametrize("orientation", range(1, 10))
def test_photos_are_turned_as_their_exif_says(colors: Path, orientation: int) -> None:
    photo = PIL.Image.fromarray(np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3) * 10)
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    photo.save(colors / "a.png", exif=exif)
    image = read_image("a.png", colors)
    expected = PIL.ImageOps.exif_transpose(PIL.Image.open(colors / "a.png"))
    assert (image.width, image.height) == expected.size
    assert np.array_equal(np.asarray(image.load()), np.asarray(expected))


MODES = {
    "PNG": ("RGB", "L", "1", "P", "LA", "RGBA"),
    "JPEG": ("RGB", "L", "CMYK", "YCbCr"),
    "WEBP": ("RGB", "L", "RGBA"),
    "GIF": ("L", "1", "P"),
    "BMP": ("RGB", "L", "1", "P", "RGBA"),
}


@pytest.mark.parametrize(("format", "mode"), [(format, mode) for format in MODES for mode in MODES[format]])
def test_other_color_spaces_become_rgb(colors: Path, format: str, mode: str) -> None:
    PIL.Image.new("RGB", (20, 10), "white").convert(mode).save(colors / "a", format)
    shown = read_image("a", colors).load()
    assert (shown.mode, shown.size) == ("RGB", (20, 10))
    assert np.asarray(shown).min() > 240


def test_a_jpeg_with_few_pixels_is_read() -> None:
    content = content_of(PIL.Image.new("RGB", (7, 20), "red"), "JPEG")
    assert read_image(content, None).load().size == (7, 20)


def test_transparent_pixels_are_white(colors: Path) -> None:
    pixels = np.zeros((1, 2, 4), np.uint8)
    pixels[0, 0, 3] = 255
    PIL.Image.fromarray(pixels).save(colors / "a.png")
    assert np.asarray(read_image("a.png", colors).load()).tolist() == [[[0, 0, 0], [255, 255, 255]]]
    palette = PIL.Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 9, 9, 9])
    palette.putpixel((1, 0), 1)
    palette.save(colors / "b.png", transparency=1)
    assert np.asarray(read_image("b.png", colors).load()).tolist() == [[[0, 0, 0], [255, 255, 255]]]


def test_16_bits_of_gray_keep_their_contrast(colors: Path) -> None:
    PIL.Image.fromarray(np.array([[0, 0x4000, 0xFFFF]], np.uint16)).save(colors / "a.png")
    assert np.asarray(read_image("a.png", colors).load())[..., 0].tolist() == [[0, 0x40, 0xFF]]


def test_photos_of_phones_are_the_first_of_several_frames(colors: Path) -> None:
    first, second = (PIL.Image.new("RGB", (16, 16), COLORS[name]) for name in ("red", "blue"))
    first.save(colors / "a.jpg", "MPO", save_all=True, append_images=[second])
    assert read_image("a.jpg", colors).load().getpixel((0, 0))[0] > 240


# ---- Files that change


@pytest.mark.parametrize("change", ["replaced", "removed"])
def test_an_image_that_changes_before_its_batch_is_refused(colors: Path, change: str) -> None:
    image = read_image("red.png", colors)
    if change == "removed":
        (colors / "red.png").unlink()
        cause = "image red.png: No such file or directory"
    else:
        save_image(colors / "red.png", "blue")
        cause = "image red.png changed after it was read; start again"
    with pytest.raises(DataError, match=cause):
        image.load()


def test_a_cache_that_cannot_be_written_is_reported(
    colors: Path, processor: ProcessorMixin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TAILORA_HOME", str(colors / "red.png"))
    data = write_rows(colors, [chat("?", image=RED_URL)])
    with pytest.raises(
        WriteError, match=r"cannot be kept in .*red.png/images: .*; set TAILORA_HOME to a folder that you"
    ):
        prepare(data, processor, DataSettings(validation_split=0))


def test_memory_does_not_grow_with_the_images(processor: ProcessorMixin) -> None:
    picture = content_of(NOISE.resize((600, 600)))
    rows = 20

    def items() -> Iterator[Row]:
        for number in range(rows):
            image = {"bytes": picture + bytes([number]), "path": None}
            yield Row("rows", number, chat("?", image=image, mask=image))

    tracemalloc.start()
    try:
        _, encoded = encode_source("rows", items(), ChatTokenizer.of(processor), detect_from=None)
        assert len({sample.example.hash for sample in encoded if isinstance(sample, EncodedSample)}) == rows
        assert tracemalloc.get_traced_memory()[1] < rows * len(picture) / 4
    finally:
        tracemalloc.stop()
