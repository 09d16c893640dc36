"""Quantized weights: how a layer stores its weight, its dense value, and dequantizing layers and models.

    Storage         a plain weight, and the methods that differ between storages
    FourBit, Int8   bitsandbytes: blocks NF4 and FP4 (QLoRA, arXiv:2305.14314, sec. 3), rows (arXiv:2208.07339, sec. 2)
    TorchAO         tensors that can dequantize themselves
    Packed          codes that only the layer itself can read: GPTQ, AWQ
    STORAGES        name of a class -> its storage, with functions for layers and models
    dense_weight    the dequantized weight of a layer
    dequantize_layer, dequantize_model
                    the reversible changes that dequantize a layer, or all other layers of a model

Storages are identified by the qualified name of a class, so none of the packages has to be installed.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import copy
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tailora.core.attach import Change, ClassChange, TensorChange, class_with_plain
from tailora.core.layer_types import qualified_name, weight_of, whole_tensor


class Storage:
    """A plain weight.

    rounding: maximum quantization error, as a share of the largest number in the row.
    weight_name: the layer's parameter or buffer with the numbers, or their codes.
    keeps_dtype: False if the precision before quantization is unknown.
    """

    rounding = 0.0
    weight_name = "weight"
    keeps_dtype = True

    def shape(self, layer: Any) -> torch.Size:
        """Returns the shape of the dense weight, (out, in)."""
        return weight_of(layer).shape

    def dense(self, layer: Any) -> Tensor:
        """Returns the dense weight in its precision before quantization, or in float32 if unknown."""
        return whole_tensor(weight_of(layer).detach())

    def spread(self, _layer: Any, dense: Tensor) -> Tensor:
        """Returns the maximum distance of the numbers from `dense` before quantization, (out, 1)."""
        return self.rounding * dense.float().abs().amax(dim=1, keepdim=True)

    def tensors(self, layer: Any) -> list[Tensor]:
        """Returns the plain tensors in memory."""
        return [weight_of(layer)]


class FourBit(Storage):
    """4-bit weights of bitsandbytes: each block of 64 numbers along a row is codes times the block's largest number."""

    rounding = 0.17  # half of the widest gap between codes is 1/6, of FP4

    def shape(self, layer: Any) -> torch.Size:
        return torch.Size(self.state(layer).shape)

    def dense(self, layer: Any) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        return cast(Tensor, dequantize_4bit(whole_tensor(layer.weight.data), self.state(layer)))

    def spread(self, layer: Any, dense: Tensor) -> Tensor:
        """With double quantisation, the blocks' largest numbers were rounded, too, by groups."""
        spread, state = super().spread(layer, dense), self.state(layer)
        if not state.nested:
            return spread
        largest_rounding: Tensor = state.state2.absmax.max() * state.state2.code.sort().values.diff().max() / 2
        return spread + (1 + self.rounding) * largest_rounding

    def tensors(self, layer: Any) -> list[Tensor]:
        state = self.state(layer)
        nested = [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
        return [layer.weight.data, state.absmax, state.code, *nested]

    def state(self, layer: Any) -> Any:
        """Returns bitsandbytes' state of the quantisation; FSDP leaves it on the layer alone."""
        state = getattr(layer.weight, "quant_state", None)
        return layer.quant_state if state is None else state

    def is_misread(self, layer: Any) -> bool:
        """Returns True if blocks that go on in the next row get the largest number of another block."""
        from bitsandbytes.functional import dequantize_4bit

        state = self.state(layer)
        in_one_row = copy(state)
        in_one_row.shape = torch.Size((1, state.shape.numel()))
        return state.shape[1] % state.blocksize > 0 and not torch.equal(
            dequantize_4bit(whole_tensor(layer.weight.data), in_one_row).view(state.shape), self.dense(layer)
        )


class Int8(Storage):
    """8-bit weights of bitsandbytes: 127 is the largest number of the row."""

    rounding = 1 / 254 + 2**-11  # it was rounded to float16 first
    keeps_dtype = False

    def dense(self, layer: Any) -> Tensor:
        return cast(Tensor, layer.weight.data.float() * (self._scales(layer).float() / 127))

    def tensors(self, layer: Any) -> list[Tensor]:
        return [layer.weight.data, self._scales(layer)]

    def _scales(self, layer: Any) -> Tensor:
        """Returns the largest of each row, (out, 1); the first forward moves it from the weight to the layer."""
        of_weight = getattr(layer.weight, "SCB", None)
        scales: Tensor = layer.state.SCB if of_weight is None else of_weight
        return scales[:, None].to(layer.weight.device)


class TorchAO(Storage):
    rounding = 0.075  # half a step of 7 levels, which no format of 4 bits exceeds, with room for a scale in bfloat16

    def dense(self, layer: Any) -> Tensor:
        return cast(Tensor, layer.weight.dequantize())

    def tensors(self, layer: Any) -> list[Tensor]:
        return list(inner_tensors(layer.weight))


class Packed(Storage):
    """A layer without a weight: gptqmodel's for GPTQ and AWQ. Its forward dequantizes W, which is then caught.

    Where it does not, its outputs for the unit vectors are W.
    """

    rounding = 0.5  # calibration moves numbers further than to the next code
    weight_name = "qweight"
    keeps_dtype = False

    def shape(self, layer: Any) -> torch.Size:
        return torch.Size((layer.out_features, layer.in_features))

    @torch.no_grad()
    def dense(self, layer: Any) -> Tensor:
        forward, like = plain_forward(layer), self.scales(layer)
        if (weight := caught_weight(layer, like)) is not None:
            return weight
        columns = torch.empty(layer.in_features, layer.out_features, dtype=like.dtype, device=like.device)
        for start in range(0, layer.in_features, UNIT_VECTORS):
            block = columns[start : start + UNIT_VECTORS]
            x = torch.zeros(len(block), layer.in_features, dtype=like.dtype, device=like.device)
            x.diagonal(start).fill_(1)
            block.copy_(forward(x) - forward(torch.zeros_like(x[:1])))
        return columns.T.contiguous()

    def tensors(self, layer: Any) -> list[Tensor]:
        weight, values = (
            stored_weight(layer),
            (*vars(layer).values(), *layer._parameters.values(), *layer._buffers.values()),
        )
        return [weight, *(value for value in values if isinstance(value, Tensor) and value is not weight)]

    def scales(self, layer: Any) -> Tensor:
        return next(tensor for tensor in self.tensors(layer)[1:] if tensor.is_floating_point())


UNIT_VECTORS = 1024  # rows of a batch


class _Matrices(TorchDispatchMode):
    """Keeps the matrices that operators read."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.kept += [value for value in args if isinstance(value, Tensor) and value.ndim == 2]
        return func(*args, **(kwargs or {}))


def caught_weight(layer: Any, like: Tensor) -> Tensor | None:
    """Returns the matrix (out, in) that the layer multiplies by; None if it is no operand. like: dtype and device."""
    forward, shape = plain_forward(layer), (layer.out_features, layer.in_features)
    x = torch.randn(2, shape[1], generator=torch.Generator().manual_seed(0), device="cpu").to(like)
    with torch.compiler.set_stance("force_eager"):  # before `drop_compiled`
        with _Matrices() as matrices:
            y = forward(x)
        change = (y - forward(-x)).float() / 2  # W x
    views = [view for matrix in reversed(matrices.kept) for view in (matrix, matrix.T)]
    for matrix in (view for view in views if view.shape == shape):
        if (x.float() @ matrix.float().T - change).norm() <= 8 * torch.finfo(x.dtype).eps * change.norm():
            return cast(Tensor, matrix.contiguous().clone())
    return None


def plain_forward(layer: Any) -> Callable[[Tensor], Tensor]:
    """Returns the forward of the layer without its adapters."""
    return partial(getattr(layer, "plain", type(layer)).forward, layer)


def inner_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """Yields the plain tensors that a tensor subclass wraps; the tensor itself if it wraps none."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        if isinstance(part := getattr(tensor, name), Tensor):  # a DTensor also has its mesh there
            yield from inner_tensors(part)


PLAIN, FOUR_BIT, INT8, TORCHAO = Storage(), FourBit(), Int8(), TorchAO()

STORAGES: dict[str, Storage] = {  # by the class of the weight, or of the layer: a pickle loses the weight's class
    "bitsandbytes.nn.modules.Params4bit": FOUR_BIT,
    "bitsandbytes.nn.modules.Linear4bit": FOUR_BIT,
    "bitsandbytes.nn.modules.Int8Params": INT8,
    "bitsandbytes.nn.modules.Linear8bitLt": INT8,
    "torchao.utils.TorchAOBaseTensor": TORCHAO,
    "gptqmodel.nn_modules.qlinear.BaseQuantLinear": Packed(),
}


# ---- Layers and models


def storage_of(layer: nn.Module) -> Storage:
    """Returns how the layer's weight is stored. bitsandbytes' weights are plain until they first move to a device."""
    weight = getattr(layer, "weight", None)
    names = map(qualified_name, (*type(weight).__mro__, *type(layer).__mro__))
    storage = next((STORAGES[name] for name in names if name in STORAGES), PLAIN)
    if isinstance(storage, Packed):
        return storage
    is_plain = not isinstance(weight, Tensor) or (storage is not TORCHAO and weight.dtype.is_floating_point)
    return PLAIN if is_plain else storage


def stored_weight(layer: nn.Module, name: str = "weight") -> Tensor:
    """Returns the parameter or buffer that contains the layer's weight, or its codes."""
    return weight_of(layer, storage_of(layer).weight_name if name == "weight" else name)


def is_quantized(layer: nn.Module) -> bool:
    return storage_of(layer) is not PLAIN


def quantized_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {path: module for path, module in model.named_modules() if is_quantized(module)}


def dense_weight(layer: nn.Module, name: str = "weight", dtype: torch.dtype | None = None) -> Tensor:
    """Returns the layer's dense weight in the layout of its class, which is the weight itself unless it is quantized.

    It has the precision before quantization. A storage that does not keep this precision uses `dtype`, such as the
    dtype of the model's other weights, or its own. name: of a different parameter, which is never quantized.
    """
    if name != "weight" or not is_quantized(layer):
        return whole_tensor(weight_of(layer, name).detach())
    storage = storage_of(layer)
    return storage.dense(layer).to(None if storage.keeps_dtype else dtype)


def dense_shape(layer: nn.Module, name: str = "weight") -> torch.Size:
    return storage_of(layer).shape(layer) if name == "weight" else weight_of(layer, name).shape


def is_transposed(layer: nn.Module) -> bool:
    """Returns True if transformers made the layer from a Conv1D, whose weight is (in, out) in every file."""
    return is_quantized(layer) and getattr(vars(layer).get("source_cls"), "__name__", "") == "Conv1D"


def in_file_layout(layer: nn.Module, weight: Tensor) -> Tensor:
    """Returns the dense weight, or a tensor of its shape, in the layout that files have."""
    return weight.T if is_transposed(layer) else weight


def weight_count(module: nn.Module) -> int:
    """Returns the number of parameters before quantisation, which packs several into one."""
    quantized = _by_stored_weight(module)
    plain = sum(parameter.numel() for parameter in module.parameters() if id(parameter) not in quantized)
    biases = [getattr(layer, "bias", None) for layer in quantized.values()]  # of packed layers no parameters
    plain += sum(b.numel() for b in biases if isinstance(b, Tensor) and not isinstance(b, nn.Parameter))
    return plain + sum(dense_shape(layer).numel() for layer in quantized.values())


def _by_stored_weight(module: nn.Module) -> dict[int, nn.Module]:
    """Returns id of the stored weight -> quantized layer."""
    return {id(stored_weight(layer)): layer for layer in module.modules() if is_quantized(layer)}


def named_stored_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor, list[Tensor]]]:
    """Yields the name of every parameter and buffer, itself, and the plain tensors in memory that it consists of."""
    quantized = _by_stored_weight(module)
    seen: dict[int, Tensor] = {}
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        layer = quantized.get(id(tensor))
        parts = [tensor] if layer is None else storage_of(layer).tensors(layer)
        yield name, tensor, [part for part in parts if id(part) not in seen]
        seen |= {id(part): part for part in parts}


