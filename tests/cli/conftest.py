"""A model small enough to train in a test, with a chat template, and data to train it on."""

import json
from pathlib import Path

import pytest
from tiny import chat_model, chat_tokenizer
from tiny_run import quick_figures  # noqa: F401

COLOURS = ["red", "green", "blue", "white", "black", "yellow", "grey", "pink"]
CHATS = [
    [
        {"role": "user", "content": f"What colour is thing {number}?"},
        {"role": "assistant", "content": f"It is {COLOURS[number % len(COLOURS)]}."},
    ]
    for number in range(24)
]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    ends = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    tokenizer = chat_tokenizer([message["content"] for chat in CHATS for message in chat], **ends)
    tokenizer.save_pretrained(folder)
    ids = {f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in ends.items()}
    chat_model(max_position_embeddings=512, **ids).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def chats_text() -> str:
    return "".join(json.dumps({"messages": chat}) + "\n" for chat in CHATS)


@pytest.fixture
def chats(chats_text: str, tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    path.write_text(chats_text)
    return path
