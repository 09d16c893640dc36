"""CPU time of `tailora plan` for the config.json of Llama-3.1-8B, from start to exit, each time in a new process.

python -m benchmarks.speed.plan_time      writes `large_model` in benchmarks/results/plan.json
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
from typing import Any

from transformers import LlamaConfig

from benchmarks import measure

REPEATS = 3
LLAMA_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=131072,
    dtype="bfloat16",
    architectures=["LlamaForCausalLM"],
)


def cpu_seconds(flags: list[str]) -> float:
    """Returns user and system time of the command; 0 and 4 are its exit codes without an error."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "tailora", "plan", *flags]
    code = subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode
    if code not in (0, 4):
        raise SystemExit(f"{' '.join(command)} ended with exit code {code}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    path = measure.RESULTS / "plan.json"
    content: dict[str, Any] = json.loads(path.read_text())
    with tempfile.TemporaryDirectory() as folder:
        LLAMA_8B.save_pretrained(folder)
        load = os.getloadavg()[0]
        seconds = [cpu_seconds(["--model", folder]) for _ in range(REPEATS)]
    content["large_model"] = {
        "machine": measure.machine(),
        "code": measure.source_hash(),
        "load_before": load,
        "command": "tailora plan --model FOLDER",
        "cpu_seconds": seconds,
    }
    path.write_text(json.dumps(content, indent=2) + "\n")
    measure.log(f"{seconds}")


if __name__ == "__main__":
    main()
