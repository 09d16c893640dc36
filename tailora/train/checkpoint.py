"""Checkpoints: folders that are complete or absent, verified when written and when read, and free of pickle.

checkpoint-N/
  adapter.safetensors      the trained parameters, raw
  optimizer.safetensors    AdamW's moments and step counts, by parameter
  random-RANK.safetensors  random states of each rank
  best.safetensors         the best adapter so far, if evaluations choose one
  evaluations.safetensors  per-example sums and counts of the evaluations that the result needs
  allocation.safetensors   AdaLoRA's state
  state.json               progress, what the run is, SHA-256 of the files above and of itself

This file has, in this order: the folder; the check that a checkpoint belongs to a run; saving and restoring the
parameters and the optimizer's moments.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tailora.core.adalora import RankAllocator
from tailora.errors import CheckpointError, listing
from tailora.formats.fingerprint import fingerprint_differences
from tailora.formats.io import read_safetensors, replace_folder, safetensors_bytes
from tailora.formats.metadata import LayerFingerprint
from tailora.formats.run_folder import checkpoints_in
from tailora.kernels.flat_parameters import FlatBuffer
from tailora.train.config import ACCUMULATION, TrainConfig, batches_per_step
from tailora.train.state import TrainState, set_random_state
from tailora.train.trainable import Trainable, local_tensors, sync_parameters, trained_module

# ---- The folder


STATE = "state.json"
BY_PARAMETER = ("adapter", "optimizer", "best")  # files of tensors of which each rank may have a part


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint folder holds: JSON values, and tensors by file."""

    state: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Writes the folder and reads it back. Raises CheckpointError if the bytes differ."""
    sums = {}
    with replace_folder(folder) as fresh:
        for name, tensors in checkpoint.tensors.items():  # the bytes of each are freed before the next
            content = safetensors_bytes(tensors, {})
            sums[f"{name}.safetensors"] = hashlib.sha256(content).hexdigest()
            (fresh / f"{name}.safetensors").write_bytes(content)
            del content
        body = {**checkpoint.state, "files": sums}
        (fresh / STATE).write_text(json.dumps({**body, "sha256": _digest(body)}, indent=1) + "\n")
        if problems := damage(fresh):
            raise CheckpointError(f"{folder} reads back wrong: {listing(problems)}; the disk may be failing")


def load(name: str, output_dir: Path, note: Callable[[str], None]) -> Checkpoint:
    """Reads a checkpoint, given as a path or as `latest` of a run: the newest that is not damaged.

    note: called with what is wrong with a newer one.
    Raises CheckpointError if there is none; for a damaged one, given as a path, it names the newest good one beside it.
    """
    if name == "latest":
        return _load_latest(output_dir, note)
    folder = Path(name)
    beside = [path for path in reversed(checkpoints_in(folder.parent)) if path != folder]
    if not folder.is_dir():
        names = ", ".join(path.name for path in reversed(beside))
        raise CheckpointError(f"{folder} is not a folder; checkpoints in {folder.parent}: {names or 'none'}")
    try:
        return _read(folder)
    except CheckpointError as error:
        good = next((path for path in beside if not damage(path)), None)
        remedy = (
            f"the newest good one: --resume-from-checkpoint {good}"
            if good
            else "there is no other good one: start again"
        )
        raise CheckpointError(f"{folder} is damaged; {remedy}. {error}") from None


def _load_latest(output_dir: Path, note: Callable[[str], None]) -> Checkpoint:
    problems = []
    for folder in reversed(checkpoints_in(output_dir)):
        try:
            saved = _read(folder)
        except CheckpointError as error:
            problems.append(f"{folder.name} is damaged: {error}")
        else:
            for problem in problems:
                note(f"resuming from {folder.name}, because {problem}")
            return saved
    if problems:
        raise CheckpointError(f"no checkpoint in {output_dir} is whole; start again. {listing(problems)}")
    raise CheckpointError(
        f"--resume-from-checkpoint latest: {output_dir} holds no checkpoint; give another --output-dir, "
        "or start without it and with --save-steps"
    )


def _read(folder: Path) -> Checkpoint:
    """Raises CheckpointError with the problems of a damaged one."""
    if problems := damage(folder):
        raise CheckpointError(listing(problems))
    state = json.loads((folder / STATE).read_text())
    return Checkpoint(state, {Path(file).stem: read_safetensors(folder / file)[0] for file in state["files"]})


def not_finite(tensors: Mapping[str, Mapping[str, Tensor]]) -> list[str]:
    """Returns the number and the first of the tensors of each file that hold NaN or infinity."""
    broken = {
        file: [name for name, tensor in content.items() if not tensor.isfinite().all()]
        for file, content in tensors.items()
    }
    return [f"{file}: {len(names)} tensors, first {names[0]}" for file, names in broken.items() if names]


def damage(folder: Path) -> list[str]:
    """Returns the problems with the files of a checkpoint."""
    try:
        state = json.loads((folder / STATE).read_text())
        body = {key: value for key, value in state.items() if key != "sha256"}
        if state["sha256"] != _digest(body):
            return [f"{STATE} was changed after it was written"]
        files = dict(body["files"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{STATE} cannot be read: {error}"]
    problems = []
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif _file_digest(path) != expected:
            problems.append(f"{name} is not what was written")
    return problems


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


# ---- Whether a checkpoint belongs to a run


# These settings may differ when a run is continued: they change what is saved and shown, not how the weights change.
FREE = {
    "output_dir",
    "device",  # of which the kind is compared
    "fsdp",
    "fsdp_reshard_after_forward",
    "fsdp_offload_params",
    "activation_memory",  # compared with the kernels
    "resume_from_checkpoint",
    "report_to",
    "samples",
    "save_steps",
    "save_total_limit",
    "eval_steps",
    "early_stopping_patience",
}
LENGTH = {"max_steps", "num_train_epochs"}
FACTS = {  # what else the exact results of a run depend on -> its name in a message
    "data": "content (SHA-256) of the data",
    "packed": "packing of rows",
    "dtype": "precision of the base",
    "processes": "number of processes",
    "device": "kind of device",
    "layer_kernels": "use of the layer kernels",
}


def check_same_run(saved: Mapping[str, Any], current: Mapping[str, Any], *, diverged: bool = False) -> None:
    """Raises CheckpointError that names everything in which the two runs differ.

    A run of constant learning rate may become longer: its steps do not depend on its length. A run that diverged may
    go on with a lower learning rate: with the same one it would diverge again. The number of processes may change if
    --gradient-accumulation-steps keeps the batches of a step the same.
    """
    then, now = saved["settings"], current["settings"]
    free = LENGTH if now["lr_scheduler_type"] == "constant" and now["warmup_ratio"] == 0 else set()
    if diverged and now["learning_rate"] < then["learning_rate"]:
        free = free | {"learning_rate"}
    facts = (saved.keys() & current.keys()) - {"settings", "base"}  # earlier versions recorded fewer
    remedy = ""
    if saved.get("processes") != current["processes"]:
        batches_then = batches_per_step(then, saved.get("processes", 1))
        batches, rest = divmod(batches_then, current["processes"])
        if batches_then == batches_per_step(now, current["processes"]):
            facts, free = facts - {"processes"}, free | {ACCUMULATION}
        elif not rest:
            remedy = f"\nthe same steps on {current['processes']} processes: --gradient-accumulation-steps {batches}"
    names = sorted((then.keys() | now.keys()) - free)
    compared = [(name, then.get(name, _default(name)), now.get(name)) for name in names]
    compared += [(FACTS.get(name, name), saved[name], current[name]) for name in sorted(facts)]
    changes = [f"{name} was {old!r}, now is {new!r}" for name, old, new in compared if old != new]
    if changes := changes + _base_changes(saved.get("base", {}), current["base"]):
        raise CheckpointError(
            f"the checkpoint was made with other settings, and going on would give a mixture of both: "
            f"{listing(changes)}{remedy}\nTo go on, give the earlier values (config.yaml beside the checkpoint has "
            "them: --config); to train with the new ones, start again in another --output-dir"
        )


def _default(setting: str) -> Any:
    """Returns what a run of an earlier version, which had no such setting, did."""
    field = TrainConfig.model_fields.get(setting)
    return None if field is None else field.default


def _base_changes(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Returns how the weights of the base differ from those that the checkpoint was trained on, in at most one line."""
    then, now = (
        {name: LayerFingerprint.model_validate(layer) for name, layer in layers.items()} for layers in (saved, current)
    )
    differences = fingerprint_differences(then, now, exact=True)
    if not differences:
        return []
    return [f"weights of the base differ in {len(differences)} of {len(now)} tensors, first {differences[0]}"]


