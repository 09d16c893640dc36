"""What tailora gains on smaller processors: training, memory, losses and serving, with instructions restricted.

    python -m benchmarks.speed.processors       writes benchmarks/results/processors.json
    python -m benchmarks.speed.processors --only what=training instructions=AVX2

ONEDNN_MAX_CPU_ISA and ATEN_CPU_CAPABILITY restrict the products and the pointwise kernels of a process, so that one
machine stands for several. Arms have a process each and take turns, step by step, on the same batches: 8 chats of the
demo, of similar length. All times are CPU time. To save time, training has the first LAYERS layers of SmolLM2-135M.
"""

import json
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
from tailora.data.chat_template import DataSettings
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
    del threads, instructions  # set in the environment
    if what == "training":
        return training(dtype, rounds)
    if what == "serving":
        return serving(rounds)
    return {name: losses(*precisions, steps=STEPS if rounds > 1 else 2) for name, precisions in LOSSES.items()}


# ---- Training


def training(dtype: str, rounds: int) -> dict[str, Any]:
    """Returns CPU seconds and memory of the steps of both arms."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokens = write_task(folder)
        paths = {"model": str(folder / "model"), "data": str(folder / "rows.jsonl"), "output_dir": str(folder / "run")}
        config = TrainConfig(**{**ONLY_TRAINING, **paths, "dtype": dtype, "max_steps": MAX_STEPS})
        arms: dict[str, Callable[[Turns], None]] = {
            "tailora": partial(trainers.tailora, config),
            "PEFT": partial(peft_loop, config),
        }
        with arms_in_processes(arms) as steps:
            turns = in_turn(steps, rounds)
        header = json.loads((folder / "run" / "run.json").read_text())
    cpu = {name: [turn["cpu"] for turn in own] for name, own in turns.items()}
    above = {name: max(turn["above_bytes"] for turn in own) for name, own in turns.items()}
    return {
        "kernels": header["kernels"],
        "tokens": tokens,
        "tokens_per_cpu_second": {name: measure.spread([tokens / value for value in cpu[name]]) for name in cpu},
        "x_peft": measure.spread([a / b for a, b in zip(cpu["PEFT"], cpu["tailora"], strict=True)]),
        "above_bytes": above,
        "memory_x_peft": measure.spread([above["tailora"] / above["PEFT"]]),
        "runs": cpu,
    }


def in_turn(steps: dict[str, Callable[[], Turn]], rounds: int) -> dict[str, list[Turn]]:
    """Runs the steps of the arms in turn. The first of each warms up."""
    turns: dict[str, list[Turn]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            turns[name].append(step())
    return {name: own[1:] for name, own in turns.items()}


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


def peft_loop(config: TrainConfig, turns: Turns) -> None:
    base, tokenizer = load_base(config.model, config.dtype)
    settings = DataSettings(max_length=config.max_length, validation_split=0)
    examples = prepare(config.data, tokenizer, settings).train
    trainers.peft_loop(config, turns, base=base, tokenizer=tokenizer, examples=examples, passes=MAX_STEPS)


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
