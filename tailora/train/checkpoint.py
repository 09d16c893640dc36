"""Checkpoints: folders that are complete or absent, verified when written and when read, and free of pickle.

checkpoint-N/
  adapter.safetensors      the trained parameters, raw
  optimizer.safetensors    AdamW's moments and step counts, by parameter
  random-RANK.safetensors  random states of each rank
  best.safetensors         the best adapter so far, if evaluations choose one
  evaluations.safetensors  per-example sums and counts of the evaluations that the result needs
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

from tailora.core.setting_names import REMOVED_SETTINGS, without_removed
from tailora.errors import CheckpointError, listing
from tailora.formats.fingerprint import LayerFingerprint, fingerprint_differences
from tailora.formats.io import read_safetensors, replace_folder, safetensors_bytes
from tailora.formats.run_folder import checkpoints_in
from tailora.kernels.flat_parameters import FlatBuffer
from tailora.train.config import ACCUMULATION, TrainConfig, batches_per_step
from tailora.train.divergence import FiniteUpdates
from tailora.train.state import TrainState, set_random_state
from tailora.train.trainable import FullModel, Trainable, sync_parameters, trained_module

# ---- The folder


STATE = "state.json"
BY_PARAMETER = ("adapter", "optimizer", "best")  # files with tensors that may be sharded over the ranks


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
            raise CheckpointError(f"{folder} was not written correctly: {listing(problems)}; the disk may be failing")


def load(name: str, output_dir: Path, note: Callable[[str], None]) -> Checkpoint:
    """Reads a checkpoint, given as a path or as `latest` of a run: the newest that is not damaged.

    note: called with what is wrong with a newer one.
    Raises CheckpointError if there is none; for a damaged one, it names the newest valid one next to it.
    """
    is_latest, run_folder = name == "latest", output_dir if name == "latest" else Path(name).parent
    existing = checkpoints_in(run_folder)[::-1]  # the newest first
    if not is_latest and not Path(name).is_dir():
        names = ", ".join(path.name for path in existing[::-1])
        raise CheckpointError(f"{name} is not a folder; checkpoints in {run_folder}: {names or 'none'}")
    damaged = []
    for folder in existing if is_latest else [Path(name)]:
        if problems := damage(folder):
            damaged.append(f"{folder.name} is damaged: {listing(problems)}")
            continue
        for problem in damaged:
            note(f"resuming from {folder.name}, because {problem}")
        state = json.loads((folder / STATE).read_text())
        run = state["run"]
        run["settings"] = _without_removed(folder, run["settings"])
        run["kernels"] = _without_removed(folder, {k: v for k, v in run["kernels"].items() if v is not None})
        return Checkpoint(state, {Path(file).stem: read_safetensors(folder / file)[0] for file in state["files"]})
    if not damaged:
        raise CheckpointError(
            f"--resume-from-checkpoint latest: {output_dir} has no checkpoint; use a different --output-dir, or start "
            "over without --resume-from-checkpoint, with --save-steps"
        )
    good = None if is_latest else next((path for path in existing if not damage(path)), None)
    remedy = f"use the newest intact one: --resume-from-checkpoint {good}" if good else "all are damaged, so start over"
    raise CheckpointError(f"cannot resume: {listing(damaged)}; {remedy}")


def _without_removed(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings without removed ones at their default. Raises CheckpointError if the run used one."""
    remaining = without_removed(settings, TrainConfig.model_fields)
    if used := [name for name in REMOVED_SETTINGS if name in remaining.keys() - TrainConfig.model_fields.keys()]:
        name, instead = used[0], REMOVED_SETTINGS[used[0]][1]
        raise CheckpointError(f"cannot resume {folder}: its run used {name} = {settings[name]!r}, but {instead}")
    return remaining


def not_finite(tensors: Mapping[str, Mapping[str, Tensor]]) -> list[str]:
    """Returns the number and the first of the tensors of each file that hold NaN or infinity."""
    broken = {
        file: [name for name, tensor in content.items() if not tensor.isfinite().all()]
        for file, content in tensors.items()
    }
    return [f"{file}: {len(names)} tensors, starting with {names[0]}" for file, names in broken.items() if names]


