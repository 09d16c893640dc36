"""What fine-tuning of large models needs on 1 to 512 GPUs: calculated, nothing is measured. Needs no card, no weights.

    python benchmarks/scaling.py        writes benchmarks/results/scaling.json, which docs/scaling.md shows

Memory, products and traffic are those that `tailora plan` finds: the run's own code on tensors without contents, with
4 and with 8 decoder layers; all quantities grow evenly with the layers, so the whole model follows. Memory is that of a
step and that of loading, and the larger of the two has to fit. Time is the
roofline of tailora/study/cards.py, beside the time that the collectives take on links of a data sheet.

Shapes are those of the models' public config.json, written down here from memory and checked by their known number of
parameters. Data sheets: an H100 SXM sends 450 GB/s to its neighbours by NVLink, and a DGX H100 has one port of
400 Gbit/s for each GPU.
"""

from collections import Counter
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from measure import log, write
from transformers import LlamaConfig, PretrainedConfig, Qwen3MoeConfig

from tailora.data.dataset import Example
from tailora.study.cards import CONTEXT, find_cards, step_time
from tailora.train import estimate
from tailora.train.config import TrainConfig

LLAMA = {"vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 131072}
SHAPES: dict[str, tuple[PretrainedConfig, float]] = {  # name -> shape, billions of parameters that the makers state
    "Llama-3.1-8B": (
        LlamaConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, **LLAMA),
        8.03,
    ),
    "Llama-3.1-70B": (
        LlamaConfig(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, **LLAMA),
        70.6,
    ),
    "Qwen3-235B-A22B": (
        Qwen3MoeConfig(
            hidden_size=4096,
            intermediate_size=12288,
            num_hidden_layers=94,
            num_attention_heads=64,
            num_key_value_heads=4,
            head_dim=128,
            num_experts=128,
            num_experts_per_tok=8,
            moe_intermediate_size=1536,
            vocab_size=151936,
            max_position_embeddings=40960,
            tie_word_embeddings=False,
        ),
        235.0,
    ),
}
METHODS: dict[str, dict[str, Any]] = {
    "LoRA": {"r": 16},
    "QLoRA": {"r": 16, "quantize": "nf4"},
    "full": {"method": "full", "learning_rate": 1e-5},
}
CARD = find_cards("h100")[0]
GPUS = (1, 8, 64, 512)
GPUS_PER_NODE = 8
LENGTH = 4096  # tokens of the one example that a rank has in a step; with checkpointing
FEW = (4, 8)  # decoder layers that are simulated
NVLINK, NETWORK = 450e9, 50e9  # bytes a second of a GPU in each direction: within a node, and its port to others
LINK_REACHED = 0.8  # of the data sheet, by large collectives; assumed
PARTS = ("weights", "gathered", "adapters", "gradients", "optimizer", "activations", "logits", "process")


def simulated(model: str, method: str, layers: int) -> dict[str, Any]:
    """Memory, sent bytes and operators of one rank, for a model of so many layers."""
    shape = SHAPES[model][0].__class__.from_dict({**SHAPES[model][0].to_dict(), "num_hidden_layers": layers})
    shape.dtype = torch.bfloat16
    config = TrainConfig(model=model, max_length=LENGTH, gradient_checkpointing=True, **METHODS[method])
    ids = np.arange(LENGTH, dtype=np.int32)
    with estimate.fake_model(config, shape, estimate.AbsentDevice("cuda", torch.bfloat16)) as fake:
        of_one, of_rank = (
            estimate.simulate_step(fake, [Example(ids, ids)], checkpointed=True, sharded=sharded)
            for sharded in (False, True)
        )
        steps = {n: of_one if n == 1 else of_rank for n in GPUS}
        return {
            "parameters": sum(parameter.numel() for parameter in fake.base.parameters()),
            "trained": estimate.trained_bytes(fake) // 4,
            "operators": of_one.operators,
            "memory": {n: asdict(estimate.memory_of_step(config, fake, steps[n], CONTEXT, n)) for n in GPUS},
            "loading": {n: estimate.memory_of_loading(fake, CONTEXT, n) for n in GPUS},
            "sent": {
                (n, sharded): estimate.sent_bytes(fake, n, 1, sharded=sharded)
                for n in GPUS
                for sharded in (True, False)
            },
        }


