"""What all benchmarks share: cells, arms that take turns, and one JSON file with the machine in it.

A benchmark is a list of cells. Each cell runs in its own process, with its own number of threads and malloc
settings. Inside a cell the arms take turns step by step, so that a change of the machine affects all of them. A cell is
written as soon as it is finished: a run that was stopped continues where it was, and cells of other source code or of
another machine are measured again.
"""

import argparse
import ctypes
import hashlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import tailora
from tailora.cli.main import ENVIRONMENT

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "tests"))  # some benchmarks use what tests share
RESULTS = ROOT / "benchmarks" / "results"
QUICK = Path(tempfile.gettempdir()) / "tailora-benchmarks"  # so that --quick never overwrites results
PACKAGES = ("tailora", "torch", "transformers", "peft", "accelerate", "trl", "bitsandbytes", "torchao")
MALLOC = {  # glibc reads these when a process starts; one arena, because arms run in threads of one process
    "default": {"MALLOC_ARENA_MAX": "1"},
    "kept": {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "4294967296"},
}
INSTRUCTIONS = {  # oneDNN and torch read these; the products and the pointwise kernels of smaller processors
    "AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
    "AVX512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "ATEN_CPU_CAPABILITY": "avx512"},
    "all": {},
}
QUIET = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONWARNINGS": "ignore"}
Cell = dict[str, Any]  # keyword arguments of `measure`, and `malloc`; `instructions`, too, if they are restricted


# ---- Cells


def main(
    name: str,
    description: str,
    cells: Callable[[bool], list[Cell]],
    measure: Callable[..., dict[str, Any]],
) -> None:
    """Runs `measure(**cell)` for every cell of `cells(quick)`, each in its own process."""
    options = cell_arguments(description)
    if options.cell is not None:  # the process of one cell
        settings = json.loads(options.cell)
        settings.pop("malloc")  # set in the environment
        print(json.dumps(measure(**settings)))
        return
    path = (QUICK if options.quick else RESULTS) / f"{name}.json"
    listed = cells(options.quick)
    wanted = [cell for cell in listed if matches(cell, options.only)]
    others = {} if not path.exists() else json.loads(path.read_text())  # results of other scripts stay
    others = {key: value for key, value in others.items() if key not in ("machine", "cells")}
    results = [result for result in previous_results(path) if result["cell"] in listed]
    started = time.perf_counter()
    for number, cell in enumerate(wanted, start=1):
        if any(result["cell"] == cell for result in results):
            continue
        if options.minutes and time.perf_counter() - started > 60 * options.minutes:
            log(f"{options.minutes} minutes are over before cell {number} of {len(wanted)}; the same command continues")
            break
        log(f"{number}/{len(wanted)} {cell}")
        results.append(measure_cell(cell))
        write(path, {"cells": results, **others})
    print(path)


def measure_cell(cell: Cell) -> dict[str, Any]:
    """Measures a cell in a new process, which prints its result as the last line."""
    load, started = os.getloadavg()[0], time.perf_counter()
    variables = {**ENVIRONMENT, "OMP_NUM_THREADS": str(cell["threads"]), **MALLOC[cell["malloc"]]}
    variables |= INSTRUCTIONS[cell.get("instructions", "all")]
    prefixes = ("MALLOC_", "OMP_", "GOMP_", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}
    command = [sys.executable, "-m", sys.modules["__main__"].__spec__.name, "--cell", json.dumps(cell)]
    process = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env={**inherited, **QUIET, **variables}
    )
    return {
        "cell": cell,
        "code": source_hash(),
        "environment": variables,
        "load_before": load,
        "seconds": time.perf_counter() - started,
        "result": json.loads(process.stdout.splitlines()[-1]),
    }


def previous_results(path: Path) -> list[dict[str, Any]]:
    """Returns the cells of an earlier run on this machine, with these packages and this source code."""
    if not path.exists():
        return []
    content = json.loads(path.read_text())
    if content["machine"] != machine():
        return []
    return [result for result in content["cells"] if result["code"] == source_hash()]


