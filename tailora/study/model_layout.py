"""Where in a model a path is: early, middle or late; attention or MLP. And settings that name such places."""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from tailora.core.config import LoRAConfig
from tailora.core.patterns import exactly, layer_index, pattern_matches
from tailora.core.targets import chosen_places

DEPTHS = ("early", "middle", "late")
ATTENTION, MLP, OTHER = "attention", "MLP", "other"
HOLDERS = {  # words of the modules that hold a block's matrices, in the common model families
    ATTENTION: re.compile(r"attn|attention"),
    MLP: re.compile(r"mlp|ffn|^ff$|feed_?forward|expert|dense_?relu|intermediate"),
}
NAMES = {  # of the matrices themselves, for models without such holders
    ATTENTION: re.compile(r"(to_)?(q|k|v|o|out|qkv)(_proj|_lin)?(_weight)?|in_proj.*|query|key|value|query_key_value"),
    MLP: re.compile(r"(gate|up|down|gate_up)_proj|(fc|lin|linear|dense|w|wi|wo)_?\d?|c_fc"),
}
NUMBERED = re.compile(r"((?:[^.]+\.)*?)(\d+)\.(.+)")  # by the first number: the layer's


def block_of(path: str) -> str:
    """By the innermost module that says it, or the matrix's own name."""
    *outer, last = path.lower().split(".")
    for part in reversed([*outer, last]):
        for block, words in HOLDERS.items():
            if words.search(part):
                return block
    return next((block for block, words in NAMES.items() if words.fullmatch(last)), OTHER)


def depth_of(path: str, layers: int) -> str:
    """The third of the layers that the path is in; "" for what is in none."""
    index = layer_index(path)
    return "" if index is None else DEPTHS[min(2, index * 3 // max(layers, 1))]


def group_of(path: str, layers: int) -> str:
    """Such as "late MLP"; what is in no layer goes by its last name."""
    depth = depth_of(path, layers)
    return f"{depth} {block_of(path)}" if depth else path.rpartition(".")[2]


def layers_of(paths: Iterable[str]) -> int:
    """The highest layer that is named, and one: how many there are, as far as the adapter says."""
    return 1 + max((index for path in paths if (index := layer_index(path)) is not None), default=0)


def in_order(paths: Iterable[str]) -> list[str]:
    """By layer and then by name, numbers by their value."""
    return sorted(paths, key=lambda path: [(int(part) if part.isdecimal() else -1, part) for part in path.split(".")])


def grouped(paths: Sequence[str], layers: int) -> dict[str, list[str]]:
    """Group -> its paths; from early to late, attention before MLP."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in in_order(paths):
        found[group_of(path, layers)].append(path)
    order = [f"{depth} {block}" for depth in DEPTHS for block in (ATTENTION, MLP, OTHER)]
    known = [name for name in order if name in found]
    return {name: found[name] for name in [*known, *(name for name in found if name not in known)]}


def span(paths: Sequence[str]) -> str:
    """Of their layers, such as "20-29"; "" where they are in none."""
    indices = [index for path in paths if (index := layer_index(path)) is not None]
    return (
        "" if not indices else f"{min(indices)}" if min(indices) == max(indices) else f"{min(indices)}-{max(indices)}"
    )


def patterns(values: Mapping[str, int], among: Sequence[str]) -> dict[str, int]:
    """A `rank_pattern` that gives these paths their values and means no other path of `among`.

    One expression for what differs in layer and last names alone, `layers\\.(20|21)\\.(mlp\\.up_proj|mlp\\.down_proj)`,
    where that is exact.
    """
    written: dict[str, int] = {}
    for value in dict.fromkeys(values.values()):
        for expression, paths in _expressions([path for path, own in values.items() if own == value]).items():
            if all(pattern_matches(expression, path) == (path in paths) for path in {*among, *paths}):
                written[expression] = value
            else:
                written |= {exactly(path): value for path in paths}
    return written


def _expressions(paths: Sequence[str]) -> dict[str, list[str]]:
    """Expression -> the paths that it is made for."""
    layers: dict[tuple[str, str], list[str]] = defaultdict(list)  # before and after the layer's number -> numbers
    found: dict[str, list[str]] = {}
    for path in paths:
        if parts := NUMBERED.fullmatch(path):
            layers[parts[1], parts[3]].append(parts[2])
        else:
            found[exactly(path)] = [path]
    names: dict[tuple[str, tuple[str, ...]], list[str]] = defaultdict(list)
    for (before, after), numbers in layers.items():
        names[before, tuple(numbers)].append(after)
    for (before, all_numbers), ends in names.items():
        last = before.rstrip(".").rpartition(".")[2]
        expression = rf"{re.escape(last)}\." if last else "^"
        expression += rf"{_either(all_numbers)}\.{_either([re.escape(end) for end in ends])}"
        found[expression] = [f"{before}{number}.{end}" for end in ends for number in all_numbers]
    return found


def _either(alternatives: Sequence[str]) -> str:
    return alternatives[0] if len(alternatives) == 1 else f"({'|'.join(alternatives)})"


# ---- Which layers of a model are its attention and which its MLP, and the highest rank that they all take.
#
# Read off the model's own names: a linear layer of a block is attention when a module around it is called so; the other
# layers of the blocks are the MLP.


ATTENTION_NAME = re.compile(r"attn|attention", re.IGNORECASE)


def parts(model: nn.Module) -> dict[str, Any]:
    """{attention: names, mlp: names, largest_r}; names are those of `target_modules`. One that is empty is left out."""
    modules = dict(model.named_modules())
    places = chosen_places(model, modules, LoRAConfig())
    inner = [path for path in places if layer_index(path) is not None]
    attention = [path for path in inner if _in_attention(path, modules)]
    mlp = [path for path in inner if path not in set(attention)]
    both = {"attention": attention, "mlp": mlp} if attention and mlp else {}
    return {
        **{word: names(paths, places.keys() - set(paths)) for word, paths in both.items()},
        "largest_r": min(min(place.dims) for place in places.values()),
    }


def _in_attention(path: str, modules: dict[str, nn.Module]) -> bool:
    names = path.split(".")
    around = [".".join(names[:end]) for end in range(1, len(names))]
    called = [*names[:-1], *(type(modules[each]).__name__ for each in around if each in modules)]
    return any(ATTENTION_NAME.search(name) for name in called)


def names(paths: Collection[str], others: Collection[str]) -> list[str]:
    """The shortest ends of the paths that no other path has."""
    taken = {end for path in others for end in _ends(path)}
    return list(dict.fromkeys(next((end for end in _ends(path) if end not in taken), path) for path in paths))


def _ends(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]
