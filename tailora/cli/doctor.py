"""`tailora doctor`: what this machine can do, and what that means for training."""

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
from tailora.cli.main import print_json, stdout

PACKAGES = ["torch", "transformers", "accelerate", "safetensors", "datasets", "pydantic", "cyclopts", "rich", "gguf"]
BYTES_PER_PARAMETER = {"bfloat16": 2, "float32": 4}
IN_BYTES = ("memory", "total", "available", "free")

Facts = dict[str, dict[str, Any]]  # section -> name -> value


def doctor(*, json: Json = False) -> int:
    """Show what this machine can do: device, bf16, threads, memory, disk, quantisation, packages."""
    facts = examined()
    if json:
        print_json({**facts, "meaning": meaning(facts)})
        return 0
    table = Table.grid(padding=(0, 2))
    for section, values in facts.items():
        for place, (name, value) in enumerate(values.items()):
            table.add_row(section if place == 0 else "", name, Text(_worded(name, value)))
    console = stdout()
    console.print(table, "", *meaning(facts), sep="\n", markup=False, soft_wrap=True)
    return 0


def examined() -> Facts:
    """Memory and disk in bytes."""
    import psutil
    import torch
    from huggingface_hub.constants import HF_HUB_CACHE

    from tailora.data.demo import cache_folder
    from tailora.train.memory import available_bytes
    from tailora.train.model_loading import METHODS

    own = {"tailora": __version__, "python": platform.python_version()}
    return {
        "device": _device(),
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
        "quantize": {name: _works(name) for name in METHODS},
        "packages": {**own, **{name: _version(name) for name in PACKAGES}},
    }


def meaning(facts: Facts) -> list[str]:
    """What follows for training, each line from one of the facts."""
    device = facts["device"]
    dtype = "bfloat16" if device["bfloat16"] else "float32"
    size = BYTES_PER_PARAMETER[dtype]
    memory = device["memory"] if "memory" in device else facts["memory"]["available"]
    return [
        f"--dtype auto is {dtype}: {size} bytes for each parameter of the base",
        f"a base of {memory / 2 / size / 1e9:.1f}B parameters fills half of the memory; the other half is for training",
        f"training runs on the {device['type']} with {facts['threads']['torch']} threads; OMP_NUM_THREADS changes them",
    ]


def _device() -> dict[str, Any]:
    import torch

    from tailora.train.model_loading import has_bfloat16

    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        named = {"type": "cuda", "name": found.name, "count": torch.cuda.device_count(), "memory": found.total_memory}
    elif torch.backends.mps.is_available():
        named = {"type": "mps", "name": _processor()}
    else:
        named = {"type": "cpu", "name": _processor()}
    return {**named, "bfloat16": has_bfloat16(str(named["type"]))}


def _processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The model where Linux tells it; `platform` knows the architecture alone there."""
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _works(name: str) -> str:
    import torch

    from tailora.train.model_loading import obstacle

    return obstacle(name, "cuda" if torch.cuda.is_available() else "cpu") or "works"


def _disk(folder: Path) -> dict[str, Any]:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return {"folder": str(folder), "free": shutil.disk_usage(existing).free}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _worded(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "not set" if name.isupper() else "not installed"
    return f"{value / 1e9:.1f} GB" if name in IN_BYTES else str(value)
