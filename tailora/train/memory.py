"""How much memory there is, how much the forward of a loaded model keeps, and what helps if that is too much.

`measure_cost` counts what a forward of the loaded model keeps for its backward. Without temporaries that is a lower
bound: it can only show that a run does not fit. `train.estimate` estimates a whole run without loading the model.
"""

import ctypes
import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import psutil
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

from tailora.core.device import device_name
from tailora.core.quantization import dense_shape, inner_tensors, quantized_layers, stored_tensors
from tailora.errors import MemoryLimitError, is_out_of_memory

CGROUP, CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")  # the groups of this process; all groups
CGROUP_FILES = {  # folder of a version -> its files of limit and use, and the files in memory that can be dropped
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
STATUS = Path("/proc/self/status")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
ACTIVATION_MEMORY = 0.4  # that is recommended: the smallest that was measured; it costs little time
KEPT_BYTES, MMAP_BYTES = 256 * 2**20, 32 * 2**20  # glibc takes no larger threshold for mmap


# ---- What there is, of a device or, for a CPU, of this process


def peak_bytes(device: torch.device) -> int:
    """Returns the most memory used so far: of the device, or of this process on a CPU.

    MPS keeps no peak: what torch has taken from the system stands for it, since torch gives nothing back by itself.
    """
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


def used_bytes(device: torch.device) -> int:
    """Returns the memory that this process uses now, of the device or on a CPU."""
    if device.type == "mps":
        return int(torch.mps.current_allocated_memory())
    if device.type != "cpu":
        return int(torch.get_device_module(device).memory_allocated(device))
    return int(psutil.Process().memory_info().rss)


def available_bytes(device: torch.device) -> int:
    """Returns the memory that can still be allocated; on a CPU within the limits of containers and of the process.

    MPS shares the system's memory, of which torch takes as much as the system recommends for a GPU.
    """
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
    free = [int(psutil.virtual_memory().available), *_free_in_cgroups(), *_free_in_process()]
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
            # in a container the path may be that of the host, of which only the top is there
            if (group / limit).exists() and (text := (group / limit).read_text().strip()).isdigit():
                counts = (group / "memory.stat").read_text().split()
                free.append(int(text) - int((group / used).read_text()) + int(counts[counts.index(droppable) + 1]))
    return free


def _free_in_process() -> list[int]:
    """Returns what `ulimit -v` and `ulimit -d` leave to this process, where they are set."""
    if sys.platform != "linux":
        return []
    import resource

    memory = psutil.Process().memory_info()
    used = {resource.RLIMIT_AS: memory.vms, resource.RLIMIT_DATA: memory.data}
    limits = {kind: resource.getrlimit(kind)[0] for kind in used}
    return [limit - used[kind] for kind, limit in limits.items() if limit != resource.RLIM_INFINITY]


# ---- What a forward keeps


@dataclass(frozen=True)
class ForwardSize:
    """The size of one forward, usually of the largest."""

    batch_size: int  # as set; a forward may hold a part of it
    examples: int
    tokens: int
    supervised: int
    checkpointed: bool


@dataclass(frozen=True)
class Cost:
    """What the forward keeps until the backward, in bytes."""

    fixed: float  # copies of the adapter in the base's precision, and of a quantized base the one weight in use
    per_token: float
    per_checkpointed_token: float
    per_supervised: float  # in addition: hidden states or logits of a supervised token, depending on the loss

    def of(self, size: ForwardSize) -> int:
        """Returns the bytes that a forward of this size keeps."""
        per_token = self.per_checkpointed_token if size.checkpointed else self.per_token
        return int(self.fixed + per_token * size.tokens + self.per_supervised * size.supervised)


def measure_cost(forward: Callable[[int, bool], Tensor], tokens: int, model: PreTrainedModel) -> Cost:
    """Returns the cost, from what three calls of `forward(number of tokens, whether they are supervised)` keep.

    `forward` must not checkpoint the model's layers.
    """
    half = kept_bytes(partial(forward, tokens // 2, False), model)
    whole = kept_bytes(partial(forward, tokens, False), model)
    supervised = kept_bytes(partial(forward, tokens, True), model)
    per_token = (whole - half) / (tokens - tokens // 2)
    config, width = model.config.get_text_config(), model.dtype.itemsize
    layers, hidden = config.num_hidden_layers, config.hidden_size
    quantized = (dense_shape(layer).numel() for layer in quantized_layers(model).values())
    return Cost(
        fixed=max(whole - per_token * tokens, 0) + max(quantized, default=0) * width,
        per_token=per_token,
        per_checkpointed_token=per_token / layers + layers * hidden * width,
        per_supervised=(supervised - whole) / max(tokens - 1, 1),  # nothing predicts the first token
    )


def kept_bytes(forward: Callable[[], Tensor], model: PreTrainedModel) -> int:
    """Returns the bytes that autograd keeps after the forward, without the model's weights."""
    known = {part.untyped_storage().data_ptr() for tensor in stored_tensors(model) for part in inner_tensors(tensor)}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        for part in inner_tensors(tensor):
            storage = part.untyped_storage()
            if storage.data_ptr() not in known:
                kept[storage._cdata] = storage
        return tensor.detach()  # the tensor itself would keep its own graph alive for ever

    with saved_tensors_hooks(keep, lambda tensor: tensor), torch.enable_grad():
        loss = forward()  # kept alive while sizes are added up, so that no address is used by two tensors
    total = sum(storage.nbytes() for storage in kept.values())  # FSDP2 has freed the weights that it gathered
    del loss
    return total


def check_fits(needed: int, device: torch.device, advice: str) -> None:
    """Raises MemoryLimitError if fewer bytes are free than the largest forward keeps."""
    available = available_bytes(device)
    if needed > available:
        memory = f"{device} ({device_name(device)}, {format_bytes(total_bytes(device))} in total)"
        free = f"{format_bytes(available)} are free{'' if device.type == 'cpu' else f' on {memory}'}"
        cause = f"a step keeps at least {format_bytes(needed)} for its backward, and {free}"
        raise MemoryLimitError(f"out of memory before the first step: {cause}\n{advice}")


def remedies(cost: Cost, size: ForwardSize, longest: int, compiled_share: float | None = None) -> str:
    """Returns three changes of the settings, each with its effect on memory and time.

    longest: tokens of the longest example.
    compiled_share: of what layers keep, what ACTIVATION_MEMORY leaves; None if layers cannot be compiled.
    """
    half = max(size.examples // 2, 1)
    share = half / size.examples
    smaller = replace(size, examples=half, tokens=int(size.tokens * share), supervised=int(size.supervised * share))
    shorter = replace(size, tokens=size.tokens // 2, supervised=size.supervised // 2)
    lines = []

    def add(change: str, after: int, effect: str) -> None:
        lines.append(f"  - {change}: {format_bytes(after)} instead of {format_bytes(cost.of(size))}; {effect}")

    same = "the same result in about the same time"
    if size.examples > 1:
        accumulated = f"with gradient accumulation times {size.batch_size / half:g}"
        add(f"--per-device-train-batch-size {half} {accumulated}", cost.of(smaller), same)
    if compiled_share is not None:
        less = replace(cost, per_token=cost.per_token * compiled_share)
        add(f"--activation-memory {ACTIVATION_MEMORY}", less.of(size), f"{same}, after half a minute of compiling")
    if not size.checkpointed:
        checkpointed = cost.of(replace(size, checkpointed=True))
        add("--gradient-checkpointing", checkpointed, "the same result in about a third more time")
    add(f"--max-length {longest // 2}", cost.of(shorter), "half the time for the longest examples, which are cut off")
    lines += [
        "  - fewer --target-modules or --layers-to-transform: layers below the first adapted one keep nothing",
        "  - a smaller base model: memory and time fall with its layers and width",
    ]
    return "\n".join(["what helps:", *lines[:3]])


@contextmanager
def explain_out_of_memory(doing: str, advice: str) -> Iterator[None]:
    """Within the block, running out of memory raises MemoryLimitError with the cause and what helps."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        cause = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
        raise MemoryLimitError(f"out of memory while {doing}: {cause}\n{advice}") from error


def format_bytes(count: float) -> str:
    """Returns bytes in a readable unit: 1,234,567 -> '1.23 MB'."""
    for unit in ("bytes", "kB", "MB"):
        if abs(count) < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB" if abs(count) < 999.5 else f"{count:,.0f} GB"
