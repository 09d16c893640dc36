"""Parameters that a module multiplies with by itself, above all the stacked weights of experts (E, out, in).

The module's own forward runs, on a view of the module that holds W + s B A in the place of W as two summands. Products
with it are split: x (W + L R) = x W + (x L) R. So no (E, out, in) of updates is formed, whichever of transformers'
implementations runs (a loop over experts, batched or grouped products). Any other operation gets the dense sum.
With DoRA the weight is g W + L R: x, or x W, is multiplied by g, along whichever of the two it runs.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from tailora.core.geometry import own_share


class Sum:
    """g W + L R, (..., m, n), as a module's forward sees it.  W (..., m, n), L (..., m, r), R (..., r, n).

    own: g, (..., m, 1) or (..., 1, n); None for 1.
    """

    def __init__(self, weight: Tensor, left: Tensor, right: Tensor, own: Tensor | None = None) -> None:
        self.weight, self.left, self.right, self.own = weight, left, right, own

    def dense(self) -> Tensor:
        return (self.weight if self.own is None else self.weight * self.own) + self.left @ self.right

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Sum":
        return Sum(*(each if each is None else change(each) for each in (self.weight, self.left, self.right, self.own)))  # type: ignore[arg-type]

    def __getitem__(self, index: Any) -> Any:
        """One expert, or a batch of them."""
        if self.weight.ndim != 3 or isinstance(index, tuple):
            return self.dense()[index]
        if isinstance(index, int) or (isinstance(index, Tensor) and index.ndim == 0):
            each = int(index)
            own = None if self.own is None else self.own[each]
            return Sum(self.weight[each], self.lefts[each], self.rights[each], own)
        return self._each(lambda each: each[index])

    # Taken apart once: the gradient of an index is a whole stack of zeros, for each expert anew.
    @cached_property
    def lefts(self) -> Sequence[Tensor]:
        return self.left.unbind()

    @cached_property
    def rights(self) -> Sequence[Tensor]:
        return self.right.unbind()

    def __len__(self) -> int:
        return len(self.weight)

    @property
    def mT(self) -> "Sum":
        own = None if self.own is None else self.own.mT
        return Sum(self.weight.mT, self.right.mT, self.left.mT, own)

    def transpose(self, first: int, second: int) -> Any:
        last = {first % self.weight.ndim, second % self.weight.ndim}
        return (
            self.mT if last == {self.weight.ndim - 2, self.weight.ndim - 1} else self.dense().transpose(first, second)
        )

    def to(self, *args: Any, **kwargs: Any) -> "Sum":
        return self._each(lambda each: each.to(*args, **kwargs))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.weight if name in SHAPE else self.dense(), name)

    def __rmatmul__(self, x: Tensor) -> Tensor:
        if self.own is not None and x.ndim == 1:
            return (x[None] @ self)[0]
        return self.scaled(x, lambda each: each @ self.weight) + (x @ self.left) @ self.right

    def __matmul__(self, x: Tensor) -> Tensor:
        if self.own is not None:
            return x @ self.mT if x.ndim == 1 else (x.mT @ self.mT).mT
        return self.weight @ x + self.left @ (self.right @ x)

    def scaled(self, x: Tensor, product: Callable[[Tensor], Tensor], rows: Tensor | None = None) -> Tensor:
        """x (g W), by the product with W: g meets x or the result, along whichever of them it runs.

        rows: of each row of x the matrix of the stack that it meets.
        """
        if self.own is None:
            return product(x)
        own = self.own if rows is None else self.own[rows]
        if own.shape[-1] == 1:
            return product(x * (own.mT if rows is None else own[..., 0]))
        return product(x) * (own if rows is None else own[..., 0, :])

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and isinstance(args[1], Sum) and not isinstance(args[0], Sum):
            return _linear(*args, **kwargs)
        if func in PRODUCTS and len(args) == 2 and not all(isinstance(each, Sum) for each in args):
            a, b = args
            return a.__matmul__(b) if isinstance(a, Sum) else b.__rmatmul__(a)  # by name, as the compiler needs it
        if _is_grouped(func) and isinstance(args[1], Sum) and not isinstance(args[0], Sum):
            return _grouped(func, *args, **kwargs)
        return func(*tree_map(_dense, args), **tree_map(_dense, kwargs))


SHAPE = ("shape", "ndim", "dtype", "device", "dim", "size", "numel", "is_cuda", "requires_grad", "layout")
PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm, torch.mm, Tensor.mm)
GROUPED = ("grouped_mm", "_grouped_mm", "grouped_mm_fallback")
ALIGNED = 8  # numbers: grouped products want rows of a multiple of 16 bytes


def _linear(x: Tensor, sum_: Sum, bias: Tensor | None = None) -> Tensor:
    if sum_.own is None:
        return F.linear(x, sum_.weight, bias) + F.linear(F.linear(x, sum_.right), sum_.left)
    y = x @ sum_.mT
    return y if bias is None else y + bias


def _is_grouped(func: Any) -> bool:
    return getattr(func, "__name__", "").split(".")[0] in GROUPED


def _grouped(func: Callable[..., Tensor], x: Tensor, sum_: Sum, *args: Any, **kwargs: Any) -> Tensor:
    """Rows of x, sorted by expert, times each one's matrix."""
    missing = -sum_.left.shape[-1] % ALIGNED
    left, right = F.pad(sum_.left, (0, missing)), F.pad(sum_.right, (0, 0, 0, missing))
    hidden = func(x, left, *args, **kwargs)
    rows = None
    if sum_.own is not None:
        ends = kwargs["offs"] if "offs" in kwargs else args[0]  # where the rows of each expert end
        places = torch.arange(len(x), device=x.device, dtype=ends.dtype)
        rows = torch.searchsorted(ends, places, right=True).clamp(max=len(sum_) - 1)
    base = sum_.scaled(x, lambda each: func(each, sum_.weight, *args, **kwargs), rows)
    return base + func(hidden, right, *args, **kwargs)


def _dense(value: Any) -> Any:
    return value.dense() if isinstance(value, Sum) else value


def run_with_sums(layer: Any, adapters: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
    """The module's forward with W + s B A for its adapted parameters. What it assigns to itself is lost."""
    view = cast(nn.Module, object.__new__(layer.plain))
    view.__dict__.update(layer.__dict__)  # shares all and registers nothing; safe with other threads in the same layer
    for name in dict.fromkeys(adapter.layer_type.weight for adapter in adapters):
        view.__dict__[name] = _summed(
            layer, layer._parameters[name], [a for a in adapters if a.layer_type.weight == name]
        )
    return layer.plain.forward(view, *args, **kwargs)


def _summed(layer: Any, weight: Tensor, adapters: Sequence[Any]) -> Sum:
    gains = [adapter.gain(layer) for adapter in adapters]
    lefts, rights = zip(*(a.factors(layer, gain) for a, gain in zip(adapters, gains, strict=True)), strict=True)
    left, right = torch.cat(lefts, 2), torch.cat(rights, 1)
    own = own_share(layer, adapters, gains)
    if weight.ndim == 2:
        left, right, own = left[0], right[0], None if own is None else own[0]
    return Sum(weight, left, right, own).to(weight.dtype)
