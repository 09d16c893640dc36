"""The updates of an adapter folder, without its base model.

If a layer is one matrix, the tensors and settings define its update. Stacked experts are skipped with the reason, since
their number is only known from the base. The parts of a fused layer are read as one matrix of the full layer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from tailora.core.config import LoRAConfig, scaling_divisor
from tailora.core.low_rank import Factors, Update
from tailora.core.patterns import by_pattern, ends_of, matches
from tailora.errors import ConfigError, FormatError, listing
from tailora.formats import mlx
from tailora.formats.load import stored_configs
from tailora.formats.peft import StoredAdapter, dense_to_groups, read_peft_folder
from tailora.formats.peft_config import adds_out_proj_twice
from tailora.formats.peft_keys import path_and_slot
from tailora.formats.run_folder import ADAPTER_WEIGHTS, GGUF_WEIGHTS, MLX_WEIGHTS

STACKED = "stacked experts or a similar parameter, whose factors cannot be separated without the model; use --model"
MIXED_GROUPS = "its A mixes the channels of all groups, so it is not the matrix of one layer"
WITHOUT_TENSORS = "in target_modules, but the file has no tensors for it"
TRAINED_IN_FULL = "trained in full, without a low-rank update"


@dataclass(frozen=True)
class OfflineAdapter:
    config: LoRAConfig
    updates: dict[str, Update]  # by path
    left_out: dict[str, str]  # other keys and paths -> the reason why they are skipped
    base: str | None  # name of the base model in the files
    zero_updates: Sequence[str] = ()  # see `AdapterMetadata`


def read_offline(path: Path) -> OfflineAdapter:
    """Reads a folder of PEFT or mlx-lm. Raises FormatError, and ConfigError for formats that need the base model."""
    if path.is_file() or (path / GGUF_WEIGHTS).is_file():
        raise ConfigError(f"{path}: reading its layer names requires the base model; pass it with --model")
    is_mlx = (path / MLX_WEIGHTS).is_file() and not (path / ADAPTER_WEIGHTS).is_file()
    return stored_updates(mlx.read(path) if is_mlx else read_peft_folder(path))


def stored_updates(stored: StoredAdapter) -> OfflineAdapter:
    """Raises FormatError with everything that is damaged."""
    _, config = stored_configs(stored, [])
    layers: dict[str, dict[str, Tensor]] = {}  # path -> slot -> tensor
    left_out: dict[str, str] = {}
    for key, tensor in stored.tensors.items():
        layer_path, slot = path_and_slot(key)
        if slot is None:
            left_out[key] = TRAINED_IN_FULL
        else:
            layers.setdefault(layer_path, {})[slot] = tensor
    updates = {}
    problems = [f"{key} is not finite" for key, tensor in stored.tensors.items() if not tensor.isfinite().all()]
    parameters = config.target_parameters or []
    weights = [name.removesuffix(".weight") for name in parameters if name.endswith(".weight")]  # a matrix, or a stack
    modules = [name.rpartition(".")[0] or name for name in parameters if not name.endswith(".weight")]
    stacked = tuple(ending for name in modules for ending in (name, f"{name}.base_layer"))
    for layer_path, slots in layers.items():
        is_weight = matches(weights, layer_path)
        pattern_path = f"{layer_path}.weight" if is_weight else layer_path.partition(".base_layer")[0]
        r = by_pattern(pattern_path, config.rank_pattern, config.r)
        alpha = by_pattern(pattern_path, config.alpha_pattern, config.lora_alpha)
        if "A" not in slots and "B" not in slots:
            left_out[layer_path] = TRAINED_IN_FULL
        elif not {"A", "B"} <= slots.keys():
            factor = "A" if "A" in slots else "B"
            problems.append(f"{layer_path}: lora_{factor} has no matching factor")
        elif layer_path.endswith(stacked) or (is_weight and len(slots["A"]) != r):
            left_out[layer_path] = STACKED
        else:
            try:
                if update := _update(layer_path, slots, r, alpha, config.use_rslora, stored):
                    updates[layer_path] = update
                else:
                    left_out[layer_path] = MIXED_GROUPS
            except FormatError as error:
                problems.append(f"{layer_path}: {error}")
    in_file = {layer_path.partition(".base_layer")[0] for layer_path in layers}
    problems += [  # a part of a layer has the tensors of the layer
        f"{path}: its tensors are missing"
        for path in stored.metadata.base
        if not {path, path.rpartition(".")[0]} & in_file
    ]
    if not stored.tensors:
        problems.append(f"{ADAPTER_WEIGHTS} contains no tensors")
    if problems:
        raise FormatError(f"{stored.folder}: {listing(problems)}")
    if stored.settings and isinstance(config.target_modules, list):
        ends = {end for path in in_file for end in ends_of(path)}
        left_out |= {name: WITHOUT_TENSORS for name in config.target_modules if name not in ends}
    base = (stored.settings or {}).get("base_model_name_or_path")
    named_base = base if isinstance(base, str) and base else None
    return OfflineAdapter(config, updates, left_out, named_base, stored.metadata.zero_updates)


def _update(
    path: str, slots: Mapping[str, Tensor], r: int, alpha: float, use_rslora: bool, stored: StoredAdapter
) -> Update | None:
    """Returns None if A mixes groups. Raises FormatError for factors that are damaged."""
    A, B = slots["A"], slots["B"]
    configured = alpha / scaling_divisor(r, use_rslora)  # the same if rank and alpha are doubled for a start
    if stored.metadata.start and stored.settings is None:  # PEFT's settings have the doubled rank already
        r *= 2
    per_group = B.shape[1] if B.ndim > 1 else 0
    fits = per_group and A.ndim == B.ndim and A.shape[0] == r and r % per_group == 0
    if not fits or (A.ndim == 2 and per_group != r):
        raise FormatError(
            f"expected factors of rank {r}, as in the settings, got lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)}"
        )
    groups = r // per_group
    grouped_A = dense_to_groups(A.float(), groups)
    if grouped_A is None:
        return None
    twice = path.endswith(".base_layer.out_proj") and adds_out_proj_twice(stored.settings or {})
    is_embedding = f"{path}.lora_embedding_A".removeprefix(".") in stored.tensors
    return Update(
        path=path,
        layer_type="Embedding" if is_embedding else "Linear" if A.ndim == 2 else "Conv",
        r=r // (2 if stored.metadata.start else 1),
        factors=Factors(
            B.float().reshape(groups, B.shape[0] // groups, per_group),
            grouped_A.reshape(groups, r // groups, -1) * (configured * (2 if twice else 1)),
        ),
        scaling=stored.metadata.scaling.get(path, configured),
        configured_scaling=configured,
        learned_scaling=path in stored.metadata.scaling,
        dora="magnitude" in slots,
    )