def grown(few: Any, many: Any, layers: int) -> Any:
    """The quantity with all layers, from that with FEW[0] and with FEW[1]."""
    return few + (many - few) * (layers - FEW[0]) / (FEW[1] - FEW[0])


def whole(model: str, method: str) -> dict[str, Any]:
    layers = SHAPES[model][0].num_hidden_layers
    few, many = (simulated(model, method, number) for number in FEW)
    operators = Counter(
        {
            operator: grown(few["operators"][operator], many["operators"][operator], layers)
            for operator in {**few["operators"], **many["operators"]}
        }
    )
    time = step_time(CARD, operators)  # type: ignore[arg-type]
    return {
        "parameters": grown(few["parameters"], many["parameters"], layers),
        "trained": grown(few["trained"], many["trained"], layers),
        "seconds": {"products": time.products, "memory": time.memory, "launches": time.launches},
        "memory": {
            n: {part: grown(few["memory"][n][part], many["memory"][n][part], layers) for part in PARTS} for n in GPUS
        },
        "loading": {n: grown(few["loading"][n], many["loading"][n], layers) for n in GPUS},
        "sent": {key: grown(few["sent"][key], many["sent"][key], layers) for key in few["sent"]},
    }


def link_seconds(sent: float, gpus: int) -> float:
    """Seconds of collectives in which each GPU sends so much. Between nodes, a node's ports carry the data once."""
    speed = NVLINK if gpus <= GPUS_PER_NODE else min(NVLINK, GPUS_PER_NODE * NETWORK)
    return sent / (LINK_REACHED * speed)


def cell(model: str, method: str, gpus: int, numbers: dict[str, Any]) -> dict[str, Any]:
    """One line: with a whole base on each GPU where that fits, which communicates least, or else sharded."""

    def largest(shards: int) -> float:
        return float(max(sum(numbers["memory"][shards].values()), numbers["loading"][shards]))

    shards = 1 if largest(1) <= CARD.available_bytes else gpus
    is_sharded, memory = shards > 1, numbers["memory"][shards]
    sent = 0.0 if gpus == 1 else numbers["sent"][gpus, is_sharded]
    seconds, links = numbers["seconds"], link_seconds(sent, gpus)
    computing = max(seconds["products"] + seconds["memory"], seconds["launches"])
    step = max(computing, links)  # the collectives of one layer run while another one computes
    return {
        "cell": {"model": model, "method": method, "gpus": gpus},
        "result": {
            "sharded": is_sharded,
            "memory": {**memory, "total": sum(memory.values())},
            "loading": numbers["loading"][shards],
            "fits": largest(shards) <= CARD.available_bytes,
            "sent_bytes": sent,
            "computing_seconds": computing,
            "link_seconds": links,
            "step_seconds": step,
            "tokens_per_second": gpus * LENGTH / step,
            "gpu_hours_per_billion_tokens": 1e9 * step / LENGTH / 3600,
            "tokens_per_step": gpus * LENGTH,
            # of a GPU in a forward and backward, from which on the collectives are hidden behind the computing
            "balancing_tokens": LENGTH * links / computing,
        },
    }


def main() -> None:
    cells, models = [], {}
    for model, (shape, stated) in SHAPES.items():
        for method in METHODS:
            numbers = whole(model, method)
            billions = numbers["parameters"] / 1e9
            assert abs(billions / stated - 1) < 0.01, (model, billions)
            if method == "LoRA":
                models[model] = {"parameters": numbers["parameters"], "trained": numbers["trained"], **settings(shape)}
            cells += [cell(model, method, gpus, numbers) for gpus in GPUS]
            log(f"{model} {method}: {billions:.1f}B parameters")
    results = {
        "calculated": "nothing was measured",
        "card": asdict(CARD),
        "length": LENGTH,
        "links": {"nvlink": NVLINK, "network": NETWORK, "reached": LINK_REACHED},
        "models": models,
        "cells": cells,
    }
    write("scaling", results)


def settings(shape: PretrainedConfig) -> dict[str, int]:
    names = (
        *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
        *("vocab_size", "num_experts", "num_experts_per_tok", "moe_intermediate_size"),
    )
    return {name: getattr(shape, name) for name in names if hasattr(shape, name)}


if __name__ == "__main__":
    main()
