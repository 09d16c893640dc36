"""A random chat model of 30,000 parameters and its tokenizer, small models of any class of transformers, and random
values for adapters."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
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
    1: "n_group topk_group num_nextn_predict_layers num_mem_blocks num_key_value_groups num_ngroups "
    "mamba_n_groups n_groups",
    2: "num_hidden_layers n_layer num_layers n_layers encoder_layers decoder_layers num_decoder_layers depth "
    "num_key_value_heads num_kv_heads n_head_kv num_kv_head num_experts_per_tok moe_topk "
    "num_selected_experts moe_top_k num_experts_per_token top_k_experts first_k_dense_replace "
    "decoder_num_hidden_layers num_encoder_layers encoder_num_hidden_layers attn_layer_period "
    "expert_layer_period conv_L_cache global_attn_every_n_layers",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
    "num_experts num_local_experts n_routed_experts moe_num_experts mamba_n_heads mamba_num_heads "
    "linear_num_key_heads linear_num_value_heads num_linear_heads attention_heads "
    "decoder_num_attention_heads encoder_num_attention_heads num_attn_heads mamba_d_conv conv_kernel "
    "linear_conv_kernel_dim num_conv_pos_embedding_groups",
    8: "head_dim d_kv v_head_dim qk_nope_head_dim qk_rope_head_dim kv_channels attention_head_size "
    "attention_head_dim mamba_head_dim mamba_d_head linear_key_head_dim linear_value_head_dim patch_size "
    "rotary_dim mamba_headdim hidden_size_per_layer_input state_size mamba_d_state ssm_state_size "
    "chunk_size global_head_dim num_mel_bins num_conv_pos_embeddings conv_chunk_size mamba_chunk_size",
    16: "q_lora_rank kv_lora_rank mamba_dt_rank time_step_rank lora_rank vocab_size_per_layer_input",
    32: "hidden_size d_model n_embd dim embed_dim embedding_size decoder_hidden_size word_embed_proj_dim "
    "image_size emb_dim rnn_width lru_width attention_hidden_size emb_size output_hidden_size "
    "classifier_proj_size decoder_hidden_dim encoder_hidden_size index_head_dim",
    64: "intermediate_size ffn_dim d_ff n_inner encoder_ffn_dim decoder_ffn_dim hidden_dim "
    "moe_intermediate_size ffn_hidden_size shared_expert_intermediate_size intermediate_dim "
    "mlp_hidden_size shared_intermediate_size d_inner max_position_embeddings n_positions n_ctx "
    "max_seq_len encoder_intermediate_size decoder_intermediate_size block_size sliding_window "
    "moe_shared_expert_intermediate_size expert_ffn_hidden_size max_source_positions max_target_positions "
    "mamba_d_ssm inner_dim dense_intermediate_size intermediate_size_mlp",
    80: "vocab_size text_vocab_size",
}
SMALL_BY_NAME = {name: size for size, names in SMALL.items() for name in names.split()}
TOKEN_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "sep_token_id": 2}


def tiny_config(config_class: type[PreTrainedConfig], settings: dict[str, Any] | None = None) -> PreTrainedConfig:
    """Returns the class's default config with small sizes and no dropout, also in the configs inside it."""
    default, settings = config_class(), settings or {}
    small: dict[str, Any] = {
        name: size
        for name, size in SMALL_BY_NAME.items()
        if isinstance(getattr(default, name, None), int) and not isinstance(getattr(default, name), bool)
        if not isinstance(getattr(config_class, name, None), property)
    }
    small |= {name: index for name, index in TOKEN_IDS.items() if isinstance(getattr(default, name, None), int)}
    small |= {name: 0.0 for name, value in default.to_dict().items() if "drop" in name and isinstance(value, float)}
    small |= {"pad_token_id": 0} | ({"apply_spec_augment": False} if hasattr(default, "apply_spec_augment") else {})
    for name in config_class.sub_configs:
        if (inner := getattr(default, name, None)) is not None:
            small[name] = tiny_config(type(inner), settings.get(name))
    return config_class(**{**small, **settings})


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
