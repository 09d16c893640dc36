"""Adapters in use: switching among 2 to 64, one per batch row, merging, and loading one for 1,000 layers.

    python -m benchmarks.speed.adapters         writes benchmarks/results/adapters.json
    python -m benchmarks.speed.adapters --only what=switch

tailora and PEFT take turns.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from time import process_time
from typing import Any

import torch
from torch import nn

from benchmarks import measure
from benchmarks.site.tables import IN_PLACE
from benchmarks.speed.arms import load_base_model, synthetic_task
from benchmarks.speed.shapes import DTYPES, SHAPES, SMALL
from tailora import LoRAConfig, LoRAModel

LOADED = [2, 64]
MIXED, ROWS, FORWARDS = [1, 8, 64], 64, 12
LENGTHS = {"decode": 1, "prefill": 16}  # tokens of a batch row
LAYERS, WIDTH, LOADS = 1000, 64, 5
SWITCHES, MERGES = 50, 5


def cells(quick: bool) -> list[measure.Cell]:
    switching = [("switch", count, "bfloat16") for count in LOADED]
    mixing = [(what, count, dtype) for dtype in DTYPES for what in LENGTHS for count in MIXED]
    merging = [("merge", layers, dtype) for dtype in DTYPES for layers in (SMALL.layers, SHAPES["S"].layers)]
    loading = [("load", LAYERS, "float32")]
    points = [*switching, *mixing, *merging, *loading]
    if quick:
        points = [switching[0], mixing[1], merging[0], loading[0]]
    names = ("what", "value", "dtype")
    return [dict(zip(names, point, strict=True)) | {"threads": 1, "malloc": "default"} for point in points]


def run_cell(what: str, value: int, dtype: str, threads: int) -> dict[str, Any]:
    times = MEASUREMENTS[what](value, dtype)
    return {
        "threads": threads,
        "seconds": {name: measure.spread(values) for name, values in times.items()},
        "runs": times,
    }


def switch(count: int, dtype: str) -> dict[str, list[float]]:
    """Returns the seconds of `set_adapter`, to each of `count` loaded adapters in turn, on 42 linear layers."""
    with synthetic_task(SMALL) as (_, folder, _rows):
        ours, peft = both_with_adapters(folder, dtype, count)
        arms = {
            "tailora": switch_in_turn(ours.set_adapter, count),
            "PEFT": switch_in_turn(peft.set_adapter, count),
        }
        return measure.take_turns(arms, SWITCHES, process_time, warm_up=5)


def switch_in_turn(set_adapter: Callable[[str], None], count: int) -> Callable[[], None]:
    """Returns a function that switches to adapter "1", "2", ... and from the last one to "0"."""
    current = 0

    def step() -> None:
        nonlocal current
        current = (current + 1) % count
        set_adapter(str(current))

    return step


def decode(count: int, dtype: str) -> dict[str, list[float]]:
    """Returns the seconds of a forward of 64 batch rows of one token, with `count` adapters among them."""
    return mixed_batch(count, dtype, LENGTHS["decode"])


def prefill(count: int, dtype: str) -> dict[str, list[float]]:
    """Returns the same for batch rows of 16 tokens."""
    return mixed_batch(count, dtype, LENGTHS["prefill"])


def mixed_batch(count: int, dtype: str, length: int) -> dict[str, list[float]]:
    names = [str(row % count) for row in range(ROWS)]
    with synthetic_task(SMALL) as (_, folder, _rows):
        base = load_base_model(folder, dtype).eval()
        ours, peft = both_with_adapters(folder, dtype, count)
        ours.eval(), peft.eval()
        randomize_factors(ours)
        ids = torch.randint(1, SMALL.vocabulary, (ROWS, length), generator=torch.Generator().manual_seed(0))
        arms = {
            "base": lambda: base(ids, use_cache=False),
            "tailora": lambda: ours(ids, use_cache=False),
            "PEFT": lambda: peft(ids, use_cache=False, adapter_names=names),
        }
        with torch.no_grad(), ours.adapter_rows(names):
            return measure.take_turns(arms, FORWARDS, process_time, warm_up=2)


def merge(layers: int, dtype: str) -> dict[str, list[float]]:
    """Returns the seconds, per linear layer, of merging one adapter into the weights, and of unmerging it."""
    shape = SMALL if layers == SMALL.layers else SHAPES["S"]
    with synthetic_task(shape) as (_, folder, _rows):
        ours, peft = LoRAModel(load_base_model(folder, dtype)), peft_model(load_base_model(folder, dtype), "default")
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.02)
        fresh = [LoRAModel(load_base_model(folder, dtype)) for _ in range(MERGES + 1)]  # each is merged once
        for model in (ours, *fresh):
            randomize_factors(model)
        merged: list[nn.Module] = []  # freeing them takes no time from an arm
        arms: dict[str, Callable[[], Any]] = {
            "tailora": ours.merge,
            "PEFT": peft.merge_adapter,
            "tailora, unmerge": ours.unmerge,
            "PEFT, unmerge": peft.unmerge_adapter,
            IN_PLACE: lambda: merged.append(fresh.pop().merge_and_unload(in_place=True)),
        }
        times = measure.take_turns(arms, MERGES, process_time)
    linears = 7 * shape.layers  # q, k, v, o, gate, up and down
    return {name: [seconds / linears for seconds in values] for name, values in times.items()}


def load(layers: int, dtype: str) -> dict[str, list[float]]:
    """Returns the seconds of attaching an adapter to a bare model and reading its weights from a folder."""
    from peft import PeftModel

    with tempfile.TemporaryDirectory() as folder:
        LoRAModel(stack_of_linears(layers, dtype), LoRAConfig(r=8)).save_adapter(Path(folder))
        arms: dict[str, Callable[[], Any]] = {
            "bare model": lambda: stack_of_linears(layers, dtype),
            "tailora": lambda: LoRAModel.from_pretrained(stack_of_linears(layers, dtype), folder),
            "PEFT": lambda: PeftModel.from_pretrained(stack_of_linears(layers, dtype), folder),
        }
        times = measure.take_turns(arms, LOADS, process_time)
    bare = times.pop("bare model")
    return {name: [whole - part for whole, part in zip(values, bare, strict=True)] for name, values in times.items()}


# ---- Models


def both_with_adapters(folder: Path, dtype: str, count: int) -> tuple[LoRAModel, Any]:
    """Returns a LoRAModel and a PEFT model with adapters "0" to `count` - 1."""
    ours = LoRAModel(load_base_model(folder, dtype), LoRAConfig(), "0")
    peft = peft_model(load_base_model(folder, dtype), "0")
    for name in map(str, range(1, count)):
        ours.add_adapter(name, LoRAConfig())
        peft.add_adapter(name, peft.peft_config["0"])
    return ours, peft


def peft_model(model: nn.Module, name: str) -> Any:
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, settings, adapter_name=name)


def randomize_factors(model: LoRAModel) -> None:
    """Makes both factors of every adapter other than zero, because products with zeros may be faster."""
    for name in model.adapters:
        model.set_adapter(name)
        for parameter in model.lora_layers.parameters():
            nn.init.normal_(parameter, std=0.02)


def stack_of_linears(layers: int, dtype: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, dtype=DTYPES[dtype]) for _ in range(layers)))


MEASUREMENTS = {"switch": switch, "decode": decode, "prefill": prefill, "merge": merge, "load": load}

if __name__ == "__main__":
    measure.main("adapters", str(__doc__), cells, run_cell)
