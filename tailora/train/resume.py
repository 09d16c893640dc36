"""Whether a checkpoint belongs to the run that is asked for, and how the run takes it up."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tailora.core.adalora import RankAllocator
from tailora.errors import CheckpointError, listing
from tailora.kernels.flat_parameters import Flat
from tailora.train import checkpoint, rng
from tailora.train.checkpoint import Checkpoint
from tailora.train.config import TrainConfig
from tailora.train.state import State, restored
from tailora.train.subject import Subject, publish, trained

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
    "prefix_cache_gb",
}
LENGTH = {"max_steps", "num_train_epochs"}
FACTS = {  # what the settings met -> its name in a message
    "data": "content (SHA-256) of the data",
    "packed": "packing of rows",
    "dtype": "precision of the base",
    "processes": "number of processes",
    "device": "kind of device",
    "layer_kernels": "use of the layer kernels",
    "prefix": "training on cached states of the frozen layers",
}


def identity(config: TrainConfig, **facts: Any) -> dict[str, Any]:
    """What decides the bits of a run: its settings and what they met on this machine."""
    return {"settings": config.model_dump(mode="json", exclude=FREE), **facts}


def check_same_run(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises CheckpointError that names everything in which the two runs differ.

    A run of constant learning rate may become longer: its steps do not depend on its length.
    """
    then, now = saved["settings"], wanted["settings"]
    free = LENGTH if now["lr_scheduler_type"] == "constant" and now["warmup_ratio"] == 0 else set()
    changes = _changes(then, now, {name: name for name in (then.keys() | now.keys()) - free})
    facts = (saved.keys() & wanted.keys()) - {"settings"}  # an earlier version recorded fewer
    changes += _changes(saved, wanted, {name: FACTS.get(name, name) for name in facts})
    if changes:
        raise CheckpointError(
            f"the checkpoint was made with other settings, and going on would give results of neither: "
            f"{listing(changes)}\nTo go on, give the earlier values (config.yaml beside the checkpoint has them: "
            "--config); to train with the new ones, start anew in another --output-dir"
        )


def _changes(then: Mapping[str, Any], now: Mapping[str, Any], names: Mapping[str, str]) -> list[str]:
    """Both values of what differs; `names`: key -> its name in the message."""
    return [
        f"{names[key]} was {then.get(key)!r}, now is {now.get(key)!r}"
        for key in sorted(names)
        if then.get(key) != now.get(key)
    ]


def take_up(
    saved: Checkpoint,
    model: Subject,
    optimizer: torch.optim.Optimizer,
    flats: Sequence[Flat],
    rank: int,
    allocator: RankAllocator | None = None,
) -> State:
    """Adapter, optimiser and random states as they were; returns the progress. Raises CheckpointError."""
    tensors = saved.tensors
    checkpoint.set_parameters(trained(model), tensors["adapter"])
    publish(model)
    checkpoint.set_moments(optimizer, flats, tensors["optimizer"])
    if allocator is not None:
        allocator.load_state_dict(tensors["allocation"])
    rng.restore(tensors[f"random-{rank}"])
    return restored(saved.state["progress"], tensors.get("evaluations", {}), tensors.get("best"))
