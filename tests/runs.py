"""Looking at runs and stopping them."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tailora.train import events
from tailora.train.config import TrainConfig


def changed(config: TrainConfig, **changes: Any) -> TrainConfig:
    return TrainConfig(**{**config.model_dump(), **changes})


def adapter(config: TrainConfig) -> bytes:
    return (Path(config.output_dir) / "adapter" / "adapter_model.safetensors").read_bytes()


def losses(config: TrainConfig) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line.get("loss", line.get("eval_loss"))) for line in lines]


def stopping_at(step: int, number: int) -> Callable[[events.Event], None]:
    def listener(event: events.Event) -> None:
        if isinstance(event, events.Stepped) and event.step == step:
            os.kill(os.getpid(), number)

    return listener
