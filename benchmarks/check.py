"""Regression check: time of a step of `tailora train`, relative to `--fast off` and to the frozen base model.

    python benchmarks/check.py            fails if a ratio is above its bound in bounds.json
    python benchmarks/check.py --record   writes this machine's ratios as the new bounds

The arms take turns on one thread of one process. CPU time is compared, not wall time, so other programs and slower
machines affect both sides of a ratio alike. The shape is small, so the check takes seconds. It detects the loss of a
fast kernel, not of a percent.
"""

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

os.environ.update({"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_DISABLE_PROGRESS_BARS": "1"})

sys.path.insert(0, str(Path(__file__).parent.parent))  # this file can be run by its path
from benchmarks import measure
from benchmarks.speed.arms import FAST_OFF, Step, load_base_model, padded_batches, synthetic_task, tailora
from benchmarks.speed.shapes import DTYPES, Shape
from tailora.core.device import has_bfloat16
from tailora.data.dataset import Example

BOUNDS = Path(__file__).parent / "bounds.json"
SHAPE = Shape(192, 512, 6, 6, 3, 8192, tied=True, rows=4, length=128)
ROUNDS = 12
SLACK = 0.2  # how far a ratio may be above the recorded one


def measure_ratios() -> dict[str, dict[str, float]]:
    """Returns the ratios by precision; bfloat16 only if the machine has products of it."""
    return {dtype: ratios_of(dtype) for dtype in DTYPES if dtype == "float32" or has_bfloat16()}


def ratios_of(dtype: str) -> dict[str, float]:
    with synthetic_task(SHAPE) as (stack, folder, rows):
        arms: dict[str, Any] = {
            "tailora": tailora(stack, SHAPE, folder, dtype),
            "fast off": tailora(stack, SHAPE, folder, dtype, FAST_OFF),
            "base": frozen_step(load_base_model(folder, dtype), rows),
        }
        times = measure.take_turns(arms, ROUNDS, measure.clock_for(threads=1), warm_up=2)
    median = {name: statistics.median(values) for name, values in times.items()}
    return {f"tailora / {name}": median["tailora"] / median[name] for name in ("fast off", "base")}


def frozen_step(model: Any, rows: list[Example]) -> Step:
    """Returns a step of the frozen model: its loss on all tokens, and the gradient of its input."""
    model.requires_grad_(False)
    batch = next(padded_batches(rows, SHAPE))["input_ids"]
    embedded = model.get_input_embeddings()(batch).requires_grad_()

    def step() -> float:
        loss = model(inputs_embeds=embedded, labels=batch, use_cache=False).loss
        loss.backward()
        embedded.grad = None
        return float(loss.detach())

    return step


def ratios_above(ratios: dict[str, dict[str, float]], bounds: dict[str, Any]) -> list[str]:
    """Prints every ratio with its bound; returns the lines of those above it."""
    above = []
    for dtype, values in ratios.items():
        for name, ratio in values.items():
            bound = bounds["recorded"][dtype][name] * (1 + bounds["slack"])
            line = f"{dtype}, CPU time {name}: {ratio:.2f} (at most {bound:.2f})"
            print(line)
            above += [line] if ratio > bound else []
    return above


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="write this machine's ratios to bounds.json")
    options = parser.parse_args()
    ratios = measure_ratios()
    if options.record:
        content = {"recorded": ratios, "slack": SLACK, "machine": measure.machine()}
        BOUNDS.write_text(json.dumps(content, indent=2) + "\n")
        return 0
    above = ratios_above(ratios, json.loads(BOUNDS.read_text()))
    for line in above:
        print(f"slower than recorded: {line}", file=sys.stderr)
    return int(bool(above))


if __name__ == "__main__":
    sys.exit(main())