def source_hash() -> str:
    """Returns a hash of the source code of tailora."""
    files = sorted(Path(tailora.__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def matches(cell: Cell, only: Iterable[str]) -> bool:
    """Returns True if the cell has all of these settings, each KEY=VALUE."""
    return all(str(cell.get(pair.partition("=")[0])) == pair.partition("=")[2] for pair in only)


def cell_arguments(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"a smoke run of less than a minute, written to {QUICK}")
    parser.add_argument("--minutes", type=float, help="start no cell after this time; the same command continues")
    parser.add_argument("--only", nargs="+", default=[], metavar="KEY=VALUE", help="only cells with these settings")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    return parser.parse_args()


# ---- Arms that take turns


def take_turns(
    arms: dict[str, Callable[[], Any]], rounds: int, clock: Callable[[], float], warm_up: int = 1
) -> dict[str, list[float]]:
    """Returns the seconds of every arm in every round; the `warm_up` rounds come first and are not counted."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(warm_up + rounds):
        for name, step in arms.items():
            started = clock()
            step()
            times[name].append(clock() - started)
    return {name: values[warm_up:] for name, values in times.items()}


def clock_for(threads: int) -> Callable[[], float]:
    """Returns the CPU clock of the process for one thread, because other programs hardly change it; else wall time."""
    return time.process_time if threads == 1 else time.perf_counter


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "n": len(values)}


def ratios(times: dict[str, list[float]], over: str) -> dict[str, dict[str, float]]:
    """Returns every arm's time divided by the time of the arm `over`, round by round."""
    return {
        name: spread([own / base for own, base in zip(values, times[over], strict=True)])
        for name, values in times.items()
    }


# ---- Arms in separate processes


def run_arms(module: str, arms: list[str], repeats: int) -> dict[str, list[dict[str, Any]]]:
    """Runs `python -m module arm NAME` for every arm in turn, `repeats` times. Each prints a JSON object last."""
    runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    for repeat in range(repeats):
        for arm in arms:
            command = [sys.executable, "-m", module, "arm", arm]
            process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            runs[arm].append(json.loads(process.stdout.splitlines()[-1]))
            log(f"{repeat + 1}/{repeats} {arm}: {runs[arm][-1]}")
    return runs


def arm_arguments(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run all arms and write the JSON file")
    run.add_argument("--repeats", type=int, default=3)
    commands.add_parser("arm", help="run one arm").add_argument("name")
    return parser.parse_args()


def summary(runs: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Returns median and range of every number over the runs."""
    return {key: spread([run[key] for run in runs]) for key in runs[0]}


# ---- The machine


def machine() -> dict[str, Any]:
    cpu = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.machine())
    flags = next((line.split() for line in _cpuinfo() if line.startswith("flags")), [])
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "bf16": sorted({"avx512_bf16", "amx_bf16"} & set(flags)),
        "python": platform.python_version(),
        "packages": {name: number for name in PACKAGES if (number := _version(name))},
        "environment": {
            name: os.environ[name]
            for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", *ENVIRONMENT)
            if name in os.environ
        },
    }


def write(name: str | Path, results: dict[str, Any]) -> Path:
    """Writes benchmarks/results/NAME.json, or the file of this path, with the machine; returns its path."""
    path = name if isinstance(name, Path) else RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), **results}, indent=2) + "\n")
    return path


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ---- Memory


def peak_gigabytes() -> float:
    """Returns the most memory that this process has held.

    On Linux it is read from /proc, because ru_maxrss starts at the peak of the parent process there.
    """
    if Path("/proc/self/status").exists():
        return process_memory("VmHWM") / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)


def process_memory(field: str) -> int:
    """Returns bytes from /proc/self/status: VmRSS is held now, VmHWM is the most since `reset_peak`."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) * 1024


def reset_peak() -> None:
    """Gives freed memory back to the system and restarts VmHWM from what is held now. Linux with glibc only."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


# ---- Packages and CPU


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
