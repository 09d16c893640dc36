"""Several processes of one run: how they are started, how this one was, and the command that starts them again.

    count_processes   `--nproc-per-node gpu` -> a number
    launch            starts the processes with torch's elastic launcher, which is torchrun's too
    command_line      the command that runs another one as this one was started
    leave_failure     what a process that fails leaves for the one that started it

Rank 0 has the terminal. What the other ranks print goes to files, and is shown if one of them fails without a message
of ours. `launch` raises the one error of the run: that of the process that failed first. Importing this needs no torch.
"""

import json
import os
import shlex
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import psutil

from tailora import errors
from tailora.errors import INTERRUPTED, ConfigError, ProcessFailedError
from tailora.formats.run_folder import checkpoints_in
from tailora.quiet import silent_loggers

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

STARTED_HERE = "TAILORA_NPROC_PER_NODE"  # set for the processes that `launch` starts
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # where torch's launcher reads why a process failed
RANKS_OF_OTHERS = ("WORLD_SIZE", "LOCAL_RANK", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
PROGRAM = ("tailora", "tailora.cli")  # names of the module, and of the script
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT")
MAX_SIGNALS = 3  # of one kind; then the processes are killed
TAIL = 20  # lines of a process that failed without a message


# ---- How this process was started


def world_size() -> int:
    """Returns the number of processes of the run that this one belongs to, as its launcher says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def is_started_here() -> bool:
    """True in a process that `launch` has started; that one prints its messages."""
    return STARTED_HERE in os.environ


def command_line(command: str, *arguments: str) -> str:
    """Returns the line that runs a command of tailora in as many processes as this one's run has."""
    if count := os.environ.get(STARTED_HERE):
        return shlex.join(["tailora", command, "--nproc-per-node", count, *arguments])
    if world_size() == 1:
        return shlex.join(["tailora", command, *arguments])
    return shlex.join([*_launcher(), "--", command, *arguments])  # torchrun would take --r for its own without --


def _launcher() -> list[str]:
    """Returns the command line of torchrun or accelerate that started this process, up to the program's name."""
    parent, ours = psutil.Process().parent(), sys.argv[1:]
    words = parent.cmdline() if parent else []
    count = len(words) - len(ours)
    is_ours = words[count:] == ours
    if count > 0 and words[count - 1] == "--":  # which torchrun does not pass on, depending on Python's version
        count -= 1
    if is_ours and count > 2 and Path(words[count - 1]).name in PROGRAM:
        is_script = not words[1].startswith("-")  # python /usr/bin/torchrun ..., or python -m torch.distributed.run ...
        return [Path(words[1]).name, *words[2:count]] if is_script else ["python", *words[1:count]]
    here = os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])
    return ["torchrun", "--nproc-per-node", here, "-m", "tailora"]


def how_to_resume(checkpoint: Path, *changes: str) -> str:
    """Returns "to resume it:" and the command that resumes a run, in as many processes as it has now.

    changes: further flags, such as a lower learning rate.
    """
    where = ", on each machine" if int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1 else ""
    what = " with a lower rate" if "--learning-rate" in changes else ""
    config = str(checkpoint.parent / "config.yaml")
    line = command_line("train", "--config", config, "--resume-from-checkpoint", str(checkpoint), *changes)
    return f"to resume it{what}{where}:\n{line}"


def how_to_go_on(output_dir: Path) -> str:
    """Returns what is left of a run that has failed: its last checkpoint, and the command that resumes it."""
    if checkpoints := checkpoints_in(output_dir):
        return f"the last checkpoint is {checkpoints[-1]}; {how_to_resume(checkpoints[-1])}"
    return "no checkpoint was saved yet: --save-steps N saves one every N steps"


def check_all_started() -> None:
    """Raises ConfigError if `accelerate launch` was to start several processes and has started one, as it may."""
    is_accelerate = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_PORT" in os.environ
    if is_accelerate and not any(name in os.environ for name in RANKS_OF_OTHERS):
        raise ConfigError(
            "accelerate launch was asked for several processes and started one, as it does where it finds no several "
            "GPUs: add --multi-gpu, which works on CPUs too, or take `tailora train --nproc-per-node 2`"
        )


# ---- Starting several


def count_processes(asked: str, device: str) -> int:
    """Returns how many processes --nproc-per-node means: a number; 'gpu' or 'auto', one for each device.

    device: the value of --device. Raises ConfigError.
    """
    if world_size() > 1 and not is_started_here():
        raise ConfigError(
            f"--nproc-per-node: a launcher has started {world_size()} processes already; give the flag to it alone"
        )
    if asked not in ("gpu", "auto") and not (asked.isdecimal() and int(asked) > 0):
        raise ConfigError(f"--nproc-per-node {asked}: give a number of processes, or gpu or auto for one per device")
    from tailora.core.device import AUTO, devices

    there = devices()
    kind, _, index = (there[0].type if device == AUTO else device).partition(":")
    count = [candidate.type for candidate in there].count(kind)
    if kind == "cpu":
        if asked == "gpu":
            raise ConfigError("--nproc-per-node gpu: there is no device but the CPU; give a number of processes")
        return 1 if asked == "auto" else int(asked)
    wanted = count if not asked.isdecimal() else int(asked)
    if wanted > 1 and index:
        raise ConfigError(
            f"--device {device}: each of the {wanted} processes takes the device of its own rank; give --device {kind}"
        )
    if wanted > count:
        raise ConfigError(f"--nproc-per-node {asked}: each process needs a device, and there are {count} of {kind}")
    return wanted


