"""What the loop tells whoever listens. The library prints nothing; a listener may."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import PreTrainedTokenizerBase

from tailora.data.prepare import PreparedData
from tailora.train.loss import Evaluation
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


@dataclass(frozen=True)
class Stepped:
    step: int  # steps done
    max_steps: int
    loss: float  # nats per supervised token, before the step
    learning_rate: float
    grad_norm: float  # before clipping
    tokens: int  # of this step, over all ranks
    supervised_tokens: int
    seconds: float
    tokens_per_second: float  # of training so far, without evaluations
    eta_seconds: float
    memory_bytes: int  # peak so far


@dataclass(frozen=True)
class Saved:
    step: int
    folder: Path


@dataclass(frozen=True)
class Note:
    """Something that was decided for the user, and why."""

    text: str


@dataclass(frozen=True)
class Finished:
    result: dict[str, Any]


Event = Prepared | Evaluated | Stepped | Saved | Note | Finished
Listener = Callable[[Event], None]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM arrived; `folder` is the checkpoint to go on from."""

    def __init__(self, folder: Path) -> None:
        super().__init__(f"interrupted; go on with --resume-from-checkpoint {folder}")
        self.folder = folder


# ---- What a run comes back with.


IN_MEMORY = {"in_memory": True}


@dataclass(frozen=True, eq=False)
class TrainResult:
    """The numbers of a run, and the objects that it leaves in memory, which `to_dict` leaves out."""

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
    seconds: float  # of everything, loading included
    model: Trainable = field(metadata=IN_MEMORY)
    tokenizer: PreTrainedTokenizerBase = field(metadata=IN_MEMORY)
    data: PreparedData | None = field(metadata=IN_MEMORY)  # None when streaming without eval_data
    before: Evaluation | None = field(metadata=IN_MEMORY)
    after: Evaluation | None = field(metadata=IN_MEMORY)

    def to_dict(self) -> dict[str, Any]:
        return {item.name: getattr(self, item.name) for item in fields(self) if not item.metadata}


# ---- Ctrl-C and SIGTERM as a wish that the loop grants between two steps.


SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stop_signal() -> Iterator[threading.Event]:
    """An event that the first signal sets. A second one acts as it would have without us.

    Only the main thread may listen to signals; elsewhere the event is never set.
    """
    wish = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield wish
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def heard(_number: int, _frame: FrameType | None) -> None:
        wish.set()
        restore()

    for number in SIGNALS:
        signal.signal(number, heard)
    try:
        yield wish
    finally:
        restore()
