"""Compares the memory that `tailora plan` estimates, with and without --measure, with the peak of a run's process.

    python -m benchmarks.memory.plan           writes benchmarks/results/plan.json
    python -m benchmarks.memory.plan --only name="T bf16"

Each configuration has a model with random weights, rows of different lengths, and three commands in separate processes:
`plan`, `plan --measure` and `train`. Peaks are per process (VmHWM). Needs Linux.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import measure
from benchmarks.speed.shapes import SHAPES, Shape, write_model
from tailora.errors import WORSE

STEPS = 10
COMMAND_WITH_PEAK = """
import sys
from tailora.cli.main import main
code = main(sys.argv[1:])
status = open("/proc/self/status").read()
print(status.split("VmHWM:")[1].split()[0], file=sys.stderr)
sys.exit(code)
"""  # its last line on stderr is the peak in KiB


@dataclass(frozen=True)
class Configuration:
    """A model and the flags of the commands. `family`: architecture of the model: llama, qwen2 or gpt2."""

    shape: Shape
    flags: dict[str, Any] = field(default_factory=dict)
    family: str = "llama"


S, T, W = (SHAPES[name] for name in "STW")
QWEN = Shape(896, 4864, 6, 14, 2, 151936, tied=True, rows=4, length=384)  # a quarter of Qwen2.5-0.5B's layers
GPT = Shape(768, 3072, 12, 12, 12, 50257, tied=True, rows=4, length=256)  # GPT-2
BF16, FP32 = {"dtype": "bfloat16"}, {"dtype": "float32"}
CONFIGURATIONS = {
    "T bf16": Configuration(T, BF16),
    "T fp32, 512 tokens": Configuration(replace(T, length=512), FP32),
    "T full bf16": Configuration(T, {**BF16, "method": "full", "learning-rate": 5e-5}),
    "T full fp32": Configuration(T, {**FP32, "method": "full", "learning-rate": 5e-5}),
    "T bf16, 4 x 1024, checkpointed": Configuration(
        replace(T, rows=4, length=1024), {**BF16, "gradient-checkpointing": True}
    ),
    "T int8": Configuration(T, {**BF16, "quantize": "int8"}),
    "T bf16, r 64, dropout": Configuration(T, {**BF16, "r": 64, "lora-dropout": 0.1}),
    "T bf16, 32 x 64, fast off": Configuration(replace(T, rows=32, length=64), {**BF16, "fast": "off"}),
    "S bf16": Configuration(S, BF16),
    "S bf16, 1024 tokens": Configuration(replace(S, length=1024), BF16),
    "S bf16, 1024 tokens, checkpointed": Configuration(
        replace(S, length=1024), {**BF16, "gradient-checkpointing": True}
    ),
    "S fp32, 2 x 512": Configuration(replace(S, rows=2, length=512), FP32),
    "S bf16, fast off": Configuration(S, {**BF16, "fast": "off"}),
    "S nf4": Configuration(S, {**BF16, "quantize": "nf4"}),
    "S bf16, r 64, dropout": Configuration(S, {**BF16, "r": 64, "lora-dropout": 0.1}),
    "S bf16, top 4 layers, 16 x 64": Configuration(
        replace(S, rows=16, length=64), {**BF16, "layers-to-transform": "26,27,28,29"}
    ),
    "W bf16, 2 x 384": Configuration(replace(W, length=384), BF16),
    "W fp32": Configuration(W, FP32),
    "W int8": Configuration(W, {**BF16, "quantize": "int8"}),
    "Qwen2 bf16": Configuration(QWEN, BF16, "qwen2"),
    "GPT-2 fp32": Configuration(GPT, FP32, "gpt2"),
}


def cells(quick: bool) -> list[measure.Cell]:
    names = ["T bf16"] if quick else list(CONFIGURATIONS)
    return [{"name": name, "threads": 2, "malloc": "default", "steps": 4 if quick else STEPS} for name in names]


def run_cell(name: str, threads: int, steps: int) -> dict[str, Any]:
    """Returns the bytes that both plans estimated and that a run took, and the seconds of a step, measured in both."""
    del threads  # set in the environment
    configuration = CONFIGURATIONS[name]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_task(configuration, folder, steps)
        flags = [*task_flags(configuration, folder), *as_flags(configuration.flags)]
        flags += ["--max-steps", str(steps), "--json"]
        estimated, _ = run_command(["plan", *flags])
        measured, _ = run_command(["plan", "--measure", *flags])
        trained, peak = run_command(["train", *flags, "--metric-examples", "0", "--output-dir", str(folder / "run")])
    return {
        "true_bytes": peak,
        "estimated": estimated["memory"],
        "measured": measured["memory"],
        "estimated_ratio": estimated["memory"]["total"] / peak,
        "measured_ratio": measured["memory"]["total"] / peak,
        "true_seconds_per_token": 1 / trained["tokens_per_second"],
        "measured_seconds_per_token": measured["seconds"] / measured["tokens"],
        "largest_forward": estimated["largest_forward"],
        "kernels": measured["kernels"],
    }


def run_command(arguments: list[str]) -> tuple[dict[str, Any], int]:
    """Returns the last line of a command's stdout, and the peak of its process in bytes."""
    command = [sys.executable, "-c", COMMAND_WITH_PEAK, *arguments]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode not in (0, WORSE):
        raise RuntimeError(f"{' '.join(arguments)}: {process.stderr[-2000:]}")
    return json.loads(process.stdout.splitlines()[-1]), int(process.stderr.split()[-1]) * 1024


def task_flags(configuration: Configuration, folder: Path) -> list[str]:
    return [
        *("--model", str(folder / "model"), "--data", str(folder / "rows.jsonl"), "--validation-split", "0.1"),
        *("--max-length", str(configuration.shape.length)),
        *("--per-device-train-batch-size", str(configuration.shape.rows)),
    ]


def as_flags(flags: dict[str, Any]) -> list[str]:
    return [
        part
        for name, value in flags.items()
        for part in ([f"--{name}"] if value is True else [f"--{name}", str(value)])
    ]


def write_task(configuration: Configuration, folder: Path, steps: int) -> None:
    """Writes the model's folder, and rows.jsonl with rows of half to all of the length."""
    write_model(configuration.shape, folder / "model")
    if configuration.family != "llama":
        write_other_model(configuration, folder / "model")
    random = np.random.default_rng(0)
    rows = [
        " ".join(
            f"w{i}"
            for i in random.integers(
                1,
                configuration.shape.vocabulary,
                size=random.integers(configuration.shape.length // 2, configuration.shape.length),
            )
        )
        for _ in range(int(steps * configuration.shape.rows * 1.3))
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))


def write_other_model(configuration: Configuration, folder: Path) -> None:
    """Replaces the model by one of another family; the tokenizer stays."""
    import torch
    from transformers import AutoModelForCausalLM, GPT2Config, Qwen2Config

    shape = configuration.shape
    config: Any = GPT2Config(vocab_size=shape.vocabulary, bos_token_id=None, eos_token_id=0)
    if configuration.family == "qwen2":
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
    measure.main("plan", str(__doc__), cells, run_cell)
