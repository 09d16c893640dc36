"""How the time of a step grows with length, rank, layers and loaded adapters: tailora and PEFT, in turn.

    python -m benchmarks.speed.growth           writes benchmarks/results/growth.json
    python -m benchmarks.speed.growth --only axis=rank

The model is as wide as SmolLM2-135M (with as many key heads as heads, so that every linear layer takes rank 256) and
has 6 layers. Each axis changes one thing.
"""

from dataclasses import replace
from typing import Any

from benchmarks import measure
from benchmarks.speed.arms import peft, synthetic_task, tailora
from benchmarks.speed.shapes import SMALL, Shape

AXES = {
    "length": [128, 256, 512, 1024, 2048],  # always 2,048 tokens a step
    "rank": [1, 4, 16, 64, 256],
    "layers": [2, 6, 12, 24],
    "adapters": [1, 4, 16, 64],  # loaded; one of them trains
}
TOKENS = 2048
MODEL = replace(SMALL, key_heads=SMALL.heads)
RANK = 16


def cells(quick: bool) -> list[measure.Cell]:
    common = {"dtype": "bfloat16", "threads": 1, "malloc": "default", "rounds": 1 if quick else 3}
    points = [(axis, value) for axis, values in AXES.items() for value in values]
    points = [("layers", 2), ("adapters", 4)] if quick else points
    return [{"axis": axis, "value": value, **common} for axis, value in points]


def run_cell(axis: str, value: int, dtype: str, threads: int, rounds: int) -> dict[str, Any]:
    """Returns the seconds of a step at one point of an axis."""
    shape = shape_at(axis, value)
    r = value if axis == "rank" else RANK
    extra = value - 1 if axis == "adapters" else 0

    def load_others(model: Any, *_: Any) -> None:
        for number in range(extra):
            model.add_adapter(f"extra-{number}", model.adapters["default"])

    with synthetic_task(shape) as (stack, folder, rows):
        settings = {"r": r, "lora_alpha": 2 * r}
        ours = tailora(stack, shape, folder, dtype, settings, on_ready=load_others)
        arms = {"tailora": ours, "PEFT": peft(folder, rows, shape, dtype, r=r, extra=extra)}
        times = measure.take_turns(arms, rounds, measure.clock_for(threads))
    return {
        "tokens": shape.tokens,
        "seconds": {name: measure.spread(values) for name, values in times.items()},
        "x_tailora": measure.ratios(times, over="tailora"),
        "runs": times,
    }


def shape_at(axis: str, value: int) -> Shape:
    if axis == "length":
        return replace(MODEL, length=value, rows=TOKENS // value)
    return replace(MODEL, layers=value) if axis == "layers" else MODEL


if __name__ == "__main__":
    measure.main("growth", str(__doc__), cells, run_cell)
