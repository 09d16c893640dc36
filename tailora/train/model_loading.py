"""`--quantize`: how the base's linear layers are stored, by which package, and whether that works on this machine.

    nf4, fp4       bitsandbytes: 4 bits, in blocks of 64; scales quantised too (QLoRA, arXiv:2305.14314)
    int8           bitsandbytes: 8 bits a row (LLM.int8, arXiv:2208.07339); evaluation rounds the input, too
    torchao-int8   torchao: 8 bits a row, weights alone; its backward keeps a 16-bit copy of every weight
    torchao-int4   torchao: 4 bits in groups of 32, weights alone; has no kernel for a CPU (0.18)

The output head and the embedding stay as they are (transformers' choice).
"""

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tailora.core.quantization import dense_weight, is_quantized, prevent_repacking, quantized_layers, storage_obstacle
from tailora.data.demo import resolve_demo
from tailora.data.readers import check_model_exists
from tailora.errors import ConfigError, listing, nearest
from tailora.kernels.products import cpu_flags
from tailora.quiet import quiet_loggers, quiet_transformers

EXTRA = "pip install 'tailora[quantize]'"
TRIED = 64  # inputs and outputs of the layer that is tried
OFF = 0.3  # of its size: what 4 bits may lose, and no more


@dataclass(frozen=True)
class Method:
    package: str
    settings: Callable[[torch.dtype], Any]  # precision of the rest -> what transformers takes
    layer: Callable[[nn.Linear], nn.Module]  # a plain layer, stored so


def _four_bits(quant_type: str, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=True,
    )


def _four_bit_layer(quant_type: str, plain: nn.Linear) -> nn.Module:
    from bitsandbytes.nn import Linear4bit

    return _filled(Linear4bit(TRIED, TRIED, quant_type=quant_type), plain)


def _int8(_: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_is_news)
    return BitsAndBytesConfig(load_in_8bit=True)


def _is_news(record: logging.LogRecord) -> bool:
    """False for what bitsandbytes says at every call of every layer."""
    return not record.msg.startswith("MatMul8bitLt: inputs will be cast")


def _int8_layer(plain: nn.Linear) -> nn.Module:
    from bitsandbytes.nn import Linear8bitLt

    return _filled(Linear8bitLt(TRIED, TRIED, has_fp16_weights=False), plain)


def _filled(layer: nn.Module, plain: nn.Linear) -> nn.Module:
    device = plain.weight.device
    layer.load_state_dict({name: value.cpu() for name, value in plain.state_dict().items()})
    return layer.to(device)


def _torchao_config(bits: int) -> Any:
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig

    return Int8WeightOnlyConfig(version=2) if bits == 8 else Int4WeightOnlyConfig(group_size=32)


def _torchao(bits: int, _: torch.dtype) -> Any:
    from transformers import TorchAoConfig

    return TorchAoConfig(_torchao_config(bits))


def _torchao_layer(bits: int, plain: nn.Linear) -> nn.Module:
    from torchao.quantization import quantize_

    plain = plain.requires_grad_(False).to(torch.bfloat16 if bits == 4 else None)
    quantize_(plain, _torchao_config(bits))
    return plain


METHODS = {
    "nf4": Method("bitsandbytes", partial(_four_bits, "nf4"), partial(_four_bit_layer, "nf4")),
    "fp4": Method("bitsandbytes", partial(_four_bits, "fp4"), partial(_four_bit_layer, "fp4")),
    "int8": Method("bitsandbytes", _int8, _int8_layer),
    "torchao-int8": Method("torchao", partial(_torchao, 8), partial(_torchao_layer, 8)),
    "torchao-int4": Method("torchao", partial(_torchao, 4), partial(_torchao_layer, 4)),
}


@dataclass(frozen=True)
class Stored:
    """What a method's layers take, for an estimate.

    bytes: plain weight -> bytes that it takes.    per_output: bytes that a forward needs for each number of its output.
    keeps_dense: whether the backward finds the dense weight of every layer kept, and not one at a time.
    """

    bytes: Callable[[Tensor], int]
    per_output: float = 0
    keeps_dense: bool = False


def _four_bit_bytes(weight: Tensor) -> int:
    """Half a byte each, one for the largest of 64, 4 for that of 256 of those, and the two tables of codes."""
    blocks = -(-weight.numel() // 64)
    return weight.numel() // 2 + blocks + 4 * -(-blocks // 256) + 4 * (16 + 256 + 1)


STORED = {
    "nf4": Stored(_four_bit_bytes),
    "fp4": Stored(_four_bit_bytes),
    "int8": Stored(lambda weight: weight.numel() + 4 * len(weight), per_output=4),  # sums of int8 are int32
    "torchao-int8": Stored(lambda weight: weight.numel() + weight.itemsize * len(weight), keeps_dense=True),
}


def settings_for(name: str, dtype: torch.dtype, device: str) -> Any:
    """What `from_pretrained` takes as quantization_config. Raises ConfigError where the method does not work here."""
    if name not in METHODS:
        raise ConfigError(f"quantize {name!r} is unknown; there are {', '.join(METHODS)}{nearest(name, METHODS)}")
    if (reason := obstacle(name, device)) is not None:
        others = [other for other in METHODS if other != name and obstacle(other, device) is None]
        raise ConfigError(f"--quantize {name} does not work here: {reason}; of the others work: {_listed(others)}")
    return METHODS[name].settings(dtype)


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "none"


def obstacle(name: str, device: str) -> str | None:
    """Why the method does not work on this machine, or None: found out on a small layer, forward and backward."""
    method = METHODS[name]
    if importlib.util.find_spec(method.package) is None:
        return f"{method.package} is not installed: {EXTRA}"
    try:
        with quiet_loggers(method.package):  # bitsandbytes names a kernel that it would have liked
            return _tried(method, torch.device(device))
    except (ImportError, OSError, RuntimeError, AssertionError, NotImplementedError, ValueError) as error:
        cause = (str(error).strip() or repr(error)).splitlines()[0]
        return f"{method.package} cannot run on {device}: {cause}"


def _tried(method: Method, device: torch.device) -> str | None:
    generator = torch.Generator().manual_seed(0)
    plain = nn.Linear(TRIED, TRIED).to(device)
    plain.weight.data.copy_(torch.randn(TRIED, TRIED, generator=generator))
    expected = plain.weight.detach().clone()
    layer = method.layer(plain)
    prevent_repacking(layer)
    if not is_quantized(layer):
        return f"{method.package} left the weight as it was"
    dense = dense_weight(layer)  # merging needs it
    x: Tensor = torch.randn(8, TRIED, generator=generator).to(device, dense.dtype).requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x).sum(), x)
    for what, found, wanted in (("gradient", gradient[0], expected.sum(0)), ("weight", dense, expected)):
        if (apart := float((found - wanted).norm() / wanted.norm())) > OFF:
            return f"its {what} is off by {apart:.0%}"
    return None


