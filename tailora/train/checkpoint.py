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
import random
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tailora.core.adalora import RankAllocator
from tailora.errors import CheckpointError, listing
from tailora.formats.io import read_safetensors, replace_folder, safetensors_bytes
from tailora.kernels.flat_parameters import Flat
from tailora.train.config import TrainConfig
from tailora.train.loss import Evaluation
from tailora.train.trainable import Trainable, publish, trained

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
    contents = {f"{name}.safetensors": safetensors_bytes(tensors, {}) for name, tensors in checkpoint.tensors.items()}
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
    return Checkpoint(state, {Path(name).stem: read_safetensors(folder / name)[0] for name in state["files"]})


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


# ---- Everything about a run that changes while it trains, and its way into a checkpoint and back.


COUNTERS = ("step", "tokens", "supervised_tokens", "seconds", "since_best", "history")


@dataclass(frozen=True, eq=False)
class Best:
    step: int
    evaluation: Evaluation
    tensors: dict[str, Tensor]  # of the adapter, on the CPU


@dataclass(eq=False)
class State:
    step: int = 0  # optimiser steps done
    tokens: int = 0
    supervised_tokens: int = 0
    seconds: float = 0.0  # of training, without evaluations and saving
    since_best: int = 0  # evaluations since the best one
    history: list[tuple[int, float]] = field(default_factory=list)  # (step, held-out loss)
    before: Evaluation | None = None
    best: Best | None = None

    def counters(self) -> dict[str, Any]:
        best_step = self.best.step if self.best else None
        return {**{name: getattr(self, name) for name in COUNTERS}, "best_step": best_step}

    def evaluations(self) -> dict[str, Tensor]:
        kept = {"before": self.before, "best": self.best.evaluation if self.best else None}
        return {
            f"{name}.{part}": torch.from_numpy(getattr(evaluation, part))
            for name, evaluation in kept.items()
            if evaluation is not None
            for part in ("sums", "counts")
        }


def restored(
    counters: Mapping[str, Any], evaluations: Mapping[str, Tensor], best: Mapping[str, Tensor] | None
) -> State:
    """The state that `counters`, `evaluations` and the best adapter's tensors came from."""
    state = State(**{name: counters[name] for name in COUNTERS})
    state.history = [(step, loss) for step, loss in counters["history"]]
    state.before = _evaluation(evaluations, "before")
    chosen = _evaluation(evaluations, "best")
    if best is not None and chosen is not None:
        state.best = Best(counters["best_step"], chosen, dict(best))
    return state


def _evaluation(tensors: Mapping[str, Tensor], name: str) -> Evaluation | None:
    if f"{name}.sums" not in tensors:
        return None
    return Evaluation(tensors[f"{name}.sums"].numpy(), tensors[f"{name}.counts"].numpy())


# ---- The random states of Python, numpy and torch as tensors: saved without pickle, restored to the bit.


def capture() -> dict[str, Tensor]:
    version, words, spare = random.getstate()
    _kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    states = {
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python.spare": torch.tensor([] if spare is None else [spare], dtype=torch.float64),
        "numpy": torch.tensor([*np.asarray(keys).tolist(), position, has_gauss], dtype=torch.int64),
        "numpy.spare": torch.tensor([gauss], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    return states | {f"cuda.{i}": state for i, state in enumerate(_cuda_states())}


def restore(states: Mapping[str, Tensor]) -> None:
    version, *words = states["python"].tolist()
    random.setstate((version, tuple(words), states["python.spare"].item() if len(states["python.spare"]) else None))
    *keys, position, has_gauss = states["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, np.uint32), position, has_gauss, states["numpy.spare"].item()))
    torch.set_rng_state(states["torch"])
    for i in range(torch.cuda.device_count()):
        if f"cuda.{i}" not in states:
            break  # saved where fewer were seen; as many processes go on as then, so none uses this one
        torch.cuda.set_rng_state(states[f"cuda.{i}"], i)


def _cuda_states() -> list[Tensor]:
    return torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)  # CUDA too


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside the block everything random follows `seed`; afterwards the caller's states are back."""
    before = capture()
    seed_all(seed)
    try:
        yield
    finally:
        restore(before)


# ---- Whether a checkpoint belongs to the run that is asked for, and how the run takes it up.


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
FACTS = {  # what the settings met -> its name in a message
    "data": "content (SHA-256) of the data",
    "packed": "packing of rows",
    "dtype": "precision of the base",
    "processes": "number of processes",
    "device": "kind of device",
    "layer_kernels": "use of the layer kernels",
}


def identity(config: TrainConfig, **facts: Any) -> dict[str, Any]:
    """What decides the bits of a run: its settings and what they met on this machine."""
    return {"settings": config.model_dump(mode="json", exclude=FREE), **facts}


def check_same_run(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises CheckpointError that names everything in which the two runs differ.

    A run of constant learning rate may become longer: its steps do not depend on its length.
    """
    if saved.get("prefix"):
        raise CheckpointError(
            "the checkpoint was trained on hidden states of the frozen lower layers that an earlier version of tailora "
            "kept on disk; this version has no such cache, and going on without it would give other results: resume "
            "with the version that run.json names, or start anew in another --output-dir"
        )
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
    model: Trainable,
    optimizer: torch.optim.Optimizer,
    flats: Sequence[Flat],
    rank: int,
    allocator: RankAllocator | None = None,
) -> State:
    """Adapter, optimiser and random states as they were; returns the progress. Raises CheckpointError."""
    tensors = saved.tensors
    set_parameters(trained(model), tensors["adapter"])
    publish(model)
    set_moments(optimizer, flats, tensors["optimizer"])
    if allocator is not None:
        allocator.load_state_dict(tensors["allocation"])
    restore(tensors[f"random-{rank}"])
    return restored(saved.state["progress"], tensors.get("evaluations", {}), tensors.get("best"))
