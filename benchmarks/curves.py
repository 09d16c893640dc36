"""The demo's model on its own data in float32, 100 steps: what makes a run fast leaves its loss curve where it was.

    python benchmarks/curves.py           writes benchmarks/results/curves.json

Every way is compared, step by step, with `--fast off`: the largest difference of a step's loss and of the held-out one,
in nats per token.
"""

import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import measure

STEPS = 100
WAYS: dict[str, dict[str, Any]] = {
    "as by default": {},
    "padded": {"packing": "off"},
    "checkpointed": {"gradient_checkpointing": True},
    "fast off": {"fast": "off"},
}


def cells(quick: bool) -> list[measure.Cell]:
    ways = ["as by default", "fast off"] if quick else list(WAYS)
    return [{"way": way, "steps": 4 if quick else STEPS, "threads": 2, "malloc": "default"} for way in ways]


def work(way: str, steps: int, threads: int) -> dict[str, Any]:
    """The curve, and what the header says of the kernels."""
    from tailora.train.config import TrainConfig
    from tailora.train.trainer import run

    common = {"model": "demo", "data": "demo", "eval_data": "demo", "dtype": "float32", "learning_rate": 1e-3}
    size = {"max_steps": steps, "per_device_train_batch_size": 2, "max_length": 128, "samples": 0, "save_steps": 0}
    heard: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        run(
            TrainConfig(**{**common, **size, **WAYS[way], "output_dir": folder}),
            on_event=partial(_hear, heard),
        )
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return {
        "threads": threads,
        "kernels": heard["kernels"],
        "losses": [line["loss"] for line in lines if "loss" in line],
        "held_out": [line["eval_loss"] for line in lines if "eval_loss" in line],
    }


def _hear(heard: dict[str, Any], event: Any) -> None:
    heard.update(getattr(event, "header", {}))


if __name__ == "__main__":
    measure.main("curves", str(__doc__), cells, work)
