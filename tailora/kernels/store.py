"""Tensors on disk by number, for caches: filled while it is read, by several processes at once, bounded.

    about.json       what the folder is for; its time of change says when it was used last
    NAME.states      bytes of tensors, end to end
    NAME.index       a line for each, written after its bytes: number, offset, size, CRC-32

A process writes to files of its own and reads those of all. A line counts when it is whole, its bytes when their CRC
is right, so a killed process leaves nothing that is trusted. Bytes are read into the caller's memory rather than
mapped: mapped pages would count as the process's own.
"""

import errno
import json
import os
import re
import secrets
import shutil
import zlib
from collections.abc import Callable, Mapping
from io import BufferedRandom, BufferedReader
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from tailora.errors import WriteError
from tailora.formats.io import write_file, writing

ABOUT = "about.json"
LINE = re.compile(rb"(\d+) (\d+) (\d+) ([0-9a-f]{8})\n")


class Entry(NamedTuple):
    name: str  # of the files
    offset: int
    size: int
    crc: int


class Store:
    """The tensors of one folder. Whatever is lost or damaged is absent."""

    def __init__(self, folder: Path, about: Mapping[str, Any], limit: int, say: Callable[[str], None]) -> None:
        """limit: bytes of all tensors; beyond it, or when the disk is full, nothing is written, which `say` hears.

        Raises WriteError.
        """
        self.folder, self.limit, self._say = folder, limit, say
        self._full = False
        self._entries: dict[int, list[Entry]] = {}  # several, where processes wrote at once or one was damaged
        self._read_up_to: dict[str, int] = {}  # bytes of each index
        self._open: dict[str, BufferedReader | BufferedRandom] = {}
        self._bytes = 0
        self._own = secrets.token_hex(8)
        self._writers: tuple[BufferedRandom, BufferedRandom] | None = None
        write_file(folder / ABOUT, (json.dumps(about, indent=2) + "\n").encode())
        self.refresh()

    def __contains__(self, number: int) -> bool:
        return number in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def refresh(self) -> None:
        """Take notice of what other processes wrote."""
        for path in self.folder.glob("*.index"):
            if path.stem == self._own:
                continue
            start = self._read_up_to.get(path.stem, 0)
            try:
                with path.open("rb") as file:
                    file.seek(start)
                    text = file.read()
            except FileNotFoundError:  # removed since
                continue
            end = text.rfind(b"\n") + 1
            for number, offset, size, crc in LINE.findall(text[:end]):
                self._entries.setdefault(int(number), []).append(Entry(path.stem, int(offset), int(size), int(crc, 16)))
                self._bytes += int(size)
            self._read_up_to[path.stem] = start + end

    def read(self, number: int, into: Tensor) -> bool:
        """Fill a contiguous CPU tensor; False, and the tensor undefined, where there is nothing sound of its size."""
        memory = _memory(into)
        for entry in self._entries.pop(number, []):
            if entry.size == len(memory) and self._filled(entry, memory) and zlib.crc32(memory) == entry.crc:
                self._entries[number] = [entry]
                return True
        return False

    def write(self, number: int, tensor: Tensor) -> None:
        """Keep a contiguous CPU tensor, if it is not there yet and there is room."""
        memory = _memory(tensor)
        if number in self._entries or self._full or not len(memory):
            return
        try:
            with writing(self.folder):
                if self._bytes + len(memory) > self.limit:
                    raise OSError(errno.EDQUOT, f"{self.limit:,} bytes are its limit")
                self._entries[number] = [self._appended(number, memory)]
                self._bytes += len(memory)
        except WriteError as error:
            self._full = True
            self._say(f"{error}; what is not kept is computed at each use, which is slower")

    def clear(self) -> None:
        """Remove all that is kept."""
        self.close()
        for path in (*self.folder.glob("*.index"), *self.folder.glob("*.states")):
            path.unlink(missing_ok=True)
        self._entries.clear()
        self._read_up_to.clear()
        self._bytes = 0
        self._own = secrets.token_hex(8)

    def close(self) -> None:
        for file in (*self._open.values(), *(self._writers or ())):
            file.close()
        self._open.clear()
        self._writers = None

    def _filled(self, entry: Entry, memory: memoryview) -> bool:
        try:
            if entry.name not in self._open:
                self._open[entry.name] = (self.folder / f"{entry.name}.states").open("rb")
            file = self._open[entry.name]
            file.seek(entry.offset)
            return file.readinto(memory) == len(memory)
        except OSError:  # removed, or a disk that fails: as good as absent
            return False

    def _appended(self, number: int, memory: memoryview) -> Entry:
        if self._writers is None:
            name = self.folder / self._own
            self._writers = name.with_suffix(".states").open("x+b"), name.with_suffix(".index").open("x+b")
            self._open[self._own] = self._writers[0]
        states, index = self._writers
        offset = states.seek(0, os.SEEK_END)
        entry = Entry(self._own, offset, len(memory), zlib.crc32(memory))
        states.write(memory)
        states.flush()
        index.write(b"%d %d %d %08x\n" % (number, entry.offset, entry.size, entry.crc))
        index.flush()
        return entry


def _memory(tensor: Tensor) -> memoryview:
    return memoryview(cast(Any, tensor.detach().view(-1).view(torch.uint8).numpy()))


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below; what is removed meanwhile counts as nothing."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


def make_room(root: Path, own: Path, needed: int, limit: int) -> None:
    """Remove folders of `root`, the longest unused first, until `needed` bytes beside them are within the limit."""
    others = [path for path in root.iterdir() if path.is_dir() and path != own] if root.is_dir() else []
    used = {path: folder_bytes(path) for path in others}
    for path in sorted(others, key=_last_used):
        if sum(used.values()) + needed <= limit:
            return
        shutil.rmtree(path, ignore_errors=True)  # one that another process removes as well, or still holds open
        del used[path]


def _last_used(folder: Path) -> float:
    about = folder / ABOUT
    return about.stat().st_mtime if about.exists() else 0.0


def free_bytes(folder: Path) -> int:
    """Free space of the disk that the folder is on, or will be."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(there).free
