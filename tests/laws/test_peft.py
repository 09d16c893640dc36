"""PEFT is the oracle for files, both ways, wherever it is right; the dense identity (test_laws) where it is not."""

import copy
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from cases import ALL_PAIRS, LAYERS, PAIRS, PEFT_FAILS, SLOTS, LayerCase, all_of, config, pairs_of, trained
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import chat_model, stir, stirred_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from tailora import LoRAConfig, LoRAModel
from tailora.errors import FormatError, MergeError
from tailora.formats.offline import read_offline

pytestmark = pytest.mark.filterwarnings("ignore")  # those of PEFT

RIGHT = [case for case in LAYERS if not case.peft_is_wrong]
layer_cases = all_of(RIGHT)
PEFT_PAIRS = [(case, slot) for case, slot in PAIRS if case in RIGHT and (case.name, slot) not in PEFT_FAILS]
pairs = pairs_of(PEFT_PAIRS)
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}


def peft_settings(case: LayerCase, slot: str) -> dict[str, Any]:
    names = ("init_lora_weights", "use_rslora", "alpha_pattern", "use_dora", "lora_bias", "bias")
    own = {key: value for key, value in SLOTS[slot].items() if key in names}
    return {"r": case.r, "lora_alpha": 10, "target_modules": ["target"], **own}


def randomise(model: nn.Module) -> None:
    generator = torch.Generator(torch.get_default_device()).manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_" in name or (parameter.requires_grad and name.endswith("bias")):
            value = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.data = value + 1.5 if "magnitude" in name else value


@pairs_of([(case, slot) for case, slot in ALL_PAIRS if not case.peft_is_wrong and (case.name, slot) not in PEFT_FAILS])
def test_peft_reads_what_we_write(case: LayerCase, slot: str, tmp_path: Path) -> None:
    model, x = trained(case, slot), case.batch()
    special = case not in LAYERS and not case.name.startswith("part")
    with pytest.warns(UserWarning, match="only tailora can load") if special and "dora" in slot else nullcontext():
        model.save_adapter(tmp_path)
    assert ("Loads with tailora and PEFT" in (tmp_path / "README.md").read_text()) is not (special and "dora" in slot)
    if special and "dora" in slot:  # PEFT has no magnitudes there
        with pytest.raises(ValueError, match=r"DoRA|use_dora"):
            peft.PeftModel.from_pretrained(case.net(), str(tmp_path))
        return
    theirs = peft.PeftModel.from_pretrained(case.net(), str(tmp_path)).eval()
    if case.name == "attention out":
        model.set_scale("default", 2)  # PEFT 0.21.2 adds it to the weight, and then merges it once more
    torch.testing.assert_close(theirs(x).view(model(x).shape), model(x), **TOLERANCE)  # DoRA adds a dimension to a row


@pairs
@pytest.mark.slow
def test_we_read_what_peft_writes(case: LayerCase, slot: str, tmp_path: Path) -> None:
    theirs, x = peft.get_peft_model(case.net(), peft.LoraConfig(**peft_settings(case, slot))).eval(), case.batch()
    randomise(theirs)
    theirs.save_pretrained(str(tmp_path))
    ours = LoRAModel.from_pretrained(case.net(), tmp_path).eval()
    expected = theirs(x).view(ours(x).shape)
    torch.testing.assert_close(ours(x), expected, **TOLERANCE)
    assert (ours(x) - case.net()(x)).abs().max() > 0.01


@layer_cases
@pytest.mark.parametrize("method", ["cat", "svd", "ties"])
def test_peft_reads_what_was_combined(case: LayerCase, method: str, tmp_path: Path) -> None:
    model, x = trained(case, "alpha pattern"), case.batch()
    model.add_adapter("b", config(case, "rslora"))
    model.set_adapter("b")
    stir(model, seed=3)
    model.combine({"default": 0.7, "b": -0.3}, "mix", method)
    model.set_adapter("mix")
    theirs = peft.PeftModel.from_pretrained(case.net(), str(model.save_adapter(tmp_path, "mix"))).eval()
    torch.testing.assert_close(theirs(x), model.eval()(x), **TOLERANCE)
    assert (model(x) - case.net()(x)).abs().max() > 0.01


@pairs
def test_the_keys_and_shapes_are_those_of_peft(case: LayerCase, slot: str, tmp_path: Path) -> None:
    trained(case, slot).save_adapter(tmp_path / "ours")
    theirs = peft.get_peft_model(case.net(), peft.LoraConfig(**peft_settings(case, slot)))
    theirs.save_pretrained(str(tmp_path / "theirs"))
    ours, peft_file = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("ours", "theirs"))
    own_keys = {key: tensor for key, tensor in peft_file.items() if not key.endswith("base_layer.weight")}
    assert {key: (t.shape, t.dtype) for key, t in ours.items()} == {
        key: (t.shape, t.dtype) for key, t in own_keys.items()
    }


