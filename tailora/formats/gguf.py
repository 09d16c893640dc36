"""A GGUF LoRA for llama.cpp and Ollama, with the names and the row order of a converted base model.

    general.type = adapter   adapter.type = lora   adapter.lora.alpha
    blk.N.attn_q.weight.lora_a (r, in)   .lora_b (out, r)      token_embd.weight.lora_a is (vocabulary, r)

llama.cpp computes alpha / (rank of B) * B A, without rsLoRA or patterns: the scale is in B, and alpha is its rank.
Names are looked up in the maps of the `gguf` package, which llama.cpp's converter uses, too.
"""

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tailora.core.layer_types import CONV1D, EMBEDDING, LINEAR, layer_type_of
from tailora.errors import FormatError
from tailora.formats import fold_scale
from tailora.formats.fold_scale import MERGED, ExportSource
from tailora.formats.io import check_is_file
from tailora.formats.peft import StoredAdapter, as_stored_adapter
from tailora.formats.run_folder import GGUF_WEIGHTS

TOKEN_EMBEDDING, OUTPUT_HEAD = "token_embd.weight", "output.weight"


# transformers' model_type -> GGUF's architecture; each compared with llama.cpp's own converter
SAME_NAME = ("granite", "smollm3", "olmo", "olmo2", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "gpt2", "starcoder2")
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "gemma3_text": "gemma3",
    "phi": "phi2",
    "cohere": "command-r",
    **{name: name for name in (*SAME_NAME, "stablelm")},
}
# These architectures store rows of q and k in pairs, as Llama's rotary embedding expects them
PAIRED_ROWS = ("llama", "granite", "smollm3", "olmo")
QUERY, KEY = "attn_q.weight", "attn_k.weight"

# ---- Writing


def problems(source: ExportSource) -> list[str]:
    result = fold_scale.low_rank_problems(source, (LINEAR, CONV1D, EMBEDDING))
    try:
        names = tensor_names(source.base_model)
    except FormatError as error:
        return [*result, f"{error}; {MERGED}"]
    is_tied = getattr(source.base_model.config, "tie_word_embeddings", False)
    for path, layer_type in fold_scale.exported_layer_types(source).items():
        if path not in names:
            result.append(f"{path}: GGUF has no corresponding tensor; {MERGED}")
        elif layer_type is EMBEDDING and names[path] != TOKEN_EMBEDDING:
            result.append(f"{path}: llama.cpp only adapts the token embedding; {MERGED}")
        elif names[path] in (TOKEN_EMBEDDING, OUTPUT_HEAD) and is_tied:
            result.append(f"{path}: llama.cpp has a single tensor for tied input and output embeddings; {MERGED}")
    return result


def write(folder: Path, source: ExportSource) -> list[str]:
    from gguf import GGUFType, GGUFWriter, Keys

    names, factors = tensor_names(source.base_model), fold_scale.fold_scale(source)
    alpha = max(len(A) for A, _ in factors.values())
    writer = GGUFWriter(folder / GGUF_WEIGHTS, _architecture(source.base_model))
    writer.add_type(GGUFType.ADAPTER)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, float(alpha))
    for path, (A, B) in factors.items():
        B = B * (len(A) / alpha)  # readers multiply by alpha / r
        A, B = to_gguf(A, B, names[path], source.base_model)
        writer.add_tensor(f"{names[path]}.lora_a", A.contiguous().numpy())
        writer.add_tensor(f"{names[path]}.lora_b", B.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return fold_scale.fold_changes(source)


# ---- Reading


def read(folder: Path, base_model: nn.Module) -> StoredAdapter:
    """Reads adapter.gguf as llama.cpp does, and converts it to the content of a PEFT folder. Raises FormatError."""
    from gguf import GGUFReader

    path = folder / GGUF_WEIGHTS
    check_is_file(path)
    try:
        file = GGUFReader(path)
        fields = {name: field.contents() for name, field in file.fields.items()}
        tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in file.tensors}
    except (OSError, ValueError, IndexError, KeyError, OverflowError, struct.error) as error:
        raise FormatError(f"{path} is not a complete GGUF file: {error}; export or copy it again") from None
    names = tensor_names(base_model)
    header = {"general.type": "adapter", "adapter.type": "lora", "general.architecture": _architecture(base_model)}
    in_file = {key: fields.get(key) for key in header}
    alpha = fields.get("adapter.lora.alpha")
    if in_file != header or not isinstance(alpha, int | float):
        raise FormatError(f"{path}: expected {header} and a number as adapter.lora.alpha, got {in_file} and {alpha!r}")
    fold_scale.raise_problems(str(path), _tensor_problems(tensors, set(names.values())))
    factors = {}
    for layer_path, name in names.items():
        if f"{name}.lora_a" in tensors:
            A, B = tensors[f"{name}.lora_a"].float(), tensors[f"{name}.lora_b"].float()
            heads = _paired_heads(name, base_model)
            if A.ndim != 2 or B.ndim != 2 or (heads and len(B) % (2 * heads)):
                shapes = f"{tuple(A.shape)} and {tuple(B.shape)}"
                raise FormatError(f"{path}: the factors of {name} have shapes {shapes}, which do not fit the model")
            factors[layer_path] = from_gguf(A, B, name, base_model)
    scales = {layer_path: float(alpha) / B.shape[1] if alpha else 1.0 for layer_path, (_, B) in factors.items()}
    return as_stored_adapter(folder, factors, scales)


