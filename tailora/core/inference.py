"""What `generate` gains on a CPU from adapters that stand still and rows that come one by one.

Decoding a token is all overhead: a product with one row reads its weight once. While `generate` runs,

    the adapters of a linear layer are held as two factors, cast and scaled once: two short products
    one row in bfloat16 goes to torch's own kernel; oneDNN's, made for many rows, takes 1.5 to 1.9 times as long

Measured on one core, SmolLM2-135M in bfloat16: 57 ms a token without adapter by oneDNN, 33 by torch; 71 with one of
rank 16 by oneDNN, 36 by torch.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from threading import Lock
from typing import Any, cast

import torch
from torch import Tensor, nn

from tailora.core.attach import Adapted, attach
from tailora.core.layer import LoRALayer
from tailora.core.layer_types import LINEAR

ROWS = 2  # tokens of a forward up to which torch's own kernel is the faster one


class Held:
    """In the place of a linear layer's adapters while nothing of them changes: adds B (A x), both of them cast."""

    def __init__(self, adapters: Sequence[LoRALayer], dtype: torch.dtype) -> None:
        pairs = [adapter.update_factors() for adapter in adapters]
        A, B = pairs[0] if len(pairs) == 1 else (torch.cat([A for A, _ in pairs]), torch.cat([B for _, B in pairs], 1))
        self.A = A.to(dtype)  # (r, in), of all adapters
        self.B = B.new_empty(B.shape[::-1], dtype=dtype).copy_(B.t())  # (r, out): the kernel reads its rows
        self.B_t, self.width = self.B.t(), A.shape[1]

    def added(self, y: Tensor, _base: Tensor, x: Tensor, _layer: nn.Module) -> Tensor:
        """y, the output of nn.Linear and nobody else's, with the update in it."""
        if x.numel() == self.width:
            y.view(-1).addmv_(self.B_t, torch.mv(self.A, x.reshape(-1)))
            return y
        y = y.contiguous()
        y.view(-1, y.shape[-1]).addmm_(torch.mm(x.reshape(-1, self.width), self.A.t()), self.B)
        return y


class _Kernel:
    """Which kernel multiplies one row: a setting of the whole process, so it is lent to one `generate` at a time."""

    def __init__(self) -> None:
        self._lent = Lock()

    @contextmanager
    def lent(self, base: nn.Module) -> Iterator[bool]:
        """Within the block, forwards of few tokens take torch's own kernel. False where another thread generates.

        Products of other threads would take it meanwhile, too, and it is slow with many rows.
        """
        if not (torch._C._get_mkldnn_enabled() and self._lent.acquire(blocking=False)):
            yield not torch._C._get_mkldnn_enabled()
            return
        hooks = [
            base.register_forward_pre_hook(_before, with_kwargs=True),
            base.register_forward_hook(_after, always_call=True),
        ]
        try:
            yield True
        finally:
            for hook in hooks:
                hook.remove()
            _after()
            self._lent.release()


def _before(_module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
    named = [given.get(name) for name in ("input_ids", "decoder_input_ids")]
    ids = [each for each in (*args, *named) if isinstance(each, Tensor)]
    torch._C._set_mkldnn_enabled(not (ids and max(each.numel() for each in ids) <= ROWS))


def _after(*_: Any) -> None:
    torch._C._set_mkldnn_enabled(True)


KERNEL = _Kernel()


@contextmanager
def generating(base: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Around `base.generate`: within the block adapters are taken for constants, without gradients.

    layers: those that are adapted. Elsewhere than on a CPU, and where a part is compiled, nothing is changed: a
    compiled layer would be compiled anew for every call.
    """
    weight = next(base.parameters(), torch.empty(0))
    compiled = any(module._compiled_call_impl is not None for module in base.modules())
    if weight.device.type != "cpu" or compiled or torch.is_autocast_enabled("cpu"):
        yield
        return
    half = weight.dtype == torch.bfloat16
    with torch.no_grad(), KERNEL.lent(base) if half else nullcontext(True) as own_kernel:
        held = _held(layers.values()) if own_kernel else {}
        for layer, (_, constant) in held.items():
            attach(layer, (constant,))  # type: ignore[arg-type]
        try:
            yield
        finally:
            for layer, (before, constant) in held.items():
                if cast(Any, layer).active_adapters == (constant,):  # else somebody switched meanwhile
                    attach(layer, before)


def _held(layers: Iterable[nn.Module]) -> dict[nn.Module, tuple[tuple[LoRALayer, ...], Held]]:
    """Of every layer that can: what it was attached to, and the constant for it."""
    found = {}
    for layer in layers:
        adapters = getattr(layer, "active_adapters", ())
        if adapters and isinstance(layer, Adapted) and layer.plain is nn.Linear and all(map(_stands_still, adapters)):
            weight = cast(nn.Linear, layer).weight
            if weight.dtype in (torch.bfloat16, torch.float32, torch.float64):
                found[cast(nn.Module, layer)] = adapters, Held(adapters, weight.dtype)
    return found


def _stands_still(adapter: Any) -> bool:
    """A product of two factors, and nothing is drawn."""
    plain = type(adapter) is LoRALayer and adapter.layer_type is LINEAR and adapter.is_plain
    return plain and not (adapter.training and adapter.lora_dropout)
