"""Where in what the user names the adapter is, and what the run that made it wrote beside it. Needs no torch."""

import json
from pathlib import Path
from typing import Any

ADAPTER, SETTINGS, RUN = "adapter", "adapter_config.json", "run.json"


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