def threads_per_process(count: int) -> int:
    """Returns the share of the processor's cores that each of `count` processes has."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(cores // count, 1)


def launch(arguments: Sequence[str], count: int, output_dir: Path) -> None:
    """Runs `python -m tailora ARGUMENTS` in `count` processes on this machine, until all have ended.

    Signals are passed on to them. Raises the error of the process that failed first, with its exit code.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    threads = os.environ.get("OMP_NUM_THREADS", str(threads_per_process(count)))
    environment = {STARTED_HERE: str(count), "OMP_NUM_THREADS": threads}
    with (
        tempfile.TemporaryDirectory(prefix="tailora-") as name,
        silent_loggers("torch.distributed.elastic", "torch.distributed.launcher", "torch.distributed.run"),
        _environment(environment),
        PassedOn() as signals,
        ThreadPoolExecutor(1) as executor,
    ):
        folder = Path(name)
        config = LaunchConfig(  # what torchrun --standalone does
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            run_id=str(uuid.uuid4()),
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",  # the machine's own name may not resolve
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(name, redirects=dict.fromkeys(range(1, count), Std.ALL)),
        )
        # In a thread torch's launcher leaves signals to us: it would kill the processes 30 s after the first.
        future = executor.submit(elastic_launch(config, sys.executable), "-m", "tailora", *arguments)
        signals.pass_on_until_done(future)
        try:
            future.result()
        except ChildFailedError as failed:
            raise _cause(failed.failures, folder, output_dir, signals.are_any) from None


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Within the block these variables are set, for processes that are started in it."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


class PassedOn:
    """Within the block signals are not handled here but passed on to the processes that this one has started.

    Each of these leads a session of its own, so that no Ctrl-C reaches it from the terminal.
    """

    def __init__(self) -> None:
        self.pending: list[int] = []
        self.counts: dict[int, int] = {}

    def __enter__(self) -> "PassedOn":
        numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
        self.earlier = {number: signal.getsignal(number) for number in numbers}
        for number, handler in self.earlier.items():
            if handler is not signal.SIG_IGN:  # as of SIGHUP under nohup
                signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.earlier.items():
            signal.signal(number, handler)

    @property
    def are_any(self) -> bool:
        return bool(self.counts)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        self.counts[number] = self.counts.get(number, 0) + 1
        self.pending.append(number if self.counts[number] < MAX_SIGNALS else signal.SIGKILL)

    def pass_on_until_done(self, future: "Future[Any]") -> None:
        while not future.done():
            wait([future], timeout=0.1)
            children = psutil.Process().children() if self.pending else []
            while children and self.pending:
                number = self.pending.pop(0)
                for child in children:
                    with suppress(ProcessLookupError):  # it has ended
                        os.killpg(child.pid, number)


# ---- Why a run has failed


def leave_failure(error: BaseException, message: str, exit_code: int) -> bool:
    """Writes why this process fails to the file that torch's launcher gave it, if any; False if there is none."""
    file = os.environ.get(ERROR_FILE)
    if not file:
        return False
    seen_by_torch = {"py_callstack": message, "timestamp": str(int(time.time()))}
    ours = {"type": type(error).__name__, "exit_code": exit_code, "time": time.time()}
    content = {"message": {"message": message, "extraInfo": {**seen_by_torch, **ours}}}
    try:
        Path(file).write_text(json.dumps(content), encoding="utf-8")
    except OSError:
        return False
    return True


def _failure_in(file: Path) -> dict[str, Any]:
    content = json.loads(file.read_text(encoding="utf-8"))["message"]
    return {**content["extraInfo"], "message": content["message"]}


def _cause(
    failures: "Mapping[int, ProcessFailure]", folder: Path, output_dir: Path, are_signals: bool
) -> BaseException:
    """Returns the one error to show for all processes: the first that has a cause of its own.

    failures: by rank, in the order in which torch's launcher saw the processes end.
    """
    files = sorted(folder.glob("**/error.json"))
    left = sorted(map(_failure_in, files), key=lambda failure: failure["time"])
    is_effect = {ProcessFailedError.__name__, KeyboardInterrupt.__name__}  # of another one's failure, or of a signal
    if own := [failure for failure in left if failure["type"] not in is_effect]:
        return _error(own[0])
    number, first = next(iter(failures.items()))
    who = f"process {number} of {os.environ[STARTED_HERE]}"
    if first.exitcode < 0 and not are_signals:
        name = signal.Signals(-first.exitcode).name
        why = ", most likely for memory" if name == "SIGKILL" else ""
        return ProcessFailedError(f"{who} was ended by {name}{why}; {how_to_go_on(output_dir)}")
    if left:
        return _error(max(left, key=lambda failure: len(failure["message"])))  # one knows how to resume
    if are_signals or first.exitcode == INTERRUPTED:
        return KeyboardInterrupt(*([how_to_go_on(output_dir)] if checkpoints_in(output_dir) else []))
    printed = "".join(file.read_text(errors="replace") for file in folder.glob(f"**/{number}/stderr.log"))
    lines = "\n".join(printed.splitlines()[-TAIL:])
    return ProcessFailedError(f"{who} ended with exit code {first.exitcode}" + (f":\n{lines}" if lines else ""))


def _error(failure: Mapping[str, Any]) -> BaseException:
    """Returns the error that a process has left, of its own type if it is one of ours."""
    kind, message, code = failure["type"], failure["message"], failure["exit_code"]
    if code == INTERRUPTED:
        return KeyboardInterrupt(message) if message else KeyboardInterrupt()
    if kind == ProcessFailedError.__name__ or not hasattr(errors, kind):
        return ProcessFailedError(message, code)
    error: BaseException = getattr(errors, kind)(message)
    return error
