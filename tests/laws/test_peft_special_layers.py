"""Attention, parts and experts in PEFT's files, both ways."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from cases import SPECIAL_PAIRS, LayerCase, pairs_of, trained
from safetensors.torch import load_file, save_file
from tiny import stirred_model
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from tailora import LoRAConfig, LoRAModel
from tailora.errors import FormatError
from tailora.formats.offline import read_offline

pytestmark = pytest.mark.filterwarnings("ignore")  # those of PEFT

TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}
RIGHT = [(case, slot) for case, slot in SPECIAL_PAIRS if not case.peft_is_wrong]
TWICE = 2.0  # PEFT 0.21.2 adds the update of attention's out_proj to the weight, and then merges it once more
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}


@pairs_of(RIGHT)
def test_peft_reads_what_we_write(case: LayerCase, slot: str, tmp_path: Path) -> None:
    model, x = trained(case, slot), case.batch()
    model.save_adapter(tmp_path)
    alone = "dora" in slot and not case.name.startswith("part")  # PEFT has no magnitudes there
    assert ("Loads with tailora and PEFT" in (tmp_path / "README.md").read_text()) is not alone
    if alone:
        with pytest.raises(ValueError, match=r"DoRA|use_dora"):
            peft.PeftModel.from_pretrained(case.net(), str(tmp_path))
        return
    theirs = peft.PeftModel.from_pretrained(case.net(), str(tmp_path)).eval()
    if case.name == "attention out":
        model.set_scale("default", TWICE)
    torch.testing.assert_close(theirs(x).view(model(x).shape), model(x), **TOLERANCE)  # DoRA adds a dimension


class Block(nn.Module):
    """In nn.TransformerEncoderLayer PEFT's adapters are passed by in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.linear1 = nn.MultiheadAttention(16, 4), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.self_attn(x, x, x)[0]
        return y + self.linear1(y).tanh()


class Vision(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, ids: Tensor) -> Tensor:
        x = ids.float()[..., None] @ torch.linspace(-0.1, 0.1, 16)[None]
        for layer in self.layers:
            x = layer(x)
        return x


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40))


def mixtral() -> MixtralForCausalLM:
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4, vocab_size=40))


def qwen2_moe() -> Qwen2MoeForCausalLM:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**SIZES, **experts, num_key_value_heads=2, vocab_size=40))


def gpt_oss() -> GptOssForCausalLM:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 4, "num_key_value_heads": 2}
    return GptOssForCausalLM(GptOssConfig(**SIZES, **experts, vocab_size=40))


EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "attention": (Vision, {"target_modules": ["self_attn", "linear1"]}),
    "attention, patterns": (
        Vision,
        {"target_modules": ["self_attn"], "rank_pattern": {"layers.1.self_attn": 3}, "alpha_pattern": {"self_attn": 5}},
    ),
    "mixtral": (mixtral, {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "mixtral, one of two": (mixtral, {"target_modules": [], "target_parameters": EXPERTS[1:]}),
    "mixtral, router and patterns": (
        mixtral,
        {
            "target_modules": [],
            "target_parameters": [*EXPERTS, "gate.weight"],
            "rank_pattern": {"down_proj": 3},
            "alpha_pattern": {"gate.weight": 7},
            "use_rslora": True,
        },
    ),
    "qwen2-moe": (qwen2_moe, {"target_modules": [], "target_parameters": EXPERTS}),
    "gpt-oss": (gpt_oss, {"target_modules": [], "target_parameters": EXPERTS}),
}
models = pytest.mark.parametrize(("make", "settings"), MODELS.values(), ids=MODELS)


def fresh(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    base = make().eval()
    for name, parameter in base.named_parameters():
        if "experts" in name:
            nn.init.normal_(parameter, std=0.3)
    return base


def output(model: nn.Module) -> Tensor:
    y = model(torch.arange(24).view(2, 12))
    logits: Tensor = y if isinstance(y, Tensor) else y.logits
    return logits


@models
def test_a_model_s_adapter_is_the_same_in_peft(
    make: Callable[[], nn.Module], settings: dict[str, Any], tmp_path: Path
) -> None:
    model = stirred_model(fresh(make), LoRAConfig(r=2, lora_alpha=6, **settings))
    model.save_adapter(tmp_path / "ours")
    expected = output(model.eval())
    assert (expected - output(fresh(make))).abs().max() > 0.01
    theirs = peft.PeftModel.from_pretrained(fresh(make), str(tmp_path / "ours")).eval()
    for path, layer in model.adapter("default").low_rank.items():
        layer.strength = TWICE if path.endswith("out_proj") else 1.0
    in_peft = output(model)
    torch.testing.assert_close(output(theirs), in_peft, **TOLERANCE)

    theirs.save_pretrained(str(tmp_path / "theirs"))
    files = [load_file(tmp_path / side / "adapter_model.safetensors") for side in ("ours", "theirs")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(tensor, files[1][key]) for key, tensor in files[0].items())
    again = LoRAModel.from_pretrained(fresh(make), tmp_path / "ours").eval()
    assert torch.equal(output(again), expected)
    back = LoRAModel.from_pretrained(fresh(make), tmp_path / "theirs").eval()
    torch.testing.assert_close(output(back), in_peft, **TOLERANCE)
    with back.merged():
        torch.testing.assert_close(output(back), in_peft, rtol=1e-4, atol=1e-4)


@models
def test_the_same_config_adapts_the_same_in_peft(
    make: Callable[[], nn.Module], settings: dict[str, Any], tmp_path: Path
) -> None:
    theirs = peft.get_peft_model(fresh(make), peft.LoraConfig(r=2, lora_alpha=6, **settings)).eval()
    generator = torch.Generator(torch.get_default_device()).manual_seed(5)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    expected = output(theirs)
    theirs.save_pretrained(str(tmp_path))
    ours = LoRAModel.from_pretrained(fresh(make), tmp_path).eval()
    torch.testing.assert_close(output(ours), expected, **TOLERANCE)
    assert {name for name, _ in ours.lora_layers.named_parameters()} == {
        name for name, _ in LoRAModel(fresh(make), LoRAConfig(r=2, **settings)).lora_layers.named_parameters()
    }


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
    model = stirred_model(fresh(gpt2), LoRAConfig(r=2, lora_alpha=6, **settings))
    expected = output(model.eval())
    model.save_adapter(tmp_path)
    theirs = peft.PeftModel.from_pretrained(fresh(gpt2), str(tmp_path)).eval()
    torch.testing.assert_close(output(theirs), expected, **TOLERANCE)
    back = LoRAModel.from_pretrained(fresh(gpt2), tmp_path)
    assert back.adapters == model.adapters
    assert back.lora_layers.keys() == model.lora_layers.keys()
    torch.testing.assert_close(output(back.eval()), expected, rtol=1e-6, atol=1e-6)


def test_a_linear_layer_that_is_called_out_proj_is_added_once(tmp_path: Path) -> None:
    """As in OPT and Whisper; PEFT adds only that of nn.MultiheadAttention twice."""
    make = partial(nn.ModuleDict, {"attn": nn.ModuleDict({"out_proj": nn.Linear(8, 6)})})
    x = torch.randn(3, 8)
    theirs = peft.get_peft_model(copy.deepcopy(fresh(make)), peft.LoraConfig(r=2, target_modules=["out_proj"])).eval()
    layer: Any = theirs.base_model.model["attn"]["out_proj"]
    nn.init.normal_(layer.lora_B["default"].weight)
    theirs.save_pretrained(str(tmp_path))
    expected = layer(x)
    model = LoRAModel.from_pretrained(fresh(make), tmp_path).eval()
    torch.testing.assert_close(model.base_model["attn"]["out_proj"](x), expected, **TOLERANCE)
    alone = read_offline(tmp_path).updates["attn.out_proj"].factors.dense[0]
    torch.testing.assert_close(alone, model.adapter().low_rank["attn.out_proj"].delta_weight().detach(), **TOLERANCE)


def test_a_file_that_is_not_made_of_its_parts_is_refused(tmp_path: Path) -> None:
    model = stirred_model(fresh(gpt2), LoRAConfig(r=2, target_modules=["c_attn.q", "c_attn.v"]))
    model.save_adapter(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"
    tensors[key][20, 0] = 1.0  # a row of k
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_file(tensors, file, metadata)
    with pytest.raises(FormatError, match=r"c_attn.lora_B.weight: \(48, 4\) cannot be split into q, v"):
        LoRAModel.from_pretrained(fresh(gpt2), tmp_path)
