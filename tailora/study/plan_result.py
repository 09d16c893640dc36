"""The result of `plan`: data classes whose field names are the keys of report.json. Memory in bytes, time in seconds.

`study/plan.py` fills them in, and `report/pages/plan.py` shows them.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

from tailora.study.model_layout import TrainedGroup
from tailora.train.measure_steps import StepsMeasured
from tailora.train.memory_estimate import Memory


@dataclass(frozen=True)
class FullFineTuning:
    """Full fine-tuning of the same model on the same batches, not quantized. Always an estimate."""

    trainable_parameters: int
    memory: Memory
    batch_size_that_fits: int


@dataclass(frozen=True)
class Option:
    """The memory with different settings, estimated from the planned step."""

    settings: str
    memory: int
    batch_size: int  # the largest that fits; 0 if not even one example fits
    tokens: int  # the longest example that fits alone


@dataclass(frozen=True)
class Ranks:
    """Data-parallel processes, one per device."""

    count: int
    fsdp: bool  # whether FSDP2 shards the base over them


@dataclass(frozen=True)
class Plan:
    """A run with these settings. Memory and time are per process."""

    model: str
    method: str
    dtype: str
    device: str
    kernels: str
    trainable_parameters: int
    total_parameters: int
    memory: Memory
    available_bytes: int  # that the run may use
    batch_size: int
    batch_size_that_fits: int  # 0 if not even one example fits
    largest_forward: dict[str, int]  # examples and tokens
    basis: dict[str, str]  # where memory and time come from
    parts: list[str] = field(default_factory=list)  # of a vision-language model, those with an update
    groups: list[TrainedGroup] = field(default_factory=list)  # of layers with an update
    options: list[Option] = field(default_factory=list)
    remedies: list[str] = field(default_factory=list)  # settings that need less memory, if the run does not fit
    examples: int | None = None  # for training; None if unknown, as are the following
    tokens: int | None = None  # of all steps
    steps: int | None = None
    seconds_per_step: float | None = None  # None for a card that this machine does not have
    seconds: float | None = None  # of all steps
    full: FullFineTuning | None = None  # None if the run itself is, or if the model is quantized
    measured: StepsMeasured | None = None
    ranks: Ranks | None = None  # None for one process
    notes: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.available_bytes

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        content = asdict(self)
        full = None if self.full is None else {**content["full"], "memory": self.full.memory.to_dict()}
        return {**content, "memory": self.memory.to_dict(), "full": full, "fits": self.fits}
