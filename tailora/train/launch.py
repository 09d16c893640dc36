"""Several processes of one run: how they are started, how this one was, and the command that starts them again.

    count_processes    turns the value of --nproc-per-node, such as "gpu", into a number
    launch             starts the processes, with torch's elastic launcher, as torchrun does
    command_line       returns the line that starts a command in as many processes, and with the same launcher
    end_with_launcher  ends this process soon after its launcher has ended
    show_by            sets which rank shows an error
    leave_failure      writes why this process fails, for its launcher
    end_process        ends this process

Rank 0 has the terminal. What the other ranks print goes to files, and is shown if one of them fails without a message
of ours. `launch` raises the one error of the run: that of the process that failed first. Importing this needs no torch.
"""

import json
import os
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from tailora import errors
from tailora.errors import (
    INTERRUPTED,
    ConfigError,
    MemoryLimitError,
    ProcessFailedError,
    TailoraError,
    WriteError,
)
from tailora.quiet import silent_loggers

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

LAUNCHED_BY_TAILORA = "TAILORA_NPROC_PER_NODE"  # set for the processes that `launch` starts: their number
LAUNCHER_PID, LAUNCHER_FOLDER = "TAILORA_LAUNCHER_PID", "TAILORA_LAUNCHER_FOLDER"  # where `launch` itself is
TORCH_LAUNCHER = "TORCHELASTIC_RUN_ID"  # set by torch's launcher, and so by torchrun and accelerate
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # where torch's launcher reads why a process failed
LAUNCHER_VARIABLES = ("WORLD_SIZE", "LOCAL_RANK", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
NODE_RANK_FLAGS = ("--node-rank", "--node_rank", "--machine-rank", "--machine_rank")  # of torchrun and accelerate
PROGRAM = ("tailora", "tailora.cli")  # names of the module, and of the script
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT")
MAX_SIGNALS = 3  # of one kind; then the processes are killed
SECONDS_FOR_ONE_SIGNAL = 5.0  # in which one of several processes may get it twice
TAIL = 20  # lines of a process that failed without a message
SHOWN_BY = "shown_by_rank"  # attribute of an error


# ---- How this process was started


def world_size() -> int:
    """Returns the number of processes of the run that this one belongs to, as its launcher says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Returns the number of this process in its run, as its launcher says."""
    return int(os.environ.get("RANK", "0"))


def is_launched_by_tailora() -> bool:
    """True in a process that `launch` has started; that one prints its messages."""
    return LAUNCHED_BY_TAILORA in os.environ


def launcher_pid() -> int | None:
    """Returns the id of the torch launcher that started this process; None without one.

    A parent of another kind may end before the run, such as the shell of a script that starts each rank.
    """
    if pid := os.environ.get(LAUNCHER_PID):
        return int(pid)
    return os.getppid() if TORCH_LAUNCHER in os.environ else None


def has_lost_launcher() -> bool:
    """True in a process that `launch` has started if `launch` has ended before it, as when it was killed."""
    return LAUNCHER_PID in os.environ and launcher_pid() != os.getppid()


@contextmanager
def end_with_launcher() -> Iterator[None]:
    """Within the block this process ends soon after its launcher.

    It is for code of torch that waits for other processes, through the launcher, where no signal has an effect.
    """
    launcher, is_done = launcher_pid(), threading.Event()

    def watch() -> None:
        while not is_done.wait(1):
            if os.getppid() != launcher:
                end_without_launcher()

    if launcher is not None:
        threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        is_done.set()


def end_without_launcher() -> NoReturn:
    """Ends this process, of which nothing is to be saved."""
    if rank() == 0:
        os.write(2, b"interrupted\n")
    if has_lost_launcher():
        remove_launcher_folder()
    os._exit(INTERRUPTED)


def command_line(command: str, *arguments: str) -> str:
    """Returns the line that runs a command of tailora in as many processes as this one's run has.

    It is the same for all machines of the run: without the rank of this one.
    """
    if count := os.environ.get(LAUNCHED_BY_TAILORA):
        return shlex.join(["tailora", command, "--nproc-per-node", count, *arguments])
    if world_size() == 1:
        return shlex.join(["tailora", command, *arguments])
    launcher, _ = _launcher()
    return shlex.join([*launcher, "--", command, *arguments])  # torchrun would take --r for its own without --


def _launcher() -> tuple[list[str], str]:
    """Returns the command line of torchrun or accelerate that started this process, up to the program's name.

    The flag with the rank of this machine is left out, and returned with it; "" if there is none.
    """
    words, arguments = _parent_command_line(), sys.argv[1:]
    count = len(words) - len(arguments)
    is_same = words[count:] == arguments
    if count > 0 and words[count - 1] == "--":  # which torchrun does not pass on, depending on Python's version
        count -= 1
    if is_same and count > 2 and Path(words[count - 1]).name in PROGRAM:
        is_script = not words[1].startswith("-")  # python /usr/bin/torchrun ..., or python -m torch.distributed.run ...
        return _without_node_rank([Path(words[1]).name, *words[2:count]] if is_script else ["python", *words[1:count]])
    on_this_machine = os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])
    return ["torchrun", "--nproc-per-node", on_this_machine, "-m", "tailora"], ""


