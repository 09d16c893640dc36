"""Arms in separate processes, which take turns: each computes only while the others wait.

Threads of one process would share its memory, and its peak with it. Two threads also need the main thread of a process:
libgomp counts the threads of all its pools, one pool for each thread that computes, and lets waiting threads sleep at
once if they are more than the processors. tailora's step then took 2.1 s instead of 1.2.
"""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks import measure
from benchmarks.speed.arms import Stopped

IMPORTED = ["benchmarks.speed.trainers", "peft"]
Turn = dict[str, float]  # CPU seconds of a step, and bytes of the highest moment so far above the loaded model


class Turns:
    """Takes the place of a `trainers.Stopwatch`: a run waits after each step until it is its turn again."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._since = 0.0
        self._loaded = 0

    def start(self) -> None:
        """Waits for the first turn. The model is loaded."""
        gc.collect()
        measure.reset_peak()
        self._loaded = measure.process_memory("VmRSS")
        self._connection.send({})
        self._wait()

    def after_step(self, _step: int, _total: int, _save: Callable[[Path], Any]) -> None:
        seconds = time.process_time() - self._since
        self._connection.send({"cpu": seconds, "above_bytes": measure.process_memory("VmHWM") - self._loaded})
        self._wait()

    def _wait(self) -> None:
        try:
            self._connection.recv()
        except EOFError:
            raise Stopped from None
        self._since = time.process_time()


@contextmanager
def arms_in_processes(arms: dict[str, Callable[[Turns], None]]) -> Iterator[dict[str, Callable[[], Turn]]]:
    """Starts a process for each arm, one after another; yields what runs a step of it. Then the processes end."""
    context = get_context("forkserver")  # which imports once, and computes nothing before it forks
    context.set_forkserver_preload(IMPORTED)
    with ExitStack() as stack:
        steps = {}
        for name, arm in arms.items():
            here, there = context.Pipe()
            process = context.Process(target=_run_in_turns, args=(there, arm), daemon=True)
            process.start()
            there.close()  # so that a process that fails is noticed
            stack.callback(process.join)
            stack.callback(here.close)  # which ends the arm, if it waits for its turn
            here.recv()
            steps[name] = partial(_step, here)
        yield steps


def _step(connection: Connection) -> Turn:
    connection.send(True)
    turn: Turn = connection.recv()
    return turn


def _run_in_turns(connection: Connection, arm: Callable[[Turns], None]) -> None:
    with suppress(Stopped):
        arm(Turns(connection))
