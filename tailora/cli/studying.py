"""What the commands of studies share: a line that shows the step, and what to type after Ctrl-C."""

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from tailora.cli.console import on_terminal
from tailora.report import PAGE


def bar(console: Console) -> Callable[[int, int, float], None] | None:
    """One line that is written over, on a terminal only."""
    if not on_terminal(console):
        return None

    def show_step(step: int, steps: int, loss: float) -> None:
        end = "\r" if step < steps else "\r\x1b[K"
        console.print(f"  step {step}/{steps}  loss {loss:.3f}   ", end=end, style="dim")

    return show_step


def page_of(folder: Path) -> str:
    """Where the page of a run or a study is, or what it takes to have one."""
    if (folder / PAGE).exists():
        return f"a page with all of it: {folder / PAGE}"
    return f"a page with all of it: pip install 'tailora[study]' && tailora report {shlex.quote(str(folder))}"


@contextmanager
def resumable(output_dir: str) -> Iterator[None]:
    """Ctrl-C says where the finished runs are and which command goes on."""
    try:
        yield
    except KeyboardInterrupt:
        again = shlex.join(["tailora", *sys.argv[1:]])
        raise KeyboardInterrupt(f"finished runs are in {output_dir}; to go on:\n{again}") from None
