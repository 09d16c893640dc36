"""Layers whose weight is read without a call: their adapters would do nothing until they are merged."""

import pickle
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import MambaConfig, MambaForCausalLM, WavLMConfig, WavLMModel
from transformers.models.bloom.modeling_bloom import BloomAttention
from transformers.models.jamba.modeling_jamba import JambaMambaMixer
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
from transformers.models.t5.modeling_t5 import T5DenseActDense

from tailora import LoRAConfig, LoRAModel
from tailora.core.adapter_set import layer_calls
from tailora.core.layer_calls import uses_of_children
from tailora.errors import MergeError, TargetError


class Block(nn.Module):
    """`called` is called, `read` is not; of `conditional` the code tells nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read, self.conditional = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.experts = nn.ModuleList([nn.Sequential(nn.Linear(8, 8)) for _ in range(2)])
        self.call_all = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.called(x.to(self.called.weight.dtype))
        if self.call_all:
            x = self.conditional(x)
        return self.experts[0](self.product(x))

    def product(self, x: Tensor) -> Tensor:
        return x @ self.read.weight.T


class Hidden(Block):
    """Reads the weight in a way that the code does not tell."""

    def product(self, x: Tensor) -> Tensor:
        return x @ next(getattr(self, "read").parameters()).T  # noqa: B009


def mamba() -> MambaForCausalLM:
    torch.manual_seed(0)
    return MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=16, state_size=4, num_hidden_layers=2))


def test_what_forward_reads_without_a_call_is_no_default_target_and_refused_by_name() -> None:
    assert uses_of_children(Block) == {"read": "read"}
    adapted = LoRAModel(Block(), LoRAConfig(r=2)).adapter().low_rank
    assert set(adapted) == {"called", "conditional", "experts.0.0", "experts.1.0"}
    base = nn.ModuleList(Block() for _ in range(7))
    message = (
        r"^the modules around these layers read their weights .*: 0\.read, .*4\.read \(7 in all\)\. Adapters there "
        r"would do nothing\. Leave them out: exclude_modules=\['read'\]$"
    )
    with pytest.raises(TargetError, match=message):
        LoRAModel(base, LoRAConfig(r=2, target_modules=["called", "read"]))
    adapted = LoRAModel(base, LoRAConfig(r=2, target_modules=["called", "read"], exclude_modules=["read"])).adapter()
    assert len(adapted.low_rank) == 7


@pytest.mark.parametrize(
    ("cls", "uses"),
    [
        (JambaMambaMixer, {"conv1d": "read", "dt_proj": "called or read"}),
        (Mamba2Mixer, {"conv1d": "read", "out_proj": "called or read", "norm": "called or read"}),
        (T5DenseActDense, {}),  # asks for the dtype of a weight
        (BloomAttention, {}),  # slices a weight if it imitates tensor parallelism
        (LlamaAttention, {}),
        (LlamaMLP, {}),
    ],
)
def test_the_uses_in_transformers(cls: type[nn.Module], uses: dict[str, str]) -> None:
    assert uses_of_children(cls) == uses


def test_an_adapter_on_mamba_computes_the_same_merged() -> None:
    model = LoRAModel(mamba(), LoRAConfig(r=2)).eval()
    assert {path.rpartition(".")[2] for path in model.adapter().low_rank} == {"in_proj"}
    for layer in model.adapter().low_rank.values():
        nn.init.normal_(layer.lora_B)
    ids = torch.arange(12).view(2, 6)
    expected = model(ids).logits
    with model.merged():
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(TargetError, match=r"without calling them: .*dt_proj.*exclude_modules=\['dt_proj'\]"):
        LoRAModel(mamba(), LoRAConfig(r=2, target_modules=["dt_proj"]))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # that PEFT asks for
def test_a_file_of_peft_with_such_a_layer_computes_as_in_peft_and_is_not_merged(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["in_proj", "dt_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(mamba(), config).eval()
    theirs.save_pretrained(tmp_path)
    model, ids = LoRAModel.from_pretrained(mamba(), tmp_path).eval(), torch.arange(12).view(2, 6)
    torch.testing.assert_close(model(ids).logits, theirs(ids).logits)
    with pytest.raises(MergeError, match=r"layers\.0\.mixer\.dt_proj: the module around it reads its weight"):
        model.merge()
    with pytest.raises(MergeError, match="dt_proj"):
        model.merge_and_unload(in_place=True)
    for path, layer in model.adapter().low_rank.items():
        if path.endswith("dt_proj"):  # as it is after training
            nn.init.zeros_(layer.lora_B)
    expected = model(ids).logits
    with model.merged():
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_the_attention_of_wavlm_is_no_default_target() -> None:
    base = WavLMModel(
        WavLMConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            conv_dim=(8,),
            conv_kernel=(3,),
            conv_stride=(2,),
            num_feat_extract_layers=1,
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
        )
    )
    names = {path.rpartition(".")[2] for path in LoRAModel(base).adapter().low_rank}
    assert not names & {"q_proj", "k_proj", "v_proj", "out_proj"}
    assert "intermediate_dense" in names


def step(model: LoRAModel) -> None:
    model(torch.randn(3, 8)).sum().backward()


def test_the_first_backward_warns_of_layers_that_were_not_called() -> None:
    model = LoRAModel(Hidden(), LoRAConfig(r=2)).train()
    with pytest.warns(UserWarning, match=r"not called.*: read, conditional \(2 in all\).*exclude_modules=\['cond"):
        step(model)
    step(model)  # once is enough
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.lora_layers.parameters())  # type: ignore[attr-defined]
    model.add_adapter("b", LoRAConfig(r=2, target_modules=["read"]))
    model.set_adapter(["default", "b"])
    step(model)  # the layer was named before


def test_two_forwards_before_the_backward_are_one_step() -> None:
    model = LoRAModel(Hidden(), LoRAConfig(r=2)).train()
    chosen, rejected = model(torch.randn(3, 8)), model(torch.randn(3, 8))
    with model.disable_adapter(), torch.no_grad():
        reference = model(torch.randn(3, 8))
    with pytest.warns(UserWarning, match="not called.*: read, conditional"):
        (chosen - rejected - reference).sum().backward()
    step(model)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_unload_leaves_no_hooks_of_a_step_without_a_backward() -> None:
    model = LoRAModel(Hidden(), LoRAConfig(r=2)).train()
    model(torch.randn(3, 8))
    assert not any(module._forward_pre_hooks for module in model.unload().modules())


def test_a_model_whose_layers_are_all_called_leaves_no_hooks() -> None:
    base = Block()
    base.call_all = True
    model = LoRAModel(base, LoRAConfig(r=2)).train()
    step(model)
    assert not any(module._forward_pre_hooks for module in model.modules())
    with torch.no_grad():
        model(torch.randn(3, 8))
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.lora_layers.parameters())  # type: ignore[attr-defined]


def test_without_a_backward_nothing_is_left_or_said() -> None:
    model = LoRAModel(Hidden(), LoRAConfig(r=2)).train()
    model(torch.randn(3, 8))
    pickle.dumps(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.eval()(torch.randn(3, 8)).sum().backward()
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_trace_tells_a_branch_that_was_not_taken_from_a_weight_that_is_read() -> None:
    model: Any = LoRAModel(Hidden(), LoRAConfig(r=2))
    calls = layer_calls(model)
    with torch.no_grad(), calls.reads():
        calls.start()
        model(torch.randn(3, 8))
    calls.stop()
    assert sorted(calls.not_called) == ["conditional", "read"]
    assert calls.read_elsewhere == ["read"]
    assert not calls.none_called
