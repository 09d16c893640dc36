"""How much memory there is, and what code would allocate.

`train.memory_estimate` estimates a run without loading the model, by a `MemoryTracker` on tensors without contents.
"""

import ctypes
import gc
import os
import platform
import sys
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

from tailora.errors import MemoryLimitError, is_out_of_memory
from tailora.kernels import cpu_attention
from tailora.kernels.cpu_attention import split_documents

CGROUP, CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")  # the groups of this process; all groups
CGROUP_FILES = {  # folder of a version -> its files of limit and use, and the files in memory that can be dropped
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
STATUS = Path("/proc/self/status")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
KEPT_BYTES, MMAP_BYTES = 256 * 2**20, 32 * 2**20  # glibc takes no larger threshold for mmap


# ---- What there is, of a device or, for a CPU, of this process


def peak_bytes(device: torch.device) -> int:
    """Returns the most memory used so far, of the device or this process; on MPS, what torch took from the system."""
    if device.type == "mps":
        return int(torch.mps.driver_allocated_memory())
    if device.type != "cpu":
        return int(torch.get_device_module(device).max_memory_allocated(device))
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    if STATUS.exists():  # on Linux, where ru_maxrss starts at the peak of the process that started this one
        return int(STATUS.read_text().split("VmHWM:")[1].split()[0]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_peak(device: torch.device) -> None:
    """Starts a new peak, so that earlier runs in this process do not count. On a CPU the peak cannot be reset."""
    if device.type == "mps":
        torch.mps.empty_cache()
    elif device.type != "cpu":
        torch.get_device_module(device).reset_peak_memory_stats(device)


def keep_freed_memory(device: torch.device) -> None:
    """Lets glibc's malloc keep up to 256 MB that are free, so that a step does not fault in its pages again.

    By default it returns them to the system after every layer, which takes 7% of a step. Does nothing where the
    environment sets malloc, with another C library, and on other devices.
    """
    is_set = "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "") or any(
        name.startswith("MALLOC_") and name != "MALLOC_ARENA_MAX" for name in os.environ
    )
    if device.type != "cpu" or is_set or platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
    libc.mallopt(M_MMAP_THRESHOLD, MMAP_BYTES)


def return_freed_memory() -> None:
    """Returns what `keep_freed_memory` keeps to the system, before something else needs the memory."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def return_cached_memory() -> None:
    """Returns what torch caches of the accelerator's memory to the system, before another process needs it."""
    gc.collect()  # some models refer to themselves
    if (device := torch.accelerator.current_accelerator()) is not None:
        torch.get_device_module(device).empty_cache()


def used_bytes(device: torch.device) -> int:
    """Returns the memory that this process uses now, of the device or on a CPU."""
    if device.type == "mps":
        return int(torch.mps.current_allocated_memory())
    if device.type != "cpu":
        return int(torch.get_device_module(device).memory_allocated(device))
    return int(psutil.Process().memory_info().rss)


def available_bytes(device: torch.device) -> int:
    """Returns the memory that can still be allocated: on a CPU within its limits, on MPS as much as recommended."""
    if device.type == "mps":
        used, taken = torch.mps.current_allocated_memory(), torch.mps.driver_allocated_memory()
        free = [torch.mps.recommended_max_memory() - used, psutil.virtual_memory().available + taken - used]
        return max(int(min(free)), 0)
    if device.type != "cpu":
        module = torch.get_device_module(device)
        idle = int(module.memory_reserved(device) - module.memory_allocated(device))  # torch's, for its next tensors
        try:
            return int(module.mem_get_info(device)[0]) + idle
        except RuntimeError:  # of an Intel GPU under WSL2, whose driver does not tell
            return int(module.get_device_properties(device).total_memory) - int(module.memory_allocated(device))
    free = [int(psutil.virtual_memory().available), *_free_in_cgroups()]
    return max(min(free), 0)


def total_bytes(device: torch.device) -> int:
    """Returns the memory that the device has; of MPS what the system recommends, of the memory that both share."""
    if device.type == "cpu":
        return int(psutil.virtual_memory().total)
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory())
    return int(torch.get_device_module(device).get_device_properties(device).total_memory)


def _free_in_cgroups() -> list[int]:
    """Returns what is free in each control group of this process that has a limit, and in each group around it."""
    free = []
    for line in CGROUP.read_text().splitlines() if CGROUP.exists() else ():
        _, controllers, path = line.split(":", 2)
        version = "memory" if "memory" in controllers.split(",") else controllers
        if version not in CGROUP_FILES:
            continue
        limit, used, droppable = CGROUP_FILES[version]
        inside = Path(path.lstrip("/"))
        for group in (CGROUPS / version / part for part in (inside, *inside.parents)):
            # in a container the path may be the host's, and only its top folder may exist
            if (group / limit).exists() and (text := (group / limit).read_text().strip()).isdigit():
                counts = (group / "memory.stat").read_text().split()
                free.append(int(text) - int((group / used).read_text()) + int(counts[counts.index(droppable) + 1]))
    return free


