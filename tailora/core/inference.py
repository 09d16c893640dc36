"""What `generate` does on a CPU to decode faster: adapters do not change, and tokens come one by one.

A product with one token reads its weight once, so all else is overhead. While `generate` runs,

    the adapters of a linear layer are two constant factors, cast and scaled once: two short products
    one token in bfloat16 goes to torch's own kernel; oneDNN's, made for many tokens, takes 1.5 to 1.9 times as long

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

FEW_TOKENS = 2  # up to this many in a forward, torch's own kernel is the faster one
KERNEL_LOCK = Lock()


@contextmanager
def generating(base: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """The context of `base.generate`: within the block adapters are constants, without gradients.

    layers: the adapted ones. Does nothing off the CPU or if a part of the model is compiled: a compiled layer would be
    compiled again for every call.
    """
    weight = next(base.parameters(), torch.empty(0))
    compiled = any(module._compiled_call_impl is not None for module in base.modules())
    if weight.device.type != "cpu" or compiled or torch.is_autocast_enabled("cpu"):
        yield
        return
    kernel = few_token_kernel(base) if weight.dtype == torch.bfloat16 else nullcontext(True)
    with torch.no_grad(), kernel as has_kernel:
        constants = _constant_updates(layers.values()) if has_kernel else {}
        for layer, (_, constant) in constants.items():
            attach(layer, (constant,))  # type: ignore[arg-type]
        try:
            yield
        finally:
            for layer, (adapters, constant) in constants.items():
                if cast(Any, layer).active_adapters == (constant,):  # else the adapter was switched meanwhile
                    attach(layer, adapters)


def _constant_updates(layers: Iterable[nn.Module]) -> dict[nn.Module, tuple[tuple[LoRALayer, ...], "ConstantUpdate"]]:
    """Returns layer -> its adapters and the constant that replaces them, for all layers that allow it."""
    constants = {}
    for layer in layers:
        adapters = getattr(layer, "active_adapters", ())
        if adapters and isinstance(layer, Adapted) and layer.plain is nn.Linear and all(map(_is_constant, adapters)):
            weight = cast(nn.Linear, layer).weight
            if weight.dtype in (torch.bfloat16, torch.float32, torch.float64):
                constants[cast(nn.Module, layer)] = adapters, ConstantUpdate(adapters, weight.dtype)
    return constants


def _is_constant(adapter: Any) -> bool:
    """Returns True for a product of two factors without dropout."""
    is_plain = type(adapter) is LoRALayer and adapter.layer_type is LINEAR and adapter.is_plain
    return is_plain and not (adapter.training and adapter.lora_dropout)


class ConstantUpdate:
    """Replaces the adapters of a linear layer while they do not change: adds B (A x), with both factors cast."""

    def __init__(self, adapters: Sequence[LoRALayer], dtype: torch.dtype) -> None:
        As, Bs = zip(*(adapter.update_factors() for adapter in adapters), strict=True)
        A, B = (As[0], Bs[0]) if len(adapters) == 1 else (torch.cat(As), torch.cat(Bs, 1))
        self.A = A.to(dtype)  # (r, in), of all adapters
        self.B = B.new_empty(B.shape[::-1], dtype=dtype).copy_(B.t())  # (r, out): the kernel reads its rows
        self.B_t, self.in_features = self.B.t(), A.shape[1]

    def add_to(self, y: Tensor, _output: Tensor, x: Tensor, _layer: nn.Module) -> Tensor:
        """Adds the update to y in place: y is the output of nn.Linear, which nothing else refers to."""
        if x.numel() == self.in_features:
            y.view(-1).addmv_(self.B_t, torch.mv(self.A, x.reshape(-1)))
            return y
        y = y.contiguous()
        y.view(-1, y.shape[-1]).addmm_(torch.mm(x.reshape(-1, self.in_features), self.A.t()), self.B)
        return y


@contextmanager
def few_token_kernel(base: nn.Module) -> Iterator[bool]:
    """Within the block, forwards of few tokens use torch's own kernel. Yields False while another thread uses it.

    The choice is a setting of the whole process, so only one `generate` at a time makes it: it also holds for products
    of other threads, and is slow with many tokens.
    """
    if not (torch._C._get_mkldnn_enabled() and KERNEL_LOCK.acquire(blocking=False)):
        yield not torch._C._get_mkldnn_enabled()
        return
    hooks = [
        base.register_forward_pre_hook(_choose_kernel, with_kwargs=True),
        base.register_forward_hook(_use_onednn, always_call=True),
    ]
    try:
        yield True
    finally:
        for hook in hooks:
            hook.remove()
        _use_onednn()
        KERNEL_LOCK.release()


def _choose_kernel(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    named = [kwargs.get(name) for name in ("input_ids", "decoder_input_ids")]
    ids = [value for value in (*args, *named) if isinstance(value, Tensor)]
    torch._C._set_mkldnn_enabled(not (ids and max(tensor.numel() for tensor in ids) <= FEW_TOKENS))


def _use_onednn(*_: Any) -> None:
    torch._C._set_mkldnn_enabled(True)
