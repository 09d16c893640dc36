"""A few real steps of a run in a separate process, to measure their memory and time.

    measure_steps     settings -> `python -m tailora.train.subprocess_worker FOLDER SETTINGS` -> StepsMeasured
    error_of          the error of a failed process, also for study.trial
    kill              ends a process of study.trial and all that it has started

The largest forward comes first and again at the end; between them are the first steps of the run. So the peak
matches the run's, except for its many other lengths. Nothing is written outside of the temporary folder.
"""

import json
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

import psutil

from tailora.errors import MemoryLimitError, TailoraError
from tailora.quiet import TORCHAO_LOGGERS, quiet_loggers
from tailora.train.config import TrainConfig
from tailora.train.failures import Failure

ERROR = "error.json"
SECONDS_TO_END = 10.0  # for processes that are killed
KILLED = -9  # exit code of a process that the system ended, usually because memory ran out


def error_of(folder: Path, code: int, stderr: str, task: str) -> Exception:
    """Returns the error that ended a process doing `task`: the `Failure` in its folder, or one by its exit code."""
    written = folder / ERROR
    if written.exists():
        failure = Failure.read(written)
        written.unlink()
        return failure.as_error()
    if code == KILLED:
        return MemoryLimitError(f"{task} was killed by the system, probably out of memory; use a smaller batch size")
    return RuntimeError(f"{task} exited with code {code}: {stderr.strip()[-2000:]}")


def kill(process: "subprocess.Popen[str]") -> None:
    """Kills a process and all that it has started, and waits until these have ended."""
    if process.poll() is not None:  # another process may have its number by now
        return
    started: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):  # another thread has killed it meanwhile
        started = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    for child in started:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    end = time.monotonic() + SECONDS_TO_END
    while not all(map(_has_ended, started)) and time.monotonic() < end:
        time.sleep(0.01)


def _has_ended(process: psutil.Process) -> bool:
    """Also true of a process whose parent has not asked for its exit code, as where that was killed."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


STEPS = 3  # between the two steps of the largest forward


@dataclass(frozen=True)
class StepsMeasured:
    peak_bytes: int
    start_seconds: float  # until the first step: imports, weights, data, checks
    seconds_per_token: float  # of the steps after the first
    steps: int
    kernels: str


def measure_steps(config: TrainConfig, *, with_data: bool) -> StepsMeasured:
    """Measures a few steps in a separate process, on the data or random tokens. Raises what a run raises."""
    with tempfile.TemporaryDirectory() as folder:
        settings = config.model_dump_json(exclude_unset=True)
        command = [sys.executable, "-m", "tailora.train.subprocess_worker", folder, settings, *["data"] * with_data]
        process = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if process.returncode == 0:
            return StepsMeasured(**json.loads(process.stdout.splitlines()[-1]))
        raise error_of(Path(folder), process.returncode, process.stderr, "the measurement")


def main(folder: Path, settings: str, *data: str) -> int:
    """The separate process, which prints what it measured."""
    try:
        measured = take_steps(TrainConfig(**json.loads(settings)), folder, with_data=bool(data))
    except TailoraError as error:
        Failure.of(error).write(folder / ERROR)
        return 1
    print(json.dumps(asdict(measured)))
    return 0


def take_steps(config: TrainConfig, folder: Path, *, with_data: bool) -> StepsMeasured:
    """Sets up a run and takes a few of its steps. On a CPU, the peak includes everything in this process."""
    started = time.perf_counter()
    from tailora.train.dataloader import random_data, read_data  # torch from here on
    from tailora.train.memory import explain_out_of_memory, peak_bytes
    from tailora.train.step import Step
    from tailora.train.trainer import Trainer

    config = config.replaced(output_dir=str(folder / "run"), report_to=[], resume_from_checkpoint=None)
    trainer = Trainer(config, read=read_data if with_data else random_data)
    with ExitStack() as stack:
        trainer.setup(stack)
        task = trainer.run.task.without_reference()  # which is not computed
        trainer.run = replace(trainer.run, task=task)
        data = trainer.run.data
        stack.enter_context(explain_out_of_memory("measuring steps", trainer.run.memory_remedies))
        stack.enter_context(trainer.use_kernels())
        largest = Step.of([data.largest], data.largest, task)
        start_seconds = time.perf_counter() - started
        seconds, tokens = [], []
        for step in [largest, *islice(data.steps(0), STEPS), largest]:
            began = time.perf_counter()
            trainer.step(trainer.collated(step), began)
            trainer.read_last_step()
            tokens.append(step.tokens)
            seconds.append(time.perf_counter() - began)
        return StepsMeasured(
            peak_bytes=peak_bytes(trainer.run.accelerator.device),
            start_seconds=start_seconds,
            seconds_per_token=sum(seconds[1:]) / sum(tokens[1:]),
            steps=len(seconds),
            kernels=trainer.run.kernels.description,
        )


if __name__ == "__main__":
    with quiet_loggers(*TORCHAO_LOGGERS):
        sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
