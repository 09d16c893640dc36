"""What ends a run before its last step: a failure of one of its processes, which reaches all others, or a signal.

    Failure         why a process failed, as its launcher and the other processes read it
    leave_failure   writes it for the launcher of this process
    fail_together   lets an error of one process end all of them, and one of them show it
    cause_of        the one error that a launcher shows for all its processes
    StopSignals     stops a run after the current step at the first Ctrl-C, SIGTERM or SIGHUP

Importing this needs no torch.
"""

import json
import os
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from tailora import errors
from tailora.errors import INTERRUPTED, MemoryLimitError, ProcessFailedError, WriteError

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState
    from torch.distributed.distributed_c10d import Store

T = TypeVar("T")
TORCH_LAUNCHER = "TORCHELASTIC_RUN_ID"  # set by torch's launcher, and so by torchrun and accelerate
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # where torch's launcher reads why a process failed
HANGUP = getattr(signal, "SIGHUP", None)  # when a terminal is closed; Windows has none
SIGNALS = (signal.SIGINT, signal.SIGTERM, *([] if HANGUP is None else [HANGUP]))
SECONDS_FOR_ONE_SIGNAL = 5.0  # in which one of several processes may get it twice
SECONDS_TO_ANSWER = 5.0  # for the store of all processes, and for a process that waits like this one
SECONDS_TO_END = 45.0  # for a process that waits in a collective with one that has failed
TAIL = 20  # lines of a process that failed without a message
SHOWN_BY = "shown_by_rank"  # attribute of an error: the rank that shows it; the others stay silent


# ---- The record of a failure


@dataclass(frozen=True)
class Failure:
    """Why a process failed. torch's launcher reads `message` and `timestamp` of the JSON."""

    type: str  # name of the error's class
    message: str
    exit_code: int
    rank: int
    timestamp: float  # seconds since 1970
    traceback: str = ""  # of a bug in tailora

    @classmethod
    def of(cls, error: BaseException, **known: Any) -> Self:
        """known: what differs from the error's own message and exit code, and from rank 0."""
        code = INTERRUPTED if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)
        values = {"message": str(error), "exit_code": code, "rank": 0, "timestamp": time.time(), **known}
        return cls(type(error).__name__, **values)

    @classmethod
    def read(cls, file: Path) -> Self:
        return cls(**json.loads(file.read_text(encoding="utf-8")))

    def write(self, file: Path) -> None:
        """Raises WriteError."""
        from tailora.formats.io import write_file

        write_file(file, json.dumps(asdict(self)).encode())

    def as_error(self) -> Exception:
        """Returns the error, with its original type if that is a type of tailora."""
        if self.traceback:
            text = f"process {self.rank} failed: {self.type}: {self.message}"
            return ProcessFailedError(text, self.exit_code, traceback=self.traceback)
        error_type = getattr(errors, self.type, None)
        if error_type in (None, ProcessFailedError):
            return ProcessFailedError(self.message, self.exit_code)
        error: Exception = error_type(self.message)
        return error


def leave_failure(error: BaseException, **known: Any) -> bool:
    """Writes the failure for torch's launcher; False if there is no launcher. known: see `Failure.of`."""
    file = Path(os.environ.get(ERROR_FILE, ""))
    if ERROR_FILE not in os.environ or not file.parent.is_dir():  # the launcher has removed it
        return False
    try:
        Failure.of(error, **{"rank": int(os.environ.get("RANK", "0")), **known}).write(file)
    except WriteError:
        return False
    return True


def shown_by(error: BaseException | None) -> int | None:
    """Returns the rank that shows this error, or its cause; None if the processes have agreed on none."""
    while error is not None and SHOWN_BY not in vars(error):
        error = error.__cause__
    return None if error is None else int(vars(error)[SHOWN_BY])


