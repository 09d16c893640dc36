"""Layers whose weight is read without a call: their adapters would do nothing until they are merged."""

import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny import tiny_model
from torch import Tensor, nn
from transformers import MambaConfig, MambaForCausalLM
from transformers.models.jamba.modeling_jamba import JambaMambaMixer
from transformers.models.layoutlmv3.modeling_layoutlmv3 import LayoutLMv3Encoder
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
from transformers.models.wavlm.modeling_wavlm import WavLMAttention

from tailora import LoRAConfig, LoRAModel
from tailora.core.adapter_set import layer_calls
from tailora.core.attach import attached_parts
from tailora.core.layer_calls import LayerCalls, use_of
from tailora.errors import MergeError, TargetError


class Block(nn.Module):
    """`called` is called, `read` is not, `conditional` only sometimes, and the second expert has no tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read, self.conditional = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.experts = nn.ModuleList([nn.Sequential(nn.Linear(8, 8)) for _ in range(2)])
        self.call_all = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.called(x.to(self.called.weight.dtype))
        if self.call_all:
            x = self.read(self.conditional(x))
        return self.experts[0](x @ self.read.weight.T)


def mamba() -> MambaForCausalLM:
    torch.manual_seed(0)
    return MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=16, state_size=4, num_hidden_layers=2))


@pytest.mark.parametrize(
    ("cls", "name", "use"),
    [
        (JambaMambaMixer, "conv1d", "read"),
        (JambaMambaMixer, "dt_proj", "called or read"),
        (JambaMambaMixer, "in_proj", "called"),
        (Mamba2Mixer, "out_proj", "called or read"),
        (WavLMAttention, "q_proj", "read"),
        (LayoutLMv3Encoder, "rel_pos_bias", "read"),
        (LlamaAttention, "q_proj", "called"),
    ],
)
def test_the_uses_in_transformers(cls: type[nn.Module], name: str, use: str) -> None:
    class Derived(cls):  # type: ignore[misc, valid-type]
        pass

    assert {use_of(object.__new__(kind), name) for kind in (cls, Derived)} == {use}


def test_an_adapter_on_mamba_computes_the_same_merged() -> None:
    model = LoRAModel(mamba(), LoRAConfig(r=2)).eval()
    assert {path.rpartition(".")[2] for path in model.adapter().low_rank} == {"in_proj"}
    for layer in model.adapter().low_rank.values():
        nn.init.normal_(layer.lora_B)
    ids = torch.arange(12).view(2, 6)
    expected = model(ids).logits
    with model.merged():
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(TargetError, match=r"only reads their weights: .*dt_proj.*exclude_modules=\['dt_proj'\]"):
        LoRAModel(mamba(), LoRAConfig(r=2, target_modules=["dt_proj"]))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # that PEFT asks for
def test_a_file_of_peft_with_such_a_layer_computes_as_in_peft_and_is_not_merged(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["in_proj", "dt_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(mamba(), config).eval()
    theirs.save_pretrained(tmp_path)
    model, ids = LoRAModel.from_pretrained(mamba(), tmp_path).eval(), torch.arange(12).view(2, 6)
    torch.testing.assert_close(model(ids).logits, theirs(ids).logits)
    with pytest.raises(MergeError, match=r"layers\.0\.mixer\.dt_proj: only the layer's weight is used"):
        model.merge()
    with pytest.raises(MergeError, match="dt_proj"):
        model.merge_and_unload(in_place=True)
    for path, layer in model.adapter().low_rank.items():
        if path.endswith("dt_proj"):  # as it is after training
            nn.init.zeros_(layer.lora_B)
    expected = model(ids).logits
    with model.merged():
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


def step(model: LoRAModel) -> None:
    model(torch.randn(3, 8)).sum().backward()


def test_the_first_forward_in_training_warns_of_layers_that_it_does_not_call() -> None:
    model = LoRAModel(Block(), LoRAConfig(r=2)).eval()
    step(model)
    model.train()
    with torch.no_grad(), model.disable_adapter():
        model(torch.randn(3, 8))
    with pytest.warns(UserWarning, match=r"did not call.*: read, conditional \(2 in total\).*exclude_modules=\['cond"):
        step(model)
    step(model)  # once is enough
    assert not any(module._forward_pre_hooks for module in model.modules())
    model.add_adapter("b", LoRAConfig(r=2, target_modules=["read"]))
    model.set_adapter(["default", "b"])
    step(model)  # the layer was named before


def test_a_model_whose_layers_are_all_called_leaves_no_hooks() -> None:
    base = Block()
    base.call_all = True
    model = LoRAModel(base, LoRAConfig(r=2)).train()
    step(model)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_forward_that_fails_leaves_no_hooks() -> None:
    model = LoRAModel(Block(), LoRAConfig(r=2)).train()
    with pytest.raises(RuntimeError, match="shapes"):
        model(torch.randn(3, 7))
    pickle.dumps(model)
    assert not any(module._forward_pre_hooks for module in model.modules())


def recorded(model: Any, *args: Tensor) -> tuple[LayerCalls, Any]:
    calls = layer_calls(model)
    with calls.recorded():
        output = model(*args)
    assert not any(module._forward_pre_hooks for module in model.modules())
    return calls, output


def test_a_forward_shows_which_layers_the_model_does_not_call() -> None:
    model = LoRAModel(Block(), LoRAConfig(r=2))
    calls, output = recorded(model, x := torch.randn(3, 8))
    assert calls.not_called == calls.not_trained_by(output) == ["read", "conditional"]  # the second expert is not one
    assert calls.read_by(lambda: model(x)) == ["read"]
    assert not any(parameter.requires_grad for parameter in model.base_model.parameters())


def test_the_cross_attention_of_a_decoder_alone_is_not_trained() -> None:
    calls, output = recorded(LoRAModel(tiny_model("BartForCausalLM"), LoRAConfig(r=2)), torch.tensor([[3, 4]]))
    assert not calls.not_called
    paths = calls.not_trained_by(output.logits)
    assert len(paths) == 2 * 4
    assert all(".encoder_attn." in path for path in paths)


@pytest.mark.parametrize(
    ("class_name", "names"),
    [
        ("DeepseekV32ForCausalLM", {"weights_proj", "wk", "wq_b"}),  # its indexer selects the tokens to attend to
        ("BigBirdForCausalLM", {"pooler"}),  # whose output nothing reads
        ("LlamaForCausalLM", set()),
    ],
)
def test_layers_without_an_effect_that_has_a_gradient_are_not_trained(class_name: str, names: set[str]) -> None:
    calls, output = recorded(LoRAModel(tiny_model(class_name), LoRAConfig(r=2)), torch.arange(3, 12)[None])
    paths = calls.not_trained_by(output.logits)
    assert {path.rpartition(".")[2] for path in paths} == names
    assert calls.ran.issuperset(calls.layers[path] for path in paths)
    output.logits.sum().backward()
    for path, layer in calls.layers.items():
        has_gradient = [p.grad is not None for part in attached_parts(layer) for p in part.parameters()]
        assert has_gradient == [path not in paths] * len(has_gradient)
