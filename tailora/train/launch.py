"""Several processes of one run: how they are started, how this one was, and the command that starts them again.

    count_processes    turns the value of --nproc-per-node, such as "gpu", into a number
    launch             starts the processes, with torch's elastic launcher, as torchrun does
    how_to_resume      returns the command that resumes a run in as many processes
    end_process        ends this process

Rank 0 has the terminal. What the other ranks print goes to files, and is shown if one of them fails without a message
of ours. `launch` raises a single error: the one of the process that failed first. Importing this needs no torch.
"""

import os
import shlex
import signal
import sys
import tempfile
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn
from unittest import mock

from tailora.errors import ConfigError
from tailora.quiet import silent_loggers
from tailora.train.failures import HANGUP, cause_of, leave_closed_terminal

LAUNCHED_BY_TAILORA = "TAILORA_NPROC_PER_NODE"  # set for the processes that `launch` starts: their number
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT")
SET_INTERFACE = "set GLOO_SOCKET_IFNAME on each machine to its network interface to the others, such as eth0"
MAX_SIGNALS = 3  # of one kind; then the processes are killed


# ---- How this process was started


def world_size() -> int:
    """Returns the number of processes of this run, as their launcher says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Returns the number of this process in its run, as its launcher says."""
    return int(os.environ.get("RANK", "0"))


def is_launched_by_tailora() -> bool:
    """True in a process that `launch` has started; that one prints its messages."""
    return LAUNCHED_BY_TAILORA in os.environ


def end_process(code: int) -> NoReturn:
    """Ends this process, one of several of a run, as soon as its output is written.

    gloo's threads outlive a process group that something still refers to, as after a run with --fsdp. If one of them
    asks for Python's lock while Python ends, the process aborts or waits for ever.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def how_to_resume(checkpoint: Path, *changes: str, purpose: str = "to resume it") -> str:
    """Returns the purpose and the command that resumes a run in as many processes. changes: further flags."""
    words = ["tailora", "train"]
    if count := os.environ.get(LAUNCHED_BY_TAILORA):
        words += ["--nproc-per-node", count]
    elif world_size() > 1:
        on_this_machine = os.environ.get("LOCAL_WORLD_SIZE", str(world_size()))
        # without --, torchrun would interpret --r
        words = ["torchrun", "--nproc-per-node", on_this_machine, "-m", "tailora", "--", "train"]
        purpose += ", adding your launcher's other options"
    config = str(checkpoint.parent / "config.yaml")
    command = [*words, "--config", config, "--resume-from-checkpoint", str(checkpoint), *changes]
    return f"{purpose}:\n{shlex.join(command)}"


def how_to_go_on(output_dir: Path) -> str:
    """Returns what is left of a run that has failed: its last checkpoint, and the command that resumes it."""
    from tailora.formats.run_folder import checkpoints_in

    if checkpoints := checkpoints_in(output_dir):
        return f"the last checkpoint is {checkpoints[-1]}; {how_to_resume(checkpoints[-1])}"
    return "no checkpoint was saved yet; use --save-steps N to save one every N steps"


# ---- Starting several


def count_processes(asked: str, device: str) -> int:
    """Returns the number of processes; 'gpu' and 'auto' mean one per device of --device. Raises ConfigError."""
    if world_size() > 1:
        raise ConfigError(
            f"--nproc-per-node: a launcher has already started {world_size()} processes; remove the flag from tailora"
        )
    if asked not in ("gpu", "auto") and not (asked.isdecimal() and int(asked) > 0):
        raise ConfigError(f"invalid --nproc-per-node {asked!r}: use a number, or 'gpu' or 'auto' for one per device")
    from tailora.core.device import AUTO, absent_device, devices

    candidates, device = devices(), device_asked_for(device)
    device_type, _, index = (candidates[0].type if device == AUTO else device).partition(":")
    count = [candidate.type for candidate in candidates].count(device_type)
    if not count:
        raise absent_device(device, candidates)
    if device_type == "cpu":
        if asked == "gpu":
            raise ConfigError("--nproc-per-node gpu is not supported on a CPU; use a number such as 2")
        return 1 if asked == "auto" else int(asked)
    wanted = int(asked) if asked.isdecimal() else count
    if wanted > 1 and index:
        raise ConfigError(f"{wanted} processes cannot share --device {device}; use --device {device_type}")
    if wanted > count:
        raise ConfigError(f"--nproc-per-node {asked}: each process needs a device; use at most {count} ({device_type})")
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
    function: Callable[..., object],
    arguments: Sequence[str],
    count: int,
    output_dir: Path | None = None,
    results: Collection[int] = (),
    *,
    temporary: Path | None = None,
) -> int:
    """Calls a function of a module in `count` processes on this machine, until all have ended.

    output_dir: of a run, for the message on how to resume it.
    results: exit codes that are no failures.
    temporary: folder for temporary files, which remain if this process is killed; by default the system's.
    Signals are passed on. Returns 0, or the one of `results` that the first process had.
    Raises the error of the process that failed first, with its exit code.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from tailora.train.child_process import command_of

    threads = os.environ.get("OMP_NUM_THREADS", str(threads_per_process(count)))
    with (
        tempfile.TemporaryDirectory(prefix="tailora-", dir=temporary) as name,
        silent_loggers("torch.distributed.elastic", "torch.distributed.launcher", "torch.distributed.run"),
        mock.patch.dict(os.environ, {LAUNCHED_BY_TAILORA: str(count), "OMP_NUM_THREADS": threads}),
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
        program, *options = command_of(function)
        future = executor.submit(elastic_launch(config, program), *options, *arguments)
        signals.forward_until_done(future)
        try:
            future.result()
        except ChildFailedError as failed:
            exit_codes = {number: failure.exitcode for number, failure in failed.failures.items()}
            first = next(iter(exit_codes.values()))
            if first in results and not any(folder.glob("**/error.json")):
                return first
            advice = "" if output_dir is None else how_to_go_on(output_dir)
            raise cause_of(exit_codes, folder, advice, interrupted=bool(signals.counts)) from None
    return 0


class SignalForwarder:
    """Forwards signals to the processes started here, whose own sessions a Ctrl-C in the terminal does not reach."""

    def __init__(self) -> None:
        self.pending: list[int] = []
        self.counts = Counter[int]()  # number of a signal -> how often it came
        self.earlier: dict[int, Any] = {}  # number of a signal -> its handler before

    def __enter__(self) -> "SignalForwarder":
        for number in (getattr(signal, name) for name in SIGNALS if hasattr(signal, name)):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as of SIGHUP under nohup
                self.earlier[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.earlier.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        self.counts[number] += 1
        if number == HANGUP:
            leave_closed_terminal()
        is_last = number != HANGUP and self.counts[number] >= MAX_SIGNALS  # several programs may send a SIGHUP
        self.pending.append(signal.SIGKILL if is_last else number)

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
