"""A random chat model of 30,000 parameters and its tokenizer, small models of any class of transformers, and random
values for adapters."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from tailora import LoRALayer, LoRAModel
from tailora.core.layer_types import EMBEDDING

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCABULARY = 300  # the 256 bytes, the special tokens and a few merges

# of small models of transformers; with heads that share keys
SIZES: dict[str, Any] = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED: dict[str, Any] = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2}

# of a well-known model, whose figures are known; without the number of its layers, 32
LLAMA_3_8B: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}


def chat_tokenizer(texts: Iterable[str], **special: str) -> PreTrainedTokenizerFast:
    """Returns a byte-level tokenizer, as GPT-2's. `special`: which of SPECIAL is eos_token, pad_token or bos_token."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=CHATML, **special)


def word_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Returns a WordPiece tokenizer, as BERT's, which writes [CLS] and [SEP] around one text or two."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words = sorted(set(" ".join(texts).lower().split()))  # WordPieceTrainer numbers them differently in each run
    letters = sorted(set("".join(words)))
    tokens = dict.fromkeys([*special, *letters, *(f"##{letter}" for letter in letters), *words])
    vocabulary = {token: number for number, token in enumerate(tokens)}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ids = [(token, special.index(token)) for token in ("[CLS]", "[SEP]")]
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ids
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def chat_model(**settings: Any) -> LlamaForCausalLM:
    """Returns a model with the same weights every time. `settings` are those of LlamaConfig."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **settings}))


SMALL: dict[int, str] = {  # size -> settings of transformers' configs that get it
    0: "num_kv_shared_layers",
    1: "n_group topk_group num_nextn_predict_layers num_mem_blocks num_key_value_groups num_ngroups "
    "mamba_n_groups n_groups",
    2: "num_hidden_layers n_layer num_layers n_layers encoder_layers decoder_layers num_decoder_layers depth "
    "num_key_value_heads num_kv_heads n_head_kv num_kv_head num_experts_per_tok moe_topk "
    "num_selected_experts moe_top_k moe_k num_experts_per_token top_k_experts first_k_dense_replace "
    "decoder_num_hidden_layers num_encoder_layers encoder_num_hidden_layers attn_layer_period "
    "expert_layer_period conv_L_cache global_attn_every_n_layers",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
    "num_experts num_local_experts n_routed_experts moe_num_experts mamba_n_heads mamba_num_heads "
    "linear_num_key_heads linear_num_heads linear_num_value_heads num_linear_heads attention_heads "
    "decoder_num_attention_heads encoder_num_attention_heads num_attn_heads mamba_d_conv conv_kernel "
    "linear_conv_kernel_dim num_conv_pos_embedding_groups",
    8: "head_dim d_kv v_head_dim qk_nope_head_dim qk_rope_head_dim kv_channels attention_head_size "
    "attention_head_dim mamba_head_dim linear_head_dim linear_key_head_dim linear_value_head_dim patch_size "
    "rotary_dim mamba_headdim hidden_size_per_layer_input state_size mamba_d_state ssm_state_size "
    "chunk_size global_head_dim num_mel_bins num_conv_pos_embeddings conv_chunk_size mamba_chunk_size",
    16: "q_lora_rank kv_lora_rank mamba_dt_rank time_step_rank lora_rank mamba_d_head",
    32: "hidden_size d_model n_embd dim embed_dim embedding_size decoder_hidden_size word_embed_proj_dim "
    "image_size emb_dim rnn_width lru_width attention_hidden_size emb_size output_hidden_size "
    "classifier_proj_size decoder_hidden_dim encoder_hidden_size index_head_dim "
    "text_hidden_size out_hidden_size adapter_in_dim adapter_out_dim adapter_input_size audio_hidden_size",
    64: "intermediate_size ffn_dim d_ff n_inner encoder_ffn_dim decoder_ffn_dim hidden_dim "
    "moe_intermediate_size ffn_hidden_size shared_expert_intermediate_size intermediate_dim "
    "mlp_hidden_size shared_intermediate_size d_inner max_position_embeddings n_positions n_ctx "
    "max_seq_len encoder_intermediate_size decoder_intermediate_size block_size sliding_window "
    "moe_shared_expert_intermediate_size expert_ffn_hidden_size max_source_positions max_target_positions "
    "mamba_d_ssm inner_dim dense_intermediate_size intermediate_size_mlp",
    80: "vocab_size text_vocab_size unpadded_vocab_size vocab_size_per_layer_input encoder_hash_byte_group_vocab",
}
COMPASS: dict[str, Any] = {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}}
MROPE: dict[str, Any] = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [2, 1, 1],
        "partial_rotary_factor": 1.0,
    }
}
CROSS_ATTENTION = {"is_decoder": True, "add_cross_attention": True}
INDEXER = dict(zip(("indexer_n_heads", "indexer_kv_heads", "indexer_head_dim"), (2, 1, 8), strict=True))
SETTINGS: dict[str, dict[str, Any]] = {  # model type -> what SMALL does not give
    "apertus1p5": {
        "audio_config": {"codebook_dim": 32, "codebook_size": 8},
        "vision_config": {"codebook_size": 8, "base_channels": 32},
        "image_token_id": 60,
        "audio_token_id": 61,
        "image_token_offset": 62,
        "audio_token_offset": 70,
    },
    "bamba": {"attn_layer_indices": [1]},
    "blip-2": {"num_query_tokens": 2, "image_token_index": 5},
    "blt_local_encoder": {"hidden_size_global": 64},
    "blt_local_decoder": {"hidden_size_global": 64},
    "blt_global_transformer": {"hidden_size": 64, "head_dim": 16},
    "chameleon": {"vocabulary_map": {"<image>": 5}},
    "cohere_compass_text": COMPASS,
    "convnext": {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2},
    "cosmos3_edge_text": MROPE,
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64},
    "dory": {
        "num_hidden_layers": 4,
        "n_input_layers": 1,
        "n_output_layers": 1,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "emu3_vqgan": {"base_channels": 32, "codebook_size": 80},
    "emu3": {"vocabulary_map": {"<image>": 5, "<|extra_200|>": 6}},
    "ernie4_5_vl_moe_text": {"rope_parameters": {**MROPE["rope_parameters"], "mrope_section": [1, 1, 2]}},
    "encoder-decoder": {"decoder": CROSS_ATTENTION},
    "esm": {"vocab_size": 80},
    "esmc": {"num_key_value_heads": 4},
    "falcon_h1": {"mamba_d_head": 16},
    "gemma3n_text": {"intermediate_size": 64, "activation_sparsity_pattern": [0.0, 0.95]},
    "glm4v_text": MROPE,
    "glm4v_moe_text": MROPE,
    "glm_ocr_text": MROPE,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granite4_vision": {
        "vision_config": {"hidden_size": 64},
        "downsample_rate": "1/2",
        "deepstack_layer_map": [(0, 0)],
        "spatial_target_layers": [1],
    },
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "hunyuan_vl_text": {"head_dim": 8, **MROPE},
    "hy_v4_vl_text": MROPE,
    "janus_vqgan": {"base_channels": 32, "num_embeddings": 80, "image_token_embed_dim": 32, "projection_dim": 32},
    "instructblip": {"num_query_tokens": 2, "image_token_index": 5},
    "instructblipvideo": {"num_query_tokens": 2, "video_token_index": 5},
    "jamba": {"attn_layer_offset": 1, "expert_layer_offset": 1},
    "kosmos-2": {"latent_query_num": 2},
    "layoutlmv3": {"coordinate_size": 4, "shape_size": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3},
    "lilt": {"hidden_size": 48},
    "mamba2": {"head_dim": 16},
    "ministral": {"head_dim": 8},
    "mistral4": {"head_dim": 16},
    "molmo2_adapter": {"vision_feature_layer": [0, 1]},
    "muse_spark_audio": {"num_hidden_layers": 4, "hidden_sizes": [32] * 4, "depths": [1] * 4},
    "musicgen_decoder": {"num_codebooks": 1},
    "musicgen_melody_decoder": {"num_codebooks": 1},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "nemotron3_5_transcribe_word_timestamp": {"blank_token_id": 5},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "paddleocr_vl_text": MROPE,
    "qwen2_vl_text": MROPE,
    "qwen2_5_omni_text": MROPE,
    "qwen2_5_omni_thinker": {"vision_start_token_id": 70},
    "qwen2_5_vl_text": MROPE,
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 70},
    "qwen4_exp_text": {**INDEXER, "indexer_budget": 4, "indexer_compress_ratio": 2},
    "perceiver": {"d_latents": 32, "num_latents": 8, "num_self_attends_per_block": 2},
    "recurrent_gemma": {"num_hidden_layers": 3},  # two recurrent ones and attention
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "step3p5": {"sliding_window": 64},
    "swin": {"depths": [1, 1], "num_heads": [2, 4], "window_size": 2},
    "vision-encoder-decoder": {"decoder": CROSS_ATTENTION},
    "vibevoice_acoustic_tokenizer_encoder": {"num_filters": 2, "depths": [1] * 7},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "zamba2": {"attention_hidden_size": 64, "attention_head_dim": 16},
}
SMALL_BY_NAME = {name: size for size, names in SMALL.items() for name in names.split()}
TOKEN_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "sep_token_id": 2}


def tiny_config(config_class: type[PreTrainedConfig], settings: dict[str, Any] | None = None) -> PreTrainedConfig:
    """Returns the class's default config with small sizes and no dropout, also in the configs inside it.

    Raises what the config class raises if it rejects its own defaults.
    """
    default, settings = config_class(), {**SETTINGS.get(config_class.model_type, {}), **(settings or {})}
    values = default.to_dict()
    picked = layers_of_each_kind(values)
    values |= {alias: values[name] for alias, name in config_class.attribute_map.items() if name in values}
    small: dict[str, Any] = {
        name: min(value, SMALL_BY_NAME[name])
        for name, value in values.items()
        if name in SMALL_BY_NAME and isinstance(value, int) and not isinstance(value, bool)
        if not isinstance(getattr(config_class, name, None), property)
    }
    small |= picked
    if "kv_lora_rank" in small:  # each head has its own keys
        small |= {"num_key_value_heads": 4}
    small |= {name: index for name, index in TOKEN_IDS.items() if isinstance(values.get(name), int)}
    small |= {name: 0.0 for name, value in values.items() if "drop" in name and isinstance(value, float)}
    small |= {"pad_token_id": 0} | ({"apply_spec_augment": False} if "apply_spec_augment" in values else {})
    for name in config_class.sub_configs:
        if (inner := getattr(default, name, None)) is not None:
            small[name] = tiny_config(type(inner), settings.pop(name, None))
    return config_class(**{**small, **settings})


def layers_of_each_kind(values: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings for one layer of each kind that lists such as layer_types name, and at least two layers."""
    count = values.get("num_hidden_layers")
    lists = {
        name: value
        for name, value in values.items()
        if isinstance(value, list) and value and len(value) == count and isinstance(value[0], str)
    }
    if not lists:
        return {}
    kinds = list(zip(*lists.values(), strict=True))
    chosen = sorted({kinds.index(kind) for kind in kinds})
    chosen = [0, 1] if chosen == [0] else chosen
    picked = {name: [value[index] for index in chosen] for name, value in lists.items()}
    return {"num_hidden_layers": len(chosen), **picked}


