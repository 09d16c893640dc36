"""The examples of an optimizer step, and their share of each rank and of each forward.

A step is `accumulation` batches of `batch_size` examples on every rank. A batch of more than `token_limit` tokens goes
through the model in parts, which changes no result, because the loss is summed over the whole step. A rank with fewer
parts than another repeats one with weight 0, because all ranks must take part in every forward.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from accelerate import Accelerator

from tailora.data.dataset import Example
from tailora.kernels.loss import Batch
from tailora.train.defaults import RunConfig
from tailora.train.loss import CAUSAL_LM, Task

# Of one forward on a CPU: 430 tokens/s at 380, 480 at 730, and no more at 1500, which takes twice the memory.
CPU_TOKENS = 768


@dataclass(frozen=True, eq=False)
class Step:
    """What this rank computes in one optimizer step, and the size of the step over all ranks."""

    micro_batches: list[list[Example]]  # the examples of each forward
    tokens: int
    supervised: int  # tokens with a loss
    divisor: float  # of the summed loss; 0 if no example counts
    idle: int = 0  # how many of the last forwards only keep step with the other ranks
    batches: list[Batch] = field(default_factory=list)  # tensors on the device, once `Trainer.collated` has made them
    metrics: dict[str, float] = field(default_factory=dict)  # what else to log with the step

    @classmethod
    def of(cls, micro_batches: list[list[Example]], examples: Sequence[Example], task: Task, idle: int = 0) -> "Step":
        """examples: of all ranks."""
        return cls(
            micro_batches,
            tokens=sum(len(example.input_ids) for example in examples),
            supervised=sum(part.supervised for example in examples for part in task.trained_sequences(example)),
            divisor=sum(example.weight * task.divisor(example) for example in examples),
            idle=idle,
        )


@dataclass(frozen=True)
class StepShape:
    """The size of a step, and which share of it belongs to this rank."""

    batch_size: int  # examples in a batch
    accumulation: int  # batches of a rank in a step
    seed: int = 0
    rank: int = 0
    world: int = 1
    token_limit: int | None = None  # of one forward; a longer example goes alone
    task: Task = CAUSAL_LM

    @property
    def examples_per_step(self) -> int:
        return self.batch_size * self.accumulation * self.world


def step_shape(config: RunConfig, accelerator: Accelerator) -> StepShape:
    return StepShape(
        batch_size=config.per_device_train_batch_size,
        accumulation=config.gradient_accumulation_steps,
        seed=config.seed,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        token_limit=token_limit(accelerator.device.type),
    )


def token_limit(device_type: str) -> int | None:
    """Returns how many tokens go through the model at once: on a CPU more would not be faster."""
    return CPU_TOKENS if device_type == "cpu" else None


def split_by_tokens(lengths: Sequence[int], limit: int | None) -> list[range]:
    """Splits the indices of a batch into ranges of about the same size, of at most `limit` tokens."""
    total = sum(lengths)
    if limit is None or total <= limit:
        return [range(len(lengths))]
    target = total / math.ceil(total / limit)
    parts: list[range] = []
    first, tokens = 0, 0
    for i, length in enumerate(lengths):
        if tokens and (tokens + length > limit or tokens + length / 2 > target):
            parts.append(range(first, i))
            first, tokens = i, 0
        tokens += length
    return [*parts, range(first, len(lengths))]
