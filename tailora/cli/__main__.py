"""The program `tailora`, also `python -m tailora`: Ctrl-C, SIGTERM and SIGHUP end it with a message.

The first signal raises KeyboardInterrupt, so that files are cleaned up. Repeating the same signal ends the process
immediately. A different signal is ignored, because launchers such as torchrun send SIGTERM after Ctrl-C. A second
SIGHUP is also ignored, because the shell and the system both send one. During training, a run handles the first signal
itself (`train.failures.StopSignals`).
"""

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from tailora.errors import INTERRUPTED
from tailora.train.failures import HANGUP, SIGNALS, leave_closed_terminal
from tailora.train.launch import end_process, is_launched_by_tailora, rank, world_size


class InterruptSignals:
    """Handles signals, except ignored ones: SIGINT in the background of a shell script, SIGHUP under nohup."""

    def __init__(self) -> None:
        self.received: set[int] = set()
        self.has_interrupted = False  # True if a signal has raised KeyboardInterrupt
        sys.unraisablehook = self._on_unraisable
        self.handle_with(self)

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        if number == HANGUP:
            leave_closed_terminal()
        elif number in self.received:
            end_now()
        self.received.add(number)
        if not self.has_interrupted:
            self.has_interrupted = True
            raise KeyboardInterrupt

    def handle_with(self, handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, handler)

    def _on_unraisable(self, failure: "sys.UnraisableHookArgs") -> None:
        """Python continues after a KeyboardInterrupt in a destructor; we do not."""
        if issubclass(failure.exc_type, KeyboardInterrupt):
            end_now()
        sys.__unraisablehook__(failure)


def end_now() -> NoReturn:
    if rank() == 0 and not is_launched_by_tailora():  # otherwise the parent process prints it
        os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)


def run(*arguments: str) -> NoReturn:
    """Runs the command line and ends the process. arguments: of the command line, by default sys.argv."""
    signals = InterruptSignals()  # before the imports, which take a second
    try:
        from tailora.cli.main import main

        code = main(arguments or None, interrupted=lambda: signals.has_interrupted)
    except BaseException:
        if not signals.has_interrupted:
            raise
        end_now()
    signals.handle_with(signal.SIG_IGN)  # finished; at exit, Python restores its own handlers before it unloads modules
    if world_size() > 1:
        end_process(code)
    sys.exit(code)


if __name__ == "__main__":
    run()
