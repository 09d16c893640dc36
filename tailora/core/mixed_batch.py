"""Another adapter for every row of a batch: what `LoRAModel.adapter_rows` attaches to the layers for its block.

Every adapted layer gets one `RowLayer`, or `RowModule` where copies are trained whole, which stand where an adapter
does. They share the `Batch`: the names, and how often `generate` repeats each row.

Without gradients the factors of a block are put together once and kept until one of them changes, as torch's version
counters and addresses tell. With 64 adapters that question costs as much as their products, so it is left out where
nothing is trained: in `generate` and in torch.inference_mode. Under torch.compile all is in the graph, and rows are an
input of it: other names for them compile nothing anew.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

from tailora.core.adapter import Adapter
from tailora.core.layer import LoRALayer
from tailora.core.layer_types import EMBEDDING, Kind
from tailora.core.rowbatch import Batch
from tailora.core.rowforms import (
    BLOCKS,
    NONE,
    Plan,
    add,
    can_add,
    joined,
    looked_up,
    plan,
    run_blocks,
    run_joined,
    stacked,
    terms,
    vectors_by_row,
)
from tailora.errors import RowsError


@dataclass(eq=False)
class Ready:
    """What a call multiplies by, and the state of what it was made of; while that is held, no address is used twice."""

    plan: Plan
    shape: torch.Size  # of the input
    factors: Any  # of the form that is planned
    extra: Tensor | None  # (n, out): what the layer's output is multiplied by and added
    shift: Tensor | None  # (n, out)
    state: Any = None
    held: Sequence[Tensor] = ()
    epoch: int = 0  # of the batch, when the state was looked at last


def by_rows(
    batch: Batch, adapters: Mapping[str, Adapter], hosts: Mapping[str, str], layers: Mapping[str, nn.Module]
) -> dict[str, tuple[Any, ...]]:
    """What every layer that an adapter reaches is attached to while the batch is this one, by path.

    hosts: path of an adapter's part -> that of its layer. Raises RowsError for layers that see no rows, and for what
    adapters of rows train beside layers.
    """
    used = {name: adapters[name] for name in dict.fromkeys(batch.names) if name is not None}
    if extras := [f"{path} of {name}" for name, adapter in used.items() for path in adapter.extras]:
        raise RowsError(f"trained biases and token rows cannot be chosen by row: {', '.join(extras[:5])}")
    low_rank, saved = _by_path(adapters, "low_rank"), _by_path(adapters, "saved")
    wholes = [path for path, parts in low_rank.items() if next(iter(parts.values())).kind.forward is not None]
    if mixed := [path for path in low_rank if path in wholes or "experts" in path.split(".")]:
        raise RowsError(
            "attention as a whole may have its rows elsewhere, and experts see the tokens of all rows mixed: "
            f"no adapter by row on {', '.join(mixed)}"
        )
    found: dict[str, tuple[Any, ...]] = {
        path: (RowModule(path, copies, layers[path], batch),) for path, copies in saved.items()
    }
    for path, parts in low_rank.items():
        found[hosts[path]] = (*found.get(hosts[path], ()), RowLayer(path, parts, batch))
    for several in found.values():
        for each in several if len(several) > 1 else ():
            each.is_alone = False
    return found


def _by_path(adapters: Mapping[str, Adapter], kept: str) -> dict[str, dict[str, Any]]:
    """Path -> name of the adapter -> its part there."""
    found: dict[str, dict[str, Any]] = {}
    for name, adapter in adapters.items():
        for path, part in getattr(adapter, kept).items():
            found.setdefault(path, {})[name] = part
    return found


class RowLayer:
    """In the place of a layer's adapter: of every row its own."""

    def __init__(self, path: str, parts: Mapping[str, LoRALayer], batch: Batch) -> None:
        self.path, self.batch = path, batch
        self.names, self.parts = tuple(parts), tuple(parts.values())
        self.used_names, self.slots = batch.slots(self.names)
        self.used = tuple(parts[name] for name in self.used_names)
        self.lookup, self.lookup_used = batch.lookup(self.names), batch.lookup(self.used_names)
        self.kind: Kind = self.parts[0].kind
        self.kernel = self.parts[0].lora_A.ndim - 2
        self.least = 1 if self.kind is EMBEDDING else 2 + self.kernel  # dimensions of an input with rows
        self.blocks = BLOCKS.get(self.kind) if self.parts[0].rows is None else None  # not for parts of fused layers
        self.is_alone = True  # on its layer, whose output it may then write to
        self._kept: Ready | None = None

    def added(self, y: Tensor, base: Tensor, x: Tensor, layer: nn.Module) -> Tensor:
        """y, and what the rows' adapters change of the layer's output `base`."""
        times = self.batch.times(x, self.path, self.least)
        if torch.compiler.is_compiling():
            return y + self._in_graph(base, x, layer, times)
        if not self.used:
            return y
        if self.blocks is None and self.kind is not EMBEDDING:
            return y + self._in_turn(base, x, layer, times)
        ready = self._ready(x, layer, base.dtype, times)
        if self.blocks is None:
            change = looked_up(layer, x, ready.factors, self.batch.places(self.lookup_used, times))
            return y + _around(change, base, ready.extra, ready.shift, self.kernel)
        x = self._dropped(x.to(base.dtype), layer.training, times)
        if self.is_alone and self._is_plain and not torch.is_grad_enabled() and can_add(self.blocks, y, ready.plan):
            return add(y, x, ready.factors, ready.plan)
        run = run_joined if ready.plan.mask is not None else run_blocks
        change = run(self.blocks, layer, x, ready.factors, ready.plan)
        return y + _around(change, base, ready.extra, ready.shift, self.kernel)

    def _ready(self, x: Tensor, layer: nn.Module, dtype: torch.dtype, times: int) -> Ready:
        """Kept while no gradient is asked for and nothing that it is made of changes."""
        kept = self._kept
        chosen = kept.plan if kept is not None and kept.shape == x.shape else self._plan(dtype, x, times)
        if torch.is_grad_enabled():
            self._kept = None
            return self._made(chosen, x, layer, dtype, times)
        trusted = self.batch.generating or torch.is_inference_mode_enabled()
        if trusted and kept is not None and kept.epoch == self.batch.epoch and kept.plan is chosen:
            return kept
        tensors = _tensors(self.used if self._is_plain else (*self.used, layer))
        state = dtype, _state(tensors)
        if kept is None or kept.plan is not chosen or kept.state != state:
            kept = self._made(chosen, x, layer, dtype, times)
            kept.state, kept.held = state, [tensor.detach() for tensor in tensors]
        kept.epoch, self._kept = self.batch.epoch, kept
        return kept

    @cached_property
    def _is_plain(self) -> bool:
        return all(part.is_plain for part in self.used)

    def _plan(self, dtype: torch.dtype, x: Tensor, times: int) -> Plan:
        """Shared by all layers with the same adapters."""
        ranks = tuple(len(part.lora_A) * (1 + part.has_start) for part in self.used)
        tokens = x[0].numel() // self.used[0].in_features or 1
        key = self.slots, ranks, times, tokens, dtype, x.device, self.kind.name
        if key not in self.batch.plans:
            slots = [slot for slot in self.slots for _ in range(times)]
            self.batch.plans[key] = plan(self.kind, slots, ranks, tokens, dtype, x.device)
        return self.batch.plans[key]

    def _made(self, chosen: Plan, x: Tensor, layer: nn.Module, dtype: torch.dtype, times: int) -> Ready:
        each = [terms(part, layer, dtype) for part in self.used]
        if chosen.mask is not None:
            factors: Any = joined(each)
        else:
            stack = stacked(self.kind, each, self.used[0].groups, with_none=chosen.with_none)
            factors = stack if chosen.which is None else stack.taken(chosen.which)
        which = self.batch.places(self.lookup_used, times)
        extra, shift = vectors_by_row(each, "extra", which), vectors_by_row(each, "shift", which)
        return Ready(chosen, x.shape, factors, extra, shift)

    def _dropped(self, x: Tensor, training: bool, times: int) -> Tensor:
        """Dropout of every row by its own adapter's probability."""
        rates = [part.lora_dropout for part in self.used] if training else []
        if not any(rates):
            return x
        if len(set(rates)) == 1:
            return F.dropout(x, rates[0])
        own = [0.0 if slot == NONE else rates[slot] for slot in self.slots for _ in range(times)]
        return _dropped_by(x, torch.tensor(own, device=x.device))

    def _in_turn(self, base: Tensor, x: Tensor, layer: nn.Module, times: int) -> Tensor:
        """Adapter after adapter, each on its rows: what every kind can do."""
        change = torch.zeros_like(base)
        for slot, part in enumerate(self.used):
            if part.training != layer.training:
                part.train(layer.training)
            own = [i for i, of in enumerate(of for of in self.slots for _ in range(times)) if of == slot]
            rows = torch.tensor(own, device=x.device)
            change = change.index_add(0, rows, part.change(base[rows], x[rows], layer))
        return change

    def _in_graph(self, base: Tensor, x: Tensor, layer: nn.Module, times: int) -> Tensor:
        """The same shapes and operations whatever the rows' names are; with gradients, among the same names."""
        with_gradients = torch.is_grad_enabled()
        lookup, parts = (self.lookup_used, self.used) if with_gradients else (self.lookup, self.parts)
        if not parts:
            return base.new_zeros(())
        which = self.batch.places(lookup, times).to(x.device)
        if self.blocks is None and self.kind is not EMBEDDING:
            changes = [part.change(base, x, layer) for part in parts]
            masks = [(which == i).view(-1, *[1] * (base.ndim - 1)) for i in range(len(parts))]
            return torch.stack([torch.where(mask, each, 0) for mask, each in zip(masks, changes, strict=True)]).sum(0)
        each = [terms(part, layer, base.dtype) for part in parts]
        stack = stacked(self.kind, each, parts[0].groups, with_none=True)
        around = vectors_by_row(each, "extra", which), vectors_by_row(each, "shift", which)
        if self.blocks is None:
            return _around(looked_up(layer, x, stack, which), base, *around, self.kernel)
        x = x.to(base.dtype)
        rates = [part.lora_dropout for part in parts]
        if layer.training and any(rates):
            x = _dropped_by(x, torch.tensor([*rates, 0.0], device=x.device)[which])
        return _around(self.blocks(layer, x[:, None], stack.taken(which)).squeeze(1), base, *around, self.kernel)


