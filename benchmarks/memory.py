"""Peak memory of a step above the steady state (weights, adapter, optimiser), each arm in a process of its own.

    python benchmarks/memory.py           writes benchmarks/results/memory.json
    python benchmarks/memory.py --only shape=S arm=tailora

Needs Linux: peaks are read from /proc/self/status and set back between the first step and the others.
"""

import gc
from itertools import product
from typing import Any

import measure
from arms import FAST_OFF, Step, full, peft, tailora, workshop
from shapes import DTYPES, SHAPES

ARMS = ["tailora", "fast off", "PEFT", "full"]
STEPS = 2  # after the first, which makes the optimiser's state


def cells(quick: bool) -> list[measure.Cell]:
    shapes, dtypes = (["T"], ["bfloat16"]) if quick else (["S"], [*DTYPES])
    arms, settings = (ARMS[:3:2], ["default"]) if quick else (ARMS, [*measure.MALLOC])
    names = ("malloc", "shape", "dtype", "checkpointing", "arm")
    grid = product(settings, shapes, dtypes, [False] if quick else [False, True], arms)
    return [dict(zip(names, values, strict=True)) | {"threads": 2} for values in grid]


def work(shape: str, dtype: str, checkpointing: bool, arm: str, threads: int) -> dict[str, Any]:
    """Bytes held between steps, and how far the largest moment of a step is above them."""
    sizes = SHAPES[shape]
    clock = measure.clock_for(threads)
    with workshop(sizes) as (stack, folder, ids):
        settings = {"gradient_checkpointing": checkpointing}
        makers: dict[str, Any] = {
            "tailora": lambda: tailora(stack, sizes, folder, dtype, settings).step,
            "fast off": lambda: tailora(stack, sizes, folder, dtype, {**settings, **FAST_OFF}).step,
            "PEFT": lambda: peft(folder, ids, sizes, dtype, checkpointing=checkpointing),
            "full": lambda: full(folder, ids, sizes, dtype, checkpointing=checkpointing),
        }
        step: Step = makers[arm]()
        step()
        gc.collect()
        until_now = measure.held("VmHWM")
        measure.forget_peak()
        steady = measure.held("VmRSS")
        seconds = measure.turns({arm: step}, STEPS, clock, warm=0)[arm]
        peak = measure.held("VmHWM")
    return {
        "steady_bytes": steady,
        "above_bytes": peak - steady,
        "peak_bytes": max(peak, until_now),
        "seconds": measure.spread(seconds),
    }


if __name__ == "__main__":
    measure.main("memory", str(__doc__), cells, work)
