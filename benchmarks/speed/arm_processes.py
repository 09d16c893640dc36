"""The arms of steps.py for two threads: each in a process of its own, and they take turns.

With two threads every arm must compute in the main thread of its process. libgomp counts the threads of all its pools,
one pool for each thread that computes; if they are more than the processors, waiting threads sleep at once. tailora's
step then took 2.1 s instead of 1.2.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.speed.arms import FAST_OFF, Step, Stopped, choices_in, full, peft, train_config
from benchmarks.speed.shapes import DTYPES, Shape, products
from tailora.data.dataset import Example
from tailora.train.events import Event, Stepped
from tailora.train.trainer import run

# An arm's process sends True when everything is loaded. Then it waits: True asks for the next step, False ends it.
# After each step it sends the loss; before that, tailora also sends texts about its choices.
ARMS = ("tailora", "fast off", "PEFT", "full", "products")


@contextmanager
def arms_in_processes(
    shape: Shape, folder: Path, rows: list[Example], dtype: str
) -> Iterator[tuple[dict[str, Step], list[str]]]:
    """Yields the step of each arm by name, and what tailora's run said about its choices; then ends the processes."""
    context, notes = get_context("spawn"), list[str]()
    with ExitStack() as stack:
        steps = {}
        for name in ARMS:
            parent, child = context.Pipe()
            process = context.Process(target=serve, args=(child, name, shape, folder, rows, dtype), daemon=True)
            process.start()
            stack.callback(process.join)
            stack.callback(parent.send, False)
            parent.recv()  # wait until it is loaded, so that loading takes no time from another arm
            steps[name] = remote_step(parent, notes if name == "tailora" else [])
        yield steps, notes


def remote_step(connection: Connection, notes: list[str]) -> Step:
    def step() -> float:
        connection.send(True)
        while isinstance(message := connection.recv(), str):
            notes.append(message)
        return float(message)

    return step


# ---- In the arms' processes


def serve_run(connection: Connection, shape: Shape, folder: Path, dtype: str, settings: dict[str, Any]) -> None:
    """tailora's own run, which pauses after each step until the next is asked for."""

    def on_event(event: Event) -> None:
        for text in choices_in(event):
            connection.send(text)
        if isinstance(event, Stepped):
            connection.send(event.loss)
            if not connection.recv():
                raise Stopped

    output = folder / f"run{'-off' if settings else ''}"
    connection.send(True)
    if connection.recv():
        with suppress(Stopped):
            run(train_config(shape, folder, output, {"dtype": dtype, **settings}), on_event=on_event)


def serve_steps(connection: Connection, step: Callable[[], Any]) -> None:
    connection.send(True)
    while connection.recv():
        step()
        connection.send(0.0)


def serve(connection: Connection, name: str, shape: Shape, folder: Path, rows: list[Example], dtype: str) -> None:
    match name:
        case "tailora":
            serve_run(connection, shape, folder, dtype, {})
        case "fast off":
            serve_run(connection, shape, folder, dtype, FAST_OFF)
        case "PEFT":
            serve_steps(connection, peft(folder, rows, shape, dtype))
        case "full":
            serve_steps(connection, full(folder, rows, shape, dtype))
        case _:
            serve_steps(connection, products(shape, DTYPES[dtype]))
