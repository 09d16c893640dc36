"""Finds layers whose input has no dimension for the rows of a batch, such as shared experts.

They get (rows * tokens, width) instead of (rows, tokens, width). A different adapter per row works there if the layer
gets all tokens and the rows are in order. `RowOrder` checks the order with one marked forward pass.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from tailora.core.attach import attached, evaluating
from tailora.core.extras import input_embedding

CACHE_INPUTS = ("cache_position", "attention_mask", "position_ids")
# What a model may raise if it is called without these inputs
CALL_ERRORS = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


class RowOrder:
    """Answers for the layers of one model; a layer's answer is found once and kept.

    layers: path -> adapted layer.
    """

    def __init__(self, base_model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        self.base_model, self.layers = base_model, layers
        self._embeddings: nn.Module | None = None  # within `watched`
        self._keeps: dict[nn.Module, bool] = {}
        self._inputs: dict[str, Any] = {}  # of the current forward pass, by name
        self._rows_and_tokens = (0, 0)  # of the last embeddings

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Within the block, the inputs of each forward pass and the shape of its embeddings are known."""
        names = list(inspect.signature(self.base_model.forward).parameters)
        _, self._embeddings = input_embedding(self.base_model) or ("", None)

        def keep_inputs(_model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not torch.compiler.is_compiling():
                self._inputs = dict(zip(names, args, strict=False)) | kwargs
                self._rows_and_tokens = (0, 0)

        def forget_inputs(_model: nn.Module, _inputs: Any, _output: Any) -> None:
            if not torch.compiler.is_compiling():
                self._inputs = {}

        def keep_shape(_embeddings: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.ndim == 3 and not torch.compiler.is_compiling():
                self._rows_and_tokens = output.shape[0], output.shape[1]

        with ExitStack() as stack:
            register = self.base_model.register_forward_pre_hook
            stack.callback(register(keep_inputs, with_kwargs=True).remove)
            stack.callback(self.base_model.register_forward_hook(forget_inputs).remove)
            if self._embeddings is not None:
                stack.callback(self._embeddings.register_forward_hook(keep_shape).remove)
            yield

    def keeps(self, layer: nn.Module, length: int, n: int) -> bool:
        """True if `length`, the first dimension of the layer's input, contains all tokens of n rows, row after row."""
        rows, tokens = self._rows_and_tokens
        if torch.compiler.is_compiling() or rows != n or length != n * tokens:
            return False
        if n > 1 and layer not in self._keeps and self._inputs:
            self._marked_forward(n, tokens)
        return n == 1 or self._keeps.get(layer, False)

    def _marked_forward(self, n: int, tokens: int) -> None:
        """Calls the base model with NaN as the embeddings of the last row, and looks where layers get NaN."""
        # without the cache, which must not see this call, and what fits it; other tensors may be the model's input
        inputs: dict[str, Any] = {
            k: value for k, value in self._inputs.items() if isinstance(value, Tensor) and k not in CACHE_INPUTS
        }
        if "use_cache" in inspect.signature(self.base_model.forward).parameters:
            inputs["use_cache"] = False

        def mark(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            return output.index_fill(0, torch.tensor([n - 1], device=output.device), torch.nan)

        def look(layer: nn.Module) -> Callable[..., None]:
            def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
                if args and isinstance(args[0], Tensor) and args[0].ndim == 2 and len(args[0]) == n * tokens:
                    marked = args[0].isnan().any(1).view(n, tokens)
                    in_order = bool(marked[-1].all() & ~marked[:-1].any())
                    self._keeps[layer] = in_order and self._keeps.get(layer, True)

            return hook

        before = self._inputs, self._rows_and_tokens  # which the hooks of `watched` change
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(evaluating(self.base_model))
            stack.enter_context(attached(dict.fromkeys(self.layers.values(), ())))
            for layer in self.layers.values():
                stack.callback(layer.register_forward_pre_hook(look(layer)).remove)
            stack.callback(cast(nn.Module, self._embeddings).register_forward_hook(mark).remove)
            try:
                self.base_model(**inputs)
            except CALL_ERRORS:
                self._keeps = {}  # nothing is known, so that the layer is refused with its remedy
            finally:
                self._inputs, self._rows_and_tokens = before
