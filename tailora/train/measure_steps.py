"""A few real steps of a run in a separate process, to measure their memory and time.

The largest forward comes first and again at the end; between them are the first steps of the run. So the peak
matches the run's, except for its many other lengths. The time covers the run's steps, including the sampling
of completions. Nothing is written outside of the temporary folder.
"""

import json
import math
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from statistics import mean

from tailora.errors import TailoraError
from tailora.quiet import TORCHAO_LOGGERS, quiet_loggers
from tailora.train.child_process import ChildProcess, command_of, connection_to_parent, messages_of_parent
from tailora.train.config import TrainConfig
from tailora.train.failures import Failure

STEPS = 3  # at least, between the two steps of the largest forward


@dataclass(frozen=True)
class StepsMeasured:
    peak_bytes: int
    seconds_per_token: float  # of the run's steps
    tokens_per_step: float  # likewise
    steps: int
    kernels: str


def measure_steps(config: TrainConfig, *, with_data: bool) -> StepsMeasured:
    """Measures a few steps in a separate process, on the data or random tokens. Raises what a run raises."""
    with tempfile.TemporaryDirectory() as folder:
        command = [*command_of(measure), folder, config.model_dump_json(exclude_unset=True), *["data"] * with_data]
        with ChildProcess(command, log=Path(folder) / "log.txt") as child:
            try:
                measured: StepsMeasured = child.receive()
            except EOFError:
                raise child.error("the measurement") from None
            return measured


def measure(folder: str, settings: str, *data: str) -> None:
    messages_of_parent()
    parent = connection_to_parent()
    try:
        with quiet_loggers(*TORCHAO_LOGGERS):
            parent.send(take_steps(TrainConfig(**json.loads(settings)), Path(folder), with_data=bool(data)))
    except TailoraError as error:
        parent.send(Failure.of(error))


def take_steps(config: TrainConfig, folder: Path, *, with_data: bool) -> StepsMeasured:
    """Sets up a run and takes a few of its steps. On a CPU, the peak includes everything in this process."""
    from tailora.train.dataloader import random_data, read_data  # torch from here on
    from tailora.train.kernel_choice import use_kernels
    from tailora.train.memory import explain_out_of_memory, peak_bytes
    from tailora.train.step import Step
    from tailora.train.trainer import Trainer

    config = config.replaced(output_dir=str(folder / "run"), report_to=[], resume_from_checkpoint=None)
    with ExitStack() as stack:
        trainer = Trainer(config, stack, read=read_data if with_data else random_data)
        task = trainer.run.task.without_reference()  # which is not computed
        trainer.run = replace(trainer.run, task=task)
        data = trainer.run.data
        stack.enter_context(explain_out_of_memory("measuring steps", trainer.run.memory_remedies))
        base, layout, kernels = trainer.run.base, trainer.run.layout, trainer.run.kernels
        stack.enter_context(use_kernels(base, layout, kernels, checkpointed=config.gradient_checkpointing))
        largest = Step.of([data.largest], data.largest, task)
        # completions are sampled once for num_iterations steps
        count = math.ceil(STEPS / config.num_iterations) * config.num_iterations
        seconds, tokens, began = [], [], time.perf_counter()
        for step in chain([largest], islice(data.steps(0), count), [largest]):
            trainer.step(trainer.collated(step), began)
            trainer.read_last_step()
            tokens.append(step.tokens)
            seconds.append(time.perf_counter() - began)
            began = time.perf_counter()
        return StepsMeasured(
            peak_bytes=peak_bytes(trainer.run.accelerator.device),
            seconds_per_token=sum(seconds[1:-1]) / sum(tokens[1:-1]),
            tokens_per_step=mean(tokens[1:-1]),
            steps=len(seconds),
            kernels=trainer.run.kernels.description,
        )
