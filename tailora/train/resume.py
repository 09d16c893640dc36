"""Whether a checkpoint belongs to the run that is asked for, and how the run takes it up."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tailora.errors import CheckpointError, listing
from tailora.fast.flat import Flat
from tailora.model import LoRAModel
from tailora.train import checkpoint, rng
from tailora.train.checkpoint import Checkpoint
from tailora.train.config import TrainConfig
from tailora.train.state import State, restored

# These may differ when a run goes on: they decide what is kept and shown, not how the weights move.
FREE = {
    "output_dir",
    "resume_from_checkpoint",
    "report_to",
    "samples",
    "save_steps",
    "save_total_limit",
    "eval_steps",
    "early_stopping_patience",
}
LENGTH = {"max_steps", "num_train_epochs"}


def identity(config: TrainConfig, **facts: Any) -> dict[str, Any]:
    """What decides the bits of a run: its settings and what they met on this machine."""
    return {"settings": config.model_dump(mode="json", exclude=FREE), **facts}


def check_same_run(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises CheckpointError that names everything in which the two runs differ.

    A run of constant learning rate may become longer: its steps do not depend on its length.
    """
    then, now = saved["settings"], wanted["settings"]
    free = LENGTH if now["lr_scheduler_type"] == "constant" and now["warmup_ratio"] == 0 else set()
    changes = [
        f"{name} was {then.get(name)!r}, now {now.get(name)!r}"
        for name in sorted((then.keys() | now.keys()) - free)
        if then.get(name) != now.get(name)
    ]
    changes += [
        f"{name} was {saved.get(name)!r}, now {wanted.get(name)!r}"
        for name in sorted((saved.keys() | wanted.keys()) - {"settings"})
        if saved.get(name) != wanted.get(name)
    ]
    if changes:
        raise CheckpointError(
            f"the checkpoint is of another run, and going on would give results of neither: {listing(changes)}. "
            "Take the settings of its config.yaml, or start anew in another --output-dir"
        )


def take_up(
    saved: Checkpoint,
    model: LoRAModel,
    optimizer: torch.optim.Optimizer,
    flats: Sequence[Flat],
    rank: int,
) -> State:
    """Adapter, optimiser and random states as they were; returns the progress. Raises CheckpointError."""
    tensors = saved.tensors
    checkpoint.set_parameters(model.lora_layers, tensors["adapter"])
    checkpoint.set_moments(optimizer, flats, tensors["optimizer"])
    rng.restore(tensors[f"random-{rank}"])
    return restored(saved.state["progress"], tensors.get("evaluations", {}), tensors.get("best"))
