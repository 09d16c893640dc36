"""The result of `plan`: data classes whose field names are the keys of report.json. Memory in bytes, time in seconds.

`study/plan.py` fills them in, and `report/pages/plan.py` shows them.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

from tailora.study.model_layout import AdaptedModule, TrainedGroup, UnadaptedGroup
from tailora.train.estimate import Memory
from tailora.train.measure_steps import StepsMeasured


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
class Ranks:
    """Data-parallel processes, one per device.    fsdp: whether FSDP2 shards the base over them."""

    count: int
    fsdp: bool


@dataclass(frozen=True)
class Plan:
    """A run with these settings.

    parts: of a vision-language model, those with an update.
    modules, groups: the layers with an update, one by one and grouped.    left: the parts that would not be trained.
    available_bytes: memory that the run may use.    batch_size: the configured one.
    batch_size_that_fits: 0 if not even one example fits.
    remedies: settings that need less memory, if the run does not fit.
    largest_forward: its examples and tokens.    basis: where memory and time come from.
    examples: for training.    tokens, seconds: of all steps. These, steps and seconds_per_step are None if unknown, as
        the time is for a card that this machine does not have.
    full: None if the run itself is full fine-tuning, or the model is quantized.
    ranks: None for one process. With several, memory and time are per process.
    """

    model: str
    method: str
    dtype: str
    device: str
    kernels: str
    trainable_parameters: int
    total_parameters: int
    memory: Memory
    available_bytes: int
    batch_size: int
    batch_size_that_fits: int
    largest_forward: dict[str, int]
    basis: dict[str, str]
    parts: list[str] = field(default_factory=list)
    modules: list[AdaptedModule] = field(default_factory=list)
    groups: list[TrainedGroup] = field(default_factory=list)
    left: list[UnadaptedGroup] = field(default_factory=list)
    options: list[Option] = field(default_factory=list)
    remedies: list[str] = field(default_factory=list)
    examples: int | None = None
    tokens: int | None = None
    steps: int | None = None
    seconds_per_step: float | None = None
    seconds: float | None = None
    full: FullFineTuning | None = None
    measured: StepsMeasured | None = None
    ranks: Ranks | None = None
    notes: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.available_bytes

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        content = asdict(self)
        full = None if self.full is None else {**content["full"], "memory": self.full.memory.to_dict()}
        reasons = {group.path: group.reason for group in self.left}
        return {**content, "memory": self.memory.to_dict(), "full": full, "left_alone": reasons, "fits": self.fits}
