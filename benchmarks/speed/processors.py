"""What tailora gains on smaller processors: training, memory, losses and serving, with instructions restricted.

    python -m benchmarks.speed.processors       writes benchmarks/results/processors.json
    python -m benchmarks.speed.processors --only what=training instructions=AVX2

ONEDNN_MAX_CPU_ISA and ATEN_CPU_CAPABILITY restrict the products and the pointwise kernels of a process, so that one
machine stands for several. Arms have a process each and take turns, step by step, on the same batches: 8 chats of the
demo, of similar length. All times are CPU time. To save time, training has the first LAYERS layers of SmolLM2-135M.

Bound: the CPU time of the frozen products of a step alone, one by one, each with the weights and the number of tokens
of the step. These are x W^T of every linear layer and of the output head, and dy W, except in the first layer's q, k
and v, below which nothing is trained. Tokens with which a chat begins like the one before it count once, as tailora
computes them once. The head has the supervised tokens only. The products take their turns like an arm, in bfloat16
and in float32; for a bfloat16 model the faster of the two is the bound, for a float32 model float32.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from benchmarks import measure
from benchmarks.serving.serve import engine_of, of_length, run_engine
from benchmarks.speed import trainers
from benchmarks.speed.arm_processes import Turn, Turns, arms_in_processes
from tailora.cli.models import load_model
from tailora.cli.train import DEFAULTS
from tailora.core.adapter_set import AdapterSet
from tailora.core.device import has_bfloat16
from tailora.data.chat_template import DataSettings
from tailora.data.collate import shared_beginnings
from tailora.data.dataset import Examples
from tailora.data.demo import data_file, eval_file
from tailora.data.prepare import prepare
from tailora.train.config import TrainConfig
from tailora.train.dataloader import plan_batches
from tailora.train.events import Stepped
from tailora.train.memory import keep_freed_memory
from tailora.train.model_loading import load_base
from tailora.train.trainer import run

ONLY_TRAINING = {**DEFAULTS, **trainers.SAME_WORK, "validation_split": 0, "samples": 0, "save_steps": 0}
LAYERS = 4  # of the model's 30, in training
BATCHES, ROWS = 4, 8
MAX_STEPS = 1000  # more than an arm has turns
IN_EVERY_ROUND = ("tailora", "PEFT")  # the others take longest: once
LONG = 5.0  # seconds
STEPS, SEEDS = 50, 3  # of the losses
LOSSES: dict[str, tuple[str, int | None]] = {  # name -> precision of the base; from how many tokens on its products
    "float32": ("float32", None),  # are computed in float32
    "float32 products": ("bfloat16", 4),
    "bfloat16 products": ("bfloat16", None),
}
REQUESTS, NEW = 8, 32  # requests at once, and tokens of each answer


def cells(quick: bool) -> list[measure.Cell]:
    names = ("what", "instructions", "dtype", "threads")
    grid = product(["training"], measure.INSTRUCTIONS, ["bfloat16", "float32"], [1, 2])
    points = [("training", "all", "bfloat16", 1)] if quick else [*grid]
    training = [dict(zip(names, point, strict=True)) for point in points]
    serving = [{"what": "serving", "instructions": name, "threads": 1} for name in [*measure.INSTRUCTIONS][-quick:]]
    common = {"malloc": "default", "rounds": 1 if quick else 3}
    return [cell | common for cell in [*training, *serving, {"what": "losses", "threads": 1}]]


def run_cell(what: str, rounds: int, threads: int, instructions: str = "", dtype: str = "") -> dict[str, Any]:
    del threads  # set in the environment, as the instructions are
    if what == "training":
        return training(dtype, rounds, autocast=instructions == "all" and has_bfloat16())
    if what == "serving":
        return serving(rounds)
    return {name: losses(*precisions, steps=STEPS if rounds > 1 else 2) for name, precisions in LOSSES.items()}


# ---- Training


def training(dtype: str, rounds: int, *, autocast: bool) -> dict[str, Any]:
    """Returns CPU seconds and memory of the steps of all arms. autocast: of Trainer and TRL, for a bfloat16 model."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokens = write_task(folder)
        paths = {"model": str(folder / "model"), "data": str(folder / "rows.jsonl"), "output_dir": str(folder / "run")}
        config = TrainConfig(**{**ONLY_TRAINING, **paths, "dtype": dtype, "max_steps": MAX_STEPS})
        endless = {"max_steps": MAX_STEPS, "bf16": autocast and dtype == "bfloat16"}
        grouped = {"train_sampling_strategy": "group_by_length", "max_length": None}
        arms: dict[str, Callable[[Turns], None]] = {
            "tailora": partial(trainers.tailora, config),
            "PEFT": partial(run_on_rows, trainers.peft_loop, config, passes=MAX_STEPS),
            "products, bfloat16": partial(frozen_products, config, "bfloat16"),
            "products, float32": partial(frozen_products, config, "float32"),
            "Trainer": partial(run_on_rows, trainers.trainer, config, **endless),
            "TRL": partial(run_on_rows, trainers.trl, config, **endless, **grouped),
        }
        with arms_in_processes(arms) as steps:
            turns = in_turn(steps, rounds)
        header = json.loads((folder / "run" / "run.json").read_text())
    return {"kernels": header["kernels"], **figures(turns, tokens, dtype)}


