"""Small but realistic report.json contents, one for each kind, with names that no page may take at their word.

contents.json has what was recorded. Comparisons and searches are those of benchmarks/results; modules are those
of a small model.
"""

import copy
import json
from collections.abc import Callable
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

from tiny import chat_model, stir
from tiny_adapters import adapted

from tailora import LoRAModel
from tailora.study.inspect import inspect_model
from tailora.study.model_layout import trained_groups

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
EVIL = "<script>alert(1)</script> & $x^2$ 日本 \x01"


def recorded(kind: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(Path(__file__).with_suffix(".json").read_text())[kind]
    return content


def stored(name: str) -> dict[str, Any]:
    """The report of a study that was run."""
    report: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())["report"]
    return report


def compare() -> dict[str, Any]:
    content = stored("compare")
    lora, full = content["arms"]
    small = {**lora, "name": EVIL, "bracketed": False, "changes": {"r": 2}}
    wild = {"name": "wild", "changes": {"use_dora": True}, "outcome": "diverged", "rates": {"1.0": float("inf")}}
    notes = ["--minutes left time for 3 of 5 seeds"]
    return content | {"arms": [lora, small, full, wild], "p_values": {"lora": 0.41, EVIL: 0.0004}, "notes": notes}


def search() -> dict[str, Any]:
    content = stored("search")
    for trial in content["trials"][::2]:
        trial["settings"]["target_modules"] = EVIL
    content["trials"][3] |= {"state": "diverged", "eval_loss": None, "curve": []}
    return content


@cache
def small_model() -> LoRAModel:
    base = chat_model(num_hidden_layers=6, intermediate_size=48)
    return adapted({"rank_pattern": {r"layers\.[45]\..*": 8}}, base)


@cache
def inspected() -> dict[str, Any]:
    model = small_model()
    stir(model, seed=5)
    return inspect_model(model).to_dict()


def inspect() -> dict[str, Any]:
    content = copy.deepcopy(inspected())
    modules = content["modules"]
    modules[0]["path"] = f"model.layers.0.{EVIL.replace('.', '')}"
    modules[5]["singular_values"] = [0.0] * len(modules[5]["singular_values"])  # a dead one
    modules.append({**modules[0], "path": "lm_head", "relative_norm": None, "intruders": None})
    return content | recorded("inspect")


def plan() -> dict[str, Any]:
    model = small_model()
    content = recorded("plan") | {"groups": [asdict(group) for group in trained_groups(model)]}
    content["groups"][0]["path"] = EVIL
    return content


CONTENTS: dict[str, Callable[[], dict[str, Any]]] = {
    **{kind: partial(recorded, kind) for kind in ("curve", "data", "train", "eval", "rows")},
    "compare": compare,
    "search": search,
    "inspect": inspect,
    "plan": plan,
}
FIGURES = {"data": 0, "train": 1, "compare": 3, "search": 1, "inspect": 0, "plan": 0, "eval": 0, "rows": 2, "curve": 1}
