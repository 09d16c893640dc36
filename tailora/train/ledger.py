"""What a piece of code would hold in memory and compute, found by running it on tensors without contents.

torch's fake tensors have shape, type and device but no memory; every operator of the code runs on them as it is,
forward and backward. The ledger enters what an operator makes and strikes it out when it is freed. So it knows the
largest moment, temporaries included, of whatever code it is shown: no second description of it could be wrong.

What an operator holds within itself, and how an allocator rounds and keeps blocks, it does not see.
"""

import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from tailora.kernels import blocks, flash

NameOf = Callable[[Tensor], str]  # the part that a new tensor is counted under

EQUAL, ITEM = torch.ops.aten.equal.default, torch.ops.aten._local_scalar_dense.default


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it, storages that operators make are counted, by the part that `name_of` puts them under.

    known: tensors whose storages are counted elsewhere.
    now, peak: bytes of each part, at present and at the moment of the largest sum.    flops: of all products.
    """

    def __init__(self, known: Iterable[Tensor], name_of: NameOf) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.flops = 0.0
        self._name_of = name_of
        self._held = {id(tensor.untyped_storage()): ("", 0) for tensor in known}
        self._most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.flops += work(func, args, kwargs, out)
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        for leaf in made:
            self._enter(leaf)
        if torch.Tag.pointwise in func.tags:
            self._widened([leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)], made)
        return out

    def _widened(self, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """On a CPU an operator on several dtypes copies all to the widest, for as long as it runs."""
        several = [tensor for tensor in (*inputs, *outputs) if tensor.ndim and tensor.is_floating_point()]
        if len({tensor.dtype for tensor in several}) < 2 or several[0].device.type != "cpu":
            return
        widest = max((tensor.dtype for tensor in several), key=lambda dtype: dtype.itemsize)
        size = sum(tensor.numel() * widest.itemsize for tensor in several if tensor.dtype != widest)
        if self.now.total() + size > self._most:
            name = self._name_of(several[0])
            self._most, self.peak = self.now.total() + size, self.now + Counter({name: size})

    def _enter(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if id(storage) in self._held:
            return
        name, size = self._name_of(tensor), storage.nbytes()
        self._held[id(storage)] = name, size
        weakref.finalize(storage, self._strike, id(storage))
        self.now[name] += size
        if self.now.total() > self._most:
            self._most, self.peak = self.now.total(), self.now.copy()

    def _strike(self, key: int) -> None:
        name, size = self._held.pop(key)
        self.now[name] -= size


class _Contents(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Real tensors stay real: lengths, masks and indices decide what is computed. Of others one hopes for the best."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if inputs and not any(isinstance(each, FakeTensor) for each in inputs):
            with no_dispatch():
                return func(*args, **kwargs)
        if func is EQUAL or (func is ITEM and inputs[0].dtype == torch.bool):
            return True  # the same, finite
        return func(*args, **kwargs)


@contextmanager
def without_contents() -> Iterator[None]:
    """Within the block, tensors that are made have no contents."""
    blocks.arranged.cache_clear()  # what is remembered of real rows would be mixed with these, and the reverse
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), _Contents(), warnings.catch_warnings():  # type: ignore[no-untyped-call]
            warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")  # in deepcopy
            yield
    finally:
        blocks.arranged.cache_clear()


def tensors_of(*modules: nn.Module) -> Iterator[Tensor]:
    """Parameters, their gradients, and buffers."""
    for module in modules:
        for parameter in module.parameters():
            yield parameter
            if parameter.grad is not None:
                yield parameter.grad
        yield from module.buffers()


# ---- work


def work(func: Any, args: Any, kwargs: Any, out: Any) -> float:
    """Multiplications and additions of one operator, products and attention alone."""
    if func in OWN:
        return OWN[func](*args, **kwargs)
    packet = getattr(func, "_overloadpacket", None)
    return float(flop_registry[packet](*args, **kwargs, out_val=out)) if packet in flop_registry else 0.0


def _causal(q: Tensor, k: Tensor, *_: Any, **__: Any) -> float:
    """Scores and their product with the values, of half of the pairs."""
    return 2.0 * q.numel() * k.shape[-2]


def _product(_: Tensor, a: Tensor, b: Tensor, **__: Any) -> float:
    """Of matrices, or of as many pairs of them."""
    return 2.0 * a.numel() * b.shape[-1]


OWN: dict[Any, Callable[..., float]] = {  # what torch's own table lacks
    torch.ops.aten.addmm_.default: _product,
    torch.ops.aten.baddbmm_.default: _product,
    flash.attention.default: _causal,
    flash.attention_backward.default: lambda _gradient, q, k, *_, **__: 2.5 * _causal(q, k),
}
