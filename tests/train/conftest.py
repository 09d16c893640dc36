"""A tiny chat model with its tokenizer in a folder, a file of conversations, and settings that use them."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tailora.train.config import TrainConfig

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = ["red", "blue", "green", "north", "south", "one", "two", "three", "sun", "rain"]

Settings = Callable[..., TrainConfig]


def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([" ".join(WORDS), "user assistant"] * 3, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|im_end|>")
    made.chat_template = TEMPLATE
    return made


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=320, num_key_value_heads=2, initializer_range=0.2, **sizes))
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
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


@pytest.fixture
def settings(model_folder: Path, data_file: Path, tmp_path: Path) -> Settings:
    def make(**changes: Any) -> TrainConfig:
        defaults: dict[str, Any] = {
            "model": str(model_folder),
            "data": str(data_file),
            "output_dir": str(tmp_path / "out"),
            "dtype": "float32",
            "r": 4,
            "learning_rate": 1e-2,
            "validation_split": 0.2,
            "per_device_train_batch_size": 4,
        }
        return TrainConfig(**{**defaults, **changes})

    return make


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums in the same order everywhere, and no fight over the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
