"""What code allocates and computes, counted while it runs on tensors without contents.

torch's fake tensors have shape, type and device but no memory; every operator runs on them as usual, forward and
backward. The tracker adds what an operator allocates and subtracts it when it is freed, so it finds the moment of the
largest sum, temporaries included, of the code itself rather than of a description of it. It does not see what an
operator allocates internally, nor how an allocator rounds and keeps blocks.
"""

import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from tailora.kernels import cpu_attention
from tailora.kernels.cpu_attention import flash_backward_op, flash_op, split_documents
from tailora.train.memory import MMAP_BYTES

aten = torch.ops.aten
EQUAL, ITEM, DEVICE = aten.equal.default, aten._local_scalar_dense.default, torch.ops.prim.device.default
ROUNDING = 512  # bytes: sizes that torch's allocators for devices give out are multiples


def tensors_of(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yields the tensors among arguments or results, also those in lists. torch's trees do it at twice the cost."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_of(value)


class MemoryTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within this mode, storages that operators allocate are counted under the part that `part_of` names.

    known: tensors whose storages are counted elsewhere.    lengths: of the documents of a packed row.
    now, peak: bytes of each part, at present and at the moment of the largest sum.    flops: of products.
    sum_of_peaks: the most bytes that malloc has from the system. It gives large blocks (MMAP_BYTES or more) back when
    they are freed, and keeps the memory of all others. So this is the largest sum of the large blocks, plus the largest
    sum of the others, also if these were at different moments.
    """

    def __init__(self, known: Iterable[Tensor], part_of: Callable[[Tensor], str], lengths: Sequence[int] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.flops = 0.0
        self._part_of, self._lengths = part_of, lengths
        self._alive = {id(tensor.untyped_storage()): ("", 0) for tensor in known}
        self._largest = 0
        self._blocks, self._most = Counter[bool](), Counter[bool]()  # whether large -> bytes, and at most

    @property
    def sum_of_peaks(self) -> int:
        return self._most.total()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in ON_CPU and args[0].device.type == "cpu":  # what they allocate inside counts, too
            with self:
                return ON_CPU[func](*args, **kwargs)
        out = func(*args, **kwargs)
        if func is DEVICE:
            return out
        self.flops += self._flops(func, args, kwargs, out)
        inputs, outputs = list(tensors_of(args)), list(tensors_of((out,)))
        for output in outputs:
            self._add(output)
        if torch.Tag.pointwise in func.tags:
            self._add_conversions(inputs, outputs)
        return out

    def _flops(self, func: Any, args: Any, kwargs: Any, out: Any) -> float:
        if func in ON_CPU:  # attention of documents on another device; the last argument is the window
            windows = [(length, min(args[-1] or length, length)) for length in self._lengths]
            pairs = sum(window * (length - window / 2) for length, window in windows)
            return float(2 * PRODUCTS_OF_ATTENTION[func] * out[0][0].numel() * pairs)
        if func in FLOPS:
            return FLOPS[func](*args, **kwargs)
        packet = getattr(func, "_overloadpacket", None)
        return float(flop_registry[packet](*args, **kwargs, out_val=out)) if packet in flop_registry else 0.0

    def _add_conversions(self, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """On a CPU a pointwise operator on several dtypes copies all to the widest while it runs."""
        several = [tensor for tensor in (*inputs, *outputs) if tensor.ndim and tensor.is_floating_point()]
        if len({tensor.dtype for tensor in several}) < 2 or several[0].device.type != "cpu":
            return
        widest = max((tensor.dtype for tensor in several), key=lambda dtype: dtype.itemsize)
        size = sum(tensor.numel() * widest.itemsize for tensor in several if tensor.dtype != widest)
        if self.now.total() + size > self._largest:
            part = self._part_of(several[0])
            self._largest, self.peak = self.now.total() + size, self.now + Counter({part: size})

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if id(storage) in self._alive:
            return
        part, size = self._part_of(tensor), storage.nbytes()
        if tensor.device.type != "cpu":
            size = -(-size // ROUNDING) * ROUNDING
        self._alive[id(storage)] = part, size
        weakref.finalize(storage, self._subtract, id(storage))
        self.now[part] += size
        if self.now.total() > self._largest:
            self._largest, self.peak = self.now.total(), self.now.copy()
        is_large = size >= MMAP_BYTES
        self._blocks[is_large] += size
        self._most[is_large] = max(self._most[is_large], self._blocks[is_large])

    def _subtract(self, key: int) -> None:
        part, size = self._alive.pop(key)
        self.now[part] -= size
        self._blocks[size >= MMAP_BYTES] -= size


class _RealInputsComputed(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Computes operators on real tensors for real: lengths, masks and indices decide what else is computed.

    A condition on fake tensors cannot be computed and is taken to be True: "all are equal", "all are finite".
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [*tensors_of(args), *tensors_of(kwargs.values())]
        if inputs and not any(isinstance(tensor, FakeTensor) for tensor in inputs):
            with no_dispatch():
                return func(*args, **kwargs)
        if func is EQUAL or (func is ITEM and inputs[0].dtype == torch.bool):
            return True
        return func(*args, **kwargs)


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Within the block, new tensors have no contents."""
    split_documents.cache_clear()  # cached index tensors must not pass between real and fake runs
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), _RealInputsComputed(), warnings.catch_warnings():  # type: ignore[no-untyped-call]
            warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")  # in deepcopy
            yield
    finally:
        split_documents.cache_clear()


PACKED, PACKED_BACKWARD = (
    torch.ops.tailora.packed_attention.default,
    torch.ops.tailora.packed_attention_backward.default,
)
ON_CPU: dict[Any, Callable[..., Any]] = {PACKED: cpu_attention.forward, PACKED_BACKWARD: cpu_attention.backward}
PRODUCTS_OF_ATTENTION = {PACKED: 2, PACKED_BACKWARD: 5}  # scores, values; the scores again, and four gradients
FLOPS: dict[Any, Callable[..., float]] = {  # operators that torch's table lacks
    aten.addmm_.default: lambda _, a, b, **__: 2.0 * a.numel() * b.shape[-1],
    aten.baddbmm_.default: lambda _, a, b, **__: 2.0 * a.numel() * b.shape[-1],
    # scores, and their product with the values, of half of the pairs of tokens; the backward takes 2.5 times as many
    flash_op.default: lambda q, k, *_, **__: 2.0 * q.numel() * k.shape[-2],
    flash_backward_op.default: lambda _, q, k, *__, **___: 5.0 * q.numel() * k.shape[-2],
}
