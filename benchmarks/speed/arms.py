"""The arms of most benchmarks: one optimiser step at a time of tailora, of PEFT and of full fine-tuning.

All arms train on the same rows. tailora's steps are taken by `tailora.train.trainer.run`: the run is in a thread
and pauses after each step, so that the other arms get their turn and nothing of tailora is left out.
"""

import tempfile
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from itertools import count
from pathlib import Path
from queue import SimpleQueue
from threading import Semaphore
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.speed.shapes import DTYPES, Shape, write_model, write_rows
from tailora.data.collate import collate_padded
from tailora.data.dataset import Example
from tailora.train.config import TrainConfig
from tailora.train.dataloader import plan_batches
from tailora.train.events import Event, Stepped
from tailora.train.trainer import OnReady, run

Step = Callable[[], float]  # takes one optimiser step; returns the loss before it
FAST_OFF = {"fast": "off"}
ENDLESS = 1_000_000  # steps: the benchmark ends before the run does


@contextmanager
def synthetic_task(shape: Shape) -> Iterator[tuple[ExitStack, Path, list[Example]]]:
    """A folder with a random model and rows.jsonl, the rows, and a stack that ends the runs."""
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        write_model(shape, folder / "model")
        yield stack, folder, write_rows(shape, folder / "rows.jsonl")


# ---- tailora


class Stopped(Exception):
    """Raised inside a run to end it."""


def paused_run(config: TrainConfig, on_ready: OnReady | None = None) -> Generator[Event]:
    """Yields the events of a run, which waits after each event until the next is asked for.

    Closing the generator ends the run.
    """
    events: SimpleQueue[Event | None] = SimpleQueue()
    turn, stop = Semaphore(0), threading.Event()

    def on_event(event: Event) -> None:
        events.put(event)
        turn.acquire()
        if stop.is_set():
            raise Stopped

    with ThreadPoolExecutor(max_workers=1) as pool:
        outcome = pool.submit(run, config, on_event=on_event, on_ready=on_ready)
        outcome.add_done_callback(lambda _: events.put(None))
        try:
            while (event := events.get()) is not None:
                yield event
                turn.release()
        finally:
            stop.set()
            turn.release()
    outcome.result()


def tailora(
    stack: ExitStack,
    shape: Shape,
    folder: Path,
    dtype: str,
    settings: dict[str, Any] | None = None,
    on_ready: OnReady | None = None,
) -> Step:
    """Returns the steps of tailora's own run on the folder of `synthetic_task`. The first includes the start-up."""
    output = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    config = train_config(shape, folder, output / "run", {"dtype": dtype, **(settings or {})})
    events = stack.enter_context(closing(paused_run(config, on_ready)))

    def step() -> float:
        for event in events:
            if isinstance(event, Stepped):
                return event.loss
        raise RuntimeError("the run ended before its last step")

    return step


def train_config(shape: Shape, folder: Path, output: Path, settings: dict[str, Any]) -> TrainConfig:
    """Returns the settings of an endless run on the folder of `synthetic_task`, unless `settings` names other files."""
    return TrainConfig(
        **{
            "model": str(folder / "model"),
            "data": str(folder / "rows.jsonl"),
            "output_dir": str(output),
            "validation_split": 0,
            "max_length": shape.length,
            "learning_rate": 3e-4,
            "per_device_train_batch_size": shape.rows,
            "max_steps": ENDLESS,
            **settings,
        }
    )


# ---- PEFT and full fine-tuning, in a plain loop


def peft(
    folder: Path, rows: list[Example], shape: Shape, dtype: str, *, r: int = 16, extra: int = 0, **options: Any
) -> Step:
    """Returns the steps of PEFT as documented: all linear layers, float32 adapters.

    extra: how many adapters are loaded in addition to the one that trains.
    """
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=r, lora_alpha=2 * r, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(load_base_model(folder, dtype), settings)
    for number in range(extra):
        model.add_adapter(f"extra-{number}", settings)
    return plain_step(model, rows, shape, **options)


def full(folder: Path, rows: list[Example], shape: Shape, dtype: str, **options: Any) -> Step:
    """Returns steps that train every weight, in the model's own precision."""
    return plain_step(load_base_model(folder, dtype), rows, shape, **options)


def load_base_model(folder: Path, dtype: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder / "model", dtype=DTYPES[dtype])


def plain_step(model: Any, rows: list[Example], shape: Shape, *, checkpointing: bool = False) -> Step:
    """Returns the step of every tutorial: forward with labels, backward, clipping, fused AdamW."""
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.0, fused=True)
    batches = padded_batches(rows, shape)

    def step() -> float:
        loss = model(**next(batches), use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def padded_batches(rows: list[Example], shape: Shape) -> Iterator[dict[str, Tensor]]:
    """Yields the batches of tailora's run, grouped by length and padded, without end; no mask where none is needed."""
    for epoch in count():
        for batch in plan_batches([len(row.input_ids) for row in rows], batch_size=shape.rows, seed=0, epoch=epoch):
            padded = collate_padded([rows[int(i)] for i in batch], pad_id=0)
            yield {name: part for name, part in padded.items() if name != "attention_mask" or not part.all()}