# ---- The base model and its tokenizer, in the precision that this machine is good at.


CPU_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # x86 names, and Arm's
DTYPES: dict[str, torch.dtype | str] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "stored": "auto",  # what transformers calls it
}


def has_bfloat16(device: str = "cpu", cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the device multiplies bfloat16 in hardware; emulation is slower than float32."""
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device == "cpu" and bool(CPU_FLAGS & cpu_flags(cpuinfo))


def precision_of(dtype: str, device: str) -> torch.dtype | str:
    """What transformers takes for one of `DTYPES`, or for "auto", what the device is good at."""
    return DTYPES[("bfloat16" if has_bfloat16(device) else "float32") if dtype == "auto" else dtype]


def read_config(name: str) -> PretrainedConfig:
    """The model's shape, without its weights. Raises ConfigError when it cannot be read."""
    source = resolve_demo(name, "model")
    check_model_exists(source)
    try:
        with quiet_transformers():
            return AutoConfig.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(_unreadable(name, source, error)) from error


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Raises ConfigError when it cannot be read."""
    source = resolve_demo(name, "model")
    check_model_exists(source)
    try:
        with quiet_transformers():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source)
            return tokenizer
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(_unreadable(name, source, error)) from error


def load_base(
    name: str, dtype: str = "auto", device: str = "cpu", quantize: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a folder, a Hub id, or 'demo'.

    `dtype`: float32, bfloat16, float16, as the weights are "stored", or "auto", what this machine is good at.

    `quantize`: a method of `train.quantize`, for the linear layers; the rest has the dtype.

    Raises ConfigError when they cannot be read, or not be quantised so; pickled weights are not read.
    """
    source = resolve_demo(name, "model")
    check_model_exists(source)
    precision = precision_of(dtype, device)
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(source)
            more: dict[str, Any] = {}  # a None would take away the own quantisation of a quantised model
            if quantize is not None:
                more["quantization_config"] = _method(name, source, quantize, precision, device)
                if device == "cuda":  # where its kernels are
                    more["device_map"] = {"": torch.cuda.current_device()}
            model, report = AutoModelForCausalLM.from_pretrained(
                source, dtype=precision, use_safetensors=True, output_loading_info=True, **more
            )
    except ConfigError:
        raise
    except ImportError as error:  # of what a quantised model was quantised with
        raise ConfigError(f"model {name!r} needs a package: {error}") from error
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ConfigError(_unreadable(name, source, error)) from error
    if missing := sorted(report["missing_keys"]):
        raise ConfigError(
            f"model {name!r} lacks {len(missing)} weights that {type(model).__name__} has, which would be random: "
            f"{', '.join(missing[:3])}; give a complete causal language model"
        )
    if problems := [
        f"{path}: {why}" for path, layer in quantized_layers(model).items() if (why := storage_obstacle(layer))
    ]:
        raise ConfigError(f"model {name!r} cannot be used in this quantisation: {listing(problems)}")
    return model, tokenizer


def _method(name: str, source: str, quantize: str, precision: torch.dtype | str, device: str) -> Any:
    """What transformers takes. Raises ConfigError for what does not work here and for a model that is quantised."""
    check_unquantized(AutoConfig.from_pretrained(source), name, quantize)
    return settings_for(quantize, precision if isinstance(precision, torch.dtype) else torch.bfloat16, device)


def check_unquantized(config: PretrainedConfig, name: str, quantize: str) -> None:
    """Raises ConfigError for a model that is quantised already."""
    own = getattr(config, "quantization_config", None)
    if own is not None:
        how = own.get("quant_method") if isinstance(own, dict) else own.quant_method
        raise ConfigError(f"model {name!r} is quantised already ({how}): leave --quantize {quantize} out")


def _unreadable(name: str, source: str, error: Exception) -> str:
    folder = Path(source)
    if (folder / "model" / "config.json").is_file():
        return f"model {name!r} is the folder of a run, not of a model: give {folder / 'model'}"
    if folder.is_dir():
        there = ", ".join(sorted(entry.name for entry in folder.iterdir())) or "nothing"
        return (
            f"model {name!r}: transformers cannot read this folder as a causal language model: {error}. "
            f"It holds {there}; needed are config.json, a tokenizer and weights as .safetensors"
        )
    return (
        f"model {name!r} is neither a folder here nor readable from the Hub: {error}. "
        "Give a folder, a Hub id, or 'demo'; HF_TOKEN opens gated models"
    )
