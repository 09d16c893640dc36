"""Thirds of a model, attention and MLP, and settings that name them."""

import pytest
from tiny import chat_model

from tailora import LoRAConfig, LoRAModel
from tailora.study.model_layout import block_of, by_group, in_order, layer_count, layer_range, rank_pattern

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


def test_groups_are_thirds_in_order() -> None:
    found = by_group(list(reversed([*PATHS, "lm_head"])), 12)
    assert list(found) == [
        *("early attention", "early MLP", "middle attention", "middle MLP", "late attention", "late MLP"),
        "lm_head",
    ]
    assert {len(paths) for name, paths in found.items() if name != "lm_head"} == {8}
    assert layer_range(found["late MLP"]) == "8-11"
    assert layer_range(["model.layers.3.x"]) == "3"
    assert layer_range(["lm_head"]) == ""


def test_a_group_of_fewer_layers_than_three() -> None:
    assert list(by_group(PATHS[:4], 1)) == ["early attention", "early MLP"]
    assert list(by_group(PATHS[:8], 2)) == ["early attention", "early MLP", "middle attention", "middle MLP"]


def test_layers_come_by_number() -> None:
    assert [path.split(".")[2] for path in in_order(["a.b.10.x", "a.b.9.x", "a.b.9.w"])] == ["9", "9", "10"]
    assert layer_count(PATHS) == 12
    assert layer_count(["lm_head"]) == 1


def test_a_pattern_means_its_group_and_training_takes_it() -> None:
    late = by_group(PATHS, 12)["late MLP"]
    found = rank_pattern(dict.fromkeys(late, 32), PATHS)
    assert len(found) == 1
    model = chat_model(num_hidden_layers=12, hidden_size=64, num_attention_heads=4, num_key_value_heads=4)
    targets = ["q_proj", "o_proj", "up_proj", "down_proj"]
    adapter = LoRAModel(model, LoRAConfig(r=16, target_modules=targets, rank_pattern=found)).adapter()
    ranks = {path: layer.r for path, layer in adapter.low_rank.items()}
    assert ranks == {path: 32 if path in late else 16 for path in PATHS}


def test_patterns_stay_exact_where_a_short_one_would_mean_more() -> None:
    among = ["h.0.a", "x.h.0.a", "lm_head", "h.1.a"]
    assert rank_pattern({"h.0.a": 2, "lm_head": 2}, among) == {r"^h\.0\.a": 2, "^lm_head": 2}
    both = rank_pattern({"h.0.a": 2, "h.1.a": 4}, ["h.0.a", "h.1.a"])
    assert sorted(both.values()) == [2, 4]
