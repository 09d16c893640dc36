"""Decoder layers compiled by torch.compile, of any architecture: the same results in fewer passes over memory.

A layer is compiled as a whole, without graph breaks, once for each kind of layer and not for each layer or length:
attention is one operator that reads the documents' lengths inside. Only calls that compute gradients are compiled;
evaluation and generation are not. torch keeps the code on disk: a later process traces the layer and loads the code.

    decoder_layers        the layers of a model, by structure
    obstacle_to_compiling why a model's layers cannot be compiled
    CompiledLayers        compiled code, and the block in which a model uses it
    paying_tokens         how long a run has to be to make up for compiling
"""

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._dynamo import config as dynamo_config
from torch._dynamo.eval_frame import is_dynamo_supported
from torch._dynamo.exc import TorchDynamoException
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InductorError, InvalidCxxCompiler
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from torch.distributed.fsdp import FSDPModule
from torch.utils._triton import has_triton
from transformers.modeling_layers import GradientCheckpointingLayer

from tailora.core.attach import Adapted, attached_parts
from tailora.core.cache import cache_folder
from tailora.core.device import cpu_flags
from tailora.core.layer_types import computing_device
from tailora.patches import compiled_call, set_compiled_call

COMPILER_ERRORS = (TorchDynamoException, InductorError)
CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
CACHE_FUNCTIONS = "autograd_cache_allow_custom_autograd_functions"  # as `core.float32_products` has; not in torch 2.7
GRAD_WARNING = "The .grad attribute of a Tensor that is not a leaf"
MOST_KINDS = 4  # of layers: each is compiled on its own
MOST_GRAPHS = 64  # of one function; torch's own limit is 8


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Returns what a model repeats: elements of its lists that are decoder layers or hold adapted layers."""
    layers: dict[nn.Module, None] = {}
    inside: set[nn.Module] = set()  # of a layer that was found, such as its experts
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and module not in inside:
            for layer in module:
                if isinstance(layer, GradientCheckpointingLayer) or any(
                    isinstance(m, Adapted) for m in layer.modules()
                ):
                    layers[layer] = None
                    inside.update(layer.modules())
    return list(layers)


def obstacle_to_compiling(model: nn.Module, device: torch.device) -> str | None:
    """Returns why the model's layers are not even tried; None if they can be."""
    layers = decoder_layers(model)
    if not layers:
        return f"{type(model).__name__} has no list of layers"
    if (kinds := kinds_of(layers)) > MOST_KINDS:
        return f"they are of {kinds} kinds, but at most {MOST_KINDS} are compiled"
    return compiler_obstacle(device)


def code_folder() -> Path:
    """Returns where torch keeps compiled code: the user's choice, tailora's cache, or torch's own if read-only."""
    given, default = os.environ.get(CACHE_VARIABLE), default_cache_dir()
    if given not in (None, default):  # torch sets the variable to its default
        return Path(str(given))
    folder = cache_folder() / "compiled"
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    return folder if os.access(folder, os.W_OK) else Path(default)


def compiler_obstacle(device: torch.device) -> str | None:
    """Returns why torch.compile cannot make code for the device; None if the compiler that it needs is there."""
    if not is_dynamo_supported():
        return "torch.compile does not support this Python or system"
    if device.type in ("cuda", "xpu"):
        return None if has_triton() else "torch.compile needs triton for this device, but it is not installed"
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "torch.compile needs a C++ compiler (g++ or clang++), but none was found"
    return None


def kinds_of(layers: Sequence[nn.Module]) -> int:
    """Returns how many graphs these layers take: one for each kind of layer."""
    return len({layer_kind(layer) for layer in layers})


def layer_kind(layer: nn.Module) -> tuple[Any, ...]:
    """Returns what layers share that are computed by the same code: classes, and tensors by name, shape and dtype."""
    classes = tuple(type(module).__qualname__ for module in layer.modules())
    parts = [layer, *(part for m in layer.modules() if isinstance(m, Adapted) for part in attached_parts(m))]
    tensors = tuple(
        (name, tensor.shape, tensor.dtype, tensor.requires_grad)
        for part in parts
        for name, tensor in (*part.named_parameters(), *part.named_buffers())
    )
    return classes, tensors


