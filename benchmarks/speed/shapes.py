"""Llama models of random weights for the benchmarks, and rows of random tokens."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tailora.data.dataset import Example

if TYPE_CHECKING:
    from transformers import LlamaConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Shape:
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_heads: int
    vocabulary: int
    tied: bool
    rows: int  # sequences in a step
    length: int  # tokens of each
    steps: int = 4  # in a pass over the data

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.rows * self.length

    def config(self) -> "LlamaConfig":
        from transformers import LlamaConfig

        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_heads,
            vocab_size=self.vocabulary,
            tie_word_embeddings=self.tied,
            max_position_embeddings=4096,
            bos_token_id=None,
            eos_token_id=0,
            dtype=torch.bfloat16,
        )


SHAPES = {
    "S": Shape(576, 1536, 30, 9, 3, 49152, tied=True, rows=4, length=256),  # SmolLM2-135M
    "T": Shape(288, 768, 6, 6, 6, 32000, tied=True, rows=8, length=256),  # stories15M
    "W": Shape(2048, 5632, 4, 32, 8, 32000, tied=False, rows=2, length=256),  # four layers of a 1B model
}
SMALL = replace(SHAPES["S"], layers=6)  # where depth makes no difference


def write_model(shape: Shape, folder: Path, device: torch.device | None = None) -> None:
    """Writes a Hugging Face folder: random weights in bfloat16, and a tokenizer whose words are w0, w1, ...

    device: where the weights are made.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    with torch.device(device or "cpu"):
        model = LlamaForCausalLM(shape.config())
    model.to(torch.bfloat16).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(shape.vocabulary)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0", pad_token="w0").save_pretrained(folder)


def write_rows(shape: Shape, path: Path) -> list[Example]:
    """Writes JSONL of texts, the end of each a token; returns them as examples, all of whose tokens are trained."""
    random = np.random.default_rng(0)
    sizes = [shape.length] * shape.steps * shape.rows
    ids = [random.integers(1, shape.vocabulary, size=size, dtype=np.int32) for size in sizes]
    for row in ids:
        row[-1] = 0
    rows: list[dict[str, Any]] = [{"text": " ".join(f"w{i}" for i in row[:-1])} for row in ids]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [Example.of_text(row) for row in ids]
