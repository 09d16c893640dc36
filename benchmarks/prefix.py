"""Only the top layers adapted: steps of the first epoch and of later ones, with kept states of the layers below.

    python benchmarks/prefix.py           writes benchmarks/results/prefix.json
    python benchmarks/prefix.py --only top=8

Arms: tailora, tailora without kept states, PEFT; rows of one length over and over, SmolLM2-135M's shape. CPU time.
"""

import os
import tempfile
from statistics import median
from typing import Any

import measure
from arms import peft, tailora, workshop
from shapes import SHAPES

SHAPE = SHAPES["S"]
EPOCH = 4  # steps, as `write_rows` writes them
TOPS = [4, 8, 15]


def cells(quick: bool) -> list[measure.Cell]:
    common = {"threads": 1, "malloc": "default"}
    grid = [(8, "bfloat16")] if quick else [(top, dtype) for dtype in ("bfloat16", "float32") for top in TOPS]
    return [{"top": top, "dtype": dtype, **common} for top, dtype in grid]


def work(top: int, dtype: str, threads: int) -> dict[str, Any]:
    """Seconds of a step in the first epoch and in the second, and tokens/s over some epochs in terms of PEFT's."""
    layers = list(range(SHAPE.layers - top, SHAPE.layers))
    with workshop(SHAPE) as (stack, folder, ids):
        os.environ["TAILORA_HOME"] = stack.enter_context(tempfile.TemporaryDirectory())  # nothing is kept yet
        own = {"layers_to_transform": layers}
        kept = tailora(stack, SHAPE, folder, dtype, own)
        arms = {
            "tailora": kept.step,
            "nothing kept": tailora(stack, SHAPE, folder, dtype, {**own, "prefix_cache_gb": 0}).step,
            "PEFT": peft(folder, ids, SHAPE, dtype, layers=layers),
        }
        times = measure.turns(arms, 2 * EPOCH - 1, measure.clock_for(threads))
    first, later = (times["tailora"][part] for part in (slice(EPOCH - 1), slice(EPOCH - 1, None)))
    others = {name: measure.spread(values) for name, values in times.items() if name != "tailora"}
    own_seconds = {"tailora, first epoch": measure.spread(first), "tailora, later": measure.spread(later)}
    return {
        "tokens": SHAPE.tokens,
        "seconds": {**own_seconds, **others},
        "tokens_per_second_x_PEFT": {
            f"{epochs} epochs": epochs * median(times["PEFT"]) / (median(first) + (epochs - 1) * median(later))
            for epochs in (1, 2, 3, 10)
        },
        "chosen": kept.chosen,
        "runs": times,
    }


if __name__ == "__main__":
    measure.main("prefix", str(__doc__), cells, work)
