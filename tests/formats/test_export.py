"""Adapters for others: each format holds what the live model computes, or refuses and says what to do instead."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import stir
from safetensors.torch import load_file
from tiny import chat_model, chat_tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from tailora import LoRAConfig, LoRAModel
from tailora.errors import AdapterError, ConfigError, FormatError, MergeError
from tailora.formats import export, gguf, merged
from tailora.formats.export import FORMATS

IDS = torch.arange(24).view(2, 12)
HARD: dict[str, dict[str, Any]] = {  # what consumers get wrong in silence
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 3, "down_proj": 5}, "alpha_pattern": {"v_proj": 20}},
    "rslora, patterns": {"use_rslora": True, "rank_pattern": {"k_proj": 2}, "alpha_pattern": {"q_proj": 5}},
    "learned scales": {"learn_scaling": True},
    "some layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    "frozen starts": {"init_lora_weights": "pissa"},
}


def adapted(settings: dict[str, Any] | None = None, base: nn.Module | None = None) -> LoRAModel:
    base = base or chat_model()
    model = LoRAModel(base, LoRAConfig(**{"r": 4, "lora_alpha": 6, **(settings or {})}))
    stir(model)
    return model.eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("settings", HARD.values(), ids=HARD)
@pytest.mark.parametrize("to", FORMATS)
def test_what_is_written_computes_what_the_live_model_does(tmp_path: Path, to: str, settings: dict[str, Any]) -> None:
    model = adapted(settings)
    before = logits(model)
    done = model.export(tmp_path / "out", to, tokenizer=chat_tokenizer(["a"]))
    assert torch.equal(logits(model), before), "the live model changed"
    assert done.logits.difference <= 1e-4 < done.logits.effect
    assert done.files == {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    if to == "merged":
        again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    else:
        again = LoRAModel.from_pretrained(chat_model(), tmp_path / "out").eval()
    torch.testing.assert_close(logits(again), before, rtol=1e-4, atol=1e-4)


def test_portable_is_the_same_for_a_reader_of_r_and_alpha_alone(tmp_path: Path) -> None:
    model = adapted(HARD["rslora, patterns"])
    done = model.export(tmp_path / "out", "portable")
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
        torch.testing.assert_close(B @ A, layer.delta(), rtol=1e-5, atol=1e-6)
    assert done.changes == [
        "the scale is multiplied into B (rsLoRA's scale alpha/sqrt(r), alpha_pattern, rank_pattern)",
        "14 of 14 layers are filled up with zeros to rank 8",
    ]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # that PEFT asks for
def test_portable_loads_in_peft(tmp_path: Path) -> None:
    from peft import PeftModel

    model = adapted(HARD["rslora, patterns"])
    model.export(tmp_path / "out", "portable")
    theirs = PeftModel.from_pretrained(chat_model(), str(tmp_path / "out")).eval()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-4, atol=1e-5)


def test_a_frozen_start_is_plain_lora_of_twice_the_rank(tmp_path: Path) -> None:
    done = adapted({"init_lora_weights": "pissa"}).export(tmp_path / "out", "portable")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 8
    assert "14 layers' frozen starts are part of their factors, at twice the rank" in done.changes


def test_gguf_read_as_llama_cpp_reads_it(tmp_path: Path) -> None:
    """alpha / (rank of B) * B A is the update, with the rows of q and k as the base's GGUF has the weight's."""
    from gguf import GGUFReader

    model = adapted(HARD["patterns"])
    model.export(tmp_path / "out", "gguf")
    file = GGUFReader(tmp_path / "out" / "adapter.gguf")
    fields = {name: field.contents() for name, field in file.fields.items()}
    tensors = {each.name: np.array(each.data) for each in file.tensors}
    assert fields["general.type"] == "adapter"
    assert (fields["adapter.type"], fields["general.architecture"]) == ("lora", "llama")
    assert len(tensors) == 2 * 14
    for name, path, heads in (
        ("blk.1.attn_q", "model/layers/1/self_attn/q_proj", 4),
        ("blk.0.attn_k", "model/layers/0/self_attn/k_proj", 2),
        ("blk.0.attn_v", "model/layers/0/self_attn/v_proj", None),
        ("blk.1.ffn_down", "model/layers/1/mlp/down_proj", None),
    ):
        A, B = tensors[f"{name}.weight.lora_a"], tensors[f"{name}.weight.lora_b"]
        delta = model.lora_layers[path].delta().detach().numpy()
        if heads:  # within a head, row i of the first half is followed by row i of the second
            size = len(delta) // heads
            order = [
                head * size + half * size // 2 + i for head in range(heads) for i in range(size // 2) for half in (0, 1)
            ]
            delta = delta[order]
        np.testing.assert_allclose(fields["adapter.lora.alpha"] / B.shape[1] * B @ A, delta, rtol=1e-4, atol=1e-6)


def test_embeddings_and_the_head_where_they_are_not_tied(tmp_path: Path) -> None:
    model = adapted({"target_modules": ["embed_tokens", "lm_head", "q_proj"]})
    for to in FORMATS:
        assert model.export(tmp_path / to, to).logits.difference < 1e-4
    from gguf import GGUFReader

    shapes = {each.name: tuple(each.data.shape) for each in GGUFReader(tmp_path / "gguf" / "adapter.gguf").tensors}
    assert shapes["token_embd.weight.lora_a"] == (300, 4)
    assert shapes["output.weight.lora_b"] == (300, 4)


def test_conv1d_of_gpt2(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0))
    model = adapted(base=base)
    for to in ("peft", "portable", "gguf", "merged"):
        assert model.export(tmp_path / to, to).logits.difference < 1e-4
    with pytest.raises(FormatError, match="model_type 'gpt2': its layers' names in mlx-lm are not known"):
        model.export(tmp_path / "mlx", "mlx")


def test_parts_of_fused_layers_are_factors_of_the_whole(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0))
    model = adapted({"target_modules": ["c_attn.q", "c_attn.v", "c_fc"], "rank_pattern": {"c_attn.v": 3}}, base)
    for to in ("portable", "gguf", "merged"):
        done = model.export(tmp_path / to, to)
        assert done.logits.difference < 1e-4 < done.logits.effect
    tensors = load_file(tmp_path / "portable" / "adapter_model.safetensors")
    B = tensors["base_model.model.transformer.h.1.attn.c_attn.lora_B.weight"]
    assert B.shape == (96, 8)
    assert not B[32:64].any()


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("to", ["gguf", "mlx"])
def test_one_of_two_tied_weights_is_refused_where_it_would_change_both(tmp_path: Path, to: str, module: str) -> None:
    model = adapted({"target_modules": [module]}, chat_model(tie_word_embeddings=True))
    with pytest.raises(FormatError, match=r"tied.*export to \"merged\""):
        model.export(tmp_path / "out", to)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_a_merge_unties_and_the_config_says_so(tmp_path: Path, module: str) -> None:
    base = chat_model(tie_word_embeddings=True)
    model = adapted({"target_modules": [module]}, base)
    done = model.export(tmp_path / "out", "merged")
    assert "tied weights are untied: tie_word_embeddings is false" in done.changes
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert base.config.tie_word_embeddings is True
    assert base.lm_head.weight is base.model.embed_tokens.weight
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-4)
    assert not torch.equal(again.lm_head.weight, again.model.embed_tokens.weight)


def test_a_merge_that_touches_no_tied_weight_keeps_the_tie(tmp_path: Path) -> None:
    model = adapted(base=chat_model(tie_word_embeddings=True))
    model.export(tmp_path / "out", "merged")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")


def test_a_merged_folder_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merged, "SHARD", "30KB")
    tokenizer = chat_tokenizer(["hello there"], eos_token="<|im_end|>")
    model = adapted({"modules_to_save": ["lm_head"]}, chat_model().to(torch.bfloat16))
    done = model.export(tmp_path / "out", "merged", tokenizer=tokenizer)
    names = set(done.files)
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
    assert done.changes[0].startswith("rounding to bfloat16 changes the update by at most 0.0")


def test_a_merge_in_16_bits_that_loses_the_adapter_is_refused(tmp_path: Path) -> None:
    model = adapted(base=chat_model().to(torch.bfloat16))
    for layer in model.lora_layers.values():
        layer.scaling = 1e-4
    with pytest.raises(FormatError, match=r"Nothing was written; merge into a base in float32"):
        model.export(tmp_path / "out", "merged")
    assert not list(tmp_path.iterdir())
    assert model.export(tmp_path / "out", "portable").logits.difference < 1e-4


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"bias": "lora_only"}, {"lora_bias": True}])
def test_magnitudes_and_biases_are_held_by_peft_and_by_a_merge(tmp_path: Path, settings: dict[str, Any]) -> None:
    base = chat_model(attention_bias=True, mlp_bias=True)
    model = adapted(settings, base)
    for to in ("peft", "merged"):
        assert model.export(tmp_path / to, to).logits.difference < 1e-4
    for to in ("portable", "gguf", "mlx"):
        with pytest.raises(FormatError, match=r"(use_dora|biases).*export to \"merged\""):
            model.export(tmp_path / to, to)
        assert not (tmp_path / to).exists()


def test_a_bias_that_the_model_class_has_no_place_for_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"(?s)14 problems.*lora_bias needs a bias to merge into"):
        adapted({"lora_bias": True}).export(tmp_path / "out", "merged")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", ["portable", "gguf", "mlx"])
def test_all_that_a_format_cannot_hold_is_told_at_once(tmp_path: Path, to: str) -> None:
    model = adapted({"modules_to_save": ["lm_head"]})
    next(iter(model.lora_layers.values())).lora_bias = nn.Parameter(torch.ones(32))
    with pytest.raises(FormatError) as caught:
        model.export(tmp_path / "out", to)
    for part in ("2 problems", "modules_to_save: lm_head were trained whole", "trained biases", 'export to "merged"'):
        assert part in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_the_strength_dial_is_held_by_all_but_peft(tmp_path: Path) -> None:
    model = adapted()
    model.set_scale("default", 0.5)
    with pytest.raises(FormatError, match=r"strength dial .* set_scale\(name, 1\), or export to 'portable'"):
        model.export(tmp_path / "peft", "peft")
    done = model.export(tmp_path / "out", "portable")
    assert done.changes[0] == "the scale is multiplied into B (the strength dial)"
    again = LoRAModel.from_pretrained(chat_model(), tmp_path / "out").eval()
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-5)


def test_a_file_that_computes_something_else_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake of the writer: the rows of q and k as transformers has them."""
    monkeypatch.setattr(gguf, "to_gguf", lambda A, B, *_: (A, B))
    with pytest.raises(FormatError, match=r"logits differ .* Nothing was written; please report it"):
        adapted().export(tmp_path / "out", "gguf")
    assert not list(tmp_path.iterdir())


