"""Answering with an unmerged or merged adapter: tailora and PEFT, in turn.

    python -m benchmarks.speed.inference        writes benchmarks/results/inference.json
    python -m benchmarks.speed.inference --only value=static

Every arm generates greedily after a prompt of 64 random tokens. `first` is the time to the first token, `next` the time
for each later token. `base` is tailora's model with its adapter switched off.
"""

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.speed.adapters import peft_model, randomize_factors
from benchmarks.speed.arms import load_base_model, synthetic_task
from benchmarks.speed.shapes import DTYPES, SHAPES
from tailora import LoRAModel

SHAPE = SHAPES["S"]
PROMPT, NEW = 64, 24  # tokens
Times = tuple[float, float]  # seconds to the first token, and of each later token


def cells(quick: bool) -> list[measure.Cell]:
    points = [*product((1, 2), reversed(DTYPES), ("dynamic", "static"))]
    names, common = ("threads", "dtype", "value"), {"malloc": "default", "rounds": 2 if quick else 7}
    return [dict(zip(names, point, strict=True)) | common for point in (points[:1] if quick else points)]


def run_cell(value: str, dtype: str, threads: int, rounds: int) -> dict[str, Any]:
    """Returns the seconds of the first token and of each later token by arm; every round runs all arms."""
    with synthetic_task(SHAPE) as (_, folder, _rows):
        ours = LoRAModel(load_base_model(folder, dtype)).eval()
        peft = peft_model(load_base_model(folder, dtype), "default").eval()
        randomize_factors(ours)
        prompt = torch.randint(1, SHAPE.vocabulary, (1, PROMPT), generator=torch.Generator().manual_seed(0))
        clock = measure.clock_for(threads)

        def answer(model: Any) -> Times:
            return time_answer(model, prompt, value, clock)

        def answer_merged(model: Any, merge: Callable[[], Any], unmerge: Callable[[], Any]) -> Times:
            merge()
            times = answer(model)
            unmerge()
            return times

        def answer_of_base() -> Times:
            with ours.disable_adapter():
                return answer(ours)

        arms: dict[str, Callable[[], Times]] = {
            "base": answer_of_base,
            "tailora": lambda: answer(ours),
            "tailora, merged": lambda: answer_merged(ours, ours.merge, ours.unmerge),
            "PEFT": lambda: answer(peft),
            "PEFT, merged": lambda: answer_merged(peft, peft.merge_adapter, peft.unmerge_adapter),
        }
        runs = [{name: arm() for name, arm in arms.items()} for _ in range(rounds + 1)][1:]  # the first warms up
    keys = ("first", "next")
    times = {f"{name}: {key}": [run[name][i] for run in runs] for name in arms for i, key in enumerate(keys)}
    return {
        "threads": threads,
        "seconds": {name: measure.spread(values) for name, values in times.items()},
        "runs": times,
    }


def time_answer(model: Any, prompt: Tensor, cache: str, clock: Callable[[], float]) -> Times:
    moments: list[float] = [clock()]  # then one for the prompt and one for each token

    class Streamer:
        def put(self, _tokens: Tensor) -> None:  # called with the prompt, too, before anything is computed
            moments.append(clock())

        def end(self) -> None:
            pass

    settings: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    if cache == "static":
        settings["cache_implementation"] = "static"
    model.generate(input_ids=prompt, streamer=Streamer(), **settings)
    return moments[2] - moments[0], (moments[-1] - moments[2]) / (len(moments) - 3)


if __name__ == "__main__":
    measure.main("inference", str(__doc__), cells, run_cell)