def stored_tensors(module: nn.Module) -> Iterator[Tensor]:
    return (part for _, _, parts in named_stored_tensors(module) for part in parts)


def stored_bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in stored_tensors(module))


# ---- Turning quantised layers and models into plain ones: the same objects

# Attributes that bitsandbytes and transformers leave on quantised layers, models and configs.
BITSANDBYTES = {"compute_dtype", "compute_type_is_set", "quant_state", "quant_storage", "support_avx512bf16_for_cpu"}
OF_LAYERS = frozenset(BITSANDBYTES | {"state", "index", "source_cls", "extra_repr", "_hf_quantized_needs_local_tp"})
OF_MODELS = frozenset(("is_quantized", "quantization_method", "hf_quantizer", "is_loaded_in_4bit", "is_loaded_in_8bit"))
OF_CONFIGS = frozenset(("quantization_config", "_is_quantized"))


def dequantize_layer(layer: nn.Module, weight: Tensor) -> Iterator[Change]:
    """Yields the changes to the plain class of the layer, with this dense weight (out, in)."""
    if isinstance(storage_of(layer), Packed):
        yield _to_linear(layer, weight)
        return
    added: dict[str, Any] = {}
    if is_transposed(layer):
        weight = weight.T.contiguous()
        cls = vars(layer)["source_cls"]
        added = {"nx": weight.shape[0], "nf": weight.shape[1]}
    else:
        former_class = getattr(layer, "plain", type(layer))
        cls = next(parent for parent in former_class.__mro__ if not _is_of_bitsandbytes(parent))
    yield TensorChange(layer, "weight", nn.Parameter(weight, requires_grad=False))
    hooks = layer._load_state_dict_pre_hooks
    other_hooks = {key: hook for key, hook in hooks.items() if not _is_of_bitsandbytes(getattr(hook, "hook", hook))}
    if len(other_hooks) < len(hooks):
        added["_load_state_dict_pre_hooks"] = OrderedDict(other_hooks)
    yield ClassChange(layer, class_with_plain(layer, cls), added, OF_LAYERS)


