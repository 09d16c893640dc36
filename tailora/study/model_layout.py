"""The position of a layer in a model (early, middle or late; attention or MLP), and settings for groups of layers.

Except for `target_groups` and the last section, this needs only the paths of the layers, not a model. `block_of` is
the only definition of "attention" and "MLP".
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, cast

from torch import nn

from tailora.core.adapter import layer_key
from tailora.core.config import ALL_LINEAR, LANGUAGE_MODEL, LoRAConfig
from tailora.core.layer import LoRALayer
from tailora.core.patterns import layer_index
from tailora.core.targets import selected_candidates, task_heads
from tailora.model import LoRAModel

DEPTHS = ("early", "middle", "late")
ATTENTION, MLP, OTHER = "attention", "MLP", "other"
MODULE_NAMES = {  # names of the modules around the matrices of a block, in common model families
    ATTENTION: re.compile(r"attn|attention"),
    MLP: re.compile(r"mlp|ffn|^ff$|feed_?forward|expert|dense_?relu|intermediate"),
}
MATRIX_NAMES = {  # names of the matrices themselves, for models without such modules
    ATTENTION: re.compile(r"(to_)?(q|k|v|o|out|qkv)(_proj|_lin)?(_weight)?|in_proj.*|query|key|value|query_key_value"),
    MLP: re.compile(r"(gate|up|down|gate_up)_proj|(fc|lin|linear|dense|w|wi|wo)_?\d?|c_fc"),
}


# ---- Paths and their groups


def block_of(path: str) -> str:
    """Returns ATTENTION, MLP or OTHER, by the innermost module name that matches, else by the matrix's own name."""
    *modules, last = path.lower().split(".")
    for name in reversed([*modules, last]):
        for block, pattern in MODULE_NAMES.items():
            if pattern.search(name):
                return block
    return next((block for block, pattern in MATRIX_NAMES.items() if pattern.fullmatch(last)), OTHER)


def depth_of(path: str, layers: int) -> str:
    """Returns the third of the model that contains the path; "" for a path outside the layers."""
    index = layer_index(path)
    return "" if index is None else DEPTHS[min(2, index * 3 // max(layers, 1))]


def group_of(path: str, layers: int) -> str:
    """Returns for example "late MLP"; for a path outside the layers, its last name."""
    depth = depth_of(path, layers)
    return f"{depth} {block_of(path)}" if depth else path.rpartition(".")[2]


def layer_count(paths: Iterable[str]) -> int:
    """Returns the number of layers that the paths imply: the highest index + 1."""
    return 1 + max((index for path in paths if (index := layer_index(path)) is not None), default=0)


def in_order(paths: Iterable[str]) -> list[str]:
    """Sorts paths by layer, then by name; numbers are compared as numbers."""
    return sorted(paths, key=lambda path: [(int(name) if name.isdecimal() else -1, name) for name in path.split(".")])


def layer_range(paths: Sequence[str]) -> str:
    """Returns the layers of the paths, for example "20-29"; "" for paths outside the layers."""
    indices = [index for path in paths if (index := layer_index(path)) is not None]
    if not indices:
        return ""
    return f"{min(indices)}" if min(indices) == max(indices) else f"{min(indices)}-{max(indices)}"


# ---- Settings for a group of layers


def target_groups(model: nn.Module) -> dict[str, Any]:
    """Returns {attention: names, mlp: names, largest_r}: values for `target_modules`, and the highest r for all layers.

    Names cover linear layers of numbered blocks. If one of the two groups is empty, both are omitted. A classification
    head is fully trained and not counted. Of a vision-language model, only the language model counts, and "all-linear"
    means its layers, too.
    """
    config, modules = LoRAConfig(modules_to_save=task_heads(model) or None), dict(model.named_modules())
    everything = selected_candidates(model, modules, config)
    layers = selected_candidates(model, modules, config.replaced(target_modules=LANGUAGE_MODEL))
    inner = [path for path in layers if layer_index(path) is not None]
    blocks = {"attention": ATTENTION, "mlp": MLP}
    groups = {word: [path for path in inner if block_of(path) == block] for word, block in blocks.items()}
    both = groups if all(groups.values()) else {}
    return {
        **({ALL_LINEAR: LANGUAGE_MODEL} if len(layers) < len(everything) else {}),
        **{word: shortest_names(paths, everything.keys() - set(paths)) for word, paths in both.items()},
        "largest_r": min(min(layer.dims) for layer in layers.values()),
    }


def shortest_names(paths: Collection[str], excluded: Collection[str]) -> list[str]:
    """Returns the shortest suffixes of the paths that no path in `excluded` shares."""
    taken = {end for path in excluded for end in _ends(path)}
    return list(dict.fromkeys(next((end for end in _ends(path) if end not in taken), path) for path in paths))


def _ends(path: str) -> list[str]:
    """Returns c, b.c and a.b.c for a.b.c."""
    names = path.split(".")
    return [".".join(names[start:]) for start in range(len(names) - 1, -1, -1)]


# ---- Trained layers


@dataclass(frozen=True)
class TrainedGroup:
    """Layers that differ only in their number, which `path` shows as a range: layers.{0-29}."""

    path: str
    kind: str
    shape: tuple[int, ...]  # (in, out). For fully trained parameters it is their own shape, and r and alpha are None.
    r: int | None
    alpha: float | None
    count: int
    parameters: int


def trained_groups(model: LoRAModel) -> list[TrainedGroup]:
    groups: dict[tuple[Any, ...], dict[str, int]] = defaultdict(dict)  # -> path -> parameters
    for row in model.summary().rows:
        shape = row.shape
        if row.r is not None:
            layer = cast(LoRALayer, model.lora_layers[layer_key(row.path)])
            shape = layer.in_features, layer.out_features
        groups[without_layer(row.path), row.layer_type, shape, row.r, row.lora_alpha][row.path] = row.parameters
    return [
        TrainedGroup(with_layer_range([*members]), kind, shape, r, alpha, len(members), sum(members.values()))
        for (_, kind, shape, r, alpha), members in groups.items()
    ]


def without_layer(path: str) -> str:
    """Returns the path with * for its first number, the same for all similar layers."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", path, count=1)


def with_layer_range(paths: Sequence[str]) -> str:
    """Returns similar paths as one: model.layers.{0-29}.self_attn.q_proj."""
    numbers = sorted({index for path in paths if (index := layer_index(path)) is not None})
    if len(paths) == 1 or not numbers:
        return paths[0]
    ranges = []
    for _, pairs in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):  # consecutive numbers
        run = [number for _, number in pairs]
        ranges.append(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}")
    return without_layer(paths[0]).replace("*", f"{{{','.join(ranges)}}}", 1)
