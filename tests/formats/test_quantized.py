"""A quantised transformers model, merged: what is written is a plain model; the base in memory stays what it was."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import chat_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    TorchAoConfig,
)
from transformers.pytorch_utils import Conv1D

from tailora import LoRAConfig, LoRAModel
from tailora.core.quantization import dense_weight, held_tensors, is_quantized
from tailora.formats.export import float32_logits, with_only_adapter


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
IDS = torch.arange(24).view(2, 12)


def quantized(folder: Path, family: str, how: str) -> PreTrainedModel:
    if not folder.exists():
        torch.manual_seed(0)
        FAMILIES[family]().to(torch.bfloat16).save_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=SETTINGS[how]())
    return model.eval()


def adapted(base: PreTrainedModel, targets: list[str] | str) -> LoRAModel:
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
            dense = dense_weight(layer, others=dtype).to(dtype)
            other.weight.data = (dense.T if isinstance(other, Conv1D) else dense).contiguous()
    return twin


@pytest.mark.parametrize("targets", ["all-linear", "some"])
@pytest.mark.parametrize(("family", "how"), CASES)
def test_a_merged_export_is_a_plain_model(family: str, how: str, targets: str, tmp_path: Path) -> None:
    base = quantized(tmp_path / "base", family, how)
    some = ["q_proj", "down_proj"] if family == "llama" else ["c_attn"]
    model = adapted(base, some if targets == "some" else targets)
    before, classes = [tensor.clone() for tensor in held_tensors(base)], [type(module) for module in base.modules()]
    done = model.export(tmp_path / "merged", "merged")
    assert done.logits.difference <= done.logits.tolerance <= done.logits.effect
    assert "the base is dequantised as a whole, to bfloat16" in done.changes[1]
    assert re.search(r"would err by [\d.]+ to [\d.]+ times the update$", done.changes[1])
    assert all(map(torch.equal, before, held_tensors(base)))
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
def test_what_merge_and_unload_leaves_saves_and_loads_as_a_plain_model(family: str, how: str, tmp_path: Path) -> None:
    model = adapted(quantized(tmp_path / "base", family, how), "all-linear")
    report = model.merge()
    assert report.quantization_error.keys() == report.rounding_error.keys()
    assert all(0 < error < 2 for error in report.quantization_error.values())
    base: Any = model.merge_and_unload()
    assert not hasattr(base, "hf_quantizer")
    base.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16).eval()
    assert torch.equal(loaded(IDS).logits, base(IDS).logits)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize(("family", "how"), CASES)
def test_logits_are_compared_by_the_dequantised_weights_in_float32(
    family: str, how: str, use_dora: bool, tmp_path: Path
) -> None:
    model = LoRAModel(quantized(tmp_path / "base", family, how), LoRAConfig(r=4, use_dora=use_dora))
    for parameter in model.lora_layers.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_adapter(tmp_path / "adapter")
    twin = plain_twin(tmp_path / "base", model, torch.float32)
    expected = LoRAModel.from_pretrained(twin, tmp_path / "adapter").eval()(IDS).logits
    before, state = [tensor.clone() for tensor in held_tensors(model)], [dict(vars(m)) for m in model.modules()]
    with with_only_adapter(model.base_model, model.adapter("default")) as live:
        found = float32_logits(live, IDS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - model(IDS).logits).abs().max() > 1e-3  # what 16 bits would hide
    assert all(map(torch.equal, before, held_tensors(model)))
    assert [dict(vars(m)).keys() for m in model.modules()] == [each.keys() for each in state]
    done = model.export(tmp_path / "peft", "peft")
    assert done.logits.difference <= done.logits.tolerance == 1e-4


def test_an_adapter_trained_on_nf4_is_recognised_on_the_original_and_on_int8(tmp_path: Path) -> None:
    model = adapted(quantized(tmp_path / "base", "llama", "nf4"), "all-linear")
    model.save_adapter(tmp_path / "adapter")
    for other in (
        AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32),
        quantized(tmp_path / "base", "llama", "int8"),
        quantized(tmp_path / "base", "llama", "torchao int8"),
    ):
        assert LoRAModel.from_pretrained(other, tmp_path / "adapter").adapters == model.adapters


def test_the_counts_are_those_of_the_model_before_quantisation(tmp_path: Path) -> None:
    counts = {
        how: adapted(quantized(tmp_path / "base", "llama", how), "all-linear").summary().total_parameters
        for how in SETTINGS
    }
    plain = adapted(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), "all-linear").summary()
    assert set(counts.values()) == {plain.total_parameters}
