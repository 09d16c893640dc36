"""AdapterRegistry: the adapters of a server by name, and which of them are in memory.

A request names a model: the base, an adapter, or one with a scale ("legal@0.5"). `acquire` returns its key in the
engine's AdapterSet and keeps it in memory until the handle is closed. A key contains a hash of the adapter's content:
after a replacement, new requests get the new adapter at once, and running requests finish with the old one.

The engine keeps running while files are read and checked. It only pauses while an adapter is added or removed.
"""

import json
import logging
import math
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock, RLock

import torch
from torch import Tensor, nn
from xxhash import xxh3_128

from tailora.core.adapter import Adapter, check_compatible, with_strength
from tailora.core.adapter_set import AdapterSet
from tailora.core.layer_types import find_layer
from tailora.core.mixed_batch import check_splits_by_row, layer_terms
from tailora.errors import (
    AdapterError,
    AdapterNotFoundError,
    ConfigError,
    FormatError,
    MemoryInUseError,
    MemoryLimitError,
    listing,
    nearest,
)
from tailora.formats.fingerprint import LayerFingerprint
from tailora.formats.load import named_tensors, not_finite, read_any_format, restore
from tailora.formats.peft import StoredAdapter
from tailora.formats.run_folder import ADAPTER_WEIGHTS, GGUF_WEIGHTS, MLX_WEIGHTS, adapter_folder, read_system_message
from tailora.train.memory import format_bytes
from tailora.train.model_loading import check_writes_text, label_task_of_adapter

LOGGER = logging.getLogger(__name__)
LONGEST_NAME = 200
SCALE_MARK = "@"  # before the scale of an adapter
LARGEST_SCALE = 1e5  # a `lora_alpha` of 1,000 with r = 1, and a `lora_scale` of 100
MOST_SCALED = 64  # idle scaled adapters to keep; clients may request any number of them


@dataclass(frozen=True, slots=True)
class NamedAdapter:
    """An adapter that clients can request.

    created: when it was loaded or replaced, in seconds since 1970.
    """

    name: str
    path: Path
    trusted: bool  # the path comes from the command line, and may be anywhere
    key: str  # its name in the AdapterSet, with a hash of the files' content when they were last read
    system: str | None  # the system message used in training
    created: int = field(default_factory=lambda: int(time.time()))


@dataclass(eq=False, slots=True)
class _Resident:
    """An adapter in memory.

    source: the adapter that it scales, which stays in memory with it; None if it was read from files.
    """

    key: str
    size: int
    source: "_Resident | None" = None
    users: int = 0  # handles, and adapters that have this one as the source


class AdapterHandle(ExitStack):
    """Keeps an adapter in memory until it is closed, after the engine's Finish. key: its name in the AdapterSet."""

    def __init__(self, key: str | None, *on_close: Callable[[], None]) -> None:
        super().__init__()
        self.key = key
        for function in on_close:
            self.callback(function)


