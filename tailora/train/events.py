"""What the loop tells whoever listens. The library prints nothing; a listener may."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


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
