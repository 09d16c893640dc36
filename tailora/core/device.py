"""The devices of this machine: which one is chosen, what it can do, and what it is called."""

import platform
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from tailora.errors import ConfigError

ORDER = ("cuda", "xpu", "mps")  # before any other accelerator that torch knows; AMD's cards are "cuda" too
AUTO = "auto"
HALF = (torch.bfloat16, torch.float16)
CPUINFO = Path("/proc/cpuinfo")
BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # of a CPU: x86's names, and Arm's


def choose_device(name: str | None = None) -> torch.device:
    """Returns the device with this name: auto (or None), cpu, cuda, cuda:1, xpu, mps, ...

    auto selects the first available of CUDA, XPU, MPS and other accelerators, else the CPU. A name without an index
    means torch's current device of this type. Raises ConfigError if there is no such device.
    """
    there = devices()
    try:
        asked = torch.device(there[0].type if name is None or name == AUTO else name)
    except RuntimeError:  # no name of a device
        asked = None
    if asked is not None and asked.type in {device.type for device in there}:
        if cause := obstacle_to_start(asked):
            raise ConfigError(f"cannot use device {asked}: {cause}\nUse --device cpu to run on the CPU")
        if asked.type == "cpu":
            asked = torch.device("cpu")
        elif asked == torch.device(asked.type):  # without an index, which the device of a tensor has
            module = torch.get_device_module(asked)
            current = module.current_device() if hasattr(module, "current_device") else 0  # MPS has one
            asked = torch.device(asked.type, current)
    if asked in there:
        return asked
    raise absent_device(name, there)


def absent_device(name: str | None, there: Sequence[torch.device]) -> ConfigError:
    """Returns the error for a device that is not among `there`, the existing ones."""
    names = ", ".join(map(str, there))
    return ConfigError(
        f"no device {name!r} on this machine; torch {torch.__version__} finds {names}. Use one of these, or {AUTO}"
    )


def devices() -> list[torch.device]:
    """Returns all devices of this machine, the fastest type first and the CPU last."""
    other = torch.accelerator.current_accelerator()
    kinds = dict.fromkeys([*ORDER, *([other.type] if other else [])])
    counts = {kind: torch.get_device_module(kind).device_count() for kind in kinds}
    return [*(torch.device(kind, index) for kind in kinds for index in range(counts[kind])), torch.device("cpu")]


def accelerators() -> list[torch.device]:
    """Returns all devices that torch can use, except the CPU."""
    return [device for device in devices() if device.type != "cpu" and obstacle_to_start(device) is None]


def obstacle_to_start(device: torch.device) -> str | None:
    """Returns why torch cannot use devices of this type, such as an outdated driver; None if it can."""
    module = torch.get_device_module(device)
    try:
        if hasattr(module, "current_device"):  # which starts them; MPS is always started
            module.current_device()
    except (RuntimeError, AssertionError) as error:
        return str(error)
    return None


def device_name(device: torch.device) -> str:
    """Returns the name of the card, or of the processor."""
    module = torch.get_device_module(device)
    if hasattr(module, "get_device_name"):
        return str(module.get_device_name(device))
    if device.type == "mps" and hasattr(torch.backends.mps, "get_name"):  # newer than torch 2.7
        return str(torch.backends.mps.get_name())
    # on Linux `platform` knows only the architecture
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def as_current(device: torch.device) -> AbstractContextManager[object]:
    """Within the block it is torch's current device of its kind, where libraries put what names no device."""
    module = torch.get_device_module(device)
    return cast(AbstractContextManager[object], module.device(device)) if hasattr(module, "device") else nullcontext()


def capability(device: torch.device) -> str | None:
    """Returns the compute capability of an NVIDIA card, such as 9.0, or the architecture of an AMD one."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return str(properties.gcnArchName) if torch.version.hip else f"{properties.major}.{properties.minor}"


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what was queued. A CPU queues nothing."""
    if device.type == "mps":
        torch.mps.synchronize()  # it takes no argument
    elif device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def copies_by_itself(device: torch.device) -> bool:
    """True if the device copies from and to pinned memory while the host goes on. MPS shares the host's memory."""
    return device.type not in ("cpu", "mps", "meta")


class AsyncCopy:
    """A copy of a small tensor on the host, made while the host goes on."""

    def __init__(self, values: Tensor) -> None:
        """values: 1-dimensional."""
        self.values, self.copied = values, None
        if copies_by_itself(values.device):
            self.values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self.values.copy_(values, non_blocking=True)
            self.copied = torch.Event(values.device)
            self.copied.record()

    def read(self) -> list[float]:
        """Waits for the copy, and not for what was queued after it."""
        if self.copied is not None:
            self.copied.synchronize()
        return cast(list[float], self.values.tolist())


# ---- What a device computes in


def wide_dtype(device: torch.device) -> torch.dtype:
    """Returns float64, or float32 where the device has no float64: Apple's, and some of Intel's."""
    if device.type in ("cpu", "cuda", "meta"):
        return torch.float64
    if device.type == "mps":
        return torch.float32
    return torch.float64 if _computes(torch.float64, device) else torch.float32


def has_bfloat16(device: torch.device | str = "cpu", cpuinfo: Path = CPUINFO) -> bool:
    """True if the device multiplies bfloat16 in hardware; on MPS, if the system can at all (macOS 14 or later)."""
    device = torch.device(device)
    if device.type == "cpu":
        return bool(BFLOAT16_FLAGS & cpu_flags(cpuinfo))
    if device.type == "mps":
        return _computes(torch.bfloat16, device)
    if device.type == "meta":  # computes nothing
        return False
    module = torch.get_device_module(device)
    without_emulation = {"including_emulation": False} if device.type in ("cuda", "xpu") else {}
    with as_current(device):  # the question is about the current device
        return hasattr(module, "is_bf16_supported") and bool(module.is_bf16_supported(**without_emulation))


def fast_dtype(device: torch.device) -> torch.dtype:
    """Returns bfloat16; float16 on NVIDIA's cards before Ampere, where training scales the loss; else float32."""
    if has_bfloat16(device):
        return torch.bfloat16
    return torch.float16 if device.type == "cuda" else torch.float32


def _computes(dtype: torch.dtype, device: torch.device) -> bool:
    """Tries a small product: True if the device has this precision. The result is not waited for."""
    try:
        x = torch.ones(2, 2, dtype=dtype, device=device)
        torch.mm(x, x)
    except (TypeError, RuntimeError):  # MPS raises the first, XPU the second
        return False
    return True


@lru_cache
def cpu_flags(cpuinfo: Path = CPUINFO) -> frozenset[str]:
    """Returns the flags that Linux lists for the processor; none on other systems."""
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    flags = (line for line in lines if line.lower().startswith(("flags", "features")))
    return frozenset(next(flags, "").split())
