"""Another adapter for every row of a batch: what `LoRAModel.adapter_rows` attaches to the layers for its block.

Every adapted layer gets one `RowLayer`, or `RowModule` where copies are trained whole, which stand where an adapter
does. They share the `Batch`: the names, and how often `generate` repeats each row.

Without gradients the factors of a block are put together once and kept until one of them changes, as torch's version
counters and addresses tell. With 64 adapters that question costs as much as their products, so it is left out where
nothing is trained: in `generate` and in torch.inference_mode. Under torch.compile all is in the graph, and rows are an
input of it: other names for them compile nothing anew.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from tailora.core.adapter import Adapter
from tailora.core.layer import LoRALayer
from tailora.core.layer_types import CONV1D, CONVOLUTION, EMBEDDING, LINEAR, LayerType
from tailora.errors import AdapterError, RowsError

# ---- Products of a batch whose rows have factors of their own.
#
#     joined    ((x A_all^T) * mask) B_all^T       the ranks of all adapters beside each other
#     blocks    each block of rows by its own A and B, in one batched product
#
# `plan` takes the cheaper one, as measured. Shapes: n rows, k updates of ranks up to R, m blocks of c rows each.


FEW = {True: (8, 4), False: (2, 2)}  # in 16 bits, or not: up to so many adapters on rows of one token, of more: joined
NONE = -1  # the slot of a row without an update

# ---- the factors


@dataclass(frozen=True, eq=False)
class Terms:
    """One adapter's change of a layer: B A x + base * extra + shift. The scale, and the gain of DoRA, are in B."""

    A: Tensor  # (r, in); convolutions carry their kernel in A
    B: Tensor  # (out, r)
    extra: Tensor | None  # (out,)
    shift: Tensor | None  # (out,)


def terms(part: LoRALayer, layer: nn.Module, dtype: torch.dtype) -> Terms:
    A, B = part.update_factors()
    gain = part.gain(layer)
    around = (None if vector is None else vector.to(dtype) for vector in part.around(layer, gain))
    return Terms(A.to(dtype), (B if gain is None else B * gain[:, None]).to(dtype), *around)


@dataclass(frozen=True, eq=False)
class Stack:
    """k updates, or m blocks of them: A (k, R, in) and B (k, out, R), ranks padded with zeros to the largest."""

    A: Tensor
    B: Tensor

    def taken(self, which: Tensor) -> "Stack":
        """One update for each block: which (m,) -> A (m, ...), B (m, ...)."""
        return Stack(self.A.index_select(0, which), self.B.mT.index_select(0, which).mT)


