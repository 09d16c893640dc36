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
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.segment import ControlType

from tailora.cli.main import LIVE, on_terminal, print_text
from tailora.data.dataset import sources_of, warnings_of
from tailora.formats.hub import DEMO, MODEL_NAME
from tailora.report.format import count, plural

if TYPE_CHECKING:
    from tailora.train.events import Event, Listener

SECONDS_BETWEEN_LINES = 5.0
WIDTH = 100  # of the header at most; a terminal may be narrower


@contextmanager
def _live(bar: Progress) -> Iterator[Progress]:
    """Shows the bar within the block; what is printed to stderr appears above it."""
    token = LIVE.set(bar.console)
    try:
        with bar:
            yield bar
    finally:
        LIVE.reset(token)


# ---- Counts, such as evaluated rows or the steps of a study's runs


@contextmanager
def counter(console: Console, unit: str) -> Iterator[Callable[[int, int], None]]:
    """Yields a function to call with the number of units done and their total."""
    if on_terminal(console):
        columns = TextColumn(unit, markup=False), BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn()
        with _live(Progress(*columns, console=console, transient=True)) as bar:
            task = bar.add_task("", total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    line = TimedLine(console)
    yield lambda done, total: line.show(f"{done:,} of {total:,} {unit}")


class TimedLine:
    """Prints at most one line every few seconds."""

    def __init__(self, console: Console) -> None:
        self.console, self.last = console, monotonic()

    def show(self, text: str, *, always: bool = False) -> None:
        if always or monotonic() - self.last >= SECONDS_BETWEEN_LINES:
            self.last = monotonic()
            self.console.print(text, soft_wrap=True)


class StepCounter:
    """Shows step, steps and loss or reward of each worker's trial on one line of a terminal."""

    def __init__(self, console: Console, workers: int = 1) -> None:
        self._console, self._several = console, workers > 1
        self._states: dict[int, str] = {}  # of each running worker

    def step(self, step: int, steps: int, result: str, *, worker: int) -> None:
        self._states[worker] = f"step {step}/{steps}  {result}"
        self._show()

    def end(self, *, worker: int) -> None:
        """Removes a worker whose trial has finished or failed."""
        self._states.pop(worker, None)
        self._show()

    def _show(self) -> None:
        parts = [f"{number}: {state}" if self._several else state for number, state in sorted(self._states.items())]
        line = "   ".join(parts)[: self._console.width - 3]  # a longer line would wrap and could not be erased
        self._console.print(f"  {line}", end="", style="dim")
        self._console.control(Control((ControlType.ERASE_IN_LINE, 0), ControlType.CARRIAGE_RETURN))


# ---- A training run


@contextmanager
def run_progress(console: Console, *, verbose: bool = False) -> Iterator["Listener"]:
    """Yields the listener to pass to `run` as `on_event`. Shows the first line before torch is loaded."""
    first = "loading the model and data"
    if not on_terminal(console):
        console.print(first)
        line = TimedLine(console)
        yield _listener(console, lambda text, _done, _total, always: line.show(text, always=always), verbose)
        return
    columns = TextColumn("{task.description}", markup=False), BarColumn(bar_width=20)
    with _live(Progress(*columns, console=console, transient=True)) as bar:
        task = bar.add_task(first, total=None)
        yield _listener(
            bar.console,
            lambda text, done, total, _: bar.update(task, description=text, completed=done, total=total or None),
            verbose,
        )


def _listener(console: Console, show: Callable[[str, int, int, bool], None], verbose: bool) -> "Listener":
    """show: called with a text, the number of finished steps or examples, their total, and whether to always print it.

    The total is 0 if it is unknown.
    """

    def listen(event: "Event") -> None:
        from tailora.train.events import Evaluated, EvaluationProgress, Note, Prepared, Saved, Stepped

        match event:
            case Stepped():
                eta, memory = timedelta(seconds=round(event.eta_seconds)), event.memory_bytes / 1e9
                speed = f"{event.tokens_per_second:,.0f} tokens/s  ETA {eta}  memory {memory:.2f} GB"
                text, is_end = f"step {event.step}/{event.max_steps}", event.step in (1, event.max_steps)
                result = f"loss {event.loss:.3f}" if event.reward is None else f"reward {event.reward:.3f}"
                show(f"{text}  {result}  {speed}", event.step, event.max_steps, is_end)
                if event.step == event.max_steps:
                    show("training finished; evaluating and saving", 0, 0, False)
            case EvaluationProgress():
                show(f"evaluating: {event.done:,} of {event.total:,} {event.what}", event.done, event.total, False)
            case Prepared():
                print_text(console, format_header(event.header, min(console.width, WIDTH), verbose=verbose))
            case Evaluated():
                when = f"after step {event.step}" if event.step else "before training"
                best = " (best so far)" if event.best else ""
                name, value = ("loss", event.loss) if event.reward is None else ("reward", event.reward)
                of_metric = "".join(f"; {metric} {score:.4f}" for metric, score in event.metric.items())
                print_text(console, f"held-out {name} {when}: {value:.4f}{of_metric}{best}")
            case Saved():
                print_text(console, f"saved {event.folder}")
            case Note():
                print_text(console, f"note: {event.text}")

    return listen


# ---- The header


def format_header(header: Mapping[str, Any], width: int = WIDTH, *, verbose: bool = False) -> str:
    """Returns what will be trained on what, in lines of `width`. verbose: and how it is computed."""
    lines = _summary(header)
    if verbose:
        origin = "the fastest dtype on this machine" if header["settings"]["dtype"] == "auto" else "set by --dtype"
        lines["precision"] = f"{header['dtype']}, {origin}"
        packed = "packed into one row, without attention across examples"
        lines["batches"] = packed if header["packed"] else "padded to the longest"
        lines |= dict(part.split(": ", 1) for part in re.split("; (?=attention: |loss: )", header["kernels"]))
    indent = max(map(len, lines)) + 2
    wrapper = textwrap.TextWrapper(break_long_words=False, break_on_hyphens=False, subsequent_indent=" " * indent)
    wrapper.width = max(width, indent + 20)
    return "\n".join(wrapper.fill(f"{name:<{indent}}{text}") for name, text in lines.items())


def _summary(header: Mapping[str, Any]) -> dict[str, str]:
    settings, data = header["settings"], header["data"]
    total, trained = header["total_parameters"], header["trainable_parameters"]
    full = settings["method"] == "full"
    name = f"demo ({MODEL_NAME})" if settings["model"] == DEMO else settings["model"]
    quantized = ""
    if method := settings.get("quantize") or header.get("stored_as"):
        quantized = f"linear layers in {method} ({header['base_bytes'] / 1e6:,.0f} MB in total), the rest in "
    lines = {
        "model": f"{name}, {count(total if full else total - trained)} parameters, {quantized}{header['dtype']}",
        "device": f"{header['device']}, {header['device_name']}",
    }
    if full:
        lines["training"] = "all weights of the model"
    else:
        layers = plural(header["adapted_layers"], "layer")
        parts = f" ({', '.join(header['parts'])})" if header.get("parts") else ""
        lines["adapter"] = f"{layers}{parts}, {trained:,} trainable parameters ({trained / total:.2%})"
        if (start := header.get("start", "kaiming")) != "kaiming":
            lines["init"] = start
        if (ratio := settings.get("loraplus_lr_ratio", 1)) != 1:
            lines["LoRA+"] = f"the learning rate of B is {ratio:g} times --learning-rate"
    if header.get("task"):
        lines["task"] = header["task"]
    sources = settings["data"] if isinstance(settings["data"], str) else ", ".join(settings["data"])
    held_out = f"{data['eval']:,} held out" if data else "none held out"
    word, generations = "example", ""
    if header.get("rewards"):
        word, generations = "prompt", f" with {settings['num_generations']} completions each"
    if data is None or settings["streaming"]:  # the number of examples is unknown
        lines["data"] = f"{sources}: streamed, {held_out}"
    else:
        lines["data"] = f"{sources}: {plural(data['train'], word)}, {held_out}; format: {data['shape']}"
        lines |= sources_of(data) | warnings_of(data)
    examples = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"] * header["processes"]
    lines["steps"] = f"{plural(header['max_steps'], 'step')} of {plural(examples, word)}{generations}"
    return lines
