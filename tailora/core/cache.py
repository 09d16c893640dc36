"""Where files are kept that can be made again. Needs no torch, which takes seconds to load."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Returns TAILORA_HOME, or tailora in the user's cache folder."""
    home = os.environ.get("TAILORA_HOME")
    user_cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home).expanduser() if home else Path(user_cache) / "tailora"
