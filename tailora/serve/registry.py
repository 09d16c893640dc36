"""AdapterRegistry: the adapters that a server knows by name, and which of them are in memory.

A request asks for a model: the base, an adapter, an adapter with a scale ("legal@0.5"), or a mixture
("legal+chat@0.5"). `acquire` gives the key of what computes it in the engine's AdapterSet, and keeps that in memory
until the handle is released. A key has the hash of the adapter's content, so that an adapter is replaced at once for
new requests, while those in flight end with the one that they began with.

Files are read and checked while the engine computes; it is paused only while an adapter is added or removed.
"""

import json
import logging
import math
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock, RLock, Thread
from types import TracebackType
from typing import Self

import torch
from xxhash import xxh3_128

from tailora.core.adapter import Adapter, check_compatible, with_strength
from tailora.core.adapter_set import AdapterSet
from tailora.core.combine import Combination, combine_adapters
from tailora.core.mixed_batch import check_splits_by_row
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
from tailora.formats.load import named_tensors, read_any_format, restore
from tailora.formats.metadata import LayerFingerprint
from tailora.formats.peft import StoredAdapter
from tailora.formats.run_folder import ADAPTER_WEIGHTS, GGUF_WEIGHTS, MLX_WEIGHTS, adapter_folder
from tailora.train.model_loading import check_writes_text, label_task_of_adapter

LOGGER = logging.getLogger(__name__)
LONGEST_NAME = 200
RESERVED = "+@"  # of mixtures and scales
MOST_DERIVED = 64  # scaled adapters and mixtures that are kept without a request: clients may ask for any number


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """What `list` tells of an adapter.

    created: when it was loaded or replaced, in seconds since 1970.    size: in memory, in bytes.
    ranks: all ranks of its layers.    requests: how many use it, also within scaled adapters and mixtures.
    """

    name: str
    digest: str
    created: int
    size: int
    ranks: tuple[int, ...]
    in_memory: bool
    pinned: bool
    requests: int


@dataclass(frozen=True, slots=True)
class _Source:
    """A name, the files that it means, and their content when they were read last."""

    name: str
    path: Path
    trusted: bool
    digest: str
    size: int
    ranks: tuple[int, ...]
    created: int = field(default_factory=lambda: int(time.time()))
    pinned: bool = False

    @property
    def key(self) -> str:
        return f"{self.name}#{self.digest[:16]}"


@dataclass(eq=False, slots=True)
class _Resident:
    """An adapter in memory.

    source_keys: keys of the adapters that it is made of; its own key if it was read from files.
    shared: the adapter whose tensors it uses; None for one that has its own.
    users: handles, and adapters that use its tensors.
    is_retired: no name means it any more; it is removed after the last user.
    """

    key: str
    size: int
    source_keys: tuple[str, ...]
    shared: "_Resident | None" = None
    users: int = 0
    is_retired: bool = False

    @property
    def is_derived(self) -> bool:
        return self.source_keys != (self.key,)


class AdapterHandle:
    """Keeps an adapter in memory for a request. Release it after the engine's Finish; a second release does nothing.

    key: the adapter's name in the AdapterSet; None for the base.
    """

    def __init__(self, key: str | None, release: Callable[[], None]) -> None:
        self.key = key
        self._release: Callable[[], None] | None = release
        self._lock = Lock()

    def release(self) -> None:
        with self._lock:
            release, self._release = self._release, None
        if release is not None:
            release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.release()


