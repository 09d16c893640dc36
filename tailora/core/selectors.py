"""The shortest settings that mean exactly what is there: selectors of layers, and patterns of values."""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import TypeVar

from tailora.core.patterns import exactly, matches

Number = TypeVar("Number", int, float)


def portable_targets(paths: list[str], everything: list[str]) -> list[str] | str:
    """The shortest selector that means exactly `paths`: last names, whole paths, or a regular expression."""
    wanted = set(paths)
    for names in (sorted({path.rpartition(".")[2] for path in paths}), sorted(paths)):
        if names and all(names) and {path for path in everything if matches(names, path)} == wanted:
            return names
    return "|".join(re.escape(path) for path in sorted(paths))


def commonest(values: Mapping[str, Number]) -> Number:
    """The first of those that occur most often."""
    return Counter(values.values()).most_common(1)[0][0]


def portable_patterns(values: Mapping[str, Number], default: Number) -> dict[str, Number]:
    """Pattern -> value for `rank_pattern` or `alpha_pattern`: every path gets its value, or the default.

    One pattern per last name, with its commonest value; paths that differ come before it, anchored.
    """
    by_name: dict[str, dict[str, Number]] = defaultdict(dict)
    for path, value in values.items():
        by_name[path.rpartition(".")[2]][path] = value
    usual = {name: commonest(paths) for name, paths in by_name.items()}
    exceptions = {
        exactly(path): value for name, paths in by_name.items() for path, value in paths.items() if value != usual[name]
    }
    return exceptions | {re.escape(name): value for name, value in usual.items() if value != default}
