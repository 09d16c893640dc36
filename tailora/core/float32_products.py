"""16-bit products on a CPU, computed in float32 where that is faster.

Most processors multiply bfloat16 slowly: with AVX2 a product of 1,024 tokens takes eleven times as long as in float32,
and converting the weight first adds little from a few dozen tokens on. `fastest_products` measures from how many, once
for each machine. Within `Float32Products` such products convert their operands, a block of the weight at a time, and
round the result once, as a 16-bit product does. What the backward needs is kept in 16 bits.
"""

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import wraps
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tailora.core.cache import cache_folder
from tailora.core.device import HALF, device_name

BLOCK_ELEMENTS = 1 << 20  # of a weight that are converted at a time: 4 MB in float32, which a core's caches hold
TOKENS = (4, 16, 64)  # of the products that are timed
TIMES = 3  # measurements of each; the shortest counts
WORTH = 0.9  # float32 is taken if it needs at most this share of the time


# ---- The products


def float32_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    update: tuple[Tensor, Tensor] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Returns x W^T + b, computed in float32, in the precision of W: (..., in), (out, in) -> (..., out).

    bias: (out,), or (tokens, out) for x (tokens, in).
    update: (tokens, r) and (out, r), whose product is added.
    out: where the result is written.
    """
    wide, wide_bias = x.reshape(-1, x.shape[-1]).float(), None if bias is None else bias.float()
    y = weight.new_empty(*x.shape[:-1], len(weight)) if out is None else out
    rows = y.view(-1, len(weight))
    for part in _blocks(weight):
        if wide_bias is not None and wide_bias.ndim > 1:
            block = torch.addmm(wide_bias[:, part], wide, weight[part].float().mT)
        else:
            block = F.linear(wide, weight[part].float(), None if wide_bias is None else wide_bias[part])
        rows[:, part] = block if update is None else block.addmm_(update[0], update[1][part].mT)
    return y


def float32_product(x: Tensor, weight: Tensor, update: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Returns x W + update (tokens, r) (r, in), rounded to W's precision: (..., out), (out, in) -> (..., in)."""
    flat = x.reshape(-1, x.shape[-1])
    y = torch.zeros(len(flat), weight.shape[1]) if update is None else torch.mm(*update)
    for part in _blocks(weight):
        y.addmm_(flat[:, part].float(), weight[part].float())
    return y.to(weight.dtype).view(*x.shape[:-1], -1)


