"""One training run of a study, and what came out of it.

    get_trial             reads the trial of a folder, or runs it and writes it there
      run_in_subprocess     in a separate process, whose peak memory is the trial's, and whose crash ends only the trial
        main                  that process: trains, or starts several processes, the ranks, each of which does
      run_here              in this process

A trial that diverges or does not fit into memory is a result, not an error: both say something about its settings.

Of several ranks the first writes events and the result to stdout, which is a pipe to the study. All of them have the
same stdin, a pipe from the study, and end with it.
"""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from tailora.errors import ConfigError, DivergedError, MemoryLimitError, ProcessFailedError, TailoraError
from tailora.formats.io import read_own_json, write_file
from tailora.quiet import TORCHAO_LOGGERS, quiet_loggers
from tailora.train import subprocess_worker
from tailora.train.config import (
    ACCUMULATION,
    NATS_PER_TOKEN,
    TrainConfig,
    batches_per_step,
)
from tailora.train.failures import Failure, leave_failure
from tailora.train.launch import end_process, is_launched_by_tailora, launch, rank
from tailora.train.subprocess_worker import kill

DONE, PRUNED, DIVERGED, OUT_OF_MEMORY = "done", "pruned", "diverged", "out of memory"
SPEC, RESULT, RUN = "spec.json", "trial.json", "run"  # in the folder of a trial
OF_RANKS = "ranks"  # the folder there with the temporary files of their launcher
MODULE = "tailora.study.trial"
COMMAND = (sys.executable, "-m", MODULE)  # and a folder
NOT_SETTINGS = ("before", "texts", "processes")  # fields of a TrialSpec that save time and change no result

Indices = NDArray[np.int64]
BaseLosses = tuple[list[float], list[int]]  # of each held-out example: sum of the base's losses, and their number

# ---- Two halves of the held-out examples: one chooses settings, the other judges what was chosen


