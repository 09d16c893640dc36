"""A different adapter for every token of a packed batch, for inference: what a server's engine attaches to the layers.

Several sequences are concatenated to one batch row, (1, tokens, ...). The tokens of a sequence are a segment. Segments
of the same adapter that follow one another are one, so the engine sorts its requests by adapter.

    PackedBatch          which tokens have which adapter; shared by all layers, set anew before every forward
    PackedLayer          replaces the parts of all adapters in a layer: each changes its own segments
    PackedModule         the same for modules that are trained in full
    packed_layers        what to attach to every layer

A product for each segment of one decoded token would mostly be the overhead of products. So the factors of all adapters
of the batch lie in one matrix, A = [A1; A2; ...] and B = [B1, B2, ...]: all tokens are multiplied by A, what belongs to
the adapters of others is set to zero, and the rest is multiplied by B. What the scale, DoRA's gain and the precision
make of the factors is computed once for each adapter.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tailora.core.adapter import Adapter
from tailora.core.layer import LoRALayer
from tailora.core.layer_types import CONV1D, LINEAR
from tailora.core.mixed_batch import LayerTerms, call_base, check_splits_by_row, layer_terms
from tailora.errors import RowsError


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens start..stop - 1 of the batch have this adapter."""

    adapter: str | None
    start: int
    stop: int


def segments_of(sequences: Iterable[tuple[str | None, int]]) -> tuple[Segment, ...]:
    """Returns the segments of sequences, given as adapter and number of tokens; equal neighbours are one segment."""
    segments: list[Segment] = []
    stop = 0
    for adapter, length in sequences:
        start, stop = stop, stop + length
        if segments and segments[-1].adapter == adapter:
            segments[-1] = Segment(adapter, segments[-1].start, stop)
        elif length:
            segments.append(Segment(adapter, start, stop))
    return tuple(segments)


@dataclass(eq=False)
class PackedBatch:
    """Which tokens of the next forward have which adapter.

    head: the layer that gets one token of each sequence, whose logits are wanted; None if every layer gets all tokens.
    tokens: of the other layers.    head_tokens: of the head.
    together: adapters whose factors the layers keep in one matrix, those of the batch and some of earlier ones.
    terms: what the parts of adapters add to their layers, as far as it is computed.
    """

    head: nn.Module | None = None
    tokens: tuple[Segment, ...] = ()
    head_tokens: tuple[Segment, ...] = ()
    together: tuple[str, ...] = ()
    terms: dict[LoRALayer, LayerTerms] = field(default_factory=dict)
    _masks: dict[tuple[bool, tuple[int, ...]], Tensor] = field(default_factory=dict)

    def set_tokens(self, tokens: tuple[Segment, ...], head_tokens: tuple[Segment, ...]) -> None:
        """Before a forward. Adapters that left the batch stay in `together` for a while, since they may come back."""
        self.tokens, self.head_tokens = tokens, head_tokens
        self._masks.clear()
        names = {segment.adapter: None for segment in tokens if segment.adapter is not None}
        if names.keys() <= set(self.together) and len(self.together) <= 4 * len(names) + 4:
            return
        both = tuple(dict.fromkeys((*self.together, *names)))
        self.together = both if len(both) <= 2 * len(names) + 4 else tuple(names)

    def others(self, ranks: tuple[int, ...], layer: nn.Module, device: torch.device) -> Tensor:
        """Returns which values of A x belong to the adapters of other tokens, (tokens, sum of ranks).

        ranks: of each adapter of `together` in this layer.
        """
        key = layer is self.head, ranks
        mask = self._masks.get(key)
        if mask is None:
            numbers = {name: number for number, name in enumerate(self.together)}
            segments = self.head_tokens if layer is self.head else self.tokens
            own = torch.tensor([numbers.get(segment.adapter or "", -1) for segment in segments])
            lengths = torch.tensor([segment.stop - segment.start for segment in segments])
            of_columns = torch.arange(len(ranks)).repeat_interleave(torch.tensor(ranks))
            mask = (own.repeat_interleave(lengths)[:, None] != of_columns).to(device)
            self._masks[key] = mask
        return mask

    def segments_in(self, x: Tensor, layer: nn.Module, path: str) -> tuple[Segment, ...]:
        """Returns the segments of x (1, tokens, ...), the layer's input. Raises RowsError for other tokens."""
        segments = self.head_tokens if layer is self.head else self.tokens
        count = segments[-1].stop if segments else 0
        if x.ndim < 2 or x.shape[:2] != (1, count):
            raise RowsError(f"the batch has {count} tokens in one row; {path} got {tuple(x.shape)}")
        return segments


