"""Reads config.json of a model, and refuses values that no model can have before anything is built from them.

transformers checks the types of most fields. Negative or huge sizes, and patterns among the names of layers, would
end in errors of torch, or in code that does not return.
"""

import re
from types import SimpleNamespace
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from tailora.errors import ConfigError, listing

SIZES = {  # field -> its smallest and its largest value, several times what the largest models have
    "vocab_size": (1, 2**24),
    "hidden_size": (1, 2**17),
    "intermediate_size": (0, 2**20),
    "num_hidden_layers": (1, 1000),
    "num_attention_heads": (1, 2**12),
    "num_key_value_heads": (1, 2**12),
    "head_dim": (1, 2**14),
}
PARTS = ("text_config", "vision_config")
SKIPPED = ("llm_int8_skip_modules", "modules_to_not_convert")  # transformers takes these names as regular expressions
LAYER_NAME = re.compile(r"[\w.-]*\*?[\w.-]*")


def read_model_config(source: str, name: str) -> PretrainedConfig:
    """Returns config.json of a folder or Hub id. Raises ConfigError, OSError, ValueError. name: for messages."""
    content, _ = PretrainedConfig.get_config_dict(source)
    parts = [part for part in (content, *map(content.get, PARTS)) if isinstance(part, dict)]
    problems = _problems(*(SimpleNamespace(**part) for part in parts))
    if not problems:
        try:
            config: PretrainedConfig = AutoConfig.from_pretrained(source)
        except (StrictDataclassError, TypeError, AttributeError, ArithmeticError) as error:
            problems = [" ".join(str(error).split())]
        else:  # also under the names that an architecture gives these fields
            problems = _problems(config, *(getattr(config, part, None) for part in PARTS))
    if problems:
        raise ConfigError(
            f"config.json of model {name!r} is invalid: {listing(problems)}; use the file of the original model"
        )
    return config


def _problems(*parts: Any) -> list[str]:
    """Returns what is wrong with a model's config, or with a part of it."""
    problems = []
    for part in parts:
        names, dtype = getattr(part, "architectures", None), getattr(part, "dtype", None)
        if not isinstance(names, list | None):
            problems.append(f"expected a list of names for architectures, got {names!r}")
        if isinstance(dtype, str) and not isinstance(getattr(torch, dtype.removeprefix("torch."), None), torch.dtype):
            problems.append(f"expected the name of a type of torch for dtype, got {dtype!r}")
        for field, (least, most) in SIZES.items():
            value = getattr(part, field, None)
            if isinstance(value, int) and not least <= value <= most:
                problems.append(f"expected a number from {least:,} to {most:,} for {field}, got {value:,}")
        settings = getattr(part, "quantization_config", None)
        if not isinstance(settings, dict | QuantizationConfigMixin | None):
            problems.append(f"expected an object for quantization_config, got {settings!r}")
        for field in SKIPPED:
            layers = (settings.get(field) if isinstance(settings, dict) else None) or []
            if not (isinstance(layers, list) and all(LAYER_NAME.fullmatch(str(layer)) for layer in layers)):
                limit = "a list of layer names, with at most one '*' each"
                problems.append(f"expected {limit}, for {field}, got {layers!r}")
    return problems