def _call(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    cls: Any = type(layer)
    if issubclass(cls, FSDPModule):  # whose hooks, which gather its weights, run around the compiled code
        return cls.forward(layer, *args, **kwargs)
    return layer._call_impl(*args, **kwargs)


class CompiledLayers:
    """Compiled code for the layers of one model, kept while this object lives."""

    def __init__(self, backend: str = "inductor") -> None:
        # its own code object, because torch stores and counts compilations by code object
        function = FunctionType(_call.__code__.replace(), globals())
        self._compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)

    @contextmanager
    def used_by(self, layers: Sequence[nn.Module]) -> Iterator[None]:
        """Within the block, these layers are compiled where they compute gradients."""
        folder_before = os.environ.get(CACHE_VARIABLE)
        sharded = [layer for layer in layers if isinstance(layer, FSDPModule)]
        whole = [layer for layer in layers if not isinstance(layer, FSDPModule)]
        before = [compiled_call(layer) for layer in whole]
        forwards = [vars(layer).get("forward") for layer in sharded]
        on_cpu = all(computing_device(weight).type == "cpu" for layer in layers for weight in layer.parameters())
        try:
            os.environ[CACHE_VARIABLE] = str(code_folder())
            for layer in whole:
                set_compiled_call(layer, self._call_of(layer))
            for layer in sharded:
                vars(layer)["forward"] = self._call_of(layer)
            # the compiler asks activations for .grad, and hides torch's warning about it only where it is printed
            warnings.filterwarnings("ignore", message=GRAD_WARNING, module="torch")
            with (
                # a kind of layer has some more graphs without a mask, in evaluation mode, for one document, ... At
                # torch's own limit the next one would be an error in the middle of a run
                dynamo_config.patch(recompile_limit=MOST_GRAPHS, specialize_float=True),  # else it traces twice
                functorch_config.patch({CACHE_FUNCTIONS: True} if hasattr(functorch_config, CACHE_FUNCTIONS) else {}),
                # on a CPU a pool of compiling processes takes longer to start than a graph to compile
                inductor_config.patch(compile_threads=1 if on_cpu else inductor_config.compile_threads),
            ):
                yield
        finally:
            for layer, call in zip(whole, before, strict=True):
                set_compiled_call(layer, call)
            for layer, forward in zip(sharded, forwards, strict=True):
                vars(layer).pop("forward", None)
                if forward is not None:
                    layer.forward = forward
            os.environ.pop(CACHE_VARIABLE, None)
            if folder_before is not None:
                os.environ[CACHE_VARIABLE] = folder_before

    def _call_of(self, layer: nn.Module) -> Callable[..., Any]:
        trains = any(attached_parts(m) or any(p.requires_grad for p in m.parameters(False)) for m in layer.modules())

        def call(*args: Any, **kwargs: Any) -> Any:
            x = args[0] if args else None
            needs_gradient = isinstance(x, Tensor) and x.requires_grad
            if not torch.is_grad_enabled() or not (trains or needs_gradient):
                return _call(layer, args, kwargs)
            if not needs_gradient and isinstance(x, Tensor) and x.is_floating_point():
                # of the first layer: an unused gradient is less work than another graph
                args = (x.detach().requires_grad_(), *args[1:])
            return self._compiled(layer, args, kwargs)

        cast(Any, call).only_with_gradients = True  # for `core.inference`
        return call


# Tokens of a run that make up for compiling a kind of layer, which takes 16 s. With AMX, layers of SmolLM's shape in
# bfloat16 then take .73 of the plain layers' time (one thread, 1,000 tokens per second). In float32 they take the same
# time, and without AMX the passes that are fused are 8% of a step. For CUDA and XPU a gain of 15% is assumed, at 10,000
# tokens per second.
PAYING_TOKENS = {"cpu": 100_000, "cuda": 1_000_000, "xpu": 1_000_000}


def paying_tokens(device: torch.device, dtype: torch.dtype, layers: Sequence[nn.Module]) -> int | None:
    """Returns how many tokens a run needs to make up for compiling; None where no gain is known."""
    if device.type == "cpu" and not (dtype == torch.bfloat16 and "amx_bf16" in cpu_flags()):
        return None
    tokens = PAYING_TOKENS.get(device.type)
    return None if tokens is None else tokens * kinds_of(layers)
