"""Merged models: what is written is a plain Hugging Face model; the base in memory stays what it was."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import chat_model, chat_tokenizer
from tiny_adapters import adapted, logits, token_ids
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    TorchAoConfig,
)
from transformers.pytorch_utils import Conv1D

from tailora import LoRAConfig, LoRAModel
from tailora.core.quantization import dense_weight, is_quantized, stored_tensors
from tailora.errors import FormatError
from tailora.formats.export import ROUNDING_REMEDY, float32_logits, with_only_adapter


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_a_merge_unties_and_the_config_says_so(tmp_path: Path, module: str) -> None:
    base = chat_model(tie_word_embeddings=True)
    model = adapted({"target_modules": [module]}, base)
    report = model.export(tmp_path / "out", "merged")
    assert "tied weights are untied: tie_word_embeddings is false" in report.changes
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert base.config.tie_word_embeddings is True
    assert base.lm_head.weight is base.model.embed_tokens.weight
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-4)
    assert not torch.equal(again.lm_head.weight, again.model.embed_tokens.weight)


def test_a_merge_that_changes_no_tied_weight_keeps_the_tie(tmp_path: Path) -> None:
    model = adapted(base=chat_model(tie_word_embeddings=True))
    model.export(tmp_path / "out", "merged")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")


def test_a_merged_folder_has_all_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tailora.formats.export.SHARD", "30KB")
    tokenizer = chat_tokenizer(["hello there"], eos_token="<|im_end|>")
    model = adapted({"modules_to_save": ["lm_head"]}, chat_model().to(torch.bfloat16))
    report = model.export(tmp_path / "out", "merged", tokenizer=tokenizer)
    names = set(report.files)
    assert {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"} <= names
    assert "model.safetensors.index.json" in names
    assert "adapter_config.json" not in names
    shards = sorted(name for name in names if name.startswith("model-"))
    assert len(shards) > 2
    assert all(os.stat(tmp_path / "out" / name).st_mode & 0o777 == 0o644 for name in shards)
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert again.dtype == torch.bfloat16
    assert torch.equal(again.lm_head.weight, model.lora_layers["lm_head"].weight.to(torch.bfloat16))
    chat = [{"role": "user", "content": "hello"}]
    same = AutoTokenizer.from_pretrained(tmp_path / "out").apply_chat_template(chat, tokenize=False)
    assert same == tokenizer.apply_chat_template(chat, tokenize=False)
    assert report.changes[0].startswith("rounding to bfloat16 changes the update by at most 0.0")


def test_a_merge_in_16_bits_that_loses_much_of_an_update_says_what_keeps_it(tmp_path: Path) -> None:
    model = adapted(base=chat_model().to(torch.bfloat16))
    for layer in list(model.lora_layers.values())[1:]:
        layer.scaling = 1e-9
    layer = next(iter(model.lora_layers.values()))
    layer.scaling /= 8
    (note,) = [text for text in model.export(tmp_path / "out", "merged").changes if text.startswith("rounding")]
    assert note.endswith(f"in the worst layer. To keep all of it, {ROUNDING_REMEDY}")


def test_a_merge_in_16_bits_that_loses_the_adapter_is_refused(tmp_path: Path) -> None:
    model = adapted(base=chat_model().to(torch.bfloat16))
    for layer in model.lora_layers.values():
        layer.scaling = 1e-4
    with pytest.raises(FormatError, match="Nothing was written; use the adapter unmerged"):
        model.export(tmp_path / "out", "merged")
    assert not list(tmp_path.iterdir())
    assert model.export(tmp_path / "out", "portable").logits.difference < 1e-4


def test_a_bias_without_a_place_in_the_model_class_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        FormatError, match=r"(?s)14 problems.*lora_bias cannot be merged, because the layer has no bias"
    ):
        adapted({"lora_bias": True}).export(tmp_path / "out", "merged")
    assert not list(tmp_path.iterdir())


def int8_weights() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig(version=2))


SETTINGS = {
    "nf4": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "torchao int8": int8_weights,
}


FAMILIES = {
    "llama": lambda: chat_model(hidden_size=64, tie_word_embeddings=True),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=64, n_layer=2, n_head=2, n_positions=64)),
}


CASES = [(family, how) for family in FAMILIES for how in SETTINGS if (family, how) != ("gpt2", "torchao int8")]


def quantized(folder: Path, family: str, how: str) -> PreTrainedModel:
    if not folder.exists():
        torch.manual_seed(0)
        FAMILIES[family]().to(torch.bfloat16).save_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=SETTINGS[how]())
    return model.eval()


def adapted_quantized(base: PreTrainedModel, targets: list[str] | str) -> LoRAModel:
    model = LoRAModel(base, LoRAConfig(r=4, target_modules=targets))
    for parameter in model.lora_layers.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.eval()


def plain_twin(folder: Path, model: LoRAModel, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """The original with the dequantised weights."""
    twin: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    for path, layer in model.base_model.named_modules():
        if is_quantized(layer):
            other = twin.get_submodule(path)
            dense = dense_weight(layer, dtype=dtype).to(dtype)
            other.weight.data = (dense.T if isinstance(other, Conv1D) else dense).contiguous()
    return twin


@pytest.mark.parametrize(
    ("family", "how", "targets"),
    [*((*case, "all-linear") for case in CASES), *((*case, "some") for case in CASES[::3])],
)
@pytest.mark.slow
def test_the_merged_export_of_a_quantized_model_is_a_plain_model(
    family: str, how: str, targets: str, tmp_path: Path
) -> None:
    base = quantized(tmp_path / "base", family, how)
    some = ["q_proj", "down_proj"] if family == "llama" else ["c_attn"]
    model = adapted_quantized(base, some if targets == "some" else targets)
    before, classes = [tensor.clone() for tensor in stored_tensors(base)], [type(module) for module in base.modules()]
    report = model.export(tmp_path / "merged", "merged")
    assert report.logits.difference <= report.logits.tolerance <= report.logits.effect
    assert "the base is dequantized to bfloat16" in report.changes[1]
    assert "would lose some or all of the update" in report.changes[1]
    assert all(map(torch.equal, before, stored_tensors(base)))
    assert [type(module) for module in base.modules()] == classes
    assert base.config.quantization_config is not None

    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16).eval()
    assert not any(is_quantized(module) for module in loaded.modules())
    model.save_adapter(tmp_path / "adapter")
    twin = LoRAModel.from_pretrained(plain_twin(tmp_path / "base", model), tmp_path / "adapter").eval()
    expected = twin.merge_and_unload().state_dict()
    found = loaded.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(("family", "how"), CASES)
def test_a_quantized_model_after_merge_and_unload_saves_and_loads_as_a_plain_one(
    family: str, how: str, tmp_path: Path
) -> None:
    model = adapted_quantized(quantized(tmp_path / "base", family, how), "all-linear")
    base: Any = model.merge_and_unload()
    assert not hasattr(base, "hf_quantizer")
    base.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16).eval()
    assert torch.equal(loaded(token_ids()).logits, base(token_ids()).logits)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize(("family", "how"), CASES)
@pytest.mark.slow
def test_float32_logits_use_the_dequantized_weights(family: str, how: str, use_dora: bool, tmp_path: Path) -> None:
    model = LoRAModel(quantized(tmp_path / "base", family, how), LoRAConfig(r=4, use_dora=use_dora))
    for parameter in model.lora_layers.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_adapter(tmp_path / "adapter")
    twin = plain_twin(tmp_path / "base", model, torch.float32)
    expected = LoRAModel.from_pretrained(twin, tmp_path / "adapter").eval()(token_ids()).logits
    before, state = [tensor.clone() for tensor in stored_tensors(model)], [dict(vars(m)) for m in model.modules()]
    with with_only_adapter(model.base_model, model.adapter("default")) as live:
        found = float32_logits(live, token_ids())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - model(token_ids()).logits).abs().max() > 1e-3  # what 16 bits would hide
    assert all(map(torch.equal, before, stored_tensors(model)))
    assert [dict(vars(m)).keys() for m in model.modules()] == [each.keys() for each in state]
    report = model.export(tmp_path / "peft", "peft")
    assert report.logits.difference <= report.logits.tolerance == 1e-4


def test_parameter_counts_are_those_before_quantization(tmp_path: Path) -> None:
    counts = {
        how: adapted_quantized(quantized(tmp_path / "base", "llama", how), "all-linear").summary().total_parameters
        for how in SETTINGS
    }
    plain = adapted_quantized(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), "all-linear").summary()
    assert set(counts.values()) == {plain.total_parameters}
