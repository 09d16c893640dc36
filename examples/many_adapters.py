"""Many adapters on one base model, trained in the same batches: every row of a batch has its own adapter.

    python examples/many_adapters.py --output-dir out [--adapters 8]

Adapter number k learns to answer a digit d with d + k, modulo 10. One forward and one backward train all of them. For
comparison, each adapter is also trained alone on its own rows. This takes the same number of steps for each adapter and
gives the same values.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from tailora import LoRAConfig, LoRAModel

DIGITS = torch.arange(10)  # the batch rows of each adapter


def tiny_model() -> LlamaForCausalLM:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=10, **sizes, initializer_range=0.2))


def logits(model: LoRAModel, names: Sequence[str]) -> Tensor:
    """Returns the logits of every adapter for every digit, (adapters, digits, 10), from one forward."""
    ids = DIGITS.repeat(len(names))[:, None]
    rows = [name for name in names for _ in DIGITS]
    with model.adapter_rows(rows):
        output: Tensor = model(input_ids=ids).logits
    return output.view(len(names), len(DIGITS), 10)


def answers(names: Sequence[str]) -> Tensor:
    return torch.stack([(DIGITS + int(name)) % 10 for name in names])


def train(model: LoRAModel, names: Sequence[str], steps: int) -> float:
    """Trains these adapters together and returns the elapsed seconds."""
    started = time.perf_counter()
    model.set_adapter(names)  # lora_layers then has the parameters of all of them
    optimizer = torch.optim.AdamW(model.lora_layers.parameters(), lr=5e-3, weight_decay=0)
    for _ in range(steps):
        losses = cross_entropy(logits(model, names).flatten(0, 1), answers(names).flatten(), reduction="none")
        losses.view(len(names), -1).mean(1).sum().backward()  # gradients do not depend on the number of adapters
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - started


@torch.no_grad()
def accuracy(model: LoRAModel, names: Sequence[str]) -> float:
    return float((logits(model, names).argmax(-1) == answers(names)).float().mean())


@torch.no_grad()
def distance(one: LoRAModel, other: LoRAModel, name: str) -> float:
    layers = zip(one.adapter(name).low_rank.values(), other.adapter(name).low_rank.values(), strict=True)
    return max(float((layer.lora_B - twin.lora_B).abs().max()) for layer, twin in layers)


def make(names: Sequence[str]) -> LoRAModel:
    """Returns the base model with new adapters, identical in every call."""
    torch.manual_seed(0)
    model = LoRAModel(tiny_model(), LoRAConfig(r=4), names[0])
    for name in names[1:]:
        model.add_adapter(name, LoRAConfig(r=4))
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description="Train many adapters in the same batches.")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--max-steps", type=int, default=60)
    options = parser.parse_args()

    names = [str(number) for number in range(1, options.adapters + 1)]
    together, alone = make(names), make(names)
    before = accuracy(together, names)
    seconds = train(together, names, options.max_steps)
    after = accuracy(together, names)
    seconds_alone = sum(train(alone, [name], options.max_steps) for name in names)
    together.save_pretrained(options.output_dir)  # one folder per adapter

    difference = max(distance(together, alone, name) for name in names)
    print(f"right answers: {before:.0%} before, {after:.0%} after")
    print(f"{seconds:.1f} s together, {seconds_alone:.1f} s one after the other; largest difference {difference:.1g}")


if __name__ == "__main__":
    main()
