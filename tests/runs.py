"""Looking at runs and stopping them."""

import json
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from tailora.data.dataset import Example
from tailora.kernels.loss import FORMS
from tailora.train import events, failures
from tailora.train.config import TrainConfig
from tailora.train.defaults import RunConfig
from tailora.train.loss import CAUSAL_LM, BatchLayout
from tailora.train.trainer import run

T = TypeVar("T")
ONE_PASS = RunConfig(learning_rate=1, num_train_epochs=1, per_device_train_batch_size=2)


def changed(config: TrainConfig, **changes: Any) -> TrainConfig:
    return TrainConfig(**{**config.model_dump(), **changes})


def not_run(*_: Any, **__: Any) -> Any:
    """In place of what runs a trial."""
    raise AssertionError("every trial is there")


def adapter(config: TrainConfig) -> bytes:
    return (Path(config.output_dir) / "adapter" / "adapter_model.safetensors").read_bytes()


def losses(config: TrainConfig) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line.get("loss", line.get("eval_loss"))) for line in lines]


def token_losses(model: Any, examples: Sequence[Example], layout: BatchLayout) -> tuple[torch.Tensor, Any]:
    """Returns the loss of every supervised token, (supervised,), and the index of its example."""
    batch = CAUSAL_LM.make_batch(examples, layout).to(next(model.parameters()).device)
    return FORMS[layout.loss](model, batch), batch.owners


def stopping_at(step: int, number: int) -> Callable[[events.Event], None]:
    """Returns a listener that sends a signal after this step; of step 0, when the run has evaluated."""

    def listener(event: events.Event) -> None:
        if isinstance(event, events.Stepped if step else events.Evaluated) and event.step == step:
            os.kill(os.getpid(), number)

    return listener


def assert_resumed_alike(whole: TrainConfig, stopped: TrainConfig, step: int, number: int = signal.SIGINT) -> None:
    """The same settings in another folder, interrupted after a step and resumed, give what the run `whole` gave."""
    with pytest.raises(failures.Interrupted) as caught:
        run(stopped, on_event=stopping_at(step, number))
    late = int(torch.accelerator.is_available())  # a device has the next step queued by then
    assert caught.value.folder == Path(stopped.output_dir) / f"checkpoint-{step + late}"
    run(changed(stopped, resume_from_checkpoint="latest"))
    assert adapter(stopped) == adapter(whole)
    assert losses(stopped) == losses(whole)


def run_and_resume(
    settings: Callable[..., TrainConfig], folder: Path, step: int, number: int = signal.SIGINT, **changes: Any
) -> TrainConfig:
    """Makes a run, and the same again as in `assert_resumed_alike`; returns the settings of the second."""
    whole, stopped = (settings(output_dir=str(folder / name), **changes) for name in ("whole", "stopped"))
    run(whole)
    assert_resumed_alike(whole, stopped, step, number)
    return stopped


def run_and_collect(config: TrainConfig, kind: type[T], **options: Any) -> tuple[events.TrainResult, list[T]]:
    """Makes a run; returns its result and the events of this type."""
    seen: list[T] = []
    result = run(config, on_event=lambda event: seen.append(event) if isinstance(event, kind) else None, **options)
    return result, seen
