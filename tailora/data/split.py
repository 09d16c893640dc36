"""Holding out examples, so that no copy of one stands on both sides."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tailora.errors import DataError


class Sides(NamedTuple):
    train: list[int]
    held_out: list[int]


def split(keys: Sequence[bytes], share: float, seed: int) -> Sides:
    """Places of the examples on either side, in their order; equal keys go to the same side.

    share: of the examples to hold out, at least one; 0 holds out none. The same (keys, share, seed) give the same.
    Raises DataError when there are not two different examples to part.
    """
    if not share:
        return Sides(list(range(len(keys))), [])
    groups = group(keys)
    if len(groups) < 2:
        raise DataError(
            f"{len(groups)} different example in {len(keys)} rows: none can be held out; "
            "add data, or use --validation-split 0"
        )
    target = max(1, round(len(keys) * share))
    held: list[int] = []
    order = np.random.default_rng(seed).permutation(len(groups))
    for place in order[:-1]:  # the last one stays, so that something is left to learn
        if len(held) + len(groups[place]) <= target:
            held += groups[place]
    held = held or min(groups, key=len)
    chosen = set(held)
    return Sides([place for place in range(len(keys)) if place not in chosen], sorted(held))


def group(keys: Sequence[bytes]) -> list[list[int]]:
    """Places of equal keys together, in order of first appearance."""
    groups: dict[bytes, list[int]] = {}
    for place, key in enumerate(keys):
        groups.setdefault(key, []).append(place)
    return list(groups.values())
