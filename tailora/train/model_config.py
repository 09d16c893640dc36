"""Reads config.json of a model, and refuses values that no model can have before anything is built from them.

transformers checks the types of most fields. Negative or huge sizes, and patterns among the names of layers, would
end in errors of torch, or in code that does not return.
"""

import re
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from tailora.errors import ConfigError, listing

LIMITS = {  # field -> its smallest and its largest value, several times what the largest models have
    "vocab_size": (1, 2**24),
    "hidden_size": (1, 2**17),
    "intermediate_size": (0, 2**20),
    "num_hidden_layers": (1, 1000),
    "num_attention_heads": (1, 2**12),
    "num_key_value_heads": (1, 2**12),
    "head_dim": (0, 2**14),
    "max_position_embeddings": (1, 2**30),
    "rope_theta": (1, 10**12),
}
PARTS, QUANTIZATION = ("text_config", "vision_config"), "quantization_config"
SKIPPED = ("llm_int8_skip_modules", "modules_to_not_convert")  # transformers takes these names as regular expressions
LAYER_NAME = re.compile(r"[\w.-]*\*?[\w.-]*")


def read_model_config(source: str, name: str) -> PretrainedConfig:
    """Returns config.json of a folder or Hub id. Raises ConfigError, OSError, ValueError. name: for messages."""
    content, _ = PretrainedConfig.get_config_dict(source)
    parts = [content]  # with the objects in it
    for part in parts:
        parts += [value for key, value in part.items() if isinstance(value, dict) and key != QUANTIZATION]
    problems = _problems(parts)
    if not problems:
        try:
            config: PretrainedConfig = AutoConfig.from_pretrained(source)
        except (StrictDataclassError, TypeError, AttributeError, ArithmeticError) as error:
            problems = [" ".join(str(error).split())]
        else:
            configs = (config, *(getattr(config, name, None) for name in PARTS))
            problems = _problems([_sizes(part) for part in configs if isinstance(part, PretrainedConfig)])
    if problems:
        raise ConfigError(
            f"config.json of model {name!r} is invalid: {listing(problems)}; use the file of the original model"
        )
    return config


def _sizes(config: PretrainedConfig) -> dict[str, Any]:
    """Returns fields by their common names, not from attributes: some raise an error if the model's layers differ."""
    return {field: vars(config).get(config.attribute_map.get(field, field)) for field in LIMITS}


def _problems(parts: list[dict[str, Any]]) -> list[str]:
    """Returns what is wrong with the parts of a model's config."""
    problems = []
    for part in parts:
        names, dtype = part.get("architectures"), part.get("dtype")
        if not isinstance(names, list | None):
            problems.append(f"expected a list of names for architectures, got {names!r}")
        if isinstance(dtype, str) and not isinstance(getattr(torch, dtype.removeprefix("torch."), None), torch.dtype):
            problems.append(f"expected the name of a type of torch for dtype, got {dtype!r}")
        for field, (least, most) in LIMITS.items():
            value = part.get(field)
            if isinstance(value, str) or (isinstance(value, int | float) and not least <= value <= most):
                shown = repr(value) if isinstance(value, str) else f"{value:,}"
                problems.append(f"expected a number from {least:,} to {most:,} for {field}, got {shown}")
        heads, key_heads = part.get("num_attention_heads"), part.get("num_key_value_heads")
        if isinstance(heads, int) and isinstance(key_heads, int) and key_heads > 0 and heads % key_heads:
            divisor = f"a divisor of num_attention_heads ({heads:,})"
            problems.append(f"expected {divisor} for num_key_value_heads, got {key_heads:,}")
        settings = part.get(QUANTIZATION)
        if not isinstance(settings, dict | QuantizationConfigMixin | None):
            problems.append(f"expected an object for {QUANTIZATION}, got {settings!r}")
        for field in SKIPPED:
            layers = (settings.get(field) if isinstance(settings, dict) else None) or []
            if not (isinstance(layers, list) and all(LAYER_NAME.fullmatch(str(layer)) for layer in layers)):
                limit = "a list of layer names, with at most one '*' each"
                problems.append(f"expected {limit}, for {field}, got {layers!r}")
    return problems
