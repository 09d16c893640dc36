"""One optimiser step at a time of tailora, of PEFT and of full fine-tuning, on the same rows.

tailora's steps are those of `tailora.train.trainer.run` itself: it runs in a thread and is held between two events, so
that other arms can have their turn and nothing of the product is left out.
"""

import tempfile
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from queue import SimpleQueue
from threading import Semaphore
from typing import Any

import torch
from shapes import DTYPES, Shape, write_model, write_rows
from torch import Tensor, nn

from tailora.train.config import TrainConfig
from tailora.train.events import Event, Note, Prepared, Stepped
from tailora.train.trainer import OnReady, run

Step = Callable[[], float]  # one optimiser step; returns the loss before it
FAST_OFF = {"fast": "off"}
MANY = 1_000_000  # steps: the benchmark ends before the run does


class Stopped(Exception):
    """Raised inside a run that is not waited for any more."""


def held_run(config: TrainConfig, on_ready: OnReady | None = None) -> Generator[Event]:
    """Events of a run, which stands still until the next one is asked for. Closing the iterator ends the run."""
    events: SimpleQueue[Event | None] = SimpleQueue()
    turn, over = Semaphore(0), threading.Event()

    def listen(event: Event) -> None:
        events.put(event)
        turn.acquire()
        if over.is_set():
            raise Stopped

    with ThreadPoolExecutor(max_workers=1) as pool:
        outcome = pool.submit(run, config, on_event=listen, on_ready=on_ready)
        outcome.add_done_callback(lambda _: events.put(None))
        try:
            while (event := events.get()) is not None:
                yield event
                turn.release()
        finally:
            over.set()
            turn.release()
    outcome.result()


@dataclass(frozen=True, eq=False)
class Tailora:
    step: Step
    chosen: list[str]  # what the run said about its choices


def tailora(
    stack: ExitStack,
    shape: Shape,
    folder: Path,
    dtype: str,
    settings: dict[str, Any] | None = None,
    on_ready: OnReady | None = None,
) -> Tailora:
    """The product's own run, held between its steps. The first step brings the start-up with it."""
    output = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    config = config_of(shape, folder, output / "run", dtype, settings or {})
    events = stack.enter_context(closing(held_run(config, on_ready)))
    chosen: list[str] = []

    def step() -> float:
        for event in events:
            match event:
                case Stepped():
                    return event.loss
                case Note():
                    chosen.append(event.text)
                case Prepared():
                    chosen.append(event.header["kernels"])
        raise RuntimeError("the run ended before its last step")

    return Tailora(step, chosen)


def config_of(shape: Shape, folder: Path, output: Path, dtype: str, settings: dict[str, Any]) -> TrainConfig:
    """Of a run on what `workshop` wrote, which ends when it is left."""
    return TrainConfig(
        **{
            "model": str(folder / "model"),
            "data": str(folder / "rows.jsonl"),
            "output_dir": str(output),
            "validation_split": 0,
            "max_length": shape.length,
            "per_device_train_batch_size": shape.rows,
            "max_steps": MANY,
            "dtype": dtype,
            **settings,
        }
    )


def peft(
    folder: Path,
    ids: Tensor,
    shape: Shape,
    dtype: str,
    *,
    r: int = 16,
    extra: int = 0,
    layers: list[int] | None = None,
    **options: Any,
) -> Step:
    """PEFT as documented: all linear layers (of these decoder layers), float32 adapters.

    extra: adapters loaded beside the one that trains.
    """
    from peft import LoraConfig, get_peft_model

    targets = "all-linear" if layers is None else [f"{name}_proj" for name in shape.linears()]
    settings = LoraConfig(
        r=r, lora_alpha=2 * r, target_modules=targets, layers_to_transform=layers, task_type="CAUSAL_LM"
    )
    model = get_peft_model(base(folder, dtype), settings)
    for number in range(extra):
        model.add_adapter(f"extra-{number}", settings)
    return plain_step(model, ids, shape, **options)


def full(folder: Path, ids: Tensor, shape: Shape, dtype: str, **options: Any) -> Step:
    """Every weight trained, in the model's own precision."""
    return plain_step(base(folder, dtype), ids, shape, **options)


def base(folder: Path, dtype: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder / "model", dtype=DTYPES[dtype])


def plain_step(model: Any, ids: Tensor, shape: Shape, *, checkpointing: bool = False, rate: float = 1e-5) -> Step:
    """Forward with labels, backward, clipping, fused AdamW: the loop of every tutorial, without padding.

    ids: (steps * rows, length), used over and over.
    """
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0, fused=True)
    batches = cycle(torch.split(ids, shape.rows))

    def step() -> float:
        batch = next(batches)
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


@contextmanager
def workshop(shape: Shape) -> Iterator[tuple[ExitStack, Path, Tensor]]:
    """A folder with the model and the rows, their ids, and a stack that ends the runs."""
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        write_model(shape, folder / "model")
        yield stack, folder, write_rows(shape, folder / "rows.jsonl")
