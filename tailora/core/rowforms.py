"""Products of a batch whose rows have factors of their own.

    joined    ((x A_all^T) * mask) B_all^T       the ranks of all adapters beside each other
    blocks    each block of rows by its own A and B, in one batched product

`plan` takes the cheaper one, as measured. Shapes: n rows, k updates of ranks up to R, m blocks of c rows each.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tailora.core.layer import LoRALayer
from tailora.core.layer_types import CONV1D, CONVOLUTION, EMBEDDING, LINEAR, Kind

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


def stacked(kind: Kind, each: Sequence[Terms], groups: int, *, with_none: bool) -> Stack:
    """`with_none` puts a zero update behind the others."""
    R = max(len(one.A) for one in each)
    As = [_padded(one.A, R, groups) for one in each]
    Bs = [F.pad(one.B, (0, R // groups - one.B.shape[1])) for one in each]
    if with_none:
        As, Bs = [*As, torch.zeros_like(As[0])], [*Bs, torch.zeros_like(Bs[0])]
    if kind is EMBEDDING:  # its A is looked up by column
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
BLOCKS: dict[Kind, Blocks] = {LINEAR: _linear, CONV1D: _linear, CONVOLUTION: _convolution}


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
    kind: Kind, slots: Sequence[int], ranks: Sequence[int], tokens: int, dtype: torch.dtype, device: torch.device
) -> Plan:
    """For rows with these slots, 0..k-1 or NONE, `tokens` each.

    Cost of blocks in units of one batched product's overhead (2 cores with AVX512-BF16, SmolLM2's shapes).
    """
    if kind is EMBEDDING:
        return Plan(with_none=True)
    n, k, without = len(slots), len(ranks), NONE in slots
    one, more = FEW[dtype.itemsize == 2]
    if BLOCKS[kind] is _linear and k <= (one if tokens == 1 else more):
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
