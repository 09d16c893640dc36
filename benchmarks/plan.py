"""What `tailora plan` says of memory, with and without --measure, against the peak of `tailora train`'s own process.

    python benchmarks/plan.py           writes benchmarks/results/plan.json
    python benchmarks/plan.py --only name="T bf16"

Each configuration: a model of random weights from config.json on, rows of different lengths, three commands, each in a
process of its own. Peaks are those of the whole process (VmHWM), from its start to its end. Needs Linux.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import measure
import numpy as np
from shapes import SHAPES, Shape, write_model

STEPS = 10
WATCHED = """
import sys
from tailora.cli.main import main
code = main(sys.argv[1:])
held = open("/proc/self/status").read()
print(held.split("VmHWM:")[1].split()[0], file=sys.stderr)
sys.exit(code)
"""


@dataclass(frozen=True)
class Case:
    """flags: of the commands.    kind: of the model, where it is no Llama."""

    shape: Shape
    flags: dict[str, Any] = field(default_factory=dict)
    kind: str = "llama"


S, T, W = (SHAPES[name] for name in "STW")
QWEN = Shape(896, 4864, 6, 14, 2, 151936, tied=True, rows=4, length=384)  # a quarter of Qwen2.5-0.5B's layers
GPT = Shape(768, 3072, 12, 12, 12, 50257, tied=True, rows=4, length=256)  # GPT-2
BF16, FP32 = {"dtype": "bfloat16"}, {"dtype": "float32"}
CASES = {
    "T bf16": Case(T, BF16),
    "T fp32, 512 tokens": Case(replace(T, length=512), FP32),
    "T full bf16": Case(T, {**BF16, "method": "full", "learning-rate": 5e-5}),
    "T full fp32": Case(T, {**FP32, "method": "full", "learning-rate": 5e-5}),
    "T bf16, 4 x 1024, checkpointed": Case(replace(T, rows=4, length=1024), {**BF16, "gradient-checkpointing": True}),
    "T int8": Case(T, {**BF16, "quantize": "int8"}),
    "T bf16, r 64, dropout": Case(T, {**BF16, "r": 64, "lora-dropout": 0.1}),
    "T bf16, 32 x 64, fast off": Case(replace(T, rows=32, length=64), {**BF16, "fast": "off"}),
    "S bf16": Case(S, BF16),
    "S bf16, 1024 tokens": Case(replace(S, length=1024), BF16),
    "S bf16, 1024 tokens, checkpointed": Case(replace(S, length=1024), {**BF16, "gradient-checkpointing": True}),
    "S fp32, 2 x 512": Case(replace(S, rows=2, length=512), FP32),
    "S bf16, fast off": Case(S, {**BF16, "fast": "off"}),
    "S nf4": Case(S, {**BF16, "quantize": "nf4"}),
    "S bf16, r 64, dropout": Case(S, {**BF16, "r": 64, "lora-dropout": 0.1}),
    "S bf16, top 4 layers, 16 x 64": Case(
        replace(S, rows=16, length=64), {**BF16, "layers-to-transform": "26,27,28,29"}
    ),
    "W bf16, 2 x 384": Case(replace(W, length=384), BF16),
    "W fp32": Case(W, FP32),
    "W int8": Case(W, {**BF16, "quantize": "int8"}),
    "Qwen2 bf16": Case(QWEN, BF16, "qwen2"),
    "GPT-2 fp32": Case(GPT, FP32, "gpt2"),
}


def cells(quick: bool) -> list[measure.Cell]:
    names = ["T bf16"] if quick else list(CASES)
    return [{"name": name, "threads": 2, "malloc": "default", "steps": 4 if quick else STEPS} for name in names]


def work(name: str, threads: int, steps: int) -> dict[str, Any]:
    """Bytes that were foreseen, in both ways, and that a run took; seconds of a step likewise."""
    del threads  # in force already
    case = CASES[name]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write(case, folder, steps)
        flags = [*_common(case, folder), *_flags(case.flags), "--max-steps", str(steps), "--json"]
        estimated, _ = ran(["plan", *flags])
        measured, _ = ran(["plan", "--measure", *flags])
        trained, peak = ran(["train", *flags, "--samples", "0", "--output-dir", str(folder / "run")])
    return {
        "true_bytes": peak,
        "estimated": estimated["memory"],
        "measured": measured["memory"],
        "estimated_ratio": estimated["memory"]["total"] / peak,
        "measured_ratio": measured["memory"]["total"] / peak,
        "true_seconds_per_token": 1 / trained["tokens_per_second"],
        "estimated_seconds_per_token": estimated["seconds"] / estimated["tokens"],
        "measured_seconds_per_token": measured["seconds"] / measured["tokens"],
        "largest_forward": estimated["largest_forward"],
        "kernels": measured["kernels"],
    }


def ran(arguments: list[str]) -> tuple[dict[str, Any], int]:
    """The last line of a command's stdout, and the peak of its process in bytes."""
    command = [sys.executable, "-c", WATCHED, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1]), int(done.stderr.split()[-1]) * 1024


def _common(case: Case, folder: Path) -> list[str]:
    return [
        *("--model", str(folder / "model"), "--data", str(folder / "rows.jsonl"), "--validation-split", "0.1"),
        *("--max-length", str(case.shape.length), "--per-device-train-batch-size", str(case.shape.rows)),
    ]


def _flags(flags: dict[str, Any]) -> list[str]:
    return [
        part
        for name, value in flags.items()
        for part in ([f"--{name}"] if value is True else [f"--{name}", str(value)])
    ]


def write(case: Case, folder: Path, steps: int) -> None:
    """The model's folder, and rows of half to all of the length."""
    write_model(case.shape, folder / "model")
    if case.kind != "llama":
        other(case, folder / "model")
    random = np.random.default_rng(0)
    rows = [
        " ".join(
            f"w{i}"
            for i in random.integers(
                1, case.shape.vocabulary, size=random.integers(case.shape.length // 2, case.shape.length)
            )
        )
        for _ in range(int(steps * case.shape.rows * 1.3))
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))


def other(case: Case, folder: Path) -> None:
    """A model of another family with the tokenizer that is there."""
    import torch
    from transformers import AutoModelForCausalLM, GPT2Config, Qwen2Config

    shape = case.shape
    config: Any = GPT2Config(vocab_size=shape.vocabulary, bos_token_id=None, eos_token_id=0)
    if case.kind == "qwen2":
        config = Qwen2Config(
            vocab_size=shape.vocabulary,
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.key_heads,
            tie_word_embeddings=shape.tied,
            bos_token_id=None,
            eos_token_id=0,
        )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


if __name__ == "__main__":
    measure.main("plan", str(__doc__), cells, work)