def test_a_peft_adapter_that_mixes_groups_runs_and_is_not_merged(tmp_path: Path) -> None:
    case = next(case for case in LAYERS if case.name == "conv2d grouped")
    theirs = peft.get_peft_model(case.net(), peft.LoraConfig(**peft_settings(case, "plain"))).eval()
    randomise(theirs)
    theirs.save_pretrained(str(tmp_path))
    ours = LoRAModel.from_pretrained(case.net(), tmp_path).eval()
    with pytest.raises(MergeError, match="the update cannot be merged: A reads all"):
        ours.merge()
    torch.testing.assert_close(ours(case.batch()), theirs(case.batch()), **TOLERANCE)


def llama() -> LlamaForCausalLM:
    return chat_model(num_hidden_layers=3).eval()


def test_a_minimal_config_of_other_tools_is_enough(tmp_path: Path) -> None:
    model, ids = LoRAModel(llama(), LoRAConfig(r=4, target_modules=["q_proj"])), torch.arange(12)[None]
    stir(model)
    model.save_adapter(tmp_path)
    minimal = {"peft_type": "LORA", "r": 4, "lora_alpha": 32}
    (tmp_path / "adapter_config.json").write_text(json.dumps(minimal))
    loaded = LoRAModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(loaded.eval()(ids).logits, model.eval()(ids).logits)


# ---- Parts of fused layers


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40)).eval()


IDS = torch.arange(24).view(2, 12)
PARTS: dict[str, dict[str, Any]] = {
    "q and v": {"target_modules": ["c_attn.q", "c_attn.v", "c_fc"]},
    "own ranks and scales": {
        "target_modules": r".*c_attn\.[qv]",
        "rank_pattern": {"c_attn.v": 3},
        "alpha_pattern": {"0.attn.c_attn.q": 9},
    },
    "rslora": {"target_modules": ["c_attn.k"], "use_rslora": True},
    "all but one": {"target_modules": ["c_attn"], "exclude_modules": ["c_attn.k"]},
    "learned scale": {"target_modules": ["c_attn.q", "c_attn.k"], "learn_scaling": True},
}


@pytest.mark.parametrize("settings", PARTS.values(), ids=PARTS)
def test_parts_are_one_adapter_of_the_fused_layer_in_peft(settings: dict[str, Any], tmp_path: Path) -> None:
    model = stirred_model(gpt2(), LoRAConfig(r=2, lora_alpha=6, **settings))
    expected = model.eval()(IDS).logits
    model.save_adapter(tmp_path)
    theirs = peft.PeftModel.from_pretrained(gpt2(), str(tmp_path)).eval()
    torch.testing.assert_close(theirs(IDS).logits, expected, **TOLERANCE)
    back = LoRAModel.from_pretrained(gpt2(), tmp_path)
    assert back.adapters == model.adapters
    assert back.lora_layers.keys() == model.lora_layers.keys()
    torch.testing.assert_close(back.eval()(IDS).logits, expected, rtol=1e-6, atol=1e-6)


def test_a_linear_layer_that_is_called_out_proj_is_added_once(tmp_path: Path) -> None:
    """As in OPT and Whisper; PEFT adds only that of nn.MultiheadAttention twice."""
    base, x = nn.ModuleDict({"attn": nn.ModuleDict({"out_proj": nn.Linear(8, 6)})}), torch.randn(3, 8)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["out_proj"])).eval()
    layer: Any = theirs.base_model.model["attn"]["out_proj"]
    nn.init.normal_(layer.lora_B["default"].weight)
    theirs.save_pretrained(str(tmp_path))
    expected = layer(x)
    model = LoRAModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(model.base_model["attn"]["out_proj"](x), expected, **TOLERANCE)
    alone = read_offline(tmp_path).updates["attn.out_proj"].factors.dense[0]
    torch.testing.assert_close(alone, model.adapter().low_rank["attn.out_proj"].delta_weight().detach(), **TOLERANCE)


def test_a_file_that_is_not_made_of_its_parts_is_refused(tmp_path: Path) -> None:
    model = stirred_model(gpt2(), LoRAConfig(r=2, target_modules=["c_attn.q", "c_attn.v"]))
    model.save_adapter(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"
    tensors[key][20, 0] = 1.0  # a row of k
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_file(tensors, file, metadata)
    with pytest.raises(FormatError, match=r"c_attn.lora_B.weight: \(48, 4\) cannot be split into q, v"):
        LoRAModel.from_pretrained(gpt2(), tmp_path)
