"""Answering with one adapter beside the weights or in them, and switching among 64: tailora and PEFT, turn by turn.

    python benchmarks/inference.py        writes benchmarks/results/inference.json
    python benchmarks/inference.py --only what=decode cache=static

Every arm generates greedily after a prompt of 64 random tokens: `first` is the time to the first token, `next` that of
each further one. `base` is the same model with its adapter off, by tailora.
"""

import time
from collections.abc import Callable
from typing import Any

import measure
import torch
from adapters import in_turn, peft_model, stir
from arms import base, workshop
from shapes import DTYPES, SHAPES
from torch import Tensor

from tailora import LoRAConfig, LoRAModel

SHAPE = SHAPES["S"]
PROMPT, NEW = 64, 24  # tokens
SWITCHES = 50


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


def work(what: str, value: Any, dtype: str, threads: int, rounds: int) -> dict[str, Any]:
    times = decode(value, dtype, threads, rounds) if what == "decode" else switch(value, dtype)
    return {
        "threads": threads,
        "seconds": {name: measure.spread(values) for name, values in times.items()},
        "runs": times,
    }


def decode(cache: str, dtype: str, threads: int, rounds: int) -> dict[str, list[float]]:
    """Seconds to the first token, and of each further one, by arm; in every round all arms."""
    with workshop(SHAPE) as (_, folder, _ids):
        ours, theirs = LoRAModel(base(folder, dtype)).eval(), peft_model(base(folder, dtype), "default").eval()
        stir(ours)
        prompt = torch.randint(1, SHAPE.vocabulary, (1, PROMPT), generator=torch.Generator().manual_seed(0))
        clock = measure.clock_for(threads)

        def told(model: Any) -> tuple[float, float]:
            return answered(model, prompt, cache, clock)

        def merged(model: Any, merge: Callable[[], Any], unmerge: Callable[[], Any]) -> tuple[float, float]:
            merge()
            found = told(model)
            unmerge()
            return found

        def off() -> tuple[float, float]:
            with ours.disable_adapter():
                return told(ours)

        arms: dict[str, Callable[[], tuple[float, float]]] = {
            "base": off,
            "tailora": lambda: told(ours),
            "tailora, merged": lambda: merged(ours, ours.merge, ours.unmerge),
            "PEFT": lambda: told(theirs),
            "PEFT, merged": lambda: merged(theirs, theirs.merge_adapter, theirs.unmerge_adapter),
        }
        runs = [{name: arm() for name, arm in arms.items()} for _ in range(rounds + 1)][1:]
    kinds = ("first", "next")
    return {f"{name}: {kind}": [run[name][i] for run in runs] for name in arms for i, kind in enumerate(kinds)}


def answered(model: Any, prompt: Tensor, cache: str, clock: Callable[[], float]) -> tuple[float, float]:
    """Seconds to the first token, and of each further one."""
    at: list[float] = [clock()]

    class Streamer:
        def put(self, _tokens: Tensor) -> None:  # the prompt, too, before anything is computed
            at.append(clock())

        def end(self) -> None:
            pass

    settings: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    kind = {"cache_implementation": "static"} if cache == "static" else {}
    model.generate(input_ids=prompt, streamer=Streamer(), **settings, **kind)
    return at[2] - at[0], (at[-1] - at[2]) / (len(at) - 3)


def switch(count: int, dtype: str) -> dict[str, list[float]]:
    """Seconds of `set_adapter` with `count` adapters loaded, on 210 linear layers."""
    with workshop(SHAPE) as (_, folder, _ids):
        ours, theirs = LoRAModel(base(folder, dtype), LoRAConfig(), "0"), peft_model(base(folder, dtype), "0")
        for name in map(str, range(1, count)):
            ours.add_adapter(name, LoRAConfig())
            theirs.add_adapter(name, theirs.peft_config["0"])
        turn = {"tailora": in_turn(ours.set_adapter, count), "PEFT": in_turn(theirs.set_adapter, count)}
        return measure.turns(turn, SWITCHES, time.process_time, warm=5)


if __name__ == "__main__":
    measure.main("inference", str(__doc__), cells, work)
