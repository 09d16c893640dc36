"""A GGUF LoRA for llama.cpp and Ollama, with the names and the row order that the base model's converter gives.

    general.type = adapter   adapter.type = lora   adapter.lora.alpha
    blk.N.attn_q.weight.lora_a (r, in)   .lora_b (out, r)      token_embd.weight.lora_a is (vocabulary, r)

llama.cpp computes alpha / (rank of B) * B A and knows no rsLoRA and no patterns: the scale is in B, alpha is its rank.
Names are looked up in the maps of the `gguf` package, which llama.cpp's converter uses, too.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tailora.core.layer_types import CONV1D, EMBEDDING, LINEAR, layer_type_of
from tailora.errors import FormatError
from tailora.formats.low_rank_export import MERGED, Factors, Source, factors, hosts, limits, refuse, scale_notes, stored
from tailora.formats.peft import StoredAdapter

WEIGHTS, MODELFILE = "adapter.gguf", "Modelfile"
EMBEDDED, HEAD = "token_embd.weight", "output.weight"
FROM_FOLDER = 'FROM "{base}"\n'
FROM_FILE = "# the base model{base} as GGUF, or its name in Ollama\nFROM ./base.gguf\n"
ENDS = (".lora_a", ".lora_b")
ROTATED = ("attn_q.weight", "attn_k.weight")


@dataclass(frozen=True)
class Architecture:
    """name: GGUF's. rotated: rows of q and k are stored in pairs, as Llama's rotation takes them."""

    name: str
    rotated: bool = False


ARCHITECTURES = {  # transformers' model_type -> GGUF's; each compared with llama.cpp's own converter
    "llama": Architecture("llama", rotated=True),
    "mistral": Architecture("llama", rotated=True),
    "granite": Architecture("granite", rotated=True),
    "smollm3": Architecture("smollm3", rotated=True),
    "olmo": Architecture("olmo", rotated=True),
    "olmo2": Architecture("olmo2"),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "gemma": Architecture("gemma"),
    "gemma2": Architecture("gemma2"),
    "gemma3_text": Architecture("gemma3"),
    "phi": Architecture("phi2"),
    "phi3": Architecture("phi3"),
    "gpt2": Architecture("gpt2"),
    "starcoder2": Architecture("starcoder2"),
    "stablelm": Architecture("stablelm"),
    "cohere": Architecture("command-r"),
}


def problems(source: Source) -> list[str]:
    found = limits(source, (LINEAR, CONV1D, EMBEDDING))
    config: Any = getattr(source.base_model, "config", None)
    model_type = getattr(config, "model_type", None)
    if model_type not in ARCHITECTURES:
        return [*found, f"model_type {model_type!r} is not supported; there are: {', '.join(ARCHITECTURES)}; {MERGED}"]
    names = tensor_names(source.base_model)
    for path, kind in hosts(source).items():
        if path not in names:
            found.append(f"{path}: GGUF has no tensor for it; {MERGED}")
        elif kind is EMBEDDING and names[path] != EMBEDDED:
            found.append(f"{path}: llama.cpp adapts no other embedding than that of the tokens; {MERGED}")
        elif names[path] in (EMBEDDED, HEAD) and getattr(config, "tie_word_embeddings", False):
            found.append(f"{path}: tied, and llama.cpp keeps one tensor for input and output; {MERGED}")
    return found


def write(folder: Path, source: Source) -> list[str]:
    """Fill `folder` with adapter.gguf and a Modelfile; returns what differs from the adapter as trained, in words."""
    from gguf import GGUFType, GGUFWriter, Keys

    names, plain = tensor_names(source.base_model), factors(source)
    alpha = max(each.r for each in plain.values())
    writer = GGUFWriter(folder / WEIGHTS, _architecture(source.base_model).name)
    writer.add_type(GGUFType.ADAPTER)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, float(alpha))
    for path, each in plain.items():
        scaled = Factors(each.A, each.B * (each.r / alpha))  # read as alpha / r times that
        A, B = _arranged(scaled, names[path], source.base_model)
        writer.add_tensor(f"{names[path]}.lora_a", A.contiguous().numpy())
        writer.add_tensor(f"{names[path]}.lora_b", B.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (folder / MODELFILE).write_text(modelfile(source.base_model), encoding="utf-8")
    return scale_notes(source)


def modelfile(base_model: Any) -> str:
    """For `ollama create NAME -f Modelfile`. A base that is a folder here is taken from there."""
    base = getattr(base_model.config, "_name_or_path", "")
    start = FROM_FOLDER.format(base=Path(base).resolve()) if base and Path(base).is_dir() else ""
    return (start or FROM_FILE.format(base=f" {base}" if base else "")) + f"ADAPTER ./{WEIGHTS}\n"


def tensor_names(base_model: Any) -> dict[str, str]:
    """Path of a layer that can be adapted -> name of its weight in GGUF, for a known architecture."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    wanted = _architecture(base_model).name
    known = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == wanted)
    names = get_tensor_name_map(known, base_model.config.num_hidden_layers)
    found = {
        path: names.get_name(f"{path}.weight", try_suffixes=(".weight",))
        for path, module in base_model.named_modules()
        if layer_type_of(module)
    }
    return {path: name for path, name in found.items() if name}


