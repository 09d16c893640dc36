"""Every field of PEFT's LoraConfig: adapters that PEFT wrote compute the same here, or are refused with the reason."""

import json
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny import chat_model
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from tailora import LoRAConfig, LoRAModel
from tailora.errors import ConfigError, FormatError
from tailora.formats.peft_config import SETTINGS_WITHOUT_EFFECT, UNSUPPORTED_SETTINGS, USED_SETTINGS

pytestmark = pytest.mark.filterwarnings("ignore")  # those of PEFT

TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}
TWICE = 2.0  # PEFT 0.21.2 adds the update of attention's out_proj to the weight, and then merges it once more
IDS = torch.arange(24).view(2, 12)


class Convolutions(nn.Module):
    """As in PEFT's own tests: an embedding, convolutions and a linear layer, whose ranks are low."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.conv1d = nn.Embedding(100, 5), nn.Conv1d(5, 1, 2)
        self.conv2d, self.lin0 = nn.Conv2d(1, 10, 3, padding=1), nn.Linear(10, 2)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.conv1d(self.emb(ids).transpose(1, 2))[:, None]  # (batch, 1, 1, tokens)
        y: Tensor = self.lin0(self.conv2d(x).flatten(2).transpose(1, 2))
        return y


class Blocks(nn.Module):
    """Nested numbering: blocks.3.experts.2.proj. The outputs of all layers count."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "fc": nn.Linear(8, 8),
                    "experts": nn.ModuleList(nn.ModuleDict({"proj": nn.Linear(8, 8)}) for _ in range(3)),
                }
            )
            for _ in range(4)
        )
        self.my_head = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = ids.float()[..., None] @ torch.linspace(-0.1, 0.1, 8)[None]
        for block in self.blocks:
            parts: Any = block
            x = x + parts["fc"](x).tanh() + sum(expert["proj"](x).tanh() for expert in parts["experts"])
        y: Tensor = self.my_head(x)
        return y


