"""Merging: ties, weights in place, rounding errors, and what is refused."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from tiny import chat_model, stir, stirred_model
from torch import nn
from transformers import LlamaForCausalLM
from transformers.models.falcon.modeling_falcon import FalconLinear

from tailora import LoRAConfig, LoRAModel
from tailora.core.attach import TensorChange
from tailora.core.merge import BLOCK, check_ties
from tailora.errors import MergeError


def tied_llama() -> LlamaForCausalLM:
    return chat_model(num_hidden_layers=1, tie_word_embeddings=True).eval()


@pytest.mark.parametrize("targets", [["lm_head"], ["lm_head", "embed_tokens"]])
def test_untying_adds_to_each_side_of_a_tie_once_and_says_so_in_the_config(targets: list[str]) -> None:
    model = stirred_model(tied_llama(), LoRAConfig(r=4, target_modules=targets))
    ids = torch.arange(9)[None]
    expected, embedding = model(ids).logits, model.base_model.model.embed_tokens.weight.detach().clone()
    base = model.merge_and_unload(untie_weights=True)
    torch.testing.assert_close(base(ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(base.model.embed_tokens.weight, embedding) == ("embed_tokens" not in targets)
    assert base.config.tie_word_embeddings is False


@pytest.mark.parametrize("act", [LoRAModel.merge, partial(LoRAModel.merge_and_unload, in_place=True)])
def test_nothing_is_written_when_one_merged_weight_is_not_finite(act: Callable[[LoRAModel], Any]) -> None:
    base = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).to(torch.float16)
    model = stirred_model(base, LoRAConfig(r=4))
    model.lora_layers["1"].lora_B.data.fill_(60000)
    before = [layer.weight.detach().clone() for layer in base]
    with pytest.raises(MergeError, match=r"1: the merged weight is not finite in torch\.float16"):
        act(model)
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(base, before, strict=True))
    assert not model.is_merged


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_in_place_writes_the_same_numbers_into_the_weights(dtype: torch.dtype) -> None:
    def adapted() -> LoRAModel:
        return stirred_model(tied_llama().to(dtype), LoRAConfig(r=4))

    expected = adapted().merge_and_unload().state_dict()
    model = adapted()
    weights = dict(model.base_model.named_parameters())
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    base = model.merge_and_unload(in_place=True)
    assert all(weight is weights[name] for name, weight in base.named_parameters())
    assert all(torch.equal(weight, expected[name]) for name, weight in base.state_dict().items())
    changed = {name for name, weight in weights.items() if not torch.equal(weight, before[name])}
    assert changed == {name for name in weights if "proj" in name}


def test_merging_in_place_does_not_overwrite_a_shared_weight() -> None:
    model = stirred_model(tied_llama(), LoRAConfig(r=4, target_modules=["lm_head", "q_proj"]))
    ids = torch.arange(9)[None]
    expected, embedding = model(ids).logits, model.base_model.model.embed_tokens.weight.detach().clone()
    with pytest.raises(MergeError, match="another layer shares"):
        model.merge_and_unload(in_place=True)
    torch.testing.assert_close(model(ids).logits, expected)  # nothing was written
    base = model.merge_and_unload(untie_weights=True, in_place=True)
    torch.testing.assert_close(base(ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(base.model.embed_tokens.weight, embedding)


def test_the_reported_rounding_error_is_that_of_the_weight() -> None:
    base = nn.Sequential(nn.Linear(256, 256)).to(torch.bfloat16)
    model = stirred_model(base, LoRAConfig(r=4))
    layer, adapter = base[0], model.lora_layers["0"]
    adapter.scaling = 1e-2 * float(layer.weight.norm() / (adapter.lora_B @ adapter.lora_A).detach().norm())
    delta, original = adapter.delta_weight().detach(), layer.weight.detach().float()
    report = model.merge()
    expected = (layer.weight.float() - original - delta).norm() / delta.norm()
    assert report.rounding_error["0"] == pytest.approx(expected.item(), rel=1e-3)
    assert 0.1 < report.worst < 0.25  # science.md: 17% at ||dW|| / ||W|| = 1e-2


def test_what_cannot_be_done_while_merged_is_refused() -> None:
    model = LoRAModel(nn.Sequential(nn.Linear(8, 8)), LoRAConfig(r=2))
    with pytest.raises(MergeError, match="because nothing is merged"):
        model.unmerge()
    model.merge()
    for action in (
        lambda: model.merge(),
        lambda: model.set_adapter(None),
        lambda: model.add_adapter("x", LoRAConfig(r=2)),
        lambda: model.save_adapter("nowhere"),
        lambda: model.delete_adapter("default"),
    ):
        with pytest.raises(MergeError, match="unmerge\\(\\) first"):
            action()
    model.unmerge()
    model.set_adapter(None)
    with pytest.raises(MergeError, match="no adapter is active"):
        model.merge()


def test_a_merged_model_can_change_its_precision() -> None:
    model = stirred_model(nn.Sequential(nn.Linear(4, 3)), LoRAConfig(r=2))
    weight = model.base_model[0].weight.detach().clone()
    model.merge()
    model.double()
    model.unmerge()
    assert torch.equal(model.base_model[0].weight, weight.double())


def test_a_class_that_is_known_to_compute_the_product_by_itself_is_merged() -> None:
    model, x = LoRAModel(nn.Sequential(FalconLinear(8, 8)), LoRAConfig(r=2)), torch.randn(3, 8)
    stir(model)
    expected = model(x)
    model.merge()
    torch.testing.assert_close(model(x), expected)


def test_a_parametrized_weight_is_not_merged() -> None:
    base = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)))
    model = LoRAModel(base, LoRAConfig(r=2))
    with pytest.raises(MergeError, match="parametrization"):
        model.merge()


def test_several_adapters_merge_as_they_run() -> None:
    model = stirred_model(nn.Sequential(nn.Linear(8, 6)), LoRAConfig(r=2))
    model.add_adapter("b", LoRAConfig(r=3))
    model.set_adapter("b")
    stir(model, seed=9)
    model.set_adapter(["default", "b"])
    model.set_scale("b", 0.7)
    x = torch.randn(3, 8)
    expected = model(x)
    with model.merged():
        torch.testing.assert_close(model(x), expected)
    assert torch.equal(model(x), expected)


def test_a_refused_merge_leaves_the_tie_alone_and_unload_ties_again() -> None:
    model = stirred_model(tied_llama(), LoRAConfig(r=4, target_modules=["lm_head"]))
    base, B = model.base_model, model.lora_layers["lm_head"].lora_B
    good = B.detach().clone()
    B.data.fill_(torch.inf)
    with pytest.raises(MergeError, match="not finite"):
        model.merge(untie_weights=True)
    assert base.lm_head.weight is base.model.embed_tokens.weight
    B.data.copy_(good)
    model.merge(untie_weights=True)
    assert base.config.tie_word_embeddings is False
    model.unload()
    assert base.lm_head.weight is base.model.embed_tokens.weight
    assert base.config.tie_word_embeddings is True


def test_a_tied_head_that_was_trained_whole_is_refused_or_untied() -> None:
    config = LoRAConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model, ids = LoRAModel(tied_llama(), config), torch.arange(9)[None]
    model.lora_layers["lm_head"].weight.data.mul_(2)
    expected = model(ids).logits
    with pytest.raises(MergeError, match=r"lm_head = model\.embed_tokens"):
        model.merge_and_unload()
    torch.testing.assert_close(model.merge_and_unload(untie_weights=True)(ids).logits, expected)


def test_a_weight_that_is_shared_under_another_name_is_seen() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)
            self.kernel = self.layer.weight

    model = LoRAModel(Net(), LoRAConfig(r=2))
    with pytest.raises(MergeError, match="layer = "):
        model.merge()


def test_a_merge_with_magnitudes_in_several_blocks_of_rows_computes_what_the_adapter_did() -> None:
    rows = 2 * BLOCK // 512 + 3  # the last block has three
    model = stirred_model(nn.Sequential(nn.Linear(512, rows)), LoRAConfig(r=2, use_dora=True))
    x = torch.randn(3, 512)
    expected = model(x)
    assert model.merge().worst < 1e-5
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


def test_a_shared_weight_stays_shared_only_if_all_of_its_layers_get_the_same_one() -> None:
    first, second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    second.weight = first.weight
    model, new = nn.Sequential(first, second), [nn.Parameter(torch.randn(3, 3)) for _ in range(2)]
    both = [TensorChange(first, "weight", new[0]), TensorChange(second, "weight", new[0])]
    assert check_ties(model, both, untie_weights=False) is False
    for changes in (both[:1], [both[0], TensorChange(second, "weight", new[1])]):
        with pytest.raises(MergeError, match=r"another layer shares \(0 = 1"):
            check_ties(model, changes, untie_weights=False)
        assert check_ties(model, changes, untie_weights=True) is True
