"""The tiny chat model, sure of its words."""

from collections.abc import Callable

import pytest
import torch
from tiny import chat_model, chat_tokenizer
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tailora import LoRAConfig, LoRAModel


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """EOS is not what ends a turn, as in Llama 3."""
    texts = ["user assistant hello how are you today " * 5]
    return chat_tokenizer(texts, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


@pytest.fixture
def tiny(tokenizer: PreTrainedTokenizerFast) -> Callable[..., LlamaForCausalLM]:
    def make(positions: int = 256) -> LlamaForCausalLM:
        return chat_model(
            vocab_size=len(tokenizer),
            max_position_embeddings=positions,
            initializer_range=0.3,  # else every token is as likely as the next
            attention_dropout=0.5,  # shows when evaluation mode is forgotten
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )

    return make


@pytest.fixture
def model(tiny: Callable[..., LlamaForCausalLM]) -> LlamaForCausalLM:
    return tiny()


@pytest.fixture
def tuned(model: LlamaForCausalLM) -> LoRAModel:
    tuned = LoRAModel(model, LoRAConfig(r=4, lora_dropout=0.5))
    generator = torch.Generator(torch.get_default_device()).manual_seed(1)
    for layer in tuned.lora_layers.values():
        torch.nn.init.normal_(layer.lora_B, std=0.3, generator=generator)
    return tuned
