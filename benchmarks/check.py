"""Regression check: a step of `tailora train` against the same run without fast paths, and against the bare base model.

    python benchmarks/check.py            fails when a ratio is above its bound in bounds.json
    python benchmarks/check.py --record   writes the ratios of this machine as the new bounds

Ratios of CPU time on one thread, turn by turn in one process, never wall time: other programs and slower machines
change both sides alike. The shape is small, so the check takes seconds; it sees lost fast paths, not a lost percent.
"""

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

os.environ.update({"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_DISABLE_PROGRESS_BARS": "1"})

import measure
from arms import FAST_OFF, Step, base, tailora, workshop
from shapes import DTYPES, Shape
from torch import Tensor

from tailora.train.model_loading import has_bfloat16

BOUNDS = Path(__file__).parent / "bounds.json"
SHAPE = Shape(192, 512, 6, 6, 3, 8192, tied=True, rows=4, length=128)
ROUNDS = 12
SLACK = 0.2  # above the recorded ratio


def measured() -> dict[str, dict[str, float]]:
    """Ratios per precision; bfloat16 only where the machine multiplies it."""
    return {dtype: ratios(dtype) for dtype in DTYPES if dtype == "float32" or has_bfloat16()}


def ratios(dtype: str) -> dict[str, float]:
    with workshop(SHAPE) as (stack, folder, ids):
        arms: dict[str, Any] = {
            "tailora": tailora(stack, SHAPE, folder, dtype).step,
            "fast off": tailora(stack, SHAPE, folder, dtype, FAST_OFF).step,
            "base": bare(base(folder, dtype), ids),
        }
        times = measure.turns(arms, ROUNDS, measure.clock_for(threads=1), warm=2)
    median = {name: statistics.median(values) for name, values in times.items()}
    return {f"tailora / {name}": median["tailora"] / median[name] for name in ("fast off", "base")}


def bare(model: Any, ids: Tensor) -> Step:
    """Forward and backward of the frozen model alone: its loss on all tokens, and the gradient of its input."""
    model.requires_grad_(False)
    batch = ids[: SHAPE.rows]
    embedded = model.get_input_embeddings()(batch).requires_grad_()

    def step() -> float:
        loss = model(inputs_embeds=embedded, labels=batch, use_cache=False).loss
        loss.backward()
        embedded.grad = None
        return float(loss.detach())

    return step


def compare(found: dict[str, dict[str, float]], bounds: dict[str, Any]) -> list[str]:
    """Prints every ratio with its limit; returns those above."""
    above = []
    for dtype, values in found.items():
        for name, ratio in values.items():
            limit = bounds["recorded"][dtype][name] * (1 + bounds["slack"])
            line = f"{dtype}, CPU time {name}: {ratio:.2f} (at most {limit:.2f})"
            print(line)
            above += [line] if ratio > limit else []
    return above


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="write this machine's ratios to bounds.json")
    options = parser.parse_args()
    found = measured()
    if options.record:
        content = {"recorded": found, "slack": SLACK, "machine": measure.machine()}
        BOUNDS.write_text(json.dumps(content, indent=2) + "\n")
        return 0
    above = compare(found, json.loads(BOUNDS.read_text()))
    for line in above:
        print(f"slower than recorded: {line}", file=sys.stderr)
    return int(bool(above))


if __name__ == "__main__":
    sys.exit(main())
