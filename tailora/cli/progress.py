"""A run as it happens, on stderr: a bar on a terminal, a line every few seconds anywhere else."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from time import monotonic

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from tailora.cli.console import on_terminal
from tailora.train.events import Evaluated, Event, Listener, Note, Prepared, Saved, Stepped

SECONDS_BETWEEN_LINES = 5.0


@contextmanager
def shown(console: Console) -> Iterator[Listener]:
    """What to pass to `run` as `on_event`."""
    if not on_terminal(console):
        yield _lines(console)
        return
    columns = TextColumn("{task.description}"), BarColumn(bar_width=20), TextColumn("{task.fields[figures]}")
    with Progress(*columns, console=console, transient=True) as bar:
        yield _bar(bar)


def figures(step: Stepped) -> str:
    eta = timedelta(seconds=round(step.eta_seconds))
    memory = step.memory_bytes / 1e9
    return f"loss {step.loss:.3f}  {step.tokens_per_second:,.0f} tokens/s  ETA {eta}  memory {memory:.2f} GB"


def _lines(console: Console) -> Listener:
    last = -SECONDS_BETWEEN_LINES

    def show(event: Event) -> None:
        nonlocal last
        if not isinstance(event, Stepped):
            _say(console, event)
        elif monotonic() - last >= SECONDS_BETWEEN_LINES or event.step == event.max_steps:
            last = monotonic()
            console.print(f"step {event.step}/{event.max_steps}  {figures(event)}", soft_wrap=True)

    return show


def _bar(bar: Progress) -> Listener:
    task = bar.add_task("preparing", total=None, figures="")

    def show(event: Event) -> None:
        if isinstance(event, Stepped):
            at = f"step {event.step}/{event.max_steps}"
            bar.update(task, description=at, total=event.max_steps, completed=event.step, figures=figures(event))
        else:
            _say(bar.console, event)

    return show


def _say(console: Console, event: Event) -> None:
    match event:
        case Prepared(header=header):
            width = max(map(len, header), default=0)
            text = "\n".join(f"{name:<{width}}  {value}" for name, value in header.items())
        case Evaluated():
            text = f"held-out loss {event.loss:.4f} at step {event.step}{', the best so far' if event.best else ''}"
        case Saved():
            text = f"saved {event.folder}"
        case Note():
            text = f"note: {event.text}"
        case _:
            return
    console.print(text, markup=False, soft_wrap=True)