def choosing_half(count: int) -> Indices:
    """Indices of the held-out examples that choose. Raises ConfigError for fewer than 4 examples."""
    return np.sort(_shuffled(count)[: count // 2])


def judging_half(count: int) -> Indices:
    """Indices of the held-out examples that judge, which are all others. Raises ConfigError for fewer than 4."""
    return np.sort(_shuffled(count)[count // 2 :])


def _shuffled(count: int) -> Indices:
    """Always the same for a count."""
    if count < 4:
        examples = "1 distinct held-out example is" if count == 1 else f"{count} distinct held-out examples are"
        raise ConfigError(
            f"{examples} too few: one half chooses settings, the other half judges. Hold out at least 4, better 100: "
            "--eval-data FILE, or a larger --validation-split. Copies do not count, nor do rows "
            "that --max-length leaves nothing of"
        )
    return np.random.default_rng(0).permutation(count)


def evaluated(count: int, held_out: int | None, *, choosing: bool) -> Indices:
    """Indices of the examples that a trial evaluates, of `count`. held_out: how many are used; None for all.

    The halves are those of the examples that are used.
    """
    used = np.arange(count) if held_out is None else np.sort(_shuffled(count)[:held_out])
    return used[choosing_half(len(used))] if choosing else used


def on_choosing_half(base: BaseLosses | None) -> BaseLosses | None:
    """Returns the base's losses on the choosing half, from those on all examples that are used."""
    if base is None:
        return None
    indices = choosing_half(len(base[0]))
    return [base[0][index] for index in indices], [base[1][index] for index in indices]


# ---- What a trial does, reports and returns


@dataclass(frozen=True)
class TrialSpec:
    """settings: of TrainConfig, without output_dir.
    forgetting: None to measure none, '' on texts that the base writes, or a file of texts.
    keep: keep what was trained; a fully trained model is large.
    choosing: evaluate the choosing half of the held-out examples only.
    rising: (low, high) of a learning rate that rises at every step, in place of the schedule.
    describe: also return the model's `target_groups`.
    before: the base's losses on the held-out examples, if another trial has computed them.
    texts: file for the texts that the base writes, shared by all trials of a study; the first trial writes it.
    held_out: number of held-out examples that are used, if not all.    processes: that train together.
    """

    settings: dict[str, Any]
    forgetting: str | None = None
    keep: bool = True
    choosing: bool = False
    rising: tuple[float, float] | None = None
    describe: bool = False
    before: BaseLosses | None = None
    texts: str | None = None
    held_out: int | None = None
    processes: int = 1


@dataclass(frozen=True)
class TrialEvent:
    """A step or an evaluation of a running trial.

    loss: of the step's examples, or of the held-out ones for an evaluation.    loss_unit: what it is measured in.
    parameters: how many are trained.    seconds: that the step or the evaluation took.
    """

    step: int
    steps: int
    loss: float
    held_out: bool
    parameters: int
    seconds: float
    loss_unit: str = NATS_PER_TOKEN


@dataclass(frozen=True)
class Trial:
    """The result of a trial. Unless its outcome is `done`, it has only what its events reported.

    outcome: done, diverged, out of memory, or pruned: ended by `listen`.    message: the reason, unless done.
    numbers: of TrainResult; also seed, held_out (how many examples there are), parts (the model's `target_groups`),
    all_steps (of the epochs; None for a stream), and seconds.
    loss_unit: what losses are measured in.
    sums, before: sum of the losses of each held-out example, of the trained model and of the base.    counts: how many
    losses it has; of a language model, learned tokens.
    hits: right predictions of each, of `counts`; [] for tasks without any.
    bytes: size on disk of what was trained.    losses: of each step's examples, before the step.
    curve: (step, held-out loss).    parameters: how many are trained; 0 when the trial ended before its first step.
    workers: how many the study had when this trial was made; at most so many trials were made at the same time.
    processes: that trained together. Memory in the numbers is that of the first.
    """

    outcome: str
    message: str
    numbers: dict[str, Any] = field(default_factory=dict)
    sums: list[float] = field(default_factory=list)
    before: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    forgetting: dict[str, Any] | None = None
    bytes: int = 0
    losses: list[float] = field(default_factory=list)
    curve: list[tuple[int, float]] = field(default_factory=list)
    parameters: int = 0
    step_seconds: list[float] = field(default_factory=list)
    evaluation_seconds: list[float] = field(default_factory=list)
    workers: int = 1
    processes: int = 1
    hits: list[float] = field(default_factory=list)
    loss_unit: str = NATS_PER_TOKEN

    @property
    def done(self) -> bool:
        return self.outcome == DONE

    @property
    def training_seconds(self) -> float:
        """Time of the steps, without loading and evaluating."""
        return float(self.numbers["train_tokens"] / self.numbers["tokens_per_second"])

    @property
    def base(self) -> BaseLosses | None:
        """The base's losses, for other trials on the same held-out examples. None unless done.

        None also with labels, where the base has another head for every seed, and with preferences, where more of it is
        kept than losses.
        """
        return (self.before, self.counts) if self.done and self.loss_unit == NATS_PER_TOKEN else None

    def loss(self, indices: Indices | None = None) -> float:
        """The held-out loss of all evaluated examples or of some; infinite unless done."""
        if not self.done:
            return math.inf
        sums, counts = np.array(self.sums), np.array(self.counts)
        chosen = slice(None) if indices is None else indices
        return float(sums[chosen].sum() / counts[chosen].sum())

    @property
    def summary(self) -> str:
        """For a log: the loss on the judging half where all held-out examples were evaluated, or the outcome."""
        return f"held-out loss {self.loss(judging_half(len(self.counts))):.4f}" if self.done else self.outcome


def _trial(outcome: str, message: str, events: list[TrialEvent], base: BaseLosses | None, **results: Any) -> Trial:
    """The trial that had these events.

    base: losses of the base, where they were known before.    results: further fields of a trial that is done.
    """
    steps = [event for event in events if not event.held_out]
    evaluations = [event for event in events if event.held_out]
    start = [] if base is None else [(0, float(np.sum(base[0]) / np.sum(base[1])))]
    return Trial(
        outcome,
        message,
        losses=[event.loss for event in steps],
        curve=[*start, *((event.step, event.loss) for event in evaluations)],
        parameters=events[0].parameters if events else 0,
        loss_unit=events[0].loss_unit if events else NATS_PER_TOKEN,
        step_seconds=[event.seconds for event in steps],
        evaluation_seconds=[event.seconds for event in evaluations],
        **results,
    )


# ---- Running it

Listen = Callable[[TrialEvent], str | None]  # returns why the trial is to end now, or None


class Worker:
    """Runs trials beside other workers, one at a time.

    number: from 1 to `count`.    device: its own, such as cuda:1.    threads: of each process on a CPU, its share of
    the cores.    variables: of the environment of its processes.
    """

    def __init__(
        self,
        number: int,
        count: int,
        device: str | None,
        threads: int | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self.number, self.count, self.device, self.threads = number, count, device, threads
        self.variables = variables or {}
        self.stopped = False
        self._process: subprocess.Popen[str] | None = None

    def start(self, command: list[str], **options: Any) -> "subprocess.Popen[str]":
        """Starts the process of a trial. A Ctrl-C does not reach it, since a trial that it ends has not failed."""
        threads = {} if self.threads is None else {"OMP_NUM_THREADS": str(self.threads)}
        environment = {**threads, **os.environ, **self.variables}
        if self.device is not None:
            command = [*command, self.device]
        if sys.platform != "win32":
            options["process_group"] = 0
        self.check()
        process = self._process = subprocess.Popen(command, env=environment, **options)
        if self.stopped:
            kill(process)
        return process

    def stop(self) -> None:
        """Ends the trial under way, from another thread; the worker begins no other."""
        self.stopped = True
        if self._process is not None:
            kill(self._process)

    def check(self) -> None:
        """Raises KeyboardInterrupt after `stop`."""
        if self.stopped:
            raise KeyboardInterrupt


class Progress(Protocol):
    """Shows the trials under way. worker: the number of the worker that runs the trial; 1 if there are no others."""

    def step(self, step: int, steps: int, loss: float, *, worker: int) -> None: ...

    def end(self, *, worker: int) -> None:
        """Is called when the trial of this worker has ended, also if it has failed."""


class RunTrial(Protocol):
    """Runs the trial of a folder, which has its spec.json. worker: None if there is only one."""

    def __call__(self, spec: TrialSpec, folder: Path, listen: Listen, worker: Worker | None = None) -> Trial: ...


class _Stopped(Exception):
    """Raised where a trial runs when `listen` ends it."""


Record = Callable[[TrialEvent], None]


def _outcome(run: Callable[[Record], Trial], spec: TrialSpec, listen: Listen) -> Trial:
    """Returns the trial that `run` returns, or that of a run which `listen` or its own settings have ended."""
    events: list[TrialEvent] = []

    def record(event: TrialEvent) -> None:
        events.append(event)
        if (reason := listen(event)) is not None:
            raise _Stopped(reason)

    try:
        return run(record)
    except _Stopped as stopped:
        return _trial(PRUNED, str(stopped), events, spec.before)
    except DivergedError as error:
        return _trial(DIVERGED, str(error), events, spec.before)
    except MemoryLimitError as error:
        return _trial(OUT_OF_MEMORY, str(error), events, spec.before)


def run_here(spec: TrialSpec, folder: Path, listen: Listen) -> Trial:
    """Runs the trial in this process. Raises what the run raises, but for divergence and lack of memory."""
    return _outcome(lambda record: _train(spec, folder, record), spec, listen)


def run_in_subprocess(spec: TrialSpec, folder: Path, listen: Listen, worker: Worker | None = None) -> Trial:
    """Runs the trial of this folder, which has its spec.json, in a separate process. Raises as `run_here` does."""
    return _outcome(lambda record: _follow_subprocess(folder, record, worker), spec, listen)


def _follow_subprocess(folder: Path, record: Record, worker: Worker | None) -> Trial:
    """Starts the process of the trial and reads what it writes. Raises what its run raises."""
    log = folder / "log.txt"
    start = subprocess.Popen if worker is None else worker.start
    with (
        log.open("w") as stderr,
        start(
            [*COMMAND, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                content = json.loads(line)
                if "outcome" in content:
                    return Trial(**content)
                record(TrialEvent(**content))
            process.wait()
        finally:
            kill(process)
    if worker is not None:
        worker.check()
    raise subprocess_worker.error_of(folder, process.returncode, log.read_text(), f"the run in {folder}")


def get_trial(
    spec: TrialSpec,
    folder: Path,
    *,
    progress: Progress | None = None,
    stop: Listen | None = None,
    run_trial: RunTrial = run_in_subprocess,
    worker: Worker | None = None,
) -> Trial:
    """Returns the trial of this folder. It is run now, unless it was before.

    stop: called with every step and evaluation; it may end the trial.    worker: that runs it, if there are several.

    Raises ConfigError when the folder holds a trial with other settings; whatever else the run raises.
    """
    remedy = f"delete {folder}, and the same command runs it again"
    if (folder / RESULT).exists():
        if _identity(read_own_json(folder / SPEC, TrialSpec, remedy)) != _identity(spec):
            raise ConfigError(f"{folder} holds a trial with other settings; give another --output-dir")
        return read_own_json(folder / RESULT, Trial, remedy)
    for name in (RUN, OF_RANKS):
        shutil.rmtree(folder / name, ignore_errors=True)  # of a trial that was interrupted
    write_file(folder / SPEC, json.dumps(asdict(spec), indent=1).encode())

    number, count = (1, 1) if worker is None else (worker.number, worker.count)

    def listen(event: TrialEvent) -> str | None:
        if progress is not None and not event.held_out:
            progress.step(event.step, event.steps, event.loss, worker=number)
        return None if stop is None else stop(event)

    try:
        trial = run_trial(spec, folder, listen) if worker is None else run_trial(spec, folder, listen, worker=worker)
    finally:
        shutil.rmtree(folder / OF_RANKS, ignore_errors=True)  # of ranks that were killed
        if progress is not None:
            progress.end(worker=number)
    trial = replace(trial, workers=count, processes=spec.processes)
    if not (spec.keep and trial.done):
        shutil.rmtree(folder / RUN, ignore_errors=True)
    write_file(folder / RESULT, json.dumps(asdict(trial)).encode())
    return read_own_json(folder / RESULT, Trial, remedy)  # as when it is read later


def _identity(spec: TrialSpec) -> dict[str, Any]:
    """What makes two specs different trials, as it is read from a file.

    The number of processes changes no result if --gradient-accumulation-steps keeps the batches of a step the same.
    """
    content: dict[str, Any] = json.loads(json.dumps(asdict(spec)))
    identity = {name: value for name, value in content.items() if name not in NOT_SETTINGS}
    settings = identity["settings"]
    return {**identity, "settings": {**settings, ACCUMULATION: batches_per_step(settings, spec.processes)}}


def main(folder: Path, device: str | None = None) -> int:
    """The process of a trial: writes events, and at the end the trial, as lines of JSON to stdout.

    If the trial has several processes, this one starts them and waits. Each of them runs this function, too.
    device: of its worker, in place of that in the settings.
    """
    spec = TrialSpec(**json.loads((folder / SPEC).read_text()))
    if device is not None:
        spec = replace(spec, settings={**spec.settings, "device": device})

    try:
        if spec.processes > 1 and not is_launched_by_tailora():
            temporary = folder / OF_RANKS
            temporary.mkdir()
            launch([str(folder)], spec.processes, module=MODULE, temporary=temporary)
            return 0
        trial = _train(spec, folder, lambda event: print(json.dumps(asdict(event)), flush=True))
    except TailoraError as error:
        if isinstance(error, ProcessFailedError) and error.traceback:  # of a bug in a rank
            sys.stderr.write(error.traceback)
        elif is_launched_by_tailora():
            leave_failure(error)
        else:
            Failure.of(error).write(folder / subprocess_worker.ERROR)
        return 1
    except Exception as error:
        leave_failure(error, traceback=traceback.format_exc())
        raise
    if rank() == 0 or not is_launched_by_tailora():
        print(json.dumps(asdict(trial)), flush=True)
    return 0


def _exit_with_parent() -> None:
    """Ends this process when the study is killed: until then stdin, a pipe from it, has no end."""
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)


# ---- The training itself


def _train(spec: TrialSpec, folder: Path, record: Record) -> Trial:
    """Trains and measures. The trial that the first of several ranks returns is whole."""
    from accelerate import PartialState

    from tailora.data.dataset import warnings_of
    from tailora.study.model_layout import target_groups  # torch from here on
    from tailora.train.dataloader import epoch_steps
    from tailora.train.events import Evaluated, Event, Prepared, Stepped
    from tailora.train.failures import fail_together
    from tailora.train.loss import Evaluation
    from tailora.train.memory import explain_out_of_memory
    from tailora.train.optimizer import lr_range_test
    from tailora.train.parallel import is_first_rank
    from tailora.train.trainable import folder_of
    from tailora.train.trainer import run

    config = TrainConfig(**{"save_steps": 0, **spec.settings, "output_dir": str(folder / RUN)})  # no trial is resumed
    header: dict[str, Any] = {"steps": 0, "parameters": 0}
    events: list[TrialEvent] = []
    parts: dict[str, Any] = {}
    held_out: list[int] = []

    def on_event(event: Event) -> None:
        if isinstance(event, Prepared):
            names = {"steps": "max_steps", "parameters": "trainable_parameters", "loss_unit": "loss_unit"}
            header.update({name: event.header[key] for name, key in names.items()})
        if isinstance(event, Stepped | Evaluated):
            of_held_out = isinstance(event, Evaluated)
            events.append(
                TrialEvent(event.step, loss=event.loss, held_out=of_held_out, seconds=event.seconds, **header)
            )
            record(events[-1])

    def on_ready(model: Any, *_: Any) -> None:
        if spec.describe:
            parts.update(target_groups(model.base_model))

    def choose(count: int) -> Indices:
        held_out.append(count)
        return evaluated(count, spec.held_out, choosing=spec.choosing)

    rates = spec.rising
    result = run(
        config,
        on_event=on_event,
        on_ready=on_ready,
        rate_at=None if rates is None else lambda step, steps: lr_range_test(step, steps, *rates),
        held_out=choose,
        before=None if spec.before is None else Evaluation(*map(np.array, spec.before)),
    )
    if result.before is None or result.after is None:
        raise ConfigError("there is no held-out data to judge by: give --eval-data or --validation-split")
    forgotten, seconds = None, dict[str, float]()
    if spec.forgetting is not None and (config.fsdp or is_first_rank()):  # a sharded model needs all ranks
        with (
            fail_together(PartialState()) if config.fsdp else nullcontext(),
            explain_out_of_memory("measuring forgetting", FORGETTING_ADVICE),
        ):
            forgotten, seconds = _forgetting(result, spec, together=config.fsdp)
    numbers = {
        **result.to_dict(),
        "seed": config.seed,
        "held_out": sum(held_out),
        "parts": parts,
        "all_steps": None if result.data is None else epoch_steps(config, result.data.train.epoch_size),
        "data_warnings": {} if result.data is None else warnings_of(result.data.report.to_dict()),
        **seconds,
    }
    files = folder_of(result.model, Path(result.output_dir)).rglob("*")
    return _trial(
        DONE,
        "",
        events,
        spec.before,
        numbers=numbers,
        sums=result.after.sums.tolist(),
        hits=[] if result.hits_after is None else result.hits_after.tolist(),
        before=result.before.sums.tolist(),
        counts=result.after.counts.tolist(),
        forgetting=forgotten,
        bytes=sum(file.stat().st_size for file in files if file.is_file()),
    )


FORGETTING_ADVICE = "what was trained fits: closing other programs helps, or fewer and shorter --forgetting-data"


def _forgetting(result: Any, spec: TrialSpec, *, together: bool) -> tuple[dict[str, Any], dict[str, float]]:
    """What was forgotten; and the seconds of writing texts, which the first trial of a study does, and of the rest.

    together: whether all ranks do this, else only the first.
    """
    from tailora.evaluation.forgetting import forgetting, read_texts, sample_texts

    started = time.monotonic()
    if spec.forgetting:
        texts = read_texts(spec.forgetting, result.model, result.tokenizer)
    elif spec.texts is None:
        texts = sample_texts(result.model, result.tokenizer)
    else:
        texts = _shared_texts(result, Path(spec.texts), together=together)
    written = time.monotonic()
    forgotten = asdict(forgetting(result.model, texts))
    return forgotten, {"writing_seconds": written - started, "forgetting_seconds": time.monotonic() - written}


def _shared_texts(result: Any, file: Path, *, together: bool) -> list[list[int]]:
    """Returns the texts in this file, which all trials of a study share. If it is not there, the base writes them now.

    together: whether all ranks call this.
    """
    from tailora.evaluation.forgetting import sample_texts
    from tailora.train.parallel import first_of_ranks, is_first_rank

    is_first = is_first_rank()
    with FileLock(file.with_suffix(".lock")) if is_first else nullcontext():  # other workers may need the same texts
        texts: list[list[int]] | None = json.loads(file.read_text()) if is_first and file.exists() else None
        if together:
            texts = first_of_ranks(texts)
        if texts is None:
            texts = sample_texts(result.model, result.tokenizer)
            if is_first:
                write_file(file, json.dumps(texts).encode())
    return texts


if __name__ == "__main__":
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    if is_launched_by_tailora():
        signal.signal(signal.SIGTERM, lambda *_: os._exit(1))  # torch's launcher sends it when another rank has ended
    with quiet_loggers(*TORCHAO_LOGGERS):
        code = main(Path(sys.argv[1]), *sys.argv[2:])
    if is_launched_by_tailora():
        end_process(code)
    sys.exit(code)
