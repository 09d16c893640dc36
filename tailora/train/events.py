"""What a run reports while it trains, and what it returns.

The library prints nothing. `run(config, on_event=listener)` calls the listener with the events below.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from tailora.data.dataset import Int64
from tailora.data.prepare import PreparedData
from tailora.train.loss import Evaluation, Sums
from tailora.train.trainable import Trainable


@dataclass(frozen=True)
class Prepared:
    """Everything is loaded and checked; training is about to start."""

    header: dict[str, Any]


@dataclass(frozen=True)
class Evaluated:
    step: int
    loss: float  # nats per supervised token
    seconds: float
    best: bool
    reward: float | None = None  # mean over held-out prompts, in reinforcement learning
    metric: Mapping[str, float] = field(default_factory=dict)  # mean of the one that chooses the step, by name


@dataclass(frozen=True)
class EvaluationProgress:
    done: int  # of this rank's examples
    total: int
    what: str = "held-out examples"


@dataclass(frozen=True)
class Stepped:
    step: int  # steps done
    max_steps: int
    loss: float  # nats per supervised token, before the step
    learning_rate: float
    grad_norm: float  # before clipping
    tokens: int  # of this step, over all ranks
    supervised_tokens: int
    seconds: float  # since the results of the step before were there, or since this step began if that was later
    tokens_per_second: float  # of training so far, without evaluations
    eta_seconds: float
    memory_bytes: int  # peak so far
    reward: float | None = None  # mean over the sampled completions, in reinforcement learning
    skipped: bool = False  # it changed nothing, because a gradient overflowed float16 at the loss scale


@dataclass(frozen=True)
class Saved:
    step: int
    folder: Path


@dataclass(frozen=True)
class Note:
    """A decision that was made for the user, and the reason."""

    text: str


Event = Prepared | EvaluationProgress | Evaluated | Stepped | Saved | Note
Listener = Callable[[Event], None]


IN_MEMORY = {"in_memory": True}


@dataclass(frozen=True, eq=False)
class TrainResult:
    """The numbers of a run, and the objects that it leaves in memory, which are not part of `to_dict`."""

    output_dir: str
    steps: int
    train_tokens: int
    supervised_tokens: int
    tokens_per_second: float  # of training, without evaluations
    eval_loss_before: float | None  # None without held-out examples
    eval_loss_after: float | None
    best_step: int  # the step whose adapter was kept
    trainable_parameters: int
    total_parameters: int
    peak_memory_bytes: int
    seconds: float  # of everything, loading included, since the start or the resume
    model: Trainable = field(metadata=IN_MEMORY)
    tokenizer: PreTrainedTokenizerBase = field(metadata=IN_MEMORY)
    data: PreparedData | None = field(metadata=IN_MEMORY)  # None when streaming without eval_data
    before: Evaluation | None = field(metadata=IN_MEMORY)
    after: Evaluation | None = field(metadata=IN_MEMORY)
    selection: Int64 | None = field(default=None, metadata=IN_MEMORY)  # held-out examples that chose the step
    # right predictions of each held-out example; None for tasks without labels
    hits_before: Sums | None = field(default=None, metadata=IN_MEMORY)
    hits_after: Sums | None = field(default=None, metadata=IN_MEMORY)

    def to_dict(self) -> dict[str, Any]:
        """Returns the numbers; of labels also the accuracy before and after."""
        numbers = {item.name: getattr(self, item.name) for item in fields(self) if not item.metadata}
        evaluations = {"before": (self.hits_before, self.before), "after": (self.hits_after, self.after)}
        for when, (hits, evaluation) in evaluations.items():
            if hits is not None and evaluation is not None:
                numbers[f"eval_accuracy_{when}"] = float(hits.sum() / evaluation.counts.sum())
        return numbers