def _parent_command_line() -> list[str]:
    """Returns the words of the command that started this process; none if the system does not tell."""
    import psutil

    try:
        parent = psutil.Process().parent()
        return parent.cmdline() if parent else []
    except psutil.Error:  # it has ended, or belongs to another user
        return []


def _without_node_rank(words: Sequence[str]) -> tuple[list[str], str]:
    for index, word in enumerate(words):
        flag, equals, _ = word.partition("=")
        if flag in NODE_RANK_FLAGS:
            return [*words[:index], *words[index + (1 if equals else 2) :]], flag
    return list(words), ""


def how_to_resume(checkpoint: Path, *changes: str, purpose: str = "to resume it") -> str:
    """Returns the purpose and the command that resumes a run, in as many processes as it has now.

    changes: further flags, such as a lower learning rate.
    """
    where = ""
    if int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1:
        _, flag = _launcher()
        where = ", on each machine" + (f" with its own {flag} before -m" if flag else "")
    config = str(checkpoint.parent / "config.yaml")
    line = command_line("train", "--config", config, "--resume-from-checkpoint", str(checkpoint), *changes)
    return f"{purpose}{where}:\n{line}"


def how_to_go_on(output_dir: Path) -> str:
    """Returns what is left of a run that has failed: its last checkpoint, and the command that resumes it."""
    from tailora.formats.run_folder import checkpoints_in

    if checkpoints := checkpoints_in(output_dir):
        return f"the last checkpoint is {checkpoints[-1]}; {how_to_resume(checkpoints[-1])}"
    return "no checkpoint was saved yet: --save-steps N saves one every N steps"


def check_all_started() -> None:
    """Raises ConfigError if `accelerate launch` was to start several processes and has started one, as it may."""
    is_accelerate = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_PORT" in os.environ
    if is_accelerate and not any(name in os.environ for name in LAUNCHER_VARIABLES):
        raise ConfigError(
            "accelerate launch was asked for several processes and started one, as it does where it finds no several "
            "GPUs: add --multi-gpu, which works on CPUs too, or take `tailora train --nproc-per-node 2`"
        )


# ---- Starting several


def count_processes(asked: str, device: str) -> int:
    """Returns how many processes --nproc-per-node means: a number; 'gpu' or 'auto', one for each device.

    device: the value of --device. Raises ConfigError.
    """
    if world_size() > 1:
        raise ConfigError(
            f"--nproc-per-node: a launcher has started {world_size()} processes already; give the flag to it alone"
        )
    if asked not in ("gpu", "auto") and not (asked.isdecimal() and int(asked) > 0):
        raise ConfigError(f"--nproc-per-node {asked}: give a number of processes, or gpu or auto for one per device")
    from tailora.core.device import AUTO, absent_device, devices

    candidates, device = devices(), device_asked_for(device)
    device_type, _, index = (candidates[0].type if device == AUTO else device).partition(":")
    count = [candidate.type for candidate in candidates].count(device_type)
    if not count:
        raise absent_device(device, candidates)
    if device_type == "cpu":
        if asked == "gpu":
            raise ConfigError("--nproc-per-node gpu: the device is the CPU; give a number of processes")
        return 1 if asked == "auto" else int(asked)
    wanted = int(asked) if asked.isdecimal() else count
    if wanted > 1 and index:
        raise ConfigError(
            f"--device {device}: each of the {wanted} processes takes the device of its own rank; "
            f"give --device {device_type}"
        )
    if wanted > count:
        raise ConfigError(
            f"--nproc-per-node {asked}: each process needs a device, and there are {count} of {device_type}"
        )
    return wanted


