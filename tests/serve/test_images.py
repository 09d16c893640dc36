"""Images in requests to the server: the same answers as from transformers, and what hostile clients get."""

import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import openai
import PIL.Image
import pytest
from tiny import stir
from tiny_server import Running, chat, held_forwards, running, started, write_adapters
from tiny_vision import (
    COLORS,
    FAMILIES,
    SIDE,
    data_url,
    outspoken_llava,
    plain_answer,
    plain_inputs,
    png_header,
    save_image,
    tiny_vlm,
)

from tailora import LoRAConfig, LoRAModel
from tailora.cli.serve import ServerFlags, server_settings
from tailora.core.adapter_set import AdapterSet
from tailora.data.chat_template import ChatTokenizer
from tailora.data.image_processor import accepted_inputs
from tailora.data.images import images_of, read_images
from tailora.data.messages import marked_messages
from tailora.engine.continuous_batching import make_engine
from tailora.engine.interface import Finish, Request, SamplingParams, Token
from tailora.engine.padded_batching import PaddedEngine
from tailora.errors import ConfigError
from tailora.serve import images
from tailora.serve.app import ServerSettings
from tailora.serve.playground import LOCAL_HOSTS
from tailora.serve.schemas import ChatRequest

JSON = {"Content-Type": "application/json"}
IMAGE_TOKENS = 4


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images, an adapter of the language model, and one that also changes the image tower."""
    root = tmp_path_factory.mktemp("vision")
    for seed, (name, targets) in enumerate({"text": "language-model", "tower": "all-linear"}.items()):
        model = LoRAModel(outspoken_llava()[0], LoRAConfig(r=2, target_modules=targets))
        stir(model, seed)
        model.save_adapter(root / name)
    for seed, (name, color) in enumerate(COLORS.items()):
        save_image(root / f"{name}.png", color, (SIDE + 8 * seed, SIDE), seed=seed)
    return root


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[Running]:
    model, processor = outspoken_llava()
    with running(root, base=model, tokenizer=processor, adapters=["text", "tower"]) as server:
        yield server


def of_file(path: Path) -> str:
    return data_url(path.read_bytes())


def saved(*frames: PIL.Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    frames[0].save(file, kind, save_all=len(frames) > 1, append_images=frames[1:], **options)
    return file.getvalue()


def user(*parts: str) -> list[dict[str, Any]]:
    """A chat of one message with texts and data: URLs."""
    content: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": part}} if ":" in part else {"type": "text", "text": part}
        for part in parts
    ]
    return [{"role": "user", "content": content}]


# Texts and names of images, of different lengths
QUESTIONS = [
    ("red.png", "which"),
    ("green.png", "red or blue or green or square ", "blue.png", " or what"),
    ("blue.png", "which"),
    ("no image",),
    ("blue.png", "red.png"),
]


def of_question(parts: tuple[str, ...], root: Path) -> list[dict[str, Any]]:
    return user(*(of_file(root / part) if ".png" in part else part for part in parts))


def with_paths(parts: tuple[str, ...], root: Path) -> list[dict[str, Any]]:
    """The same as transformers expects it."""

    def part(value: str) -> dict[str, str]:
        return {"type": "image", "path": str(root / value)} if ".png" in value else {"type": "text", "text": value}

    return [{"role": "user", "content": [*map(part, parts)]}]


def alone(parts: tuple[str, ...], adapter: str, root: Path) -> str:
    """What transformers generates."""
    model, processor = outspoken_llava()
    model = model if adapter == "tiny" else LoRAModel.from_pretrained(model, root / adapter).eval()
    return plain_answer(model, processor, with_paths(parts, root), 12)


def together(server: Running, root: Path, asked: list[tuple[tuple[str, ...], str]]) -> tuple[list[Any], int]:
    """Returns the responses to requests that arrive while a different one runs, and the number of prompts' forwards."""
    engine = server.app.state.server.engine
    lengths = list[int]()

    def count(_model: Any, _args: Any, options: dict[str, Any]) -> None:
        lengths.append(options["input_ids"].shape[1])

    def ask(parts: tuple[str, ...], adapter: str) -> Any:
        return chat(server, adapter, messages=of_question(parts, root), extra_body={})

    with held_forwards(server) as forwards, ThreadPoolExecutor(len(asked) + 1) as pool:
        first = pool.submit(chat, server, "tiny", messages=user("first"), max_tokens=1)
        assert forwards.is_held.wait(60)
        responses = [pool.submit(ask, *question) for question in asked]
        deadline = time.monotonic() + 30
        while engine.load[1] < len(asked) and time.monotonic() < deadline:
            time.sleep(0.01)
        hook = engine.adapter_set.base_model.register_forward_pre_hook(count, with_kwargs=True)
        forwards.go_on.set()
        first.result()
        answers = [response.result() for response in responses]
        hook.remove()
    return answers, sum(length > 1 for length in lengths)


