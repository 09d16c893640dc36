"""CPU seconds of `tailora train` on the cached demo model until its first step.

    python -m benchmarks.speed.startup          writes benchmarks/results/startup.json

The command runs in a separate process and is watched from outside: run.json exists as soon as everything is loaded
and checked, and metrics.jsonl has a line as soon as the first step is done.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import measure

FLAGS = ["--model", "demo", "--data", "demo", "--validation-split", "0", "--metric-examples", "0", "--max-steps", "1"]
TICKS = os.sysconf("SC_CLK_TCK")  # of the clock in /proc, per second


def cells(quick: bool) -> list[measure.Cell]:
    repeats = range(1 if quick else 3)
    common = {"threads": 1, "malloc": "default"}
    return [{"what": "watched", "repeat": repeat, **common} for repeat in repeats]


def run_cell(what: str, repeat: int, threads: int) -> dict[str, Any]:
    del what
    with tempfile.TemporaryDirectory() as folder:
        flags = ["train", *FLAGS, "--output-dir", f"{folder}/run"]
        result = watch(flags, Path(folder) / "run")
    return {"repeat": repeat, "threads": threads, **result}


def watch(flags: list[str], output: Path) -> dict[str, float]:
    """Returns the CPU seconds until everything is ready, and until the first step is done."""
    command = [sys.executable, "-m", "tailora.cli", *flags]
    log = output.with_suffix(".log")
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
        ready = cpu_seconds_until(lambda: (output / "run.json").exists(), process)
        stepped = cpu_seconds_until(lambda: has_line(output / "metrics.jsonl"), process)
        code = process.wait()
    if code != 0 or ready is None or stepped is None:
        raise RuntimeError(f"{' '.join(command)} ended with {code}:\n{log.read_text()}")
    return {"ready": ready, "first_step_done": stepped, "first_step": stepped - ready}


def cpu_seconds_until(condition: Callable[[], bool], process: "subprocess.Popen[bytes]") -> float | None:
    """Waits for the condition; returns the CPU seconds of the process and its children, None if the process ended."""
    while not condition():
        if process.poll() is not None:
            return None
        time.sleep(0.005)
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / TICKS  # utime and stime, of the process and of its children


def has_line(path: Path) -> bool:
    return path.exists() and "\n" in path.read_text()


if __name__ == "__main__":
    measure.main("startup", str(__doc__), cells, run_cell)