def _around(change: Tensor, base: Tensor, extra: Tensor | None, shift: Tensor | None, kernel: int) -> Tensor:
    """change + base * extra + shift, the two (n, out) by row; `kernel`: dimensions of y behind the channels."""
    if extra is not None:
        change = torch.addcmul(change, base, _spread(extra, base, kernel))
    return change if shift is None else change + _spread(shift, base, kernel)


def _spread(vectors: Tensor, y: Tensor, kernel: int) -> Tensor:
    """(n, out) -> (n, 1, ..., out, 1, ...), for y (n, ..., out, *kernel)."""
    n, out = vectors.shape
    return vectors.view(n, *[1] * (y.ndim - 2 - kernel), out, *[1] * kernel)


def _dropped_by(x: Tensor, rates: Tensor) -> Tensor:
    """Dropout with another probability for every row, rates (n,)."""
    rates = rates.view(-1, *[1] * (x.ndim - 1))
    return x * ((torch.rand_like(x, dtype=torch.float32) >= rates) / (1 - rates)).to(x.dtype)


def _tensors(parts: Sequence[nn.Module]) -> list[Tensor]:
    tables = [table for part in parts for table in (part._parameters, part._buffers)]
    return [tensor for table in tables for tensor in table.values() if tensor is not None]


def _state(tensors: Sequence[Tensor]) -> Any:
    """Changes when one of them does, as far as torch tells. Asked at every call, so in few steps."""
    try:
        versions = [tensor._version for tensor in tensors]
    except RuntimeError:  # tensors of inference mode are not counted
        versions = [-1 if tensor.is_inference() else tensor._version for tensor in tensors]
    return versions, [tensor.data_ptr() for tensor in tensors]


