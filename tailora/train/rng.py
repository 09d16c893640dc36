"""The random states of Python, numpy and torch as tensors: saved without pickle, restored to the bit."""

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor


def capture() -> dict[str, Tensor]:
    version, words, spare = random.getstate()
    _kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    states = {
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python.spare": torch.tensor([] if spare is None else [spare], dtype=torch.float64),
        "numpy": torch.tensor([*np.asarray(keys).tolist(), position, has_gauss], dtype=torch.int64),
        "numpy.spare": torch.tensor([gauss], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    return states | {f"cuda.{i}": state for i, state in enumerate(_cuda_states())}


def restore(states: Mapping[str, Tensor]) -> None:
    version, *words = states["python"].tolist()
    random.setstate((version, tuple(words), states["python.spare"].item() if len(states["python.spare"]) else None))
    *keys, position, has_gauss = states["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, np.uint32), position, has_gauss, states["numpy.spare"].item()))
    torch.set_rng_state(states["torch"])
    for i in range(torch.cuda.device_count()):
        if f"cuda.{i}" not in states:
            break  # saved where fewer were seen; as many processes go on as then, so none uses this one
        torch.cuda.set_rng_state(states[f"cuda.{i}"], i)


def _cuda_states() -> list[Tensor]:
    return torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)  # CUDA too


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside the block everything random follows `seed`; afterwards the caller's states are back."""
    before = capture()
    seed_all(seed)
    try:
        yield
    finally:
        restore(before)