def figures(turns: dict[str, list[Turn]], tokens: float, dtype: str) -> dict[str, Any]:
    """Returns what the turns show of steps. tokens: of a step, the mean. dtype: of the model."""
    cpu = {name: [turn["cpu"] for turn in own] for name, own in turns.items()}
    above = {name: max(turn["above_bytes"] for turn in own) for name, own in turns.items()}
    times = {name: statistics.median(cpu[f"products, {name}"]) for name in ("bfloat16", "float32")}
    bound = times["float32"] if dtype == "float32" else min(times.values())
    return {
        "tokens": tokens,
        "tokens_per_cpu_second": {name: measure.spread([tokens / value for value in cpu[name]]) for name in cpu},
        "x_peft": measure.spread([a / b for a, b in zip(cpu["PEFT"], cpu["tailora"], strict=True)]),
        "above_bytes": above,
        "memory_x_peft": measure.spread([above["tailora"] / above["PEFT"]]),
        "bound_seconds": bound,
        "x_bound": measure.spread([value / bound for value in cpu["tailora"]]),
        "peft_x_bound": measure.spread([value / bound for value in cpu["PEFT"]]),
        "runs": cpu,
    }


def in_turn(steps: dict[str, Callable[[], Turn]], rounds: int) -> dict[str, list[Turn]]:
    """Runs the steps of the arms in turn. The first of each warms up; if it took LONG, it counts."""
    first = {name: step() for name, step in steps.items()}
    turns = {name: [turn] if turn["cpu"] > LONG else [] for name, turn in first.items()}
    for _ in range(rounds):
        for name, step in steps.items():
            if len(turns[name]) < (rounds if name in IN_EVERY_ROUND else 1):
                turns[name].append(step())
    return turns


def write_task(folder: Path) -> float:
    """Writes the first layers of the demo's model, and the rows of batches of median size; returns their mean size."""
    base, tokenizer = load_base("demo", "stored")
    base.model.layers = base.model.layers[:LAYERS]
    base.config.num_hidden_layers = LAYERS
    for part in (base, tokenizer):
        part.save_pretrained(folder / "model")
    lengths = prepare(str(data_file()), tokenizer, DataSettings(validation_split=0)).train.lengths
    batches = plan_batches(lengths, batch_size=ROWS, seed=0, epoch=0)
    first = (len(batches) - BATCHES) // 2
    chosen = np.concatenate(sorted(batches, key=lambda batch: int(lengths[batch].sum()))[first : first + BATCHES])
    lines = data_file().read_text().splitlines(keepends=True)
    (folder / "rows.jsonl").write_text("".join(lines[i] for i in chosen))
    return float(lengths[chosen].sum() / BATCHES)


def examples_of(config: TrainConfig, tokenizer: Any) -> Examples:
    return prepare(config.data, tokenizer, DataSettings(max_length=config.max_length, validation_split=0)).train