def dequantize_to_linear(layer: nn.Module) -> Iterator[Change]:
    """Yields the changes to nn.Linear with the dense weight in float32; its adapters compute the same as before."""
    if isinstance(storage_of(layer), Packed):
        yield _to_linear(layer, dense_weight(layer).float())
        return
    yield TensorChange(layer, "weight", nn.Parameter(dense_weight(layer).float(), requires_grad=False))
    yield ClassChange(layer, class_with_plain(layer, nn.Linear), {}, frozenset())


def _to_linear(layer: Any, weight: Tensor) -> ClassChange:
    """Returns the change of a layer without a weight to nn.Linear."""
    parameters = {"weight": nn.Parameter(weight, requires_grad=False), "bias": None}
    if isinstance(bias := getattr(layer, "bias", None), Tensor):
        parameters["bias"] = nn.Parameter(bias.detach().to(weight), requires_grad=False)
    sizes = {"in_features": layer.in_features, "out_features": layer.out_features}
    added = {**sizes, "_parameters": parameters, "_buffers": {}, "_non_persistent_buffers_set": set()}
    kept = {*vars(nn.Module()), *added, "adapter_parts"}
    return ClassChange(layer, class_with_plain(layer, nn.Linear), added, frozenset(vars(layer).keys() - kept))


