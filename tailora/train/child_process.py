"""Child processes for work that may hang, crash or run out of memory: reward functions, trials, measurements.

    the parent                                     the child
    ChildProcess(command_of(function), ...)    ->  function(...)
    send, receive: any object that can be pickled
                                                   messages_of_parent: its recv returns what the parent sends
                                                   connection_to_parent: its send answers; a `Failure` is raised there
    end: kills the child and all that it started

Messages go through stdin and stdout. The child starts a guard, a process that kills the child and all that it started
as soon as stdin ends, because the parent is gone. The child may hang by then, even in code that keeps Python's lock.
"""

import os
import pickle
import select
import signal
import string
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from tailora.errors import MemoryLimitError
from tailora.train.failures import Failure

ROOT = Path(__file__).parents[2]  # of the package, which may be a checkout that is not installed
KILLED = -9  # exit code of a process that the system ended, usually because memory ran out
SECONDS_TO_END = 10.0  # for processes that are killed
MOST_BYTES = 2**27  # of a message of the child
BYTES_AT_ONCE = 2**20
TEXT = string.printable.encode()
MOST_LOGGED = 2000  # characters of the log in an error message
STARTED_BY = "TAILORA_STARTED_BY"  # in the environment of what a child starts: its number, and the time
OOM_SCORE = Path("/proc/self/oom_score_adj")


# ---- The parent


class PipeError(Exception):
    """A child process has sent something that is no message."""


def command_of(function: Callable[..., object]) -> list[str]:
    """Returns the command that calls a function of a module; its arguments follow.

    -P: files in the working directory, such as random.py, do not replace modules.
    """
    module, name = function.__module__, function.__name__
    code = f"sys.argv[0] = {module!r}; from {module} import {name} as run; sys.exit(run(*sys.argv[1:]))"
    return [sys.executable, "-P", "-u", "-c", f"import sys; sys.path.append({str(ROOT)!r}); {code}"]


class ChildProcess:
    """A running child. Use it as a context manager, which ends it.

    log: file for its stderr; None: the parent's.
    """

    def __init__(
        self, command: Sequence[str], *, log: Path | None = None, environment: Mapping[str, str] | None = None
    ) -> None:
        self.log = log
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with ExitStack() as stack:
            stderr = None if log is None else stack.enter_context(log.open("w"))
            # in a new session: Ctrl-C in the terminal is for the parent
            self.process = subprocess.Popen(command, stderr=stderr, env=environment, start_new_session=True, **pipes)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._output = Connection(os.dup(self.process.stdin.fileno()), readable=False)
        self._input = Connection(os.dup(self.process.stdout.fileno()), writable=False)
        self.process.stdin.close()
        self.process.stdout.close()
        self._ending = threading.RLock()

    def __enter__(self) -> "ChildProcess":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.end()

    def send(self, message: Any) -> None:
        self._output.send(message)

    def receive(self, seconds: float | None = None) -> Any:
        """Returns the next message, or raises the error that the child sent.

        Raises TimeoutError, EOFError if the child has ended, PipeError if the message is too long, or none.
        """
        end = None if seconds is None else time.monotonic() + seconds
        header = self._read(4, end)  # as `Connection.send` writes it
        size = int.from_bytes(header, signed=True)
        if size == -1:
            size = int.from_bytes(self._read(8, end))
        is_text = size < 0 or all(byte in TEXT for byte in header)  # then it announces more than MOST_BYTES
        if size > MOST_BYTES and not is_text:
            raise PipeError(f"its message has {size:,} bytes, and may have {MOST_BYTES:,}; send less")
        content = b"" if is_text else self._read(size, end)
        try:
            message = pickle.loads(content)
        except Exception as error:  # pickle may raise any
            raise PipeError("it wrote to the pipe of its process; write to a file or to stdout") from error
        if isinstance(message, Failure):
            raise message.as_error()
        return message

    def _read(self, size: int, end: float | None) -> bytes:
        """Reads from the pipe. end: time.monotonic() of a TimeoutError."""
        content = bytearray()
        while len(content) < size:
            if not self._input.poll(None if end is None else max(0.0, end - time.monotonic())):
                raise TimeoutError
            try:
                part = os.read(self._input.fileno(), min(size - len(content), BYTES_AT_ONCE))
            except ConnectionError:
                part = b""
            if not part:
                raise EOFError
            content += part
        return bytes(content)

    def error(self, task: str) -> Exception:
        """Returns the error of a child that ended while it did `task`."""
        code = self.process.wait()
        if code == KILLED:
            return MemoryLimitError(
                f"{task} was killed by the system, probably out of memory; use a smaller batch size"
            )
        logged = "" if self.log is None else self.log.read_text().strip()[-MOST_LOGGED:]
        return RuntimeError(f"{task} exited with code {code}: {logged}")

    def end(self) -> None:
        """Kills the child and all that it started, also in other sessions, and waits until these have ended.

        Several threads may call it, as a trial's own and the main one after Ctrl-C.
        """
        with self._ending:
            self._end()

    def _end(self) -> None:
        started: list[psutil.Process] = []
        if self.process.poll() is None:  # otherwise its guard ends what it has started
            with suppress(psutil.NoSuchProcess):  # it has ended meanwhile
                started = psutil.Process(self.process.pid).children(recursive=True)
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        for process in started:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._output.close()  # for the guard of a child that has ended by itself
        self.process.wait()
        end = time.monotonic() + SECONDS_TO_END
        while not all(map(_has_ended, started)) and time.monotonic() < end:
            time.sleep(0.01)


def _has_ended(process: psutil.Process) -> bool:
    """Also true of a process whose parent has not asked for its exit code, as where that was killed."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


# ---- The child


def messages_of_parent() -> "Connection[Any, Any]":
    """Returns the connection to receive messages from. This process and all that it starts now end with the parent.

    If memory runs out, Linux kills this process rather than the parent.
    """
    if sys.platform == "linux":
        OOM_SCORE.write_text("1000")
    os.environ[STARTED_BY] = f"{os.getpid()} {time.time()}"
    silent = (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)  # or the parent would wait for the end of its output
    os.posix_spawn(sys.executable, [*command_of(guard), str(os.getpid())], os.environ, file_actions=[silent])
    return Connection(os.dup(0), writable=False)


def guard(child: str) -> None:
    """Runs next to a child, in its group. Kills the group and what the child started when child or parent is gone."""
    parent = select.poll()
    parent.register(0, 0)  # reads nothing; reports only that no process can write any more
    while os.getppid() == int(child) and not parent.poll(1000):
        pass
    for process in psutil.process_iter():  # the child may have ended before what it started in other sessions
        with suppress(psutil.Error):
            if process.environ().get(STARTED_BY) == os.environ[STARTED_BY] and process.pid != os.getpid():
                process.kill()
    os.killpg(0, signal.SIGKILL)


def connection_to_parent() -> "Connection[Any, Any]":
    """Returns the connection to send messages with.

    From now on, what this process prints goes to stderr, and it and what it starts have no input.
    """
    connection: Connection[Any, Any] = Connection(os.dup(1), readable=False)
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    return connection
