"""A run as it happens, on stderr: a bar on a terminal, a line every few seconds anywhere else."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from time import monotonic
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from tailora.cli.data import warnings_of
from tailora.cli.main import on_terminal
from tailora.train.events import Evaluated, Event, Listener, Note, Prepared, Saved, Stepped

SECONDS_BETWEEN_LINES = 5.0


@contextmanager
def shown(console: Console) -> Iterator[Listener]:
    """What to pass to `run` as `on_event`."""
    if not on_terminal(console):
        console.print("reading model and data")
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
    task = bar.add_task("reading model and data", total=None, figures="")

    def show(event: Event) -> None:
        if isinstance(event, Stepped):
            at = f"step {event.step}/{event.max_steps}"
            bar.update(task, description=at, total=event.max_steps, completed=event.step, figures=figures(event))
        else:
            _say(bar.console, event)

    return show


def _say(console: Console, event: Event) -> None:
    match event:
        case Prepared():
            text = described(event.header)
        case Evaluated():
            text = f"held-out loss {event.loss:.4f} at step {event.step}{', the best so far' if event.best else ''}"
        case Saved():
            text = f"saved {event.folder}"
        case Note():
            text = f"note: {event.text}"
        case _:
            return
    console.print(text, markup=False, soft_wrap=True)


def described(header: Mapping[str, Any]) -> str:
    """What is about to be trained, and why it was chosen where the settings left it open."""
    asked = header["settings"]
    total, trained = header["total_parameters"], header["trainable_parameters"]
    full = asked["method"] == "full"
    base = f"{(total if full else total - trained) / 1e6:,.1f}M"
    adapter = f"{header['adapted_layers']} layers, {trained:,} parameters ({trained / total:.2%})"
    why = "what this machine is fastest with" if asked["dtype"] == "auto" else "as asked"
    how = asked.get("quantize")
    stored = f"linear layers in {how} ({header['base_bytes'] / 1e6:,.0f} MB in all), the rest in " if how else ""
    rows = "packed, attention inside each" if header["packed"] else "padded"
    size = asked["per_device_train_batch_size"] * asked["gradient_accumulation_steps"] * header["processes"]
    lines = {
        "model": f"{asked['model']}, {base} parameters, {stored}{header['dtype']} ({why}) on {header['device']}",
        **({"trained": "all weights of the model"} if full else {"adapter": adapter, **_unusual(asked, header)}),
        **_read(header["data"], asked["streaming"]),
        "steps": f"{header['max_steps']:,} of {size} examples, {rows}",
        "fast": header["kernels"],
    }
    width = max(map(len, lines)) + 2
    return "\n".join(f"{name:<{width}}{text}" for name, text in lines.items())


def _unusual(asked: Mapping[str, Any], header: Mapping[str, Any]) -> dict[str, str]:
    """What of the adapter is not the common choice."""
    ratio, target = asked.get("loraplus_lr_ratio", 1), asked.get("target_r")
    return {
        **({"ranks": f"from {asked['r']} to {target} on average, where they matter (AdaLoRA)"} if target else {}),
        **({"start": header["start"]} if asked.get("init_lora_weights", "kaiming") != "kaiming" else {}),
        **({"rates": f"B learns {ratio:g} times as fast as the rest (LoRA+)"} if ratio != 1 else {}),
    }


def _read(data: Mapping[str, Any] | None, streaming: bool) -> dict[str, str]:
    """What there is to learn from, and what of it was cut or left out; streamed data is not known yet."""
    if data is None or streaming:
        return {"data": f"streamed; {data['eval']:,} examples held out" if data else "streamed"}
    return {
        "data": f"{data['train']:,} examples, {data['eval']:,} held out; read as {data['shape']}",
        **warnings_of(data),
    }
