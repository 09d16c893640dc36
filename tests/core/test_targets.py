"""Which layers a config selects, and the errors of settings that match nothing."""

from typing import Any

import peft
import pytest
import torch
from peft.utils.other import ModulesToSaveWrapper
from tiny import chat_model, tiny_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from tailora import LoRAConfig, LoRAModel
from tailora.core.patterns import inside, layer_index
from tailora.core.targets import task_heads
from tailora.errors import ConfigError, TargetError


def paths(model: nn.Module, **settings: Any) -> list[str]:
    return [row.path for row in LoRAModel(model, LoRAConfig(r=2, **settings)).summary().rows]


def test_all_linear_is_every_linear_layer_but_the_output_head() -> None:
    found = paths(chat_model())
    assert len(found) == 14
    assert not any("lm_head" in path or "embed" in path for path in found)
    assert len(paths(GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50)))) == 8


def test_all_linear_leaves_the_callers_config_alone_and_suits_a_deeper_model() -> None:
    config = LoRAConfig(r=2)
    before = config.model_dump()
    assert len(LoRAModel(chat_model(num_hidden_layers=1), config).lora_layers) == 7
    assert config.model_dump() == before
    assert len(LoRAModel(chat_model(num_hidden_layers=3), config).lora_layers) == 21


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["q_proj", "kproj"]}, "'kproj' matches no layer; did you mean k_proj"),
        ({"target_modules": ["norm"]}, "'norm' is a LlamaRMSNorm, which cannot be adapted itself"),
        (
            {"target_modules": ["mlp"]},
            "'mlp' is a LlamaMLP, which cannot be adapted itself; layers inside it: down_proj, gate_proj, up_proj",
        ),
        ({"target_modules": "q_proj"}, "matches no full path of a layer; did you mean q_proj"),
        ({"target_modules": []}, "is empty; add names, or remove it"),
        ({"exclude_modules": ["nothing_like_it"]}, "exclude_modules: 'nothing_like_it' matches no layer; existing: "),
        (
            {"exclude_modules": r".*"},
            r"no layer left to adapt with target_modules='all-linear' and exclude_modules='\.\*'",
        ),
        (
            {"target_modules": ["q_proj"], "exclude_modules": ["0.self_attn.q_proj"], "layers_to_transform": 0},
            r"exclude_modules=\['0.self_attn.q_proj'\] and layers_to_transform=0; existing: down_proj",
        ),
        (
            {"layers_to_transform": [1, 7]},
            r"layers_to_transform=\[7\]: no layers with these indices; the model has 0..1",
        ),
        ({"rank_pattern": {"qproj": 3}}, "rank_pattern: 'qproj' matches no adapted layer; did you mean q_proj"),
        ({"alpha_pattern": {"lm_head": 3}}, "alpha_pattern: 'lm_head' matches no adapted layer"),
        ({"modules_to_save": ["lm_heat"]}, "modules_to_save: 'lm_heat' matches no layer; did you mean lm_head"),
        ({"target_modules": ["lm_head"], "modules_to_save": ["lm_head"]}, "in both target_modules and modules_to_save"),
        ({"rank_pattern": {"k_proj": 17}}, r"k_proj: r = 17 is too large for a matrix of 32 -> 16; use 1..16"),
    ],
)
def test_what_matches_nothing_is_an_error_that_names_the_nearest(settings: dict[str, Any], message: str) -> None:
    model = chat_model()
    with pytest.raises(TargetError, match=message):
        LoRAModel(model, LoRAConfig(r=2, **settings))
    assert type(model.lm_head) is nn.Linear
    assert model.lm_head.weight.requires_grad  # nothing was changed


@pytest.mark.parametrize(
    ("model", "remedy"),
    [
        (nn.Sequential(nn.Embedding(3, 4), nn.ReLU()), r"no layer left to adapt with target_modules=\S+; existing: 0"),
        (
            nn.Sequential(nn.ReLU(), nn.LayerNorm(4)),
            r"no layer left to adapt with target_modules=\S+; the model has none",
        ),
    ],
)
def test_a_model_without_linear_layers_is_refused_with_what_can_be_named(model: nn.Module, remedy: str) -> None:
    with pytest.raises(TargetError, match=remedy):
        LoRAModel(model, LoRAConfig(r=2))


