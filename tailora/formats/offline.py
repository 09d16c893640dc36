"""An adapter's updates by what its files say, without the base model.

That is all there is to know of them where a layer is one matrix. What only the base can tell (how many experts share
a factor, which rows of a fused layer are q) is left out, with the reason, or read as one matrix of the whole layer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from tailora.core.config import LoRAConfig
from tailora.core.layer import initial_scaling
from tailora.core.low_rank import Factors
from tailora.core.patterns import by_pattern
from tailora.errors import ConfigError, FormatError, listing
from tailora.formats import gguf, mlx
from tailora.formats.peft import (
    EMBEDDING_SUFFIXES,
    SLOT_OF,
    SUFFIXES,
    WEIGHTS,
    StoredAdapter,
    read_adapter,
    split_groups,
)
from tailora.formats.peft_config import adds_twice, check_patterns, from_peft

STACK = "a stack of experts or another parameter, whose factors only the model can part: give --model"
MIXED = "its A reads the channels of all groups, which is no matrix of the layer"
WHOLE = "trained whole, without a low-rank update"

Tensors = Mapping[str, Tensor]  # suffix -> tensor


@dataclass(frozen=True)
class Stored:
    """One update as its file has it. r: as trained; with a frozen start the factors have twice as many columns."""

    kind: str
    r: int
    factors: Factors  # float32, with the whole scale in A
    scaling: float
    configured_scaling: float
    learned: bool
    dora: bool


@dataclass(frozen=True)
class Alone:
    """updates: by path.    left_out: what else is there, and why it is no update.    base: that the files name."""

    config: LoRAConfig
    updates: dict[str, Stored]
    left_out: dict[str, str]
    base: str | None


def read_alone(path: Path) -> Alone:
    """A PEFT folder or one of mlx-lm.

    Raises FormatError, and ConfigError for files that name their layers in the base model's terms.
    """
    if path.is_file() or (path / gguf.WEIGHTS).is_file():
        raise ConfigError(f"{path} names its layers in the base model's terms: give --model")
    is_mlx = (path / mlx.WEIGHTS).is_file() and not (path / WEIGHTS).is_file()
    return alone(mlx.read(path) if is_mlx else read_adapter(path))


def alone(stored: StoredAdapter) -> Alone:
    """What the tensors are, one by one. Raises FormatError with all that is damaged."""
    config = _config(stored)
    layers: dict[str, dict[str, Tensor]] = {}  # path -> suffix -> tensor
    left_out: dict[str, str] = {}
    for key, tensor in stored.tensors.items():
        suffix = next((suffix for suffix in SLOT_OF if f".{key}".endswith(suffix)), None)
        if suffix is None:
            left_out[key] = WHOLE
        else:
            layers.setdefault(f".{key}".removesuffix(suffix).removeprefix("."), {})[suffix] = tensor
    updates, problems = {}, []
    for path, found in layers.items():
        pair = _pair(found)
        if pair is None and (lone := [SLOT_OF[suffix] for suffix in found if SLOT_OF[suffix] in "AB"]):
            problems.append(f"{path}: there is a lora_{lone[0]} without the other factor")
        elif pair is None:
            left_out[path] = WHOLE
        elif reason := _no_matrix(path, *pair, config):
            left_out[path] = reason
        elif damage := _damage(path, *pair, config, stored):
            problems.append(f"{path}: {damage}")
        else:
            updates[path] = _update(path, found, *pair, config, stored)
    if problems:
        raise FormatError(f"{stored.folder}: {listing(problems)}")
    base = (stored.settings or {}).get("base_model_name_or_path")
    return Alone(config, updates, left_out, base if isinstance(base, str) and base else None)


def _config(stored: StoredAdapter) -> LoRAConfig:
    own = stored.notes.lora(stored.folder)
    told = stored.settings is None and own is not None
    config = own if told and own is not None else from_peft(stored.settings or {}, [], stored.folder)
    check_patterns(config, stored.folder)
    return config


def _no_matrix(path: str, A: Tensor, B: Tensor, config: LoRAConfig) -> str | None:
    if config.target_parameters and path.endswith(_holders(config.target_parameters)):
        return STACK
    divides = A.ndim > 2 and B.ndim > 1 and B.shape[1] and A.shape[0] % B.shape[1] == 0
    return MIXED if divides and split_groups(A, _groups(A, B)) is None else None


def _holders(parameters: list[str]) -> tuple[str, ...]:
    """Names of the modules that hold these parameters, each as the end of a path in PEFT's file."""
    names = {name.rpartition(".")[0] or name for name in parameters}
    return tuple(end for name in sorted(names) for end in (name, f"{name}.base_layer"))


def _damage(path: str, A: Tensor, B: Tensor, config: LoRAConfig, stored: StoredAdapter) -> str | None:
    if not (A.isfinite().all() and B.isfinite().all()):
        return "its factors are not finite"
    r, told = A.shape[0], _told_rank(path, config, stored)
    per_group = B.shape[1] if B.ndim > 1 else 0
    fits = A.ndim == B.ndim and r == told and per_group and r % per_group == 0 and (A.ndim > 2 or per_group == r)
    if not fits:
        return f"lora_A is {tuple(A.shape)} and lora_B {tuple(B.shape)}, for a rank of {told} in the settings"
    return None


def _update(path: str, found: Tensors, A: Tensor, B: Tensor, config: LoRAConfig, stored: StoredAdapter) -> Stored:
    groups, times = _groups(A, B), 2 if stored.notes.start else 1
    configured = _scaling(path, config)
    blocks = split_groups(A.float(), groups)
    assert blocks is not None  # _no_matrix has looked
    twice = path.endswith(".base_layer.out_proj") and adds_twice(stored.settings or {})
    factors = Factors(
        B.float().reshape(groups, B.shape[0] // groups, B.shape[1]),
        blocks.reshape(groups, A.shape[0] // groups, -1) * (configured * (2 if twice else 1)),
    )
    return Stored(
        kind="Embedding" if ".lora_embedding_A" in found else "Linear" if A.ndim == 2 else "Conv",
        r=A.shape[0] // times,
        factors=factors,
        scaling=stored.notes.scaling.get(path, configured),
        configured_scaling=configured,
        learned=path in stored.notes.scaling,
        dora=".lora_magnitude_vector" in found,
    )


def _pair(found: Tensors) -> tuple[Tensor, Tensor] | None:
    """A and B; None where one is missing."""
    for table in (SUFFIXES, EMBEDDING_SUFFIXES):
        if table["A"] in found and table["B"] in found:
            return found[table["A"]], found[table["B"]]
    return None


def _groups(A: Tensor, B: Tensor) -> int:
    return max(1, A.shape[0] // B.shape[1])


def _told_rank(path: str, config: LoRAConfig, stored: StoredAdapter) -> int:
    """Of the factors in the file: PEFT's settings say the doubled rank, the weights' own the rank as trained."""
    told = by_pattern(_key(path), config.rank_pattern, config.r)
    return 2 * told if stored.notes.start and stored.settings is None else told


def _scaling(path: str, config: LoRAConfig) -> float:
    """The same whether the settings' rank and alpha are doubled or not (`peft_config.doubled`)."""
    r = by_pattern(_key(path), config.rank_pattern, config.r)
    return initial_scaling(r, by_pattern(_key(path), config.alpha_pattern, config.lora_alpha), config.use_rslora)


def _key(path: str) -> str:
    """The path that PEFT's patterns match."""
    return path.partition(".base_layer")[0]