def test_the_comparison_sees_a_scale_that_is_a_thousandth_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fold_scale = export.fold_scale
    monkeypatch.setattr(
        export, "fold_scale", lambda source: {k: type(f)(f.A, f.B * 1.001) for k, f in fold_scale(source).items()}
    )
    with pytest.raises(FormatError, match="logits differ"):
        adapted(base=chat_model().to(torch.bfloat16)).export(tmp_path / "out", "portable")


def test_the_comparison_leaves_modes_weights_and_other_adapters_as_they_were(tmp_path: Path) -> None:
    base = chat_model().to(torch.bfloat16)
    model = adapted(base=base)
    model.add_adapter("other", LoRAConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter(["default", "other"])
    model.train()
    base.model.norm.eval()
    before = {name: (parameter, parameter.dtype) for name, parameter in base.named_parameters()}
    active = base.model.layers[0].self_attn.q_proj.active_adapters
    model.export(tmp_path / "out", "portable", "other")
    assert base.model.layers[0].self_attn.q_proj.active_adapters is active
    assert all(p is before[name][0] and p.dtype == before[name][1] for name, p in base.named_parameters())
    assert [base.training, base.model.norm.training, active[0].training] == [True, False, True]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())


def test_wide_weights_give_the_float32_forward() -> None:
    narrow = chat_model().to(torch.bfloat16).eval()
    wide = chat_model().to(torch.bfloat16).float().eval()
    assert torch.equal(export.float32_logits(narrow, IDS), logits(wide))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, p: m.export(p / "out", "gguff"), ConfigError, "did you mean gguf"),
        (lambda m, p: m.export(p / "out", "gguf", "absent"), AdapterError, "absent"),
        (lambda m, p: m.export(p, "gguf"), ConfigError, "is there already"),
        (lambda m, p: m.export(p / "mine.txt", "gguf"), ConfigError, "is there already"),
        (lambda m, p: (m.merge(), m.export(p / "out", "gguf")), MergeError, "unmerge"),
    ],
    ids=["format", "adapter", "folder", "file", "merged"],
)
def test_mistakes(tmp_path: Path, call: Any, error: type[Exception], message: str) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(error, match=message):
        call(adapted(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_model_without_a_vocabulary_has_nothing_to_compare(tmp_path: Path) -> None:
    model = LoRAModel(nn.Sequential(nn.Linear(8, 8)), LoRAConfig(r=2))
    with pytest.raises(FormatError, match=r"no config\.vocab_size.*save_adapter and merge work for every module"):
        model.export(tmp_path / "out", "portable")


def test_a_layer_narrower_than_the_one_rank(tmp_path: Path) -> None:
    model = adapted({"r": 4, "target_modules": ["k_proj", "q_proj"]}, chat_model(num_attention_heads=8, head_dim=2))
    with pytest.raises(FormatError, match=r"k_proj: the one rank for all layers, 8, is above its width"):
        model.export(tmp_path / "out", "portable")
    model.export(tmp_path / "out", "gguf")


def test_a_rank_above_those_of_vllm(tmp_path: Path) -> None:
    model = adapted({"r": 513, "target_modules": ["q_proj"]}, chat_model(hidden_size=520, head_dim=130))
    with pytest.raises(FormatError, match="rank 513 is above 512"):
        model.export(tmp_path / "out", "portable")


def test_an_unknown_architecture_is_refused_with_those_that_are_known(tmp_path: Path) -> None:
    model = adapted()
    model.base_model.config.model_type = "unheard"
    with pytest.raises(FormatError, match=r"model_type 'unheard' is not supported; there are: llama, mistral"):
        model.export(tmp_path / "out", "gguf")


def test_a_modelfile_takes_the_base_from_its_folder(tmp_path: Path) -> None:
    base = chat_model()
    assert gguf.modelfile(base).endswith("FROM ./base.gguf\nADAPTER ./adapter.gguf\n")
    base.config._name_or_path = str(tmp_path)
    assert gguf.modelfile(base) == f'FROM "{tmp_path}"\nADAPTER ./adapter.gguf\n'