def _tensor_problems(tensors: Mapping[str, Tensor], names: set[str]) -> list[str]:
    result = [f"{key} is quantized; write it as F32" for key, value in tensors.items() if not value.is_floating_point()]
    for key in tensors:
        name, _, factor = key.rpartition(".")
        partner = f"{name}.{'lora_b' if factor == 'lora_a' else 'lora_a'}"
        if name not in names or factor not in ("lora_a", "lora_b"):
            result.append(f"{key}: the model has no layer for it")
        elif partner not in tensors:
            result.append(f"{partner} is missing")
    return result


# ---- Names and row order


def tensor_names(base_model: Any) -> dict[str, str]:
    """Returns path of a layer that can be adapted -> name of its weight in GGUF. Raises FormatError."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    name = _architecture(base_model)
    architecture = next(number for number, arch_name in MODEL_ARCH_NAMES.items() if arch_name == name)
    name_map = get_tensor_name_map(architecture, base_model.config.num_hidden_layers)
    names = {
        path: name_map.get_name(f"{path}.weight", try_suffixes=(".weight",))
        for path, module in base_model.named_modules()
        if layer_type_of(module)
    }
    return {path: name for path, name in names.items() if name}


def _architecture(base_model: Any) -> str:
    model_type = getattr(getattr(base_model, "config", None), "model_type", None)
    if model_type not in ARCHITECTURES:
        raise FormatError(f"model_type {model_type!r} is not supported in GGUF; supported: {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[model_type]


def to_gguf(A: Tensor, B: Tensor, name: str, base_model: Any) -> tuple[Tensor, Tensor]:
    """Returns the layer's A and B in the layout of the file. name: of the weight in GGUF."""
    if heads := _paired_heads(name, base_model):  # within a head: rows i and i + d/2 side by side
        B = B.view(heads, 2, -1, B.shape[1]).transpose(1, 2).reshape(B.shape)
    return A.T if name == TOKEN_EMBEDDING else A, B


def from_gguf(A: Tensor, B: Tensor, name: str, base_model: Any) -> tuple[Tensor, Tensor]:
    """The inverse of `to_gguf`."""
    if heads := _paired_heads(name, base_model):
        B = B.view(heads, -1, 2, B.shape[1]).transpose(1, 2).reshape(B.shape)
    return A.T if name == TOKEN_EMBEDDING else A, B


def _paired_heads(name: str, base_model: Any) -> int:
    """Returns the number of heads whose rows are stored in pairs; 0 for a weight that is stored unchanged."""
    if _architecture(base_model) not in PAIRED_ROWS or not name.endswith((QUERY, KEY)):
        return 0
    config = base_model.config
    key_heads = getattr(config, "num_key_value_heads", None) if name.endswith(KEY) else None
    return int(key_heads or config.num_attention_heads)
