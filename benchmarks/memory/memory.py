"""Peak memory of a step above the steady state (weights, adapter, optimizer), with each arm in its own process.

    python -m benchmarks.memory.memory           writes benchmarks/results/memory.json
    python -m benchmarks.memory.memory --only shape=S arm=tailora

Needs Linux: peaks are read from /proc/self/status and reset after the first step.
"""

import gc
from itertools import product
from typing import Any

from benchmarks import measure
from benchmarks.speed.arms import FAST_OFF, Step, full, peft, synthetic_task, tailora
from benchmarks.speed.shapes import DTYPES, SHAPES

ARMS = ["tailora", "fast off", "PEFT", "full"]
STEPS = 2  # after the first, which creates the optimiser's state


def cells(quick: bool) -> list[measure.Cell]:
    shapes, dtypes = (["T"], ["bfloat16"]) if quick else (["S"], [*DTYPES])
    arms, settings = (["tailora", "PEFT"], ["default"]) if quick else (ARMS, [*measure.MALLOC])
    names = ("malloc", "shape", "dtype", "checkpointing", "arm")
    grid = product(settings, shapes, dtypes, [False] if quick else [False, True], arms)
    return [dict(zip(names, values, strict=True)) | {"threads": 2} for values in grid]


def run_cell(shape: str, dtype: str, checkpointing: bool, arm: str, threads: int) -> dict[str, Any]:
    """Returns the bytes held between steps, and how far the highest moment of a step is above them."""
    sizes = SHAPES[shape]
    with synthetic_task(sizes) as (stack, folder, rows):
        settings = {"gradient_checkpointing": checkpointing}
        makers: dict[str, Any] = {
            "tailora": lambda: tailora(stack, sizes, folder, dtype, settings),
            "fast off": lambda: tailora(stack, sizes, folder, dtype, {**settings, **FAST_OFF}),
            "PEFT": lambda: peft(folder, rows, sizes, dtype, checkpointing=checkpointing),
            "full": lambda: full(folder, rows, sizes, dtype, checkpointing=checkpointing),
        }
        step: Step = makers[arm]()
        step()
        gc.collect()
        first_peak = measure.process_memory("VmHWM")
        measure.reset_peak()
        steady = measure.process_memory("VmRSS")
        seconds = measure.take_turns({arm: step}, STEPS, measure.clock_for(threads), warm_up=0)[arm]
        peak = measure.process_memory("VmHWM")
    return {
        "steady_bytes": steady,
        "above_bytes": peak - steady,
        "peak_bytes": max(peak, first_peak),
        "seconds": measure.spread(seconds),
    }


if __name__ == "__main__":
    measure.main("memory", str(__doc__), cells, run_cell)
