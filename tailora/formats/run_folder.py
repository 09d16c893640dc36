"""The files in the output folder of a run or a study, by name. Importing this needs no torch."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tailora.formats.io import write_file

ADAPTER, MODEL, RUN = "adapter", "model", "run.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # as in PEFT
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
REPORT, PAGE = "report.json", "report.html"  # the numbers, and the page that shows them
SAMPLES = "samples.json"


def adapter_folder(path: Path) -> Path:
    """Returns the folder of the adapter: `path` itself, or the adapter in it if `path` is the folder of a run."""
    inside = path / ADAPTER
    return inside if not (path / ADAPTER_CONFIG).exists() and inside.is_dir() else path


def checkpoints_in(output_dir: Path) -> list[Path]:
    """Returns the checkpoint folders of a run, oldest first."""
    entries = output_dir.iterdir() if output_dir.is_dir() else []
    numbered = [(int(match[1]), path) for path in entries if (match := CHECKPOINT.fullmatch(path.name))]
    return [path for _, path in sorted(numbered)]


def recorded_settings(adapter: Path) -> dict[str, Any]:
    """Returns the training settings from the run.json beside an adapter; {} if there is none that can be read."""
    try:
        settings = json.loads((adapter.resolve().parent / RUN).read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    return settings if isinstance(settings, dict) else {}


def write_report(folder: Path, kind: str, content: Mapping[str, Any], *, allow_nan: bool = True) -> Path:
    """Writes report.json, from which `tailora report` makes the page, and returns its path. Raises WriteError.

    allow_nan: write NaN and Infinity, which not every program reads as JSON, for runs that diverged; if False, raises
        ValueError for them.
    """
    write_file(folder / REPORT, json.dumps({"kind": kind, **content}, indent=1, allow_nan=allow_nan).encode())
    return folder / REPORT