def stacked(layer_type: LayerType, each: Sequence[Terms], groups: int, *, with_none: bool) -> Stack:
    """`with_none` puts a zero update behind the others."""
    R = max(len(one.A) for one in each)
    As = [_padded(one.A, R, groups) for one in each]
    Bs = [F.pad(one.B, (0, R // groups - one.B.shape[1])) for one in each]
    if with_none:
        As, Bs = [*As, torch.zeros_like(As[0])], [*Bs, torch.zeros_like(Bs[0])]
    if layer_type is EMBEDDING:  # its A is looked up by column
        return Stack(torch.stack([A.mT for A in As]).mT, torch.stack(Bs))
    return Stack(torch.stack(As), torch.stack([B.mT for B in Bs]).mT)


def _padded(A: Tensor, R: int, groups: int) -> Tensor:
    """(r, ...) -> (R, ...), zeros behind the rows of each group."""
    if len(A) == R:
        return A
    blocks = A.view(groups, -1, *A.shape[1:])  # (groups, r/groups, ...)
    missing = R // groups - blocks.shape[1]
    return torch.cat([blocks, blocks.new_zeros(groups, missing, *blocks.shape[2:])], 1).flatten(0, 1)


def joined(each: Sequence[Terms]) -> tuple[Tensor, Tensor]:
    """A of all (sum of r, in) and B of all (out, sum of r)."""
    return torch.cat([one.A for one in each]), torch.cat([one.B for one in each], 1)


def vectors_by_row(each: Sequence[Terms], name: Literal["extra", "shift"], which: Tensor) -> Tensor | None:
    """`extra` or `shift` of every row's adapter, which (n,), their number for none: (n, out); None if none has any."""
    found: list[Tensor | None] = [getattr(one, name) for one in each]
    if all(vector is None for vector in found):
        return None
    zero = torch.zeros_like(each[0].B[:, 0])
    return torch.stack([*(zero if vector is None else vector for vector in found), zero]).index_select(0, which)


# ---- what a kind does with m blocks: (layer, x (m, c, ...), stack of m) -> (m, c, ..., out)


def _linear(_: Any, x: Tensor, stack: Stack) -> Tensor:
    hidden = torch.bmm(x.flatten(1, -2), stack.A.mT)  # (m, tokens, R)
    return torch.bmm(hidden, stack.B.mT).view(*x.shape[:-1], -1)


@dataclass(frozen=True)
class Geometry:
    """What a convolution's update asks its layer for."""

    in_channels: int
    groups: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    padding_mode: str
    _reversed_padding_repeated_twice: list[int]


def _convolution(layer: Any, x: Tensor, stack: Stack) -> Tensor:
    """m convolutions are one of m times the channels and groups."""
    m = len(stack.A)
    wide = Geometry(
        m * layer.in_channels,
        m * layer.groups,
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.dilation,
        layer.padding_mode,
        layer._reversed_padding_repeated_twice,
    )
    y = CONVOLUTION.update(wide, x.transpose(0, 1).flatten(1, 2), stack.A.flatten(0, 1), stack.B.flatten(0, 1))
    return y.view(len(y), m, -1, *y.shape[2:]).transpose(0, 1)


Blocks = Callable[[Any, Tensor, Stack], Tensor]
BLOCKS: dict[LayerType, Blocks] = {LINEAR: _linear, CONV1D: _linear, CONVOLUTION: _convolution}


def looked_up(layer: Any, ids: Tensor, stack: Stack, which: Tensor) -> Tensor:
    """Row i of ids (n, ...) in the embedding update which[i]: (n, ..., out). No table is copied for a row."""
    k, _, size = stack.A.shape
    offsets = (which * size).view(-1, *[1] * (ids.ndim - 1))
    hidden = F.embedding(ids + offsets, stack.A.mT.reshape(k * size, -1))  # (n, ..., R)
    if layer.padding_idx is not None and hidden.requires_grad:  # the padding id has no gradient
        hidden = torch.where((ids == layer.padding_idx)[..., None], hidden.detach(), hidden)
    B = stack.B.index_select(0, which)
    update = torch.bmm(hidden.reshape(len(ids), -1, hidden.shape[-1]), B.mT).view(*ids.shape, -1)
    scale = getattr(layer, "embed_scale", None)
    return update if scale is None else update * scale


# ---- which rows meet which factors


@dataclass(frozen=True, eq=False)
class Plan:
    """mask (n, sum of r): the joined form. Otherwise blocks: which (m,), None where block i has update i;
    order (m c,) and back (n,) sort the rows into blocks and out of them, None where a block is a row.
    """

    with_none: bool
    mask: Tensor | None = None
    is_whole: bool = False  # every row has the one update there is: nothing to mask
    which: Tensor | None = None
    order: Tensor | None = None
    back: Tensor | None = None
    c: int = 1


def plan(
    layer_type: LayerType,
    slots: Sequence[int],
    ranks: Sequence[int],
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Plan:
    """For rows with these slots, 0..k-1 or NONE, `tokens` each.

    Cost of blocks in units of one batched product's overhead (2 cores with AVX512-BF16, SmolLM2's shapes).
    """
    if layer_type is EMBEDDING:
        return Plan(with_none=True)
    n, k, without = len(slots), len(ranks), NONE in slots
    one, more = FEW[dtype.itemsize == 2]
    if BLOCKS[layer_type] is _linear and k <= (one if tokens == 1 else more):
        return _joined_plan(slots, ranks, dtype, device)
    counts = {slot: slots.count(slot) for slot in set(slots)}
    sizes = [2**power for power in range(max(counts.values()).bit_length())]

    def cost(c: int) -> float:
        m = sum(-(-count // c) for count in counts.values())
        return m + m * c * tokens / 64 + (n * tokens / 8 if c > 1 else 0)

    c = min(sizes, key=cost)
    return _blocks_plan(slots, k, c, without, device)


def _joined_plan(slots: Sequence[int], ranks: Sequence[int], dtype: torch.dtype, device: torch.device) -> Plan:
    owner = torch.repeat_interleave(torch.tensor(ranks))  # (sum of r,): whose column
    mask = torch.tensor(slots)[:, None] == owner
    return Plan(NONE in slots, mask=mask.to(device, dtype), is_whole=bool(mask.all()))


def _blocks_plan(slots: Sequence[int], k: int, c: int, with_none: bool, device: torch.device) -> Plan:
    local = [k if slot == NONE else slot for slot in slots]  # the zero update comes last
    if c == 1:
        identity = local == list(range(k + with_none))
        return Plan(with_none, which=None if identity else torch.tensor(local, device=device))
    which: list[int] = []
    order: list[int] = []
    back = [0] * len(local)
    for slot in sorted(set(local)):
        rows = [row for row, own in enumerate(local) if own == slot]
        for start in range(0, len(rows), c):
            block = rows[start : start + c]
            for place, row in enumerate(block, start=len(order)):
                back[row] = place
            order += block + [block[0]] * (c - len(block))
            which.append(slot)
    identity = which == list(range(k + with_none))
    return Plan(
        with_none,
        which=None if identity else torch.tensor(which, device=device),
        order=torch.tensor(order, device=device),
        back=torch.tensor(back, device=device),
        c=c,
    )


def run_joined(_blocks: Blocks, _layer: Any, x: Tensor, factors: tuple[Tensor, Tensor], plan: Plan) -> Tensor:
    """x (n, ..., in) -> (n, ..., out)."""
    A, B = factors
    hidden = F.linear(x, A)  # (n, ..., sum of r)
    if plan.mask is not None and not plan.is_whole:
        hidden = hidden * plan.mask.view(len(x), *[1] * (x.ndim - 2), -1)
    return F.linear(hidden, B)


def run_blocks(blocks: Blocks, layer: Any, x: Tensor, stack: Stack, plan: Plan) -> Tensor:
    """`stack` has one update per block."""
    if plan.order is None or plan.back is None:
        return blocks(layer, x[:, None], stack).squeeze(1)
    sorted_rows = x.index_select(0, plan.order).view(-1, plan.c, *x.shape[1:])
    return blocks(layer, sorted_rows, stack).flatten(0, 1).index_select(0, plan.back)


def can_add(blocks: Blocks, y: Tensor, plan: Plan) -> bool:
    """Whether `add` knows this form."""
    return blocks is _linear and plan.order is None and y.is_contiguous()


def add(y: Tensor, x: Tensor, factors: Any, plan: Plan) -> Tensor:
    """y plus the update, in y's memory: without gradients, and where y is a result that nobody else holds."""
    if plan.mask is not None:
        hidden = F.linear(x, factors[0])
        if not plan.is_whole:
            hidden *= plan.mask.view(len(x), *[1] * (x.ndim - 2), -1)
        y.view(-1, y.shape[-1]).addmm_(hidden.view(-1, hidden.shape[-1]), factors[1].T)
    else:
        hidden = torch.bmm(x.reshape(len(x), -1, x.shape[-1]), factors.A.mT)
        y.view(len(x), -1, y.shape[-1]).baddbmm_(hidden, factors.B.mT)
    return y


# ---- The rows of a batch within `adapter_rows`: their names, how often `generate` repeats each, and what layers share.


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


# ----


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
    wholes = [path for path, parts in low_rank.items() if next(iter(parts.values())).layer_type.forward is not None]
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
        self.layer_type: LayerType = self.parts[0].layer_type
        self.kernel = self.parts[0].lora_A.ndim - 2
        self.least = 1 if self.layer_type is EMBEDDING else 2 + self.kernel  # dimensions of an input with rows
        self.blocks = (
            BLOCKS.get(self.layer_type) if self.parts[0].rows is None else None
        )  # not for parts of fused layers
        self.is_alone = True  # on its layer, whose output it may then write to
        self._kept: Ready | None = None

    def added(self, y: Tensor, base: Tensor, x: Tensor, layer: nn.Module) -> Tensor:
        """y, and what the rows' adapters change of the layer's output `base`."""
        times = self.batch.times(x, self.path, self.least)
        if torch.compiler.is_compiling():
            return y + self._in_graph(base, x, layer, times)
        if not self.used:
            return y
        if self.blocks is None and self.layer_type is not EMBEDDING:
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
        key = self.slots, ranks, times, tokens, dtype, x.device, self.layer_type.name
        if key not in self.batch.plans:
            slots = [slot for slot in self.slots for _ in range(times)]
            self.batch.plans[key] = plan(self.layer_type, slots, ranks, tokens, dtype, x.device)
        return self.batch.plans[key]

    def _made(self, chosen: Plan, x: Tensor, layer: nn.Module, dtype: torch.dtype, times: int) -> Ready:
        each = [terms(part, layer, dtype) for part in self.used]
        if chosen.mask is not None:
            factors: Any = joined(each)
        else:
            stack = stacked(self.layer_type, each, self.used[0].groups, with_none=chosen.with_none)
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
        if self.blocks is None and self.layer_type is not EMBEDDING:
            changes = [part.change(base, x, layer) for part in parts]
            masks = [(which == i).view(-1, *[1] * (base.ndim - 1)) for i in range(len(parts))]
            return torch.stack([torch.where(mask, each, 0) for mask, each in zip(masks, changes, strict=True)]).sum(0)
        each = [terms(part, layer, base.dtype) for part in parts]
        stack = stacked(self.layer_type, each, parts[0].groups, with_none=True)
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
