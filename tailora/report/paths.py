"""Short names of matrices, for figures and tables that have no room for paths, and matrices by depth and name."""

from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import Protocol, TypeVar

from tailora.core.patterns import layer_index
from tailora.report.format import NONE
from tailora.study.model_layout import DEPTHS, depth_of, layer_range


def inner_path(path: str) -> str:
    """The path after the number of its layer; all of it where it has none."""
    parts = path.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdecimal()), -1)
    return ".".join(parts[number + 1 :])


def short_names(paths: Iterable[str]) -> dict[str, str]:
    """Path -> its last name; where another matrix of a layer has the same last name, its path within the layer."""
    inner = {path: inner_path(path) for path in paths}
    by_last_name: dict[str, set[str]] = {}
    for name in inner.values():
        by_last_name.setdefault(name.rpartition(".")[2], set()).add(name)
    return {
        path: last if len(by_last_name[last := name.rpartition(".")[2]]) == 1 else name for path, name in inner.items()
    }


def shared_prefix(paths: Iterable[str]) -> str:
    """What all paths begin with, up to a dot; '' for nothing."""
    names = zip(*(path.split(".")[:-1] for path in paths), strict=False)
    shared = [same[0] for same in takewhile(lambda same: len(set(same)) == 1, names)]
    return ".".join(shared) + "." if shared else ""


class HasPath(Protocol):
    @property
    def path(self) -> str: ...


Module = TypeVar("Module", bound=HasPath)


def by_depth(modules: Sequence[Module], layers: int) -> list[tuple[str, str, list[Module]]]:
    """Modules in groups: a range of layers in one third of the model, a matrix's short name, and its modules there."""
    names = short_names(module.path for module in modules)
    groups: dict[tuple[str, str], list[Module]] = {}
    for module in modules:
        groups.setdefault((depth_of(module.path, layers), inner_path(module.path)), []).append(module)
    ordered = sorted(groups.items(), key=lambda item: ["", *DEPTHS].index(item[0][0]))
    return [
        (layer_range([module.path for module in members]) or depth or NONE, names[members[0].path], members)
        for (depth, _), members in ordered
    ]


def by_layer(modules: Sequence[HasPath], measure: str) -> dict[tuple[str, int], float]:
    """The cells of a heat map: a matrix's short name and its layer -> the module's attribute `measure`, if not None."""
    names = short_names(module.path for module in modules)
    return {
        (names[module.path], layer): float(value)
        for module in modules
        if (layer := layer_index(module.path)) is not None and (value := getattr(module, measure)) is not None
    }