def test_all_problems_are_raised_at_once() -> None:
    with pytest.raises(TargetError) as caught:
        LoRAModel(
            chat_model(),
            LoRAConfig(target_modules=["q_proj", "x_proj"], rank_pattern={"z": 3}, layers_to_transform=[9]),
        )
    assert all(word in str(caught.value) for word in ("x_proj", "'z'", "[9]", "3 problems"))


def test_the_index_is_the_first_number_of_the_path() -> None:
    assert layer_index("model.layers.3.mlp.experts.5.w1") == 3
    assert layer_index("lm_head") is None


@pytest.mark.parametrize(
    ("class_name", "heads"),
    [
        ("BertForSequenceClassification", ["classifier"]),
        ("RobertaForTokenClassification", ["classifier"]),
        ("DistilBertForMultipleChoice", ["pre_classifier", "classifier"]),
        ("LlamaForQuestionAnswering", ["qa_outputs"]),
        ("Qwen2ForSequenceClassification", ["score"]),
        ("ViTForImageClassification", ["classifier"]),
        ("T5ForQuestionAnswering", ["qa_outputs"]),  # its base model is not one module
        ("T5ForSequenceClassification", ["classification_head"]),
        ("Wav2Vec2ForSequenceClassification", ["projector", "classifier"]),
        ("BertForMaskedLM", []),
        ("BertForPreTraining", []),
        ("LlamaForCausalLM", []),
        ("T5ForConditionalGeneration", []),
    ],
)
def test_the_heads_of_a_task_are_trained_in_full(class_name: str, heads: list[str]) -> None:
    with torch.device("meta"):
        base = tiny_model(class_name)
    assert task_heads(base) == heads
    model = LoRAModel(base, LoRAConfig())
    assert sorted(model.adapter().saved) == sorted(heads)
    assert not any(inside(path, head) for path in model.adapter().low_rank for head in heads)
    assert (model.adapters["default"].modules_to_save or []) == heads


def test_heads_are_not_touched_where_targets_or_modules_to_save_are_chosen() -> None:
    with torch.device("meta"):
        base = tiny_model("BertForSequenceClassification")
    for settings in ({"target_modules": ["query"]}, {"modules_to_save": []}, {"modules_to_save": ["pooler"]}):
        model = LoRAModel(base, LoRAConfig(r=2, **settings))
        assert list(model.adapter().saved) == [f"bert.{name}" for name in settings.get("modules_to_save", [])]
        model.unload()


@pytest.mark.parametrize(
    "settings", [{}, {"target_modules": r"[0-9]"}, {"use_rslora": True}, {"alpha_pattern": {"1": 5}}]
)
def test_a_wildcard_lowers_the_rank_of_small_layers_at_the_same_scale(settings: dict[str, Any]) -> None:
    def base() -> nn.Module:
        return nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 3))

    with pytest.warns(
        UserWarning,
        match=r"r = 16 exceeds the smaller dimension .* \(1\), which get a lower rank .*: 1 \(3\)$",
    ):
        model = LoRAModel(base(), LoRAConfig(r=16, **settings))
    assert [layer.r for layer in model.adapter().low_rank.values()] == [16, 3]
    alpha = 5 if "alpha_pattern" in settings else 32
    scale = alpha / 4 if "use_rslora" in settings else alpha / 16
    assert model.adapter().low_rank["1"].scaling.item() == pytest.approx(scale)
    assert model.adapters["default"].rank_pattern == {"^1": 3}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, because of PEFT
@pytest.mark.parametrize("chosen", [None, ["pooler"], ["classifier"]])
def test_a_task_type_adds_the_head_as_in_peft(chosen: list[str] | None) -> None:
    settings: dict[str, Any] = {"r": 2, "target_modules": ["query"], "task_type": "SEQ_CLS", "modules_to_save": chosen}
    model = LoRAModel(tiny_model("BertForSequenceClassification"), LoRAConfig(**settings))
    theirs = peft.get_peft_model(tiny_model("BertForSequenceClassification"), peft.LoraConfig(**settings))
    in_full = [path for path, module in theirs.named_modules() if isinstance(module, ModulesToSaveWrapper)]
    assert sorted(model.adapter().saved) == sorted(path.removeprefix("base_model.model.") for path in in_full)


