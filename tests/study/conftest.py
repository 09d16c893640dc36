"""A tiny chat model in a folder, and conversations that it can learn something from."""

import json

import pytest
from tiny import chat_model, chat_tokenizer

from tailora.train.config import TrainConfig

WORDS = ["red", "blue", "green", "north", "south", "one", "two", "three", "sun", "rain"]


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    folder = tmp_path_factory.mktemp("tiny")
    chat_model(intermediate_size=48, initializer_range=0.2).save_pretrained(folder / "model")
    chat_tokenizer([" ".join(WORDS), "user assistant"] * 3, eos_token="<|im_end|>").save_pretrained(folder / "model")
    rows = []
    for i in range(60):
        asked = [WORDS[(i + k) % len(WORDS)] for k in range(1 + i % 7)]
        said = [("user", f"{i}: {' '.join(asked)}"), ("assistant", " ".join(reversed(asked)))]
        rows.append(json.dumps({"messages": [{"role": role, "content": content} for role, content in said]}))
    (folder / "chats.jsonl").write_text("\n".join(rows) + "\n")
    return TrainConfig(
        model=str(folder / "model"),
        data=str(folder / "chats.jsonl"),
        dtype="float32",
        r=4,
        validation_split=0.3,
        per_device_train_batch_size=4,
        num_train_epochs=2,
    )