@contextmanager
def explain_out_of_memory(doing: str, advice: str | Callable[[], str]) -> Iterator[None]:
    """Within the block, running out of memory raises MemoryLimitError with the cause and what helps."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        cause = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
        helps = advice if isinstance(advice, str) else advice()
        raise MemoryLimitError(f"out of memory while {doing}: {cause}\n{helps}") from error


def format_bytes(count: float) -> str:
    """Returns bytes in a readable unit: 1,234,567 -> '1.23 MB'."""
    for unit in ("bytes", "kB", "MB"):
        if abs(count) < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB" if abs(count) < 999.5 else f"{count:,.0f} GB"


# ---- What code allocates, counted on tensors without contents
#
# torch's fake tensors have shape, type and device but no memory; every operator runs on them, forward and backward. So
# the largest sum includes temporaries. What an operator allocates internally is not seen,
# nor how an allocator rounds and keeps blocks.

aten = torch.ops.aten
EQUAL, ITEM, DEVICE = aten.equal.default, aten._local_scalar_dense.default, torch.ops.prim.device.default
ROUNDING = 512  # bytes: sizes that torch's allocators for devices give out are multiples


def tensors_of(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yields the tensors among arguments or results, also those in lists. torch's trees do it at twice the cost."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_of(value)


class MemoryTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within this mode, storages that operators allocate are counted under the part that `part_of` names.

    known: tensors whose storages are counted elsewhere.
    now, peak: bytes of each part, at present and at the moment of the largest sum.
    sum_of_peaks: the most bytes that malloc has from the system. It gives large blocks (MMAP_BYTES or more) back when
    they are freed, and keeps the memory of all others. So this is the largest sum of the large blocks, plus the largest
    sum of the others, also if these were at different moments.
    """

    def __init__(self, known: Iterable[Tensor], part_of: Callable[[Tensor], str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._part_of = part_of
        self._alive = {id(tensor.untyped_storage()): ("", 0) for tensor in known}
        self._largest = 0
        self._blocks, self._most = Counter[bool](), Counter[bool]()  # whether large -> bytes, and at most

    @property
    def sum_of_peaks(self) -> int:
        return self._most.total()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in ON_CPU and args[0].device.type == "cpu":  # what they allocate inside counts, too
            with self:
                return ON_CPU[func](*args, **kwargs)
        out = func(*args, **kwargs)
        if func is DEVICE:
            return out
        inputs, outputs = list(tensors_of(args)), list(tensors_of((out,)))
        for output in outputs:
            self._add(output)
        if torch.Tag.pointwise in func.tags:
            self._add_conversions(inputs, outputs)
        return out

    def _add_conversions(self, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """On a CPU a pointwise operator on several dtypes copies all to the widest while it runs."""
        several = [tensor for tensor in (*inputs, *outputs) if tensor.ndim and tensor.is_floating_point()]
        if len({tensor.dtype for tensor in several}) < 2 or several[0].device.type != "cpu":
            return
        widest = max((tensor.dtype for tensor in several), key=lambda dtype: dtype.itemsize)
        size = sum(tensor.numel() * widest.itemsize for tensor in several if tensor.dtype != widest)
        if self.now.total() + size > self._largest:
            part = self._part_of(several[0])
            self._largest, self.peak = self.now.total() + size, self.now + Counter({part: size})

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if id(storage) in self._alive:
            return
        part, size = self._part_of(tensor), storage.nbytes()
        if tensor.device.type != "cpu":
            size = -(-size // ROUNDING) * ROUNDING
        self._alive[id(storage)] = part, size
        weakref.finalize(storage, self._subtract, id(storage))
        self.now[part] += size
        if self.now.total() > self._largest:
            self._largest, self.peak = self.now.total(), self.now.copy()
        is_large = size >= MMAP_BYTES
        self._blocks[is_large] += size
        self._most[is_large] = max(self._most[is_large], self._blocks[is_large])

    def _subtract(self, key: int) -> None:
        part, size = self._alive.pop(key)
        self.now[part] -= size
        self._blocks[size >= MMAP_BYTES] -= size


class _RealInputsComputed(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Computes operators on real tensors for real: lengths, masks and indices decide what else is computed.

    A condition on fake tensors cannot be computed and is taken to be True: "all are equal", "all are finite".
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [*tensors_of(args), *tensors_of(kwargs.values())]
        if inputs and not any(isinstance(tensor, FakeTensor) for tensor in inputs):
            with no_dispatch():
                return func(*args, **kwargs)
        if func is EQUAL or (func is ITEM and inputs[0].dtype == torch.bool):
            return True
        return func(*args, **kwargs)


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Within the block, new tensors have no contents."""
    split_documents.cache_clear()  # cached index tensors must not pass between real and fake runs
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), _RealInputsComputed(), warnings.catch_warnings():  # type: ignore[no-untyped-call]
            warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")  # in deepcopy
            yield
    finally:
        split_documents.cache_clear()


def needs_contents(error: RuntimeError) -> bool:
    """Returns whether code failed within `fake_tensors` because it reads numbers that it computed."""
    if isinstance(error, DataDependentOutputException | DynamicOutputShapeException):
        return True
    messages = "its data is not allocated yet", ".numpy() is not supported for tensor subclasses"
    return any(message in str(error) for message in messages)


PACKED, PACKED_BACKWARD = (
    torch.ops.tailora.packed_attention.default,
    torch.ops.tailora.packed_attention_backward.default,
)
ON_CPU: dict[Any, Callable[..., Any]] = {PACKED: cpu_attention.forward, PACKED_BACKWARD: cpu_attention.backward}
