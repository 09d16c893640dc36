"""Steps on real sentences in float32: what makes a run fast leaves its loss curve where it was."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import losses
from tiny import CHATML, chat_tokenizer
from tiny_run import write_rows
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from tailora.train.config import TrainConfig
from tailora.train.trainer import run

TEXT = Path(__file__).parents[2] / "LICENSE"
STEPS = 24
SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
WAYS: dict[str, dict[str, Any]] = {
    "--fast off": {"fast": "off"},
    "padded": {"packing": "off"},
    "checkpointed": {"gradient_checkpointing": True},
}


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions and answers of 20 to 250 tokens: paragraphs cut in two."""
    paragraphs = [" ".join(part.split()) for part in TEXT.read_text().split("\n\n")]
    rows = [part for whole in paragraphs for part in whole.split("; ") if 30 < len(part) < 400]
    halves = [(row[: len(row) // 2], row[len(row) // 2 :]) for row in rows]
    examples = ({"prompt": first, "completion": second} for first, second in halves)
    return write_rows(tmp_path_factory.mktemp("curves") / "license.jsonl", examples)


@pytest.fixture(scope="module")
def trained(sentences: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[tuple[int, float]]]:
    """Returns the loss of every step, and the held-out ones, of a run; the same run is made once."""
    made: dict[str, list[tuple[int, float]]] = {}

    def train(**changes: Any) -> list[tuple[int, float]]:
        key = json.dumps(changes, sort_keys=True)
        if key not in made:
            folder = tmp_path_factory.mktemp("run")
            model = saved(sentences, folder / "model")
            settings: dict[str, Any] = {
                "model": str(model),
                "data": str(sentences),
                "output_dir": str(folder / "out"),
                "dtype": "float32",
                "r": 8,
                "learning_rate": 5e-3,
                "validation_split": 0.2,
                "per_device_train_batch_size": 2,
                "max_steps": STEPS,
                "eval_steps": 12,
            }
            config = TrainConfig(**{**settings, **changes})
            run(config)
            kernels = json.loads((folder / "out" / "run.json").read_text())["kernels"]
            assert ("loss: in chunks" in kernels) is (config.fast == "auto")
            made[key] = losses(config)
        return made[key]

    return train


def saved(text: Path, folder: Path) -> Path:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES))
    for name, parameter in model.named_parameters():  # which start at 0 and 1
        if name.endswith("bias") or "norm" in name:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder)
    tokenizer = chat_tokenizer(text.read_text().splitlines(), eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_the_curve_stays_within_a_thousandth(trained: Any, way: str) -> None:
    curve, other = trained(), trained(**WAYS[way])
    assert [step for step, _ in curve] == [step for step, _ in other]
    assert max(abs(a - b) for (_, a), (_, b) in zip(curve, other, strict=True)) < 1e-3
    assert curve[-1][1] < curve[0][1] - 0.3  # something was learned
