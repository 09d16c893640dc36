"""Which layers of a model are its attention and which its MLP, and the highest rank that they all take.

Read off the model's own names: a linear layer of a block is attention when a module around it is called so; the other
layers of the blocks are the MLP.
"""

import re
from collections.abc import Collection
from typing import Any

from torch import nn

from tailora.core.config import LoRAConfig
from tailora.core.patterns import layer_index
from tailora.core.targets import chosen_places

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
