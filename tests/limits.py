"""Limits for a test with hostile input: how much memory one input may take, and how long."""

import ctypes
import faulthandler
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MOST_BYTES = 100_000_000
HANG_SECONDS = 40.0  # above the deadline of tests/conftest.py, which names the input if it ends by itself
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
terminal = 2  # file descriptor; tests/conftest.py sets the one that pytest does not capture


@contextmanager
def limited(most_bytes: int = MOST_BYTES, hang_seconds: float = HANG_SECONDS) -> Iterator[None]:
    """Fails if the memory of the process grows by more than `most_bytes` at any time within the block.

    It counts what torch, tokenizers and safetensors allocate, too. Only Linux tells; elsewhere there is no such limit.
    After `hang_seconds` it prints where every thread is and ends the process, whatever code is running.
    """
    faulthandler.dump_traceback_later(hang_seconds, exit=True, file=terminal)
    try:
        before = _start_new_peak()
        yield
        grown = _peak() - before
    finally:
        faulthandler.cancel_dump_traceback_later()
    assert grown <= most_bytes, f"memory grew by {grown / 1e6:.0f} MB; the limit is {most_bytes / 1e6:.0f} MB"


def _start_new_peak() -> int:
    """Returns the resident memory in bytes, which is the peak from now on."""
    give_back_freed_memory()
    if CLEAR.exists():
        CLEAR.write_text("5")  # proc(5): resets VmHWM
    return _peak()


def give_back_freed_memory() -> None:
    """Returns what malloc has kept to the system, as after a run; else new blocks would take no memory."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def _peak() -> int:
    """Returns the most resident memory in bytes; 0 where /proc does not tell."""
    return int(STATUS.read_text().split("VmHWM:")[1].split()[0]) * 1024 if CLEAR.exists() else 0
