"""A pretend accelerator: torch sees a device "pretend" whose memory is the host's.

Its numbers are real, tensors of it and of the CPU do not mix, and it counts its kernels, the copies between host and
device, and every time that the host waits for it. `pytest -m device` installs it (tests/conftest.py), in a process of
its own: torch cannot give it back.

It does not show CUDA's rounding, its attention kernels, bitsandbytes, NCCL or speed.
"""

import functools
import hashlib
import os
import shutil
import types
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import cpp_extension

SOURCE = Path(__file__).with_suffix(".cpp")
NAME = "pretend"
DEVICE = torch.device("cpu")  # `install` makes it the device "pretend:0"


def missing() -> str:
    """Returns what this machine lacks to build the device, or ""."""
    compiler = cpp_extension.get_cxx_compiler()
    tools = {"a C++ compiler": shutil.which(compiler), "ninja": shutil.which("ninja")}
    return " and ".join(name for name, path in tools.items() if path is None)


@functools.cache
def build() -> Any:
    """Builds the device (a minute, once for each source and version of torch), and returns its module."""
    source = SOURCE.read_bytes()
    name = "pretend_accelerator_" + hashlib.sha256(source + torch.__version__.encode()).hexdigest()[:12]
    folder = Path(cpp_extension.get_default_build_root()) / name
    folder.mkdir(parents=True, exist_ok=True)
    if not (copy := folder / SOURCE.name).exists():  # a copy, so that every checkout uses the same build
        (part := folder / f"{os.getpid()}.part").write_bytes(source)
        part.replace(copy)
    return cpp_extension.load(name, [str(copy)], extra_cflags=["-O1", "-w"], build_directory=str(folder))


@functools.cache
def install() -> torch.device:
    """Makes the device the accelerator of torch and of accelerate in this process, and returns it."""
    global DEVICE
    device = build()
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _device_module(device))
    torch.utils.generate_methods_for_privateuse1_backend()
    os.environ["ACCELERATE_TORCH_DEVICE"] = f"{NAME}:0"
    DEVICE = torch.device(NAME, 0)
    return DEVICE


def install_or_skip() -> torch.device:
    """The same, in a test that is skipped where the device cannot be built. `.ci/run` fails there before its tests."""
    if lacks := missing():
        pytest.skip(f"the pretend accelerator cannot be built here: this machine lacks {lacks}")
    return install()


def _device_module(device: Any) -> types.ModuleType:
    """Returns what torch.cuda is for CUDA."""
    module: Any = types.ModuleType(f"torch.{NAME}")
    properties = types.SimpleNamespace(name="pretend accelerator", total_memory=device.capacity())
    functions = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda including_emulation=True: True,  # noqa: ARG005
        "_is_in_bad_fork": lambda: False,
        "device": lambda _device: nullcontext(),
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda _device: None,
        "get_device_name": lambda _device=0: properties.name,
        "get_device_properties": lambda _device=0: properties,
        "get_amp_supported_dtype": lambda: [torch.float16, torch.bfloat16],
        "manual_seed": lambda seed: device.default_generator().manual_seed(seed),
        "manual_seed_all": lambda seed: device.default_generator().manual_seed(seed),
        "initial_seed": lambda: device.default_generator().initial_seed(),
        "get_rng_state": lambda _device=0: device.default_generator().get_state(),
        "get_rng_state_all": lambda: [device.default_generator().get_state()],
        "set_rng_state": lambda state, _device=0: device.default_generator().set_state(state),
        "set_rng_state_all": lambda states: device.default_generator().set_state(states[0]),
        "synchronize": lambda _device=0: device.synchronise(),
        "empty_cache": lambda: None,
        "memory_allocated": lambda _device=0: device.used_bytes(),
        "memory_reserved": lambda _device=0: device.used_bytes(),
        "max_memory_allocated": lambda _device=0: device.peak_bytes(),
        "max_memory_reserved": lambda _device=0: device.peak_bytes(),
        "reset_peak_memory_stats": lambda _device=0: device.reset_peak(),
        "mem_get_info": lambda _device=0: (device.capacity() - device.used_bytes(), device.capacity()),
        "set_sync_debug_mode": lambda mode: device.sync_debug_mode(mode),
        "current_stream": lambda _device=0: torch.accelerator.current_stream(),
        "stream": lambda stream: stream,  # a torch.Stream is a context manager
        "Stream": lambda device=f"{NAME}:0", **options: torch.Stream(device, **options),
        "Event": functools.partial(torch.Event, f"{NAME}:0"),
    }
    for name, function in functions.items():
        setattr(module, name, function)
    return module


@dataclass
class Counts:
    """What happened within `counted()`, by name."""

    kernels: Counter[str] = field(default_factory=Counter)  # "aten::addmm" -> calls; views are no kernels
    copies: Counter[str] = field(default_factory=Counter)  # "to the host", "to the device" -> copies, waited for or not
    synchronisations: Counter[str] = field(
        default_factory=Counter
    )  # "item", "copy to the host", ... -> waits of the host


@contextmanager
def counted() -> Iterator[Counts]:
    """Counts what the device does within the block. The counts are there when the block has ended."""
    device, counts = build(), Counts()
    before = {name: Counter(getattr(device, name)()) for name in vars(counts)}
    try:
        yield counts
    finally:
        for name in vars(counts):
            setattr(counts, name, Counter(getattr(device, name)()) - before[name])


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Raises where the host would wait for the device, as torch.cuda.set_sync_debug_mode("error") does."""
    before = build().sync_debug_mode("error")
    try:
        yield
    finally:
        build().sync_debug_mode(before)


@contextmanager
def no_float64() -> Iterator[None]:
    """The device has no float64 within the block, as Apple's MPS has none."""
    before = build().float64(False)
    try:
        yield
    finally:
        build().float64(before)


@contextmanager
def memory_limit(size: int) -> Iterator[None]:
    """The device has that many bytes within the block."""
    before = build().set_capacity(size)
    try:
        yield
    finally:
        build().set_capacity(before)


if __name__ == "__main__":
    build()
