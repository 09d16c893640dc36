"""Mixed batches: each row of a padded batch, or each token of a packed batch, computes with its own adapter.

    MixedBatch      the adapter of each row. `LoRAModel.adapter_rows` creates one for a `with` block, for training and
                    `generate`; a server's engine creates one and sets its rows before each forward pass
    Rows, Blocks    the names of the rows, and how the rows of a layer are grouped for a batched product
    MixedPart       replaces the parts of all adapters at one path
    MixedModule     the same for fully trained modules
    mixed_parts     the parts to attach to each layer

Linear layers multiply all rows by their factors in one batched product (`MixedPart._product`), in blocks of rows with
the same adapter. All other parts are added one adapter at a time. Rows with a single token are sorted by adapter,
because reading the factors takes most of the time. On an accelerator, sorting pays off only for packed batches.

Where no parameter can change, in `generate` and in a server, a layer caches its factors. torch.compile leaves these
layers out of its graphs.

Shapes: n rows, k adapters of ranks up to R followed by a zero update, m blocks of `size` rows.
"""

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from tailora.core.adapter import Adapter
from tailora.core.attach import AdapterPart, call_plain
from tailora.core.extras import input_embedding
from tailora.core.layer import LoRALayer
from tailora.core.layer_types import CONV1D, EMBEDDING, LINEAR, layer_type_of
from tailora.errors import RowsError

Names = tuple[str | None, ...]


# ---- Which adapter each row has


@dataclass(frozen=True, eq=False)
class Blocks:
    """Blocks of `size` rows that have the same adapter.

    back: (n,) position of each row in `order`. Both are None if the rows are already in this order.
    """

    which: Tensor  # (m,) position of each block's adapter
    rows: Tensor  # (n,) position of each row's adapter
    size: int = 1
    order: Tensor | None = None  # (m size,) rows, block by block; a block that is not full repeats its first row
    back: Tensor | None = None


