"""A Llama in one GGUF file -> a Hugging Face folder in bfloat16.

transformers reads the same file in three times the time, with progress bars and a quantisation mark that then
forbids saving; `tests/data/test_gguf_llama.py` holds the two equal.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import save_file
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig

# Hugging Face's setting -> GGUF's key
SETTINGS = {
    "vocab_size": "llama.vocab_size",
    "hidden_size": "llama.embedding_length",
    "intermediate_size": "llama.feed_forward_length",
    "num_hidden_layers": "llama.block_count",
    "num_attention_heads": "llama.attention.head_count",
    "num_key_value_heads": "llama.attention.head_count_kv",
    "max_position_embeddings": "llama.context_length",
    "rms_norm_eps": "llama.attention.layer_norm_rms_epsilon",
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}
# GGUF's name -> Hugging Face's, for what stands once and for what every block has
ONCE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert(source: Path, folder: Path) -> None:
    """Write model, tokenizer, chat template and generation settings of `source` into `folder`."""
    reader = GGUFReader(source)
    config = read_config(reader)
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    save_file(read_weights(reader, config), folder / "model.safetensors", metadata={"format": "pt"})
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)


def read_config(reader: GGUFReader) -> LlamaConfig:
    settings = {name: value(reader, key) for name, key in SETTINGS.items()}
    tied = all(tensor.name != "output.weight" for tensor in reader.tensors)
    rope = {"rope_type": "default", "rope_theta": value(reader, "llama.rope.freq_base")}
    fixed = {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    return LlamaConfig(**settings, **fixed, rope_parameters=rope, tie_word_embeddings=tied)


def read_weights(reader: GGUFReader, config: LlamaConfig) -> dict[str, torch.Tensor]:
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    weights = {}
    for tensor in reader.tensors:
        dense = dequantize(tensor.data, tensor.tensor_type)  # (out, in), or (features,)
        kind = tensor.name.split(".")[-2]
        if kind in heads:
            dense = unrotate(dense, heads[kind])
        weights[hugging_face_name(tensor.name)] = torch.from_numpy(np.array(dense)).to(torch.bfloat16)
    return weights


def hugging_face_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`"""
    parts = name.split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{BLOCK[parts[2]]}.{parts[3]}"
    return f"{ONCE[parts[0]]}.{parts[1]}"


def unrotate(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """GGUF keeps the two halves that rotate together interleaved, row by row; Hugging Face keeps them apart."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def value(reader: GGUFReader, key: str) -> Any:
    return reader.fields[key].contents()
