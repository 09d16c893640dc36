"""What `tailora inspect` advises for adapters whose cure is known: the tiny models of tiny_lm.py, over ranks and rates.

    python -m benchmarks.studies.advice          writes benchmarks/results/advice.json
    python -m benchmarks.site.tables advice   shows it

A rank is too small if twice the rank lowers the loss; a rate that is too high shows in the loss itself. What can be
forgotten is the old table of the language.
"""

import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure
from benchmarks.studies import markov, tiny_lm
from tailora.study.inspect import InspectOptions, inspect_model

RATE = -7  # 2^-7, the best learning rate of all ranks or next to it
OCTAVES = (-10, -9, -8, -6, -5)


def cells(quick: bool) -> list[measure.Cell]:
    pairs = [(r, RATE) for r in markov.RANKS] + [(8, octave) for octave in OCTAVES] + [(64, -5)]
    steps = tiny_lm.QUICK_STEPS if quick else tiny_lm.STEPS
    common = {"steps": steps, "base_steps": tiny_lm.QUICK_STEPS if quick else tiny_lm.BASE_STEPS}
    common |= {"threads": 1, "malloc": "default"}
    return [{"r": r, "octave": octave, **common} for r, octave in (pairs[3:4] if quick else pairs)]


def run_cell(r: int, octave: int, steps: int, base_steps: int, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    base = tiny_lm.base_model(base_steps)
    model: Any = markov.train_arm(base, {"r": r}, 2.0**octave, steps)
    with tempfile.TemporaryDirectory() as folder:
        markov.write_folder(base, Path(folder), 1, tiny_lm.EVAL_TEXTS)
        options = InspectOptions(data=f"{folder}/eval.jsonl", forgetting_data=f"{folder}/old.jsonl")
        inspection = inspect_model(model, options=options, tokenizer=markov.tokenizer())
    held_out, forgetting = inspection.held_out, inspection.forgetting
    assert held_out is not None
    assert forgetting is not None
    modules = inspection.modules
    return {
        "loss": held_out.loss,
        "gain": held_out.improvement,
        "cost": held_out.half.cost,
        "use": statistics.fmean(module.use for module in modules),
        "relative_norm": statistics.median(module.relative_norm or 0.0 for module in modules),
        "intruders": statistics.fmean(module.intruders or 0 for module in modules),
        "intruders_random": statistics.fmean(module.intruders_random or 0 for module in modules),
        "forgetting": forgetting["loss_after"] - forgetting["loss_before"],
        "dial": [
            {"strength": reduced.strength, "loss": reduced.loss, "forgetting": reduced.base_text_rise}
            for reduced in inspection.dial
        ],
        "rules": [advice.rule for advice in inspection.advice],
    }


if __name__ == "__main__":
    measure.main("advice", __doc__ or "", cells, run_cell)
