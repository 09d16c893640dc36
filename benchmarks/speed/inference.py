"""Answering with an unmerged or merged adapter, and switching among 64: tailora and PEFT, in turn.

    python -m benchmarks.speed.inference        writes benchmarks/results/inference.json
    python -m benchmarks.speed.inference --only what=decode value=static

Every arm generates greedily after a prompt of 64 random tokens. `first` is the time to the first token, `next` the time
for each later token. `base` is tailora's model with its adapter switched off.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.speed.adapters import both_with_adapters, peft_model, randomize_factors, switch_in_turn
from benchmarks.speed.arms import load_base_model, synthetic_task
from benchmarks.speed.shapes import DTYPES, SHAPES
from tailora import LoRAModel

SHAPE = SHAPES["S"]
PROMPT, NEW = 64, 24  # tokens
SWITCHES = 50
Times = tuple[float, float]  # seconds to the first token, and of each later token


def cells(quick: bool) -> list[measure.Cell]:
    decoding = [
        ("decode", cache, dtype, threads)
        for threads in (1, 2)
        for dtype in reversed(DTYPES)
        for cache in ("dynamic", "static")
    ]
    switching = [("switch", count, "bfloat16", 1) for count in (2, 64)]
    points = [decoding[0], switching[0]] if quick else [*decoding, *switching]
    names = ("what", "value", "dtype", "threads")
    common = {"malloc": "default", "rounds": 2 if quick else 7}
    return [dict(zip(names, point, strict=True)) | common for point in points]


def run_cell(what: str, value: Any, dtype: str, threads: int, rounds: int) -> dict[str, Any]:
    times = decode(value, dtype, threads, rounds) if what == "decode" else switch(value, dtype)
    return {
        "threads": threads,
        "seconds": {name: measure.spread(values) for name, values in times.items()},
        "runs": times,
    }


def decode(cache: str, dtype: str, threads: int, rounds: int) -> dict[str, list[float]]:
    """Returns the seconds of the first token and of each later token by arm; every round runs all arms."""
    with synthetic_task(SHAPE) as (_, folder, _rows):
        ours = LoRAModel(load_base_model(folder, dtype)).eval()
        peft = peft_model(load_base_model(folder, dtype), "default").eval()
        randomize_factors(ours)
        prompt = torch.randint(1, SHAPE.vocabulary, (1, PROMPT), generator=torch.Generator().manual_seed(0))
        clock = measure.clock_for(threads)

        def answer(model: Any) -> Times:
            return time_answer(model, prompt, cache, clock)

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
    return {f"{name}: {key}": [run[name][i] for run in runs] for name in arms for i, key in enumerate(keys)}


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


def switch(count: int, dtype: str) -> dict[str, list[float]]:
    """Returns the seconds of `set_adapter` with `count` adapters loaded, on 210 linear layers."""
    with synthetic_task(SHAPE) as (_, folder, _rows):
        ours, peft = both_with_adapters(folder, dtype, count)
        arms = {"tailora": switch_in_turn(ours.set_adapter, count), "PEFT": switch_in_turn(peft.set_adapter, count)}
        return measure.take_turns(arms, SWITCHES, time.process_time, warm_up=5)


if __name__ == "__main__":
    measure.main("inference", str(__doc__), cells, run_cell)