def test_answers_are_those_of_transformers_and_usage_counts_image_tokens(server: Running, root: Path) -> None:
    """In one batch, with different images and lengths, and an adapter for each row."""
    asked = [(parts, ("tiny", "text")[number % 2]) for number, parts in enumerate(QUESTIONS)]
    answers, batches = together(server, root, asked)
    assert batches == 1
    texts = [answer.choices[0].message.content for answer in answers]
    assert texts == [alone(*question, root) for question in asked]
    assert len(set(texts)) == len(texts)
    with_image, without = answers[0].usage, answers[3].usage
    which, no_image = (server.app.state.server.tokenizer(text)["input_ids"] for text in ("which", "no image"))
    assert with_image.prompt_tokens - len(which) == without.prompt_tokens - len(no_image) + IMAGE_TOKENS


def test_an_adapter_of_the_tower_gets_its_own_batch(server: Running, root: Path) -> None:
    """The tower gets images instead of rows: here as many, but not one for each row."""
    asked = [(QUESTIONS[4], "tower"), (QUESTIONS[3], "text"), (QUESTIONS[0], "tower"), (QUESTIONS[3], "tiny")]
    answers, batches = together(server, root, asked)
    assert batches == 2
    assert [answer.choices[0].message.content for answer in answers] == [alone(*question, root) for question in asked]
    assert alone(QUESTIONS[0], "tower", root) != alone(QUESTIONS[0], "tiny", root)


def test_an_adapter_may_go_while_a_cancelled_request_waits(server: Running) -> None:
    engine = server.app.state.server.engine
    params = SamplingParams(1, temperature=0.0)
    with engine.paused():
        engine.adapter_set.add("gone", next(iter(engine.adapter_set.adapters.values())))
        engine.submit(Request("first", (9, 10), None, params), lambda _: None)
        engine.submit(Request("cancelled", (9, 10), "gone", params), lambda _: None)
        engine.cancel("cancelled")
        engine.adapter_set.remove("gone")
    assert chat(server, "text", messages=user(GOOD), max_tokens=1, timeout=30).choices


def test_images_of_a_batch_have_a_limit(server: Running, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tailora.engine.padded_batching.PIXELS_OF_REQUEST", 2 * SIDE * SIDE)
    asked = [(QUESTIONS[0], "tiny"), (QUESTIONS[0], "text"), (QUESTIONS[4], "tiny"), (QUESTIONS[3], "text")]
    answers, batches = together(server, root, asked)
    assert batches == 2
    assert [answer.choices[0].message.content for answer in answers] == [alone(*question, root) for question in asked]


def test_a_chat_with_tools_can_have_images(server: Running, root: Path) -> None:
    tool: Any = {"type": "function", "function": {"name": "a"}}

    def length(messages: list[dict[str, Any]]) -> int:
        body = ChatRequest.model_validate({"model": "tiny", "messages": messages, "tools": [tool]})
        return len(server.app.state.server.chat_prompt(body)[1])

    assert length(of_question(QUESTIONS[0], root)) == length(user("which")) + IMAGE_TOKENS


def test_models_say_whether_they_read_images(server: Running, tmp_path: Path) -> None:
    assert {tuple(model.input_modalities) for model in server.client.models.list()} == {("text", "image")}  # type: ignore[attr-defined]
    with running(write_adapters(tmp_path)) as text_only:
        assert {tuple(model.input_modalities) for model in text_only.client.models.list()} == {("text",)}  # type: ignore[attr-defined]


def test_a_vision_language_model_gets_padded_batches() -> None:
    model, _ = outspoken_llava()
    notes = list[str]()
    assert isinstance(make_engine(AdapterSet(model, {}), [2], max_positions=64, note=notes.append), PaddedEngine)
    assert "LlavaForConditionalGeneration reads images" in notes[0]
    with pytest.raises(ConfigError, match="reads images; use --engine padded"):
        make_engine(AdapterSet(model, {}), [2], "continuous", max_positions=64)


GREEDY: Any = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0}
BY_DEFAULT = ("qwen3_vl", "idefics3", "gemma3")


