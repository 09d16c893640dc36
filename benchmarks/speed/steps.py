"""Time of a step, and how far it is from what the machine could do, on four shapes of random weights.

    python -m benchmarks.speed.steps            writes benchmarks/results/steps.json
    python -m benchmarks.speed.steps --only shape=S dtype=bfloat16

Arms: tailora, tailora with --fast off, PEFT, full fine-tuning, and the step's frozen products alone. One thread is
measured in CPU time; two threads in wall time, with each arm in a process of its own. Where rows have different
lengths (shape D), an arm's turn is one pass over the data, and its time is divided by the number of steps.
"""

import statistics
from functools import partial
from itertools import product
from typing import Any

from benchmarks import measure
from benchmarks.speed.arm_processes import arms_in_processes
from benchmarks.speed.arms import FAST_OFF, full, peft, synthetic_task, tailora
from benchmarks.speed.shapes import DTYPES, SHAPES, peak_flops, products, step_flops


def cells(quick: bool) -> list[measure.Cell]:
    grid = product(*(["T"], ["bfloat16"], [1], ["default"]) if quick else (SHAPES, DTYPES, [1, 2], measure.MALLOC))
    names = ("shape", "dtype", "threads", "malloc")
    return [dict(zip(names, values, strict=True)) | {"rounds": 1 if quick else 3} for values in grid]


def run_cell(shape: str, dtype: str, threads: int, rounds: int) -> dict[str, Any]:
    """Returns the seconds of a step of every arm, and those of the bound by this machine's peak."""
    sizes, precision = SHAPES[shape], DTYPES[dtype]
    with synthetic_task(sizes) as (stack, folder, rows):
        if threads == 1:
            ours = tailora(stack, sizes, folder, dtype)
            arms: dict[str, Any] = {
                "tailora": ours.step,
                "fast off": tailora(stack, sizes, folder, dtype, FAST_OFF).step,
                "PEFT": peft(folder, rows, sizes, dtype),
                "full": full(folder, rows, sizes, dtype),
                "products": products(sizes, precision),
            }
            notes = ours.notes
        else:
            arms, notes = stack.enter_context(arms_in_processes(sizes, folder, rows, dtype))
        before = peak_flops(precision, threads)
        times = mean_times(arms, rounds, threads, sizes.steps_per_turn)
        peak = statistics.mean([before, peak_flops(precision, threads)])
    bound = step_flops(sizes) / peak
    return {
        "clock": "CPU" if threads == 1 else "wall",
        "peak_gflops": peak / 1e9,
        "bound_seconds": bound,
        "seconds": {name: measure.spread(values) for name, values in times.items()},
        "x_bound": {name: measure.spread([value / bound for value in values]) for name, values in times.items()},
        "x_tailora": measure.ratios(times, over="tailora"),
        "tokens_per_second": {name: sizes.tokens / statistics.median(values) for name, values in times.items()},
        "chosen": notes,
        "runs": times,
    }


def mean_times(arms: dict[str, Any], rounds: int, threads: int, steps: int) -> dict[str, list[float]]:
    """Returns the mean seconds of a step in every turn of each arm, for turns of so many steps."""

    def turn(step: Any) -> None:
        for _ in range(steps):
            step()

    turns = {name: partial(turn, step) for name, step in arms.items()}
    times = measure.take_turns(turns, rounds, measure.clock_for(threads))
    return {name: [seconds / steps for seconds in values] for name, values in times.items()}


if __name__ == "__main__":
    measure.main("steps", str(__doc__), cells, run_cell)
