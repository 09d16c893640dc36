"""Finds layers whose input has no dimension for the rows of a batch, such as shared experts.

They get (rows * tokens, width) instead of (rows, tokens, width). A different adapter per row works there if the rows
are in order. `RowOrder` checks this with one marked forward pass, because a model may also mix or drop tokens.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tailora.core.attach import attached, evaluating

CACHE_INPUTS = ("cache_position", "attention_mask", "position_ids", "labels")


class RowOrder:
    """Answers for the layers of one model; a layer's answer is found once and kept.

    layers: path -> adapted layer.
    """

    def __init__(self, base_model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        self.base_model, self.layers = base_model, layers
        self._keeps: dict[nn.Module, bool] = {}
        self._call: tuple[tuple[Any, ...], dict[str, Any]] | None = None  # arguments of the current forward pass

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Within the block, the model's inputs are known, from which the marked forward pass is made."""

        def keep_call(_model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._call = args, kwargs

        handle = self.base_model.register_forward_pre_hook(keep_call, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
            self._call = None

    def keeps(self, layer: nn.Module, n: int) -> bool:
        """True if the layer's input contains the tokens of n rows, row after row."""
        if n == 1:
            return True
        if layer not in self._keeps and self._call is not None and not torch.compiler.is_compiling():
            self._marked_forward(*self._call, n)
        return self._keeps.get(layer, False)

    def _marked_forward(self, args: tuple[Any, ...], kwargs: dict[str, Any], n: int) -> None:
        """Calls the base model with NaN as the embeddings of the last row, and looks where layers get NaN."""
        embeddings = getattr(self.base_model, "get_input_embeddings", lambda: None)()
        if embeddings is None:
            return
        # without the cache, which must not see this call, and what fits it; other tensors may be the model's input
        kwargs = {k: value for k, value in kwargs.items() if isinstance(value, Tensor) and k not in CACHE_INPUTS}
        if "use_cache" in inspect.signature(self.base_model.forward).parameters:
            kwargs["use_cache"] = False

        def mark(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            if not isinstance(output, Tensor) or len(output) != n:
                return output  # not marked, so that no layer counts as in order
            return output.index_fill(0, torch.tensor([n - 1], device=output.device), torch.nan)

        def look(layer: nn.Module) -> Callable[..., None]:
            def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
                marked = inputs[0].isnan().flatten(1).any(1)
                count = len(marked) // n
                in_order = len(marked) % n == 0 and marked[-count:].all() and not marked[:-count].any()
                self._keeps[layer] = bool(in_order) and self._keeps.get(layer, True)

            return hook

        call, self._call = self._call, None  # the hook of `watched` would take this call for the user's
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(evaluating(self.base_model))
            stack.enter_context(attached(dict.fromkeys(self.layers.values(), ())))
            handles = [layer.register_forward_pre_hook(look(layer)) for layer in self.layers.values()]
            handles.append(embeddings.register_forward_hook(mark))
            for handle in handles:
                stack.callback(handle.remove)
            self.base_model(*args, **kwargs)
        self._call = call
