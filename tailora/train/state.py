"""Everything about a run that changes while it trains, and its way into a checkpoint and back."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tailora.train.evaluate import Evaluation

COUNTERS = ("step", "tokens", "supervised_tokens", "seconds", "since_best", "history")


@dataclass(frozen=True, eq=False)
class Best:
    step: int
    evaluation: Evaluation
    tensors: dict[str, Tensor]  # of the adapter, on the CPU


@dataclass(eq=False)
class State:
    step: int = 0  # optimiser steps done
    tokens: int = 0
    supervised_tokens: int = 0
    seconds: float = 0.0  # of training, without evaluations and saving
    since_best: int = 0  # evaluations since the best one
    history: list[tuple[int, float]] = field(default_factory=list)  # (step, held-out loss)
    before: Evaluation | None = None
    best: Best | None = None

    def counters(self) -> dict[str, Any]:
        best_step = self.best.step if self.best else None
        return {**{name: getattr(self, name) for name in COUNTERS}, "best_step": best_step}

    def evaluations(self) -> dict[str, Tensor]:
        kept = {"before": self.before, "best": self.best.evaluation if self.best else None}
        return {
            f"{name}.{part}": torch.from_numpy(getattr(evaluation, part))
            for name, evaluation in kept.items()
            if evaluation is not None
            for part in ("sums", "counts")
        }


def restored(
    counters: Mapping[str, Any], evaluations: Mapping[str, Tensor], best: Mapping[str, Tensor] | None
) -> State:
    """The state that `counters`, `evaluations` and the best adapter's tensors came from."""
    state = State(**{name: counters[name] for name in COUNTERS})
    state.history = [(step, loss) for step, loss in counters["history"]]
    state.before = _evaluation(evaluations, "before")
    chosen = _evaluation(evaluations, "best")
    if best is not None and chosen is not None:
        state.best = Best(counters["best_step"], chosen, dict(best))
    return state


def _evaluation(tensors: Mapping[str, Tensor], name: str) -> Evaluation | None:
    if f"{name}.sums" not in tensors:
        return None
    return Evaluation(tensors[f"{name}.sums"].numpy(), tensors[f"{name}.counts"].numpy())