@pytest.mark.parametrize(
    "family", [name if name in BY_DEFAULT else pytest.param(name, marks=pytest.mark.exhaustive) for name in FAMILIES]
)
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of GLM's processor
def test_rows_of_a_batch_are_those_of_transformers_in_every_family(family: str, root: Path) -> None:
    model, processor = tiny_vlm(family)
    for parameter in model.parameters():
        parameter.data *= 5 if parameter.ndim > 1 else 1
    tokenizer, engine = ChatTokenizer.of(processor), PaddedEngine(AdapterSet(model.eval(), {}), [], max_positions=9999)
    engine.processor = processor
    expected, tokens, finished = dict[str, list[int]](), dict[str, list[int]](), threading.Semaphore(0)

    def handle(number: str, event: Token | Finish) -> None:
        if isinstance(event, Token):
            tokens[number].append(event.id)
        else:
            finished.release()

    with started(engine):
        with engine.paused():  # so that the first request waits, and the others join
            for number, question in enumerate(QUESTIONS):
                asked = with_paths(question, root)
                inputs = plain_inputs(processor, asked)
                read = read_images([message for message, _ in marked_messages(asked, "messages")], root)
                ids = tokenizer.prompt_ids(read)
                assert inputs["input_ids"][0].tolist() == ids
                output = model.generate(**accepted_inputs(model, inputs), **GREEDY)
                expected[str(number)], tokens[str(number)] = output[0, len(ids) :].tolist(), []
                params = SamplingParams(8, temperature=0.0, ignore_eos=True)
                request = Request(str(number), tuple(ids), None, params, images=images_of(read))
                engine.submit(request, partial(handle, str(number)))
        assert all(finished.acquire(timeout=60) for _ in QUESTIONS)
    assert tokens == expected


# ---- Hostile clients


def square(side: int = SIDE, color: str = "red") -> PIL.Image.Image:
    return PIL.Image.new("RGB", (side, side), color)