def run_on_rows(function: Callable[..., None], config: TrainConfig, watch: Turns, **settings: Any) -> None:
    base, tokenizer = load_base(config.model, config.dtype)
    function(config, watch, base=base, tokenizer=tokenizer, examples=examples_of(config, tokenizer), **settings)


def frozen_products(config: TrainConfig, dtype: str, turns: Turns) -> None:
    """The products of a step with frozen weights; see the head of this file."""
    base, tokenizer = load_base(config.model, dtype)
    examples = examples_of(config, tokenizer)
    batches = plan_batches(examples.lengths, batch_size=ROWS, seed=0, epoch=0)
    repeated = sum(sum(shared_beginnings([examples[int(i)] for i in batch])) for batch in batches)
    tokens = round((int(examples.lengths.sum()) - repeated) / BATCHES)
    supervised = round(int(examples.supervised.sum()) / BATCHES)
    untrained_below = {f"model.layers.0.self_attn.{name}_proj" for name in "qkv"}
    made, into = [], {}
    for name, layer in base.named_modules():
        if isinstance(layer, torch.nn.Linear):
            rows = supervised if layer is base.get_output_embeddings() else tokens
            x, y = (torch.randn(rows, size, dtype=layer.weight.dtype) for size in layer.weight.shape[::-1])
            made.append((layer.weight.detach(), x, y, name not in untrained_below))
            into |= {x.shape: torch.empty_like(x), y.shape: torch.empty_like(y)}
    turns.start()
    for number in range(MAX_STEPS):
        for weight, x, y, has_gradient in made:
            torch.mm(x, weight.T, out=into[y.shape])
            if has_gradient:
                torch.mm(y, weight, out=into[x.shape])
        turns.after_step(number, MAX_STEPS, print)


def losses(dtype: str, float32_from: int | None, steps: int) -> list[float]:
    """Returns the losses of the steps of tailora's runs on the demo's chats, two at a time, with several seeds."""
    events: list[Any] = []
    with tempfile.TemporaryDirectory() as folder:
        write_task(Path(folder))
        fixed = {"model": f"{folder}/model", "dtype": dtype, "max_steps": steps, "per_device_train_batch_size": 2}
        for seed in range(SEEDS):
            config = TrainConfig(**{**ONLY_TRAINING, **fixed, "output_dir": f"{folder}/{seed}", "seed": seed})
            with patch("tailora.train.kernel_choice.fastest_products", lambda _: float32_from):
                run(config, on_event=events.append)
    return [event.loss for event in events if isinstance(event, Stepped)]


# ---- Serving


def serving(rounds: int) -> dict[str, Any]:
    """Returns tokens per CPU second of `serve` and of transformers' generate: one batch of the same 8 prompts."""
    keep_freed_memory(torch.device("cpu"))  # as `tailora serve` does; both gain
    base, tokenizer = load_base("demo", "stored")
    chats = [json.loads(line)["messages"][:1] for line in eval_file().read_text().splitlines()[:REQUESTS]]
    prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] for chat in chats]
    batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    engine = engine_of(AdapterSet(load_model("demo", {}).model, {}))
    arms: dict[str, Callable[[], Any]] = {
        "tailora": lambda: run_engine(engine, [(tuple(prompt), None, NEW) for prompt in prompts]),
        "generate": lambda: base.generate(**batch, **of_length(NEW)),
    }
    with torch.inference_mode():
        times = measure.take_turns(arms, rounds, time.process_time)
    engine.stop()
    rates = {name: [REQUESTS * NEW / value for value in values] for name, values in times.items()}
    return {
        "prompt_tokens": sum(map(len, prompts)),
        "tokens_per_cpu_second": {name: measure.spread(values) for name, values in rates.items()},
        "x_generate": measure.spread([a / b for a, b in zip(rates["tailora"], rates["generate"], strict=True)]),
        "runs": times,
    }


if __name__ == "__main__":
    measure.main("processors", str(__doc__), cells, run_cell)