def _is_of_bitsandbytes(value: Any) -> bool:
    return str(getattr(value, "__module__", "")).startswith("bitsandbytes.")


def dequantize_model(model: nn.Module, exclude: Iterable[nn.Module], dtype: torch.dtype) -> Iterator[Change]:
    """Yields the changes to all other quantized layers: transformers cannot read a partly quantized model."""
    excluded = {id(layer) for layer in exclude}
    for layer in quantized_layers(model).values():
        if id(layer) not in excluded:
            yield from dequantize_layer(layer, dense_weight(layer, dtype=dtype))
    for module in model.modules():  # a model within a model is marked, too
        if OF_MODELS & vars(module).keys():
            yield ClassChange(module, type(module), {}, OF_MODELS)
    config = getattr(model, "config", None)
    if config is not None and OF_CONFIGS & vars(config).keys():
        yield ClassChange(config, type(config), {}, OF_CONFIGS)


def common_dtype(model: nn.Module) -> torch.dtype:
    """Returns the dtype of the weights that are not quantised; float32 if there are none."""
    quantized = _by_stored_weight(model)
    dtypes = (p.dtype for p in model.parameters() if id(p) not in quantized and p.is_floating_point())
    return next(dtypes, torch.float32)


# ---- Obstacles

# What the forward of a quantized layer may raise for a small input
FORWARD_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
GRADIENT_ERROR = 0.05  # relative; a layer that rounds its inputs to 8 bits stays below


