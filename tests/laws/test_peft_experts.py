"""Default targets on mixtures of experts, in PEFT's files both ways.

PEFT takes dense layers of these models for projections of their experts, because they have the same names.
"""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny import stirred_model, tiny_model
from torch import Tensor, nn

from tailora import LoRAConfig, LoRAModel
from tailora.formats.offline import read_offline

pytestmark = pytest.mark.filterwarnings("ignore")  # those of PEFT and transformers

TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}
# Prefix of the names in transformers -> settings with which dense layers, experts and shared experts are side by side;
# tests/laws/test_architectures.py has all other models
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "DeepseekV3": {"first_k_dense_replace": 1},
    "Ernie4_5_Moe": {},
    "Qwen2Moe": {"mlp_only_layers": [0]},
    "Olmoe": {},
    "Mixtral": {},
    "GptOss": {},
    "GraniteMoeShared": {"shared_intermediate_size": 8},
    "Jamba": {},
    "Dbrx": {},
    "Llama4": {"moe_layers": [1]},
}
EXCLUDED = ["router", "shared_expert_gate"]  # linear layers that give a tuple, or one number
IDS = torch.arange(24).view(2, 12) + 3


def fresh(name: str) -> nn.Module:
    base = tiny_model(f"{name}ForCausalLM", **ARCHITECTURES[name]).eval()
    for path, parameter in base.named_parameters():
        if "expert" in path:
            nn.init.normal_(parameter, std=0.3)
    return base


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    result: Tensor = model.eval()(IDS).logits
    return result


def excluded(base: nn.Module) -> list[str] | None:
    linear = [path for path, module in base.named_modules() if isinstance(module, nn.Linear)]
    return [name for name in EXCLUDED if any(path.endswith(f".{name}") for path in linear)] or None


def adapted(name: str, **settings: Any) -> LoRAModel:
    base = fresh(name)
    return stirred_model(base, LoRAConfig(r=2, lora_alpha=6, exclude_modules=excluded(base), **settings))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "DeepseekV3" else pytest.mark.slow) for name in ARCHITECTURES]
)
def test_the_default_targets_of_experts_models_are_the_same_in_peft(name: str, tmp_path: Path) -> None:
    model = adapted(name)
    expected = logits(model)
    assert (expected - logits(fresh(name))).abs().max() > 0.01
    model.save_adapter(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(fresh(name), str(tmp_path / "ours"))
    torch.testing.assert_close(logits(theirs), expected, **TOLERANCE)
    assert torch.equal(logits(LoRAModel.from_pretrained(fresh(name), tmp_path / "ours")), expected)

    theirs.save_pretrained(str(tmp_path / "theirs"))
    back = LoRAModel.from_pretrained(fresh(name), tmp_path / "theirs")
    torch.testing.assert_close(logits(back), expected, **TOLERANCE)

    config = peft.LoraConfig(r=2, target_modules="all-linear", exclude_modules=excluded(fresh(name)))
    trained = peft.get_peft_model(fresh(name), config)
    generator = torch.Generator(torch.get_default_device()).manual_seed(5)
    for path, parameter in trained.named_parameters():
        if "lora_" in path:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    trained.save_pretrained(str(tmp_path / "trained"))
    ours = LoRAModel.from_pretrained(fresh(name), tmp_path / "trained")
    torch.testing.assert_close(logits(ours), logits(trained), **TOLERANCE)


def test_ranks_scales_and_dropout_of_dense_layers_named_like_experts(tmp_path: Path) -> None:
    settings = {"rank_pattern": {"down_proj": 3}, "alpha_pattern": {"mlp.up_proj": 5}, "lora_dropout": 0.1}
    model = adapted("DeepseekV3", use_rslora=True, **settings)
    model.save_adapter(tmp_path)
    theirs = peft.PeftModel.from_pretrained(fresh("DeepseekV3"), str(tmp_path))
    torch.testing.assert_close(logits(theirs), logits(model), **TOLERANCE)
    assert LoRAModel.from_pretrained(fresh("DeepseekV3"), tmp_path).adapters == model.adapters
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_dropout"] == 0
    assert "lora_dropout = 0.1, which PEFT does not support here" in (tmp_path / "README.md").read_text()
    updates, low_rank = read_offline(tmp_path).updates, model.adapter().low_rank
    assert updates.keys() == low_rank.keys()
    alone = updates["model.layers.0.mlp.down_proj"].factors.dense[0]
    torch.testing.assert_close(alone, low_rank["model.layers.0.mlp.down_proj"].delta_weight().detach(), **TOLERANCE)


def test_saving_says_that_peft_cannot_load_dora_there(tmp_path: Path) -> None:
    model = adapted("DeepseekV3", use_dora=True)
    with pytest.warns(UserWarning, match=r"only tailora can load this adapter.*use_dora.*mlp\.gate_proj"):
        model.save_adapter(tmp_path)
    assert "PEFT cannot load the adapter" in (tmp_path / "README.md").read_text()
    assert torch.equal(logits(LoRAModel.from_pretrained(fresh("DeepseekV3"), tmp_path)), logits(model))
    with pytest.raises(ValueError, match="use_dora"):
        peft.PeftModel.from_pretrained(fresh("DeepseekV3"), str(tmp_path))
