"""The base model and its tokenizer, in the precision that this machine is good at."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tailora.core.quantization import base_obstacle, quantized_layers
from tailora.data.demo import resolve
from tailora.data.hub import check_model
from tailora.errors import ConfigError, listing
from tailora.kernels.products import cpu_flags
from tailora.quiet import quiet
from tailora.train.model_loading import settings_for

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
    source = resolve(name, "model")
    check_model(source)
    try:
        with quiet():
            return AutoConfig.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(_unreadable(name, source, error)) from error


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Raises ConfigError when it cannot be read."""
    source = resolve(name, "model")
    check_model(source)
    try:
        with quiet():
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
    source = resolve(name, "model")
    check_model(source)
    precision = precision_of(dtype, device)
    try:
        with quiet():
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
        f"{path}: {why}" for path, layer in quantized_layers(model).items() if (why := base_obstacle(layer))
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
