"""`tailora doctor`: shows what this machine can do, and what that means for training."""

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from tailora import __version__
from tailora.cli.flags import Json
from tailora.cli.main import print_json, print_text, stdout
from tailora.report.terminal import print_rich_table

PACKAGES = ["torch", "transformers", "accelerate", "safetensors", "datasets", "pydantic", "cyclopts", "rich", "gguf"]
BYTES_PER_PARAMETER = {"bfloat16": 2, "float32": 4}
BYTES = ("memory", "total", "available", "free")

Facts = dict[str, dict[str, Any]]  # section -> name -> value


def doctor(*, json: Json = False) -> int:
    """Show what this machine can do.

    Shows device, bfloat16, threads, memory, disk, quantization methods and versions of packages.
    """
    facts = collect_facts()
    if json:
        print_json({**facts, "meaning": conclusions(facts)})
        return 0
    table = Table.grid(padding=(0, 2))
    for section, values in facts.items():
        for row, (name, value) in enumerate(values.items()):
            table.add_row(section if row == 0 else "", name, Text(_value_text(name, value)))
    console = stdout()
    print_rich_table(console, table)
    console.print()
    print_text(console, "\n".join(conclusions(facts)))
    return 0


def collect_facts() -> Facts:
    """Returns section -> name -> value; memory and disk are in bytes."""
    import psutil
    import torch
    from huggingface_hub.constants import HF_HUB_CACHE

    from tailora.data.demo import cache_folder
    from tailora.train.memory import available_bytes
    from tailora.train.model_loading import METHODS, obstacle

    device = _device()
    versions = {"tailora": __version__, "python": platform.python_version()}
    return {
        "device": device,
        "threads": {
            "cores": os.cpu_count(),
            "torch": torch.get_num_threads(),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        },
        "memory": {
            "total": psutil.virtual_memory().total,
            "available": available_bytes(torch.device("cpu")),  # within the container's limit
        },
        "demo cache": _disk(cache_folder()),
        "Hub cache": _disk(Path(HF_HUB_CACHE)),
        "quantize": {name: obstacle(name, torch.device(device["type"])) or "works" for name in METHODS},
        "packages": {**versions, **{name: _version(name) for name in PACKAGES}},
    }


def conclusions(facts: Facts) -> list[str]:
    """Returns what follows for training, in sentences."""
    device = facts["device"]
    dtype = "bfloat16" if device["bfloat16"] else "float32"
    size = BYTES_PER_PARAMETER[dtype]
    memory = device["memory"] if "memory" in device else facts["memory"]["available"]
    return [
        f"--dtype auto is {dtype}: {size} bytes for each parameter of the base model",
        f"a base model of {memory / 2 / size / 1e9:.1f}B parameters fills half of the memory; training takes the rest",
        f"training runs on {device['type']}; threads: {facts['threads']['torch']} (OMP_NUM_THREADS changes it)",
    ]


def _device() -> dict[str, Any]:
    import torch

    from tailora.core.device import device_name, has_bfloat16

    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        device = {"type": "cuda", "name": gpu.name, "count": torch.cuda.device_count(), "memory": gpu.total_memory}
    elif torch.backends.mps.is_available():
        device = {"type": "mps", "name": device_name(torch.device("mps"))}
    else:
        device = {"type": "cpu", "name": device_name(torch.device("cpu"))}
    return {**device, "bfloat16": has_bfloat16(str(device["type"]))}


def _disk(folder: Path) -> dict[str, Any]:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return {"folder": str(folder), "free": shutil.disk_usage(existing).free}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _value_text(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "not set" if name.isupper() else "not installed"
    return f"{value / 1e9:.1f} GB" if name in BYTES else str(value)
