"""`tailora doctor`: shows what this machine can do and what that means for training."""

import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from tailora import __version__
from tailora.cli.flags import Json
from tailora.cli.main import print_json, print_text, stdout
from tailora.report.terminal import print_rich_table

if TYPE_CHECKING:
    import torch

PACKAGES = ["torch", "transformers", "accelerate", "safetensors", "datasets", "pydantic", "cyclopts", "rich", "gguf"]
BYTES_PER_PARAMETER = {"bfloat16": 2, "float16": 2, "float32": 4}  # of a base model
WORKS = "works"
BYTES = ("memory", "total", "available", "free")

Facts = dict[str, dict[str, Any]]  # section -> name -> value


def doctor(*, json: Json = False) -> int:
    """Show what this machine can do.

    Lists each device with its memory and precision, and whether each kind of attention, compiled layers and
    quantization works on it. Also lists threads, memory, disk space and package versions.
    """
    facts = collect_facts()
    if json:
        print_json({**facts, "meaning": conclusions(facts)})
        return 0
    table = Table.grid(padding=(0, 2))
    sections = facts["devices"] | {name: values for name, values in facts.items() if name not in ("device", "devices")}
    for section, values in sections.items():
        for row, (name, value) in enumerate(_lines(values)):
            table.add_row(section if row == 0 else "", name, Text(value))
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

    from tailora.core.cache import cache_folder
    from tailora.core.device import choose_device, devices
    from tailora.train.memory import available_bytes

    chosen = str(choose_device())  # first, because it reports why a card cannot be used
    by_device = {str(device): device_facts(device) for device in devices()}
    versions = {"tailora": __version__, "python": platform.python_version()}
    return {
        "device": {"auto": chosen, "type": chosen.partition(":")[0], **by_device[chosen]},
        "devices": by_device,
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
        "packages": {**versions, **{name: version(name) if find_spec(name) else None for name in PACKAGES}},
    }


def device_facts(device: "torch.device") -> dict[str, Any]:
    """Returns facts about a device, and for each method "works" or the reason why it does not. Runs short probes."""
    from tailora.core.device import capability, device_name, fast_dtype, has_bfloat16
    from tailora.kernels.compiled_layers import compiler_obstacle
    from tailora.kernels.device_attention import PROVIDERS
    from tailora.train.memory import available_bytes, total_bytes
    from tailora.train.quantize import METHODS, obstacle

    precision = fast_dtype(device)
    attention = {name: provider.obstacle(device, precision) or WORKS for name, provider in PROVIDERS.items()}
    return {
        "name": device_name(device),
        "memory": total_bytes(device),
        "available": available_bytes(device),
        "bfloat16": has_bfloat16(device),
        # what --dtype auto chooses; stored: the precision of the model's files
        "dtype": "stored" if device.type == "cpu" else str(precision).removeprefix("torch."),
        "capability": capability(device),
        "attention": {"tailora's operator": WORKS} if device.type == "cpu" else attention,
        "compiled layers": compiler_obstacle(device) or WORKS,
        "quantize": {name: obstacle(name, device) or WORKS for name in METHODS},
    }


def conclusions(facts: Facts) -> list[str]:
    """Returns what this means for training, in sentences."""
    device = facts["device"]
    stored = device["dtype"] == "stored"
    dtype = "bfloat16" if stored else device["dtype"]
    size, meaning = BYTES_PER_PARAMETER[dtype], "keeps the precision of the model's files" if stored else f"is {dtype}"
    memory = facts["memory"]["available"] if device["type"] == "cpu" else device["memory"]
    return [
        f"--dtype auto {meaning}: {size} bytes per parameter of the base model{' in bfloat16' if stored else ''}",
        f"a base model of {memory / 2 / size / 1e9:.1f}B parameters fills half of the memory; training needs the rest",
        f"training uses {device['auto']}; threads: {facts['threads']['torch']} (set by OMP_NUM_THREADS)",
    ]


def _disk(folder: Path) -> dict[str, Any]:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return {"folder": str(folder), "free": shutil.disk_usage(existing).free}


def _lines(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields the name and the text of each fact, including nested ones."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from ((f"{name}: {inner}", text) for inner, text in _lines(value))
        elif isinstance(value, bool) or value is None:
            yield name, "yes" if value else "no" if value is False else "none"
        else:
            yield name, f"{value / 1e9:.1f} GB" if name in BYTES else str(value)
