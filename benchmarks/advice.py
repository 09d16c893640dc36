"""What `tailora inspect` says of adapters whose cure is known: tiny models of experiment 6, over ranks and rates.

    python benchmarks/advice.py          -> benchmarks/results/advice.json, then python benchmarks/readme.py

Too small a rank shows in what doubling it gains, too high a rate in the loss itself. What can be forgotten is the old
table.
"""

import statistics
import tempfile
from pathlib import Path
from typing import Any

import markov
import measure
import tiny_lm
import torch

from tailora.study.inspect import InspectOptions, inspect_model

RATE = -7  # octave: the best of all ranks or its neighbour
OCTAVES = (-10, -9, -8, -6, -5)


def cells(quick: bool) -> list[measure.Cell]:
    pairs = [(r, RATE) for r in markov.RANKS] + [(8, octave) for octave in OCTAVES] + [(64, -5)]
    steps = tiny_lm.QUICK_STEPS if quick else tiny_lm.STEPS
    common = {"steps": steps, "base_steps": tiny_lm.QUICK_STEPS if quick else tiny_lm.BASE_STEPS}
    common |= {"threads": 1, "malloc": "default"}
    return [{"r": r, "octave": octave, **common} for r, octave in (pairs[3:4] if quick else pairs)]


def work(r: int, octave: int, steps: int, base_steps: int, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    base = tiny_lm.base_model(base_steps)
    model: Any = markov.adapted(base, {"r": r}, 2.0**octave, steps)
    with tempfile.TemporaryDirectory() as folder:
        markov.write_folder(base, Path(folder), 1, tiny_lm.EVAL_TEXTS)
        options = InspectOptions(data=f"{folder}/eval.jsonl", forgetting_data=f"{folder}/old.jsonl")
        found = inspect_model(model, options=options, tokenizer=markov.tokenizer())
    held, lost = found.held_out, found.forgetting
    assert held is not None
    assert lost is not None
    counts = [(each.intruders or 0, each.intruders_random or 0) for each in found.modules]
    return {
        "loss": held.loss,
        "gain": held.improvement,
        "cost": held.half.cost,
        "use": statistics.fmean(each.use for each in found.modules),
        "relative_norm": statistics.median(each.relative_norm or 0.0 for each in found.modules),
        "intruders": statistics.fmean(one for one, _ in counts),
        "intruders_random": statistics.fmean(other for _, other in counts),
        "forgetting": lost["loss_after"] - lost["loss_before"],
        "dial": [
            {"strength": each.strength, "loss": each.loss, "forgetting": each.base_text_rise} for each in found.dial
        ],
        "rules": [each.rule for each in found.advice],
    }


if __name__ == "__main__":
    measure.main("advice", __doc__ or "", cells, work)