# ---- Among the processes


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, SIGTERM or SIGHUP arrived; `folder` is the checkpoint to resume from."""

    def __init__(self, folder: Path) -> None:
        super().__init__(f"interrupted; resume with --resume-from-checkpoint {folder}")
        self.folder = folder


@contextmanager
def fail_together(
    accelerator: "Accelerator | PartialState", how_to_go_on: Callable[[], str] | None = None
) -> Iterator[None]:
    """An error within the block on one process ends all of them; only the first that fails raises its own error.

    The others raise ProcessFailedError as soon as their collective breaks, or end after SECONDS_TO_END. From then on
    signals are ignored, because launchers send SIGTERM to all processes as soon as one has ended.
    how_to_go_on: returns what to do about a run that has lost a process.
    """
    if accelerator.num_processes == 1:
        yield
        return
    from torch.distributed import distributed_c10d

    watch = FailureWatch(distributed_c10d._get_default_store(), accelerator.process_index)
    watch.start()
    try:
        yield
    except BaseException as error:
        ignore_signals()
        if isinstance(error, Interrupted):  # by agreement of all
            raise
        cause, failure = error, None
        if isinstance(error, RuntimeError) and any(name in str(error) for name in ("gloo", "NCCL")):
            advice = "" if how_to_go_on is None else f"; {how_to_go_on()}"
            reason = "another process of this run ended without an error message, probably because memory ran out"
            if "imed out" in str(error):
                reason = f"{watch.silent_ranks(accelerator.num_processes)} of this run did not answer within "
                reason += "--ddp-timeout; check its machine and the network, or use more seconds if it is only slow"
            cause = ProcessFailedError(f"{reason} ({str(error).splitlines()[0]}){advice}")
            failure = (
                watch.failure if watch.seen.wait(SECONDS_TO_ANSWER) else None
            )  # another process may be about to leave its own
        failure = failure or watch.report(cause)
        if failure.rank != watch.rank:
            text = f"process {failure.rank} of this run failed: {failure.message}"
            cause = ProcessFailedError(text, failure.exit_code)
        vars(cause)[SHOWN_BY] = failure.rank
        if cause is error:
            raise
        raise cause from error
    finally:
        watch.ended.set()


def ignore_signals() -> None:
    """Ignores Ctrl-C, SIGTERM and SIGHUP from here on: this process ends by itself."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)


class FailureWatch(threading.Thread):
    """Checks every second whether another process has failed. If so, it ends this one unless that ends soon.

    A process that waits in NCCL does not notice. The store may end with the process that hosts it, so the failure is
    kept here. If the launcher was killed, this process gets a SIGTERM, so that it saves a checkpoint.
    """

    def __init__(self, store: "Store", rank: int) -> None:
        super().__init__(daemon=True)
        self.store, self.rank, self.ended, self.seen = store, rank, threading.Event(), threading.Event()
        self.failure: Failure | None = None
        # key for the message of the first process that fails; each block of a process group has its own key
        self.key = f"tailora.failure.{store.add(f'tailora.blocks.{rank}', 1)}"
        self.launcher = os.getppid() if TORCH_LAUNCHER in os.environ else None  # else the parent may end before the run

    def run(self) -> None:
        has_store = True
        while not self.ended.wait(1):
            if self.launcher not in (None, os.getppid()):
                os.kill(os.getpid(), signal.SIGTERM)
                return
            try:
                if has_store and self.store.check([self.key]):
                    self.failure = Failure(**json.loads(self.store.get(self.key)))
            except RuntimeError:  # the process that hosted it has ended
                has_store = False
            if self.failure is not None:
                self.seen.set()
                if self.failure.rank != self.rank and not self.ended.wait(SECONDS_TO_END):
                    os._exit(self.failure.exit_code)
                return

    def report(self, error: BaseException) -> Failure:
        """Leaves the error for the other processes. Returns the first failure, from this or another process."""
        failure = Failure.of(error, rank=self.rank)
        text = self._ask(lambda: self.store.compare_set(self.key, "", json.dumps(asdict(failure))))
        if text is None:
            return self.failure or failure
        first = Failure(**json.loads(text))
        if first == failure:
            time.sleep(2)  # until the others have looked
        return first

    def silent_ranks(self, count: int) -> str:
        """Returns which of the processes do not wait for others like this one, in words."""
        key = f"{self.key}.waits."
        self._ask(lambda: self.store.set(f"{key}{self.rank}", "yes"))
        time.sleep(SECONDS_TO_ANSWER)  # until the others have noticed
        silent = self._ask(lambda: [rank for rank in range(count) if not self.store.check([f"{key}{rank}"])])
        if silent is None:
            silent = [0]  # whose machine has the store
        return f"process {', '.join(map(str, silent))}" if silent else "another process"

    def _ask(self, question: Callable[[], T]) -> T | None:
        """Returns an answer of the store; None if its process has ended, or is out of reach."""
        answers: list[T] = []

        def ask() -> None:
            with suppress(RuntimeError):
                answers.append(question())

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(SECONDS_TO_ANSWER)
        return answers[0] if answers else None