class Rows:
    """The adapter of each row, by name; None for no adapter."""

    def __init__(self, names: Names) -> None:
        self.names, self.n = names, len(names)
        self.kept: dict[Any, Any] = {}  # shared by all layers

    def positions(self, adapters: Sequence[str]) -> list[int]:
        """Returns the position of each row's adapter in `adapters`, len(adapters) for all others."""
        position: dict[str | None, int] = {name: i for i, name in enumerate(adapters)}
        return [position.get(name, len(adapters)) for name in self.names]

    def used(self, adapters: tuple[str, ...]) -> tuple[str, ...]:
        """Returns the adapters that at least one row uses."""
        if adapters not in self.kept:
            present = set(self.names)
            self.kept[adapters] = tuple(name for name in adapters if name in present)
        return cast(tuple[str, ...], self.kept[adapters])

    def blocks(self, adapters: tuple[str, ...], is_sorted: bool, device: torch.device) -> Blocks:
        """Returns the blocks for the factors of these adapters. is_sorted: whether rows may be reordered."""
        key = adapters, is_sorted, device
        if key not in self.kept:
            self.kept[key] = make_blocks(self.positions(adapters), is_sorted, device)
        return cast(Blocks, self.kept[key])

    def tensor(self, numbers: Sequence[float], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
        """Returns the numbers as a tensor, created once for all layers, because the host waits for each copy."""
        key = tuple(numbers), device, dtype
        if key not in self.kept:
            self.kept[key] = _tensor(numbers, device, dtype)
        return cast(Tensor, self.kept[key])


def _tensor(numbers: Sequence[float], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    with torch.inference_mode(False):  # a later forward pass may need a gradient
        return torch.tensor(numbers, device=device, dtype=dtype)


def make_blocks(positions: Sequence[int], is_sorted: bool, device: torch.device) -> Blocks:
    """Returns the blocks for rows whose adapters have these positions.

    In the given order, the block size is the largest that divides all runs of rows with the same adapter. After
    sorting, it is the mean number of rows per adapter: at most twice as many blocks as adapters, and at most twice as
    many rows.
    """
    size = math.gcd(*(len(list(run)) for _, run in groupby(positions)))
    mean = len(positions) // len(set(positions))
    if not is_sorted or size >= mean:
        return Blocks(_tensor(positions[::size], device), _tensor(positions, device), size)
    which: list[int] = []
    order: list[int] = []
    for position in dict.fromkeys(positions):
        rows = [row for row, row_position in enumerate(positions) if row_position == position]
        for start in range(0, len(rows), mean):
            block = rows[start : start + mean]
            order += block + [block[0]] * (mean - len(block))
            which.append(position)
    place = {row: i for i, row in reversed([*enumerate(order)])}
    back = [place[row] for row in range(len(positions))]
    which_rows = _tensor(which, device), _tensor(positions, device)
    return Blocks(*which_rows, mean, _tensor(order, device), _tensor(back, device))


class MixedBatch:
    """The adapter of each row in the next forward passes.

    Rows are the first dimension of a padded batch, or the tokens (1, tokens) of a packed batch, for inference.

    head: in a packed batch, the layer that gets one token of each sequence; None if all layers get all tokens.
    flat: of a padded batch, the layers that get all tokens in one dimension (`flat_layers`).
    dim: the dimension of the rows.
    is_constant: whether no parameter can change.
    terms: while constant, the terms of adapters that have been computed so far.
    stacks: while constant, the last stack of each layer, and the names of its adapters.
    """

    rows: Rows
    head_rows: Rows

    def __init__(
        self,
        names: Names = (),
        *,
        is_packed: bool = False,
        head: nn.Module | None = None,
        flat: Collection[nn.Module] = (),
    ) -> None:
        self.head, self.flat = head, flat
        self._padded_shape = 0, 0  # rows and tokens of the last embeddings
        self.dim = int(is_packed)
        self.rows = self.head_rows = Rows(names)
        self.is_constant = is_packed
        self.repeats = 1
        self.terms: dict[LoRALayer, Terms] = {}
        self.stacks: dict[MixedPart, tuple[tuple[str, ...], Terms]] = {}
        self._repeated = {1: self.rows}  # by how often `generate` repeats each row

    def set_rows(self, names: Sequence[str | None], head_names: Sequence[str | None]) -> None:
        """Sets the adapters of all tokens, and of the head's tokens, before a forward pass of a packed batch."""
        if tuple(names) != self.rows.names:
            self.rows = Rows(tuple(names))
        if tuple(head_names) != self.head_rows.names:
            self.head_rows = Rows(tuple(head_names))

    def lacks(self, names: tuple[str, ...]) -> bool:
        """True if no row of a padded batch uses these adapters, so that their layers need no rows."""
        return self.dim == 0 and not self.rows.used(names)

    def rows_in(self, x: Tensor, layer: nn.Module, path: str, min_ndim: int) -> Rows:
        """Returns the rows of x, an input of the layer: (rows, ...), or (rows * tokens, in) row after row.

        Raises RowsError for a wrong number of rows, and to the compiler.
        """
        if torch.compiler.is_compiling():
            raise RowsError("torch.compile cannot trace a different adapter for each row")
        if self.dim == 1:
            rows = self.head_rows if layer is self.head else self.rows
            if x.ndim < 2 or x.shape[:2] != (1, rows.n):
                raise RowsError(f"{path}: expected {rows.n} tokens packed into one row, got {tuple(x.shape)}")
            return rows
        n = self.rows.n
        if x.ndim >= min_ndim and x.shape[0] == n:
            return self.rows
        if x.ndim >= min_ndim and x.shape[0] == n * self.repeats:
            return self._repeated[self.repeats]
        repeated = f", or {n * self.repeats} repeated by generate" if self.repeats > 1 else ""
        rows, (given, tokens) = self._repeated[self.repeats], self._padded_shape
        is_flat = x.ndim == min_ndim == 2 and (n == 1 or layer in self.flat)
        if is_flat and given == rows.n and len(x) == given * tokens:
            return rows
        packed = "; packed examples count as one row, so use padding instead" if n > 1 and x.shape[0] == 1 else ""
        raise RowsError(
            f"{path or 'the model'}: expected {n} rows{repeated}, as in adapter_rows, in the first dimension, got "
            f"{tuple(x.shape)}{packed}"
        )

    @contextmanager
    def watching(self, base_model: nn.Module) -> Iterator[None]:
        """Within the block, the shape of the input is known from the embeddings, for `flat` layers."""

        def keep_shape(_embeddings: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.ndim == 3:
                self._padded_shape = output.shape[0], output.shape[1]

        _, embeddings = input_embedding(base_model) or ("", None)
        with nullcontext() if embeddings is None else embeddings.register_forward_hook(keep_shape):
            yield

    def parameters_changed(self) -> None:
        """Makes the layers recompute their cached factors."""
        self.terms.clear()
        self.stacks.clear()
        for rows in (self.rows, self.head_rows, *self._repeated.values()):
            rows.kept.clear()

    @contextmanager
    def generation(self, repeats: int) -> Iterator[None]:
        """Within the block, every name stands for `repeats` rows, and parameters must not change."""
        self.parameters_changed()
        names = tuple(name for name in self.rows.names for _ in range(repeats))
        self._repeated[repeats] = self.rows if repeats == 1 else Rows(names)
        self.repeats, self.is_constant = repeats, True
        try:
            yield
        finally:
            self.repeats, self.is_constant = 1, False


# Layers to which transformers gives (rows * tokens, width), row after row: what surrounds routed experts, and OPT's MLP
FLAT_PATHS = re.compile(r"(^|\.)(shared_experts?(_gate)?|(pre|post)_expert_proj|router|gate)(\.|$)")
FLAT_PARENTS = ("OPTDecoderLayer",)


def flat_layers(base_model: nn.Module, layers: Mapping[str, nn.Module]) -> set[nn.Module]:
    """Returns the layers whose input has no dimension for the rows of a batch."""

    def parent(path: str) -> str:
        return type(base_model.get_submodule(path.rpartition(".")[0])).__name__

    return {layer for path, layer in layers.items() if FLAT_PATHS.search(path) or parent(path) in FLAT_PARENTS}


def check_splits_by_row(low_rank: Mapping[str, LoRALayer]) -> None:
    """Raises RowsError if adapters have layers that cannot use a different adapter for each row."""
    if refused := [
        path for path, layer in low_rank.items() if layer.layer_type.replaces_forward or "experts" in path.split(".")
    ]:
        raise RowsError(
            "a different adapter per row is not supported on nn.MultiheadAttention and experts, which process all rows "
            f"together; exclude these layers: {', '.join(refused)}"
        )


def mixed_parts(
    batch: MixedBatch, adapters: Mapping[str, Adapter], layer_paths: Mapping[str, str], layers: Mapping[str, nn.Module]
) -> dict[str, tuple[AdapterPart | nn.Module, ...]]:
    """Returns what to attach to each layer, by path. layer_paths: path of a part -> of its layer. Raises RowsError."""
    low_rank: dict[str, dict[str, Any]] = {}  # path -> name of the adapter -> its part
    extras: dict[str, dict[str, Any]] = {}
    saved: dict[str, dict[str, nn.Module]] = {}
    for name, adapter in adapters.items():
        check_splits_by_row(adapter.low_rank)
        for path, layer in adapter.low_rank.items():
            low_rank.setdefault(path, {})[name] = layer
        for path, module in adapter.saved.items():
            saved.setdefault(path, {})[name] = module
        for path, part in adapter.extras.items():
            extras.setdefault(path, {})[name] = part
    alive = {part for parts in low_rank.values() for part in parts.values()}
    batch.terms = {part: terms for part, terms in batch.terms.items() if part in alive}
    batch.stacks.clear()
    mixed: dict[str, list[MixedPart]] = {}
    for path, parts in (*low_rank.items(), *extras.items()):
        layer_path = layer_paths[path]
        mixed.setdefault(layer_path, []).append(MixedPart(path, parts, batch, layers[layer_path]))
    for own in mixed.values():
        own[0].is_alone = len(own) == 1
    copies = {path: (MixedModule(path, modules, layers[path], batch),) for path, modules in saved.items()}
    return copies | {path: (*copies.get(path, ()), *own) for path, own in mixed.items()}


# ---- Layers with a different adapter for each row


@dataclass(frozen=True, eq=False)
class Terms:
    """What one adapter adds to a layer: B A x + rescaling * output + shift. B contains the scale and DoRA's gain.

    `stacked` terms of k adapters have one more dimension, (k + 1, ...): the last is a zero update, and lower ranks are
    padded with zeros.
    """

    A: Tensor  # (r, in)
    B: Tensor  # (r, out)
    rescaling: Tensor | None  # (out,); None for zero
    shift: Tensor | None  # (out,)


def layer_terms(part: LoRALayer, layer: nn.Module, dtype: torch.dtype) -> Terms:
    gain = part.gain(layer)
    A, B = part.update_factors(gain)
    rescaling, shift = (None if term is None else term.to(dtype) for term in part.output_terms(layer, gain))
    return Terms(A.to(dtype), B.mT.to(dtype), rescaling, shift)


def stacked(terms: Sequence[Terms]) -> Terms:
    A, B = _stacked_factors([term.A for term in terms]), _stacked_factors([term.B for term in terms])
    rescaling = _stacked_vectors([term.rescaling for term in terms])
    return Terms(A, B, rescaling, _stacked_vectors([term.shift for term in terms]))


@dataclass(frozen=True, eq=False)
class Factors:
    """The factors of a product."""

    blocks: Blocks
    A: Tensor  # (m, R, in)
    B: Tensor  # (m, R, out)
    rescaling: Tensor | None  # (n, out): the layer's output is multiplied by it, and added
    shift: Tensor | None  # (n, out)

    @classmethod
    def of(cls, terms: Terms, blocks: Blocks) -> "Factors":
        A, B = (factor.index_select(0, blocks.which) for factor in (terms.A, terms.B))
        rescaling, shift = (
            None if v is None else v.index_select(0, blocks.rows) for v in (terms.rescaling, terms.shift)
        )
        return cls(blocks, A, B, rescaling, shift)


def _stacked_factors(factors: Sequence[Tensor]) -> Tensor:
    R = max(map(len, factors))
    padded = [factor if len(factor) == R else F.pad(factor, (0, 0, 0, R - len(factor))) for factor in factors]
    return torch.stack([*padded, torch.zeros_like(padded[0])])


def _stacked_vectors(vectors: Sequence[Tensor | None]) -> Tensor | None:
    if (present := next((vector for vector in vectors if vector is not None), None)) is None:
        return None
    zero = torch.zeros_like(present)
    return torch.stack([*(zero if vector is None else vector for vector in vectors), zero])


class MixedPart(AdapterPart):
    """Replaces the parts at one path. is_alone: True if no other part reads the output, which may change in place."""

    def __init__(self, path: str, parts: Mapping[str, Any], batch: MixedBatch, layer: nn.Module) -> None:
        self.path, self.batch, self.parts, self.names = path, batch, dict(parts), tuple(parts)
        first = next(iter(parts.values()))
        is_update = isinstance(first, LoRALayer)
        self.is_product = is_update and first.layer_type in (LINEAR, CONV1D)
        self.output_slice = first.output_slice if is_update else None
        self.min_ndim = 1 if layer_type_of(layer) is EMBEDDING else first.lora_A.ndim if is_update else 2  # of an input
        self.is_alone = False
        self._kept: Factors | None = None

    def add_to(self, y: Tensor, output: Tensor, x: Tensor, layer: nn.Module) -> Tensor:
        """Returns y + the change of the layer's `output` by the rows' adapters, like `LoRALayer.add_to`."""
        if self.batch.lacks(self.names):
            return y
        rows = self.batch.rows_in(x, layer, self.path, self.min_ndim)
        if self.batch.dim == 0 and x.shape[0] != rows.n:
            y, output, x = (tensor.view(rows.n, -1, *tensor.shape[1:]) for tensor in (y, output, x))
            return self.add_to(y, output, x, layer).flatten(0, 1)
        used = rows.used(self.names)
        if not used:
            return y
        if not self.is_product:
            return self._in_turn(y, output, x, layer, rows)
        factors = self._factors(x, layer, output.dtype, rows)
        rates = [*(self.parts[name].lora_dropout for name in used), 0.0] if layer.training else []
        x = x.to(output.dtype)
        if any(rates):
            by_row = [rates[position] for position in rows.positions(used)]
            x = _dropout_by_row(x, rows.tensor(by_row, x.device, torch.float32))
        return self._product(y, output, x, factors)

    # ---- All rows in one product

    def _product(self, y: Tensor, output: Tensor, x: Tensor, factors: Factors) -> Tensor:
        """Changes y in place if it is the layer's own output: for long prompts, a sum takes as long as the products."""
        blocks, n, m = factors.blocks, len(factors.blocks.rows), len(factors.A)
        x = x.reshape(n, -1, x.shape[-1])  # (n, tokens, in)
        if blocks.order is not None:
            x = x.index_select(0, blocks.order)
        hidden = torch.bmm(x.reshape(m, -1, x.shape[-1]), factors.A.mT)  # (m, size tokens, R)
        shape, rows = y.shape, y.reshape(n, -1, y.shape[-1])  # (n, tokens, out)
        out = rows if self.is_alone and y.is_contiguous() and not torch.is_grad_enabled() else None
        if factors.rescaling is not None:
            rows = torch.addcmul(rows, output.reshape(rows.shape), factors.rescaling[:, None], out=out)
        if factors.shift is not None:
            rows = torch.add(rows, factors.shift[:, None], out=out)
        if blocks.back is None and self.output_slice is None:
            rows = rows.view(m, -1, shape[-1])  # by block
            out = None if out is None else rows
            return torch.baddbmm(rows, hidden, factors.B, out=out).view(shape)
        update = torch.bmm(hidden, factors.B).view(m * blocks.size, -1, factors.B.shape[-1])
        if blocks.back is not None:
            update = update.index_select(0, blocks.back)
        if self.output_slice is not None:
            update = self.output_slice.spread(update)
        return torch.add(rows, update, out=out).view(shape)

    def _factors(self, x: Tensor, layer: nn.Module, dtype: torch.dtype, rows: Rows) -> Factors:
        """Returns the factors, which are cached while no parameter can change."""
        used = rows.used(self.names)
        is_sorted = x.numel() == rows.n * x.shape[-1] and (self.batch.dim == 1 or x.device.type == "cpu")
        blocks = rows.blocks(used, is_sorted, x.device)
        if not self.batch.is_constant or torch.is_grad_enabled():
            return Factors.of(stacked([layer_terms(self.parts[name], layer, dtype) for name in used]), blocks)
        kept = self._kept
        if kept is None or kept.blocks is not blocks or kept.A.dtype != dtype:
            kept = self._kept = Factors.of(self._constant_stack(used, layer, dtype), blocks)
        return kept

    def _constant_stack(self, names: tuple[str, ...], layer: nn.Module, dtype: torch.dtype) -> Terms:
        """Computes the terms of each adapter once, and stacks them again when different adapters are used."""
        known, terms = self.batch.stacks.get(self), self.batch.terms
        if known is None or known[0] != names:
            for part in (self.parts[name] for name in names):
                if part not in terms:
                    terms[part] = layer_terms(part, layer, dtype)
            known = self.batch.stacks[self] = names, stacked([terms[self.parts[name]] for name in names])
        return known[1]

    # ---- One adapter after another: updates of any layer type, trained biases, token rows and heads

    def _in_turn(self, y: Tensor, output: Tensor, x: Tensor, layer: nn.Module, rows: Rows) -> Tensor:
        dim, change = self.batch.dim, torch.zeros_like(output)
        for name in rows.used(self.names):
            part = self.parts[name]
            if part.training != layer.training:
                part.train(layer.training)
            own = rows.tensor([row for row, own_name in enumerate(rows.names) if own_name == name], x.device)
            outputs = output.index_select(dim, own)
            added = part.add_to(torch.zeros_like(outputs), outputs, x.index_select(dim, own), layer)
            change = change.index_add(dim, own, added)
        return y + change


def _dropout_by_row(x: Tensor, rates: Tensor) -> Tensor:
    """Applies dropout with a different probability for each row: rates (n,)."""
    rates = rates.view(-1, *[1] * (x.ndim - 1))
    return x * ((torch.rand_like(x, dtype=torch.float32) >= rates) / (1 - rates)).to(x.dtype)


# ---- Modules that are trained in full, with a copy for each row


class MixedModule(nn.Module):
    """Replaces the trained copy of a module: each row uses its adapter's copy, or the base's module."""

    def __init__(self, path: str, copies: Mapping[str, nn.Module], layer: nn.Module, batch: MixedBatch) -> None:
        super().__init__()
        self.path, self.batch, self.names = path, batch, tuple(copies)
        self.copies = nn.ModuleList(copies.values())
        self._layer: tuple[Any] = (layer,)  # a reference, not a registration
        self._is_recurrent = any(isinstance(module, nn.RNNBase) for module in layer.modules())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Splits tensors with the batch's rows; other arguments go to each copy unchanged. Raises RowsError."""
        if self.batch.lacks(self.names):
            return self._run(len(self.copies), args, kwargs)
        if self._is_recurrent or getattr(self._layer[0], "batch_first", True) is False:
            raise RowsError(
                f"{self.path} is recurrent or has batch_first=False, but adapter_rows needs the rows in the first "
                "dimension of all tensors"
            )
        first = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        rows, dim = self.batch.rows_in(first, self._layer[0], self.path, 1), self.batch.dim
        positions = rows.positions(self.names)
        used = sorted(set(positions))
        if len(used) == 1:
            return self._run(used[0], args, kwargs)
        groups = [[row for row, own in enumerate(positions) if own == position] for position in used]
        outputs = []
        for position, group in zip(used, groups, strict=True):
            own = partial(_own_rows, n=rows.n, dim=dim, own=rows.tensor(group, first.device))
            outputs.append(self._run(position, *tree_map(own, (args, kwargs))))
        in_turn = [row for group in groups for row in group]
        in_order = sorted(range(rows.n), key=in_turn.__getitem__)
        back = rows.tensor(in_order, first.device)

        def joined(*same: Any) -> Any:
            self._check_rows(same, [len(group) for group in groups])
            return None if same[0] is None else torch.cat(same, dim).index_select(dim, back)

        return tree_map(joined, *outputs)

    def _check_rows(self, outputs: Sequence[Any], counts: Sequence[int]) -> None:
        """Raises RowsError unless each output is None or has the right number of rows."""
        dim = self.batch.dim
        for output, count in zip(outputs, counts, strict=True):
            if not isinstance(output, Tensor | None):
                raise RowsError(f"{self.path}: expected tensors as output, got {type(output).__name__}")
            if output is not None and (output.ndim <= dim or output.shape[dim] != count):
                shape = tuple(output.shape)
                raise RowsError(f"{self.path}: expected {count} rows in dimension {dim} of the output, got {shape}")

    def _run(self, position: int, args: Any, kwargs: Any) -> Any:
        """Calls the copy at this position. The last position is the base's module, called in the base's precision."""
        (layer,) = self._layer
        if position < len(self.copies):
            copy = self.copies[position]
            if copy.training != layer.training:
                copy.train(layer.training)
            return copy(*args, **kwargs)
        return call_plain(layer, next(self.parameters()).dtype, args, kwargs)


def _own_rows(value: Any, n: int, dim: int, own: Tensor) -> Any:
    """Returns the given rows of a tensor that has the batch's n rows; returns anything else unchanged."""
    has_rows = isinstance(value, Tensor) and value.ndim > dim and value.shape[dim] == n
    return value.index_select(dim, own) if has_rows else value
