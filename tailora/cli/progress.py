"""What commands print to stderr while they work: a bar on a terminal, or a line every few seconds elsewhere."""

import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from time import monotonic
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.control import Control
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.segment import ControlType

from tailora.cli.main import LIVE, on_terminal, print_text
from tailora.data.dataset import sources_of, warnings_of
from tailora.report.format import count, plural

if TYPE_CHECKING:
    from tailora.train.events import Event, Listener, Stepped

SECONDS_BETWEEN_LINES = 5.0
WIDTH = 100  # of the header at most; a terminal may be narrower


@contextmanager
def _shown(bar: Progress) -> Iterator[Progress]:
    """Shows the bar within the block; what is printed to stderr stands above it."""
    token = LIVE.set(bar.console)
    try:
        with bar:
            yield bar
    finally:
        LIVE.reset(token)


# ---- Counts, such as the rows that were evaluated or the steps of a study's runs


@contextmanager
def counter(console: Console, unit: str) -> Iterator[Callable[[int, int], None]]:
    """Yields a function to call with the number of units done and their total."""
    if on_terminal(console):
        columns = TextColumn(unit, markup=False), BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn()
        with _shown(Progress(*columns, console=console, transient=True)) as bar:
            task = bar.add_task("", total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    line = TimedLine(console)
    yield lambda done, total: line.show(f"{done:,} of {total:,} {unit}")


class TimedLine:
    """Prints a line if the last one was some seconds ago. The first one is due at once if `is_due`."""

    def __init__(self, console: Console, *, is_due: bool = False) -> None:
        self.console = console
        self.last = -SECONDS_BETWEEN_LINES if is_due else monotonic()

    def show(self, text: str, *, always: bool = False) -> None:
        if always or monotonic() - self.last >= SECONDS_BETWEEN_LINES:
            self.last = monotonic()
            self.console.print(text, soft_wrap=True)


class StepCounter:
    """Shows step, steps and loss of each worker's trial on one line of a terminal."""

    def __init__(self, console: Console, workers: int = 1) -> None:
        self._console, self._several = console, workers > 1
        self._states: dict[int, str] = {}  # of each running worker

    def step(self, step: int, steps: int, loss: float, *, worker: int) -> None:
        self._states[worker] = f"step {step}/{steps}  loss {loss:.3f}"
        self._show()

    def end(self, *, worker: int) -> None:
        """Removes a worker whose trial has finished or failed."""
        self._states.pop(worker, None)
        self._show()

    def _show(self) -> None:
        parts = [f"{number}: {state}" if self._several else state for number, state in sorted(self._states.items())]
        line = "   ".join(parts)[: self._console.width - 3]  # a longer one would wrap, and stay
        self._console.print(f"  {line}", end="", style="dim")
        self._console.control(Control((ControlType.ERASE_IN_LINE, 0), ControlType.CARRIAGE_RETURN))


def step_counter(console: Console, workers: int = 1) -> StepCounter | None:
    """Returns a counter for a study's trials on a terminal; None elsewhere."""
    return StepCounter(console, workers) if on_terminal(console) else None


# ---- Downloads


@contextmanager
def download_progress(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """Yields a function to call with what is fetched, the bytes so far, and all bytes; 0 of work without a measure."""
    if on_terminal(console):
        columns = TextColumn("{task.description}", markup=False), BarColumn(bar_width=20), DownloadColumn()
        bar = Progress(*columns, TextColumn("{task.percentage:.0f}%"), console=console, transient=True)
        task = bar.add_task("", total=None)

        def update(what: str, done: int, total: int) -> None:
            if not total:
                bar.stop()
                console.print(what)
                return
            bar.start()  # at the first call: most often nothing has to be fetched
            bar.update(task, description=what, completed=done, total=total)

        try:
            yield update
        finally:
            if bar.live.is_started:
                bar.stop()
        return
    line = TimedLine(console, is_due=True)

    def show(what: str, done: int, total: int) -> None:
        size = f": {done / 1e6:.1f} of {total / 1e6:.1f} MB, {done / total:.0%}" if total else ""
        line.show(what + size, always=not total)

    yield show


# ---- A training run


@contextmanager
def run_progress(console: Console) -> Iterator["Listener"]:
    """Yields the listener to pass to `run` as `on_event`. Shows the first line before torch is loaded."""
    if not on_terminal(console):
        console.print("reading model and data")
        line = TimedLine(console)
        yield _listener(console, lambda text, _done, _total, always: line.show(text, always=always))
        return
    columns = TextColumn("{task.description}", markup=False), BarColumn(bar_width=20)
    with _shown(Progress(*columns, console=console, transient=True)) as bar:
        task = bar.add_task("reading model and data", total=None)
        yield _listener(
            bar.console,
            lambda text, done, total, _: bar.update(task, description=text, completed=done, total=total or None),
        )


def _listener(console: Console, show: Callable[[str, int, int, bool], None]) -> "Listener":
    """show: called with a text, the numbers of steps or examples that are done and of all, and True for the ends.

    The number of all is 0 for work without a measure.
    """

    def listen(event: "Event") -> None:
        from tailora.train.events import EvaluationProgress, Stepped

        match event:
            case Stepped():
                text, is_end = f"step {event.step}/{event.max_steps}", event.step in (1, event.max_steps)
                show(f"{text}  {figures(event)}", event.step, event.max_steps, is_end)
                if event.step == event.max_steps:
                    show("all steps are done; evaluating and saving", 0, 0, False)
            case EvaluationProgress():
                show(f"{event.done:,} of {event.total:,} {event.what}", event.done, event.total, False)
            case _:
                _print(console, event)

    return listen


def figures(step: "Stepped") -> str:
    eta = timedelta(seconds=round(step.eta_seconds))
    memory = step.memory_bytes / 1e9
    return f"loss {step.loss:.3f}  {step.tokens_per_second:,.0f} tokens/s  ETA {eta}  memory {memory:.2f} GB"


def _print(console: Console, event: "Event") -> None:
    from tailora.train.events import Evaluated, Note, Prepared, Saved

    match event:
        case Prepared():
            text = format_header(event.header, min(console.width, WIDTH))
        case Evaluated():
            text = f"held-out loss {event.loss:.4f} at step {event.step}{', the best so far' if event.best else ''}"
        case Saved():
            text = f"saved {event.folder}"
        case Note():
            text = f"note: {event.text}"
        case _:
            return
    print_text(console, text)


# ---- The header


def format_header(header: Mapping[str, Any], width: int = WIDTH) -> str:
    """Returns what will be trained on what, and the reason where the settings left a choice, in lines of `width`."""
    settings, data = header["settings"], header["data"]
    total, trained = header["total_parameters"], header["trainable_parameters"]
    full = settings["method"] == "full"
    base = count(total if full else total - trained)
    reason = "what this machine is fastest with" if settings["dtype"] == "auto" else "as asked"
    quantize = settings.get("quantize")
    stored = (
        f"linear layers in {quantize} ({header['base_bytes'] / 1e6:,.0f} MB in all), the rest in " if quantize else ""
    )
    lines = {
        "model": f"{settings['model']}, {base} parameters, {stored}{header['dtype']} ({reason})",
        "device": f"{header['device']}, {header['device_name']}",
    }
    if full:
        lines["trained"] = "all weights of the model"
    else:
        lines["adapter"] = (
            f"{plural(header['adapted_layers'], 'layer')}, {trained:,} parameters ({trained / total:.2%})"
        )
        if target_r := settings.get("target_r"):
            lines["ranks"] = f"from {settings['r']} to {target_r} on average, larger where they matter (AdaLoRA)"
        if settings.get("init_lora_weights", "kaiming") != "kaiming":
            lines["start"] = header["start"]
        if (ratio := settings.get("loraplus_lr_ratio", 1)) != 1:
            lines["rates"] = f"B learns {ratio:g} times as fast as the rest (LoRA+)"
    if header.get("task"):
        lines["task"] = header["task"]
    if data is None or settings["streaming"]:  # streamed data is not known yet
        lines["data"] = f"streamed; {data['eval']:,} held out" if data else "streamed"
    else:
        lines["data"] = f"{plural(data['train'], 'example')}, {data['eval']:,} held out; read as {data['shape']}"
        lines |= sources_of(data)
        lines |= warnings_of(data)
    batches = "packed into one row, attention inside each" if header["packed"] else "padded to the longest"
    examples = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"] * header["processes"]
    lines["steps"] = f"{plural(header['max_steps'], 'step')}, {plural(examples, 'example')} each, {batches}"
    lines |= dict(part.split(": ", 1) for part in re.split("; (?=attention: |loss: )", header["kernels"]))
    indent = max(map(len, lines)) + 2
    return "\n".join(_wrap(f"{name:<{indent}}", text, width) for name, text in lines.items())


def _wrap(label: str, text: str, width: int) -> str:
    """Breaks lines between words only; all lines but the first are indented by the label's width."""
    space = " " * len(label)
    wrapper = textwrap.TextWrapper(max(width - len(label), 20), break_long_words=False, break_on_hyphens=False)
    return "\n".join(f"{space if number else label}{line}" for number, line in enumerate(wrapper.wrap(text)))
