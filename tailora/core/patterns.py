"""Which paths match a name, a regular expression or a layer index.

The second half does the reverse: it finds the shortest selector and patterns for given paths and values.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TypeVar

import regex

from tailora.errors import PatternError

Selector = Collection[str] | str  # names, or a regular expression
T = TypeVar("T")
MATCH_SECONDS = 0.2  # of CPU time; normal patterns take microseconds


def matches(selector: Selector, path: str) -> bool:
    """True if the selector matches this path (PEFT's rule).

    A string is a regular expression for the full path. In a collection of names, one must be the path or its end after
    a dot.
    """
    if isinstance(selector, str):
        return full_match(selector, path) is not None
    return any(end in selector for end in ends_of(path))


def named(name: str, path: str) -> bool:
    """True if the path is `name`, or ends with it after a dot."""
    return path == name or path.endswith(f".{name}")


def ends_with(name: str, path: str) -> bool:
    """True if the path ends with these letters, as in PEFT for modules_to_save: `head` matches `lm_head`."""
    return bool(name) and path.endswith(name)


def inside(path: str, parent: str) -> bool:
    """True for the path of the module `parent`, and of all modules inside it."""
    return path == parent or path.startswith(f"{parent}.")


def exactly(path: str) -> str:
    """Returns a pattern that matches only this path. Without ^, it would also match the end of longer paths."""
    return f"^{re.escape(path)}"


def ends_of(path: str) -> Iterator[str]:
    """Yields all names that match this path: the path itself, and what follows each of its dots."""
    yield path
    while "." in path:
        path = path.partition(".")[2]
        yield path


def full_match(pattern: str, path: str) -> "regex.Match[str] | None":
    """Returns the match of the full path. Raises PatternError, also after MATCH_SECONDS: patterns come from files."""
    try:
        return regex.fullmatch(pattern, path, timeout=MATCH_SECONDS)
    except TimeoutError:
        raise PatternError(
            f"the regular expression {pattern!r} takes more than {MATCH_SECONDS} s to match {path!r}; avoid nested "
            "repetitions, or list the names"
        ) from None
    except regex.error as error:  # re accepts some patterns that regex rejects
        raise PatternError(f"unsupported regular expression {pattern!r}: {error}") from None


def pattern_matches(pattern: str, path: str) -> bool:
    """True if a pattern of rank_pattern or alpha_pattern matches the path or its end after a dot (PEFT's rule)."""
    return full_match(rf"(.*\.)?({pattern})$", path) is not None


def by_pattern(paths: str | Iterable[str], patterns: Mapping[str, T], default: T) -> T:
    """Returns the value of the first pattern that matches one of the paths."""
    paths = [paths] if isinstance(paths, str) else list(paths)
    values = (value for pattern, value in patterns.items() if any(pattern_matches(pattern, path) for path in paths))
    return next(values, default)


def layer_index(path: str) -> int | None:
    """Returns the first number in the path: `model.layers.3.mlp.experts.5` is in layer 3."""
    return next((int(part) for part in path.split(".") if part.isdecimal()), None)


def layer_numbers(paths: Iterable[str], layers_patterns: Collection[str]) -> dict[str, int | None]:
    """Returns path -> the number compared with `layers_to_transform` (PEFT's rule); None if the path has none.

    It is the first number after at least two names: 3 in `model.layers.3.mlp`, but 2 in `blocks.3.experts.2.fc`.
    With `layers_pattern`, it is the number after one of these names: `blocks` gives 3 in the second path. If none
    of the paths has a number by this rule, as with `layers.3.mlp`, it is the first number.
    """
    names = [rf"(?:^|.*?\.){name}" for name in layers_patterns] or [r".*?\.[^.]*"]
    numbers: dict[str, int | None] = {}
    for path in paths:
        results = (full_match(rf"{name}\.(?P<layer>\d+)\..*", path) for name in names)
        numbers[path] = next((int(match["layer"]) for match in results if match is not None), None)
    if layers_patterns or any(number is not None for number in numbers.values()):
        return numbers
    return {path: layer_index(path) for path in numbers}


# ---- The shortest settings for given paths and values


Number = TypeVar("Number", int, float)


def portable_targets(paths: list[str], all_paths: list[str]) -> list[str] | str:
    """Returns the shortest selector that matches exactly `paths`: last names, full paths, or a regular expression."""
    for names in (sorted({path.rpartition(".")[2] for path in paths}), sorted(paths)):
        if names and all(names) and {path for path in all_paths if matches(names, path)} == set(paths):
            return names
    return "|".join(re.escape(path) for path in sorted(paths))


def commonest(values: Mapping[str, Number]) -> Number:
    """Returns the most frequent value; of several, the first."""
    return Counter(values.values()).most_common(1)[0][0]


def portable_patterns(values: Mapping[str, Number], default: Number) -> dict[str, Number]:
    """Returns pattern -> value for `rank_pattern` or `alpha_pattern`, so that every path gets its value or the default.

    There is one pattern per last name, with its most frequent value. Paths with other values come first, anchored.
    """
    by_name: dict[str, dict[str, Number]] = defaultdict(dict)
    for path, value in values.items():
        by_name[path.rpartition(".")[2]][path] = value
    usual = {name: commonest(paths) for name, paths in by_name.items()}
    exceptions = {
        exactly(path): value for name, paths in by_name.items() for path, value in paths.items() if value != usual[name]
    }
    return exceptions | {re.escape(name): value for name, value in usual.items() if value != default}
