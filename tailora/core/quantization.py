"""What the dense value of a stored weight is: one row of a table per class of weight.

    plain            the weight itself
    bitsandbytes     4-bit blocks NF4 and FP4 (QLoRA, arXiv:2305.14314, sec. 3), int8 rows (arXiv:2208.07339, sec. 2)
    torchao          tensors that say their own dense value

Found by the qualified name of the weight's class, so that neither package need be there to look.
"""

from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tailora.core.layer_types import qualified_name, weight_of


@dataclass(frozen=True)
class Base:
    """name: layer -> the format in a word.    shape: layer -> of its dense weight, (out, in).
    dense: layer -> that weight, in the precision that it was quantised from where this is known, else float32.
    spread: (layer, dense) -> how far the numbers that were quantised may be from it; broadcasts to (out, in).
    again: (layer, rows (n, in)) -> what the same quantisation would make of them.
    tensors: layer -> what is held in memory.
    """

    name: Callable[[Any], str]
    shape: Callable[[Any], torch.Size]
    dense: Callable[[Any], Tensor]
    spread: Callable[[Any, Tensor], Tensor]
    again: Callable[[Any, Tensor], Tensor]
    tensors: Callable[[Any], list[Tensor]]


# ---- bitsandbytes, 4 bits: blocks of 64 numbers along the rows, each a code times the block's largest


def _state(layer: Any) -> Any:
    """Of the quantisation; FSDP leaves it on the layer alone."""
    own = getattr(layer.weight, "quant_state", None)
    return layer.quant_state if own is None else own


def _blocks_dense(layer: Any) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    value: Tensor = dequantize_4bit(layer.weight.data, _state(layer))
    return value


def _blocks_spread(layer: Any, dense: Tensor) -> Tensor:
    """Half the widest gap between codes, of the block's largest; double quantisation rounds that one, too."""
    from bitsandbytes.functional import dequantize_blockwise

    state, slack = _state(layer), torch.zeros(())
    largest = state.absmax.float()  # (blocks,)
    if state.nested:
        largest = dequantize_blockwise(state.absmax, state.state2).float() + state.offset
        groups = state.state2.absmax.float().repeat_interleave(state.state2.blocksize)
        slack = _half_gap(state.state2.code) * groups[: len(largest)]
    blocks = (largest + slack) * _half_gap(state.code) + slack
    return torch.as_tensor(blocks.repeat_interleave(state.blocksize)[: dense.numel()].view(dense.shape))


def _half_gap(code: Tensor) -> Tensor:
    return code.sort().values.diff().max() / 2


def _blocks_again(layer: Any, rows: Tensor) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    state = _state(layer)
    again: Tensor = dequantize_4bit(
        *quantize_4bit(
            rows.contiguous(),
            blocksize=state.blocksize,
            compress_statistics=state.nested,
            quant_type=state.quant_type,
            quant_storage=layer.weight.dtype,
        )
    )
    return again


