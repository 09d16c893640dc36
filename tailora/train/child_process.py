"""Child processes for work that may hang, crash or run out of memory: reward functions, trials, measurements.

    the parent                                     the child
    ChildProcess(command_of(function), ...)    ->  function(...)
    send, receive: any object that can be pickled
                                                   messages_of_parent: what the parent sends, in a thread
                                                   connection_to_parent: its send answers; a `Failure` is raised there
    end: kills the child and all that it started

Messages go through stdin and stdout. When the parent is gone, stdin ends, and the child kills its process group.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any

import psutil

from tailora.errors import MemoryLimitError
from tailora.train.failures import Failure

ROOT = Path(__file__).parents[2]  # of the package, which may be a checkout that is not installed
KILLED = -9  # exit code of a process that the system ended, usually because memory ran out
SECONDS_TO_END = 10.0  # for processes that are killed
MOST_LOGGED = 2000  # characters of the log in an error message
OOM_SCORE = Path("/proc/self/oom_score_adj")


# ---- The parent


def command_of(function: Callable[..., object]) -> list[str]:
    """Returns the command that calls a function of a module; its arguments follow.

    -P: files in the working directory, such as random.py, do not replace modules.
    """
    code = f"from {function.__module__} import {function.__name__} as run; sys.exit(run(*sys.argv[1:]))"
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

    def __enter__(self) -> "ChildProcess":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.end()

    def send(self, message: Any) -> None:
        self._output.send(message)

    def receive(self, seconds: float | None = None) -> Any:
        """Returns the next message. Raises TimeoutError, EOFError if the child has ended, or the error it sent."""
        if not self._input.poll(seconds):
            raise TimeoutError
        message = self._input.recv()
        if isinstance(message, Failure):
            raise message.as_error()
        return message

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
        """Kills the child and all that it started, also in other sessions, and waits until these have ended."""
        started: list[psutil.Process] = []
        if self.process.returncode is None:  # otherwise another process may have its number by now
            with suppress(psutil.NoSuchProcess):  # another thread has killed it meanwhile
                started = psutil.Process(self.process.pid).children(recursive=True)
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        for process in started:
            with suppress(psutil.NoSuchProcess):
                process.kill()
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


def messages_of_parent() -> SimpleQueue[Any]:
    """Returns the queue of messages, and from now on ends this process and its group when the parent is gone.

    If memory runs out, Linux kills this process rather than the parent.
    """
    messages: SimpleQueue[Any] = SimpleQueue()
    if sys.platform == "linux":
        OOM_SCORE.write_text("1000")

    def read() -> None:
        connection = Connection(os.dup(0), writable=False)
        with suppress(EOFError, OSError):
            while True:
                messages.put(connection.recv())
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=read, daemon=True).start()
    return messages


def connection_to_parent() -> "Connection[Any, Any]":
    """Returns the connection to send messages with. What this process prints goes to stderr from now on."""
    connection: Connection[Any, Any] = Connection(os.dup(1), readable=False)
    os.dup2(2, 1)
    return connection
