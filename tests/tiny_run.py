"""Fixtures: a tiny chat model with its tokenizer in a folder, a file of conversations, and settings that use them."""

import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import matplotlib.text
import pytest
import torch
from tiny import chat_model, chat_tokenizer

from tailora.train.config import TrainConfig

WORDS = ["red", "blue", "green", "north", "south", "one", "two", "three", "sun", "rain"]

Settings = Callable[..., TrainConfig]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), vocab_size=320, intermediate_size=48)


@pytest.fixture(scope="session")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 conversations of different lengths that a model can learn something from."""
    return write_rows(tmp_path_factory.mktemp("data") / "chats.jsonl", map(chat, range(30)))


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 pairs of replies: the words in the opposite order are better than a repeated word."""
    return write_rows(tmp_path_factory.mktemp("data") / "pairs.jsonl", map(pair, range(30)))


@pytest.fixture(scope="session")
def feedback_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The replies of the pairs in single rows."""
    rows = []
    for i in range(30):
        row = pair(i)
        completion = row["rejected" if i % 3 == 0 else "chosen"]
        rows.append({"prompt": row["prompt"], "completion": completion, "label": i % 3 != 0})
    return write_rows(tmp_path_factory.mktemp("data") / "feedback.jsonl", rows)


def save_model(folder: Path, **sizes: Any) -> Path:
    chat_model(**{"initializer_range": 0.2, **sizes}).save_pretrained(folder)
    texts = [" ".join(WORDS), "user assistant"] * 3
    chat_tokenizer(texts, eos_token="<|im_end|>", pad_token="<|im_end|>").save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def words(i: int) -> list[str]:
    return [WORDS[(i + k) % len(WORDS)] for k in range(1 + i % 7)]


def chat(i: int, turns: int = 1) -> dict[str, Any]:
    """One turn or two; each answer has the words of the question before it in the opposite order."""
    texts = [f"{i}: {' '.join(words(i))}", " ".join(reversed(words(i))), "again", " ".join(words(i))][: 2 * turns]
    return {"messages": [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(texts)]}


def pair(i: int) -> dict[str, str]:
    return {
        "prompt": f"{i}: {' '.join(words(i))}",
        "chosen": " ".join(reversed(words(i))),
        "rejected": " ".join([words(i)[0]] * (2 + i % 4)),
    }


def write_demo(home: Path) -> Path:
    """Makes a folder for TAILORA_HOME whose demo is small: a model of random weights, and chats of a few words."""
    model, data = home / "demo-1" / "SmolLM2-135M-Instruct", home / "demo-1" / "chitchat"
    ends = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    tokenizer = chat_tokenizer([" ".join(WORDS), "user assistant"] * 3, **ends)
    tokenizer.save_pretrained(model)
    ids = {f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in ends.items()}
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 4}  # ranks up to 128 fit
    chat_model(max_position_embeddings=2048, initializer_range=0.2, **sizes, **ids).save_pretrained(model)
    data.mkdir()
    write_rows(data / "train.jsonl", [chat(i, turns=2) for i in range(200)])
    write_rows(data / "eval.jsonl", [chat(i, turns=2) for i in range(200, 220)])
    return home


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TAILORA_HOME with what `write_demo` writes."""
    return write_demo(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def make_settings(model_folder: Path, data_file: Path) -> Settings:
    """Makes settings of a run on the tiny model; `output_dir` must be given."""

    def make(**changes: Any) -> TrainConfig:
        defaults: dict[str, Any] = {
            "model": str(model_folder),
            "data": str(data_file),
            "dtype": "float32",
            "r": 4,
            "learning_rate": 1e-2,
            "validation_split": 0.2,
            "per_device_train_batch_size": 4,
            "eval_steps": 0,
        }
        return TrainConfig(**{**defaults, **changes})

    return make


@pytest.fixture
def settings(make_settings: Settings, model_folder: Path, tmp_path: Path) -> Settings:
    """The same for the test's own folder. A test file may have a `model_folder` of its own."""
    return partial(make_settings, output_dir=str(tmp_path / "out"), model=str(model_folder))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Sums in the same order everywhere, and no fight over the cores. For the folders whose conftest imports it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def quick_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes only the texts of a figure. matplotlib's layout takes most of the time of a page.

    For the folders whose conftest imports it. Figures of fixtures of a module or session, and of tests/report, are
    complete.
    """

    def write_texts(figure: Any, file: Any, **_: Any) -> None:
        texts = "".join(f"<text>{escape(part.get_text())}</text>" for part in figure.findobj(matplotlib.text.Text))
        file.write(f'<svg xmlns="http://www.w3.org/2000/svg" width="1" height="1" version="1.1">{texts}</svg>')

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", write_texts)
