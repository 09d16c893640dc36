"""What a run will take of memory and work: pure functions of the model's shape, the settings and the largest forward.

    parts that stand through the run    weights, adapters, gradients, optimiser: counted
    the largest moment of a step        activations, logits: the run's own code on tensors without contents
    the process                         interpreter, libraries, what an allocator keeps: measured constants

The largest moment of the process is one of three: reading the weights, a step, or reading back what was saved.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn

from tailora.data.dataset import Example
from tailora.kernels.forms import FORMS
from tailora.train.config import TrainConfig
from tailora.train.kernel_choice import running
from tailora.train.ledger import Ledger, tensors_of
from tailora.train.loss import as_batch
from tailora.train.skeleton import Skeleton
from tailora.train.subject import trained

MOMENTS = 2  # of AdamW
# Of a process on a CPU, beside what torch is asked for; benchmarks/plan.py shows what these make of whole runs:
LIBRARIES = 90 * 10**6  # code that is only loaded when it is called, threads, what caches hold
LIBRARIES_16_BIT = 40 * 10**6  # what oneDNN compiles for 16-bit products, at most 64 of them
SPLIT = 0.1  # of a step's memory that the allocator holds on top, in pieces
LOGITS, ACTIVATIONS, GRADIENTS = "logits", "activations", "gradients"


@dataclass(frozen=True)
class Memory:
    """Bytes at the largest moment of a run."""

    weights: int  # of the base, as stored
    adapters: int  # what is trained beside the weights: in full fine-tuning of 16 bits, float32 masters
    gradients: int
    optimizer: int  # two moments of AdamW, a copy of before the step, and of the best where evaluations choose
    activations: int  # kept for the backward, and temporaries, at the largest moment
    logits: int  # at that moment
    process: int  # interpreter, libraries, and what the allocator holds beyond what is asked of it

    @property
    def total(self) -> int:
        return sum(asdict(self).values())

    def with_total(self, total: int) -> "Memory":
        """The same parts where that is the whole: the process has what they leave over; if nothing, they have less."""
        rest = self.process + total - self.total
        return replace(self, process=max(rest, 0), activations=self.activations + min(rest, 0))

    def to_dict(self) -> dict[str, int]:
        return {**asdict(self), "total": self.total}


@dataclass(frozen=True)
class Step:
    """One forward and backward at its largest moment, beside what stands; and its work."""

    activations: int
    logits: int
    gradients: int  # of 16-bit weights, on their way to the float32 ones
    kept: int  # from the forward for the backward
    flops: float

    @property
    def held(self) -> int:
        return self.activations + self.logits + self.gradients


def step_of(bare: Skeleton, examples: Sequence[Example], *, checkpointed: bool) -> Step:
    """The forward and backward of these examples in one batch."""
    model, base, device = bare.model, bare.base, bare.base.device
    vocabulary = base.config.get_text_config().vocab_size
    shapes = {parameter.shape for parameter in base.parameters() if parameter.requires_grad}

    def part_of(tensor: Tensor) -> str:
        if tensor.ndim > 1 and tensor.shape[-1] == vocabulary:
            return LOGITS
        return GRADIENTS if tensor.shape in shapes else ACTIVATIONS

    batch, _ = as_batch(examples, bare.rows.packed, bare.rows.pad_id, device)
    with _gradients(trained(model)):
        ledger = Ledger(tensors_of(base, trained(model)), part_of)
        with running(base, bare.rows, bare.kernels, checkpointed=checkpointed), torch.enable_grad(), ledger:
            loss = FORMS[bare.rows.loss](model, batch).sum()
            kept = ledger.now.total()
            loss.backward()  # type: ignore[no-untyped-call]
    held = ledger.peak
    return Step(held[ACTIVATIONS], held[LOGITS], held[GRADIENTS], kept, ledger.flops)


class _gradients:
    """Within the block every trained parameter has its gradient, as in a run, where it is a view of a flat one."""

    def __init__(self, module: nn.Module) -> None:
        self._parameters = list(module.parameters())

    def __enter__(self) -> None:
        for parameter in self._parameters:
            parameter.grad = torch.zeros_like(parameter)

    def __exit__(self, *_: object) -> None:
        for parameter in self._parameters:
            parameter.grad = None


def memory_of(config: TrainConfig, bare: Skeleton, step: Step, process: int) -> Memory:
    """Of a run whose largest forward is `step`, in a process that holds `process` before its model is there."""
    parameters = list(trained(bare.model).parameters())
    wide = sum(parameter.nbytes for parameter in parameters)
    own = {id(parameter) for parameter in bare.base.parameters()}  # a float32 model is its own master
    memory = Memory(
        weights=bare.weights.held,
        adapters=sum(parameter.nbytes for parameter in parameters if id(parameter) not in own),
        gradients=wide + step.gradients,
        optimizer=wide * (MOMENTS + (2 if config.eval_steps else 1)),
        activations=step.activations,
        logits=step.logits,
        process=process,
    )
    return _on_cpu(config, bare, step, memory) if bare.base.device.type == "cpu" else memory


def _on_cpu(config: TrainConfig, bare: Skeleton, step: Step, memory: Memory) -> Memory:
    """With what the process holds beyond what torch is asked for. A device's allocator counts what it is asked for.

    Where another moment is larger than that of the step, the process has the difference.
    """
    own = LIBRARIES + (LIBRARIES_16_BIT if bare.base.dtype == torch.bfloat16 else 0)
    stepping = replace(memory, process=memory.process + bare.weights.left_mapped + own + int(SPLIT * step.held))
    reading = memory.process + bare.weights.held + bare.weights.while_read
    saved = stepping.total - step.held + (bare.weights.held if config.method == "full" else 0)  # read back
    return stepping.with_total(max(stepping.total, reading, saved))
