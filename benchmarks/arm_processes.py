"""The arms of `steps.py` in processes of their own, which take turns.

With two threads every arm has to work in the main thread of its process: libgomp counts the threads of all its pools,
one for each thread that computes, and where they are more than the processors it lets waiting threads sleep at once.
tailora's step then took 2.1 s instead of 1.2.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from arms import FAST_OFF, Step, Stopped, config_of, full, peft
from shapes import DTYPES, Shape, products
from torch import Tensor

from tailora.train.events import Event, Note, Prepared, Stepped
from tailora.train.trainer import run

Arm = Callable[[Connection, Shape, Path, Tensor, str], None]


@contextmanager
def apart(shape: Shape, folder: Path, ids: Tensor, dtype: str) -> Iterator[tuple[dict[str, Step], list[str]]]:
    """A step of each arm by name, and what tailora's run says of its choices. Afterwards the processes are gone."""
    context, chosen = get_context("spawn"), list[str]()
    with ExitStack() as stack:
        steps = {}
        for name, arm in ARMS.items():
            ours, theirs = context.Pipe()
            process = context.Process(target=arm, args=(theirs, shape, folder, ids, dtype), daemon=True)
            process.start()
            stack.callback(process.join)
            stack.callback(ours.send, False)
            ours.recv()  # when it is loaded, so that nothing of it falls into another's time
            steps[name] = turn(ours, chosen if name == "tailora" else [])
        yield steps, chosen


def turn(connection: Connection, chosen: list[str]) -> Step:
    def step() -> float:
        connection.send(True)
        while isinstance(said := connection.recv(), str):
            chosen.append(said)
        return float(said)

    return step


def held(connection: Connection, shape: Shape, folder: Path, dtype: str, settings: dict[str, Any]) -> None:
    """tailora's own run, which stands still after each step until it is asked for the next."""

    def listen(event: Event) -> None:
        match event:
            case Stepped():
                connection.send(event.loss)
                if not connection.recv():
                    raise Stopped
            case Note():
                connection.send(event.text)
            case Prepared():
                connection.send(event.header["kernels"])

    output = folder / f"run{'-off' if settings else ''}"
    connection.send(True)
    if connection.recv():
        with suppress(Stopped):
            run(config_of(shape, folder, output, dtype, settings), on_event=listen)


def stepped(connection: Connection, step: Callable[[], Any]) -> None:
    connection.send(True)
    while connection.recv():
        step()
        connection.send(0.0)


def _tailora(connection: Connection, shape: Shape, folder: Path, _ids: Tensor, dtype: str) -> None:
    held(connection, shape, folder, dtype, {})


def _fast_off(connection: Connection, shape: Shape, folder: Path, _ids: Tensor, dtype: str) -> None:
    held(connection, shape, folder, dtype, FAST_OFF)


def _peft(connection: Connection, shape: Shape, folder: Path, ids: Tensor, dtype: str) -> None:
    stepped(connection, peft(folder, ids, shape, dtype))


def _full(connection: Connection, shape: Shape, folder: Path, ids: Tensor, dtype: str) -> None:
    stepped(connection, full(folder, ids, shape, dtype))


def _products(connection: Connection, shape: Shape, _folder: Path, _ids: Tensor, dtype: str) -> None:
    stepped(connection, products(shape, DTYPES[dtype]))


ARMS: dict[str, Arm] = {
    "tailora": _tailora,
    "fast off": _fast_off,
    "PEFT": _peft,
    "full": _full,
    "products": _products,
}
