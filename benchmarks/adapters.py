"""Adapters in use: switching among 2 to 64, one for every row of a batch, merging, and loading one for 1,000 layers.

tailora and PEFT, turn by turn.

python benchmarks/adapters.py         writes benchmarks/results/adapters.json
python benchmarks/adapters.py --only what=switch
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from time import process_time
from typing import Any

import measure
import torch
from arms import base, workshop
from shapes import DTYPES, SHAPES, SMALL
from tables import IN_PLACE
from torch import nn

from tailora import LoRAConfig, LoRAModel

LOADED = [2, 8, 32, 64]
MIXED, ROWS, FORWARDS = [1, 2, 4, 8, 16, 32, 64], 64, 12
LENGTHS = {"decode": 1, "prefill": 16}  # tokens of a row
LAYERS, WIDTH, LOADS = 1000, 64, 5
SWITCHES, MERGES = 50, 5


def cells(quick: bool) -> list[measure.Cell]:
    switching = [("switch", count, "bfloat16") for count in LOADED]
    mixing = [(what, count, dtype) for dtype in DTYPES for what in LENGTHS for count in MIXED]
    merging = [("merge", layers, dtype) for dtype in DTYPES for layers in (SMALL.layers, SHAPES["S"].layers)]
    loading = [("load", LAYERS, "float32")]
    points = [*switching, *mixing, *merging, *loading]
    if quick:
        points = [switching[0], mixing[3], merging[0], loading[0]]
    names = ("what", "value", "dtype")
    return [dict(zip(names, point, strict=True)) | {"threads": 1, "malloc": "default"} for point in points]


def work(what: str, value: int, dtype: str, threads: int) -> dict[str, Any]:
    times = WORKS[what](value, dtype)
    return {
        "threads": threads,
        "seconds": {name: measure.spread(values) for name, values in times.items()},
        "runs": times,
    }


def switch(count: int, dtype: str) -> dict[str, list[float]]:
    """Seconds of `set_adapter` with `count` adapters loaded, each in its turn, on 42 linear layers."""
    with workshop(SMALL) as (_, folder, _ids):
        ours, theirs = LoRAModel(base(folder, dtype), LoRAConfig(), "0"), peft_model(base(folder, dtype), "0")
        for name in map(str, range(1, count)):
            ours.add_adapter(name, LoRAConfig())
            theirs.add_adapter(name, theirs.peft_config["0"])
        turn = {
            "tailora": in_turn(ours.set_adapter, count),
            "tailora, between two": in_turn(ours.set_adapter, 2),  # nothing of it has left the cache
            "PEFT": in_turn(theirs.set_adapter, count),
        }
        return measure.turns(turn, SWITCHES, process_time, warm=5)


def in_turn(switch_to: Callable[[str], None], count: int) -> Callable[[], None]:
    at = [0]

    def step() -> None:
        at[0] = (at[0] + 1) % count
        switch_to(str(at[0]))

    return step


def decode(count: int, dtype: str) -> dict[str, list[float]]:
    """Seconds of one forward of 64 rows, a token each, with `count` adapters among them."""
    return rows(count, dtype, LENGTHS["decode"])


def prefill(count: int, dtype: str) -> dict[str, list[float]]:
    """The same with 16 tokens each."""
    return rows(count, dtype, LENGTHS["prefill"])


def rows(count: int, dtype: str, length: int) -> dict[str, list[float]]:
    """`first call` enters the block of `adapter_rows`, too, and puts the factors together."""
    names = [str(row % count) for row in range(ROWS)]
    with workshop(SMALL) as (_, folder, _ids):
        bare, ours = base(folder, dtype), LoRAModel(base(folder, dtype), LoRAConfig(), "0")
        theirs = peft_model(base(folder, dtype), "0")
        for name in map(str, range(1, count)):
            ours.add_adapter(name, LoRAConfig())
            theirs.add_adapter(name, theirs.peft_config["0"])
        stir(ours)
        ids = torch.randint(1, SMALL.vocabulary, (ROWS, length), generator=torch.Generator().manual_seed(0))

        def first() -> None:
            with ours.adapter_rows(names):
                ours(ids, use_cache=False)

        def held() -> None:
            ours(ids, use_cache=False)

        models = [model.eval() for model in (bare, ours, theirs)]
        with torch.no_grad():
            opening = measure.turns({"tailora, first call": first}, FORWARDS // 4, process_time)
            with ours.adapter_rows(names):
                arms = {
                    "base": lambda: models[0](ids, use_cache=False),
                    "tailora": held,
                    "PEFT": lambda: models[2](ids, use_cache=False, adapter_names=names),
                }
                return measure.turns(arms, FORWARDS, process_time, warm=2) | opening


def stir(model: LoRAModel) -> None:
    """Both factors other than zero: products with zeros may be faster."""
    for name in model.adapters:
        model.set_adapter(name)
        for parameter in model.lora_layers.parameters():
            nn.init.normal_(parameter, std=0.02)


def merge(layers: int, dtype: str) -> dict[str, list[float]]:
    """Seconds per linear layer of putting one adapter into the weights, and of taking it out again."""
    shape = SMALL if layers == SMALL.layers else SHAPES["S"]
    with workshop(shape) as (_, folder, _ids):
        ours, theirs = LoRAModel(base(folder, dtype)), peft_model(base(folder, dtype), "default")
        actions: dict[str, Callable[[], Any]] = {
            "tailora": ours.merge,
            "PEFT": theirs.merge_adapter,
            "tailora, unmerge": ours.unmerge,
            "PEFT, unmerge": theirs.unmerge_adapter,
        }
        fresh, done = [LoRAModel(base(folder, dtype)) for _ in range(MERGES + 1)], []
        for model in (ours, *fresh):
            stir(model)
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.02)
        actions[IN_PLACE] = lambda: done.append(fresh.pop().merge_and_unload(in_place=True))
        times = measure.turns(actions, MERGES, process_time)
        linears = len(shape.linears()) * shape.layers
        return {name: [seconds / linears for seconds in values] for name, values in times.items()}


def load(layers: int, dtype: str) -> dict[str, list[float]]:
    """Seconds of attaching an adapter to a bare model and reading its weights, from one folder on disk."""
    from peft import PeftModel

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        LoRAModel(stack_of_linears(layers, dtype), LoRAConfig(r=8)).save_adapter(folder)
        actions: dict[str, Callable[[], Any]] = {
            "bare model": lambda: stack_of_linears(layers, dtype),
            "tailora": lambda: LoRAModel.from_pretrained(stack_of_linears(layers, dtype), folder),
            "PEFT": lambda: PeftModel.from_pretrained(stack_of_linears(layers, dtype), name),
        }
        times = measure.turns(actions, LOADS, process_time)
    bare = times.pop("bare model")
    return {name: [whole - part for whole, part in zip(values, bare, strict=True)] for name, values in times.items()}


def stack_of_linears(layers: int, dtype: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, dtype=DTYPES[dtype]) for _ in range(layers)))


def peft_model(model: nn.Module, name: str) -> Any:
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, settings, adapter_name=name)


WORKS = {"switch": switch, "decode": decode, "prefill": prefill, "merge": merge, "load": load}

if __name__ == "__main__":
    measure.main("adapters", str(__doc__), cells, work)
