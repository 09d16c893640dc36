"""A different adapter for every token of a packed batch, for inference: what a server's engine attaches to the layers.

Several sequences are concatenated to one batch row, (1, tokens, ...). The tokens of a sequence are a segment. Segments
of the same adapter that follow one another are one, so the engine sorts its requests by adapter.

    PackedBatch          which tokens have which adapter; shared by all layers, set anew before every forward
    PackedLayer          replaces the parts of all adapters in a layer: each changes its own segments
    PackedModule         the same for modules that are trained in full
    packed_layers        what to attach to every layer

The low-rank updates of a linear layer need no copy of an adapter's factors: a segment is a slice of the tokens. What
the scale, DoRA's gain and the precision make of the factors is computed once for each adapter.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
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
    """

    head: nn.Module | None = None
    tokens: tuple[Segment, ...] = ()
    head_tokens: tuple[Segment, ...] = ()

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
        self._terms: dict[str, LayerTerms] = {}

    def add_to(self, y: Tensor, output: Tensor, x: Tensor, layer: nn.Module) -> Tensor:
        """Returns y + what the tokens' adapters change of the layer's `output`, as `LoRALayer.add_to`."""
        for segment in self.batch.segments_in(x, layer, self.path):
            parts = self.parts.get(segment.adapter or "")
            if parts is None:
                continue
            place = slice(segment.start, segment.stop)
            if len(parts) == 1 and is_product(parts[0]):
                terms = self._terms.get(segment.adapter or "")
                if terms is None:
                    terms = self._terms[segment.adapter or ""] = layer_terms(parts[0], layer, output.dtype)
                add_product(y, x, terms, place)
                continue
            change, outputs = y[:, place], output[:, place].clone()
            for part in parts:
                change = part.add_to(change, outputs, x[:, place], layer)
            y[:, place] = change
        return y


def is_product(part: Any) -> bool:
    """True for the update of a linear layer that fills all of the layer's output."""
    return isinstance(part, LoRALayer) and part.layer_type in (LINEAR, CONV1D) and part.output_slice is None


def add_product(y: Tensor, x: Tensor, terms: LayerTerms, place: slice) -> None:
    """Adds B A x and the terms of DoRA to these tokens of y, (1, tokens, out), in place."""
    tokens = y[0, place]  # (n, out), which is W x + b
    if terms.rescaling is not None:
        tokens.addcmul_(tokens, terms.rescaling)
    if terms.shift is not None:
        tokens.add_(terms.shift)
    tokens.addmm_(x[0, place].to(terms.A.dtype) @ terms.A.mT, terms.B.mT)


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
