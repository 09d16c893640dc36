"""Every format holds what the live model computes, or refuses and says what to do instead."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from tiny import chat_model, chat_tokenizer, stirred_model, tiny_model
from tiny_adapters import adapted, logits, token_ids
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from tailora import LoRAConfig, LoRAModel
from tailora.errors import AdapterError, ConfigError, FormatError, MergeError
from tailora.formats import export, fold_scale, gguf

OF_LANGUAGE_MODELS = export.FORMATS.keys() - {"diffusers"}

SETTINGS: dict[str, dict[str, Any]] = {  # what consumers get wrong in silence
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 3, "down_proj": 5}, "alpha_pattern": {"v_proj": 20}},
    "rslora, patterns": {"use_rslora": True, "rank_pattern": {"k_proj": 2}, "alpha_pattern": {"q_proj": 5}},
    "learned scales": {"learn_scaling": True},
    "some layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    "frozen starts": {"init_lora_weights": "pissa"},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("to", sorted(OF_LANGUAGE_MODELS))
@pytest.mark.slow
def test_every_format_computes_what_the_live_model_does(tmp_path: Path, to: str, settings: dict[str, Any]) -> None:
    model = adapted(settings)
    before = logits(model)
    report = model.export(tmp_path / "out", to, tokenizer=chat_tokenizer(["a"]))
    assert torch.equal(logits(model), before), "the live model changed"
    assert report.logits.difference <= 1e-4 < report.logits.effect
    assert report.files == {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    if to == "merged":
        again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    else:
        again = LoRAModel.from_pretrained(chat_model(), tmp_path / "out").eval()
    torch.testing.assert_close(logits(again), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["T5ForConditionalGeneration", "BartForSequenceClassification", "LlamaModel"])
def test_other_models_than_causal_ones_are_exported(tmp_path: Path, name: str) -> None:
    model = stirred_model(tiny_model(name), LoRAConfig(r=2))
    assert model.export(tmp_path / "out", "peft").logits.difference <= 1e-4


def test_portable_needs_only_r_and_alpha(tmp_path: Path) -> None:
    model = adapted(SETTINGS["rslora, patterns"])
    report = model.export(tmp_path / "out", "portable")
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert (settings["r"], settings["lora_alpha"]) == (8, 8)
    assert {tensor.shape[0] for key, tensor in tensors.items() if "lora_A" in key} == {8}
    for key in ("rank_pattern", "alpha_pattern"):
        assert settings[key] == {}
    assert settings["use_rslora"] is settings["use_dora"] is False
    assert settings["init_lora_weights"] is True
    for path, layer in ((key.replace("/", "."), layer) for key, layer in model.lora_layers.items()):
        A, B = (tensors[f"base_model.model.{path}.lora_{slot}.weight"] for slot in "AB")
        torch.testing.assert_close(B @ A, layer.delta_weight(), rtol=1e-5, atol=1e-6)
    assert report.changes == [
        "the scale is already in the weights; keep it at 1 when you load the file",
        "14 of 14 layers are padded with zeros to rank 8",
    ]


@pytest.mark.filterwarnings("ignore")  # those of PEFT
@pytest.mark.parametrize(
    ("settings", "base_settings"),
    [
        (SETTINGS["rslora, patterns"], {}),
        ({"target_modules": ["k_proj", "q_proj"]}, {"num_attention_heads": 8, "head_dim": 2}),
    ],
    ids=["patterns", "a layer narrower than the common rank"],
)
def test_portable_loads_in_peft(tmp_path: Path, settings: dict[str, Any], base_settings: dict[str, Any]) -> None:
    model = adapted(settings, chat_model(**base_settings))
    model.export(tmp_path / "out", "portable")
    theirs = peft.PeftModel.from_pretrained(chat_model(**base_settings), str(tmp_path / "out")).eval()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-4, atol=1e-5)


def test_a_frozen_start_is_plain_lora_of_twice_the_rank(tmp_path: Path) -> None:
    report = adapted({"init_lora_weights": "pissa"}).export(tmp_path / "out", "portable")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 8
    assert "the frozen starts of 14 layers are included in their factors, which doubles the rank" in report.changes


def test_untied_embeddings_and_head(tmp_path: Path) -> None:
    model = adapted({"target_modules": ["embed_tokens", "lm_head", "q_proj"]})
    for to in OF_LANGUAGE_MODELS:
        assert model.export(tmp_path / to, to).logits.difference < 1e-4
    from gguf import GGUFReader

    shapes = {
        tensor.name: tuple(tensor.data.shape) for tensor in GGUFReader(tmp_path / "gguf" / "adapter.gguf").tensors
    }
    assert shapes["token_embd.weight.lora_a"] == (300, 4)
    assert shapes["output.weight.lora_b"] == (300, 4)


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0))


def test_conv1d_layers_of_gpt2(tmp_path: Path) -> None:
    model = adapted(base=gpt2())
    for to in ("peft", "portable", "gguf", "merged"):
        assert model.export(tmp_path / to, to).logits.difference < 1e-4
    with pytest.raises(FormatError, match="model_type 'gpt2' is not supported for mlx-lm"):
        model.export(tmp_path / "mlx", "mlx")


def test_parts_of_fused_layers_become_factors_of_the_whole_layer(tmp_path: Path) -> None:
    model = adapted({"target_modules": ["c_attn.q", "c_attn.v", "c_fc"], "rank_pattern": {"c_attn.v": 3}}, gpt2())
    for to in ("portable", "gguf", "merged"):
        report = model.export(tmp_path / to, to)
        assert report.logits.difference < 1e-4 < report.logits.effect
    tensors = load_file(tmp_path / "portable" / "adapter_model.safetensors")
    B = tensors["base_model.model.transformer.h.1.attn.c_attn.lora_B.weight"]
    assert B.shape == (96, 8)
    assert not B[32:64].any()


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("to", ["gguf", "mlx"])
def test_one_of_two_tied_weights_is_refused_if_both_would_change(tmp_path: Path, to: str, module: str) -> None:
    model = adapted({"target_modules": [module]}, chat_model(tie_word_embeddings=True))
    with pytest.raises(FormatError, match=r"tied.*export to \"merged\""):
        model.export(tmp_path / "out", to)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"bias": "lora_only"}, {"lora_bias": True}])
def test_only_peft_and_merged_hold_magnitudes_and_biases(tmp_path: Path, settings: dict[str, Any]) -> None:
    base = chat_model(attention_bias=True, mlp_bias=True)
    model = adapted(settings, base)
    for to in ("peft", "merged"):
        assert model.export(tmp_path / to, to).logits.difference < 1e-4
    for to in ("portable", "gguf", "mlx"):
        with pytest.raises(FormatError, match=r"(use_dora|biases).*export to \"merged\""):
            model.export(tmp_path / to, to)
        assert not (tmp_path / to).exists()


@pytest.mark.parametrize("to", ["portable", "gguf", "mlx"])
def test_all_that_a_format_cannot_hold_is_reported_at_once(tmp_path: Path, to: str) -> None:
    model = adapted({"modules_to_save": ["lm_head"]})
    next(iter(model.lora_layers.values())).lora_bias = nn.Parameter(torch.ones(32))
    with pytest.raises(FormatError) as caught:
        model.export(tmp_path / "out", to)
    for part in (
        "2 problems",
        "modules_to_save: fully trained modules are not supported (lm_head)",
        "trained biases",
        'export to "merged"',
    ):
        assert part in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_all_formats_but_peft_hold_the_strength_dial(tmp_path: Path) -> None:
    model = adapted()
    model.set_scale("default", 0.5)
    with pytest.raises(
        FormatError, match=r"14 layers have a strength other than 1; call set_scale\(name, 1\), or export to 'portable'"
    ):
        model.export(tmp_path / "peft", "peft")
    report = model.export(tmp_path / "out", "portable")
    assert report.changes[0].startswith("the scale is already in the weights; keep it at 1")
    again = LoRAModel.from_pretrained(chat_model(), tmp_path / "out").eval()
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("to", ["gguf", "portable"])
def test_a_file_that_computes_something_else_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    """A mistake of the writer: the rows of q and k as transformers has them, or a scale that is off by a thousandth."""
    if to == "gguf":
        monkeypatch.setattr(gguf, "to_gguf", lambda A, B, *_: (A, B))
    else:
        exact = fold_scale.fold_scale
        monkeypatch.setattr(
            fold_scale, "fold_scale", lambda source: {k: (A, B * 1.001) for k, (A, B) in exact(source).items()}
        )
    with pytest.raises(FormatError, match=r"logits differ .* Nothing was written; please report this bug"):
        adapted(base=chat_model().to(torch.bfloat16)).export(tmp_path / "out", to)
    assert not list(tmp_path.iterdir())


def test_the_comparison_does_not_change_modes_weights_or_other_adapters(tmp_path: Path) -> None:
    base = chat_model().to(torch.bfloat16)
    model = adapted(base=base)
    model.add_adapter("other", LoRAConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter(["default", "other"])
    model.train()
    base.model.norm.eval()
    before = {name: (parameter, parameter.dtype) for name, parameter in base.named_parameters()}
    active = base.model.layers[0].self_attn.q_proj.adapter_parts
    model.export(tmp_path / "out", "portable", "other")
    assert base.model.layers[0].self_attn.q_proj.adapter_parts is active
    assert all(p is before[name][0] and p.dtype == before[name][1] for name, p in base.named_parameters())
    assert [base.training, base.model.norm.training, active[0].training] == [True, False, True]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())


def test_float32_logits_are_those_of_the_model_in_float32() -> None:
    narrow = chat_model().to(torch.bfloat16).eval()
    wide = chat_model().to(torch.bfloat16).float().eval()
    assert torch.equal(export.float32_logits(narrow, token_ids()), logits(wide))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, p: m.export(p / "out", "gguff"), ConfigError, "did you mean gguf"),
        (lambda m, p: m.export(p / "out", "gguf", "absent"), AdapterError, "absent"),
        (lambda m, p: m.export(p, "gguf"), ConfigError, "already exists"),
        (lambda m, p: m.export(p / "mine.txt", "gguf"), ConfigError, "already exists"),
        (lambda m, p: (m.merge(), m.export(p / "out", "gguf")), MergeError, "unmerge"),
    ],
    ids=["format", "adapter", "folder", "file", "merged"],
)
def test_wrong_arguments_are_refused_and_nothing_is_written(
    tmp_path: Path, call: Any, error: type[Exception], message: str
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(error, match=message):
        call(adapted(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("to", ["peft", "portable", "merged"])
def test_a_model_whose_vocabulary_is_in_the_config_of_its_text_model(tmp_path: Path, to: str) -> None:
    model = stirred_model(tiny_model("LlavaForConditionalGeneration"), LoRAConfig(r=2))
    assert model.export(tmp_path / "out", to).logits.effect > 0.1


def test_a_model_without_a_vocabulary_is_refused(tmp_path: Path) -> None:
    model = LoRAModel(nn.Sequential(nn.Linear(8, 8)), LoRAConfig(r=2))
    with pytest.raises(FormatError, match=r"no config\.vocab_size.*use save_adapter or merge"):
        model.export(tmp_path / "out", "portable")
