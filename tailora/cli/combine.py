"""`tailora combine`: one adapter out of several."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from cyclopts.types import PositiveInt

from tailora.cli.adapters import Base, OutputDir, base_name, check_new, facts, load, show, told
from tailora.cli.flags import Json
from tailora.cli.models import named
from tailora.errors import ConfigError, listing, nearest

RESULT = "default"

Sources = Annotated[
    list[str], Parameter(name="--adapter", negative=(), metavar="NAME=FOLDER", help="folder, named or not; repeatable")
]
Weights = Annotated[
    list[str] | None,
    Parameter(name="--weight", negative=(), metavar="NAME=NUMBER", help="of an adapter; without it 1; repeatable"),
]
Method = Annotated[
    Literal["cat", "svd", "ties", "dare"],
    Parameter(help="cat is exact and ranks add up; svd is the nearest of rank --r; ties and dare thin out first"),
]


def combine(
    *,
    adapter: Sources,
    weight: Weights = None,
    output_dir: OutputDir,
    method: Method = "cat",
    r: Annotated[PositiveInt | None, Parameter(help="highest rank; default: the highest of the adapters")] = None,
    density: Annotated[float | None, Parameter(help="ties: share of the entries to keep; default .2")] = None,
    drop: Annotated[float | None, Parameter(help="dare: probability of dropping an entry; default .5")] = None,
    seed: Annotated[int | None, Parameter(help="dare: of what is dropped; default 0")] = None,
    model: Base = None,
    json: Json = False,
) -> int:
    """Make one adapter out of several: the weighted sum of what they add to every layer."""
    folders = named(adapter)
    weights = weights_of(weight or [], folders)
    check_new(output_dir)
    from tailora.core.combine import Combination, check

    check(weights, Combination(method, r, density, drop, seed))  # before a model is loaded
    base = base_name(model, list(folders.values()))
    adapted, _ = load(base, folders)
    report = adapted.combine(weights, RESULT, method, r=r, density=density, drop=drop, seed=seed)
    adapted.save_adapter(output_dir, RESULT)
    sources = ", ".join(f"{each} x {value:g}" for each, value in weights.items())
    payload = {"method": method, "weights": weights, **facts(report)}
    show(f"combined {sources} by {method}", [told(report)], base, output_dir, payload, json)
    return 0


def weights_of(texts: Sequence[str], folders: Mapping[str, Path]) -> dict[str, float]:
    """Name -> weight for every adapter, 1 where none is given. Raises ConfigError with all that is wrong."""
    weights, problems = dict.fromkeys(folders, 1.0), []
    if RESULT in folders:
        problems.append(f"--adapter: {RESULT!r} is the new adapter's name; write OTHER={folders[RESULT]}")
    for text in (part for each in texts for part in each.split(",")):
        name, _, number = text.rpartition("=")
        if name not in folders:
            known = f"there are: {', '.join(folders)}{nearest(name, folders)}"
            problems.append(f"--weight {text}: write NAME=NUMBER; {known}")
            continue
        try:
            weights[name] = float(number)
        except ValueError:
            problems.append(f"--weight {text}: {number!r} is not a number")
    if problems:
        raise ConfigError(listing(problems))
    return weights