def gradient_obstacle(layer: nn.Module, dtype: torch.dtype | None) -> str | None:
    """Returns why a quantized layer does not propagate gradients; None if it does. dtype: as in `gradient_problems`.

    For inputs u, W^T must map the outputs' change W u to a gradient whose product with u is |W u|^2.
    """
    name, mode, forward = type(layer).__name__, layer.training, plain_forward(layer)
    device = stored_weight(layer).device
    u = torch.randn(8, dense_shape(layer)[1], generator=torch.Generator().manual_seed(0), device="cpu")
    try:
        layer.train()  # some kernels refuse
        dtype = cast(Packed, storage_of(layer)).scales(layer).dtype if dtype is None else dtype
        x = u.to(device, dtype).requires_grad_()
        with torch.enable_grad():
            output = forward(x)
        with torch.no_grad():
            change = (output - forward(-x)).float() / 2  # W u
        expected = change.norm()
        (gradient,) = torch.autograd.grad(output, x, (change / expected).to(output))
    except FORWARD_ERRORS as error:
        cause = str(error).partition("\n")[0] or type(error).__name__
        return f"gradients cannot pass {name}: {cause}"
    finally:
        if layer.training != mode:
            layer.train(mode)
    difference = float(((gradient * x.detach()).float().sum() / expected - 1).abs())
    return None if difference <= GRADIENT_ERROR else f"the gradient of {name} is off by {difference:.0%}"


def gradient_problems(layers: Mapping[str, nn.Module], dtype: torch.dtype | None = None) -> list[str]:
    """Returns problems with the gradients of these quantized layers. Tries one layer of each class.

    dtype: of its inputs; by default of its scales, which only packed layers have.
    """
    one_of_each = {type(layer): path for path, layer in layers.items()}
    reasons = {path: gradient_obstacle(layers[path], dtype) for path in one_of_each.values()}
    return [f"{path}: {reason}" for path, reason in reasons.items() if reason]


def packed_layers(layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    return {path: layer for path, layer in layers.items() if isinstance(storage_of(layer), Packed)}


def storage_obstacle(layer: nn.Module) -> str | None:
    """Returns why a layer cannot be adapted in its current storage; None if it can."""
    if storage_of(layer) is not FOUR_BIT:
        return None
    state = FOUR_BIT.state(layer)
    if getattr(state, "packing_format_for_cpu", False):
        return (
            "bitsandbytes repacked its weight for inference, which rounds it and prevents gradients; reload the base, "
            "and add the adapter before evaluating it"
        )
    if FOUR_BIT.is_misread(layer):
        return (
            f"bitsandbytes (0.50 on a CPU) uses a wrong weight, because {state.shape[1]} inputs are not a multiple of "
            f"its block size {state.blocksize}; quantize to 8 bits, or exclude this layer"
        )
    return None


# ---- What the packages do to weights later


def prevent_repacking(model: nn.Module) -> list[nn.Module]:
    """Prevents bitsandbytes from repacking 4-bit weights in place at the first evaluation on a CPU with AVX512-BF16.

    Repacking rounds the blocks' scales to bfloat16, which changes the base, and disables gradients: training after an
    evaluation would be silently wrong (bitsandbytes 0.50). Returns the layers for `allow_repacking`.
    """
    drop_compiled(model)
    layers = [layer for layer in model.modules() if vars(layer).get("support_avx512bf16_for_cpu")]
    for layer in layers:
        vars(layer)["support_avx512bf16_for_cpu"] = False
    return layers


def drop_compiled(model: nn.Module) -> None:
    """Drops the functions that gptqmodel 7.7 compiles to dequantize weights; its layers then use the original.

    The compiled ones fail where torch functions are overridden, as in training.
    """
    for layer in packed_layers(dict(model.named_modules())).values():
        vars(layer).pop("dequantize_weight", None)


def allow_repacking(layers: list[nn.Module]) -> None:
    """Allows bitsandbytes to repack these layers again, unless a merge has dequantized them."""
    for layer in layers:
        if is_quantized(layer):
            vars(layer)["support_avx512bf16_for_cpu"] = True
