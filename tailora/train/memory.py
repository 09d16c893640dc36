"""How much memory there is, how much a step takes, and what to change when that is too much.

The estimate counts what the forward keeps for the backward, measured on the user's model with one example. It leaves
out temporaries, so it is a lower bound: what does not fit by the estimate does not fit.
"""

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

from tailora.core.quantization import dense_shape, held_tensors, made_of, quantized_layers
from tailora.errors import MemoryLimitError

CGROUP = (  # limit and use of a container, version 2 and 1
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)
STATUS = Path("/proc/self/status")
SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "std::bad_alloc")


def peak_bytes(device: torch.device) -> int:
    """Most memory held so far: of the device, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    if STATUS.exists():  # on Linux, where ru_maxrss starts at the peak of the process that started this one
        return int(STATUS.read_text().split("VmHWM:")[1].split()[0]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def forget_peak(device: torch.device) -> None:
    """Another run in this process had its own. On a CPU the peak is that of the process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def held_now(device: torch.device) -> int:
    """Memory that this process holds, of the device, or on a CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


def available_bytes(device: torch.device) -> int:
    """Memory that can still be taken, within the container's limit on a CPU."""
    if device.type == "cuda":
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch's, for its next tensors
        return int(torch.cuda.mem_get_info(device)[0]) + idle
    free = [int(psutil.virtual_memory().available)]
    for limit, used in CGROUP:
        if limit.exists() and (text := limit.read_text().strip()).isdigit():
            free.append(int(text) - int(used.read_text()))
    return max(min(free), 0)


@dataclass(frozen=True)
class Load:
    """One forward at its largest."""

    batch_size: int  # as set; a forward may hold a part of it
    examples: int
    tokens: int
    supervised: int
    checkpointed: bool


@dataclass(frozen=True)
class Cost:
    """What the forward keeps until the backward, in bytes."""

    fixed: float  # copies of the adapter in the base's precision, and of a quantised base the one weight in use
    per_token: float
    per_checkpointed_token: float
    per_supervised: float  # on top: a row of hidden states, or of logits, as the loss's form has it

    def of(self, load: Load) -> int:
        per_token = self.per_checkpointed_token if load.checkpointed else self.per_token
        return int(self.fixed + per_token * load.tokens + self.per_supervised * load.supervised)


def measure(forward: Callable[[int, bool], Tensor], tokens: int, model: PreTrainedModel) -> Cost:
    """The cost, from what three runs of `forward(tokens, all of them supervised or none)` keep.

    `forward` must not checkpoint the model's layers.
    """
    half, whole, learned = (
        kept_bytes(partial(forward, count, supervised), model)
        for count, supervised in ((tokens // 2, False), (tokens, False), (tokens, True))
    )
    per_token = (whole - half) / (tokens - tokens // 2)
    config, width = model.config.get_text_config(), model.dtype.itemsize
    layers, hidden = config.num_hidden_layers, config.hidden_size
    return Cost(
        fixed=max(whole - per_token * tokens, 0) + dequantized_bytes(model),
        per_token=per_token,
        per_checkpointed_token=per_token / layers + layers * hidden * width,
        per_supervised=(learned - whole) / max(tokens - 1, 1),  # nothing predicts the first token
    )


def dequantized_bytes(model: PreTrainedModel) -> int:
    """Of the largest quantised weight in the precision of the products: there is one at a time."""
    sizes = (dense_shape(layer).numel() for layer in quantized_layers(model).values())
    return int(max(sizes, default=0) * model.dtype.itemsize)


def kept_bytes(forward: Callable[[], Tensor], model: PreTrainedModel) -> int:
    """Bytes that autograd holds after the forward; the model's weights are not counted."""
    known = {tensor.untyped_storage().data_ptr() for tensor in held_tensors(model)}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        for part in made_of(tensor):
            storage = part.untyped_storage()
            if storage.data_ptr() not in known:
                kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # the tensor itself would hold its own graph, for ever

    with saved_tensors_hooks(keep, lambda tensor: tensor), torch.enable_grad():
        loss = forward()  # alive while sizes are added up: a freed address could stand for two tensors
    total = sum(kept.values())
    del loss
    return total


def check_fits(cost: Cost, load: Load, longest: int, device: torch.device) -> int:
    """Bytes that the largest micro-batch keeps. Raises MemoryLimitError when there are not as many."""
    needed, available = cost.of(load), available_bytes(device)
    if needed > available:
        cause = f"a step keeps at least {size(needed)} for its backward, and {size(available)} are free"
        raise MemoryLimitError(f"out of memory before the first step: {cause}\n{remedies(cost, load, longest)}")
    return needed


def remedies(cost: Cost, load: Load, longest: int) -> str:
    """Three changes, each with the memory and time of a step that it leads to."""
    half = max(load.examples // 2, 1)
    share = half / load.examples
    smaller = replace(load, examples=half, tokens=int(load.tokens * share), supervised=int(load.supervised * share))
    shorter = replace(load, tokens=load.tokens // 2, supervised=load.supervised // 2)
    options = [
        (
            f"--per-device-train-batch-size {half} with gradient accumulation times {load.batch_size / half:g}",
            smaller,
            "the same result in about the same time",
        )
        if load.examples > 1
        else None,
        ("--gradient-checkpointing", replace(load, checkpointed=True), "the same result in about a third more time")
        if not load.checkpointed
        else None,
        (f"--max-length {longest // 2}", shorter, "half the time for the longest, whose ends are not learned"),
    ]
    lines = [
        f"  - {change}: {size(cost.of(after))} instead of {size(cost.of(load))}; {price}"
        for change, after, price in filter(None, options)
    ]
    others = [
        "  - fewer --target-modules or --layers-to-transform: layers below the first adapted one keep nothing",
        "  - --quantize nf4, where the base is not: its linear layers take a quarter of their bytes in bfloat16",
        "  - a smaller base model: memory and time fall with its layers and width",
    ]
    return "\n".join(["what helps:", *(lines + others)[:3]])


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch or Python ran out of memory; torch says so on a CPU in the text of a RuntimeError only."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return not isinstance(error, MemoryLimitError)
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in SIGNS)


@contextmanager
def explained(doing: str, advice: Callable[[], str]) -> Iterator[None]:
    """Within the block, running out of memory raises MemoryLimitError with the cause and what helps."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        cause = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
        raise MemoryLimitError(f"out of memory while {doing}: {cause}\n{advice()}") from error


def size(count: float) -> str:
    """Bytes for people: 1,234,567 -> '1.2 MB'."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