def damage(folder: Path) -> list[str]:
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
        try:
            with (folder / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                    problems.append(f"{name} was changed after it was written")
        except FileNotFoundError:
            problems.append(f"{name} is missing")
    return problems


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


# ---- Whether a checkpoint belongs to a run


# These settings may differ when a run is continued: they change what is saved and shown, not how the weights change.
FREE = {
    "output_dir",
    "device",  # only the device type is compared
    "fsdp",
    "ddp_timeout",
    "resume_from_checkpoint",
    "report_to",
    "reward_seconds",
    "samples",
    "save_steps",
    "save_total_limit",
    "eval_steps",
    "early_stopping_patience",
}
LENGTH = {"max_steps", "num_train_epochs"}
FACTS = {  # what else the exact results of a run depend on -> its name in a message
    "data": "data content (SHA-256)",
    "packed": "packing of rows",
    "dtype": "precision of the base model",
    "processes": "number of processes",
    "device": "type of device",
    "kernels": "implementation of the layers",
    "float32_from": "minimum number of tokens for float32 matrix products",
}


def check_same_run(saved: Mapping[str, Any], current: Mapping[str, Any], *, diverged: bool = False) -> None:
    """Raises CheckpointError that names everything in which the two runs differ.

    Three things may change: the length of a run of constant learning rate; the rate of a run that diverged, if it
    becomes lower; and the number of processes, if --gradient-accumulation-steps keeps the batches of a step the same.
    """
    then, now = saved["settings"], current["settings"]
    free = LENGTH if now["lr_scheduler_type"] == "constant" and now["warmup_ratio"] == 0 else set()
    if diverged and now["learning_rate"] < then["learning_rate"]:
        free = free | {"learning_rate"}
    facts = current.keys() - {"settings", "base"}
    remedy = ""
    if saved["processes"] != current["processes"]:
        batches_then = batches_per_step(then, saved["processes"])
        batches, rest = divmod(batches_then, current["processes"])
        if batches_then == batches_per_step(now, current["processes"]):
            facts, free = facts - {"processes"}, free | {ACCUMULATION}
        elif not rest:
            remedy = f"\nTo take the same steps on {current['processes']} processes, use --gradient-accumulation-steps"
            remedy += f" {batches}"
    compared = [(name, then.get(name), now[name]) for name in sorted(now.keys() - free)]
    compared += [(FACTS.get(name, name), saved[name], current[name]) for name in sorted(facts)]
    changes = [f"{name} was {old!r} and is now {new!r}" for name, old, new in compared if old != new]
    bases = [
        {name: LayerFingerprint.model_validate(layer) for name, layer in run.get("base", {}).items()}
        for run in (saved, current)
    ]
    if differences := fingerprint_differences(*bases, exact=True):
        count = f"{len(differences)} of {len(bases[1])} tensors"
        changes.append(f"the base model's weights differ in {count}, starting with {differences[0]}")
    if changes:
        raise CheckpointError(
            f"the checkpoint belongs to a run with different settings: {listing(changes)}{remedy}\nTo resume, use the "
            "settings of that run (--config with its config.yaml); to use the new settings, start over in a different "
            "--output-dir"
        )


# ---- Parameters and optimizer


STEP = "step"  # AdamW's only state that is one number; the rest has the shape of the parameter


def restore(saved: Checkpoint, model: Trainable, updates: FiniteUpdates, rank: int | None) -> TrainState:
    """Restores a checkpoint and returns the progress. rank: whose random states to take. Raises CheckpointError."""
    tensors = dict(saved.tensors)
    if isinstance(model, FullModel):
        tensors |= {file: model.local(tensors[file]) for file in BY_PARAMETER if file in tensors}
    set_parameters(trained_module(model), tensors["adapter"])
    sync_parameters(model)
    updates.keep_parameters()
    set_moments(updates.optimizer, updates.buffers, tensors["optimizer"])
    if updates.loss_scale is not None and "loss_scale" in tensors:
        updates.loss_scale.load_state_dict(tensors["loss_scale"])
    if rank is not None:
        set_random_state(tensors[f"random-{rank}"])
    return TrainState.of(saved.state["progress"], tensors)


def set_parameters(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copies saved tensors into the parameters. Raises CheckpointError unless every tensor fits."""
    parameters = module.state_dict()
    problems = [f"{name} is in only one of the two adapters" for name in sorted(parameters.keys() ^ tensors.keys())]
    problems += [
        f"{name}: shape {tuple(tensors[name].shape)} in the checkpoint, {tuple(parameters[name].shape)} in this run"
        for name in sorted(parameters.keys() & tensors.keys())
        if parameters[name].shape != tensors[name].shape
    ]
    if problems:
        raise CheckpointError(f"the checkpoint is for a different adapter: {listing(problems)}")
    module.load_state_dict(dict(tensors))


def moments(optimizer: torch.optim.Optimizer, buffers: Sequence[FlatBuffer]) -> dict[str, Tensor]:
    """Returns the optimizer's tensors as `parameter|key`; the step count of a buffer goes to each of its parameters."""
    return {
        f"{name}|{key}": tensor.clone() if key == STEP else buffer.view(name, tensor)
        for buffer in buffers
        for name in buffer.parameters
        for key, tensor in optimizer.state.get(buffer.parameter, {}).items()
    }


def set_moments(optimizer: torch.optim.Optimizer, buffers: Sequence[FlatBuffer], tensors: Mapping[str, Tensor]) -> None:
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
