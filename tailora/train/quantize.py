"""Quantized base models: the methods of `--quantize`, and the formats of models that are quantized already.

    METHODS  name of --quantize -> how to quantize
    nf4            bitsandbytes: 4 bits, in blocks of 64; the scales are quantized too (QLoRA, arXiv:2305.14314)
    int8           bitsandbytes: 8 bits, one scale a row (LLM.int8, arXiv:2208.07339); evaluation rounds inputs too

    QUANTIZED_FORMATS  quant_method of config.json -> how to load the files

transformers leaves the output head and the embedding as they are.
"""

import importlib.util
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from tailora.core.quantization import (
    common_dtype,
    dense_weight,
    drop_compiled,
    gradient_obstacle,
    gradient_problems,
    is_quantized,
    prevent_repacking,
    quantized_layers,
    storage_obstacle,
)
from tailora.errors import ConfigError, nearest
from tailora.quiet import quiet_loggers

EXTRA = "pip install 'tailora[quantize]'"
PROBE_SIZE = 64  # inputs and outputs of the layer that a method is tried on
LARGEST_ERROR = 0.3  # relative, of the weight and the output; 4-bit methods stay below


@dataclass(frozen=True)
class Stored:
    """What a method's layers need, for an estimate."""

    bits: int  # of a quantized number; FSDP2 can shard these
    scales: Callable[[Tensor], int]  # plain weight -> bytes of its scales, kept whole
    per_output: float = 0  # temporary bytes for each number of a layer's output
    keeps_dense: bool = False  # whether every layer's dense weight is kept for the backward; else one at a time exists

    def codes(self, weight: Tensor) -> int:
        return weight.numel() * self.bits // 8


@dataclass(frozen=True)
class Method:
    settings: Callable[[torch.dtype], Any]  # precision of the other tensors -> quantization_config of transformers
    layer: Callable[[nn.Linear], nn.Module]  # plain layer -> quantized layer
    stored: Stored


