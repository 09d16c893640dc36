"""A tiny chat model in a folder, and conversations that it can learn something from."""

from pathlib import Path

import pytest
from tiny import tiny_model, word_tokenizer
from tiny_run import WORDS, chat, pair, quick_figures, save_model, write_rows  # noqa: F401

from tailora.train.config import TrainConfig


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    folder = tmp_path_factory.mktemp("tiny")
    save_model(folder / "model", intermediate_size=48)
    write_rows(folder / "chats.jsonl", map(chat, range(60)))
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
    write_rows(folder / "rows.jsonl", rows)
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
    write_rows(folder / "rows.jsonl", rows)
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
    return write_rows(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", map(pair, range(40)))


class Steps:
    """A `Progress` that keeps what it is called with."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, int]] = []  # step, steps
        self.workers: set[int] = set()
        self.ended: list[int] = []  # workers

    def step(self, step: int, steps: int, _result: str, *, worker: int) -> None:
        self.steps.append((step, steps))
        self.workers.add(worker)

    def end(self, *, worker: int) -> None:
        self.ended.append(worker)


@pytest.fixture
def progress() -> Steps:
    return Steps()
