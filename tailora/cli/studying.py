"""What the commands of studies share: a line that shows the step, and what to type after Ctrl-C."""

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

from tailora.cli.console import on_terminal


def bar(console: Console) -> Callable[[int, int, float], None] | None:
    """One line that is written over, on a terminal only."""
    if not on_terminal(console):
        return None

    def show_step(step: int, steps: int, loss: float) -> None:
        end = "\r" if step < steps else "\r\x1b[K"
        console.print(f"  step {step}/{steps}  loss {loss:.3f}   ", end=end, style="dim")

    return show_step


@contextmanager
def resumable(output_dir: str) -> Iterator[None]:
    """Ctrl-C says where the finished runs are and which command goes on."""
    try:
        yield
    except KeyboardInterrupt:
        again = shlex.join(["tailora", *sys.argv[1:]])
        raise KeyboardInterrupt(f"finished runs are in {output_dir}; to go on:\n{again}") from None
