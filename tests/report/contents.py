"""Small but realistic report.json contents, one for each kind, with names that no page may take at their word."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tiny import chat_model, stir
from tiny_adapters import adapted

from tailora import LoRAModel
from tailora.study.inspect import inspect_model
from tailora.study.model_layout import adapted_modules, trained_groups, unadapted_groups

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
EVIL = "<script>alert(1)</script> & $x^2$ 日本 \x01"


def train() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 60, size=40)
    before = rng.normal(4.4, 0.5, size=40)
    after = before - rng.normal(0.8, 0.4, size=40)
    steps = np.arange(1, 36)
    losses = 3.7 + 0.9 * np.exp(-steps / 8) + rng.normal(0, 0.15, size=35)
    speeds = 380 - 40 * np.exp(-steps / 5)
    metrics = zip(steps, losses, speeds, strict=True)
    return {
        "kind": "train",
        "verdict": "Held-out loss went down by 0.810 nats per token (95% interval 0.708 to 0.932, over 40 examples).",
        "settings": {"model": f"models/{EVIL}", "data": "chats.jsonl", "r": 16, "lora_alpha": 32.0, "use_dora": False},
        "run": {
            "device": "cpu",
            "dtype": "bfloat16",
            "data": {"rows": 380, "train": 280, "eval": 100, "lengths": []},
            "versions": {"tailora": "0.1.0", "torch": "2.13.0"},
            "machine": {"cpus": 2, "gpus": []},
        },
        "steps": [
            {
                "step": int(step),
                "loss": float(loss),
                "learning_rate": 1e-3 * float(1 - step / 36),
                "grad_norm": 1.5,
                "tokens": 780 * int(step),
                "tokens_per_second": float(speed),
                "memory_bytes": 1.4e9 + 2e7 * int(step),
            }
            for step, loss, speed in metrics
        ],
        "evaluations": [{"step": 0, "loss": 4.470}, {"step": 20, "loss": 3.77}, {"step": 35, "loss": 3.660}],
        "samples": [
            {"prompt": EVIL, "base": "A million dollars.\nThat's a lot.", "tuned": "I would spend it on a new car"},
            {
                "prompt": "Hi!",
                "base": "",
                "tuned": "\ud800 I did a little thing",
                "earlier_messages": 2,
                "reference": "Hey \n you",
            },
        ],
        "result": {
            "output_dir": "outputs/demo",
            "steps": 35,
            "train_tokens": 27311,
            "supervised_tokens": 9000,
            "tokens_per_second": 367.0,
            "eval_loss_before": 4.470,
            "eval_loss_after": 3.660,
            "eval_loss_before_95": [4.282, 4.665],
            "eval_loss_after_95": [3.514, 3.808],
            "eval_loss_change_95": [-0.932, -0.708],
            "best_step": 35,
            "trainable_parameters": 4884480,
            "total_parameters": 139399488,
            "peak_memory_bytes": 2170000000,
            "seconds": 93.2,
        },
        "held_out": {
            "tokens": tokens.tolist(),
            "before": (before * tokens).tolist(),
            "after": (after * tokens).tolist(),
        },
    }


def data() -> dict[str, Any]:
    image = {"path": "/absent.png", "sha256": "0", "width": 640, "height": 480, "name": f"{EVIL}.png"}
    counts = {"rows": 26, "train": 20, "eval": 6, "tokens": 900, "supervised_tokens": 68, "longest": 38}
    pieces = [("<|im_start|>user\n", False), ("[image 640x480]", False), (f"Which? {EVIL}", False), ("red", True)]
    report = {
        **counts,
        "source": f"{EVIL}.jsonl",
        "eval_source": None,
        "mapping": {"messages": "messages"},
        "ignored": [],
        "shape": "messages",
        "chat_template": True,
        "supervised_share": 68 / 900,
        "messages": {"user": 26, "assistant": 26, "images": 26},
        "labels": {},
        "lengths": [{"low": 10, "high": 38, "examples": 26}],
        "sha256": "0f",
    }
    return {"kind": "data", "report": report, "examples": [{"title": "example 1", "pieces": pieces, "images": [image]}]}


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


def small_model() -> LoRAModel:
    base = chat_model(num_hidden_layers=6, intermediate_size=48)
    return adapted({"rank_pattern": {r"layers\.[45]\..*": 8}}, base)


def inspect() -> dict[str, Any]:
    model = small_model()
    stir(model, seed=5)
    content = inspect_model(model).to_dict()
    modules = content["modules"]
    modules[0]["path"] = f"model.layers.0.{EVIL.replace('.', '')}"
    modules[5]["singular_values"] = [0.0] * len(modules[5]["singular_values"])  # a dead one
    modules.append({**modules[0], "path": "lm_head", "relative_norm": None, "intruders": None})
    rise = {"loss": 3.70, "rise": 0.04, "low": 0.03, "high": 0.05, "cost": 0.05, "values": 0.5}
    return content | {
        "kind": "inspect",
        "adapter": f"outputs/{EVIL.replace('/', '')}/adapter",
        "model": "demo",
        "training": {"learning_rate": 1e-3},
        "left_out": {"score": "trained in full"},
        "held_out": {
            "data": "demo",
            "examples": 100,
            "tokens": 3000,
            "base_loss": 4.47,
            "loss": 3.66,
            "improvement": 0.81,
            "improvement_low": 0.71,
            "improvement_high": 0.93,
            "half": rise,
            "groups": {
                "late MLP": rise,
                "early attention": {**rise, "low": None, "high": None, "cost": None, "values": 0.25},
            },
        },
        "forgetting": {"kl": 0.21, "loss_before": 2.9, "loss_after": 3.0, "tokens": 1024, "text": "own text"},
        "dial": [
            {"strength": 0.75, "loss": 3.7, "kl": 0.12, "base_text_rise": 0.05},
            {"strength": 0.5, "loss": 3.9, "kl": 0.05, "base_text_rise": 0.02},
        ],
        "advice": [
            {
                "rule": "saturated",
                "says": f"late MLP is saturated: raise r there; {EVIL}",
                "evidence": {},
                "setting": {"rank_pattern": {r"layers\.(4|5)\.mlp": 16}},
                "command": "tailora train --model demo",
            }
        ],
        "seconds": 12.0,
    }


def plan() -> dict[str, Any]:
    model = small_model()
    modules, groups, left = (
        [asdict(entry) for entry in entries]
        for entries in (adapted_modules(model), trained_groups(model), unadapted_groups(model))
    )
    groups[0]["path"] = EVIL
    parts = ("weights", "adapters", "gradients", "optimizer", "activations", "logits", "process")
    memory = dict(zip(parts, (270000000, 20000000, 20000000, 40000000, 900000000, 300000000, 300000000), strict=True))
    full = {**memory, "adapters": 0, "gradients": 270000000, "optimizer": 1080000000}
    return {
        "kind": "plan",
        "model": "HuggingFaceTB/SmolLM2-135M",
        "method": "lora",
        "dtype": "bfloat16",
        "device": "cpu",
        "trainable_parameters": 4884480,
        "total_parameters": 139399488,
        "modules": modules,
        "groups": groups,
        "left": left,
        "memory": {**memory, "total": sum(memory.values())},
        "full": {
            "trainable_parameters": 134515008,
            "memory": {**full, "total": sum(full.values())},
            "batch_size_that_fits": 6,
        },
        "available_bytes": 2200000000,
        "batch_size": 8,
        "batch_size_that_fits": 12,
        "largest_forward": {"examples": 8, "tokens": 1021},
        "kernels": "attention and loss of the model as they are",
        "tokens": 27311,
        "steps": 35,
        "seconds_per_step": 2.3,
        "seconds": 80.0,
        "measured": None,
        "basis": {"memory": "estimated", "time": "a rough rule: 0.51 GFLOP a token at 53 GFLOP/s"},
        "notes": ["the data is streamed, so lengths are estimated from the first batch"],
        "settings": {"model": "demo", "r": 16},
    }


def evaluation() -> dict[str, Any]:
    def score(value: float, half: float) -> dict[str, Any]:
        return {"value": value, "interval": [value - half, value + half], "n": 40}

    sample = {"prompt": EVIL, "expected": "a car", "answer": "a car", "hit": True}
    return {
        "kind": "eval",
        "model": "demo",
        "adapter": "outputs/demo",
        "metrics": {"loss": score(3.66, 0.15), "perplexity": score(38.9, 6.0), "exact_match": score(0.3, 0.14)},
        "base": {"loss": score(4.47, 0.19), "perplexity": score(87.3, 17.0), "exact_match": score(0.1, 0.1)},
        "change": {"loss": score(-0.81, 0.1), "exact_match": score(0.2, 0.1)},
        "data": {"source": "demo", "shape": "messages", "rows": 40, "tokens": 1070},
        "samples": {"base": [{**sample, "answer": "", "hit": False}], "tuned": [sample]},
        "gates": [{"gate": "loss<3", "value": 3.66, "met": False}, {"gate": "loss<5", "value": 3.66, "met": True}],
        "seconds": 12.3,
    }


def rows() -> dict[str, Any]:
    listed = [
        {"row": 7 + index, "file": "chats.jsonl", "score": 0.3 - index / 50, "loss": 2.0, "examples": [6 + index]}
        for index in range(30)
    ]
    difference = {"value": 0.04, "low": 0.01, "high": 0.07, "p_value": 0.02, "examples": 50, "seeds": 3}
    difference |= {"from_examples": 0.5}
    names = ["all rows", "without highest scores", "without random rows", "without highest losses"]
    runs = {"changes": {}, "outcome": "done", "eval_loss": 1.9, "interval": [1.8, 2.0], "seed_losses": [1.9, 1.8]}
    variants = [{**runs, "name": name, "difference": difference} for name in names]
    variants[1]["difference"] = None
    return {
        "kind": "rows",
        "run": "outputs/run",
        "rows": [{**row, "text": EVIL} for row in listed[:20]] + listed[20:],
        "repeated": {
            "duplicates": [{"rows": ["chats.jsonl:1", "chats.jsonl:4"], "text": EVIL}],
            "near_duplicates": [{"rows": [f"{EVIL}:{number}" for number in range(1, 20)], "text": EVIL}],
            "contradictions": [],
        },
        "held_out": 50,
        "steps": 40,
        "loss_unit": "nats per token",
        "verdict": "These 2 rows are harmful.",
        "proven": True,
        "k": 2,
        "settings": {"train": {"model": EVIL, "r": 16}},
        "variants": variants,
        "seeds": [1, 2, 3],
        "judged_examples": 50,
        "base_loss": 2.5,
    }


def curve() -> dict[str, Any]:
    sizes, means = (25, 50, 100, 200), (1.4, 1.28, 1.2, 1.14)
    points = [
        {"examples": size, "r": rank, "steps": 10, "eval_loss": loss, "seed_losses": [loss - 0.01, loss + 0.01]}
        for rank in (16, 64)
        for size, loss in zip(sizes, means, strict=True)
    ]
    change = {"value": -0.04, "low": -0.07, "high": -0.01, "p_value": 0.02, "examples": 50, "seeds": 2}
    change |= {"from_examples": 0.5}
    return {
        "kind": "curve",
        "points": points,
        "doublings": [change] * 3,
        "trend": change,
        "quarter": change | {"value": 0.14, "low": 0.1, "high": 0.2},
        "high_rank": change,
        "verdict": f"More data would help. {EVIL}",
        "base_loss": 2.1,
        "steps": 80,
        "judged_examples": 50,
        "notes": [EVIL],
        "settings": {"train": {"model": EVIL, "r": 16}, "curve": {"seeds": 2}},
    }


CONTENTS = {
    "curve": curve,
    "data": data,
    "train": train,
    "compare": compare,
    "search": search,
    "inspect": inspect,
    "plan": plan,
    "eval": evaluation,
    "rows": rows,
}
FIGURES = {
    "data": 0,
    "train": 6,
    "compare": 4,
    "search": 1,
    "inspect": 5,
    "plan": 1,
    "eval": 0,
    "rows": 2,
    "curve": 1,
}
