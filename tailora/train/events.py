"""What a run reports while it trains, what it returns, and what stops it: Ctrl-C, or a process of it that fails.

The library prints nothing. `run(config, on_event=listener)` calls the listener with the events below.
"""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import FrameType
from typing import Any, Self

from accelerate import Accelerator, PartialState
from torch.distributed import distributed_c10d
from transformers import PreTrainedTokenizerBase

from tailora.data.prepare import PreparedData
from tailora.errors import INTERRUPTED, ProcessFailedError
from tailora.train.launch import (
    SECONDS_FOR_ONE_SIGNAL,
    how_to_go_on,
    launcher_pid,
    show_by,
    shown_by,
    world_size,
)
from tailora.train.loss import Evaluation, Sums
from tailora.train.trainable import Trainable


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
class EvaluationProgress:
    """So many of this rank's examples are evaluated. what: they are."""

    done: int
    total: int
    what: str = "held-out examples"


@dataclass(frozen=True)
class Stepped:
    step: int  # steps done
    max_steps: int
    loss: float  # nats per supervised token, before the step
    learning_rate: float
    grad_norm: float  # before clipping
    tokens: int  # of this step, over all ranks
    supervised_tokens: int
    seconds: float  # since the results of the step before were there, or since this step began if that was later
    tokens_per_second: float  # of training so far, without evaluations
    eta_seconds: float
    memory_bytes: int  # peak so far
    skipped: bool = False  # it changed nothing, because a gradient overflowed float16 at the loss scale


@dataclass(frozen=True)
class Saved:
    step: int
    folder: Path


@dataclass(frozen=True)
class Note:
    """A decision that was made for the user, and the reason."""

    text: str


@dataclass(frozen=True)
class Finished:
    result: dict[str, Any]


