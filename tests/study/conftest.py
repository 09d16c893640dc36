"""A tiny chat model in a folder, and conversations that it can learn something from."""

import json
from pathlib import Path

import pytest
from tiny import chat_model, chat_tokenizer, tiny_model, word_tokenizer
from tiny_run import WORDS, pair

from tailora.train.config import TrainConfig


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    folder = tmp_path_factory.mktemp("tiny")
    chat_model(intermediate_size=48, initializer_range=0.2).save_pretrained(folder / "model")
    chat_tokenizer([" ".join(WORDS), "user assistant"] * 3, eos_token="<|im_end|>").save_pretrained(folder / "model")
    lines = []
    for number in range(60):
        words = [WORDS[(number + place) % len(WORDS)] for place in range(1 + number % 7)]
        messages = [
            {"role": "user", "content": f"{number}: {' '.join(words)}"},
            {"role": "assistant", "content": " ".join(reversed(words))},
        ]
        lines.append(json.dumps({"messages": messages}))
    (folder / "chats.jsonl").write_text("\n".join(lines) + "\n")
    return TrainConfig(
        model=str(folder / "model"),
        data=str(folder / "chats.jsonl"),
        dtype="float32",
        r=4,
        validation_split=0.3,
        per_device_train_batch_size=4,
        num_train_epochs=2,
    )


@pytest.fixture(scope="session")
def labels_run(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """Settings of short runs of a tiny encoder on two labels."""
    folder = tmp_path_factory.mktemp("labels")
    tiny_model("BertModel", vocab_size=300).save_pretrained(folder / "model")
    rows = [{"text": f"a {word} film {number}", "label": word} for number in range(10) for word in ("fine", "dull")]
    word_tokenizer(row["text"] for row in rows).save_pretrained(folder / "model")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TrainConfig(
        task="sequence-classification",
        model=str(folder / "model"),
        data=str(folder / "rows.jsonl"),
        validation_split=0.4,
        max_steps=2,
    )


@pytest.fixture(scope="session")
def seq2seq_run(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """Settings of short runs of a tiny BART that turns words around."""
    folder = tmp_path_factory.mktemp("seq2seq")
    rows = [{"prompt": f"say {a} then {b}", "completion": f"{b} {a}"} for a in WORDS for b in WORDS]
    tokenizer = word_tokenizer(f"{row['prompt']} {row['completion']}" for row in rows)
    tokenizer.eos_token = "[SEP]"
    tokenizer.save_pretrained(folder / "model")
    ids = {"pad_token_id": 0, "decoder_start_token_id": 2, "eos_token_id": 3, "bos_token_id": 2}
    model = tiny_model("BartForConditionalGeneration", vocab_size=300, forced_eos_token_id=None, **ids)
    model.save_pretrained(folder / "model")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TrainConfig(
        task="seq2seq",
        model=str(folder / "model"),
        data=str(folder / "rows.jsonl"),
        validation_split=0.3,
        max_steps=3,
        learning_rate=1e-2,
    )


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of replies: the words in the opposite order are better than a repeated word."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("".join(f"{json.dumps(pair(i))}\n" for i in range(40)))
    return path


class Steps:
    """A `Progress` that keeps what it is called with."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, int]] = []  # step, steps
        self.workers: set[int] = set()
        self.ended: list[int] = []  # workers

    def step(self, step: int, steps: int, _loss: float, *, worker: int) -> None:
        self.steps.append((step, steps))
        self.workers.add(worker)

    def end(self, *, worker: int) -> None:
        self.ended.append(worker)


@pytest.fixture
def progress() -> Steps:
    return Steps()
