"""Small but realistic report.json contents, one for each kind, with names that no page may take at their word."""

from typing import Any

import numpy as np

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
            {"prompt": "Hi!", "base": "", "tuned": "\ud800 I did a little thing"},
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


def compare() -> dict[str, Any]:
    def arm(name: str, loss: float, rates: dict[str, float], **more: Any) -> dict[str, Any]:
        return {
            "name": name,
            "changes": {},
            "outcome": "done",
            "learning_rate": min(map(float, rates), key=lambda rate: rates[f"{rate:g}"]),
            "rates": rates,
            "bracketed": True,
            "eval_loss": loss,
            "interval": [loss - 0.12, loss + 0.13],
            "difference": None,
            "runs": [],
            **more,
        }

    def apart(value: float, half: float) -> dict[str, Any]:
        ends = {"low": value - half, "high": value + half}
        return {"value": value, **ends, "p_value": 0.41, "examples": 50, "seeds": 3, "from_examples": 0.6}

    lora = {
        "difference": apart(-0.004, 0.012),
        "seconds": 77.0,
        "peak_memory_bytes": 2110000000,
        "trainable_parameters": 4884480,
        "bytes": 19600000,
        "forgetting": {"kl": 0.21, "loss_before": 2.9, "loss_after": 3.0, "tokens": 1024},
    }
    small = {**lora, "difference": apart(0.031, 0.014), "trainable_parameters": 610560, "bytes": 2450000}
    full = {
        "seconds": 131.0,
        "peak_memory_bytes": 4300000000,
        "trainable_parameters": 134515008,
        "bytes": 269000000,
        "forgetting": {"kl": 0.46, "loss_before": 2.9, "loss_after": 3.2, "tokens": 1024},
    }
    return {
        "kind": "compare",
        "arms": [
            arm("lora", 3.662, {"0.0005": 3.71, "0.002": 3.66, "0.008": 4.1, "0.001": 3.65}, **lora),
            arm(EVIL, 3.697, {"0.0005": 3.74, "0.002": 3.69}, **{**small, "bracketed": False, "changes": {"r": 2}}),
            arm("full", 3.666, {"5e-05": 3.68, "0.0002": 3.8, "1.25e-05": 3.9}, **full, changes={"method": "full"}),
            {"name": "wild", "changes": {"use_dora": True}, "outcome": "diverged", "rates": {"1.0": float("inf")}},
        ],
        "reference": "full",
        "base_loss": 4.47,
        "steps": 35,
        "seeds": [1, 2, 3],
        "judged_examples": 50,
        "verdict": "No difference that matters between lora and full: -0.004 nats per token. Take lora.",
        "p_value": 0.41,
        "p_values": {"lora": 0.41, EVIL: 0.0004},
        "notes": ["--minutes left time for 3 of 5 seeds"],
        "settings": {"train": {"model": "demo", "r": 16}, "compare": {"margin": 0.02, "seeds": 3}},
        "seconds": 812.0,
    }


CONTENTS = {"train": train, "compare": compare}