def _blocks(weight: Tensor) -> list[slice]:
    """Returns the rows that are converted at a time."""
    rows = max(BLOCK_ELEMENTS // weight.shape[1], 1)
    if len(weight) <= 2 * rows:
        return [slice(None)]
    return [slice(start, start + rows) for start in range(0, len(weight), rows)]


class _Linear(torch.autograd.Function):
    """`float32_linear`, with B (A x) of an adapter in float32; it keeps its 16-bit arguments for the backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor | None = None, B: Tensor | None = None
    ) -> Tensor:
        ctx.adds_per_token = bias is not None and bias.ndim > 1
        with torch._C.DisableTorchFunction():  # modes such as `Float32Products` take as long as short calls
            if A is None or B is None:
                ctx.save_for_backward(x if weight.requires_grad else None, weight, None, None, None)
                return float32_linear(x, weight, bias)
            wide = x.float()
            hidden = F.linear(wide.flatten(0, -2), A)  # (tokens, r)
            ctx.save_for_backward(x, weight, A, B, hidden)
            return float32_linear(wide, weight, bias, (hidden, B))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # without modes, as torch calls it
        x, weight, A, B, hidden = ctx.saved_tensors  # which a checkpoint computes again, in modes of its own
        dy, dx, dweight, dbias, dA, dB, update = gradients[0], None, None, None, None, None, None
        wide = dy
        if A is not None:
            wide = dy.float()
            flat = wide.flatten(0, -2)
            dhidden = flat @ B
            dA, dB, update = dhidden.mT @ x.flatten(0, -2).float(), flat.mT @ hidden, (dhidden, A)
        if ctx.needs_input_grad[0]:
            dx = float32_product(wide, weight, update)
        if ctx.needs_input_grad[1]:
            dweight = (dy.flatten(0, -2).float().mT @ x.flatten(0, -2).float()).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            dbias = dy if ctx.adds_per_token else dy.flatten(0, -2).sum(0)
        return dx, dweight, dbias, dA, dB


def adapted_linear(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor) -> Tensor | None:
    """Returns x W^T + b + x A^T B^T, rounded once, within `Float32Products`; None if 16 bits are faster, or outside."""
    tokens = _current_tokens()
    if tokens is None or A.dtype != torch.float32 or not pays(tokens, x, weight):
        return None
    y: Tensor = _Linear.apply(x, weight, bias, A, B)  # type: ignore[no-untyped-call]
    return y


# ---- Where they replace torch's


class Float32Products(TorchFunctionMode):
    """Within the block, 16-bit products of at least `tokens` tokens are computed in float32, on a CPU; None: nothing.

    Of several blocks in a thread, the innermost decides.
    """

    def __init__(self, tokens: int | None) -> None:
        super().__init__()
        self.tokens, self.decides = tokens, True

    def __enter__(self) -> "Float32Products":
        self.outer = _innermost()
        if self.outer is not None:
            self.outer.decides = False
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        if self.outer is not None:
            self.outer.decides = True

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.tokens is not None and self.decides and (replacement := REPLACEMENTS.get(func)) is not None:
            result = replacement(self.tokens, func, args, kwargs)
            if result is not None:
                return result
        return func(*args, **kwargs)


def float32_products(tokens: int | None) -> AbstractContextManager[object]:
    """Within the block, 16-bit products of `tokens` or more are computed in float32; None: all in 16 bits."""
    return nullcontext() if tokens is None and _innermost() is None else Float32Products(tokens)


def _innermost() -> Float32Products | None:
    """Returns the innermost mode of this thread; None outside, and in the compiler."""
    modes: list[Any] = [] if torch.compiler.is_compiling() else _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    return next((mode for mode in reversed(modes) if isinstance(mode, Float32Products)), None)


def _current_tokens() -> int | None:
    return None if (mode := _innermost()) is None else mode.tokens


def checkpoint_contexts() -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
    """The `context_fn` of torch's checkpoint: torch leaves all modes in a backward, which recomputing needs."""
    return nullcontext(), float32_products(_current_tokens())


def use_fastest_products(base: nn.Module) -> None:
    """Computes 16-bit products in float32 in every forward of a language model that has enough tokens.

    Within `Float32Products` each call of torch takes a microsecond longer, which forward passes over few tokens avoid.
    """
    tokens = fastest_products(base)
    if tokens is None:
        return
    forward = type(base).forward

    @wraps(forward)
    def with_products(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        ids = kwargs.get("input_ids", args[0] if args else None)
        with float32_products(tokens if ids is None or ids.numel() >= tokens else None):
            return forward(module, *args, **kwargs)

    base.forward = MethodType(with_products, base)  # a copy of the model gets its own


def pays(tokens: int, *operands: Any) -> bool:
    """True for 16-bit operands on a CPU if the first one has enough rows."""
    first = operands[0]
    return (
        all(isinstance(o, Tensor) and o.dtype in HALF and not is_traceable_wrapper_subclass(o) for o in operands)
        and first.device.type == "cpu"
        and first.numel() >= tokens * first.shape[-1]
    )


def _linear(tokens: int, _func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    if len(args) < 2 or not pays(tokens, *args[:2]) or args[1].ndim != 2:
        return None
    bias = args[2] if len(args) > 2 else kwargs.get("bias")
    y: Tensor = _Linear.apply(args[0], args[1], bias)  # type: ignore[no-untyped-call]
    return y


def _addmm(tokens: int, _func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """torch.addmm(b, x, W) of Conv1D and of a head with a bias, which writes to `out`; (y, x, B^T) of an adapter."""
    if len(args) != 3 or kwargs.keys() - {"out"} or not pays(tokens, *args[1:]):
        return None
    y: Tensor = _Linear.apply(args[1], args[2].mT, args[0])  # type: ignore[no-untyped-call]
    return y if "out" not in kwargs else kwargs["out"].copy_(y)


def _mm(tokens: int, _func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """torch.mm without gradients, as the loss calls it with the output head."""
    a, b = args
    if kwargs.keys() - {"out"} or not pays(tokens, a, b) or (torch.is_grad_enabled() and a.requires_grad):
        return None
    out = kwargs.get("out")
    if not b.is_contiguous():
        return float32_linear(a, b.mT, out=out)
    y = float32_product(a, b)
    return y if out is None else out.copy_(y)


def _sdpa(tokens: int, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    if not args or not pays(tokens, args[0]):
        return None

    def wide(value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) and value.dtype in HALF else value

    y: Tensor = func(*map(wide, args), **{name: wide(value) for name, value in kwargs.items()})
    return y.to(args[0].dtype)


REPLACEMENTS: dict[Any, Callable[..., Any]] = {  # kernels add theirs; None: torch's function is called
    F.linear: _linear,
    torch.addmm: _addmm,
    torch.mm: _mm,
    F.scaled_dot_product_attention: _sdpa,
}


# ---- Which products are faster in float32, on this machine


def fastest_products(base: nn.Module) -> int | None:
    """Returns the tokens from which on float32 is faster, measured once per machine and shape; None: never."""
    weights = [p for p in base.parameters() if p.ndim == 2 and p.dtype in HALF and p.device.type == "cpu"]
    if not weights:
        return None
    elements = Counter[tuple[torch.dtype, int, int]]()
    for weight in weights:
        elements[weight.dtype, weight.shape[0], weight.shape[1]] += weight.numel()
    (dtype, out_features, in_features), _ = elements.most_common(1)[0]
    rows = min(out_features, max(BLOCK_ELEMENTS // in_features, 1))
    key = " | ".join(
        (
            device_name(torch.device("cpu")),
            torch.backends.cpu.get_cpu_capability(),
            f"oneDNN up to {os.environ.get('ONEDNN_MAX_CPU_ISA', 'all')}",
            f"torch {torch.__version__}",
            f"{torch.get_num_threads()} threads",
            f"{dtype} ({rows}, {in_features})",
        )
    )
    file = cache_folder() / "products.json"
    known = _read(file)
    if key not in known:
        measured = _measure(dtype, rows, in_features)
        known = {key: measured, **_read(file)}  # the first process decides, so that equal runs compute the same
        with suppress(OSError):  # a folder that is read-only: measured again by the next process
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary = file.with_name(f"{file.name}.{os.getpid()}")
            temporary.write_text(json.dumps(known, indent=1))
            temporary.replace(file)
    return known[key]


def _read(file: Path) -> dict[str, int | None]:
    """Returns what was measured before; nothing if the file is missing or damaged."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _in_16_bits(x: Tensor, dy: Tensor, weight: Tensor) -> None:
    F.linear(x, weight)
    torch.mm(dy, weight)


def _in_float32(x: Tensor, dy: Tensor, weight: Tensor) -> None:
    float32_linear(x, weight)
    float32_product(dy, weight)


WAYS = (_in_16_bits, _in_float32)


@torch.no_grad()
def _measure(dtype: torch.dtype, rows: int, columns: int) -> int | None:
    """Returns the fewest of TOKENS from which on float32 is the faster way, forward and backward together."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    fewest = None
    for tokens in reversed(TOKENS):
        x = torch.randn(tokens, columns, generator=generator).to(dtype)
        dy = torch.randn(tokens, rows, generator=generator).to(dtype)
        times: list[list[float]] = [[], []]
        for _ in range(1 + TIMES):  # in turns; the first of each is not counted
            for way, seconds in zip(WAYS, times, strict=True):
                started = time.perf_counter()
                way(x, dy, weight)
                seconds.append(time.perf_counter() - started)
        if min(times[1][1:]) > WORTH * min(times[0][1:]):
            break
        fewest = tokens
    return fewest