def read(folder: Path, base_model: nn.Module) -> StoredAdapter:
    """What llama.cpp reads, as a PEFT folder would hold it. Raises FormatError."""
    from gguf import GGUFReader

    path = folder / WEIGHTS
    try:
        file = GGUFReader(path)
        fields = {name: field.contents() for name, field in file.fields.items()}
        tensors = {each.name: torch.from_numpy(each.data.copy()) for each in file.tensors}
    except (ValueError, IndexError, KeyError) as error:
        raise FormatError(f"{path} is not a whole GGUF file: {error}") from None
    names = tensor_names(base_model)
    problems = _header_problems(fields, _architecture(base_model).name)
    refuse(str(path), problems + _tensor_problems(tensors, set(names.values())))
    alpha, found = float(fields["adapter.lora.alpha"]), {}
    for layer, name in names.items():
        if f"{name}.lora_a" in tensors:
            pair = Factors(*(tensors[f"{name}{end}"].float() for end in ENDS))
            found[layer] = _arranged(pair, name, base_model, back=True)
    scales = {layer: alpha / B.shape[1] if alpha else 1.0 for layer, (_, B) in found.items()}
    return stored(folder, found, scales)


def _tensor_problems(tensors: Mapping[str, Tensor], names: set[str]) -> list[str]:
    found = [f"{key} is quantised; write it as F32" for key, each in tensors.items() if not each.is_floating_point()]
    for key in tensors:
        name, _, end = key.rpartition(".")
        other = f"{name}.{'lora_b' if end == 'lora_a' else 'lora_a'}"
        if name not in names or f".{end}" not in ENDS:
            found.append(f"{key}: the model has no layer for it")
        elif other not in tensors:
            found.append(f"{other} is missing")
    return found


def _header_problems(fields: Mapping[str, Any], architecture: str) -> list[str]:
    wanted = {"general.type": "adapter", "adapter.type": "lora", "general.architecture": architecture}
    found = [f"{key} = {fields.get(key)!r}, not {value!r}" for key, value in wanted.items() if fields.get(key) != value]
    return found + ([] if "adapter.lora.alpha" in fields else ["adapter.lora.alpha is missing"])


def _architecture(base_model: Any) -> Architecture:
    kind = getattr(getattr(base_model, "config", None), "model_type", None)
    if kind not in ARCHITECTURES:
        raise FormatError(f"model_type {kind!r} is not supported in GGUF; there are: {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[kind]


def _arranged(each: Factors, name: str, base_model: Any, back: bool = False) -> tuple[Tensor, Tensor]:
    """A and B as the file holds them, or, `back`, as the layer does."""
    A, B, config = each.A, each.B, base_model.config
    if name == EMBEDDED:
        A = A.T
    if _architecture(base_model).rotated and name.endswith(ROTATED):
        is_key = name.endswith(ROTATED[1])
        heads = getattr(config, "num_key_value_heads", None) if is_key else None
        B = (_halved if back else _paired)(B, heads or config.num_attention_heads)
    return A, B


def _paired(B: Tensor, heads: int) -> Tensor:
    """Within each head: the rows that are rotated together, i and i + d/2, side by side. (out, r)"""
    return B.view(heads, 2, -1, B.shape[1]).transpose(1, 2).reshape(B.shape)


def _halved(B: Tensor, heads: int) -> Tensor:
    """The inverse of `_paired`."""
    return B.view(heads, -1, 2, B.shape[1]).transpose(1, 2).reshape(B.shape)
