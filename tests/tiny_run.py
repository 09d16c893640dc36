"""Fixtures: a tiny chat model with its tokenizer in a folder, a file of conversations, and settings that use them."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import chat_model, chat_tokenizer

from tailora.train.config import TrainConfig

WORDS = ["red", "blue", "green", "north", "south", "one", "two", "three", "sun", "rain"]

Settings = Callable[..., TrainConfig]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    chat_model(vocab_size=320, intermediate_size=48, initializer_range=0.2).save_pretrained(folder)
    texts = [" ".join(WORDS), "user assistant"] * 3
    chat_tokenizer(texts, eos_token="<|im_end|>", pad_token="<|im_end|>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 conversations of different lengths that a model can learn something from."""
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    rows = []
    for i in range(30):
        asked = [WORDS[(i + k) % len(WORDS)] for k in range(1 + i % 7)]
        messages = [
            {"role": "user", "content": f"{i}: {' '.join(asked)}"},
            {"role": "assistant", "content": " ".join(reversed(asked))},
        ]
        rows.append(json.dumps({"messages": messages}))
    path.write_text("\n".join(rows) + "\n")
    return path


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 pairs of replies: the words in the opposite order are better than a repeated word."""
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    path.write_text("".join(f"{json.dumps(pair(i))}\n" for i in range(30)))
    return path


@pytest.fixture(scope="session")
def feedback_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The replies of the pairs in single rows."""
    path = tmp_path_factory.mktemp("data") / "feedback.jsonl"
    rows = []
    for i in range(30):
        row = pair(i)
        completion = row["rejected" if i % 3 == 0 else "chosen"]
        rows.append({"prompt": row["prompt"], "completion": completion, "label": i % 3 != 0})
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def pair(i: int) -> dict[str, str]:
    asked = [WORDS[(i + k) % len(WORDS)] for k in range(1 + i % 7)]
    return {
        "prompt": f"{i}: {' '.join(asked)}",
        "chosen": " ".join(reversed(asked)),
        "rejected": " ".join([asked[0]] * (2 + i % 4)),
    }


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
        }
        return TrainConfig(**{**defaults, **changes})

    return make


@pytest.fixture
def settings(make_settings: Settings, model_folder: Path, tmp_path: Path) -> Settings:
    """The same for the test's own folder. A test file may have a `model_folder` of its own."""
    return partial(make_settings, output_dir=str(tmp_path / "out"), model=str(model_folder))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums in the same order everywhere, and no fight over the cores. For the folders whose conftest imports it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
