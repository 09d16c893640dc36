"""The files in the output folder of a run or a study, by name. Importing this needs no torch."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ADAPTER, SETTINGS, RUN = "adapter", "adapter_config.json", "run.json"
REPORT, PAGE = "report.json", "report.html"  # the numbers, and the page that shows them


def adapter_in(path: Path) -> Path:
    """The adapter's own folder: a run's folder stands for the adapter in it."""
    inside = path / ADAPTER
    return inside if not (path / SETTINGS).exists() and inside.is_dir() else path


def recorded_settings(adapter: Path) -> dict[str, Any]:
    """What the run.json beside an adapter says that it was trained with; {} where there is none that can be read."""
    try:
        settings = json.loads((adapter.resolve().parent / RUN).read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    return settings if isinstance(settings, dict) else {}


def write_report(folder: Path, kind: str, content: Mapping[str, Any]) -> Path:
    """Writes report.json, from which `tailora report` makes the page, and returns its path. Raises WriteError."""
    from tailora.formats.io import write_file  # torch

    write_file(folder / REPORT, json.dumps({"kind": kind, **content}, indent=1).encode())
    return folder / REPORT
