"""CPU seconds of `tailora train` on the cached demo model until its first step, and where they go.

    python benchmarks/startup.py          writes benchmarks/results/startup.json

The command runs in a process of its own and is watched from outside: run.json is there when everything is loaded and
checked, the first line of metrics.jsonl when the first step is done. The parts come from a second run under Python's
profiler (in CPU time), which slows Python code down: read them as shares.
"""

import cProfile
import os
import pstats
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure

FLAGS = ["--model", "demo", "--data", "demo", "--validation-split", "0", "--samples", "0", "--max-steps", "1"]
TICKS = os.sysconf("SC_CLK_TCK")
PARENTS = {
    ("train/run.py", "run"),
    ("train/setup.py", "assemble"),
    ("train/run.py", "_bench"),
    ("train/loop.py", "train"),
}


def cells(quick: bool) -> list[measure.Cell]:
    repeats = range(1 if quick else 3)
    common = {"threads": 1, "malloc": "default"}
    watched = [{"what": "watched", "repeat": repeat, **common} for repeat in repeats]
    return [*watched, {"what": "profiled", "repeat": 0, **common}]


def work(what: str, repeat: int, threads: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        flags = ["train", *FLAGS, "--output-dir", f"{folder}/run"]
        found = watched(flags, Path(folder) / "run") if what == "watched" else profiled(flags)
    return {"repeat": repeat, "threads": threads, **found}


def watched(flags: list[str], output: Path) -> dict[str, float]:
    """CPU seconds until everything is ready, and until the first step is done."""
    command = [sys.executable, "-m", "tailora.cli", *flags]
    log = output.with_suffix(".log")
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
        ready = cpu_when(process, lambda: (output / "run.json").exists())
        stepped = cpu_when(process, lambda: has_line(output / "metrics.jsonl"))
        code = process.wait()
    if code != 0 or ready is None or stepped is None:
        raise RuntimeError(f"{' '.join(command)} ended with {code}:\n{log.read_text()}")
    return {"ready": ready, "first_step_done": stepped, "first_step": stepped - ready}


def cpu_when(process: "subprocess.Popen[bytes]", there: Callable[[], bool]) -> float | None:
    """CPU seconds of the process, its ended children included, when `there()` became true; None if it ended before."""
    while not there():
        if process.poll() is not None:
            return None
        time.sleep(0.005)
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / TICKS  # utime, stime, and those of children


def has_line(path: Path) -> bool:
    return path.exists() and "\n" in path.read_text()


def profiled(flags: list[str]) -> dict[str, Any]:
    """CPU seconds of the imports, and of everything that a run calls directly."""
    begun = time.process_time()
    import tailora.cli.train  # noqa: F401 torch, transformers and the rest, as the command loads them
    from tailora.cli.main import main

    imports = time.process_time() - begun
    profile = cProfile.Profile(time.process_time)
    if (code := profile.runcall(main, flags)) != 0:
        raise RuntimeError(f"tailora {' '.join(flags)} ended with {code}")
    return {"imports": imports, "parts": parts(pstats.Stats(profile))}


def parts(stats: pstats.Stats) -> dict[str, float]:
    """Seconds of what the functions in PARENTS call, themselves left out: "setup.attach" and the like."""
    seconds: dict[str, float] = {}
    for (file, _line, name), (*_numbers, callers) in stats.stats.items():  # type: ignore[attr-defined]
        for caller, (*_counts, cumulative) in callers.items():
            parent = any(caller[0].endswith(place) and caller[2] == function for place, function in PARENTS)
            known = any(file.endswith(place) and name == function for place, function in PARENTS)
            if parent and not known and cumulative > 0.01:
                key = f"{Path(file).stem}.{name}"
                seconds[key] = seconds.get(key, 0.0) + cumulative
    return dict(sorted(seconds.items(), key=lambda pair: -pair[1]))


if __name__ == "__main__":
    measure.main("startup", str(__doc__), cells, work)