class AdapterRegistry:
    """The adapters of one engine by name. All methods may be called from any thread.

    `acquire`, `load` and `unload` may wait for files and for the engine; `AdapterHandle.close` never does.

    paused: `Engine.paused`, in which adapters are added and removed.
    root: the folder of all adapters that are not trusted; None to only allow trusted ones.
    memory_budget: bytes for adapters; None for no limit. Adapters that no request uses make room, the least recently
        used first, and are read again when a request needs them. While files are read, one more adapter is in memory.
    base_system: the system message that the base model was fully fine-tuned with, if any.
    """

    # _changes is held by the thread that reads files or changes the AdapterSet. _lock is held for moments, also by
    # threads that must not wait, so no thread waits for the engine or for files while holding it.

    def __init__(
        self,
        adapter_set: AdapterSet,
        paused: Callable[[], AbstractContextManager[None]],
        base_name: str,
        root: Path | None = None,
        memory_budget: int | None = None,
        base_system: str | None = None,
    ) -> None:
        self.base_name, self.base_system = base_name, base_system
        self._adapter_set, self._paused = adapter_set, paused
        self._root = None if root is None else Path(os.path.realpath(root))
        self._memory_budget: float = math.inf if memory_budget is None else memory_budget
        self._changes, self._lock = RLock(), Lock()
        self._base_fingerprint: dict[str, LayerFingerprint] = {}
        self._named: dict[str, NamedAdapter] = {}
        self._residents: OrderedDict[str, _Resident] = OrderedDict()  # by key, the least recently used first

    # ---- Names

    def load(self, name: str, path: str | Path, *, replace: bool = False, trusted: bool = False) -> None:
        """Reads, checks and adds an adapter. An error changes nothing.

        path: its folder or safetensors file; relative to the root.
        replace: the name may exist, and refers to the new adapter from now on.
        trusted: the path comes from the command line, and may be anywhere.
        Raises AdapterNotFoundError for a missing path, AdapterError for an invalid name, ConfigError for a path outside
        the root, a classification adapter or an overflow, MemoryLimitError, and the errors of `restore`.
        """
        with self._changes:
            self._check_new_name(name, replace=replace)
            self._remove_unnamed()
            self._register(*self._read(name, path, trusted))

    def unload(self, name: str) -> None:
        """Removes a name. Running requests finish with its adapter. Raises AdapterNotFoundError.

        An adapter in use leaves the memory at the next change after its last request.
        """
        with self._changes:
            self._find(name)
            with self._lock:
                del self._named[name]
            self._remove_unnamed()

    def list(self) -> tuple[NamedAdapter, ...]:
        """Returns all adapters, in the order in which their names were loaded."""
        with self._lock:
            return tuple(self._named.values())

    def in_memory(self) -> set[str]:
        """Returns the names of the adapters in memory."""
        with self._lock:
            return {named.name for named in self._named.values() if named.key in self._residents}

    def _find(self, name: str) -> NamedAdapter:
        if name in self._named:
            return self._named[name]
        if name == self.base_name:
            raise AdapterNotFoundError(f"{name!r} is the base model, not an adapter")
        names = (self.base_name, *self._named)
        raise AdapterNotFoundError(f"unknown model {name!r}; available: {', '.join(names)}{nearest(name, names)}")

    def _check_new_name(self, name: str, *, replace: bool) -> None:
        problems = []
        if not name or len(name) > LONGEST_NAME or not name.isprintable() or name != name.strip():
            problems.append(f"use 1 to {LONGEST_NAME} printable characters, without leading or trailing spaces")
        if SCALE_MARK in name:
            problems.append(f"{SCALE_MARK} is reserved for scales, as in legal@0.5")
        if name == self.base_name:
            problems.append(
                "the base model has this name; rename the base (--name NAME) or the adapter (--adapter NAME=PATH)"
            )
        if name in self._named and not replace:
            problems.append("an adapter with this name is already loaded; unload it, or replace it with load_inplace")
        if problems:
            raise AdapterError(f"invalid adapter name {name!r}: {listing(problems)}")

    def without_root(self, message: str) -> str:
        """Returns a message for clients, without the path of the root."""
        return (
            message
            if self._root is None
            else message.replace(f"{self._root}{os.sep}", "").replace(f"{self._root}", ".")
        )

    # ---- Requests

    def system_message(self, model: str) -> str | None:
        """Returns the system message that `model` was trained with; None without one. Raises as `acquire`."""
        name, _ = self._parse(model, None)
        return self.base_system if name is None else self._find(name).system

    def acquire(self, model: str, scale: float | None = None) -> AdapterHandle:
        """Loads `model` into memory, and returns a handle that keeps it there until it is closed.

        model: the base, or an adapter, which may have a scale: "legal@0.5".
        scale: multiplies it.
        Raises AdapterNotFoundError for an unknown name, ConfigError for a scale that is too large or not supported,
        MemoryInUseError, and the errors of `load` for files that have changed.
        """
        name, scale = self._parse(model, scale)
        if name is None:
            return AdapterHandle(None)
        with self._lock:
            handle = self._handle(name, scale)
        if handle is None:
            with self._changes:
                self._bring_into_memory(name, scale)
                with self._lock:
                    handle = self._handle(name, scale)
        assert handle is not None  # nothing is removed while this thread holds _changes
        return handle

    def _parse(self, model: str, scale: float | None) -> tuple[str | None, float]:
        """Returns the name of the adapter and its scale; None as the name for the base, also at scale 0."""
        if model == self.base_name:
            if scale not in (None, 1):
                raise ConfigError(
                    f"scale = {scale!r}: {model!r} is the base model and has no adapter to scale; remove the scale"
                )
            return None, 1.0
        name, mark, number = model.partition(SCALE_MARK)
        self._find(name)
        try:
            total = (float(number) if mark else 1.0) * (1.0 if scale is None else scale)
        except ValueError:
            total = math.nan
        if not math.isfinite(total):
            raise ConfigError(f"model = {model!r}: expected a finite scale, as in {name}@0.5")
        return name if total else None, total

    def _key(self, name: str, scale: float) -> str:
        key = self._find(name).key
        return key if scale == 1 else f"{key}{SCALE_MARK}{scale!r}"

    def _handle(self, name: str, scale: float) -> AdapterHandle | None:
        """Returns a handle if the adapter is in memory. Needs _lock."""
        resident = self._residents.get(self._key(name, scale))
        if resident is None:
            return None
        if resident.source is not None:
            self._residents.move_to_end(resident.source.key)
        self._residents.move_to_end(resident.key)
        resident.users += 1

        def release() -> None:
            with self._lock:
                resident.users -= 1

        return AdapterHandle(resident.key, release)

    # ---- Memory

    def _bring_into_memory(self, name: str, scale: float) -> None:
        """Reads the adapter if it is not in memory, and adds it at this scale. Needs _changes."""
        self._remove_unnamed()
        named = self._find(name)
        if named.key not in self._residents:
            now, adapter = self._read(name, named.path, named.trusted)
            if now.key == named.key:
                now = replace(now, created=named.created)
            else:
                LOGGER.warning("the files of adapter %r have changed; using the new ones", name)
            self._register(now, adapter)
        if self._key(name, scale) not in self._residents:
            self._add_scaled(name, scale)

    def _register(self, source: NamedAdapter, adapter: Adapter) -> None:
        """Adds an adapter that was read, unless its content is already in memory, and assigns it to its name."""
        if source.key not in self._residents:
            self._add(_Resident(source.key, size_of(adapter)), adapter)
        with self._lock:
            self._named[source.name] = source
        self._remove_unnamed()

    def _add_scaled(self, name: str, scale: float) -> None:
        """Adds a scaled adapter, which uses the tensors of its source. The source must be in memory."""
        source = self._residents[self._find(name).key]
        adapter = self._adapter_set[source.key]
        if adapter.saved:
            raise ConfigError(f"{name!r} has modules trained in full (modules_to_save); use it at scale 1")
        scaled = with_strength(adapter, scale)
        check_no_overflow(f"{name}{SCALE_MARK}{scale:g}", scaled, self._adapter_set.base_model)
        self._add(_Resident(self._key(name, scale), 0, source), scaled)

    def _add(self, resident: _Resident, adapter: Adapter) -> None:
        """Adds an adapter to the AdapterSet, after others have made room for it. Needs _changes."""
        check_compatible({**self._adapter_set.adapters, resident.key: adapter}, by_row=True)
        with self._lock:
            evicted = self._evict(resident)
            for other in evicted:
                self._forget(other)
        with self._paused():
            try:
                self._adapter_set.add(resident.key, adapter)
            finally:
                for other in evicted:
                    self._adapter_set.remove(other.key)
        with self._lock:
            self._residents[resident.key] = resident
            if resident.source is not None:
                resident.source.users += 1

    def _evict(self, resident: _Resident) -> Sequence[_Resident]:
        """Returns the adapters that make room for it. Needs _lock. Raises MemoryLimitError or MemoryInUseError."""
        self._check_size(resident.key.partition("#")[0], resident.size)
        users = {other: other.users for other in self._residents.values()}
        size = sum(other.size for other in users) + resident.size
        scaled = sum(other.source is not None for other in [*users, resident])
        evicted: list[_Resident] = []
        while (is_full := size > self._memory_budget) or scaled > MOST_SCALED:
            idle = (other for other in users if not users[other] and (is_full or other.source))
            other = next(idle, None)
            if other is None and not is_full:
                break  # all scaled adapters are in use
            if other is None:
                raise MemoryInUseError(
                    f"running requests use all of the memory for adapters ({format_bytes(self._memory_budget)}); try "
                    "again later, or start the server with a larger --adapter-memory"
                )
            del users[other]
            if other.source is not None:
                users[other.source] -= 1
                scaled -= 1
            size -= other.size
            evicted.append(other)
        return evicted

    def _check_size(self, name: str, size: int) -> None:
        if size > self._memory_budget:
            raise MemoryLimitError(
                f"adapter {name!r} needs {format_bytes(size)}; the limit for all adapters together is "
                f"{format_bytes(self._memory_budget)}. Start the server with a larger --adapter-memory, or shrink the "
                "adapter (tailora shrink)"
            )

    def _forget(self, resident: _Resident) -> None:
        """Call it before the removal from the AdapterSet. Needs _lock."""
        del self._residents[resident.key]
        if resident.source is not None:
            resident.source.users -= 1

    def _remove_unnamed(self) -> None:
        """Removes the adapters that no name refers to and no request uses. Needs _changes."""
        removed: list[_Resident] = []
        with self._lock:
            current = {named.key for named in self._named.values()}
            for resident in sorted(self._residents.values(), key=lambda resident: resident.source is None):
                key = (resident.source or resident).key
                if not resident.users and key not in current:
                    self._forget(resident)
                    removed.append(resident)
        if removed:
            with self._paused():
                for resident in removed:
                    self._adapter_set.remove(resident.key)

    # ---- Files

    def _path_in_root(self, path: str | Path) -> Path:
        """Returns the absolute path. Raises ConfigError for one outside the root, whether it exists or not."""
        if self._root is None:
            raise ConfigError(
                f"cannot load {str(path)!r}: this server has no adapter folder; start it with --adapters FOLDER"
            )
        real = None if "\0" in str(path) else Path(os.path.realpath(self._root / path))
        if real is None or not real.is_relative_to(self._root):
            raise ConfigError(
                f"adapter path {str(path)!r} is outside the server's adapter folder; use a path inside it"
            )
        return real

    def _read(self, name: str, path: str | Path, trusted: bool) -> tuple[NamedAdapter, Adapter]:
        """Reads and checks the files of an adapter, without changing anything."""
        path = Path(path).absolute() if trusted else self._path_in_root(path)
        folder = self._checked_folder(name, path, trusted)
        check_writes_text(str(folder), label_task_of_adapter(folder))
        base_model = self._adapter_set.base_model
        stored = read_any_format(folder, base_model)
        adapter = _for_inference(restore(stored, base_model, known_base=self._base_fingerprint))
        check_splits_by_row(adapter.low_rank)
        check_no_overflow(name, adapter, base_model)
        key = f"{name}#{digest_of(stored)[:16]}"
        return NamedAdapter(name, path, trusted, key, read_system_message(folder)), adapter

    def _checked_folder(self, name: str, path: Path, trusted: bool) -> Path:
        """Returns the folder or file of the adapter, after checking access, format and size."""
        if not os.path.exists(path):
            raise AdapterNotFoundError(f"adapter {name!r}: {path} does not exist; use an adapter folder")
        try:
            folder = adapter_folder(path)
            files = [folder] if folder.is_file() else sorted(folder.iterdir())
            size = sum(file.stat().st_size for file in files if file.suffix == ".safetensors" and file.is_file())
        except OSError as error:
            raise FormatError(
                f"adapter {name!r}: cannot read {path} ({error.strerror or error}); check its permissions"
            ) from None
        for file in files if not trusted else ():
            self._path_in_root(file)  # a link within the folder may lead outside
        names = {file.name for file in files}
        if GGUF_WEIGHTS in names and not names & {ADAPTER_WEIGHTS, MLX_WEIGHTS}:
            raise FormatError(f"{folder} only contains a GGUF file; use the adapter's safetensors files")
        self._check_size(name, size // 2)  # before all of it is read; float64 tensors become float32
        return folder


@torch.no_grad()
def check_no_overflow(name: str, adapter: Adapter, base_model: nn.Module) -> None:
    """Raises ConfigError if an update has a scale over LARGEST_SCALE, or is not finite in the model's precision."""
    dtype = next(parameter.dtype for parameter in base_model.parameters() if parameter.is_floating_point())
    tensors: dict[str, Tensor] = {}
    for path, part in adapter.low_rank.items():
        if (scale := abs(float(part.scaling) * part.strength)) > LARGEST_SCALE:
            raise ConfigError(
                f"adapter {name!r} scales its update of {path} by {scale:g}; the limit is {LARGEST_SCALE:g}, "
                "including lora_alpha / r. Use a smaller scale"
            )
        terms = vars(layer_terms(part, find_layer(base_model, path)[1], dtype))
        tensors |= {f"{path}.{key}": tensor for key, tensor in terms.items() if tensor is not None}
    if overflown := not_finite(tensors):
        raise ConfigError(
            f"adapter {name!r} overflows {str(dtype).removeprefix('torch.')} at {', '.join(overflown[:3])} "
            f"({len(overflown)} in total); use a smaller scale"
        )


def digest_of(stored: StoredAdapter) -> str:
    """Returns a hash of the content, by xxh3_128: SHA-256 would add half of the remaining loading time."""
    in_order = sorted(stored.tensors.items())
    shapes = [(key, str(tensor.dtype), tuple(tensor.shape)) for key, tensor in in_order]
    digest = xxh3_128(json.dumps([stored.settings, stored.metadata.to_json(), shapes], sort_keys=True).encode())
    for _, tensor in in_order:
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def size_of(adapter: Adapter) -> int:
    """Returns the bytes of its tensors; shared ones count once."""
    tensors = {id(tensor): tensor for part in adapter.parts.values() for _, tensor in named_tensors(part)}
    return sum(tensor.nbytes for tensor in tensors.values())


def _for_inference(adapter: Adapter) -> Adapter:
    for part in adapter.parts.values():
        part.requires_grad_(False).eval()  # without dropout
    return adapter
