"""The keys of the tensors in a PEFT file.

A key is `base_model.model.` + path of the layer + suffix of the slot, such as `.lora_A.weight`. The adapter's name is
not in it. Some matrices have a different path in PEFT than in tailora: fused parts, attention, named parameters.

our path                          prefix of PEFT's keys
c_attn.q                          c_attn: rows of A and columns of B of the whole layer. B is zero in the outputs of
                                  other parts
attn.in_proj_weight               attn
attn.out_proj                     attn.base_layer.out_proj
experts.gate_up_proj, .down_proj  experts.base_layer, experts: nested wrappers, the first parameter is the innermost

PEFT also mistakes some layers for projections of experts with the same names. `named_like_experts` finds them.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tailora.core.extras import ExtraTargets
from tailora.core.layer import LoRALayer
from tailora.core.layer_types import find_layer
from tailora.core.parameters import projections
from tailora.formats.fingerprint import TOLERANCE

KEY_PREFIX = "base_model.model."

OTHER_SUFFIXES = {"magnitude": ".lora_magnitude_vector", "lora_bias": ".lora_B.bias", "bias": ".base_layer.bias"}
SUFFIXES = {"A": ".lora_A.weight", "B": ".lora_B.weight", **OTHER_SUFFIXES}
EMBEDDING_SUFFIXES = {"A": ".lora_embedding_A", "B": ".lora_embedding_B", **OTHER_SUFFIXES}
SLOT_OF_SUFFIX = {suffix: slot for table in (SUFFIXES, EMBEDDING_SUFFIXES) for slot, suffix in table.items()}
EXTRA_SUFFIXES = {"bias": ".bias", "trainable_tokens_delta": ".token_adapter.trainable_tokens_delta"}


def path_and_slot(key: str) -> tuple[str, str | None]:
    """Splits a key into the path of the layer and the slot; (key, None) if it ends in no suffix of a low-rank layer."""
    for suffix, slot in SLOT_OF_SUFFIX.items():
        if f".{key}".endswith(suffix):
            return f".{key}".removesuffix(suffix).removeprefix("."), slot
    return key, None


# ---- Layers as PEFT adapts them


@dataclass(frozen=True)
class PeftLayer:
    """A layer as PEFT adapts it."""

    key_prefix: str  # of its keys in the file
    pattern_path: str  # the path that PEFT matches rank_pattern and alpha_pattern against
    layers: dict[str, LoRALayer]  # by path; several are parts of one fused layer, one after another in the rank
    scale: float  # that PEFT computes; the B of a part with a different scale is multiplied by the ratio
    is_parameter: bool = False  # whether PEFT finds it by `target_parameters`

    @property
    def r(self) -> int:
        return sum(layer.r for layer in self.layers.values())

    def join(self, slot: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """Returns the slot's tensor for the full layer. `tensors` has one for every path in `layers`."""
        if slot == "A":
            return torch.cat(list(tensors.values()), 0)
        if slot == "B":
            return torch.cat([self._spread(path, B) * self._scale_ratio(path) for path, B in tensors.items()], 1)
        (tensor,) = tensors.values()
        return tensor

    def split(self, slot: str, tensor: Tensor, rank_factor: int) -> dict[str, Tensor] | None:
        """The inverse of `join`, with `rank_factor` times the ranks; None if `tensor` does not have these parts."""
        if len(self.layers) == 1 and next(iter(self.layers.values())).output_slice is None:
            path = next(iter(self.layers))
            ratio = self._scale_ratio(path) if slot == "B" else 1
            return {path: tensor if ratio == 1 else tensor / ratio}
        ranks = [rank_factor * layer.r for layer in self.layers.values()]
        rank_dim = 0 if slot == "A" else 1
        if tensor.ndim != 2 or tensor.shape[rank_dim] != sum(ranks):
            return None
        parts = dict(zip(self.layers, torch.split(tensor, ranks, rank_dim), strict=True))
        if slot == "B":
            for path, B in parts.items():
                output_slice = self.layers[path].output_slice
                if output_slice is None or len(B) != output_slice.total:
                    return None
                part = output_slice.take(B.mT).mT
                if not self._spread(path, part).equal(B):  # all other outputs are zero
                    return None
                parts[path] = part / self._scale_ratio(path)
        return parts

    def _scale_ratio(self, path: str) -> float:
        return self.layers[path].configured_scaling / self.scale

    def _spread(self, path: str, B: Tensor) -> Tensor:
        """B of a part -> B of the full layer, zero in all other outputs."""
        output_slice = self.layers[path].output_slice
        return B if output_slice is None else output_slice.spread(B.mT).mT


