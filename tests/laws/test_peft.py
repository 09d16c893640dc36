"""PEFT is the oracle for files, both ways, wherever it is right; the dense identity (test_laws) where it is not."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from cases import LAYERS, PAIRS, PEFT_FAILS, SLOTS, LayerCase, all_of, config, pairs_of, trained
from safetensors.torch import load_file
from tiny import chat_model, stir, stirred_model
from torch import nn
from transformers import LlamaForCausalLM

from tailora import LoRAConfig, LoRAModel
from tailora.errors import MergeError

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


@pairs
def test_peft_reads_what_we_write(case: LayerCase, slot: str, tmp_path: Path) -> None:
    model, x = trained(case, slot), case.batch()
    model.save_adapter(tmp_path)
    theirs = peft.PeftModel.from_pretrained(case.net(), str(tmp_path)).eval()
    torch.testing.assert_close(theirs(x).view(model(x).shape), model(x), **TOLERANCE)  # DoRA adds a dimension to a row


@pairs
@pytest.mark.slow
def test_we_read_what_peft_writes(case: LayerCase, slot: str, tmp_path: Path) -> None:
    theirs, x = peft.get_peft_model(case.net(), peft.LoraConfig(**peft_settings(case, slot))).eval(), case.batch()
    randomise(theirs)
    theirs.save_pretrained(str(tmp_path))
    ours = LoRAModel.from_pretrained(case.net(), tmp_path).eval()
    torch.testing.assert_close(ours(x), theirs(x).view(ours(x).shape), **TOLERANCE)
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


LLAMA_CONFIGS: dict[str, dict[str, Any]] = {
    "all-linear": {"r": 4},
    "patterns": {"r": 4, "rank_pattern": {"layers.1.*q_proj": 2, "down_proj": 6}, "alpha_pattern": {"v_proj": 3}},
    "some layers": {"r": 4, "target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2]},
    "regular expression": {"r": 4, "target_modules": r".*layers\.1.*_proj", "exclude_modules": ["o_proj"]},
    "head trained in full": {"r": 4, "modules_to_save": ["lm_head"]},
    "embedding and head": {"r": 4, "target_modules": ["embed_tokens", "lm_head", "k_proj"], "use_rslora": True},
}


@pytest.mark.parametrize("settings", LLAMA_CONFIGS.values(), ids=LLAMA_CONFIGS)
def test_the_same_config_selects_the_same_layers_as_peft(settings: dict[str, Any]) -> None:
    model = LoRAModel(llama(), LoRAConfig(**settings))
    defaults = {"target_modules": "all-linear", "lora_alpha": 32, "task_type": "CAUSAL_LM"}
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(**{**defaults, **settings}))
    ours = {row.path: (row.r, row.lora_alpha) for row in model.summary().rows if row.r}
    adapted = {
        name.removeprefix("base_model.model."): (module.r["default"], module.lora_alpha["default"])
        for name, module in theirs.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert ours == adapted


def test_a_combination_of_adapters_of_different_layers_and_ranks_is_the_same_in_peft(tmp_path: Path) -> None:
    ids = torch.arange(24).view(2, 12)
    model = stirred_model(llama(), LoRAConfig(**LLAMA_CONFIGS["patterns"]), "a")
    model.add_adapter("b", LoRAConfig(**LLAMA_CONFIGS["embedding and head"]))
    model.set_adapter("b")
    stir(model, seed=3)
    model.add_adapter("c", LoRAConfig(**LLAMA_CONFIGS["some layers"]))
    model.combine({"a": 0.7, "b": 0.4, "c": 1}, "mix")
    ranks = model.shrink("mix", "small", energy=0.9).rank
    assert len(set(ranks.values())) > 2
    for name in ("mix", "small"):
        model.set_adapter(name)
        theirs = peft.PeftModel.from_pretrained(llama(), str(model.save_adapter(tmp_path, name))).eval()
        torch.testing.assert_close(theirs(ids).logits, model.eval()(ids).logits, **TOLERANCE)


def test_a_minimal_config_of_other_tools_is_enough(tmp_path: Path) -> None:
    model, ids = LoRAModel(llama(), LoRAConfig(r=4, target_modules=["q_proj"])), torch.arange(12)[None]
    stir(model)
    model.save_adapter(tmp_path)
    minimal = {"peft_type": "LORA", "r": 4, "lora_alpha": 32}
    (tmp_path / "adapter_config.json").write_text(json.dumps(minimal))
    loaded = LoRAModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(loaded.eval()(ids).logits, model.eval()(ids).logits)
