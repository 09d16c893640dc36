"""Everything that changes while a run trains, besides its tensors: progress, the unread step, and random generators.

A checkpoint keeps the counters, the evaluations and the random states (`train.checkpoint`).
"""

import random
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tailora.core.device import AsyncCopy, accelerators
from tailora.train.loss import Evaluation
from tailora.train.step import Step

COUNTERS = ("step", "tokens", "supervised_tokens", "seconds", "since_best", "history")


class StepResults(NamedTuple):
    """The numbers of a step: 0-dimensional tensors on the device, or what the host has read of them."""

    loss: Any
    grad_norm: Any  # before clipping
    loss_scale: Any
    skipped: Any  # 1: the step changed nothing
    diverged: Any  # 1: the loss or a gradient was not finite
    stop_requests: Any  # number of ranks that were asked to stop
    checkpoint_is_due: Any  # 1: by the clock of the first rank


@dataclass(frozen=True, eq=False)
class SubmittedStep:
    """A step that the device computes, or has computed."""

    step: Step
    rate: float
    started: float  # time.perf_counter
    results: AsyncCopy  # in the order of StepResults


@dataclass(frozen=True, eq=False)
class Best:
    step: int
    evaluation: Evaluation
    tensors: dict[str, Tensor]  # of the adapter, on the CPU


@dataclass(eq=False)
class TrainState:
    # what a checkpoint keeps
    step: int = 0  # optimizer steps done
    tokens: int = 0
    supervised_tokens: int = 0
    seconds: float = 0.0  # of training, without evaluations and saving
    since_best: int = 0  # evaluations since the best one
    history: list[tuple[int, float]] = field(default_factory=list)  # (step, held-out loss)
    before: Evaluation | None = None  # held-out losses before training
    best: Best | None = None
    # what it does not
    unread: SubmittedStep | None = None  # on a device, the last step, until the host reads its results
    last_read: float = 0.0  # time.perf_counter when the results of a step were last read
    stop_requested: bool = False  # by a signal to any rank
    checkpoint_is_due: bool = False
    last_saved: float = field(default_factory=time.monotonic)  # when a checkpoint was saved, or the run began
    diverged: bool = False  # the run, or the one that it resumes
    unproven: Path | None = None  # the checkpoint of the last step: no loss was computed with its weights yet

    def counters(self) -> dict[str, Any]:
        """Returns what state.json holds under `progress`."""
        best_step = self.best.step if self.best else None
        best_metric = self.best.evaluation.metric if self.best else None
        return {
            **{name: getattr(self, name) for name in COUNTERS},
            "best_step": best_step,
            "best_metric": best_metric,
        }

    def evaluations(self) -> dict[str, Tensor]:
        """Returns what evaluations.safetensors holds."""
        evaluations = {"before": self.before, "best": self.best and self.best.evaluation}
        arrays = {
            f"{name}.{part}": getattr(evaluation, part, None)
            for name, evaluation in evaluations.items()
            for part in ("sums", "counts", "scores")
        }
        return {name: torch.from_numpy(array) for name, array in arrays.items() if array is not None}

    @classmethod
    def of(cls, counters: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]]) -> "TrainState":
        """Returns the state that a checkpoint was made from. tensors: of its files."""
        saved = {name: tensor.numpy() for name, tensor in tensors.get("evaluations", {}).items()}
        evaluations = {
            name: Evaluation(saved[f"{name}.sums"], saved[f"{name}.counts"], saved.get(f"{name}.scores"))
            for name in ("before", "best")
            if f"{name}.sums" in saved
        }
        best: Best | None = None
        if "best" in evaluations and "best" in tensors:
            evaluation = replace(evaluations["best"], metric=counters.get("best_metric"))
            best = Best(counters["best_step"], evaluation, dict(tensors["best"]))
        kept = {name: counters[name] for name in COUNTERS}
        kept["history"] = [(step, loss) for step, loss in counters["history"]]
        return cls(**kept, before=evaluations.get("before"), best=best)


# ---- Random generators of Python, numpy and torch, as tensors for checkpoints, without pickle


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
    """Returns the states of all generators as tensors, with devices as `cuda.0`, `cuda.1`, `mps.0`, ..."""
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
