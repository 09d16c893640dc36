"""The output folder of a run and the files beside its adapter: run.json, config.yaml, metrics.jsonl, examples.jsonl."""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from filelock import FileLock, Timeout

import tailora
from tailora.errors import CheckpointError, ConfigError
from tailora.formats.io import create_output_folder, write_file
from tailora.train.checkpoint import checkpoints_in
from tailora.train.config import TrainConfig
from tailora.train.config_file import config_text
from tailora.train.loss import Evaluation
from tailora.train.trainable import ADAPTER, MODEL

RUN, CONFIG, METRICS, EXAMPLES = "run.json", "config.yaml", "metrics.jsonl", "examples.jsonl"
PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "tokenizers", "datasets", "numpy")


def create_run_folder(config: TrainConfig) -> Path:
    """Creates and returns the output folder. Raises ConfigError if it cannot be written to or holds another run."""
    output_dir = Path(config.output_dir)
    create_output_folder(output_dir)
    resumed = config.resume_from_checkpoint
    is_resumed_here = resumed is not None and (
        resumed == "latest" or Path(resumed).resolve().parent == output_dir.resolve()
    )
    checkpoints = [path.name for path in checkpoints_in(output_dir)]
    names = [*(name for name in (ADAPTER, MODEL) if (output_dir / name).exists()), *checkpoints[-1:]]
    if names and not is_resumed_here:
        hint = " or resume with --resume-from-checkpoint latest," if checkpoints else ""
        raise ConfigError(
            f"{output_dir} holds {' and '.join(names)} of an earlier run; give another --output-dir,{hint} or delete it"
        )
    return output_dir


@contextmanager
def lock(output_dir: Path) -> Iterator[None]:
    """Within the block no other run can write to this folder. Raises ConfigError if another one does."""
    file_lock = FileLock(output_dir / ".lock")
    try:
        file_lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(f"another run is writing to {output_dir} now; give another --output-dir") from None
    try:
        yield
    finally:
        file_lock.release()


def write_settings(output_dir: Path, config: TrainConfig) -> None:
    """Writes config.yaml: `tailora train --config config.yaml` repeats the run."""
    text = config_text(config.model_dump(exclude={"resume_from_checkpoint"}))
    write_file(output_dir / CONFIG, text.encode())


def write_run(output_dir: Path, header: Mapping[str, Any], result: Mapping[str, Any] | None = None) -> None:
    """Writes run.json: the header, and the result once there is one."""
    content = {**header, "finished": result is not None, "result": result}
    write_file(output_dir / RUN, (json.dumps(content, indent=2) + "\n").encode())


def write_examples(output_dir: Path, before: Evaluation | None, after: Evaluation | None) -> None:
    """Writes examples.jsonl: the supervised tokens of each held-out example, and its loss in nats before and after.

    Without held-out examples there is no file.
    """
    if before is None or after is None:
        return
    columns = after.counts.tolist(), before.sums.tolist(), after.sums.tolist()
    lines = (
        json.dumps({"tokens": tokens, "before": loss_before, "after": loss_after})
        for tokens, loss_before, loss_after in zip(*columns, strict=True)
    )
    write_file(output_dir / EXAMPLES, "".join(f"{line}\n" for line in lines).encode())


def environment() -> dict[str, Any]:
    """Returns versions, machine and the state of the working folder's git repository."""
    return {
        "versions": {
            "tailora": tailora.__version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
        "machine": {
            "platform": platform.platform(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "cpus": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory_bytes": psutil.virtual_memory().total,
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
        "git": git_state(Path.cwd()),
        "command": sys.argv,
    }


def git_state(folder: Path) -> dict[str, Any] | None:
    """Returns the commit, and whether anything differs from it; None outside a repository or without git."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None


class Metrics:
    """metrics.jsonl: one object a line, on the disk as soon as it is written."""

    def __init__(self, output_dir: Path, *, resumed_at: int | None) -> None:
        """resumed_at: lines of later steps are dropped, because those steps are repeated; None starts a new file."""
        path = output_dir / METRICS
        kept = []
        if resumed_at is not None and path.exists():
            whole = path.read_text(encoding="utf-8").split("\n")[:-1]  # a line without its end was cut by a crash
            try:
                kept = [line for line in whole if json.loads(line)["step"] <= resumed_at]
            except (json.JSONDecodeError, KeyError, TypeError):
                raise CheckpointError(f"{path} holds a line that no run wrote; move the file away to go on") from None
        write_file(path, "".join(f"{line}\n" for line in kept).encode())
        self._file = path.open("a", encoding="utf-8")

    def write(self, **values: Any) -> None:
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()
