"""Attention and MLP, read off the names of models of several families."""

from typing import Any

import pytest
from tiny import chat_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    MixtralConfig,
    OPTConfig,
)

from tailora.core.config import LoRAConfig
from tailora.core.targets import select
from tailora.model import LoRAModel
from tailora.study.model_layout import shortest_names, target_groups

SMALL: dict[str, Any] = {"vocab_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16}
FAMILIES = {
    "llama": (chat_model, 7, 4),
    "gpt2": (lambda: made(GPT2Config(vocab_size=40, n_layer=2, n_head=2, n_embd=16)), 4, 2),
    "neox": (lambda: made(GPTNeoXConfig(**SMALL, intermediate_size=32)), 4, 2),
    "opt": (lambda: made(OPTConfig(**SMALL, ffn_dim=32, word_embed_proj_dim=16)), 6, 4),
    "mixtral": (lambda: made(MixtralConfig(**SMALL, intermediate_size=32, num_key_value_heads=2)), None, 4),
}


def made(config: Any) -> nn.Module:
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_and_mlp_are_told_apart_and_together_are_all(family: str) -> None:
    make, layers, of_attention = FAMILIES[family]
    model = make()
    found = target_groups(model)
    if layers is None:  # its experts are no linear layers, and the routers are no MLP worth the name
        assert "mlp" not in found or len(found["mlp"]) >= 1
        return
    paths = {
        word: {target.path for target in select(model, LoRAConfig(r=1, target_modules=found[word])).targets}
        for word in ("attention", "mlp")
    }
    everything = {target.path for target in select(model, LoRAConfig(r=1)).targets}
    assert len(paths["attention"]) == 2 * of_attention
    assert len(everything) == 2 * layers
    assert paths["attention"] | paths["mlp"] == everything
    assert not paths["attention"] & paths["mlp"]
    assert all("att" in path for path in paths["attention"])


def test_the_parts_of_an_adapted_model_are_those_of_its_base() -> None:
    model = LoRAModel(chat_model(), LoRAConfig(r=2))
    assert target_groups(model.base_model) == target_groups(chat_model())
    assert target_groups(chat_model())["largest_r"] == 16


def test_a_model_without_attention_has_no_such_words() -> None:
    assert target_groups(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))) == {"largest_r": 3}


def test_names_are_the_shortest_that_nothing_else_has() -> None:
    assert shortest_names(["h.0.attn.c_proj", "h.0.attn.c_attn"], ["h.0.mlp.c_proj"]) == ["attn.c_proj", "c_attn"]