# ---- For the launcher


def cause_of(exit_codes: Mapping[int, int], folder: Path, advice: str, *, interrupted: bool) -> BaseException:
    """Returns the one error to show for all processes: the first one that is not the effect of another.

    exit_codes: of the processes that failed, by rank, in the order in which they ended.
    folder: contains what the processes have left (`leave_failure`) and printed.
    advice: how to go on; "" if the processes are no run.
    interrupted: whether the launcher got a signal.
    """
    recorded = sorted(map(Failure.read, folder.glob("**/error.json")), key=lambda failure: failure.timestamp)
    for failure in recorded:
        if failure.type not in (KeyboardInterrupt.__name__, ProcessFailedError.__name__):
            return failure.as_error()
    for failure in recorded:
        if failure.type == KeyboardInterrupt.__name__ and failure.message:  # the run has saved a checkpoint
            return KeyboardInterrupt(failure.message)
    rank, code = next(iter(exit_codes.items()))
    if interrupted or code == INTERRUPTED:
        return KeyboardInterrupt(advice)
    if code < 0:
        name = signal.Signals(-code).name
        how_to_go_on = advice and f"; {advice}"
        if name == "SIGKILL":
            return MemoryLimitError(f"process {rank} was killed (SIGKILL), probably out of memory{how_to_go_on}")
        return ProcessFailedError(f"process {rank} was terminated by {name}{how_to_go_on}")
    for failure in recorded:
        if failure.rank == rank:
            return failure.as_error()
    printed = "".join(file.read_text(errors="replace") for file in folder.glob(f"**/{rank}/stderr.log"))
    lines = "\n".join(printed.splitlines()[-TAIL:])
    return ProcessFailedError(f"process {rank} exited with code {code}" + (f":\n{lines}" if lines else ""))


# ---- Signals


def leave_closed_terminal() -> None:
    """Sends output to nowhere that goes to a terminal that was closed, where every write is an error."""
    for descriptor in (0, 1, 2):
        with suppress(OSError):
            if stat.S_ISCHR(os.fstat(descriptor).st_mode) and not os.isatty(descriptor):
                os.dup2(os.open(os.devnull, os.O_RDWR), descriptor)


class StopSignals:
    """Stops the run between two steps at the first SIGINT, SIGTERM or SIGHUP, from `handle` to `restore`.

    A second signal of the same kind has its usual effect. One of the other kind changes nothing, because launchers send
    SIGTERM after a Ctrl-C; nor does a second one soon after the first if there are several processes, because Slurm
    sends signals to all of them, and their launcher passes its own on. A second SIGHUP changes nothing, because the
    shell and the system both send one. Only the main thread receives signals.
    """

    def __init__(self, processes: int = 1) -> None:
        self.stop = threading.Event()
        self._is_alone = processes == 1
        self._earlier: dict[int, Any] = {}  # number of a signal -> its handler before
        self._times: dict[int, float] = {}  # number of a signal -> when it came first

    def handle(self) -> None:
        if threading.current_thread() is threading.main_thread():
            under_nohup = HANGUP is not None and signal.getsignal(HANGUP) is signal.SIG_IGN
            numbers = [number for number in SIGNALS if number != HANGUP or not under_nohup]
            self._earlier = {number: signal.signal(number, self._request_stop) for number in numbers}

    def restore(self) -> None:
        for number in list(self._earlier):
            self._restore(number)

    def _request_stop(self, number: int, _frame: FrameType | None) -> None:
        self.stop.set()
        if number == HANGUP:
            leave_closed_terminal()
            return
        now = time.monotonic()
        first = self._times.setdefault(number, now)
        if self._is_alone:
            self._restore(number)
        elif now - first > SECONDS_FOR_ONE_SIGNAL:
            self._restore(number)
            signal.raise_signal(number)

    def _restore(self, number: int) -> None:
        handler = self._earlier.pop(number, None)
        if signal.getsignal(number) == self._request_stop:  # not ignored by now
            signal.signal(number, handler)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()