def peft_layers(model: nn.Module, layers: Mapping[str, LoRALayer]) -> dict[str, PeftLayer]:
    """Returns key prefix -> the PeftLayer with these layers, in their order."""
    layers_by_path = {path: find_layer(model, path) for path in layers}
    paths_of_module: dict[str, list[str]] = {}
    for path, (module_path, _) in layers_by_path.items():
        paths_of_module.setdefault(module_path, []).append(path)
    expert_names = named_like_experts(model)
    result: dict[str, PeftLayer] = {}
    scales: dict[str, float] = {}
    for path, layer in layers.items():
        module_path, module = layers_by_path[path]
        prefix = module_path
        if layer.output_slice is None and path != module_path:
            if layer.layer_type.is_stacked:
                order = [f"{module_path}.{name}" for name, _ in module.named_parameters(recurse=False)]
                outer = [later for later in paths_of_module[module_path] if order.index(later) > order.index(path)]
                prefix += ".base_layer" * len(outer)
            elif path.endswith("out_proj"):
                prefix = f"{module_path}.base_layer.out_proj".removeprefix(".")
            elif "in_proj_weight" not in projections(module):
                prefix = path
        if prefix in result:
            result[prefix].layers[path] = layer
            continue
        is_parameter, pattern_path = layer.layer_type.is_stacked, path if layer.layer_type.is_stacked else module_path
        if module_path.rpartition(".")[2] in expert_names and not is_parameter:
            is_parameter, pattern_path = True, f"{module_path}.weight"
        scale = scales.setdefault(pattern_path, layer.configured_scaling)
        result[prefix] = PeftLayer(prefix, pattern_path, {path: layer}, scale, is_parameter)
    return result


# transformers 4 had a layer for each projection of each expert, transformers 5 has one parameter for all experts.
# PEFT (0.19 and later) converts older target_modules by the last name alone, so a dense layer `mlp.gate_proj`, or
# one of a shared expert, is mistaken for the experts. It does not convert target_parameters, which may name the weight
# of a linear layer; the keys of the tensors are the same.
NAMES_OF_EXPERTS = {  # a weight of one expert in the files of transformers -> the names that PEFT converts
    "mlp.experts.*.gate_proj.weight": frozenset(("gate", "gate_proj", "up_proj", "down_proj")),
    ".experts.*.w1.weight": frozenset(("gate", "w1", "w2", "w3")),
}


def named_like_experts(model: nn.Module) -> frozenset[str]:
    """Returns the last names of layers that PEFT would mistake for projections of this model's experts."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if not isinstance(model_type, str):
        return frozenset()
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping  # imports all of transformers

    conversions = get_checkpoint_conversion_mapping(model_type) or []
    patterns = {pattern for conversion in conversions for pattern in getattr(conversion, "source_patterns", [])}
    return frozenset().union(*(names for pattern, names in NAMES_OF_EXPERTS.items() if pattern in patterns))


# ---- Trained biases and token embeddings


def extra_keys(targets: ExtraTargets) -> dict[str, str]:
    """Returns key without KEY_PREFIX -> path, for the targets in the settings."""
    biases = {path + EXTRA_SUFFIXES["bias"]: path for path in targets.biases}
    return biases | {path + EXTRA_SUFFIXES["trainable_tokens_delta"]: path for path in targets.tokens}


# ---- Weights of the base, which PEFT saves with adapted or resized embeddings

BASE_MODULES = (".token_adapter.base_layer", ".base_layer", ".original_module", "")


def base_weight_of(key: str, modules: Mapping[str, nn.Module]) -> tuple[str, Tensor] | None:
    """Returns name and tensor of the base's weight or bias if the key refers to one; None otherwise."""
    owner, _, name = key.rpartition(".")
    path = next(owner.removesuffix(ending) for ending in BASE_MODULES if owner.endswith(ending))
    weight = getattr(modules.get(path), name, None) if path and name in ("weight", "bias") else None
    return (f"{path}.{name}", weight) if isinstance(weight, Tensor) else None


def base_weight_problem(key: str, tensor: Tensor, name: str, weight: Tensor) -> str | None:
    """Returns how the file's tensor differs from the base's weight, which it cannot replace; None if it is the same."""
    if weight.shape != tensor.shape:
        is_resized = weight.shape[1:] == tensor.shape[1:] != ()
        resize = f"; call resize_token_embeddings({len(tensor)}) first" if is_resized else ""
        return f"{name} has shape {tuple(tensor.shape)} in the file, but {tuple(weight.shape)} in the model{resize}"
    if torch.allclose(weight.detach().float().cpu(), tensor.float(), rtol=TOLERANCE, atol=1e-6):
        return None
    return (
        f"the file's {name} differs from this base's, and loading never changes the base; copy the file's {key} into "
        f"the base's {name}, then load the adapter"
    )


def saved_path_of(key: str, saved_paths: Iterable[str], modules: Mapping[str, nn.Module]) -> str | None:
    """Returns which module of modules_to_save the tensor with this key belongs to; None for others.

    If PEFT saves the embeddings, the file has three tensors for each trained one: PEFT reads `lm_head.weight`;
    `lm_head.modules_to_save.weight` is the same again; `lm_head.original_module.weight` is the base's.
    """
    path = next((path for path in saved_paths if key.startswith(f"{path}.")), None)
    part = key.removeprefix(f"{path}.").partition(".")[0]
    is_wrapper = part in ("modules_to_save", "original_module") and f"{path}.{part}" not in modules
    return None if is_wrapper else path


def without_second_copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Removes `path.modules_to_save.name` if the file has the same tensor as `path.name`."""
    result = dict(tensors)
    for key, tensor in tensors.items():
        path, wrapper, name = key.rpartition(".modules_to_save.")
        first = tensors.get(f"{path}.{name}") if wrapper else None
        if first is not None and first.dtype == tensor.dtype and first.equal(tensor):
            del result[key]
    return result
