"""Work in a process of its own: how its error reaches the process that asked for it. Needs no torch."""

import json
from pathlib import Path

from tailora import errors
from tailora.errors import MemoryLimitError, TailoraError
from tailora.formats.io import write_file

ERROR = "error.json"
KILLED = -9  # what the system does to a process when memory runs out


def tell(folder: Path, error: TailoraError) -> None:
    """In the process: leave the error for `told`."""
    write_file(folder / ERROR, json.dumps({"type": type(error).__name__, "message": str(error)}).encode())


def told(folder: Path, code: int, complaint: str, what: str) -> Exception:
    """The error that ended the process, as far as it could say. complaint: its stderr.    what: it was doing."""
    written = folder / ERROR
    if written.exists():
        content = json.loads(written.read_text())
        written.unlink()
        error: Exception = getattr(errors, content["type"])(content["message"])
        return error
    if code == KILLED:
        return MemoryLimitError(f"{what} was killed, most likely for memory: take a smaller batch size")
    return RuntimeError(f"{what} ended with code {code}: {complaint.strip()[-2000:]}")