# ---- Parameters and optimizer


STEP = "step"  # AdamW's only state that is one number; the rest has the shape of the parameter


def restore(
    saved: Checkpoint,
    model: Trainable,
    optimizer: torch.optim.Optimizer,
    buffers: Sequence[FlatBuffer],
    rank: int | None,
    allocator: RankAllocator | None = None,
) -> TrainState:
    """Restores parameters, optimizer and random states; returns the progress. Raises CheckpointError.

    rank: whose random states to take; None leaves them.
    """
    tensors = {
        file: local_tensors(model, content) if file in BY_PARAMETER else content
        for file, content in saved.tensors.items()
    }
    set_parameters(trained_module(model), tensors["adapter"])
    sync_parameters(model)
    set_moments(optimizer, buffers, tensors["optimizer"])
    if allocator is not None:
        allocator.load_state_dict(tensors["allocation"])
    if rank is not None:
        set_random_state(tensors[f"random-{rank}"])
    return TrainState.of(saved.state["progress"], tensors)


def set_parameters(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copies saved tensors into the parameters. Raises CheckpointError unless every tensor fits."""
    parameters = module.state_dict()
    problems = [f"only one of the two has {name}" for name in sorted(parameters.keys() ^ tensors.keys())]
    problems += [
        f"{name}: {tuple(tensors[name].shape)} saved, {tuple(parameters[name].shape)} here"
        for name in sorted(parameters.keys() & tensors.keys())
        if parameters[name].shape != tensors[name].shape
    ]
    if problems:
        raise CheckpointError(f"the checkpoint is of another adapter: {listing(problems)}")
    module.load_state_dict(dict(tensors))


def moments(optimizer: torch.optim.Optimizer, buffers: Sequence[FlatBuffer]) -> dict[str, Tensor]:
    """Returns the optimizer's tensors as `parameter|key`; the step count of a buffer goes to each of its parameters.

    Moments of one byte have scales for blocks of a buffer: these tensors are `buffer-INDEX|key`.
    """
    if not isinstance(optimizer, torch.optim.AdamW):
        return {
            f"buffer-{i}|{key}": torch.as_tensor(value).clone()
            for i, buffer in enumerate(buffers)
            for key, value in optimizer.state.get(buffer.parameter, {}).items()
        }
    return {
        f"{name}|{key}": tensor.clone() if key == STEP else buffer.view(name, tensor)
        for buffer in buffers
        for name in buffer.parameters
        for key, tensor in optimizer.state.get(buffer.parameter, {}).items()
    }


def set_moments(optimizer: torch.optim.Optimizer, buffers: Sequence[FlatBuffer], tensors: Mapping[str, Tensor]) -> None:
    """Restores what `moments` returned."""
    if not isinstance(optimizer, torch.optim.AdamW):
        for full_name, tensor in tensors.items():
            name, key = full_name.rsplit("|", 1)
            parameter = buffers[int(name.removeprefix("buffer-"))].parameter
            optimizer.state[parameter][key] = int(tensor) if key == STEP else tensor.to(parameter.device)
        return
    states = {}
    for i, buffer in enumerate(buffers):
        state: dict[str, Tensor] = {}
        for full_name, tensor in tensors.items():
            name, key = full_name.rsplit("|", 1)
            if name in buffer.parameters and key == STEP:
                state[key] = tensor
            elif name in buffer.parameters:
                if key not in state:
                    state[key] = torch.zeros_like(buffer.gradient)
                buffer.view(name, state[key]).copy_(tensor)
        states[i] = state
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
