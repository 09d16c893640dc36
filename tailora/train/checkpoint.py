"""Checkpoints: folders that are whole or absent, read back before they count, and free of pickle.

checkpoint-N/
  adapter.safetensors      the trained parameters, raw
  optimizer.safetensors    AdamW's moments and step counts, by parameter
  random-RANK.safetensors  random states of each rank
  best.safetensors         the best adapter so far, where evaluations choose one
  evaluations.safetensors  per-example sums and counts of the evaluations that the result needs
  state.json               progress, what the run is, SHA-256 of the files above and of itself
"""

import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tailora.errors import CheckpointError, listing
from tailora.formats.io import replace_folder
from tailora.formats.tensors import read, to_bytes
from tailora.kernels.flat_parameters import Flat

STATE = "state.json"
NAME = re.compile(r"checkpoint-(\d+)")
COUNT = "step"  # AdamW's only state that is one number; the rest is shaped like the parameter


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint folder holds: JSON values, and tensors by file."""

    state: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Write, then read back. Raises CheckpointError when the disk gives back something else."""
    contents = {f"{name}.safetensors": to_bytes(tensors, {}) for name, tensors in checkpoint.tensors.items()}
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    body = {**checkpoint.state, "files": sums}
    contents[STATE] = (json.dumps({**body, "sha256": _digest(body)}, indent=1) + "\n").encode()
    with replace_folder(folder) as fresh:
        for name, content in contents.items():
            (fresh / name).write_bytes(content)
        if problems := damage(fresh):
            raise CheckpointError(
                f"{folder} was written but reads back wrong: {listing(problems)}; the disk may be failing"
            )


def load(folder: Path) -> Checkpoint:
    """Read a checkpoint. Raises CheckpointError; for a damaged one it names the newest good one beside it."""
    if not folder.is_dir():
        there = ", ".join(path.name for path in found(folder.parent)) if folder.parent.is_dir() else ""
        raise CheckpointError(f"{folder} is not a folder; checkpoints in {folder.parent}: {there or 'none'}")
    if problems := damage(folder):
        good = next((path for path in reversed(found(folder.parent)) if path != folder and not damage(path)), None)
        remedy = f"the newest good one: --resume-from-checkpoint {good}" if good else "no other is whole: start again"
        raise CheckpointError(f"{folder} is damaged; {remedy}. {listing(problems)}")
    state = json.loads((folder / STATE).read_text())
    return Checkpoint(state, {Path(name).stem: read(folder / name)[0] for name in state["files"]})


def damage(folder: Path) -> list[str]:
    """What is wrong with the files of a checkpoint; [] when nothing is."""
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
        elif hashlib.sha256(path.read_bytes()).hexdigest() != expected:
            problems.append(f"{name} is not what was written")
    return problems


def found(output_dir: Path) -> list[Path]:
    """The checkpoint folders, oldest first."""
    numbered = [(int(match[1]), path) for path in output_dir.iterdir() if (match := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(numbered)]


def locate(wanted: str, output_dir: Path) -> Path:
    """The folder that `latest`, or a path, stands for. Raises CheckpointError."""
    if wanted != "latest":
        return Path(wanted)
    checkpoints = found(output_dir) if output_dir.is_dir() else []
    if not checkpoints:
        raise CheckpointError(
            f"--resume-from-checkpoint latest: {output_dir} holds no checkpoint; give another --output-dir, "
            "or start without it and with --save-steps"
        )
    return checkpoints[-1]


def prune(output_dir: Path, keep: int) -> None:
    for folder in found(output_dir)[:-keep]:
        shutil.rmtree(folder)


def moments(optimizer: torch.optim.Optimizer, flats: Sequence[Flat]) -> dict[str, Tensor]:
    """The optimiser's tensors as `parameter|key`; the step count of a buffer stands under each of its parameters."""
    return {
        f"{name}|{key}": tensor.clone() if key == COUNT else flat.part(name, tensor)
        for flat in flats
        for name in flat.parts
        for key, tensor in optimizer.state.get(flat.whole, {}).items()
    }


def set_moments(optimizer: torch.optim.Optimizer, flats: Sequence[Flat], tensors: Mapping[str, Tensor]) -> None:
    """Put saved moments back. Raises CheckpointError when parameters of one buffer took different numbers of steps."""
    saved: dict[str, dict[str, Tensor]] = {}
    for full, tensor in tensors.items():
        name, key = full.rsplit("|", 1)
        saved.setdefault(name, {})[key] = tensor
    states = {
        i: _joined(flat, {name: saved[name] for name in flat.parts if name in saved}) for i, flat in enumerate(flats)
    }
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})


def _joined(flat: Flat, saved: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The state of a whole buffer; zero for parameters that are not in `saved`, which never had a gradient."""
    counts = {float(state[COUNT]) for state in saved.values()}
    if len(counts) > 1:
        raise CheckpointError(
            f"the checkpoint's parameters took from {min(counts):g} to {max(counts):g} optimiser steps, for an earlier "
            "version passed over those without a gradient; this one takes all steps with all: start anew"
        )
    if not saved:
        return {}
    some = next(iter(saved.values()))
    joined = {key: torch.zeros_like(flat.gradient) for key in some if key != COUNT}
    for name, state in saved.items():
        for key, buffer in joined.items():
            flat.part(name, buffer).copy_(state[key])
    return {COUNT: some[COUNT], **joined}


def set_parameters(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy a saved state into the adapter. Raises CheckpointError unless every tensor fits."""
    own = module.state_dict()
    problems = [f"{name} is in one of the two only" for name in sorted(own.keys() ^ tensors.keys())]
    problems += [
        f"{name}: {tuple(tensors[name].shape)} saved, {tuple(own[name].shape)} here"
        for name in sorted(own.keys() & tensors.keys())
        if own[name].shape != tensors[name].shape
    ]
    if problems:
        raise CheckpointError(f"the checkpoint is of another adapter: {listing(problems)}")
    module.load_state_dict(dict(tensors))


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
