"""Adapts parameters that a module uses without calling a layer: stacked experts, and nn.MultiheadAttention.

    ParameterLayerType    a parameter, typically the stacked weights of experts (E, out, in)
    AttentionMatrix       a matrix of nn.MultiheadAttention, which reads the weights of its projections
    WeightSum             W + s B A in place of an adapted parameter

The module's own forward runs on a shallow copy, in which a `WeightSum` replaces each adapted parameter. It keeps W and
the update s B A = L R separate: x (W + L R) = x W + (x L) R. None of transformers' implementations therefore builds the
full update (E, out, in). Other operations get the dense sum. With DoRA, the sum is g W + L R.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, cached_property
from math import prod
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from tailora.core.dora import weight_scale
from tailora.core.layer_types import LayerType, Shape, weight_of


class ParameterLayerType(LayerType):
    """A parameter (out, in), or of experts (E, out, in); (E, in, out) where the module's `is_transposed` is true.

    A (E r, in) has rows e r + k, B (E out, r) has rows e out + i, for expert e.
    """

    is_stacked = True
    reads_numbers = False
    supports_dropout = False
    replaces_forward = True

    def __init__(self, parameter: str) -> None:
        self.name, self.weight_name = f"Parameter {parameter}", parameter

    def is_transposed(self, layer: Any) -> bool:
        return weight_of(layer, self.weight_name).ndim == 3 and getattr(layer, "is_transposed", False)

    def dims(self, layer: Any) -> tuple[int, int]:
        m, n = weight_of(layer, self.weight_name).shape[-2:]
        return (m, n) if self.is_transposed(layer) else (n, m)

    def groups(self, layer: Any) -> int:
        return prod(weight_of(layer, self.weight_name).shape[:-2])

    def shapes(self, layer: Any, r: int) -> tuple[Shape, Shape]:
        (in_features, out_features), experts = self.dims(layer), self.groups(layer)
        return (experts * r, in_features), (experts * out_features, r)

    def factors(self, layer: Any, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        right = A.reshape(-1, B.shape[1], A.shape[1])  # (E, r, in)
        left = B.reshape(len(right), -1, B.shape[1])  # (E, out, r)
        return (right.mT, left.mT) if self.is_transposed(layer) else (left, right)

    def matrix(self, layer: Any, weight: Tensor) -> Tensor:
        stack = weight.reshape(-1, *weight.shape[-2:])
        return stack.mT if self.is_transposed(layer) else stack

    def forward(self, layer: Any, adapters: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        """Runs the module on a copy, so attributes that its forward sets are lost."""
        names = dict.fromkeys(adapter.layer_type.weight_name for adapter in adapters)
        weights = {name: adapted_weight(layer, name, adapters, layer._parameters[name].dtype) for name in names}
        return layer.plain.forward(with_weights(layer, weights), *args, **kwargs)

    def __reduce__(self) -> Any:
        return parameter_layer_type, (self.weight_name,)


@cache
def parameter_layer_type(parameter: str) -> ParameterLayerType:
    return ParameterLayerType(parameter)


# ---- nn.MultiheadAttention


class AttentionMatrix(LayerType):
    """One matrix of nn.MultiheadAttention: q, k and v together, one of them, or the output projection."""

    replaces_forward = True
    supports_dropout = False

    def __init__(self, weight_name: str) -> None:
        self.name, self.weight_name = f"Attention {weight_name}", weight_name

    def dims(self, layer: Any) -> tuple[int, int]:
        width = layer.embed_dim
        in_features = {"k_proj_weight": layer.kdim, "v_proj_weight": layer.vdim}.get(self.weight_name, width)
        return in_features, 3 * width if self.weight_name == "in_proj_weight" else width

    def forward(self, layer: Any, adapters: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        weights = {}
        for name in dict.fromkeys(adapter.layer_type.weight_name for adapter in adapters):
            dtype = weight_of(layer, name).dtype
            wide = torch.promote_types(dtype, torch.float32)  # round once
            weights[name] = adapted_weight(layer, name, adapters, wide).dense().to(dtype)
        return layer.plain.forward(with_weights(layer, weights), *args, **kwargs)

    def __reduce__(self) -> Any:
        return attention_matrix, (self.weight_name,)


ATTENTION = {
    name: AttentionMatrix("out_proj.weight" if name == "out_proj" else name)
    for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj")
}


def attention_matrix(weight_name: str) -> AttentionMatrix:
    return ATTENTION[weight_name.removesuffix(".weight")]


def projections(layer: nn.Module) -> dict[str, LayerType]:
    """Returns name -> layer type for the matrices of nn.MultiheadAttention; {} for any other layer."""
    if not isinstance(layer, nn.MultiheadAttention):
        return {}
    packed = layer.in_proj_weight is not None
    inputs = ["in_proj_weight"] if packed else ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
    return {name: ATTENTION[name] for name in (*inputs, "out_proj")}


# ---- A forward with other weights


def with_weights(layer: nn.Module, weights: Mapping[str, Any]) -> nn.Module:
    """Returns a shallow copy of the layer with its plain class, and with these values instead of its parameters.

    weights: name -> value; "out_proj.weight" is a parameter of a submodule. The copy shares everything else with the
    layer and registers nothing, so other threads can use the layer at the same time.
    """
    view = cast(nn.Module, object.__new__(getattr(layer, "plain", type(layer))))
    view.__dict__.update(layer.__dict__)
    inner: dict[str, dict[str, Any]] = {}
    for name, value in weights.items():
        child, _, last = name.rpartition(".")
        if child:
            inner.setdefault(child, {})[last] = value
        else:
            view.__dict__[name] = value
    for child, values in inner.items():
        view.__dict__[child] = with_weights(layer.get_submodule(child), values)
    return view


def adapted_weight(layer: Any, name: str, adapters: Sequence[Any], dtype: torch.dtype) -> "WeightSum":
    """Returns W + s B A, or g W + g s B A with DoRA, for the parameter `name` and all its adapters."""
    adapters = [adapter for adapter in adapters if adapter.layer_type.weight_name == name]
    gains = [adapter.gain(layer) for adapter in adapters]
    pairs = [adapter.weight_factors(layer, gain) for adapter, gain in zip(adapters, gains, strict=True)]
    left, right = torch.cat([left for left, _ in pairs], 2), torch.cat([right for _, right in pairs], 1)
    weight, scale = weight_of(layer, name), weight_scale(layer, adapters, gains)
    if weight.ndim == 2:
        left, right, scale = left[0], right[0], None if scale is None else scale[0]
    return WeightSum(weight, left, right, scale).to(dtype)


class WeightSum:
    """g W + L R, used by a module's forward like a parameter: W (..., m, n), L (..., m, r), R (..., r, n).

    scale: g, (..., m, 1) or (..., 1, n); None for 1.
    """

    def __init__(self, weight: Tensor, left: Tensor, right: Tensor, scale: Tensor | None = None) -> None:
        self.weight, self.left, self.right, self.scale = weight, left, right, scale

    def dense(self) -> Tensor:
        return (self.weight if self.scale is None else self.weight * self.scale) + self.left @ self.right

    def _map(self, function: Callable[[Tensor], Tensor]) -> "WeightSum":
        scale = None if self.scale is None else function(self.scale)
        return WeightSum(function(self.weight), function(self.left), function(self.right), scale)

    def __getitem__(self, index: Any) -> Any:
        """Returns one expert, or a batch of them."""
        if self.weight.ndim != 3 or isinstance(index, tuple):
            return self.dense()[index]
        if isinstance(index, int) or (isinstance(index, Tensor) and index.ndim == 0):
            expert = int(index)
            scale = None if self.scale is None else self.scale[expert]
            return WeightSum(self.weight[expert], *self._pairs[expert], scale)
        return self._map(lambda tensor: tensor[index])

    @cached_property
    def _pairs(self) -> Sequence[tuple[Tensor, Tensor]]:
        """L and R of each expert. Unbound once: the backward of indexing allocates a whole stack for each expert."""
        return list(zip(self.left.unbind(), self.right.unbind(), strict=True))

    def __len__(self) -> int:
        return len(self.weight)

    @property
    def mT(self) -> "WeightSum":
        scale = None if self.scale is None else self.scale.mT
        return WeightSum(self.weight.mT, self.right.mT, self.left.mT, scale)

    def transpose(self, first: int, second: int) -> Any:
        ndim = self.weight.ndim
        if {first % ndim, second % ndim} == {ndim - 2, ndim - 1}:
            return self.mT
        return self.dense().transpose(first, second)

    def to(self, *args: Any, **kwargs: Any) -> "WeightSum":
        return self._map(lambda tensor: tensor.to(*args, **kwargs))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.weight if name in SHAPE else self.dense(), name)

    def __rmatmul__(self, x: Tensor) -> Tensor:
        if self.scale is not None and x.ndim == 1:
            return (x[None] @ self)[0]
        return self.scaled(x, lambda y: y @ self.weight) + (x @ self.left) @ self.right

    def __matmul__(self, x: Tensor) -> Tensor:
        if self.scale is not None:
            return x @ self.mT if x.ndim == 1 else (x.mT @ self.mT).mT
        return self.weight @ x + self.left @ (self.right @ x)

    def scaled(self, x: Tensor, product: Callable[[Tensor], Tensor], experts: Tensor | None = None) -> Tensor:
        """Returns x (g W), where `product` multiplies by W. The shape of g decides whether it scales x or the result.

        experts: for each row of x, the index of its matrix.
        """
        if self.scale is None:
            return product(x)
        scale = self.scale if experts is None else self.scale[experts]
        if scale.shape[-1] == 1:
            return product(x * (scale.mT if experts is None else scale[..., 0]))
        return product(x) * (scale if experts is None else scale[..., 0, :])

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        x_times_sum = len(args) > 1 and isinstance(args[1], WeightSum) and not isinstance(args[0], WeightSum)
        if func is F.linear and x_times_sum:
            return _linear(*args, **kwargs)
        if func in PRODUCTS and len(args) == 2 and not all(isinstance(value, WeightSum) for value in args):
            a, b = args
            return a.__matmul__(b) if isinstance(a, WeightSum) else b.__rmatmul__(a)  # by name: the compiler needs it
        if getattr(func, "__name__", "").split(".")[0] in GROUPED_PRODUCTS and x_times_sum:
            return _grouped(func, *args, **kwargs)
        args, kwargs = tree_map(lambda value: value.dense() if isinstance(value, WeightSum) else value, (args, kwargs))
        return func(*args, **kwargs)


SHAPE = ("shape", "ndim", "dtype", "device", "dim", "size", "numel", "is_cuda", "requires_grad", "layout")
PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm, torch.mm, Tensor.mm)
GROUPED_PRODUCTS = ("grouped_mm", "_grouped_mm", "grouped_mm_fallback")
ALIGNED = 8  # numbers: grouped products need rows whose size is a multiple of 16 bytes


def _linear(x: Tensor, weight: WeightSum, bias: Tensor | None = None) -> Tensor:
    if weight.scale is None:
        return F.linear(x, weight.weight, bias) + F.linear(F.linear(x, weight.right), weight.left)
    y = x @ weight.mT
    return y if bias is None else y + bias


def _grouped(func: Callable[..., Tensor], x: Tensor, weight: WeightSum, *args: Any, **kwargs: Any) -> Tensor:
    """Multiplies each row of x by the matrix of its expert. The rows are sorted by expert."""
    missing = -weight.left.shape[-1] % ALIGNED
    left, right = F.pad(weight.left, (0, missing)), F.pad(weight.right, (0, 0, 0, missing))
    experts = None
    if weight.scale is not None:
        ends = kwargs["offs"] if "offs" in kwargs else args[0]  # where the rows of each expert end
        positions = torch.arange(len(x), device=x.device, dtype=ends.dtype)
        experts = torch.searchsorted(ends, positions, right=True).clamp(max=len(weight) - 1)
    y = weight.scaled(x, lambda value: func(value, weight.weight, *args, **kwargs), experts)
    return y + func(func(x, left, *args, **kwargs), right, *args, **kwargs)