Event = Prepared | EvaluationProgress | Evaluated | Stepped | Saved | Note | Finished
Listener = Callable[[Event], None]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM arrived; `folder` is the checkpoint to resume from."""

    def __init__(self, folder: Path) -> None:
        super().__init__(f"interrupted; resume with --resume-from-checkpoint {folder}")
        self.folder = folder


IN_MEMORY = {"in_memory": True}


@dataclass(frozen=True, eq=False)
class TrainResult:
    """The numbers of a run, and the objects that it leaves in memory, which are not part of `to_dict`."""

    output_dir: str
    steps: int
    train_tokens: int
    supervised_tokens: int
    tokens_per_second: float  # of training, without evaluations
    eval_loss_before: float | None  # None without held-out examples
    eval_loss_after: float | None
    best_step: int  # the step whose adapter was kept
    trainable_parameters: int
    total_parameters: int
    peak_memory_bytes: int
    seconds: float  # of everything, loading included
    model: Trainable = field(metadata=IN_MEMORY)
    tokenizer: PreTrainedTokenizerBase = field(metadata=IN_MEMORY)
    data: PreparedData | None = field(metadata=IN_MEMORY)  # None when streaming without eval_data
    before: Evaluation | None = field(metadata=IN_MEMORY)
    after: Evaluation | None = field(metadata=IN_MEMORY)
    # right predictions of each held-out example; None for tasks without labels
    hits_before: Sums | None = field(default=None, metadata=IN_MEMORY)
    hits_after: Sums | None = field(default=None, metadata=IN_MEMORY)

    def to_dict(self) -> dict[str, Any]:
        """Returns the numbers; of labels also the accuracy before and after."""
        numbers = {item.name: getattr(self, item.name) for item in fields(self) if not item.metadata}
        evaluations = {"before": (self.hits_before, self.before), "after": (self.hits_after, self.after)}
        for when, (hits, evaluation) in evaluations.items():
            if hits is not None and evaluation is not None:
                numbers[f"eval_accuracy_{when}"] = float(hits.sum() / evaluation.counts.sum())
        return numbers


SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """Stops the run between two steps at the first SIGINT or SIGTERM, from `handle` to `restore`.

    A second signal of the same kind has its usual effect. One of the other kind changes nothing, because launchers send
    SIGTERM after a Ctrl-C. Nor does a second one that one of several processes gets soon after the first: Slurm sends
    signals to all processes, and the launcher among them passes them on. The end of the `with` block restores, too,
    when everything is cleaned up. Only the main thread receives signals.

    When the run has stopped, or has failed as one of several processes that know of each other, the handlers of before
    are told so: see `announce_end`.
    """

    def __init__(self) -> None:
        self.stop = threading.Event()
        self._earlier: dict[int, Any] = {}
        self._times: dict[int, float] = {}  # when a signal came first
        self._handlers: list[Any] = []

    def handle(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self._earlier = {number: signal.getsignal(number) for number in SIGNALS}
            for number in SIGNALS:
                signal.signal(number, self._request_stop)

    def restore(self) -> None:
        for number in list(self._earlier):
            self._restore(number)

    def _request_stop(self, number: int, _frame: FrameType | None) -> None:
        self.stop.set()
        now = time.monotonic()
        first = self._times.setdefault(number, now)
        if world_size() == 1:
            self._restore(number)
        elif now - first > SECONDS_FOR_ONE_SIGNAL:
            self._restore(number)
            signal.raise_signal(number)

    def _restore(self, number: int) -> None:
        if number in self._earlier:
            signal.signal(number, self._earlier.pop(number))

    def __enter__(self) -> Self:
        self._handlers = [signal.getsignal(number) for number in SIGNALS]
        return self

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        if isinstance(error, Interrupted) or (error is not None and shown_by(error) is not None):
            announce_end(self._handlers)
        self.restore()


def announce_end(handlers: Iterable[Any]) -> None:
    """Sets the attribute `is_ending` of handlers of signals that have it: this process is about to say why it ends.

    As soon as one of several processes has ended, launchers send SIGTERM to the others, which must not replace the
    message of this one.
    """
    for handler in handlers:
        if hasattr(handler, "is_ending"):
            handler.is_ending = True


SECONDS_TO_END = 45.0  # for a process that waits in a collective with one that has failed


@contextmanager
def fail_together(accelerator: Accelerator | PartialState, output_dir: Path | None = None) -> Iterator[None]:
    """An error within the block on one process ends all of them; only the first that fails raises its own error.

    The others raise ProcessFailedError as soon as their collective breaks, or end after SECONDS_TO_END if it does not.
    If a process ends without an error, as one that is killed does, the first of the others to notice says so. Each
    error knows which rank is to show it (`launch.shown_by`).

    output_dir: of the run, to name its last checkpoint; None if this is no run.
    """
    if accelerator.num_processes == 1:
        yield
        return
    watch = FailureWatch(distributed_c10d._get_default_store(), accelerator.process_index)
    watch.start()
    try:
        yield
    except Interrupted:  # by agreement of all
        raise
    except BaseException as error:
        announce_end(map(signal.getsignal, SIGNALS))
        cause, failure = error, {}
        if is_broken_collective(error):
            cause, failure = lost_process(error, output_dir), watch.failure_of_another()
        failure = failure or watch.report(cause)
        if failure["rank"] != watch.rank:
            text = f"process {failure['rank']} of this run failed: {failure['message']}"
            cause = ProcessFailedError(text, failure["exit_code"])
        show_by(cause, failure["rank"])
        if cause is error:
            raise
        raise cause from error
    finally:
        watch.ended.set()


def is_broken_collective(error: BaseException) -> bool:
    """True if the error says that another process has left a collective."""
    return isinstance(error, RuntimeError) and any(name in str(error) for name in ("gloo", "NCCL"))


def lost_process(error: BaseException, output_dir: Path | None) -> ProcessFailedError:
    """Returns what to say of a collective that broke because a process ended without an error."""
    return ProcessFailedError(
        "another process of this run ended without a message, most likely killed for memory "
        f"({str(error).splitlines()[0]}){'' if output_dir is None else f'; {how_to_go_on(output_dir)}'}"
    )


class FailureWatch(threading.Thread):
    """Looks every second whether another process has failed. Then it ends this one, if that has not ended soon.

    A process that waits in NCCL does not notice. The first failure is kept here, because the store may end with the
    process that holds it. If the launcher has ended, as when it is killed, nobody else ends this process: then it gets
    a SIGTERM, so that it saves a checkpoint.
    """

    def __init__(self, store: distributed_c10d.Store, rank: int) -> None:
        super().__init__(daemon=True)
        self.store, self.rank, self.ended, self.seen = store, rank, threading.Event(), threading.Event()
        self.failure: dict[str, Any] = {}
        # where the first process that fails leaves its message; another one for each block of a group's processes
        self.key = f"tailora.failure.{store.add(f'tailora.blocks.{rank}', 1)}"
        self.has_store = True
        self.launcher = launcher_pid()

    def run(self) -> None:
        while not self.ended.wait(1):
            if self.launcher not in (None, os.getppid()):
                os.kill(os.getpid(), signal.SIGTERM)
                return
            self._look()
            if self.failure:
                self.seen.set()
                if self.failure["rank"] != self.rank and not self.ended.wait(SECONDS_TO_END):
                    os._exit(self.failure["exit_code"])
                return

    def _look(self) -> None:
        try:
            if self.has_store and self.store.check([self.key]):
                self.failure = json.loads(self.store.get(self.key))
        except RuntimeError:  # the process that held it has ended
            self.has_store = False

    def report(self, error: BaseException) -> dict[str, Any]:
        """Leaves the error for the other processes. Returns the first failure: this one, or that of another process."""
        code = INTERRUPTED if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)
        failure = {"rank": self.rank, "message": str(error), "exit_code": code}
        try:
            first: dict[str, Any] = json.loads(self.store.compare_set(self.key, "", json.dumps(failure)))
        except RuntimeError:
            return self.failure or failure
        if first == failure:
            time.sleep(2)  # until the others have looked
        return first

    def failure_of_another(self) -> dict[str, Any]:
        """Returns the failure of another process, which may be about to leave it; {} if it left none."""
        return self.failure if self.seen.wait(5) else {}
