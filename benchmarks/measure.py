"""What every benchmark does: arms in processes of their own, interleaved, and one JSON with the machine in it."""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("tailora", "torch", "transformers", "peft", "accelerate")


def interleaved(script: str, arms: list[str], repeats: int) -> dict[str, list[dict[str, Any]]]:
    """Run `script arm NAME` for every arm in turn, `repeats` times; each prints one JSON object on its last line."""
    runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    for repeat in range(repeats):
        for arm in arms:
            command = [sys.executable, script, "arm", arm]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            runs[arm].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{repeat + 1}/{repeats} {arm}: {runs[arm][-1]}", file=sys.stderr, flush=True)
    return runs


def summary(runs: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Median and spread of every number."""
    columns = {key: [run[key] for run in runs] for key in runs[0]}
    return {
        key: {"median": statistics.median(values), "low": min(values), "high": max(values)}
        for key, values in columns.items()
    }


def machine() -> dict[str, Any]:
    cpu = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.machine())
    flags = next((line.split() for line in _cpuinfo() if line.startswith("flags")), [])
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "bf16": sorted({"avx512_bf16", "amx_bf16"} & set(flags)),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "environment": {
            name: os.environ[name]
            for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
            if name in os.environ
        },
    }


def write(name: str, results: dict[str, Any]) -> Path:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **results}, indent=2) + "\n")
    return path


def peak_gigabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def arguments(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run all arms and write the JSON")
    run.add_argument("--repeats", type=int, default=3)
    commands.add_parser("arm", help="run one arm").add_argument("name")
    return parser.parse_args()


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