def test_a_name_does_not_reach_into_a_module_that_is_trained_in_full() -> None:
    with torch.device("meta"):
        base = tiny_model("RobertaForSequenceClassification")
    settings: dict[str, Any]
    for settings in ({"target_modules": ["dense"]}, {"target_modules": r".*dense|.*out_proj"}):
        model = LoRAModel(base, LoRAConfig(r=2, modules_to_save=["classifier"], **settings))
        assert model.adapter().low_rank
        assert not any(path.startswith("classifier") for path in model.adapter().low_rank)
        model.unload()


def test_a_rank_that_no_layer_has_room_for_is_refused() -> None:
    with pytest.raises(TargetError, match=r"^r = 1000 is too large for every layer; use at most 32$"):
        LoRAModel(chat_model(), LoRAConfig(r=1000))


def test_a_small_layer_that_is_named_is_refused_with_the_remedy() -> None:
    base = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 3))
    for settings in ({"target_modules": ["1"]}, {"rank_pattern": {"1": 16}}):
        with pytest.raises(
            TargetError, match=r"1: r = 16 is too large for a matrix of 30 -> 3; use 1..3 \(rank_pattern=\{'1': 3\}\)"
        ):
            LoRAModel(base, LoRAConfig(r=16, **settings))


def test_without_a_config_small_layers_get_the_rank_that_fits_at_the_same_scale() -> None:
    model = LoRAModel(nn.Sequential(nn.Linear(10, 40), nn.Linear(40, 30)))
    assert [(row.r, row.lora_alpha) for row in model.summary().rows] == [(10, 20.0), (16, 32.0)]
    assert {layer.scaling.item() for layer in model.lora_layers.values()} == {2.0}


def test_the_matrices_of_attention_are_linear_layers() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "linear": nn.Linear(8, 8)})
    both = ["attention.in_proj_weight", "attention.out_proj"]
    assert paths(model) == [*both, "linear"]
    assert paths(nn.MultiheadAttention(8, 2), target_modules=["out_proj"]) == ["out_proj"]
    for names in (["attention"], r"at+ention"):
        assert paths(nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)}), target_modules=names) == both


def test_a_forward_replaced_on_the_instance_is_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].forward = lambda x: x
    with pytest.raises(TargetError, match="forward was replaced on the instance"):
        LoRAModel(model, LoRAConfig(r=2, target_modules=["0"]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_rank": 4}, "unknown setting 'lora_rank'; use r"),
        ({"target_module": ["q"]}, "unknown setting 'target_module'; did you mean target_modules"),
        ({"r": 0}, "r = 0"),
        ({"r": "many"}, "r = 'many'"),
        ({"lora_alpha": -1}, "lora_alpha = -1"),
        ({"lora_dropout": 1.0}, "lora_dropout = 1.0"),
        ({"rank_pattern": {"q(": 2}}, "not a regular expression"),
        ({"rank_pattern": {"q": 0}}, "rank_pattern.q = 0: input should be greater than or equal to 1"),
        ({"use_dora": True, "lora_bias": True}, "lora_bias cannot be combined with use_dora"),
        ({"use_dora": "very"}, "use_dora = 'very'"),
        ({"bias": "every"}, "bias = 'every'"),
    ],
)
def test_a_config_is_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("?", r"\?").replace("(", r"\(")):
        LoRAConfig(**settings)


def test_a_small_layer_s_lower_rank_is_its_own() -> None:
    base = nn.ModuleDict({"0": nn.Linear(8, 8), "1": nn.ModuleDict({"0": nn.Linear(64, 64)})})
    assert {path: layer.r for path, layer in LoRAModel(base).lora_layers.items()} == {"0": 8, "1/0": 16}


def test_a_layer_that_is_named_by_its_whole_path_is_adapted_whatever_the_indices() -> None:
    whole, value = "model.layers.1.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
    assert paths(chat_model(), target_modules=[whole, "v_proj"], layers_to_transform=[0]) == [value, whole]
    assert paths(chat_model(), target_modules=["1.self_attn.q_proj", "v_proj"], layers_to_transform=[0]) == [value]
