"""A different adapter for every row of a batch: what `LoRAModel.adapter_rows` attaches to the layers for its block.

    BatchRows         which adapter each batch row has; shared by all layers
    BatchRowsParts    replaces the parts of all adapters in a layer: adds one after another, each on its rows
    BatchRowsLayer    the same for low-rank updates, where it can be in one product
    BatchRowsModule   the same for modules that are trained in full

Most layer types multiply the rows by their factors in one batched product (`LayerType.batch_update`), in blocks of
rows with the same adapter; the others take one adapter after another. Without gradients the factors of all blocks are
put together once and cached until one of them changes, as torch's version counters and addresses tell. With 64
adapters this check costs as much as their products, so it is left out where nothing is trained: in `generate` and in
torch.inference_mode. Under torch.compile the names of the rows are an input of the graph, so other names
cause no recompilation.

Shapes: n batch rows, k adapters of ranks up to R followed by a zero update, m blocks of `size` rows.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from tailora.core.adapter import Adapter
from tailora.core.attach import evaluating
from tailora.core.layer import LoRALayer
from tailora.core.layer_types import EMBEDDING, layer_type_of
from tailora.errors import AdapterError, RowsError

# ---- Which adapter each batch row has


@dataclass(eq=False)
class BatchRows:
    """The adapters of the batch rows within one `adapter_rows`, and what its layers share.

    names: one for every row, None for no adapter.    adapters: all that are loaded.
    repeats: how often `generate` repeats every row while it runs, for beams or several sequences.
    version: changes with `set_scale`, `to` and the like, and with each run of `generate`.
    """

    names: tuple[str | None, ...]
    adapters: tuple[str, ...]
    device: torch.device
    repeats: int = 1
    generating: bool = False
    version: int = 0
    n: int = field(init=False)
    ids: Tensor = field(init=False)  # (n,) numbers of the rows' adapters, len(adapters) for None
    blocks: dict[Any, "Blocks"] = field(default_factory=dict)  # shared by layers with the same adapters
    tensors: dict[Any, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.n = len(self.names)  # a number for the compiler, which would guard the names
        self.ids = torch.tensor(self.positions(self.adapters), device=self.device)

    def positions(self, names: Sequence[str]) -> list[int]:
        """Returns the position of each row's adapter among `names`, len(names) for all others."""
        position: dict[str | None, int] = {name: i for i, name in enumerate(names)}
        return [position.get(name, len(names)) for name in self.names]

    def lookup(self, names: Sequence[str]) -> Tensor:
        """Returns number of an adapter -> its position among `names`, len(names) for others: (loaded + 1,)."""
        position = {name: i for i, name in enumerate(names)}
        return self.tensor([*(position.get(name, len(names)) for name in self.adapters), len(names)], self.device)

    def adapter_positions(self, lookup: Tensor, repeats: int) -> Tensor:
        """Returns the positions as a tensor that depends on the rows, for the compiler: (n repeats,)."""
        positions = lookup[self.ids]
        return positions if repeats == 1 else positions.repeat_interleave(repeats)

    def tensor(self, numbers: Sequence[float], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
        """Returns the numbers as a tensor, made once for all layers: a copy to a device is a wait of the host."""
        key = tuple(numbers), device, dtype
        if key not in self.tensors:
            with torch.inference_mode(False):  # a later forward may need a gradient
                self.tensors[key] = torch.tensor(numbers, device=device, dtype=dtype)
        return self.tensors[key]

    def repeats_in(self, x: Tensor, path: str, min_ndim: int) -> int:
        """Returns how many successive rows of x belong to each name. Raises RowsError for a wrong number of rows."""
        if x.ndim >= min_ndim and x.shape[0] == self.n:
            return 1
        if x.ndim >= min_ndim and x.shape[0] == self.n * self.repeats:
            return self.repeats
        repeated = f", or {self.n * self.repeats} repeated by generate" if self.repeats > 1 else ""
        packed = "; packed examples are one row: pass them separately, padded" if self.n > 1 and x.shape[0] == 1 else ""
        raise RowsError(
            f"adapter_rows names {self.n} rows{repeated}; {path or 'the model'} got {tuple(x.shape)}, whose first "
            f"dimension must be the rows of the batch{packed}"
        )

    @contextmanager
    def generation(self, repeats: int) -> Iterator[None]:
        """Within the block every name stands for `repeats` rows, and parameters must not change."""
        self.version += 1
        self.repeats, self.generating = repeats, True
        try:
            yield
        finally:
            self.repeats, self.generating = 1, False


def check_row_names(names: Any, adapters: Sequence[str]) -> tuple[str | None, ...]:
    """Returns the names. Raises AdapterError if they are not a list, and for all that are not among `adapters`."""
    if isinstance(names, str) or not isinstance(names, Sequence) or not names:
        raise AdapterError(f"adapter_rows takes a list with a name, or None, for every row of the batch; got {names!r}")
    wrong = dict.fromkeys(repr(name) for name in names if name is not None and name not in adapters)
    if wrong:
        raise AdapterError(f"no adapter is called {', '.join(wrong)}; there are: {', '.join(adapters) or 'none'}")
    return tuple(names)


def check_splits_by_row(low_rank: Mapping[str, LoRALayer]) -> None:
    """Raises RowsError for an adapter of layers that cannot compute every batch row with another one."""
    if refused := [
        path for path, layer in low_rank.items() if layer.layer_type.replaces_forward or "experts" in path.split(".")
    ]:
        raise RowsError(
            "nn.MultiheadAttention adds updates to its weights, which all rows share, and experts get the tokens of "
            f"all rows mixed: no adapter by row on {', '.join(refused)}"
        )


def repeats_of_generate(base: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Returns how often `base.generate(*args, **kwargs)` repeats every row, for beams or several sequences."""
    argument = args[1] if len(args) > 1 else kwargs.get("generation_config")
    config = argument or getattr(base, "generation_config", None)
    names = ("num_beams", "num_return_sequences")
    return max(kwargs.get(name) or getattr(config, name, None) or 1 for name in names)


def batch_row_parts(
    batch: BatchRows, adapters: Mapping[str, Adapter], layer_paths: Mapping[str, str], layers: Mapping[str, nn.Module]
) -> dict[str, tuple[Any, ...]]:
    """Returns what to attach to every layer while the batch rows have these adapters, by path.

    layer_paths: path of a part of an adapter -> path of its layer. Raises RowsError for layers that do not see the
    batch rows.
    """
    low_rank: dict[str, dict[str, LoRALayer]] = {}  # path -> name of the adapter -> its part
    saved: dict[str, dict[str, nn.Module]] = {}
    extras: dict[str, dict[str, nn.Module]] = {}
    for name, adapter in adapters.items():
        for path, layer in adapter.low_rank.items():
            low_rank.setdefault(path, {})[name] = layer
        for path, module in adapter.saved.items():
            saved.setdefault(path, {})[name] = module
        for path, part in adapter.extras.items():
            extras.setdefault(path, {})[name] = part
    for adapter in adapters.values():
        check_splits_by_row(adapter.low_rank)
    result: dict[str, tuple[Any, ...]] = {
        path: (BatchRowsModule(path, copies, layers[path], batch),) for path, copies in saved.items()
    }
    for path, parts in low_rank.items():
        result[layer_paths[path]] = (*result.get(layer_paths[path], ()), BatchRowsLayer(path, parts, batch))
    for path, extra_parts in extras.items():
        min_ndim = 1 if layer_type_of(layers[path]) is EMBEDDING else 2
        result[path] = (*result.get(path, ()), BatchRowsParts(path, extra_parts, batch, min_ndim))
    for parts_of_layer in result.values():
        if len(parts_of_layer) == 1 and isinstance(parts_of_layer[0], BatchRowsLayer):
            parts_of_layer[0].is_alone = True
    return result


# ---- The factors of all batch rows


@dataclass(frozen=True, eq=False)
class LayerTerms:
    """What one adapter changes in a layer: B A x + rescaling * output + shift. The scale and DoRA's gain are in B."""

    A: Tensor  # (r, in); convolutions carry their kernel in A
    B: Tensor  # (out, r)
    rescaling: Tensor | None  # (out,)
    shift: Tensor | None  # (out,)


def layer_terms(part: LoRALayer, layer: nn.Module, dtype: torch.dtype) -> LayerTerms:
    gain = part.gain(layer)
    A, B = part.update_factors(gain)
    rescaling, shift = (None if term is None else term.to(dtype) for term in part.output_terms(layer, gain))
    return LayerTerms(A.to(dtype), B.to(dtype), rescaling, shift)


def stacked_factors(terms: Sequence[LayerTerms], groups: int) -> tuple[Tensor, Tensor]:
    """Returns A (k + 1, R, in) and B (k + 1, out, R): ranks are padded with zeros, and the last update is zero."""
    R = max(len(term.A) for term in terms)
    As = [_pad_ranks(term.A, R, groups) for term in terms]
    Bs = [F.pad(term.B, (0, R // groups - term.B.shape[1])) for term in terms]
    As, Bs = [*As, torch.zeros_like(As[0])], [*Bs, torch.zeros_like(Bs[0])]
    return torch.stack(As), torch.stack([B.mT for B in Bs]).mT  # laid out by rank, as it is read


def _pad_ranks(A: Tensor, R: int, groups: int) -> Tensor:
    """(r, ...) -> (R, ...), with zeros after the ranks of each group."""
    if len(A) == R:
        return A
    blocks = A.view(groups, -1, *A.shape[1:])  # (groups, r/groups, ...)
    missing = R // groups - blocks.shape[1]
    return torch.cat([blocks, blocks.new_zeros(groups, missing, *blocks.shape[2:])], 1).flatten(0, 1)


def stacked_vectors(vectors: Sequence[Tensor | None], which: Tensor) -> Tensor | None:
    """Returns the vector of every row's adapter, which (n,) of k + 1: (n, out); None if no adapter has one."""
    present = [vector for vector in vectors if vector is not None]
    if not present:
        return None
    zero = torch.zeros_like(present[0])
    return torch.stack([*(zero if vector is None else vector for vector in vectors), zero]).index_select(0, which)


@dataclass(frozen=True, eq=False)
class Blocks:
    """Blocks of `size` batch rows that have the same adapter, so that one product serves them all.

    which: (m,) position of each block's adapter.    rows: (n,) position of each batch row's adapter.
    order: (m size,) batch rows, block after block; a block that is not full repeats its first row.
    back: (n,) position of each batch row in `order`. Both are None where the batch rows are in this order already.
    """

    which: Tensor
    rows: Tensor
    order: Tensor | None = None
    back: Tensor | None = None
    size: int = 1


def make_blocks(positions: Sequence[int], size: int, device: torch.device) -> Blocks:
    """positions: of each batch row's adapter."""
    which, order = _in_blocks(positions, size)
    with torch.inference_mode(False):  # a later forward may need a gradient
        index = [torch.tensor(values, device=device) for values in (which, positions)]
        if order == [*range(len(positions))]:
            return Blocks(index[0], index[1], size=size)
        place = {row: i for i, row in reversed([*enumerate(order)])}
        index += [torch.tensor(values, device=device) for values in (order, [place[row] for row in sorted(place)])]
    return Blocks(index[0], index[1], index[2], index[3], size)


def _in_blocks(positions: Sequence[int], size: int) -> tuple[list[int], list[int]]:
    """Returns `which` and `order` of Blocks. Adapters come in the order of their first row."""
    if size == 1:
        return [*positions], [*range(len(positions))]
    which: list[int] = []
    order: list[int] = []
    for position in dict.fromkeys(positions):
        rows = [row for row, row_position in enumerate(positions) if row_position == position]
        for start in range(0, len(rows), size):
            block = rows[start : start + size]
            order += block + [block[0]] * (size - len(block))
            which.append(position)
    return which, order


class BlockCosts(NamedTuple):
    """What a batched product costs, in any unit: each block, each token multiplied, and rows put in order and back."""

    block: float
    token: float
    order: float
    copied_token: float


BLOCK_COSTS = {  # by type of device
    # In units of one product's overhead: 2 cores with AVX512-BF16, SmolLM2's shapes. 64 rows of one token with 8
    # adapters take a third of the time in blocks of 8.
    "cpu": BlockCosts(block=1, token=1 / 64, order=0, copied_token=1 / 8),
}
# Reckoned for a card, in units of one kernel's launch (4 us; 3 TB/s, r = 16, 4096 -> 4096): all blocks are one kernel
# and each reads its factors; putting the rows in order and back is two kernels.
DEVICE_COSTS = BlockCosts(block=1 / 50, token=0, order=2, copied_token=1 / 300)


def block_size(positions: Sequence[int], tokens: int, costs: BlockCosts) -> int:
    """Returns the cheapest size of a block, if each batch row has this adapter and this many tokens."""
    most = max(Counter(positions).values())

    def cost(size: int) -> float:
        which, order = _in_blocks(positions, size)
        in_order = order == [*range(len(positions))]
        moved = 0 if in_order else costs.order + costs.copied_token * len(positions) * tokens
        return len(which) * (costs.block + costs.token * size * tokens) + moved

    sizes: list[int] = [*(2**power for power in range(most.bit_length())), most]
    return min(sizes, key=cost)


# ---- Layers with an adapter for every batch row


@dataclass(eq=False)
class CachedFactors:
    """The factors of a call, and the tensors that they were made of, which are kept so that no address is reused."""

    blocks: Blocks
    shape: torch.Size  # of the input
    A: Tensor  # (m, R, in)
    B: Tensor  # (m, out, R)
    rescaling: Tensor | None  # (n, out): the layer's output is multiplied by it, and added
    shift: Tensor | None  # (n, out)
    state: Any = None
    sources: Sequence[Tensor] = ()
    version: int = 0  # of the batch, when the state was compared last


class BatchRowsParts:
    """Replaces the parts of all adapters in a layer: adds one after another, each on its rows.

    This works for every part: updates of any layer type, trained biases, token rows and heads.
    """

    def __init__(self, path: str, parts: Mapping[str, Any], batch: BatchRows, min_ndim: int) -> None:
        self.path, self.batch, self.parts = path, batch, tuple(parts.values())
        used_names = [name for name in parts if name in batch.names]
        self.used = tuple(parts[name] for name in used_names)
        self.positions = batch.positions(used_names)
        self.lookup, self.lookup_used = batch.lookup(tuple(parts)), batch.lookup(used_names)
        self.min_ndim = min_ndim  # of an input with batch rows

    def add_to(self, y: Tensor, output: Tensor, x: Tensor, layer: nn.Module) -> Tensor:
        """Returns y + what the rows' adapters change of the layer's `output`, as `LoRALayer.add_to`."""
        repeats = self.batch.repeats_in(x, self.path, self.min_ndim)
        if torch.compiler.is_compiling():
            return self._add_in_graph(y, output, x, layer, repeats)
        return self._add_in_turn(y, output, x, layer, repeats) if self.used else y

    def _add_in_turn(self, y: Tensor, output: Tensor, x: Tensor, layer: nn.Module, repeats: int) -> Tensor:
        positions = self._repeated_positions(repeats)
        change = torch.zeros_like(output)
        for position, part in enumerate(self.used):
            if part.training != layer.training:
                part.train(layer.training)
            rows = self.batch.tensor(_rows_at(positions, position), x.device)
            outputs = output[rows]
            change = change.index_add(0, rows, part.add_to(torch.zeros_like(outputs), outputs, x[rows], layer))
        return y + change

    def _add_in_graph(self, y: Tensor, output: Tensor, x: Tensor, layer: nn.Module, repeats: int) -> Tensor:
        """Runs the same operations and shapes for any row names; with gradients, for any order of the same names."""
        lookup, parts = (self.lookup_used, self.used) if torch.is_grad_enabled() else (self.lookup, self.parts)
        if not parts:
            return y
        which = self.batch.adapter_positions(lookup, repeats).to(x.device)
        return y + self._change_in_graph(parts, which, output, x, layer)

    def _change_in_graph(
        self, parts: Sequence[Any], which: Tensor, output: Tensor, x: Tensor, layer: nn.Module
    ) -> Tensor:
        """Returns what the parts change. which: (n,) position of each row's part, len(parts) for none."""
        zero = torch.zeros_like(output)
        changes = [part.add_to(zero, output, x, layer) for part in parts]
        shape = -1, *[1] * (output.ndim - 1)
        return torch.stack([torch.where((which == i).view(shape), change, 0) for i, change in enumerate(changes)]).sum(
            0
        )

    def _repeated_positions(self, repeats: int) -> list[int]:
        return [position for position in self.positions for _ in range(repeats)]


class BatchRowsLayer(BatchRowsParts):
    """Replaces the low-rank updates of a layer: all in one product where the layer type has one."""

    used: tuple[LoRALayer, ...]
    parts: tuple[LoRALayer, ...]

    def __init__(self, path: str, parts: Mapping[str, LoRALayer], batch: BatchRows) -> None:
        first = next(iter(parts.values()))
        self.layer_type, self.output_slice = first.layer_type, first.output_slice
        self.kernel_ndim = first.lora_A.ndim - 2
        super().__init__(path, parts, batch, 1 if self.layer_type is EMBEDDING else 2 + self.kernel_ndim)
        one_shape = len({part.lora_A.shape[1:] for part in self.parts}) == 1  # not an A that reads all groups
        self.is_batched = self.layer_type.has_batch_update and one_shape
        self.is_alone = False  # True if no other part of the layer reads its output
        self._cache: CachedFactors | None = None

    def add_to(self, y: Tensor, output: Tensor, x: Tensor, layer: nn.Module) -> Tensor:
        if torch.compiler.is_compiling() or not self.is_batched or not self.used:
            return super().add_to(y, output, x, layer)
        repeats = self.batch.repeats_in(x, self.path, self.min_ndim)
        factors = self._factors(x, layer, output.dtype, repeats)
        x = self._dropout(x.to(output.dtype), layer, repeats)
        blocks = factors.blocks
        if self._is_in_place(y, blocks):
            return self._add_in_place(y, x, factors)
        if blocks.order is not None:
            x = x.index_select(0, blocks.order)
        in_blocks = x if blocks.size == 1 else x.view(-1, blocks.size, *x.shape[1:])
        update = self.layer_type.batch_update(layer, in_blocks, factors.A, factors.B)
        update = update if blocks.size == 1 else update.flatten(0, 1)
        if blocks.back is not None:
            update = update.index_select(0, blocks.back)
        return y + self._change(update, output, factors.rescaling, factors.shift)

    def _is_in_place(self, y: Tensor, blocks: Blocks) -> bool:
        """True if y, the layer's own output, can be changed: in a long prompt a sum takes as long as the products."""
        is_product = self.kernel_ndim == 0 and self.output_slice is None and blocks.order is None
        return self.is_alone and is_product and not torch.is_grad_enabled() and y.is_contiguous()

    def _add_in_place(self, y: Tensor, x: Tensor, factors: "CachedFactors") -> Tensor:
        if factors.rescaling is not None:
            y.addcmul_(y, self._over_tokens(factors.rescaling, y))
        if factors.shift is not None:
            y.add_(self._over_tokens(factors.shift, y))
        hidden = torch.bmm(x.reshape(len(factors.A), -1, x.shape[-1]), factors.A.mT)  # (m, size tokens, r)
        y.view(len(factors.A), -1, y.shape[-1]).baddbmm_(hidden, factors.B.mT)
        return y

    def _factors(self, x: Tensor, layer: nn.Module, dtype: torch.dtype, repeats: int) -> CachedFactors:
        """Returns the factors; cached as long as gradients are off and nothing that they are made of changes."""
        cache = self._cache
        blocks = cache.blocks if cache is not None and cache.shape == x.shape else self._blocks(x, repeats)
        if torch.is_grad_enabled():
            self._cache = None
            return self._make_factors(blocks, x, layer, dtype)
        is_constant = self.batch.generating or torch.is_inference_mode_enabled()
        if cache is not None and cache.blocks is blocks and is_constant and cache.version == self.batch.version:
            return cache
        needs_layer = any(part.lora_magnitude_vector is not None or part.bias is not None for part in self.used)
        sources = _tensors((*self.used, layer) if needs_layer else self.used)
        state = dtype, _state(sources), [part.strength for part in self.used]
        if cache is None or cache.blocks is not blocks or cache.state != state:
            cache = self._make_factors(blocks, x, layer, dtype)
            cache.state, cache.sources = state, [tensor.detach() for tensor in sources]
        cache.version, self._cache = self.batch.version, cache
        return cache

    def _blocks(self, x: Tensor, repeats: int) -> Blocks:
        tokens = x[0].numel() // self.used[0].in_features or 1
        is_matrix = self.kernel_ndim == 0
        key = tuple(self.positions), repeats, tokens, x.device, is_matrix
        if key not in self.batch.blocks:
            positions = self._repeated_positions(repeats)
            costs = BLOCK_COSTS.get(x.device.type, DEVICE_COSTS)
            size = block_size(positions, tokens, costs) if is_matrix else 1
            self.batch.blocks[key] = make_blocks(positions, size, x.device)
        return self.batch.blocks[key]

    def _make_factors(self, blocks: Blocks, x: Tensor, layer: nn.Module, dtype: torch.dtype) -> CachedFactors:
        terms = [layer_terms(part, layer, dtype) for part in self.used]
        A, B = stacked_factors(terms, self.used[0].groups)
        A, B = A.index_select(0, blocks.which), B.mT.index_select(0, blocks.which).mT
        rescaling = stacked_vectors([term.rescaling for term in terms], blocks.rows)
        shift = stacked_vectors([term.shift for term in terms], blocks.rows)
        return CachedFactors(blocks, x.shape, A, B, rescaling, shift)

    def _change(self, update: Tensor, output: Tensor, rescaling: Tensor | None, shift: Tensor | None) -> Tensor:
        """Returns update + output * rescaling + shift; the last two (n, out)."""
        change = update if self.output_slice is None else self.output_slice.spread(update)
        if rescaling is not None:
            change = torch.addcmul(change, output, self._over_tokens(rescaling, output))
        return change if shift is None else change + self._over_tokens(shift, output)

    def _over_tokens(self, vectors: Tensor, y: Tensor) -> Tensor:
        """(n, out) -> (n, 1, ..., out, 1, ...), for y (n, ..., out, *kernel)."""
        n, out = vectors.shape
        return vectors.view(n, *[1] * (y.ndim - 2 - self.kernel_ndim), out, *[1] * self.kernel_ndim)

    def _dropout(self, x: Tensor, layer: nn.Module, repeats: int) -> Tensor:
        """Every row is dropped out by its own adapter's probability."""
        rates = [part.lora_dropout for part in self.used] if layer.training else []
        if not any(rates):
            return x
        if len(set(rates)) == 1:
            return F.dropout(x, rates[0])
        by_position = [*rates, 0.0]
        by_row = [by_position[position] for position in self._repeated_positions(repeats)]
        return _dropout_by_row(x, self.batch.tensor(by_row, x.device, torch.float32))

    def _change_in_graph(
        self, parts: Sequence[LoRALayer], which: Tensor, output: Tensor, x: Tensor, layer: nn.Module
    ) -> Tensor:
        if not self.is_batched:
            return super()._change_in_graph(parts, which, output, x, layer)
        terms = [layer_terms(part, layer, output.dtype) for part in parts]
        A, B = stacked_factors(terms, parts[0].groups)
        x, rates = x.to(output.dtype), [part.lora_dropout for part in parts]
        if layer.training and any(rates):
            x = _dropout_by_row(x, torch.tensor([*rates, 0.0], device=x.device)[which])
        update = self.layer_type.batch_update(layer, x, A.index_select(0, which), B.mT.index_select(0, which).mT)
        rescaling = stacked_vectors([term.rescaling for term in terms], which)
        return self._change(update, output, rescaling, stacked_vectors([term.shift for term in terms], which))


def _rows_at(positions: Sequence[int], position: int) -> list[int]:
    return [row for row, row_position in enumerate(positions) if row_position == position]


def _dropout_by_row(x: Tensor, rates: Tensor) -> Tensor:
    """Dropout with another probability for every row, rates (n,)."""
    rates = rates.view(-1, *[1] * (x.ndim - 1))
    return x * ((torch.rand_like(x, dtype=torch.float32) >= rates) / (1 - rates)).to(x.dtype)


def _tensors(parts: Sequence[nn.Module]) -> list[Tensor]:
    tables = [table for part in parts for table in (part._parameters, part._buffers)]
    return [tensor for table in tables for tensor in table.values() if tensor is not None]


def _state(tensors: Sequence[Tensor]) -> Any:
    """Returns a value that differs after one of them has changed, as far as torch tells. Called often, so short."""
    try:
        versions = [tensor._version for tensor in tensors]
    except RuntimeError:  # tensors of inference mode are not counted
        versions = [-1 if tensor.is_inference() else tensor._version for tensor in tensors]
    return versions, [tensor.data_ptr() for tensor in tensors]


# ---- Modules that are trained in full, with a copy for every batch row


class BatchRowsModule(nn.Module):
    """Replaces the trained copy of a module: every batch row has its own copy, or the base's module."""

    def __init__(self, path: str, copies: Mapping[str, nn.Module], layer: Any, batch: BatchRows) -> None:
        super().__init__()
        self.path, self.batch, self.copies = path, batch, nn.ModuleList(copies.values())
        self.positions, self.lookup = batch.positions(tuple(copies)), batch.lookup(tuple(copies))
        self._layer = (layer,)  # a reference, not a registration
        self._dims: dict[tuple[int, ...], list[int]] = {}  # what `_batch_dims` found, by the inputs' dimensions

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """A tensor whose first dimension is the batch rows is split by row; other arguments go to every copy unchanged.

        Each tensor of the output has the batch rows in the dimension that `_batch_dims` finds. Raises RowsError for
        a module that takes or returns them in another way.
        """
        first = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        self._check_class(args, kwargs)
        repeats = self.batch.repeats_in(first, self.path, 1)
        n = self.batch.n * repeats
        if torch.compiler.is_compiling():
            which = self.batch.adapter_positions(self.lookup, repeats)
            outputs = [self._run(position, args, kwargs) for position in range(len(self.copies) + 1)]
            index = which, torch.arange(n)
            return self._joined(
                lambda dim, tensors: torch.stack(tensors).movedim(dim + 1, 1)[index].movedim(0, dim),
                self._batch_dims(args, kwargs, n) if n > 1 else None,
                outputs,
            )
        used = sorted(set(self.positions))
        if len(used) == 1:
            return self._run(used[0], args, kwargs)
        dims = self._batch_dims(args, kwargs, n)
        positions = [position for position in self.positions for _ in range(repeats)]
        rows = [_rows_at(positions, position) for position in used]
        in_turn = [row for own_rows in rows for row in own_rows]
        back = sorted(range(n), key=in_turn.__getitem__)
        tensor = self.batch.tensor
        outputs = [
            self._run(position, *tree_map(lambda value: _rows_of(value, n, own_rows, tensor), (args, kwargs)))  # noqa: B023
            for position, own_rows in zip(used, rows, strict=True)
        ]
        return self._joined(
            lambda dim, tensors: torch.cat(tensors, dim).index_select(dim, tensor(back, tensors[0].device)),
            dims,
            outputs,
        )

    def _check_class(self, args: Any, kwargs: Any) -> None:
        (layer,) = self._layer
        if getattr(layer, "batch_first", True) is False:
            raise RowsError(f"{self.path} has batch_first=False, and adapter_rows needs the rows first")
        if isinstance(layer, nn.RNNBase) and len(args) + len(kwargs) > 1:
            raise RowsError(f"{self.path} is given a hidden state, whose rows are not first; no adapter by row")

    def _batch_dims(self, args: Any, kwargs: Any, n: int) -> list[int]:
        """Returns the dimension of each tensor of the output that holds the batch rows.

        It is the one that grows from 1 to 2 when a copy runs on one row and on two. Raises RowsError without one.
        """
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        key = tuple(leaf.ndim for leaf in leaves)
        if key in self._dims and not torch.compiler.is_compiling():
            return self._dims[key]
        copy = self.copies[0]
        shapes = []
        with torch.no_grad(), nullcontext() if torch.compiler.is_compiling() else evaluating(copy):
            for count in (1, 2):
                own_args, own_kwargs = tree_map(lambda value: _first_rows(value, n, count), (args, kwargs))  # noqa: B023
                output = tree_leaves(copy(*own_args, **own_kwargs))
                if other := [type(leaf).__name__ for leaf in output if not isinstance(leaf, Tensor | None)]:
                    raise RowsError(f"{self.path} returns a {other[0]}, which is not split by row")
                shapes.append([tuple(leaf.shape) for leaf in output if leaf is not None])
        dims = []
        for shape, shape_of_2 in zip(*shapes, strict=True):
            sizes = list(zip(shape, shape_of_2, strict=False))
            grown = [dim for dim, pair in enumerate(sizes) if pair != (pair[0], pair[0])]
            if len(shape) != len(shape_of_2) or [sizes[dim] for dim in grown] != [(1, 2)]:
                raise RowsError(
                    f"{self.path} returns {shape} for one row and {shape_of_2} for two, not a dimension of rows"
                )
            dims.append(grown[0])
        if not torch.compiler.is_compiling():
            self._dims[key] = dims
        return dims

    @staticmethod
    def _joined(join: Callable[[int, list[Tensor]], Tensor], dims: list[int] | None, outputs: list[Any]) -> Any:
        """Returns the outputs of the copies as one. dims: of the tensors in an output; None for the first of each."""
        leaves = [tree_leaves(output) for output in outputs]
        order = iter(dims) if dims is not None else repeat(0)
        joined = [
            None if tensors[0] is None else join(next(order), list(tensors)) for tensors in zip(*leaves, strict=True)
        ]
        return tree_unflatten(joined, tree_flatten(outputs[0])[1])

    def _run(self, position: int, args: Any, kwargs: Any) -> Any:
        """Calls the copy at this position, or after the last copy the base's module, in the base's own precision."""
        (layer,) = self._layer
        if position < len(self.copies):
            copy = self.copies[position]
            if copy.training != layer.training:
                copy.train(layer.training)
            return copy(*args, **kwargs)
        return call_base(layer, next(self.parameters()).dtype, args, kwargs)


def call_base(layer: Any, dtype: torch.dtype, args: Any, kwargs: Any) -> Any:
    """Calls the base's module beside trained copies of it: takes and returns their dtype, and computes in its own."""
    base_dtype = next(layer.parameters()).dtype
    args, kwargs = tree_map(lambda value: _cast(value, dtype, base_dtype), (args, kwargs))
    return tree_map(lambda value: _cast(value, base_dtype, dtype), layer.plain.forward(layer, *args, **kwargs))


def _cast(value: Any, source: torch.dtype, to: torch.dtype) -> Any:
    return value.to(to) if isinstance(value, Tensor) and value.dtype == source else value


def _has_rows(value: Any, n: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == n


def _rows_of(value: Any, n: int, rows: Sequence[int], tensor: Callable[[Sequence[int], torch.device], Tensor]) -> Any:
    return value.index_select(0, tensor(rows, value.device)) if _has_rows(value, n) else value


def _first_rows(value: Any, n: int, count: int) -> Any:
    return value[:count] if _has_rows(value, n) else value