class PackedLayer:
    """Replaces the parts of all adapters in a layer. parts: name of an adapter -> its parts of this layer."""

    def __init__(self, path: str, parts: Mapping[str, tuple[Any, ...]], batch: PackedBatch) -> None:
        self.path, self.parts, self.batch = path, parts, batch
        self.products = {name: own[0] for name, own in parts.items() if len(own) == 1 and is_product(own[0])}
        self._together: tuple[str, ...] = ()  # whose factors are in _A and _B
        self._ranks: tuple[int, ...] = ()
        self._A, self._B = torch.empty(0), torch.empty(0)

    def add_to(self, y: Tensor, output: Tensor, x: Tensor, layer: nn.Module) -> Tensor:
        """Returns y + what the tokens' adapters change of the layer's `output`, as `LoRALayer.add_to`."""
        segments = self.batch.segments_in(x, layer, self.path)
        products = []
        for segment in segments:
            place = slice(segment.start, segment.stop)
            name = segment.adapter or ""
            if name in self.products:
                terms = self._terms(name, layer, output.dtype)
                products.append((terms, place))
                rescale(y[0, place], terms)
            elif name in self.parts:
                change, outputs = y[:, place], output[:, place].clone()
                for part in self.parts[name]:
                    change = part.add_to(change, outputs, x[:, place], layer)
                y[:, place] = change
        if len(products) == 1:
            [(terms, place)] = products
            y[0, place].addmm_(x[0, place].to(terms.A.dtype) @ terms.A.mT, terms.B.mT)
        elif products:
            self._put_together(layer, output.dtype)
            hidden = x[0].to(self._A.dtype) @ self._A.mT  # (tokens, sum of ranks)
            y[0].addmm_(hidden.masked_fill_(self.batch.others(self._ranks, layer, y.device), 0), self._B.mT)
        return y

    def _terms(self, name: str, layer: nn.Module, dtype: torch.dtype) -> LayerTerms:
        part = self.products[name]
        terms = self.batch.terms.get(part)
        if terms is None:
            terms = self.batch.terms[part] = layer_terms(part, layer, dtype)
        return terms

    def _put_together(self, layer: nn.Module, dtype: torch.dtype) -> None:
        """Makes one matrix of the factors of the adapters of `batch.together`, unless it is there."""
        if self._together == self.batch.together:
            return
        self._together = self.batch.together
        terms = {name: self._terms(name, layer, dtype) for name in self._together if name in self.products}
        self._ranks = tuple(len(terms[name].A) if name in terms else 0 for name in self._together)
        self._A = torch.cat([own.A for own in terms.values()])  # (sum of ranks, in)
        self._B = torch.cat([own.B for own in terms.values()], 1)  # (out, sum of ranks)


def is_product(part: Any) -> bool:
    """True for the update of a linear layer that fills all of the layer's output."""
    return isinstance(part, LoRALayer) and part.layer_type in (LINEAR, CONV1D) and part.output_slice is None


def rescale(tokens: Tensor, terms: LayerTerms) -> None:
    """Applies the terms of DoRA and biases to these tokens of W x + b, (n, out), in place."""
    if terms.rescaling is not None:
        tokens.addcmul_(tokens, terms.rescaling)
    if terms.shift is not None:
        tokens.add_(terms.shift)


class PackedModule(nn.Module):
    """Replaces the trained copy of a module: the tokens of each adapter go through its copy, others through the base's.

    Takes modules whose first argument and output are (1, tokens, ...), such as embeddings, norms and heads.
    """

    def __init__(self, path: str, copies: Mapping[str, nn.Module], layer: nn.Module, batch: PackedBatch) -> None:
        super().__init__()
        self.path, self.batch = path, batch
        self.numbers = {name: number for number, name in enumerate(copies)}
        self.copies = nn.ModuleList(copies.values())
        self._layer = (layer,)  # a reference, not a registration

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        segments = self.batch.segments_in(x, self._layer[0], self.path)
        outputs = [self._run(segment, x, args, kwargs) for segment in segments]
        for segment, output in zip(segments, outputs, strict=True):
            if output.shape[:2] != (1, segment.stop - segment.start):
                raise RowsError(f"{self.path} returns {tuple(output.shape)}, not one vector for each token")
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)

    def _run(self, segment: Segment, x: Tensor, args: Any, kwargs: Any) -> Tensor:
        (layer,) = self._layer
        x = x[:, segment.start : segment.stop]
        if segment.adapter in self.numbers:
            output: Tensor = self.copies[self.numbers[segment.adapter]](x, *args, **kwargs)
        else:
            output = call_base(layer, next(self.parameters()).dtype, (x, *args), kwargs)
        return output


def packed_layers(
    batch: PackedBatch, adapters: Mapping[str, Adapter], layer_paths: Mapping[str, str], layers: Mapping[str, nn.Module]
) -> dict[str, tuple[Any, ...]]:
    """Returns what to attach to every layer so that each token computes with its adapter, by path.

    layer_paths: path of a part of an adapter -> path of its layer. Raises RowsError for layers that do not see the
    tokens one by one.
    """
    alive = {part for adapter in adapters.values() for part in adapter.low_rank.values()}
    batch.terms = {part: terms for part, terms in batch.terms.items() if part in alive}
    batch.together = tuple(name for name in batch.together if name in adapters)
    parts: dict[str, dict[str, tuple[Any, ...]]] = {}  # path -> name of the adapter -> its parts
    copies: dict[str, dict[str, nn.Module]] = {}
    for name, adapter in adapters.items():
        check_splits_by_row(adapter.low_rank)
        for path, part in (*adapter.low_rank.items(), *adapter.extras.items()):
            of_layer = parts.setdefault(layer_paths[path], {})
            of_layer[name] = (*of_layer.get(name, ()), part)
        for path, module in adapter.saved.items():
            copies.setdefault(path, {})[name] = module
    result: dict[str, tuple[Any, ...]] = {path: (PackedLayer(path, own, batch),) for path, own in parts.items()}
    for path, own_copies in copies.items():
        result[path] = (PackedModule(path, own_copies, layers[path], batch),)
    return result
