"""Small Llama and gpt-oss models in the formats of quantized files: written by compressed-tensors, or by the formats'
definitions where their packages do not run here."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from packed_layers import awq_tensors, gptq_tensors
from safetensors.torch import save_file
from tiny import chat_model, chat_tokenizer
from torch import Tensor, nn
from transformers import GptOssConfig, GptOssForCausalLM, PreTrainedModel

WIDTHS: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 4, "vocab_size": 320}
TEXTS = ["red blue green north south one two three sun rain", "user assistant"] * 3
FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
FP8_MAX = 448

Dense = dict[str, Tensor]  # path of a layer, or name of a parameter -> what its codes stand for


def llama() -> PreTrainedModel:
    return chat_model(**WIDTHS, initializer_range=0.2).to(torch.bfloat16)


def write(folder: Path, model: PreTrainedModel, state: dict[str, Tensor], settings: dict[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    save_file({name: value.contiguous().clone() for name, value in state.items()}, folder / "model.safetensors", PT)
    config = {**model.config.to_dict(), "architectures": [type(model).__name__], "quantization_config": settings}
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    chat_tokenizer(TEXTS, eos_token="<|im_end|>", pad_token="<|im_end|>").save_pretrained(folder)


PT = {"format": "pt"}


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, nn.Linear) and path != "lm_head"}


def write_packed(pack: Callable[[Tensor], dict[str, Tensor]], settings: dict[str, Any], folder: Path) -> Dense:
    """Writes a model whose layers have the tensors of `pack` in place of the weight."""
    model = llama()
    state = dict(model.state_dict())
    for path in linear_layers(model):
        tensors = pack(state.pop(f"{path}.weight"))
        state |= {f"{path}.{name}": tensor for name, tensor in tensors.items()}
    write(folder, model, state, settings)
    return {}


def gptq(folder: Path) -> Dense:
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": False, "desc_act": False}
    return write_packed(gptq_tensors, settings, folder)


def awq(folder: Path) -> Dense:
    settings = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}
    return write_packed(awq_tensors, settings, folder)


def fp8(folder: Path) -> Dense:
    """Blocks of 128 x 128, as DeepSeek's."""
    model = llama()
    state, dense = dict(model.state_dict()), {}
    for path, layer in linear_layers(model).items():
        blocks = layer.weight.float().unflatten(1, (-1, 128)).unflatten(0, (-1, 128))
        scales = blocks.abs().amax((1, 3)) / FP8_MAX
        codes = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
        dense[path] = (codes.float() * scales[:, None, :, None]).flatten(2).flatten(0, 1)
        state |= {f"{path}.weight": codes.flatten(2).flatten(0, 1), f"{path}.weight_scale_inv": scales}
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    write(folder, model, state, settings)
    return dense


def mxfp4(folder: Path) -> Dense:
    """The experts of gpt-oss: blocks of 32 along a row with a power of two, two codes in a byte."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2, "head_dim": 16}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    ids = {"vocab_size": 320, "max_position_embeddings": 256, "pad_token_id": 2, "eos_token_id": 2}
    torch.manual_seed(0)
    config = GptOssConfig(**sizes, **experts, **rope, **ids, initializer_range=0.2)
    model = GptOssForCausalLM(config).to(torch.bfloat16)
    state, dense = dict(model.state_dict()), {}
    for name in [name for name in state if name.endswith((".gate_up_proj", ".down_proj"))]:
        blocks = state.pop(name).mT.float().unflatten(-1, (-1, 32))
        exponents = blocks.abs().amax(-1, keepdim=True).log2().floor() - 2
        codes = ((blocks / 2**exponents)[..., None] - FP4).abs().argmin(-1)
        dense[name] = (FP4[codes] * 2**exponents).flatten(-2).mT
        state[f"{name}_blocks"] = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)
        state[f"{name}_scales"] = (exponents[..., 0] + 127).to(torch.uint8)
    write(folder, model, state, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    return dense


def compressed(groups: dict[str, list[str]], folder: Path) -> Dense:
    """groups: scheme of compressed-tensors -> its layers. The package quantizes and writes the model."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams

    model = llama()
    schemes = {name: preset_name_to_scheme(name, layers) for name, layers in groups.items()}
    config = QuantizationConfig(config_groups=schemes, ignore=["lm_head"], quantization_status="initialized")
    apply_quantization_config(model, config, show_progress=False)
    dense = {}
    for path, layer in linear_layers(model).items():
        arguments: Any = layer.quantization_scheme.weights  # type: ignore[union-attr]
        weight, parameters = layer.weight.detach(), dict(layer.named_parameters())
        rows, columns = {
            "tensor": weight.shape,
            "channel": (1, weight.shape[1]),
            "group": (1, arguments.group_size),
            "block": arguments.block_structure,
        }[arguments.strategy]
        blocks = weight.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
        scales, zeros = calculate_qparams(blocks.amin((1, 3)), blocks.amax((1, 3)), arguments)
        scale, zero = parameters["weight_scale"], parameters["weight_zero_point"]
        scale.data.copy_(scales.reshape(scale.shape))
        zero.data.copy_(zeros.reshape(zero.shape))
        if "input_scale" in parameters:
            parameters["input_scale"].data.fill_(0.02)
        dense[path] = fake_quantize(weight, scale, zero, arguments).float()
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))
    chat_tokenizer(TEXTS, eos_token="<|im_end|>", pad_token="<|im_end|>").save_pretrained(folder)
    return dense
