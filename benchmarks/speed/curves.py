"""100 steps of the demo's model in float32: what makes a run fast does not change its loss curve.

    python -m benchmarks.speed.curves           writes benchmarks/results/curves.json

Each setting is compared, step by step, with `--fast off`: the largest difference of a step's loss and of the held-out
loss, in nats per token.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import measure

STEPS = 100
SETTINGS: dict[str, dict[str, Any]] = {
    "as by default": {},
    "padded": {"packing": "off"},
    "checkpointed": {"gradient_checkpointing": True},
    "fast off": {"fast": "off"},
}


def cells(quick: bool) -> list[measure.Cell]:
    names = ["as by default", "fast off"] if quick else list(SETTINGS)
    return [{"way": name, "steps": 4 if quick else STEPS, "threads": 2, "malloc": "default"} for name in names]


def run_cell(way: str, steps: int, threads: int) -> dict[str, Any]:
    """Returns the loss curve with these settings, and what the run's header says about its kernels."""
    from tailora.train.config import TrainConfig
    from tailora.train.trainer import run

    common = {"model": "demo", "data": "demo", "eval_data": "demo", "dtype": "float32", "learning_rate": 1e-3}
    size = {"max_steps": steps, "per_device_train_batch_size": 2, "max_length": 128, "samples": 0, "save_steps": 0}
    header: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        run(
            TrainConfig(**{**common, **size, **SETTINGS[way], "output_dir": folder}),
            on_event=lambda event: header.update(getattr(event, "header", {})),
        )
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return {
        "threads": threads,
        "kernels": header["kernels"],
        "losses": [line["loss"] for line in lines if "loss" in line],
        "held_out": [line["eval_loss"] for line in lines if "eval_loss" in line],
    }


if __name__ == "__main__":
    measure.main("curves", str(__doc__), cells, run_cell)
