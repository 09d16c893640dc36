"""Names, regular expressions and layer indices: which paths they mean."""

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TypeVar

import regex

from tailora.errors import PatternError

Selector = Collection[str] | str  # names, or a regular expression
T = TypeVar("T")
MATCH_SECONDS = 0.2  # of CPU time; honest patterns take microseconds


def matches(selector: Selector, path: str) -> bool:
    """A name: the path or its end after a dot. A string: a regular expression for the whole path (PEFT's rule)."""
    if isinstance(selector, str):
        return full_match(selector, path)
    return any(end in selector for end in ends_of(path))


def named(name: str, path: str) -> bool:
    return path == name or path.endswith(f".{name}")


def inside(path: str, whole: str) -> bool:
    """Whether it is the module `whole` or one within it."""
    return path == whole or path.startswith(f"{whole}.")


def exactly(path: str) -> str:
    """A pattern for this path alone: without ^ it would match at the end of longer ones."""
    return f"^{re.escape(path)}"


def ends_of(path: str) -> Iterator[str]:
    """The path, and what follows each of its dots: the names that mean it."""
    yield path
    while "." in path:
        path = path.partition(".")[2]
        yield path


def full_match(pattern: str, path: str) -> bool:
    """Raises PatternError, since an adapter's file may bring a pattern whose time doubles with every letter."""
    try:
        return regex.fullmatch(pattern, path, timeout=MATCH_SECONDS) is not None
    except TimeoutError:
        raise PatternError(
            f"the regular expression {pattern!r} takes more than {MATCH_SECONDS} s to match {path!r}; "
            "repeat no group that can match in several ways, or list the names"
        ) from None


def pattern_matches(pattern: str, path: str) -> bool:
    return full_match(rf"(.*\.)?({pattern})$", path)


def by_pattern(paths: str | Iterable[str], patterns: Mapping[str, T], default: T) -> T:
    """The value of the first pattern that matches one of the paths."""
    paths = [paths] if isinstance(paths, str) else list(paths)
    found = (value for pattern, value in patterns.items() if any(pattern_matches(pattern, path) for path in paths))
    return next(found, default)


def layer_index(path: str) -> int | None:
    """The first number in the path: `model.layers.3.mlp.experts.5` is in layer 3."""
    return next((int(part) for part in path.split(".") if part.isdecimal()), None)


# ---- The shortest settings that mean exactly what is there: selectors of layers, and patterns of values.


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