def _blocks_tensors(layer: Any) -> list[Tensor]:
    state = _state(layer)
    inner = [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
    return [layer.weight.data, state.absmax, state.code, *inner]


FOUR_BITS = Base(
    name=lambda layer: str(_state(layer).quant_type),
    shape=lambda layer: torch.Size(_state(layer).shape),
    dense=_blocks_dense,
    spread=_blocks_spread,
    again=_blocks_again,
    tensors=_blocks_tensors,
)


# ---- bitsandbytes, 8 bits: 127 is the row's largest


def _scales(layer: Any) -> Tensor:
    """Largest of each row, (out, 1); the first forward moves it from the weight to the layer."""
    own = getattr(layer.weight, "SCB", None)
    scales = layer.state.SCB if own is None else own
    return scales[:, None].to(layer.weight.device)  # type: ignore[no-any-return]


def _rows_again(_: Any, rows: Tensor) -> Tensor:
    largest = rows.float().abs().amax(dim=1, keepdim=True).clamp(min=1e-30)
    return (rows.float() * (127 / largest)).round() * (largest / 127)


INT8_ROWS = Base(
    name=lambda _: "int8",
    shape=lambda layer: layer.weight.shape,
    dense=lambda layer: layer.weight.data.float() * (_scales(layer).float() / 127),
    spread=lambda layer, _: _scales(layer).float() * (1 / 254 + 2**-11),  # by way of float16
    again=_rows_again,
    tensors=lambda layer: [layer.weight.data, _scales(layer)],
)


# ---- torchao


def _steps(layer: Any) -> Tensor | None:
    """Of a uniform grid with one step per block, as (out, in); None where the tensor does not hold it that way."""
    weight = layer.weight
    scale, blocks = getattr(weight, "scale", None), getattr(weight, "block_size", None)
    if scale is None or blocks is None or [s * b for s, b in zip(scale.shape, blocks, strict=False)] != [*weight.shape]:
        return None
    for dim, block in enumerate(blocks):
        scale = scale.repeat_interleave(block, dim)
    return scale.float()  # type: ignore[no-any-return]


def _grid_spread(layer: Any, dense: Tensor) -> Tensor:
    """Half a step; without a step that of 15 levels over the row, which no format of 4 bits or more exceeds."""
    steps = _steps(layer)
    return dense.float().abs().amax(dim=1, keepdim=True) / 15 if steps is None else steps / 2


def _grid_again(layer: Any, rows: Tensor) -> Tensor:
    """By one step for each row or block of it, as far from zero as the largest number is; 15 levels where unknown."""
    steps = _steps(layer)
    if steps is None:
        step = rows.abs().amax(dim=1, keepdim=True).clamp(min=1e-30) / 7.5
        return (rows / step).round() * step
    levels = round(float((layer.weight.dequantize().float().abs() / steps).max()))
    block = layer.weight.block_size[1]
    parts = rows.float().reshape(len(rows), -1, block)
    step = parts.abs().amax(dim=2, keepdim=True).clamp(min=1e-30) / levels
    return ((parts / step).round() * step).reshape(rows.shape)


def made_of(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a tensor of a class of its own wraps; itself where it wraps none."""
    names = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else None
    if names is None:
        yield tensor
        return
    for name in names:
        yield from made_of(getattr(tensor, name))


TORCHAO = Base(
    name=lambda layer: f"torchao {type(layer.weight).__name__}",
    shape=lambda layer: layer.weight.shape,
    dense=lambda layer: layer.weight.dequantize(),
    spread=_grid_spread,
    again=_grid_again,
    tensors=lambda layer: list(made_of(layer.weight)),
)

PLAIN = Base(
    name=lambda _: "plain",
    shape=lambda layer: weight_of(layer).shape,
    dense=lambda layer: weight_of(layer).detach(),
    spread=lambda _, dense: dense.new_zeros(()),
    again=lambda _, rows: rows,
    tensors=lambda layer: [weight_of(layer)],
)

BASES: dict[str, Base] = {  # by the class of the weight, or of the layer: a pickle forgets that of the weight
    "bitsandbytes.nn.modules.Params4bit": FOUR_BITS,
    "bitsandbytes.nn.modules.Linear4bit": FOUR_BITS,
    "bitsandbytes.nn.modules.Int8Params": INT8_ROWS,
    "bitsandbytes.nn.modules.Linear8bitLt": INT8_ROWS,
    "torchao.utils.TorchAOBaseTensor": TORCHAO,
}


def base_of(layer: nn.Module) -> Base:
    """How the layer's weight is stored. bitsandbytes' weights are plain until they are first moved to a device."""
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor):
        return PLAIN
    classes = (*type(weight).__mro__, *type(layer).__mro__)
    row = next((BASES[name] for cls in classes if (name := qualified_name(cls)) in BASES), PLAIN)
    return PLAIN if row is not TORCHAO and weight.dtype.is_floating_point else row


def is_quantized(layer: nn.Module) -> bool:
    return base_of(layer) is not PLAIN


def quantized_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> layer."""
    return {path: module for path, module in model.named_modules() if is_quantized(module)}


def dense_weight(layer: nn.Module, name: str = "weight", others: torch.dtype | None = None) -> Tensor:
    """The layer's weight as numbers, in the layout of its class: the weight itself where it is not quantised.

    In the precision that was quantised. Where that is forgotten (int8) in `others`, that of the model's other weights,
    or float32. `name`: of another parameter, which is never quantised.
    """
    if name != "weight" or not is_quantized(layer):
        return weight_of(layer, name).detach()
    value = base_of(layer).dense(layer)
    return value.to(others) if others is not None and base_of(layer) is INT8_ROWS else value


def dense_shape(layer: nn.Module, name: str = "weight") -> torch.Size:
    return base_of(layer).shape(layer) if name == "weight" else weight_of(layer, name).shape


def is_transposed(layer: nn.Module) -> bool:
    """Whether transformers made the layer from a Conv1D, whose weight is (in, out) in every file."""
    return is_quantized(layer) and getattr(vars(layer).get("source_cls"), "__name__", "") == "Conv1D"


def as_loaded(layer: nn.Module, weight: Tensor) -> Tensor:
    """The dense weight (or what belongs to its numbers) in the layout that the layer's files have."""
    return weight.T if is_transposed(layer) else weight


def weight_count(module: nn.Module) -> int:
    """Parameters as they were before quantisation, which packs several into one."""
    packed = {id(layer.weight): layer for layer in module.modules() if is_quantized(layer)}
    return sum(
        dense_shape(packed[id(parameter)]).numel() if id(parameter) in packed else parameter.numel()
        for parameter in module.parameters()
    )


def held_parts(module: nn.Module) -> Iterator[tuple[str, Tensor, list[Tensor]]]:
    """Name of every parameter and buffer, itself, and the plain tensors that it is made of."""
    packed = {id(layer.weight): layer for layer in module.modules() if is_quantized(layer)}
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        layer = packed.get(id(tensor))
        yield name, tensor, [tensor] if layer is None else base_of(layer).tensors(layer)


def held_tensors(module: nn.Module) -> Iterator[Tensor]:
    """All that is in memory of it, as plain tensors."""
    return (part for _, _, parts in held_parts(module) for part in parts)


def held_bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in held_tensors(module))


# ---- bitsandbytes on a CPU


def base_obstacle(layer: nn.Module) -> str | None:
    """Why a layer cannot be adapted as it is stored now; None when nothing is in the way."""
    if base_of(layer) is FOUR_BITS and getattr(_state(layer), "packing_format_for_cpu", False):
        return (
            "bitsandbytes repacked its weight for inference when the base was evaluated, which rounds it and lets no "
            "gradient pass; load the base again and attach the adapter before evaluating it"
        )
    if base_of(layer) is FOUR_BITS and _misread(layer):
        return (
            f"bitsandbytes computes another weight than was quantised: {dense_shape(layer)[1]} inputs are no multiple "
            f"of its block of {_state(layer).blocksize} (0.50 on a CPU); quantise in 8 bits, or leave this layer out"
        )
    return None


def _misread(layer: Any) -> bool:
    """Whether blocks that go on in the next row get the largest number of another: the same codes as one row tell."""
    from bitsandbytes.functional import dequantize_4bit

    state = _state(layer)
    if state.shape[1] % state.blocksize == 0:
        return False
    flat = copy(state)
    flat.shape = torch.Size((1, state.shape.numel()))
    return not torch.equal(dequantize_4bit(layer.weight.data, flat).view(state.shape), _blocks_dense(layer))


def keep_as_stored(model: nn.Module) -> list[nn.Module]:
    """Keep bitsandbytes from repacking 4-bit weights in place at the first evaluation on a CPU with AVX512-BF16.

    Repacking rounds the blocks' scales to bfloat16, so that the base is no longer what it was, and its product has no
    gradient: training after an evaluation would be wrong in silence (bitsandbytes 0.50). Returns the layers that
    `may_repack` gives the choice back to.
    """
    layers = [layer for layer in model.modules() if vars(layer).get("support_avx512bf16_for_cpu")]
    for layer in layers:
        vars(layer)["support_avx512bf16_for_cpu"] = False
    return layers


def may_repack(layers: list[nn.Module]) -> None:
    for layer in layers:
        if is_quantized(layer):  # and not merged into a plain one
            vars(layer)["support_avx512bf16_for_cpu"] = True
