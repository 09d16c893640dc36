"""Measures a GPU in a few minutes, with one command that needs no network.

    python benchmarks/gpu.py --minutes 9 --out FILE
    python benchmarks/gpu.py --minutes 9 --out FILE --shape tiny --device cpu          to test the script
    python benchmarks/gpu.py --minutes 9 --out FILE --shape tiny --device pretend      on the simulated accelerator

Weights are random and have the shapes of real models. Each cell is measured in its own process with a time limit, and
FILE (JSON) is written after each cell, so it is complete up to the point where the run ends. For a cell that fails or
takes too long, FILE contains the measurements so far and the reason. `update_docs.py` turns the files in
benchmarks/results/devices into tables.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # this file can be run by its path
from benchmarks import measure
from benchmarks.speed import gpu_cells

ROOT = Path(__file__).parent.parent
LAST_LINES = 20  # of what a failed cell printed


@dataclass(frozen=True)
class Sizes:
    """What --shape chooses: names of gpu_cells.SHAPES, and how much of everything."""

    small: str  # bound by launches
    large: str  # bound by products
    tokens: tuple[int, ...]  # of a step
    documents: tuple[int, ...]  # tokens of each
    new_tokens: int
    steps: int  # of a block of a training arm


SIZES = {
    "real": Sizes("135M", "8B", (2048, 16384), (128, 512, 2048), 32, 4),
    "tiny": Sizes("tiny", "tiny", (128,), (16, 64), 4, 1),
}


def cells(sizes: Sizes) -> list[tuple[float, dict[str, Any]]]:
    """Returns the most seconds of each cell, and its settings; the most important cells come first."""
    models = list(dict.fromkeys([sizes.small, sizes.large]))
    documents, rounds = list(sizes.documents), {"steps": sizes.steps, "rounds": 3}
    training = [
        [
            (110.0, {"what": "train", "model": model, "tokens": tokens, "documents": documents, **rounds})
            for model in models
        ]
        for tokens in sizes.tokens
    ]
    decoding = [
        (45.0, {"what": "decode", "model": model, "rows": rows, "new_tokens": sizes.new_tokens})
        for model in models
        for rows in (1, 8)
    ]
    quantized = {"what": "nf4", "model": sizes.small, "tokens": sizes.tokens[0], "documents": documents[-1:], **rounds}
    return [
        *((60.0, {"what": "model", "model": model}) for model in models),
        (100.0, {"what": "tests"}),
        *training[0],  # these compile; the others find what was compiled in inductor's cache
        *decoding,
        (60.0, quantized),
        *(cell for cells_of_tokens in training[1:] for cell in cells_of_tokens),
    ]


# ---- Cells in processes


def run_cell(cell: dict[str, Any], folder: Path, device: str, limit: float) -> dict[str, Any]:
    """Returns what the cell's process printed: JSON objects, a line each, merged. "failed" says why it ended early."""
    command = [sys.executable, __file__, "--cell", json.dumps(cell), "--folder", str(folder), "--device", device]
    if cell["what"] == "tests":
        # without pytest-xdist, which the options in pyproject.toml need
        options = ["-m", "gpu", "-q", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib"]
        command = [sys.executable, "-m", "pytest", *options, str(ROOT / "tests" / "gpu")]
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as printed, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, stdout=printed, stderr=errors, cwd=ROOT, start_new_session=True, env=environment(device)
        )
        try:
            code: int | str = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = f"took longer than {limit:.0f} s"
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its own processes, too
        process.wait()
        printed.seek(0), errors.seek(0)
        lines, said = printed.read().splitlines(), errors.read().splitlines()[-LAST_LINES:]
    if cell["what"] == "tests":
        return {"seconds": time.perf_counter() - started, "code": code, "said": lines[-LAST_LINES:]}
    result: dict[str, Any] = {}
    for line in lines:
        if line.startswith("{"):
            merge(result, json.loads(line))
    failed = {} if code == 0 else {"failed": code if isinstance(code, str) else f"exit code {code}", "said": said}
    return {"seconds": time.perf_counter() - started, **result, **failed}


def environment(device: str) -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    own = {**measure.QUIET, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    one_thread = {"OMP_NUM_THREADS": "1"} if device in ("cpu", "pretend") else {}  # many processes try the script
    return {**os.environ, **own, **one_thread}


def merge(result: dict[str, Any], more: dict[str, Any]) -> None:
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(result.get(key), dict):
            merge(result[key], value)
        else:
            result[key] = value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="time limit of the run; no cell continues after it")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--device", default="auto", help="device as in tailora train, or pretend")
    parser.add_argument("--patience", type=float, default=1.0, help="multiplies the time limit of each cell")
    parser.add_argument("--shape", choices=SIZES, default="real")
    parser.add_argument("--only", nargs="+", default=[], metavar="KEY=VALUE", help="run only cells with these settings")
    parser.add_argument("--cell", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = gpu_cells.use_device(options.device)
    if options.cell is not None:  # the process of one cell
        settings = {key: value for key, value in options.cell.items() if key != "what"}
        gpu_cells.CELLS[options.cell["what"]](device=device, folder=options.folder, **settings)
        return
    if options.out is None:
        parser.error("--out FILE is needed")
    end = time.monotonic() + 60 * options.minutes
    about = {"device": gpu_cells.about(device), "shape": options.shape, "code": measure.source_hash()}
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for limit, cell in cells(SIZES[options.shape]):
            if cell["what"] != "model" and not measure.matches(cell, options.only):
                continue
            left = end - time.monotonic()
            if left > 1:
                result = run_cell(cell, Path(folder), options.device, min(limit * options.patience, left))
            else:
                result = {"failed": "no time was left"}
            results.append({"cell": cell, "result": result})
            measure.write(options.out.absolute(), {**about, "cells": results})
            measure.log(f"{cell}: {result.get('failed', 'done')} in {result.get('seconds', 0):.0f} s")
    print(options.out)


if __name__ == "__main__":
    main()