GOOD = data_url(saved(square()))
HOSTILE: dict[str, tuple[Callable[[], list[str]], str]] = {
    "many": (lambda: [GOOD] * 17, "the request has 17 images; use at most 16"),
    "huge": (lambda: [GOOD, data_url(png_header(50_000, 50_000))], "messages.0.content.1: image "),
    "large": (lambda: [data_url(png_header(4_001, 4_000))], "has 4,001 x 4,000 pixels; expected at most 16,000,000"),
    "largest": (lambda: [data_url(png_header(4_000, 4_000))], "cannot be decoded"),
    "long": (lambda: [data_url(saved(PIL.Image.new("1", (201, 1))))], "one side may be at most 200 times as long"),
    "in total": (
        lambda: [data_url(saved(PIL.Image.new("1", (4_000, 4_000))))] * 4 + [GOOD],
        "messages.0.content.4: the images have more than 64,000,000 pixels in total; send smaller ones",
    ),
    "text": (lambda: [data_url(b"hello")], "is not an image; expected one of PNG, JPEG, WEBP, GIF"),
    "other format": (lambda: [data_url(saved(square(), kind="BMP"))], "is not an image; expected one of PNG, JPEG,"),
    "large file": (lambda: [data_url(bytes((10 << 20) + 99))], "messages.0.content.0: the image has more than 10 MiB"),
    "largest file": (lambda: [data_url(bytes(10 << 20))], "is not an image; expected one of PNG, JPEG, WEBP, GIF"),
    "file": (lambda: ["file:///etc/passwd"], "send the image as a data: URL (data:image/png;base64,...); this server"),
    "http": (lambda: ["http://127.0.0.1/a.png"], "messages.0.content.0.image_url.url: send the image as a data: URL"),
    "a path": (lambda: ["C:\\a.png"], "this server fetches nothing"),
    "too many placeholders": (lambda: ["<image>", GOOD], "the text has 2 <image>, but there are 1 images"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_an_image_that_cannot_be_used_is_refused_with_its_part(server: Running, name: str) -> None:
    parts, hint = HOSTILE[name]
    with pytest.raises(openai.BadRequestError) as raised:
        chat(server, "text", messages=user(*parts()))
    error: Any = raised.value.body
    assert hint in error["message"]
    assert len(error["message"]) < 400
    assert (error["param"], error["code"], error["type"]) == ("messages", 400, "BadRequestError")
    assert chat(server, "text", messages=user(GOOD), max_tokens=1).choices


def test_images_at_the_limits_are_answered(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    core, long = server.app.state.server, data_url(saved(PIL.Image.new("1", (200, 1))))
    for parts, most in ([GOOD] * 16, SIDE * SIDE), ([long], 200):
        monkeypatch.setattr(core, "settings", replace(core.settings, max_image_pixels=most))
        assert chat(server, "text", messages=user(*parts), max_tokens=1).choices
        monkeypatch.setattr(core, "settings", replace(core.settings, max_image_pixels=most - 1))
        with pytest.raises(
            openai.BadRequestError, match=f"pixels; expected at most {most - 1}. Save it with a smaller"
        ):
            chat(server, "text", messages=user(*parts))


def test_every_flag_reaches_the_server() -> None:
    flags = ServerFlags(max_queue=3, max_tokens=4, max_image_megapixels=2.5, drain_seconds=6.0)
    assert server_settings(flags, "0.0.0.0", "a", "b") == ServerSettings(3, 4, 2_500_000, 6.0, ("*",), "a", "b")
    local = server_settings(ServerFlags(), "::1", None, None)
    assert local == replace(ServerSettings(), allowed_hosts=LOCAL_HOSTS)


@pytest.mark.parametrize(
    ("part", "hint"),
    [
        ({"type": "image_url", "image_url": GOOD}, "messages.0.content.0.image_url: Input should be"),
        ({"type": "image_url"}, "messages.0.content.0: expected type and image_url, and nothing else"),
        ({"type": "text", "text": "a", "image_url": {"url": GOOD}}, "expected type and text, and nothing else"),
        ({"type": "input_audio", "text": "a"}, "Input should be 'text' or 'image_url'"),
        ({"type": "image", "image": "/etc/passwd"}, "messages.0.content.0.image: Extra inputs are not permitted"),
    ],
)
def test_parts_of_other_forms_are_refused(server: Running, part: dict[str, Any], hint: str) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        chat(server, "text", messages=[{"role": "user", "content": [part]}])
    assert hint in raised.value.body["message"]  # type: ignore[index]


@pytest.mark.parametrize(("family", "token"), [("qwen2_vl", "<|video_pad|>"), ("gemma3", "<image_soft_token>")])
def test_a_text_with_the_token_of_an_image_or_video_is_refused(family: str, token: str, root: Path) -> None:
    """It would fail the requests in the same batch."""
    model, processor = tiny_vlm(family)
    with running(root, base=model, tokenizer=processor, adapters=[]) as server:
        text = f"a {token} b"
        with pytest.raises(openai.BadRequestError, match="which stands for an image, a video or audio; remove it"):
            chat(server, "tiny", messages=user(text))
        for prompt in (text, server.app.state.server.tokenizer(text)["input_ids"]):
            with pytest.raises(openai.BadRequestError, match="use /v1/chat/completions"):
                server.client.completions.create(model="tiny", prompt=prompt)


def test_images_are_decoded_outside_of_the_event_loop(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    decode, is_decoding, go_on = images.read_data_url, threading.Event(), threading.Event()

    def slow(*arguments: Any) -> Any:
        is_decoding.set()
        assert go_on.wait(60)
        return decode(*arguments)

    monkeypatch.setattr(images, "read_data_url", slow)
    with ThreadPoolExecutor() as pool:
        answers = [pool.submit(chat, server, "text", messages=user(GOOD), max_tokens=1) for _ in range(4)]
        assert is_decoding.wait(60)
        assert server.http.get("/health").status_code == 200
        assert chat(server, "text", messages=user("which"), max_tokens=1).choices  # does not wait for them
        go_on.set()
        assert all(answer.result().choices for answer in answers)


def test_bodies_have_limits(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def status(content: bytes) -> tuple[int, str]:
        response = server.http.post("/v1/chat/completions", content=content, headers=JSON)
        return response.status_code, response.json()["error"]["message"]

    image = json.dumps({"model": "text", "messages": user(f"data:{'a' * (5 << 20)}")}).encode()
    assert status(image)[0] == 400  # over the limit for text
    with monkeypatch.context() as patch:
        patch.setattr("tailora.serve.app.LARGEST_WITH_IMAGES", 2 << 20)
        assert status(image) == (413, "the request is too large; the limit is 2,097,152 bytes")
        patch.setattr("tailora.serve.app.MOST_VALUES", 1000)
        assert status(b'{"model": [' + b"[]," * 600 + b"1]}") == (
            413,
            "the request has too many values; the limit is 1,000",
        )
    with monkeypatch.context() as patch:
        patch.setattr("tailora.serve.app.MOST_IN_PROGRESS", 1 << 20)
        assert status(image)[0] == 503
    assert server.http.get("/health").status_code == 200
    assert chat(server, "text", messages=user(GOOD), max_tokens=1).choices


def test_a_processor_that_fails_ends_its_requests_and_no_others(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise TypeError("mean must have 1 elements")

    engine = server.app.state.server.engine
    chat(server, "text", messages=user(GOOD), max_tokens=1)  # from now on, the placeholders are known
    with monkeypatch.context() as patch:
        patch.setattr(type(engine.processor.image_processor), "__call__", fails)
        with pytest.raises(openai.InternalServerError, match="mean must have 1 elements"):
            chat(server, "text", messages=user(GOOD))
    assert chat(server, "text", messages=user(GOOD), max_tokens=1).choices