def device_asked_for(name: str) -> str:
    """Returns the name of the device: for auto the environment of `accelerate launch` decides first."""
    if name != "auto":
        return name
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on", "t", "y"):
        return "cpu"
    return os.environ.get("ACCELERATE_TORCH_DEVICE", name)


def threads_per_process(count: int) -> int:
    """Returns the share of the processor's cores that each of `count` processes has."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(cores // count, 1)


def launch(
    arguments: Sequence[str],
    count: int,
    output_dir: Path | None = None,
    results: Collection[int] = (),
    *,
    module: str = "tailora",
    temporary: Path | None = None,
) -> int:
    """Runs `python -m MODULE ARGUMENTS` in `count` processes on this machine, until all have ended.

    output_dir: of a run, which a message says how to resume.    results: exit codes that are no failures.
    temporary: folder for temporary files, which stay there if this process is killed; by default the system's.
    Signals are passed on to the processes. Returns 0, or the one of `results` that the first process had.
    Raises the error of the process that failed first, with its exit code.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    threads = os.environ.get("OMP_NUM_THREADS", str(threads_per_process(count)))
    with (
        tempfile.TemporaryDirectory(prefix="tailora-", dir=temporary) as name,
        silent_loggers("torch.distributed.elastic", "torch.distributed.launcher", "torch.distributed.run"),
        _environment(
            {
                LAUNCHED_BY_TAILORA: str(count),
                LAUNCHER_PID: str(os.getpid()),
                LAUNCHER_FOLDER: name,
                "OMP_NUM_THREADS": threads,
            }
        ),
        SignalForwarder() as signals,
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
        future = executor.submit(elastic_launch(config, sys.executable), "-m", module, *arguments)
        signals.forward_until_done(future)
        try:
            future.result()
        except ChildFailedError as failed:
            first = next(iter(failed.failures.values()))
            if first.exitcode in results and not any(folder.glob("**/error.json")):
                return first.exitcode
            raise _cause(failed.failures, folder, output_dir, count, signals.has_received) from None
    return 0


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


class SignalForwarder:
    """Within the block signals are not handled here but forwarded to the processes that this one has started.

    Each of these leads a session of its own, so that no Ctrl-C reaches it from the terminal.
    """

    def __init__(self) -> None:
        self.pending: list[int] = []
        self.counts: dict[int, int] = {}

    def __enter__(self) -> "SignalForwarder":
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
    def has_received(self) -> bool:
        return bool(self.counts)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        self.counts[number] = self.counts.get(number, 0) + 1
        self.pending.append(number if self.counts[number] < MAX_SIGNALS else signal.SIGKILL)

    def forward_until_done(self, future: "Future[Any]") -> None:
        import psutil

        while not future.done():
            wait([future], timeout=0.1)
            children = psutil.Process().children() if self.pending else []
            while children and self.pending:
                number = self.pending.pop(0)
                for child in children:
                    with suppress(ProcessLookupError):  # it has ended
                        os.killpg(child.pid, number)


# ---- Why a run has failed


def show_by(error: BaseException, number: int) -> None:
    """Notes on the error the rank that shows it, as the processes have agreed; the others stay silent."""
    vars(error)[SHOWN_BY] = number


def shown_by(error: BaseException) -> int | None:
    """Returns the rank that shows this error, or its cause; None if the processes have agreed on none."""
    cause: BaseException | None = error
    while cause is not None:
        if SHOWN_BY in vars(cause):
            return int(vars(cause)[SHOWN_BY])
        cause = cause.__cause__
    return None


def leave_failure(error: BaseException, message: str, exit_code: int, traceback: str = "") -> bool:
    """Writes why this process fails to the file that torch's launcher gave it, if any; False if there is none.

    traceback: of an error that is a bug of tailora.
    """
    name = os.environ.get(ERROR_FILE)
    if not name or not Path(name).parent.is_dir():  # the launcher has removed it
        return False
    from tailora.formats.io import write_file

    for_torch = {"py_callstack": traceback or message or type(error).__name__, "timestamp": str(int(time.time()))}
    for_launch = {"type": type(error).__name__, "exit_code": exit_code, "time": time.time(), "traceback": traceback}
    extra = {**for_torch, **for_launch, "rank": rank()}
    try:
        write_file(Path(name), json.dumps({"message": {"message": message, "extraInfo": extra}}).encode())
    except WriteError:
        return False
    return True


def end_process(code: int) -> NoReturn:
    """Ends this process, one of several of a run, as soon as its output is written.

    gloo's threads outlive a process group that something still refers to, as after a run with --fsdp. If one of them
    asks for Python's lock while Python ends, the process aborts or waits for ever.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def remove_launcher_folder() -> None:
    """Removes the temporary folder of a launcher that has ended without doing so."""
    shutil.rmtree(os.environ[LAUNCHER_FOLDER], ignore_errors=True)  # another process may do the same


@contextmanager
def failure_left_for_launcher() -> Iterator[None]:
    """An error within the block is left for the launcher of this process, if it has one, and raised."""
    try:
        yield
    except Exception as error:
        if isinstance(error, TailoraError):
            leave_failure(error, str(error), error.exit_code)
        else:
            leave_failure(error, str(error), 1, traceback.format_exc())
        raise


def _failure_in(file: Path) -> dict[str, Any]:
    content = json.loads(file.read_text(encoding="utf-8"))["message"]
    return {**content["extraInfo"], "message": content["message"]}


def _cause(
    failures: "Mapping[int, ProcessFailure]", folder: Path, output_dir: Path | None, count: int, has_signal: bool
) -> BaseException:
    """Returns the one error to show for all processes: the first that has a cause of its own.

    failures: by rank, in the order in which torch's launcher saw the processes end.
    count: of all processes.
    has_signal: True if this run was interrupted.
    """
    from tailora.formats.run_folder import checkpoints_in

    recorded = sorted(map(_failure_in, folder.glob("**/error.json")), key=lambda failure: failure["time"])
    interrupted = [failure for failure in recorded if failure["type"] == KeyboardInterrupt.__name__]
    of_others = [failure for failure in recorded if failure["type"] == ProcessFailedError.__name__]
    for failure in recorded:
        if failure not in interrupted and failure not in of_others:
            return _error(failure, count)
    for failure in interrupted:
        if failure["message"]:  # the run has saved a checkpoint
            return KeyboardInterrupt(failure["message"])
    number, first = next(iter(failures.items()))
    if has_signal or first.exitcode == INTERRUPTED:
        if output_dir is None or not checkpoints_in(output_dir):
            return KeyboardInterrupt()
        return KeyboardInterrupt(how_to_go_on(output_dir))
    who = f"process {number} of {count}"
    if first.exitcode < 0:
        name = signal.Signals(-first.exitcode).name
        why = ", most likely for memory" if name == "SIGKILL" else ""
        next_step = "" if output_dir is None else f"; {how_to_go_on(output_dir)}"
        error_type = MemoryLimitError if name == "SIGKILL" else ProcessFailedError
        return error_type(f"{who} was ended by {name}{why}{next_step}")
    for failure in of_others:
        if failure["rank"] == number:
            return _error(failure, count)
    printed = "".join(file.read_text(errors="replace") for file in folder.glob(f"**/{number}/stderr.log"))
    lines = "\n".join(printed.splitlines()[-TAIL:])
    return ProcessFailedError(f"{who} ended with exit code {first.exitcode}" + (f":\n{lines}" if lines else ""))


def _error(failure: Mapping[str, Any], count: int) -> BaseException:
    """Returns the error that a process has recorded, of its own type if it is one of tailora's."""
    name, message, code = failure["type"], failure["message"], failure["exit_code"]
    if failure["traceback"]:
        text = f"process {failure['rank']} of {count} failed: {name}: {message}"
        return ProcessFailedError(text, code, traceback=failure["traceback"])
    error_type = getattr(errors, name, ProcessFailedError)
    if issubclass(error_type, ProcessFailedError) or not issubclass(error_type, TailoraError):
        return ProcessFailedError(message, code)
    error: BaseException = error_type(message)
    return error
