"""Llama models of random weights for the benchmarks, the operations of a LoRA step on them, and the machine's peak."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional as F

from tailora.data.dataset import Example, Int64

if TYPE_CHECKING:
    from transformers import LlamaConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
RANK = 16
SQUARE = 2048  # side of the matrices whose product shows the machine's peak


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
    shortest: int | None = None  # if set, sequences have from so many tokens to `length`
    steps: int = 4  # in a pass over the data

    @cached_property
    def lengths(self) -> Int64:
        """Tokens of every row, (steps * rows,)."""
        shortest = self.length if self.shortest is None else self.shortest
        return np.random.default_rng(1).integers(shortest, self.length + 1, size=self.steps * self.rows)

    @property
    def tokens(self) -> int:
        """Tokens of a step, rounded mean of all."""
        return round(self.lengths.sum() / self.steps)

    @property
    def steps_per_turn(self) -> int:
        """Steps of an arm before the next arm has its turn: a whole pass if rows differ in length."""
        return 1 if self.shortest is None else self.steps

    def linears(self) -> dict[str, tuple[int, int]]:
        """Returns inputs and outputs of the seven linear layers of a decoder layer."""
        keys = self.hidden // self.heads * self.key_heads
        return {
            "q": (self.hidden, self.hidden),
            "k": (self.hidden, keys),
            "v": (self.hidden, keys),
            "o": (self.hidden, self.hidden),
            "gate": (self.hidden, self.intermediate),
            "up": (self.hidden, self.intermediate),
            "down": (self.intermediate, self.hidden),
        }

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
    # ten layers of S with a small head, documents of many lengths
    "D": Shape(576, 1536, 10, 9, 3, 1000, tied=True, rows=8, length=250, shortest=60, steps=8),
}
SMALL = replace(SHAPES["S"], layers=6)  # where depth makes no difference


def step_flops(shape: Shape, r: int = RANK) -> float:
    """Returns the operations that no LoRA step can leave out.

    They are the frozen forward and its input gradients, the adapters, and causal attention. The input gradients of
    layer 0's q, k and v do not count, because nothing below needs them. All tokens are supervised.
    """
    tokens, linears = shape.tokens, shape.linears()
    frozen = shape.layers * sum(n_in * n_out for n_in, n_out in linears.values()) + shape.hidden * shape.vocabulary
    first = sum(n_in * n_out for name, (n_in, n_out) in linears.items() if name in "qkv")
    adapters = shape.layers * r * sum(n_in + n_out for n_in, n_out in linears.values())
    attention = shape.layers * shape.hidden * float(np.square(shape.lengths).sum()) / shape.steps
    return 4.0 * tokens * frozen - 2.0 * tokens * first + 6.0 * tokens * adapters + 6.0 * attention


def peak_flops(dtype: torch.dtype, threads: int) -> float:
    """Returns the operations per second of a square product, median of five."""
    clock = process_time if threads == 1 else perf_counter
    a, b = torch.randn(SQUARE, SQUARE).to(dtype), torch.randn(SQUARE, SQUARE).to(dtype)
    seconds = []
    for _ in range(6):
        started = clock()
        F.linear(a, b)
        seconds.append(clock() - started)
    return 2 * SQUARE**3 / median(seconds[1:])


def products(shape: Shape, dtype: torch.dtype) -> Callable[[], None]:
    """Returns a step of the frozen products alone, forward and input gradient, each at the speed of its own shape."""
    sizes = [*shape.linears().values()] * shape.layers + [(shape.hidden, shape.vocabulary)]
    weights = [torch.randn(n_out, n_in).to(dtype) for n_in, n_out in sizes]
    buffers = {size: torch.randn(shape.tokens, size).to(dtype) for pair in sizes for size in pair}

    @torch.no_grad()
    def step() -> None:
        for weight in weights:
            n_out, n_in = weight.shape
            torch.mm(buffers[n_in], weight.T, out=torch.empty(shape.tokens, n_out, dtype=dtype))
            torch.mm(buffers[n_out], weight, out=torch.empty(shape.tokens, n_in, dtype=dtype))

    return step


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
    ids = [random.integers(1, shape.vocabulary, size=length, dtype=np.int32) for length in shape.lengths]
    for row in ids:
        row[-1] = 0
    rows: list[dict[str, Any]] = [{"text": " ".join(f"w{i}" for i in row[:-1])} for row in ids]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [Example.of_text(row) for row in ids]
