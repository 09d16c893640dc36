"""The rows of a batch within `adapter_rows`: their names, how often `generate` repeats each, and what layers share."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tailora.core.rowforms import NONE, Plan
from tailora.errors import AdapterError, RowsError


@dataclass(eq=False)
class Batch:
    """The rows of one block of `adapter_rows`, and what its layers share."""

    names: tuple[str | None, ...]
    adapters: tuple[str, ...]  # all that are loaded
    device: torch.device
    repeats: int = 1  # beams, or sequences per prompt, while generate runs
    generating: bool = False
    epoch: int = 0  # another one after `set_scale`, `to` and the like, and for each run of generate
    n: int = field(init=False)
    ids: Tensor = field(init=False)  # (n,) of `adapters`, their number for None
    plans: dict[Any, Plan] = field(default_factory=dict)
    lookups: dict[Any, Tensor] = field(default_factory=dict)
    found: dict[Any, tuple[tuple[str, ...], tuple[int, ...]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.n = len(self.names)  # a number for the compiler, which would guard the names
        number: dict[str | None, int] = {name: i for i, name in enumerate(self.adapters)}
        self.ids = torch.tensor([number.get(name, len(number)) for name in self.names], device=self.device)

    @contextmanager
    def generation(self, repeats: int) -> Iterator[None]:
        """Within the block every name stands for so many rows, and parameters stay."""
        self.epoch += 1
        self.repeats, self.generating = repeats, True
        try:
            yield
        finally:
            self.repeats, self.generating = 1, False

    def times(self, x: Tensor, path: str, least: int) -> int:
        """How many rows of x stand for each name, the same beside each other. Raises RowsError."""
        n = self.n
        if x.ndim >= least and x.shape[0] == n:
            return 1
        if x.ndim >= least and x.shape[0] == n * self.repeats:
            return self.repeats
        repeated = f", or {n * self.repeats} repeated by generate" if self.repeats > 1 else ""
        packed = "; packed rows are one row: pass them apart, padded" if n > 1 and x.shape[0] == 1 else ""
        raise RowsError(
            f"adapter_rows names {n} rows{repeated}; {path or 'the model'} got {tuple(x.shape)}, whose first dimension "
            f"must be the rows of the batch{packed}"
        )

    def slots(self, names: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """Those of `names` that rows have, and of every row its place among these, or NONE."""
        if names not in self.found:
            chosen = set(self.names)
            used = tuple(name for name in names if name in chosen)
            place: dict[str | None, int] = {name: i for i, name in enumerate(used)}
            self.found[names] = used, tuple(place.get(name, NONE) for name in self.names)
        return self.found[names]

    def lookup(self, names: tuple[str, ...]) -> Tensor:
        """Number of an adapter -> its place among `names`, their number for all others. (loaded + 1,)"""
        if names not in self.lookups:
            place = {name: i for i, name in enumerate(names)}
            found = [place.get(name, len(place)) for name in self.adapters]
            self.lookups[names] = torch.tensor([*found, len(place)], device=self.device)
        return self.lookups[names]

    def places(self, lookup: Tensor, times: int) -> Tensor:
        """Of every row, as a tensor that depends on the rows. (n times,)"""
        found = lookup[self.ids]
        return found if times == 1 else found.repeat_interleave(times)


def check_names(names: Any, known: Sequence[str]) -> tuple[str | None, ...]:
    """Raises AdapterError for what is no list of names, and for all names that there are none of."""
    if isinstance(names, str) or not isinstance(names, Sequence) or not names:
        raise AdapterError(f"adapter_rows takes a list with a name, or None, for every row of the batch; got {names!r}")
    wrong = dict.fromkeys(repr(name) for name in names if name is not None and name not in known)
    if wrong:
        raise AdapterError(f"no adapter is called {', '.join(wrong)}; there are: {', '.join(known) or 'none'}")
    return tuple(names)


def repeats(base: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """How often `base.generate(*args, **kwargs)` repeats every row: for its beams, or the sequences it returns."""
    given = args[1] if len(args) > 1 else kwargs.get("generation_config")
    config = given or getattr(base, "generation_config", None)
    asked = [kwargs.get(name) or getattr(config, name, None) or 1 for name in ("num_beams", "num_return_sequences")]
    return max(asked)
