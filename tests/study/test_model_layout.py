"""Groups of layers by depth, attention and MLP, and settings that name them."""

from collections import Counter
from typing import Any

import pytest
from tiny import chat_model, tiny_model
from tiny_vision import tiny_llava
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, MixtralConfig, OPTConfig

from tailora import LoRAConfig, LoRAModel
from tailora.core.targets import select
from tailora.study.model_layout import (
    block_of,
    group_of,
    in_order,
    layer_count,
    layer_range,
    shortest_names,
    target_groups,
)
from tailora.train.trainable import trained_parts

NAMES = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
PATHS = [f"model.layers.{layer}.{name}" for layer in range(12) for name in NAMES]


@pytest.mark.parametrize(
    ("path", "block"),
    [
        ("model.layers.0.self_attn.o_proj", "attention"),
        ("transformer.h.3.attn.c_proj", "attention"),
        ("transformer.h.3.mlp.c_proj", "MLP"),
        ("bert.encoder.layer.1.attention.output.dense", "attention"),
        ("bert.encoder.layer.1.output.dense", "MLP"),
        ("gpt_neox.layers.0.mlp.dense_h_to_4h", "MLP"),
        ("decoder.block.1.layer.0.SelfAttention.q", "attention"),
        ("decoder.block.1.layer.2.DenseReluDense.wi_0", "MLP"),
        ("model.layers.1.mlp.experts.gate_up_proj", "MLP"),
        ("down.0.attentions.1.transformer_blocks.0.ff.net.0.proj", "MLP"),
        ("layers.3.fc1", "MLP"),
        ("layers.3.q_proj", "attention"),
        ("model.embed_tokens", "other"),
    ],
)
def test_the_innermost_module_says_the_block(path: str, block: str) -> None:
    assert block_of(path) == block


@pytest.mark.parametrize(
    ("layers", "groups"),
    [(12, ["early", "middle", "late"]), (2, ["early", "middle"]), (1, ["early"])],
)
def test_groups_are_thirds(layers: int, groups: list[str]) -> None:
    found = [group_of(path, layers) for path in PATHS[: 4 * layers]]
    expected = [f"{depth} {block}" for depth in groups for block in ("attention", "MLP")]
    assert Counter(found) == dict.fromkeys(expected, 8 if layers == 12 else 2)
    assert group_of("lm_head", layers) == "lm_head"


def test_a_range_of_layers_is_named_by_its_ends() -> None:
    assert layer_range(PATHS[32:]) == "8-11"
    assert layer_range(["model.layers.3.x"]) == "3"
    assert layer_range(["lm_head"]) == ""


def test_layers_come_by_number() -> None:
    assert [path.split(".")[2] for path in in_order(["a.b.10.x", "a.b.9.x", "a.b.9.w"])] == ["9", "9", "10"]
    assert layer_count(PATHS) == 12
    assert layer_count(["lm_head"]) == 1


# ---- Groups of a model, for target_modules

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


def test_groups_of_a_model_for_images_are_in_its_language_model() -> None:
    model, _ = tiny_llava()
    groups = target_groups(model)
    assert groups["all-linear"] == "language-model"
    for word, count in (("attention", 8), ("mlp", 6), ("all-linear", 14)):  # of 2 layers; the tower has the same names
        adapted = LoRAModel(model, LoRAConfig(target_modules=groups[word]))
        assert len(adapted.lora_layers) == count
        assert trained_parts(adapted) == ["language model"]
        adapted.unload()


def test_a_head_for_labels_limits_no_rank() -> None:
    model = tiny_model("BertForSequenceClassification", num_labels=2)
    assert target_groups(model)["largest_r"] == model.config.hidden_size


def test_names_are_the_shortest_that_nothing_else_has() -> None:
    assert shortest_names(["h.0.attn.c_proj", "h.0.attn.c_attn"], ["h.0.mlp.c_proj"]) == ["attn.c_proj", "c_attn"]