class RowModule(nn.Module):
    """In the place of a copy that was trained whole: of every row its own copy, or the base's module."""

    def __init__(self, path: str, copies: Mapping[str, nn.Module], layer: Any, batch: Batch) -> None:
        super().__init__()
        self.path, self.batch = path, batch
        self.names, self.copies = tuple(copies), nn.ModuleList(copies.values())
        self.lookup = batch.lookup(self.names)
        self._layer = (layer,)  # a reference, not a registration

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Every tensor given has the rows as its first dimension or goes to all; so have all that come back."""
        first = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        times = self.batch.times(first, self.path, 1)
        n = self.batch.n * times
        if torch.compiler.is_compiling():
            which = self.batch.places(self.lookup, times)
            changes = [self._run(place, args, kwargs) for place in range(len(self.names) + 1)]
            return tree_map(lambda *each: _selected(which, each), *changes)
        place: dict[str | None, int] = {name: i for i, name in enumerate(self.names)}
        places = [place.get(name, len(place)) for name in self.batch.names for _ in range(times)]
        rows = {at: torch.tensor([i for i, own in enumerate(places) if own == at]) for at in sorted(set(places))}
        parts = [
            self._run(at, *tree_map(lambda value: _taken(value, n, own), (args, kwargs)))  # noqa: B023
            for at, own in rows.items()
        ]
        back = torch.cat(list(rows.values())).argsort()
        return tree_map(lambda *each: torch.cat(each).index_select(0, back.to(each[0].device)), *parts)

    def _run(self, place: int, args: Any, kwargs: Any) -> Any:
        """By the copy in this place, or by the base's module behind them, in its own precision."""
        (layer,) = self._layer
        if place < len(self.copies):
            copy = self.copies[place]
            if copy.training != layer.training:
                copy.train(layer.training)
            return copy(*args, **kwargs)
        own, trained = (next(module.parameters()).dtype for module in (layer, self))
        args, kwargs = tree_map(lambda value: _as(value, trained, own), (args, kwargs))
        return tree_map(lambda value: _as(value, own, trained), layer.plain.forward(layer, *args, **kwargs))


def _as(value: Any, source: torch.dtype, to: torch.dtype) -> Any:
    return value.to(to) if isinstance(value, Tensor) and value.dtype == source else value


def _taken(value: Any, n: int, rows: Tensor) -> Any:
    has_rows = isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == n
    return value.index_select(0, rows.to(value.device)) if has_rows else value


def _selected(which: Tensor, each: Sequence[Tensor]) -> Tensor:
    return each[0] if len(each) == 1 else torch.stack(list(each))[which, torch.arange(len(which))]