class AdapterRegistry:
    """The adapters of one engine by name. All methods may be called from any thread.

    `acquire` and what changes adapters may wait for files and for the engine; `AdapterHandle.release` never does.

    adapter_set: the engine's.    paused: gives the context in which adapters are added and removed, `Engine.paused`.
    base_name: what requests call the base model.
    root: the folder in which all adapters lie, but trusted ones; None allows only these.
    memory_budget: bytes for adapters; None for no limit. Adapters that no request uses make room, the least recently
        used first, and come back when a request asks for them. While files are read, one adapter more is in memory.
    """

    # _changes is held by the thread that reads files or changes the AdapterSet; _lock for moments, also by those that
    # must not wait: nobody waits for the engine or for files while holding it.

    def __init__(
        self,
        adapter_set: AdapterSet,
        paused: Callable[[], AbstractContextManager[None]],
        base_name: str,
        root: Path | None = None,
        memory_budget: int | None = None,
    ) -> None:
        self.base_name = base_name
        self._adapter_set, self._paused = adapter_set, paused
        self._root = None if root is None else Path(os.path.realpath(root))
        self._memory_budget = memory_budget
        self._changes, self._lock = RLock(), Lock()
        self._base_fingerprint: dict[str, LayerFingerprint] = {}
        self._sources: dict[str, _Source] = {}
        self._residents: OrderedDict[str, _Resident] = OrderedDict()  # by key, the least recently used first

    # ---- Names

    def load(self, name: str, path: str | Path, *, replace: bool = False, trusted: bool = False) -> AdapterInfo:
        """Reads, checks and adds an adapter. After an error everything is as it was.

        path: of its folder or safetensors file; a relative one is within the root.
        replace: the name may exist, and means the new adapter from now on.
        trusted: the path comes from the command line, and may lie anywhere.
        Raises AdapterNotFoundError for a path that does not exist, AdapterError for a name that is taken or cannot be
        one, ConfigError for a path outside of the root or an adapter that predicts labels, FormatError,
        BaseMismatchError, RowsError and TargetError for an adapter that does not fit, MemoryLimitError for one that is
        too large.
        """
        with self._changes:
            self._check_new_name(name, replace=replace)
            path = Path(path).absolute() if trusted else self._path_in_root(path)
            source, adapter = self._read(name, path, trusted=trusted)
            before = self._sources.get(name)
            self._register(replace_pin(source, before), adapter)
            return self._info(self._sources[name])

    def unload(self, name: str) -> None:
        """Forgets a name. Requests in flight end with its adapter. Raises AdapterNotFoundError."""
        with self._changes:
            self._source(name)
            with self._lock:
                del self._sources[name]
            self._remove_retired()

    def list(self) -> tuple[AdapterInfo, ...]:
        """Returns all adapters, in the order in which their names were loaded."""
        with self._lock:
            sources = [*self._sources.values()]
        return tuple(self._info(source) for source in sources)

    def pin(self, name: str) -> None:
        """Keeps an adapter in memory. Raises AdapterNotFoundError, and as `load` if it must be read again."""
        self._source(name)
        with self._changes, self.acquire(name), self._lock:
            self._sources[name] = replace(self._sources[name], pinned=True)

    def unpin(self, name: str) -> None:
        """Lets an adapter make room for others. Raises AdapterNotFoundError."""
        with self._changes:
            source = self._source(name)
            with self._lock:
                self._sources[name] = replace(source, pinned=False)

    def _source(self, name: str) -> _Source:
        source = self._sources.get(name)
        if source is None and name == self.base_name:
            raise AdapterNotFoundError(f"{name!r} is the base model, not an adapter")
        if source is None:
            names = (self.base_name, *self._sources)
            raise AdapterNotFoundError(
                f"no model is called {name!r}; there are: {', '.join(names)}{nearest(name, names)}"
            )
        return source

    def _check_new_name(self, name: str, *, replace: bool) -> None:
        problems = []
        if not name or len(name) > LONGEST_NAME or not name.isprintable() or name != name.strip():
            problems.append(f"take a name of 1 to {LONGEST_NAME} printable characters")
        if reserved := [character for character in RESERVED if character in name]:
            problems.append(f"{' and '.join(reserved)} stand for mixtures and scales, as in legal+chat@0.5")
        if name == self.base_name:
            problems.append(
                "this is the name of the base model; give the base another one, --name NAME, or the adapter, "
                "--adapter NAME=PATH"
            )
        if name in self._sources and not replace:
            problems.append("an adapter has this name already: unload it, or replace it (load_inplace)")
        if problems:
            raise AdapterError(f"an adapter cannot be called {name!r}: {listing(problems)}")

    def _info(self, source: _Source) -> AdapterInfo:
        with self._lock:
            resident = self._residents.get(source.key)
            made_of_it = [other for other in self._residents.values() if source.key in other.source_keys]
            requests = sum(other.users for other in made_of_it) - sum(other.shared is resident for other in made_of_it)
        return AdapterInfo(
            *(source.name, source.digest, source.created, source.size, source.ranks),
            *(resident is not None, source.pinned, requests),
        )

    def without_root(self, message: str) -> str:
        """Returns a message for clients, whom the path of the root does not concern."""
        return message if self._root is None else message.replace(f"{self._root}{os.sep}", "")

    # ---- Requests

    def acquire(self, model: str, scale: float | None = None) -> AdapterHandle:
        """Returns the handle of what computes `model`, which is in memory until the handle is released.

        model: the base, an adapter, or several with their scales: "legal+chat@0.5" is legal + 0.5 chat.
        scale: multiplies all of them.
        Raises AdapterNotFoundError for an unknown name or files that are gone, ConfigError for what cannot be computed
        exactly, MemoryInUseError if requests use all of the memory for adapters, and as `load` for files that have
        changed.
        """
        weights = self._weights(model, scale)
        with self._lock:
            handle = self._handle(weights)
        if handle is None:
            with self._changes:
                self._bring_into_memory(weights)
                with self._lock:
                    handle = self._handle(weights)
        assert handle is not None  # nothing is removed while this thread has _changes
        return handle

    def _weights(self, model: str, scale: float | None) -> dict[str, float]:
        """Returns the scale of every adapter in `model`, without those that it turns off; {} is the base."""
        if scale is not None and not math.isfinite(scale):
            raise ConfigError(f"scale = {scale!r}; take a finite number, 1 is as trained")
        if model == self.base_name:
            if scale not in (None, 1):
                raise ConfigError(f"scale = {scale!r}: {model!r} is the base, without an adapter; leave the scale out")
            return {}
        weights: dict[str, float] = {}
        problems = []
        for term in model.split("+"):
            name, at, number = term.partition("@")
            self._source(name)
            if name in weights:
                problems.append(f"{name!r} is in it twice; add its scales up")
            try:
                weights[name] = float(number) if at else 1.0
            except ValueError:
                problems.append(f"the scale of {name!r} is {number!r}; take a number, as in {name}@0.5")
                continue
            weights[name] *= 1.0 if scale is None else scale
            if not math.isfinite(weights[name]):
                problems.append(f"the scale of {name!r} is {weights[name]}; take a finite number")
        if problems:
            raise ConfigError(f"model = {model!r}: {listing(problems)}")
        return {name: weight for name, weight in sorted(weights.items()) if weight}

    def _key(self, weights: Mapping[str, float]) -> str:
        """Returns the key of the sum of the adapters, which has their contents."""
        keys = [self._source(name).key for name in weights]
        return "+".join(
            key if weight == 1 else f"{key}@{weight!r}" for key, weight in zip(keys, weights.values(), strict=True)
        )

    def _handle(self, weights: Mapping[str, float]) -> AdapterHandle | None:
        """Returns a handle if the adapter is in memory. Is called with _lock."""
        if not weights:
            return AdapterHandle(None, lambda: None)
        resident = self._residents.get(self._key(weights))
        if resident is None:
            return None
        for used in (resident.shared, resident):  # what shares tensors makes room before their owner
            if used is not None:
                self._residents.move_to_end(used.key)
        resident.users += 1
        return AdapterHandle(resident.key, lambda: self._release(resident))

    def _release(self, resident: _Resident) -> None:
        with self._lock:
            resident.users -= 1
            is_removed = resident.is_retired and not resident.users
        if is_removed:  # in a thread of its own: the caller may be the engine's thread, which this waits for
            Thread(target=self._remove_retired, name="remove adapters", daemon=True).start()

    # ---- Memory

    def _bring_into_memory(self, weights: Mapping[str, float]) -> None:
        """Reads the adapters of `weights` that are not in memory, and makes their sum. Is called with _changes."""
        with ExitStack() as stack:
            for name in weights:
                if self._source(name).key not in self._residents:
                    self._read_again(self._source(name))
                stack.enter_context(self.acquire(name))  # so that the next one does not take its place
            key = self._key(weights)
            if key not in self._residents:
                self._derive(key, weights)

    def _read_again(self, source: _Source) -> None:
        path = source.path if source.trusted else self._path_in_root(source.path)
        now, adapter = self._read(source.name, path, trusted=source.trusted)
        if now.digest != source.digest:
            LOGGER.warning("the files of adapter %r have changed since it was loaded; the new ones are used", now.name)
        else:
            now = replace(now, created=source.created)
        self._register(replace_pin(now, source), adapter)

    def _register(self, source: _Source, adapter: Adapter) -> None:
        """Adds an adapter that was read, unless its content is in memory, and lets its name mean it."""
        if source.key not in self._residents:
            self._add(_Resident(source.key, source.size, (source.key,)), adapter)
        with self._lock:
            self._sources[source.name] = source
        self._remove_retired()

    def _derive(self, key: str, weights: Mapping[str, float]) -> None:
        """Adds a scaled adapter or a mixture of adapters that are in memory."""
        sources = {name: self._source(name).key for name in weights}
        adapters = {name: self._adapter_set[source_key] for name, source_key in sources.items()}
        source_keys = tuple(sources.values())
        if len(weights) == 1 and not any(adapter.saved for adapter in adapters.values()):
            [(name, weight)] = weights.items()
            resident = _Resident(key, 0, source_keys, shared=self._residents[sources[name]])
            self._add(resident, with_strength(adapters[name], weight))
            return
        check_linear(adapters)
        mixture, _ = combine_adapters(adapters.__getitem__, weights, self._adapter_set.base_model, Combination("cat"))
        mixture = _for_inference(mixture)
        self._add(_Resident(key, size_of(mixture), source_keys), mixture)

    def _add(self, resident: _Resident, adapter: Adapter) -> None:
        """Adds an adapter to the AdapterSet, after others have made room for it. Is called with _changes."""
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
            if resident.shared is not None:
                resident.shared.users += 1

    def _evict(self, resident: _Resident) -> Sequence[_Resident]:
        """Returns the adapters that make room for this one. Is called with _lock.

        Raises MemoryLimitError if it is too large, MemoryInUseError if it has to wait for requests.
        """
        budget = math.inf if self._memory_budget is None else self._memory_budget
        if resident.size > budget:
            raise _too_large(resident.key.partition("#")[0], resident.size, self._memory_budget)
        pinned = {source.key for source in self._sources.values() if source.pinned}
        users = {other: other.users for other in self._residents.values()}
        size = sum(other.size for other in users) + resident.size
        derived = sum(other.is_derived for other in users) + resident.is_derived
        evicted: list[_Resident] = []
        while size > budget or derived > MOST_DERIVED:
            idle = (other for other in users if not users[other] and other.key not in pinned)
            other = next((other for other in idle if size > budget or other.is_derived), None)
            if other is None and size <= budget:
                break  # all scaled adapters and mixtures are in use
            if other is None:
                raise MemoryInUseError(
                    f"the memory for adapters, {_megabytes(self._memory_budget)}, is full of adapters that are pinned "
                    "or that requests use; try again later, unpin one, or give more memory"
                )
            del users[other]
            if other.shared in users:
                users[other.shared] -= 1
            size, derived = size - other.size, derived - other.is_derived
            evicted.append(other)
        return evicted

    def _forget(self, resident: _Resident) -> None:
        """Is called with _lock, before the adapter is removed from the AdapterSet."""
        del self._residents[resident.key]
        if resident.shared is not None:
            resident.shared.users -= 1

    def _remove_retired(self) -> None:
        """Removes the adapters that no name means any more and no request uses; marks those in use."""
        removed: list[_Resident] = []
        with self._changes:
            with self._lock:
                current = {source.key for source in self._sources.values()}
                for resident in self._residents.values():
                    resident.is_retired = not current.issuperset(resident.source_keys)
                # Those that share tensors are younger than their owners, and are users of them
                for resident in sorted(self._residents.values(), key=lambda resident: resident.shared is None):
                    if resident.is_retired and not resident.users:
                        self._forget(resident)
                        removed.append(resident)
            if removed:
                with self._paused():
                    for resident in removed:
                        self._adapter_set.remove(resident.key)

    # ---- Files

    def _path_in_root(self, path: str | Path) -> Path:
        """Returns the absolute path. Raises ConfigError for one outside of the root, whether it exists or not."""
        if self._root is None:
            raise ConfigError(
                f"adapter path {str(path)!r}: this server has no folder for adapters; start it with --adapters FOLDER"
            )
        real = None if "\0" in str(path) else Path(os.path.realpath(self._root / path))
        if real is None or not real.is_relative_to(self._root):
            raise ConfigError(f"adapter path {str(path)!r} leads outside of the server's folder for adapters")
        return real

    def _read(self, name: str, path: Path, *, trusted: bool) -> tuple[_Source, Adapter]:
        """Reads and checks the files of an adapter, without changing anything."""
        folder = self._checked_folder(name, path, trusted=trusted)
        check_writes_text(str(folder), label_task_of_adapter(folder))
        base_model = self._adapter_set.base_model
        stored = read_any_format(folder, base_model)
        adapter = _for_inference(restore(stored, base_model, known_base=self._base_fingerprint))
        check_splits_by_row(adapter.low_rank)
        ranks = tuple(sorted({layer.r for layer in adapter.low_rank.values()}))
        return _Source(name, path, trusted, digest_of(stored), size_of(adapter), ranks), adapter

    def _checked_folder(self, name: str, path: Path, *, trusted: bool) -> Path:
        """Returns the folder or file of the adapter, if it may be read."""
        if not os.path.exists(path):
            raise AdapterNotFoundError(f"adapter {name!r}: {path} does not exist; give a folder of an adapter")
        try:
            folder = adapter_folder(path)
            files = [folder] if folder.is_file() else sorted(folder.iterdir())
            size = sum(tensor_bytes(file) for file in files if file.suffix == ".safetensors" and file.is_file())
        except OSError as error:
            raise FormatError(
                f"adapter {name!r}: {path} cannot be read ({error.strerror or error}): check who may read it"
            ) from None
        for file in files if not trusted else ():
            self._path_in_root(file)  # a link within the folder may lead outside
        names = {file.name for file in files}
        if GGUF_WEIGHTS in names and not names & {ADAPTER_WEIGHTS, MLX_WEIGHTS}:
            raise FormatError(f"{folder} holds a GGUF file; the server reads adapters as safetensors only")
        least_size = size // 2  # of float64, which is converted to float32
        if self._memory_budget is not None and least_size > self._memory_budget:
            raise _too_large(name, least_size, self._memory_budget)
        return folder


