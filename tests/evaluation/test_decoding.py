from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaForCausalLM,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from tailora.evaluation.generate import cache_implementation, generation_arguments

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}
MODELS = {
    "Mistral, window": MistralConfig(**SIZES, sliding_window=6),
    "Qwen3": Qwen3Config(**SIZES, head_dim=8),
    "GPT-2": GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_positions=128, initializer_range=0.3),
}


@pytest.mark.parametrize(
    ("length", "new", "expected"), [(64, 64, "static"), (64, 65, None), (500, 20, "static"), (1, 0, "static")]
)
def test_the_static_cache_is_for_prompts_as_long_as_the_answer(
    tiny: Callable[..., LlamaForCausalLM], length: int, new: int, expected: str | None
) -> None:
    assert cache_implementation(tiny(), length, new) == expected


@pytest.mark.parametrize("kind", MODELS)
def test_both_caches_give_the_same_tokens(kind: str, tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[kind]).eval()
    model.generation_config.eos_token_id = None
    ids = torch.randint(300, (12,)).tolist()
    asked = generation_arguments(model, tokenizer, ids, max_new_tokens=10)
    static = model.generate(**asked)
    asked["generation_config"].cache_implementation = None
    assert torch.equal(static, model.generate(**asked))
