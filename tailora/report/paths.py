"""Names of matrices for figures, which have no room for paths."""

from collections.abc import Iterable


def inner(path: str) -> str:
    """The path after the number of its layer, or all of it."""
    parts = path.split(".")
    number = next((place for place, part in enumerate(parts) if part.isdecimal()), -1)
    return ".".join(parts[number + 1 :])


def short(paths: Iterable[str]) -> dict[str, str]:
    """path -> its last name, where no other matrix of a layer has it, else its path within the layer."""
    names = {path: inner(path) for path in paths}
    last: dict[str, set[str]] = {}
    for name in names.values():
        last.setdefault(name.rpartition(".")[2], set()).add(name)
    return {path: end if len(last[end := name.rpartition(".")[2]]) == 1 else name for path, name in names.items()}