def replace_pin(source: _Source, before: _Source | None) -> _Source:
    return source if before is None else replace(source, pinned=before.pinned)


def check_linear(adapters: Mapping[str, Adapter]) -> None:
    """Raises ConfigError for adapters whose sum with others is no adapter, or that cannot be scaled."""
    problems = []
    for name, adapter in adapters.items():
        if any(layer.lora_magnitude_vector is not None for layer in adapter.low_rank.values()):
            problems.append(f"{name!r} is DoRA, which scales whole rows of the weights: it is no term of a sum")
        if adapter.extras:
            problems.append(f"{name!r} trains biases or rows of an embedding, which are not added up")
    if problems:
        raise ConfigError(f"this mixture cannot be computed exactly: {listing(problems)}")


def digest_of(stored: StoredAdapter) -> str:
    """Returns a hash of an adapter's settings, metadata and tensors, as they were read.

    It tells versions of one name apart. SHA-256 would take as long as half of the rest of loading.
    """
    in_order = sorted(stored.tensors.items())
    shapes = [(key, str(tensor.dtype), tuple(tensor.shape)) for key, tensor in in_order]
    digest = xxh3_128(json.dumps([stored.settings, stored.metadata.to_json(), shapes], sort_keys=True).encode())
    for _, tensor in in_order:
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tensor_bytes(file: Path) -> int:
    """Returns how many bytes of a safetensors file are tensors, without reading them."""
    with file.open("rb") as opened:
        header = int.from_bytes(opened.read(8), "little")
    return max(0, file.stat().st_size - 8 - header)


def size_of(adapter: Adapter) -> int:
    """Returns the bytes of its tensors; those that parts share count once."""
    tensors = {id(tensor): tensor for part in adapter.parts.values() for _, tensor in named_tensors(part)}
    return sum(tensor.nbytes for tensor in tensors.values())


def _for_inference(adapter: Adapter) -> Adapter:
    for part in adapter.parts.values():
        part.requires_grad_(False).eval()  # without dropout
    return adapter


def _too_large(name: str, size: int, budget: int | None) -> MemoryLimitError:
    return MemoryLimitError(
        f"adapter {name!r} takes {_megabytes(size)}, and all adapters together may take {_megabytes(budget)}; give "
        "more memory, or shrink it (tailora shrink)"
    )


def _megabytes(size: int | None) -> str:
    return "any size" if size is None else f"{size / 1e6:,.1f} MB" if size >= 1e6 else f"{size / 1e3:,.1f} kB"