def tiny_model(class_name: str, **settings: Any) -> PreTrainedModel:
    """Returns a small model of this class of transformers with random weights. `settings` are those of its config."""
    model_class = getattr(transformers, class_name)
    torch.manual_seed(0)
    return model_class(tiny_config(model_class.config_class, settings))


def packed_row(lengths: Sequence[int], device: torch.device | str = "cpu") -> dict[str, Any]:
    """Returns the inputs of a model for one row, (1, tokens), of random documents of these lengths."""
    ends = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    ids = torch.randint(300, (1, sum(lengths)), generator=torch.Generator().manual_seed(len(lengths)))
    return {
        "input_ids": ids.to(device),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None].to(device),
        "use_cache": False,
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


def stir(model: LoRAModel, seed: int = 2) -> None:
    """Gives all that the adapters train random values, which depend on nothing but the seed."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    for layer in model.lora_layers.values():
        for name, parameter in layer.named_parameters():
            value = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.data = (value + 1.5 if name in ("scaling", "lora_magnitude_vector") else value).to(
                parameter.dtype
            )
        if isinstance(layer, LoRALayer) and layer.layer_type is EMBEDDING:
            layer.lora_A.data[:, 0] = 0  # the padding id's column starts at zero and has no gradient


def stirred_model(base: nn.Module, *arguments: Any) -> LoRAModel:
    """Returns a LoRAModel of the base, with random values in its adapter."""
    model = LoRAModel(base, *arguments)
    stir(model)
    return model
