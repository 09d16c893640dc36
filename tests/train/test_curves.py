"""Forty steps on real sentences in float32: what makes a run fast leaves its loss curve where it was."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from runs import losses
from tiny import CHATML, chat_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedModel, Qwen2Config, Qwen3Config

from tailora.train import events
from tailora.train.config import TrainConfig
from tailora.train.trainer import run

TEXT = Path(__file__).parents[2] / "LICENSE"
STEPS = 40
SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
    "max_position_embeddings": 512,
}
FAMILIES = {
    "Llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "Mistral": MistralConfig(**SIZES, sliding_window=24),
    "Qwen2": Qwen2Config(**SIZES),
    "Qwen3": Qwen3Config(**SIZES, head_dim=8),
}
WAYS: dict[str, dict[str, Any]] = {
    "--fast off": {"fast": "off"},
    "padded": {"packing": "off"},
    "padded, --fast off": {"packing": "off", "fast": "off"},
    "checkpointed": {"gradient_checkpointing": True},
}


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions and answers of 20 to 250 tokens: paragraphs cut in two."""
    path = tmp_path_factory.mktemp("curves") / "license.jsonl"
    paragraphs = [" ".join(part.split()) for part in TEXT.read_text().split("\n\n")]
    rows = [part for whole in paragraphs for part in whole.split("; ") if 30 < len(part) < 400]
    halves = [(row[: len(row) // 2], row[len(row) // 2 :]) for row in rows]
    path.write_text("".join(json.dumps({"prompt": asked, "completion": told}) + "\n" for asked, told in halves))
    return path


@pytest.fixture(scope="module")
def trained(sentences: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[tuple[int, float]]]:
    """The loss of every step, and the held-out ones, of a run in this family; the same run is made once."""
    made: dict[str, list[tuple[int, float]]] = {}

    def train(family: str, **changes: Any) -> list[tuple[int, float]]:
        key = json.dumps([family, changes], sort_keys=True)
        if key not in made:
            folder = tmp_path_factory.mktemp("run")
            model = saved(family, sentences, folder / "model")
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
                "eval_steps": 20,
            }
            config = TrainConfig(**{**settings, **changes})
            lines: list[str] = []
            run(config, on_event=lambda event: lines.extend(header_of(event)))
            assert ("checked" in lines[0]) is (config.fast == "auto" and config.packing == "auto")
            made[key] = losses(config)
        return made[key]

    return train


def header_of(event: events.Event) -> Iterator[str]:
    if isinstance(event, events.Prepared):
        yield event.header["kernels"]


def saved(family: str, text: Path, folder: Path) -> Path:
    import torch

    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(FAMILIES[family])
    for name, parameter in model.named_parameters():  # which start at 0 and 1
        if name.endswith("bias") or "norm" in name:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder)
    tokenizer = chat_tokenizer(text.read_text().splitlines(), eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    return folder


CASES = [
    *((way, "Llama") for way in WAYS),
    *(
        pytest.param("--fast off", family, marks=() if family == "Qwen3" else pytest.mark.exhaustive)
        for family in FAMILIES
        if family != "Llama"
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("way", "family"), CASES)
def test_the_curve_stays_within_a_thousandth(trained: Any, way: str, family: str) -> None:
    curve, other = trained(family), trained(family, **WAYS[way])
    assert [step for step, _ in curve] == [step for step, _ in other]
    assert max(abs(a - b) for (_, a), (_, b) in zip(curve, other, strict=True)) < 1e-3
    assert curve[-1][1] < curve[0][1] - 0.3  # something was learned
