"""Matrix products that are computed in two parts where oneDNN would leave a core idle.

With AMX and two threads, oneDNN 3.12 gives a bfloat16 product of `rows` x `columns` to one of them if
columns <= rows < 2 columns, up to 1024 columns: (700, 576) (576, 576) takes .32 ms on either number of threads, in two
parts .21 ms. For other shapes, and on processors without AMX, the second thread makes products 1.7 to 2 times as fast,
and two parts would take 10 to 30% longer.
"""

import torch
from torch import Tensor

from tailora.core.device import cpu_flags

NARROW = range(128, 1024)  # columns; from 1024 on oneDNN uses both threads, below 128 nothing was measured
ALIGNED = 32  # the first part has a multiple of so many rows: some other numbers are slow again


def product(x: Tensor, matrix: Tensor, add: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """Returns x matrix + add, in `out` if given: (rows, k), (k, columns), (rows, columns) -> (rows, columns)."""
    parts = _parts(x, matrix)
    if not parts:
        return _product(x, matrix, add, out)
    out = x.new_empty(x.shape[0], matrix.shape[1]) if out is None else out
    for part in parts:
        _product(x[part], matrix, None if add is None else add[part], out[part])
    return out


def _product(x: Tensor, matrix: Tensor, add: Tensor | None, out: Tensor | None) -> Tensor:
    return torch.mm(x, matrix, out=out) if add is None else torch.addmm(add, x, matrix, out=out)


def add_product(target: Tensor, x: Tensor, matrix: Tensor) -> None:
    """target += x matrix."""
    for part in _parts(x, matrix) or [slice(None)]:
        target[part].addmm_(x[part], matrix)


def _parts(x: Tensor, matrix: Tensor) -> list[slice]:
    """Returns two slices of the rows; none if one product is faster."""
    rows, columns = x.shape[0], matrix.shape[1]
    if not (columns <= rows < 2 * columns and columns in NARROW and _leaves_core_idle(x)):
        return []
    middle = -(-rows // (2 * ALIGNED)) * ALIGNED
    return [slice(0, middle), slice(middle, rows)]


def _leaves_core_idle(x: Tensor) -> bool:
    amx = x.dtype == torch.bfloat16 and x.device.type == "cpu" and "amx_bf16" in cpu_flags()
    return amx and torch.get_num_threads() == 2