def _four_bit_scales(weight: Tensor) -> int:
    """One byte a block of 64, 4 bytes for 256 blocks, and the two tables of codes."""
    blocks = -(-weight.numel() // 64)
    return blocks + 4 * -(-blocks // 256) + 4 * (16 + 256 + 1)


def _int8(_: torch.dtype) -> Any:
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # it warns at every call of a layer
    return transformers.BitsAndBytesConfig(load_in_8bit=True)


def _bitsandbytes_layer(class_name: str, settings: dict[str, Any], plain: nn.Linear) -> nn.Module:
    layer: nn.Module = getattr(import_module("bitsandbytes.nn"), class_name)(PROBE_SIZE, PROBE_SIZE, **settings)
    layer.load_state_dict({name: value.cpu() for name, value in plain.state_dict().items()})
    return layer.to(plain.weight.device)


def _nf4(dtype: torch.dtype) -> Any:
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=True,
    )


METHODS = {
    "nf4": Method(
        _nf4,
        partial(_bitsandbytes_layer, "Linear4bit", {"quant_type": "nf4"}),
        Stored(4, _four_bit_scales),
    ),
    "int8": Method(
        _int8,
        partial(_bitsandbytes_layer, "Linear8bitLt", {"has_fp16_weights": False}),
        Stored(8, lambda weight: 4 * len(weight), per_output=4),  # sums of int8 are int32
    ),
}


def settings_for(name: str, dtype: torch.dtype, device: torch.device) -> Any:
    """Returns quantization_config of `from_pretrained`. Raises ConfigError if the method does not work here."""
    if name not in METHODS:
        raise ConfigError(f"unknown --quantize {name!r}; expected one of {', '.join(METHODS)}{nearest(name, METHODS)}")
    if (reason := obstacle(name, device)) is not None:
        working = [method for method in METHODS if method != name and obstacle(method, device) is None]
        raise ConfigError(
            f"--quantize {name} does not work here: {reason}; methods that work here: {', '.join(working) or 'none'}"
        )
    return METHODS[name].settings(dtype)


def obstacle(name: str, device: torch.device) -> str | None:
    """Tries the method on a small layer, forward and backward; returns why it does not work here, or None."""
    method = METHODS[name]
    if importlib.util.find_spec("bitsandbytes") is None:
        return f"bitsandbytes is not installed: {EXTRA}"
    try:
        with quiet_loggers("bitsandbytes"):  # it logs a kernel that it does not find
            return _try_layer(method, device)
    except (ImportError, OSError, RuntimeError, AssertionError, ValueError) as error:
        cause = (str(error).strip() or repr(error)).splitlines()[0]
        return f"bitsandbytes cannot run on {device}: {cause}"


def _try_layer(method: Method, device: torch.device) -> str | None:
    generator = torch.Generator().manual_seed(0)
    plain = nn.Linear(PROBE_SIZE, PROBE_SIZE, device=device)
    plain.weight.data.copy_(torch.randn(PROBE_SIZE, PROBE_SIZE, generator=generator, device="cpu"))
    expected = plain.weight.detach().clone()
    layer = method.layer(plain)
    prevent_repacking(layer)
    if not is_quantized(layer):
        return "bitsandbytes did not quantize the weight"
    dense = dense_weight(layer)  # merging needs it
    x: Tensor = torch.randn(8, PROBE_SIZE, generator=generator, device="cpu").to(device, dense.dtype)
    with torch.no_grad():
        change = layer(x) - layer(-x)
    for name, actual, exact in (("output", change, 2 * x.to(expected) @ expected.T), ("weight", dense, expected)):
        if (error := float((actual - exact).norm() / exact.norm())) > LARGEST_ERROR:
            return f"its {name} is off by {error:.0%}"
    return gradient_obstacle(layer, dense.dtype)


# ---- Models that are quantized already


@dataclass(frozen=True)
class QuantizedFormat:
    """How transformers loads a format of quantized models, so that gradients pass its layers."""

    settings: dict[str, Any]  # for quantization_config
    packages: tuple[str, ...]
    stored: Callable[[dict[str, Any]], Stored | None]  # quantization_config -> for an estimate; None: dense or unknown

    @property
    def becomes_dense(self) -> bool:
        return "dequantize" in self.settings


def _stored_by_bitsandbytes(settings: dict[str, Any]) -> Stored | None:
    if settings.get("load_in_8bit"):
        return METHODS["int8"].stored
    is_nested = settings.get("bnb_4bit_use_double_quant")
    return METHODS["nf4"].stored if is_nested else Stored(4, lambda weight: 4 * -(-weight.numel() // 64) + 4 * 16)


def _stored_by_torchao(settings: dict[str, Any]) -> Stored | None:
    is_int8 = "Int8WeightOnlyConfig" in str(settings.get("quant_type"))
    return Stored(8, lambda weight: weight.itemsize * len(weight), keeps_dense=True) if is_int8 else None


def _stored_in_groups(settings: dict[str, Any]) -> Stored:
    """A scale of 16 bits and a zero point for each group of inputs; GPTQ also has the group of each input."""
    bits, size = int(settings.get("bits", 4)), int(settings.get("group_size", 128))  # the defaults of transformers

    def scales(weight: Tensor) -> int:
        out_features, in_features = weight.shape
        groups = out_features * -(-in_features // (size if size > 0 else in_features))
        return groups * (16 + bits) // 8 + (4 * in_features if settings["quant_method"] == "gptq" else 0)

    return Stored(bits, scales, keeps_dense=True)


def _becomes_dense(*packages: str) -> QuantizedFormat:
    """Of these formats, transformers only has layers for inference. On a CPU, it dequantizes some by itself."""
    return QuantizedFormat({"dequantize": True}, packages, lambda _: None)


QUANTIZED_FORMATS = {  # by quant_method
    "bitsandbytes": QuantizedFormat({}, ("bitsandbytes",), _stored_by_bitsandbytes),
    "torchao": QuantizedFormat({}, ("torchao",), _stored_by_torchao),
    "compressed-tensors": _becomes_dense("compressed_tensors"),
    "fp8": _becomes_dense(),
    "mxfp8": _becomes_dense(),
    "mxfp4": _becomes_dense(),
    # by default, gptqmodel 7.7 chooses kernels without gradients for a CPU
    "gptq": QuantizedFormat({"backend": "gptq_torch"}, ("gptqmodel", "optimum"), _stored_in_groups),
    "awq": QuantizedFormat({"backend": "torch_awq"}, ("gptqmodel",), _stored_in_groups),
}


def bits_in_files(settings: dict[str, Any]) -> float:
    """Returns the bits of a quantized number in the files of a format that becomes dense, without most scales."""
    groups = (settings.get("config_groups") or {}).values()  # of settings, or lists of layers under a scheme's name
    weights = [group["weights"] for group in groups if isinstance(group, dict) and group.get("weights")]
    bits = [weight.get("num_bits", 8) for weight in weights]
    return max(bits, default=4.25 if settings["quant_method"] == "mxfp4" else 8)


def format_of(config: PretrainedConfig, name: str) -> QuantizedFormat | None:
    """Returns the format of a model that is quantized already; None for others. Raises ConfigError for other formats.

    name: of the model, for messages.
    """
    method = stored_quantization(config).get("quant_method")
    if method is None:
        return None
    if method not in QUANTIZED_FORMATS:
        raise ConfigError(
            f"model {name!r} is quantized as {method}, which is not supported; expected one of "
            f"{', '.join(QUANTIZED_FORMATS)}. Use the model that it was made from, for example with --quantize nf4"
        )
    return QUANTIZED_FORMATS[method]


def stays_quantized(config: PretrainedConfig, name: str) -> bool:
    """Returns True if weights of a loaded model are quantized. Raises ConfigError as `format_of`."""
    form = format_of(config, name)
    return form is not None and not form.becomes_dense


def dequantization_note(config: PretrainedConfig, name: str) -> str | None:
    """Returns a note for models that are dequantized when they are loaded; None for others."""
    form, method = format_of(config, name), stored_quantization(config).get("quant_method")
    if form is None or not form.becomes_dense:
        return None
    return f"the {method} weights are dequantized, so the model needs as much memory as an unquantized one"


def check_full_training(config: PretrainedConfig, name: str) -> None:
    """Raises ConfigError if weights of the model stay quantized."""
    if stays_quantized(config, name):
        raise ConfigError(
            f"model {name!r} is quantized ({stored_quantization(config)['quant_method']}), and --method full trains "
            "weights that are not; use --method lora, or the model that it was made from"
        )


def loading_options(
    config: PretrainedConfig, name: str, quantize: str | None, precision: torch.dtype | str, device: torch.device
) -> dict[str, Any]:
    """Returns the options of `from_pretrained` for --quantize, and changes the config of a model that is quantized.

    precision: of the other tensors; "auto" keeps the precision of the files.
    Raises ConfigError if the model is quantized already, or if it cannot be loaded here.
    """
    form = format_of(config, name)
    if quantize is not None:
        check_unquantized(config, name, quantize)
        dtype = precision if isinstance(precision, torch.dtype) else config.dtype or torch.bfloat16
        return {"quantization_config": settings_for(quantize, dtype, device)}
    if form is not None:
        if missing := [package for package in form.packages if importlib.util.find_spec(package) is None]:
            packages = " ".join(package.replace("_", "-") for package in missing)
            raise ConfigError(f"model {name!r} needs a missing package: install it with pip install {packages}")
        config.quantization_config = {**stored_quantization(config), **form.settings}
    return {}  # with None, transformers would remove the quantization


def quantization_problems(model: PreTrainedModel, unread: Iterable[str]) -> list[str]:
    """Returns what training on this quantized model would get wrong. unread: names in its files that were not used."""
    drop_compiled(model)
    layers = quantized_layers(model)
    problems = [f"{path}: {reason}" for path, layer in layers.items() if (reason := storage_obstacle(layer))]
    if not problems:
        problems = gradient_problems(layers, common_dtype(model))
    # Scales of inputs and outputs may be left out, which rounds less, and layers that the model does not have
    paths = {path for path, _ in model.named_modules()}
    keys = [key.rpartition(".") for key in sorted(unread)]
    return problems + [
        f"{path}.{name}: transformers did not use it, so the weight is wrong"
        for path, _, name in keys
        if path in paths and name.startswith(("weight_", "qweight", "qzeros", "g_idx"))
    ]


def check_unquantized(config: PretrainedConfig, name: str, quantize: str) -> None:
    """Raises ConfigError if the model is quantized already."""
    if settings := stored_quantization(config):
        method = settings["quant_method"]
        raise ConfigError(f"model {name!r} is already quantized ({method}); remove --quantize {quantize}")


OLD_NAMES_OF_AWQ = {"w_bit": "bits", "q_group_size": "group_size"}  # transformers would use its defaults instead


def stored_quantization(config: PretrainedConfig) -> dict[str, Any]:
    """Returns how the files of a model are quantized, with quant_method; empty if they are not."""
    text_config = config.get_text_config()
    existing: Any = getattr(config, "quantization_config", None) or getattr(text_config, "quantization_config", None)
    if not existing:
        return {}
    settings: dict[str, Any] = existing if isinstance(existing, dict) else existing.to_dict()
    settings = {OLD_NAMES_OF_AWQ.get(name, name): value for name, value in settings.items()}
    method = settings.get("quant_method", "bitsandbytes")  # whose old files do not name it
    return {**settings, "quant_method": str(getattr(method, "value", method))}
