"""`tailora chat` and `tailora predict` with images."""

import io
from pathlib import Path
from types import SimpleNamespace

import pytest
from command_line import call, check_refused, found
from tiny_vision import COLORS, outspoken_llava, plain_answer, save, save_image, tiny_llava

from tailora.cli.main import main
from tailora.train.generate import image_obstacle

TOKENS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and the images red.png, green.png and blue.png."""
    folder = tmp_path_factory.mktemp("images")
    save(folder / "model", *outspoken_llava())
    for name, color in COLORS.items():
        save_image(folder / f"{name}.png", color, (40, 28), seed=1)
    return folder


def expected(folder: Path, *parts: str) -> str:
    """What transformers answers to texts and names of images."""

    def part(value: str) -> dict[str, str]:
        return {"type": "image", "path": str(folder / value)} if ".png" in value else {"type": "text", "text": value}

    return plain_answer(*outspoken_llava(), [{"role": "user", "content": [*map(part, parts)]}], TOKENS)


def test_answers_are_those_of_transformers_for_the_same_images(folder: Path) -> None:
    red, blue = folder / "red.png", folder / "blue.png"
    tokens = ["predict", "--model", folder / "model", "--max-new-tokens", TOKENS]
    answers = found(*tokens, "--prompt", "which", "--prompt", "say <image> or <image>", "--image", red, "--image", blue)
    assert [row["answer"] for row in answers["predictions"]] == [
        expected(folder, "red.png", "blue.png", "which"),
        expected(folder, "say ", "red.png", " or ", "blue.png"),
    ]
    assert [row["images"] for row in answers["predictions"]] == [[str(red), str(blue)]] * 2
    (without,) = found(*tokens, "--prompt", "which")["predictions"]
    messages = [{"role": "user", "content": "which"}]
    assert without == {"prompt": "which", "messages": messages, "answer": expected(folder, "which")}


@pytest.mark.parametrize(
    ("tokens", "hint"),
    [
        (["--image", "absent.png"], "image absent.png: No such file or directory"),
        (["--image", "absent.png", "--image", "broken.png"], "image broken.png is not an image"),
        (["--image", "."], "image .: Is a directory"),
        (["--image", "red.png", "--ignore-chat-template"], "--image needs the chat template"),
        (["--image", "red.png", "--prompt", "<image><image>"], "expected 2, one for each <image> in the messages, got"),
        (["--data", "rows.jsonl"], "rows.jsonl:1: image: predict does not support images in rows; use --image"),
        (["--image", "red.png", "--model", "TEXT"], "this model cannot answer questions about images: it reads only"),
    ],
)
def test_images_that_cannot_be_used_are_refused(
    tokens: list[str], hint: str, folder: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "broken.png").write_text("hello")
    (folder / "rows.jsonl").write_text('{"prompt": "which", "image": "red.png"}')
    monkeypatch.chdir(folder)
    model = [] if "--model" in tokens else ["--model", "model"]
    prompt = [] if {"--prompt", "--data"} & {*tokens} else ["--prompt", "a"]
    check_refused(hint, "predict", *model, *prompt, *(tiny_model if token == "TEXT" else token for token in tokens))


def test_a_model_for_text_reads_the_placeholder_as_text(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = ["--model", str(tiny_model), "--max-new-tokens", "4"]
    (answer,) = found("predict", *tokens, "--prompt", "a <image> b")["predictions"]
    monkeypatch.setattr("sys.stdin", io.StringIO("a <image> b\n"))
    assert main(["chat", "--temperature", "0", *tokens]) == 0
    assert capsys.readouterr().out == answer["answer"] + "\n"


def test_an_image_goes_with_the_next_message_and_stays_in_the_conversation(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def talk(*lines: object, image: str | None = None) -> list[str]:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        tokens = ["--model", "model", "--max-new-tokens", str(TOKENS), *(["--image", image] if image else [])]
        assert main(["chat", "--temperature", "0", *tokens]) == 0
        return capsys.readouterr().out.split("\n")

    monkeypatch.chdir(folder)
    red = expected(folder, "red.png", "which")
    assert talk("/image red.png", "which", "/reset", "which", "/image blue.png", "/reset", "which") == [
        red,
        *[expected(folder, "which")] * 2,
        "",
    ]
    assert talk("which", image="red.png")[0] == red
    (folder / "my red.png").write_bytes((folder / "red.png").read_bytes())
    first, second = talk(f"/image '{folder / 'my red.png'}'", "which", "/image blue.png", "and <image>")[:2]
    reply = {"role": "assistant", "content": [{"type": "text", "text": first}]}
    path = {"type": "image", "path": str(folder / "red.png")}
    chat = [{"role": "user", "content": [path, {"type": "text", "text": "which"}]}, reply]
    parts = [{"type": "text", "text": "and "}, {"type": "image", "path": str(folder / "blue.png")}]
    assert (first, second) == (red, plain_answer(*outspoken_llava(), [*chat, {"role": "user", "content": parts}], 8))


def test_the_chat_shows_what_is_attached_and_survives_mistakes(
    folder: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    lines = ["/image absent.png", "/image", "/image red.png", "/image blue.png", "a <image>", "which", "/help"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    tokens = ["chat", "--temperature", "0", "--max-new-tokens", str(TOKENS), "--model"]
    assert main([*tokens, "model"]) == 0
    shown = capsys.readouterr()
    assert shown.out == expected(folder, "which") + "\n"
    assert "image absent.png: No such file" in shown.err
    assert "usage: /image FILE" in shown.err
    assert "with the next message: red.png (40 x 28 pixels), blue.png (40 x 28 pixels)" in shown.err
    assert "images: expected 1, one for each <image> in the messages, got 2" in shown.err  # and drops the message
    assert "attach an image to the next message" in shown.err
    monkeypatch.setattr("sys.stdin", io.StringIO("/image red.png\nhello\n"))
    assert main([*tokens, str(tiny_model)]) == 0
    shown = capsys.readouterr()
    assert "it reads only text; use a vision-language model" in shown.err
    assert shown.out.strip()


def test_an_image_that_changes_drops_the_message(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = (folder / "red.png").read_bytes()

    class Lines(io.StringIO):
        def readline(self, *_: object) -> str:  # type: ignore[override]
            line = super().readline()
            Path("a.png").write_bytes(data + b" " * (line == "which\n"))
            return line

    Path("a.png").write_bytes(data)
    monkeypatch.setattr("sys.stdin", Lines("/image a.png\nwhich\n"))
    code, out, err = call("chat", "--model", folder / "model")
    assert (code, out) == (0, "")
    assert "image a.png changed after it was read" in err


def test_why_a_model_gets_no_images() -> None:
    model, processor = tiny_llava()
    assert image_obstacle(model, processor) == ""
    assert image_obstacle(model, processor.tokenizer) == "it reads only text"
    processor.chat_template = processor.tokenizer.chat_template = None
    assert image_obstacle(model, processor) == "it has no chat template"
    encoder = SimpleNamespace(config=SimpleNamespace(is_encoder_decoder=True))
    assert image_obstacle(encoder, processor) == "it is an encoder-decoder, whose prompts are plain text"
