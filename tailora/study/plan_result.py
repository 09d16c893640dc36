"""What `plan` finds: the data classes. Field names are the keys of report.json. Memory is in bytes, time in seconds.

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
    """What would be trained, and in `left` what would not."""

    trainable_parameters: int
    total_parameters: int
    modules: list[AdaptedModule]
    groups: list[TrainedGroup]
    left: list[UnadaptedGroup]


@dataclass(frozen=True)
class FullFineTuning:
    """Full fine-tuning of the same model on the same batches, unquantised. Always estimated."""

    trainable_parameters: int
    memory: Memory
    batch_size_that_fits: int


@dataclass(frozen=True)
class Option:
    """What other settings would take, estimated from the step of the plan.

    batch_size, tokens: the largest batch that fits, and the longest example in a batch of its own; 0 for none.
    """

    settings: str
    memory: int
    batch_size: int
    tokens: int


@dataclass(frozen=True)
class Room:
    """What fits.

    available_bytes: what the run may take.    batch_size: as set.
    batch_size_that_fits: 0 where not even one example does.
    remedies: settings that take less memory, if the run does not fit.
    """

    available_bytes: int
    batch_size: int
    batch_size_that_fits: int
    options: list[Option] = field(default_factory=list)
    remedies: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Schedule:
    """What the steps read, and how long they take.

    largest_forward: examples, tokens.    examples: to train on.    tokens, seconds: of all steps.
    All but largest_forward are None where they are not known; the time of a device that is not here never is.
    """

    largest_forward: dict[str, int]
    examples: int | None = None
    tokens: int | None = None
    steps: int | None = None
    seconds_per_step: float | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Ranks:
    """Several processes that train together, a device each.    fsdp: whether FSDP2 shards the base over them."""

    count: int
    fsdp: bool


@dataclass(frozen=True)
class Plan:
    """What a run with these settings would be.

    full: None where the run itself is full fine-tuning.    basis: how memory and time were found.
    ranks: None for one process; of several, memory and time are those of one of them.
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
        """Plain values for JSON, in which the fields of `trained`, `room` and `schedule` stand beside the others."""
        content = asdict(self)
        for part in PARTS:
            content |= content.pop(part)
        full = None if self.full is None else {**content["full"], "memory": self.full.memory.to_dict()}
        reasons = {group.path: group.reason for group in self.trained.left}
        return {**content, "memory": self.memory.to_dict(), "full": full, "left_alone": reasons, "fits": self.fits}

    @model_validator(mode="before")
    @classmethod
    def _read_parts(cls, content: Any) -> Any:
        """Takes what `to_dict` returns."""
        return {**content, **dict.fromkeys(PARTS, content)}


PARTS = ("trained", "room", "schedule")