class Nested(nn.Module):
    """The same below another name, as in most models of transformers: model.blocks.3.experts.2.proj."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Blocks()

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.model(ids)
        return y


SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


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


def mixtral() -> nn.Module:
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4, vocab_size=40))


def qwen2_moe() -> nn.Module:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**SIZES, **experts, num_key_value_heads=2, vocab_size=40))


def gpt_oss() -> nn.Module:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 4, "num_key_value_heads": 2}
    return GptOssForCausalLM(GptOssConfig(**SIZES, **experts, vocab_size=40))


def llama() -> nn.Module:
    return chat_model(num_hidden_layers=3)


def tied() -> nn.Module:
    return chat_model(tie_word_embeddings=True)


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40))


def classifier() -> nn.Module:
    return LlamaForSequenceClassification(LlamaConfig(**SIZES, vocab_size=40, num_labels=3, pad_token_id=0))


Q = {"target_modules": ["q_proj"]}
CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    # r, lora_alpha, patterns
    "defaults": (llama, {}),
    "alpha": (llama, {**Q, "lora_alpha": 3}),
    "rank pattern": (llama, {**Q, "rank_pattern": {"layers.1.self_attn.q_proj": 3}}),
    "rank pattern with ^": (llama, {**Q, "rank_pattern": {"^model.layers.0.self_attn.q_proj": 3}}),
    "two patterns match": (
        llama,
        {**Q, "rank_pattern": {r".*\.1\..*": 3, "q_proj": 5}, "alpha_pattern": {"q_proj": 9}},
    ),
    "rslora and patterns": (llama, {**Q, "use_rslora": True, "rank_pattern": {"0.self_attn.q_proj": 3}}),
    "dropout": (llama, {**Q, "lora_dropout": 0.3}),
    # which layers
    "regular expression": (llama, {"target_modules": r".*\.(q|v)_proj"}),
    "all-linear": (llama, {"target_modules": "all-linear"}),
    "paths": (llama, {"target_modules": ["model.layers.1.mlp.up_proj", "0.mlp.up_proj"]}),
    "exclude": (
        llama,
        {"target_modules": "all-linear", "exclude_modules": ["up_proj", "model.layers.0.mlp.down_proj"]},
    ),
    "exclude by expression": (llama, {"target_modules": ["q_proj", "k_proj"], "exclude_modules": r".*\.1\..*"}),
    "one layer": (llama, {**Q, "layers_to_transform": 1}),
    "layer 0": (llama, {**Q, "layers_to_transform": 0}),
    "layers": (llama, {**Q, "layers_to_transform": [0, 2]}),
    "no layers means all": (llama, {**Q, "layers_to_transform": []}),
    "layers pattern": (llama, {**Q, "layers_to_transform": [1], "layers_pattern": "layers"}),
    "layers patterns": (llama, {**Q, "layers_to_transform": [1], "layers_pattern": ["h", "layers"]}),
    "a whole path beside layers": (
        llama,
        {"target_modules": ["model.layers.0.self_attn.q_proj", "v_proj"], "layers_to_transform": [2]},
    ),
    "layers of gpt2": (
        gpt2,
        {"target_modules": ["c_attn"], "layers_to_transform": [1], "layers_pattern": "h", "fan_in_fan_out": True},
    ),
    "nested numbers": (Nested, {"target_modules": ["proj"], "layers_to_transform": [3]}),
    "nested numbers at the top": (Blocks, {"target_modules": ["proj", "fc"], "layers_to_transform": [2]}),
    "nested numbers, blocks": (
        Blocks,
        {"target_modules": ["proj", "fc"], "layers_to_transform": [2], "layers_pattern": "blocks"},
    ),
    "nested numbers, experts": (
        Nested,
        {"target_modules": ["proj"], "layers_to_transform": [0], "layers_pattern": ["experts"]},
    ),
    "parameter of a linear layer": (Blocks, {"target_modules": [], "target_parameters": ["my_head.weight"]}),
    "parameter, patterns": (
        Nested,
        {
            "target_modules": ["fc"],
            "target_parameters": ["proj.weight"],
            "rank_pattern": {"0.proj.weight": 2, "proj": 3},
            "alpha_pattern": {"weight": 5},
        },
    ),
    # modules trained in full
    "head": (llama, {**Q, "modules_to_save": ["lm_head"]}),
    "the end of a name": (Blocks, {"target_modules": ["fc"], "modules_to_save": ["head"]}),
    "norms": (llama, {**Q, "modules_to_save": ["input_layernorm", "norm"]}),
    "target and saved": (llama, {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]}),
    "classifier": (classifier, {**Q, "task_type": "SEQ_CLS"}),
    "classifier, head named": (classifier, {**Q, "modules_to_save": ["score"], "task_type": "SEQ_CLS"}),
    # embeddings and tokens
    "embedding": (llama, {"target_modules": ["embed_tokens"]}),
    "embedding and head": (llama, {"target_modules": ["embed_tokens", "lm_head"]}),
    "tokens": (llama, {**Q, "trainable_token_indices": [1, 2]}),
    "tokens by name": (llama, {**Q, "trainable_token_indices": {"tokens": [3, 1]}}),
    "tokens of both tied layers": (tied, {**Q, "trainable_token_indices": {"embed_tokens": [1, 2], "lm_head": [1, 2]}}),
    # slots
    "dora": (llama, {**Q, "use_dora": True}),
    "dora and rslora": (llama, {**Q, "use_dora": True, "use_rslora": True}),
    "lora_bias": (gpt2, {"target_modules": ["c_fc"], "lora_bias": True, "fan_in_fan_out": True}),
    "bias, lora_only": (gpt2, {"target_modules": ["c_attn", "c_fc"], "bias": "lora_only", "fan_in_fan_out": True}),
    "bias, all": (gpt2, {"target_modules": ["c_attn"], "bias": "all", "fan_in_fan_out": True}),
    "fan_in_fan_out of a linear layer": (llama, {**Q, "fan_in_fan_out": True}),
    # inits whose base is not changed
    "init false": (llama, {**Q, "init_lora_weights": False}),
    "gaussian": (llama, {**Q, "init_lora_weights": "gaussian"}),
    "orthogonal": (llama, {**Q, "init_lora_weights": "orthogonal", "r": 4}),
    # matrices that no layer computes alone
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
    # ranks above the smaller side of a layer, as in many of PEFT's own cases
    "rank above a convolution's channels": (Convolutions, {"target_modules": ["conv1d", "conv2d"]}),
    "rank above a linear layer's outputs": (Convolutions, {"target_modules": ["lin0"]}),
    "rank above an embedding's width": (Convolutions, {"target_modules": ["emb"]}),
    "rank above all, dora": (Convolutions, {"target_modules": ["conv2d", "lin0"], "use_dora": True, "r": 32}),
    "rank above all, rslora, bias": (
        Convolutions,
        {"target_modules": ["conv1d", "lin0"], "use_rslora": True, "bias": "all"},
    ),
    "rank above all, lora_bias": (Convolutions, {"target_modules": ["lin0"], "lora_bias": True, "r": 16}),
    "rank above an attention": (llama, {"target_modules": ["q_proj"], "r": 64, "lora_alpha": 128}),
}


def fresh(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    base = make().eval()
    for name, parameter in base.named_parameters():
        if "experts" in name and not isinstance(base, Blocks | Nested):
            nn.init.normal_(parameter, std=0.3)
    return base


@torch.no_grad()
def output(model: nn.Module) -> Tensor:
    y = model.eval()(IDS)
    result: Tensor = y if isinstance(y, Tensor) else y.logits
    return result


def written_by_peft(make: Callable[[], nn.Module], settings: dict[str, Any], folder: Path) -> Tensor:
    return output(peft_model(make, settings, folder))


def peft_model(make: Callable[[], nn.Module], settings: dict[str, Any], folder: Path) -> peft.PeftModel:
    theirs = peft.get_peft_model(fresh(make), peft.LoraConfig(**settings))
    generator, seen = torch.Generator(torch.get_default_device()).manual_seed(5), set()
    for name, parameter in theirs.named_parameters():
        if id(parameter) not in seen and parameter.requires_grad:
            seen.add(id(parameter))
            parameter.data = parameter.data * ("lora_" not in name or "magnitude" in name)
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.2
    theirs.save_pretrained(str(folder))
    return theirs


QUICK = (
    "defaults",
    "nested numbers",
    "parameter, patterns",
    "tied embedding and head",
    "rank above a linear layer's outputs",
)


@pytest.mark.parametrize(
    ("make", "settings"),
    [pytest.param(*case, id=name, marks=[] if name in QUICK else pytest.mark.slow) for name, case in CASES.items()],
)
def test_what_peft_writes_computes_the_same_here_and_again_in_peft(
    make: Callable[[], nn.Module], settings: dict[str, Any], tmp_path: Path
) -> None:
    theirs = peft_model(make, settings, tmp_path / "theirs")
    expected = output(theirs)
    assert (expected - output(fresh(make))).abs().max() > 1e-3
    ours = LoRAModel.from_pretrained(fresh(make), tmp_path / "theirs")
    torch.testing.assert_close(output(ours), expected, **TOLERANCE)
    ours.save_adapter(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(fresh(make), str(tmp_path / "ours"))
    for path, layer in ours.adapter().low_rank.items():
        layer.strength = TWICE if path.endswith("self_attn.out_proj") else 1.0
    torch.testing.assert_close(output(again), output(ours), **TOLERANCE)


def test_every_field_of_peft_s_config_is_taken_or_refused_or_has_no_effect() -> None:
    fields = {*peft.LoraConfig().to_dict(), "runtime_config"}
    ours = [*USED_SETTINGS, *SETTINGS_WITHOUT_EFFECT, *UNSUPPORTED_SETTINGS]
    assert len(ours) == len(set(ours))
    assert set(ours) == fields
    used = {name for _, settings in CASES.values() for name in settings}
    assert used >= {*USED_SETTINGS} - {"peft_type", "peft_version", "base_model_name_or_path"}


def changed(folder: Path, **settings: Any) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return folder


UNUSABLE = [({name: [[0, 1]]}, rf"{name} = .* is not supported") for name in UNSUPPORTED_SETTINGS]
UNUSABLE += [({"init_lora_weights": name}, "changed the base") for name in ("PiSSA_niter_4", "loftq")]
UNUSABLE += [({"init_lora_weights": "new"}, "'new' is unknown")]


@pytest.mark.parametrize(("settings", "reason"), UNUSABLE)
def test_a_setting_that_changes_what_is_computed_is_refused_by_name(
    settings: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    written_by_peft(llama, Q, tmp_path)
    with pytest.raises(FormatError, match=reason):
        LoRAModel.from_pretrained(fresh(llama), changed(tmp_path, **settings))


def test_mica_is_refused_as_peft_writes_it_and_loads_as_the_message_says(tmp_path: Path) -> None:
    expected = written_by_peft(llama, {**Q, "init_lora_weights": "mica", "r": 4}, tmp_path)
    with pytest.raises(FormatError, match="set init_lora_weights to true"):
        LoRAModel.from_pretrained(fresh(llama), tmp_path)
    ours = LoRAModel.from_pretrained(fresh(llama), changed(tmp_path, init_lora_weights=True))
    torch.testing.assert_close(output(ours), expected, **TOLERANCE)


def test_a_setting_of_a_later_peft_is_noticed(tmp_path: Path) -> None:
    written_by_peft(llama, Q, tmp_path)
    changed(tmp_path, use_new_thing=True, new_config=None, other={}, size=0.5)
    with pytest.warns(UserWarning, match=r"ignoring unknown settings .*: use_new_thing = True, size = 0\.5\. Compare"):
        LoRAModel.from_pretrained(fresh(llama), tmp_path)


SELECTING = ("all-linear", "exclude", "two patterns match", "one layer", "layers pattern", "a whole path beside layers")
SELECTING += ("nested numbers", "nested numbers at the top", "nested numbers, blocks", "nested numbers, experts")
SELECTING += ("the end of a name", "embedding and head")


@pytest.mark.parametrize("name", SELECTING)
def test_the_same_settings_select_the_same_here(name: str) -> None:
    make, settings = CASES[name][0], {"r": 2, "lora_alpha": 4, **CASES[name][1]}
    theirs = peft.get_peft_model(fresh(make), peft.LoraConfig(**settings))
    in_peft = {
        path.removeprefix("base_model.model."): (module.r["default"], module.lora_alpha["default"])
        for path, module in theirs.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    rows = LoRAModel(fresh(make), LoRAConfig(**settings)).summary().rows
    assert {row.path: (row.r, row.lora_alpha) for row in rows if row.r} == in_peft
    assert {row.path for row in rows if not row.r} == ({"my_head"} if "modules_to_save" in settings else set())


def test_the_task_of_a_classifier_is_written_only_where_its_head_is(tmp_path: Path) -> None:
    bare = LoRAModel(fresh(classifier), LoRAConfig(r=2, **Q))
    bare.save_adapter(tmp_path / "bare")
    assert json.loads((tmp_path / "bare/adapter_config.json").read_text())["task_type"] is None
    theirs = peft.PeftModel.from_pretrained(fresh(classifier), str(tmp_path / "bare"))
    torch.testing.assert_close(output(theirs), output(bare), **TOLERANCE)

    whole = LoRAModel(fresh(classifier), LoRAConfig(r=2, modules_to_save=["score"], **Q))
    whole.save_adapter(tmp_path / "whole")
    assert json.loads((tmp_path / "whole/adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    theirs = peft.PeftModel.from_pretrained(fresh(classifier), str(tmp_path / "whole"))
    torch.testing.assert_close(output(theirs), output(whole), **TOLERANCE)

    net = nn.Sequential(OrderedDict(fc=nn.Linear(4, 4), score=nn.Linear(4, 2)))
    named = LoRAModel(net, LoRAConfig(r=2, target_modules=["fc"], task_type="SEQ_CLS"))
    with pytest.warns(UserWarning, match=r"without the weights of score; .*modules_to_save=\['score'\]"):
        named.save_adapter(tmp_path / "named")
    assert json.loads((tmp_path / "named/adapter_config.json").read_text())["task_type"] == "SEQ_CLS"


def test_layers_pattern_without_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match="layers_pattern needs layers_to_transform; set both"):
        LoRAConfig(layers_pattern="h")
    with pytest.raises(ConfigError, match="is not a regular expression"):
        LoRAConfig(layers_pattern=["("], layers_to_transform=[0])


@pytest.mark.parametrize("name", [name for name in CASES if re.match("rank above an? ", name)])
@pytest.mark.slow
def test_an_adapter_of_a_rank_above_its_layer_trains_merges_combines_and_shrinks(name: str, tmp_path: Path) -> None:
    make, settings = CASES[name]
    expected = written_by_peft(make, settings, tmp_path)
    model = LoRAModel.from_pretrained(fresh(make), tmp_path)
    with model.merged():
        torch.testing.assert_close(output(model), expected, rtol=1e-4, atol=1e-4)
    model.load_adapter(tmp_path, "b")
    model.combine({"default": 0.5, "b": 0.5}, "cat", "cat")
    model.combine({"default": 0.5, "b": 0.5}, "svd", "svd")
    for mixed in ("cat", "svd"):
        model.set_adapter(mixed)
        torch.testing.assert_close(output(model), expected, rtol=1e-4, atol=1e-4)
    model.shrink("default", "small", energy=1.0)
    model.set_adapter("small")
    torch.testing.assert_close(output(model), expected, rtol=1e-4, atol=1e-4)
    model.set_adapter("default")
    for format_name in ("peft", "portable", "mlx", "merged") if make is llama else ():
        model.export(tmp_path / format_name, format_name)  # compares the logits with those of the model
    model.train()
    y = model(IDS)
    (y if isinstance(y, Tensor) else y.logits).square().sum().backward()
    assert all(
        parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.lora_layers.parameters()
    )
