"""What every benchmark does: cells in processes of their own, arms that take turns, one JSON with the machine in it.

A benchmark is a list of cells. A cell is one process with its own threads and malloc settings; within it the arms take
turns step by step, so that a change of the machine meets all of them. Each finished cell is written at once: a run that
was stopped goes on where it was, and cells of other source code or another machine are measured again.
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

RESULTS = Path(__file__).parent / "results"
QUICK = Path(tempfile.gettempdir()) / "tailora-benchmarks"  # never over the real results
PACKAGES = ("tailora", "torch", "transformers", "peft", "accelerate", "trl", "bitsandbytes", "torchao")
MALLOC = {  # glibc's settings, read when a process starts; one arena, since arms run in threads of one process
    "default": {"MALLOC_ARENA_MAX": "1"},
    "kept": {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "4294967296"},
}
QUIET = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONWARNINGS": "ignore"}
Cell = dict[str, Any]  # keyword arguments of the work, `threads` and `malloc` among them


# ---- cells


def main(name: str, description: str, cells: Callable[[bool], list[Cell]], work: Callable[..., dict[str, Any]]) -> None:
    """Measure every cell that `cells(quick)` lists by `work(**cell)`, each in a process of its own."""
    options = cell_arguments(description)
    if options.cell is not None:
        settings = json.loads(options.cell)
        settings.pop("malloc")  # in force already
        print(json.dumps(work(**settings)))
        return
    path = (QUICK if options.quick else RESULTS) / f"{name}.json"
    listed = cells(options.quick)
    wanted = [cell for cell in listed if chosen(cell, options.only)]
    kept = [one for one in known(path) if one["cell"] in listed and not (options.fresh and one["cell"] in wanted)]
    started = time.perf_counter()
    for number, cell in enumerate(wanted, start=1):
        if any(one["cell"] == cell for one in kept):
            continue
        if options.minutes and time.perf_counter() - started > 60 * options.minutes:
            say(f"{options.minutes} minutes are over before cell {number} of {len(wanted)}; the same command goes on")
            break
        say(f"{number}/{len(wanted)} {cell}")
        kept.append(measured(cell))
        write(path, {"cells": kept})
    print(path)


def measured(cell: Cell) -> dict[str, Any]:
    """One cell in a fresh process, which prints its result as the last line."""
    load, started = os.getloadavg()[0], time.perf_counter()
    variables = {**ENVIRONMENT, "OMP_NUM_THREADS": str(cell["threads"]), **MALLOC[cell["malloc"]]}
    bare = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "OMP_", "GOMP_"))}
    command = [sys.executable, sys.argv[0], "--cell", json.dumps(cell)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env={**bare, **QUIET, **variables})
    return {
        "cell": cell,
        "code": code(),
        "environment": variables,
        "load_before": load,
        "seconds": time.perf_counter() - started,
        "result": json.loads(done.stdout.splitlines()[-1]),
    }


def known(path: Path) -> list[dict[str, Any]]:
    """Cells of an earlier run that still hold: the same machine, packages and source code."""
    if not path.exists():
        return []
    content = json.loads(path.read_text())
    return [one for one in content["cells"] if one["code"] == code()] if content["machine"] == machine() else []


def code() -> str:
    """Names the source of the package that is measured."""
    files = sorted(Path(tailora.__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def chosen(cell: Cell, only: Iterable[str]) -> bool:
    return all(str(cell.get(pair.partition("=")[0])) == pair.partition("=")[2] for pair in only)


def cell_arguments(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"a smoke run of less than a minute, written to {QUICK}")
    parser.add_argument("--fresh", action="store_true", help="measure cells again that were measured before")
    parser.add_argument("--minutes", type=float, help="start no cell after so long; the same command goes on")
    parser.add_argument("--only", nargs="+", default=[], metavar="KEY=VALUE", help="cells with these settings only")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    return parser.parse_args()


# ---- turns


def turns(
    arms: dict[str, Callable[[], Any]], rounds: int, clock: Callable[[], float], warm: int = 1
) -> dict[str, list[float]]:
    """Seconds of every arm in every round; the first `warm` rounds are not counted."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(warm + rounds):
        for name, step in arms.items():
            started = clock()
            step()
            times[name].append(clock() - started)
    return {name: values[warm:] for name, values in times.items()}


def clock_for(threads: int) -> Callable[[], float]:
    """CPU time of the process where one thread works, which other programs hardly change; wall time otherwise."""
    return time.process_time if threads == 1 else time.perf_counter


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def ratios(times: dict[str, list[float]], over: str) -> dict[str, dict[str, float]]:
    """Every arm's time over that of the arm `over`, round by round."""
    return {
        name: spread([own / base for own, base in zip(values, times[over], strict=True)])
        for name, values in times.items()
    }


# ---- arms in processes of their own


def interleaved(script: str, arms: list[str], repeats: int) -> dict[str, list[dict[str, Any]]]:
    """Run `script arm NAME` for every arm in turn, `repeats` times; each prints one JSON object on its last line."""
    runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    for repeat in range(repeats):
        for arm in arms:
            command = [sys.executable, script, "arm", arm]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            runs[arm].append(json.loads(done.stdout.splitlines()[-1]))
            say(f"{repeat + 1}/{repeats} {arm}: {runs[arm][-1]}")
    return runs


def arguments(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run all arms and write the JSON")
    run.add_argument("--repeats", type=int, default=3)
    commands.add_parser("arm", help="run one arm").add_argument("name")
    return parser.parse_args()


def summary(runs: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Median and spread of every number."""
    return {key: spread([run[key] for run in runs]) for key in runs[0]}


# ---- the machine


def machine() -> dict[str, Any]:
    cpu = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.machine())
    flags = next((line.split() for line in _cpuinfo() if line.startswith("flags")), [])
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "bf16": sorted({"avx512_bf16", "amx_bf16"} & set(flags)),
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "environment": {
            name: os.environ[name]
            for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", *ENVIRONMENT)
            if name in os.environ
        },
    }


def write(name: str | Path, results: dict[str, Any]) -> Path:
    path = name if isinstance(name, Path) else RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), **results}, indent=2) + "\n")
    return path


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def peak_gigabytes() -> float:
    """Most memory that this process held. On Linux ru_maxrss would start at the peak of the process that started it."""
    if Path("/proc/self/status").exists():
        return held("VmHWM") / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)


def held(field: str) -> int:
    """Bytes by /proc/self/status: VmRSS is what is held now, VmHWM the most since `forget_peak`."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) * 1024


def forget_peak() -> None:
    """Give freed memory back to the system, and count VmHWM from here. Linux with glibc."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
