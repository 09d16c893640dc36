"""The result of `plan`: data classes whose field names are the keys of report.json. Memory in bytes, time in seconds.

`study/plan.py` fills them in, and `report/pages/plan.py` shows them.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import model_validator

from tailora.study.model_layout import AdaptedModule, TrainedGroup, UnadaptedGroup
from tailora.train.estimate import Memory
from tailora.train.subprocess_worker import StepsMeasured


@dataclass(frozen=True)
class Trained:
    """The parts of the model that would be trained, and in `left` the parts that would not."""

    trainable_parameters: int
    total_parameters: int
    modules: list[AdaptedModule]
    groups: list[TrainedGroup]
    left: list[UnadaptedGroup]


@dataclass(frozen=True)
class FullFineTuning:
    """Full fine-tuning of the same model on the same batches, not quantized. Always an estimate."""

    trainable_parameters: int
    memory: Memory
    batch_size_that_fits: int


@dataclass(frozen=True)
class Option:
    """The memory with different settings, estimated from the planned step.

    batch_size: the largest batch that fits.    tokens: the longest example that fits alone.    0 for none.
    """

    settings: str
    memory: int
    batch_size: int
    tokens: int


@dataclass(frozen=True)
class Room:
    """What fits into memory.

    available_bytes: memory that the run may use.    batch_size: the configured one.
    batch_size_that_fits: 0 if not even one example fits.
    remedies: settings that need less memory, if the run does not fit.
    """

    available_bytes: int
    batch_size: int
    batch_size_that_fits: int
    options: list[Option] = field(default_factory=list)
    remedies: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Schedule:
    """The steps and their time.

    largest_forward: its examples and tokens.    examples: for training.    tokens, seconds: of all steps.
    All except largest_forward are None if unknown, as the time is for a card that this machine does not have.
    """

    largest_forward: dict[str, int]
    examples: int | None = None
    tokens: int | None = None
    steps: int | None = None
    seconds_per_step: float | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Ranks:
    """Data-parallel processes, one per device.    fsdp: whether FSDP2 shards the base over them."""

    count: int
    fsdp: bool


@dataclass(frozen=True)
class Plan:
    """A run with these settings.

    full: None if the run itself is full fine-tuning.    basis: where memory and time come from.
    ranks: None for one process. With several, memory and time are per process.
    """

    model: str
    method: str
    dtype: str
    device: str
    kernels: str
    trained: Trained
    memory: Memory
    room: Room
    schedule: Schedule
    basis: dict[str, str]
    full: FullFineTuning | None = None
    measured: StepsMeasured | None = None
    ranks: Ranks | None = None
    notes: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.room.available_bytes

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with the fields of `trained`, `room` and `schedule` at the top level."""
        content = asdict(self)
        for part in PARTS:
            content |= content.pop(part)
        full = None if self.full is None else {**content["full"], "memory": self.full.memory.to_dict()}
        reasons = {group.path: group.reason for group in self.trained.left}
        return {**content, "memory": self.memory.to_dict(), "full": full, "left_alone": reasons, "fits": self.fits}

    @model_validator(mode="before")
    @classmethod
    def _read_parts(cls, content: Any) -> Any:
        """Accepts the output of `to_dict`."""
        return {**content, **dict.fromkeys(PARTS, content)}


PARTS = ("trained", "room", "schedule")
