"""The random states of Python, numpy and torch: seeded, and as tensors for checkpoints, without pickle."""

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from tailora.core.device import accelerators


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)  # of every device too


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within the block everything random follows `seed`; afterwards the caller's states are restored."""
    before = random_state()
    seed_all(seed)
    try:
        yield
    finally:
        set_random_state(before)


def random_state() -> dict[str, Tensor]:
    """Returns the states of all generators as tensors, those of devices as `cuda.0`, `cuda.1`, `mps.0`, ..."""
    version, words, gauss_next = random.getstate()
    _algorithm, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "python": torch.tensor([version, *words], dtype=torch.int64, device="cpu"),
        "python.spare": torch.tensor([] if gauss_next is None else [gauss_next], dtype=torch.float64, device="cpu"),
        "numpy": torch.tensor([*np.asarray(keys).tolist(), position, has_gauss], dtype=torch.int64, device="cpu"),
        "numpy.spare": torch.tensor([gauss], dtype=torch.float64, device="cpu"),
        "torch": torch.get_rng_state(),
        **{_name(device): torch.get_device_module(device).get_rng_state(device) for device in accelerators()},
    }


def set_random_state(states: Mapping[str, Tensor]) -> None:
    """Restores to the bit what `random_state` returned."""
    version, *words = states["python"].tolist()
    random.setstate((version, tuple(words), states["python.spare"].item() if len(states["python.spare"]) else None))
    *keys, position, has_gauss = states["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, np.uint32), position, has_gauss, states["numpy.spare"].item()))
    torch.set_rng_state(states["torch"])
    for device in accelerators():
        if _name(device) in states:  # else the checkpoint was made without it, and no process of the run uses it
            torch.get_device_module(device).set_rng_state(states[_name(device)], device)


def _name(device: torch.device) -> str:
    return f"{device.type}.{device.index}"
