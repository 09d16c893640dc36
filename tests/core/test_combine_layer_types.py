"""Combining, shrinking and extracting attention, parts of fused layers and stacked experts, whole and through files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import stir, stirred_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from tailora import LoRAConfig, LoRAModel
from tailora.errors import AdapterError

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


class Attention(nn.Module):
    """Self-attention, then a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.last = nn.MultiheadAttention(12, 4, batch_first=True), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.attn(x, x, x, need_weights=False)[0])
        return y


def attention() -> nn.Module:
    torch.manual_seed(0)
    return Attention().double().eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=24)).double().eval()


def mixtral() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=4, vocab_size=40)
    model = MixtralForCausalLM(config).double().eval()
    model.set_experts_implementation("eager")  # torch's grouped product has no float64
    return model


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], dict[str, Any]]] = {
    "attention": (attention, {"target_modules": ["attn", "last"]}, {"target_modules": ["attn"]}),
    "parts": (gpt2, {"target_modules": ["c_attn.q", "c_attn.v"]}, {"target_modules": ["c_attn.v", "c_fc"]}),
    "experts": (
        mixtral,
        {"target_modules": ["q_proj"], "target_parameters": EXPERTS},
        {"target_modules": [], "target_parameters": EXPERTS},
    ),
}
cases = pytest.mark.parametrize(("make", "a", "b"), CASES.values(), ids=CASES)


def two(make: Any, a: dict[str, Any], b: dict[str, Any]) -> LoRAModel:
    model = stirred_model(make(), LoRAConfig(r=4, lora_alpha=6, **a), "a")
    model.add_adapter("b", LoRAConfig(r=3, lora_alpha=5, **b))
    model.set_adapter("b")
    stir(model, seed=3)
    return model.eval()


def weights(model: LoRAModel, name: str) -> dict[str, Tensor]:
    model.set_adapter(name)
    with model.merged():
        return {key: value.detach().clone() for key, value in model.base_model.state_dict().items()}


def outputs(model: LoRAModel, name: str) -> Tensor:
    model.set_adapter(name)
    return computed(model, isinstance(model.base_model, Attention))


def computed(model: nn.Module, on_vectors: bool) -> Tensor:
    if on_vectors:
        found: Tensor = model(
            torch.randn(2, 7, 12, generator=torch.Generator(torch.get_default_device()).manual_seed(1)).double()
        )
        return found.detach()
    logits: Tensor = model(torch.arange(20).view(2, 10)).logits
    return logits.detach()


@cases
@pytest.mark.parametrize("method", ["cat", "svd"])
@pytest.mark.slow
def test_combined_weights_add_up_and_survive_a_file(
    make: Any, a: dict[str, Any], b: dict[str, Any], method: str, tmp_path: Path
) -> None:
    model, base = two(make, a, b), make().state_dict()
    report = model.combine({"a": 0.7, "b": -0.4}, "mix", method, **({"r": 7} if method == "svd" else {}))
    assert report.worst < 1e-10
    of_a, of_b, mixed = (weights(model, name) for name in ("a", "b", "mix"))
    for key, value in base.items():
        torch.testing.assert_close(mixed[key] - value, 0.7 * (of_a[key] - value) - 0.4 * (of_b[key] - value))
    loaded = LoRAModel.from_pretrained(make(), model.save_adapter(tmp_path, "mix")).eval()
    torch.testing.assert_close(outputs(loaded, "default"), outputs(model, "mix"), rtol=1e-8, atol=1e-8)


@cases
@pytest.mark.slow
def test_shrinking_by_each_way_gives_a_file_that_computes_the_same(
    make: Any, a: dict[str, Any], b: dict[str, Any], tmp_path: Path
) -> None:
    model = two(make, a, b)
    exact = outputs(model, "a")
    model.shrink("a", "all", energy=1.0)
    torch.testing.assert_close(outputs(model, "all"), exact, rtol=1e-8, atol=1e-8)
    assert set(model.shrink("a", "r", r=2).rank.values()) == {2}
    model.shrink("a", "energy", energy=0.8)
    model.set_adapter("a")
    model.shrink("a", "loss", loss=lambda each: float((outputs_now(each) - exact).abs().mean()), budget=0.05)
    for name in ("r", "energy", "loss"):
        loaded = LoRAModel.from_pretrained(make(), model.save_adapter(tmp_path, name)).eval()
        torch.testing.assert_close(outputs(loaded, "default"), outputs(model, name), rtol=1e-8, atol=1e-8)


@pytest.mark.filterwarnings(
    "ignore:.*only tailora can load this adapter, not PEFT:UserWarning"
)  # DoRA on attention and experts
@cases
def test_dora_is_combined_as_dense_updates_and_shrunk_with_its_magnitudes(
    make: Any, a: dict[str, Any], b: dict[str, Any], tmp_path: Path
) -> None:
    model, base = two(make, {**a, "use_dora": True}, b), make().state_dict()
    with pytest.raises(AdapterError, match="DoRA scales the rows of W"):
        model.combine({"a": 0.7, "b": -0.4}, "mix")
    assert model.combine({"a": 0.7, "b": -0.4}, "mix", "svd", r=1000).worst < 1e-10
    model.shrink("a", "small", energy=1.0)
    of_a, of_b, mixed = (weights(model, name) for name in ("a", "b", "mix"))
    for key, value in base.items():
        torch.testing.assert_close(mixed[key] - value, 0.7 * (of_a[key] - value) - 0.4 * (of_b[key] - value))
    torch.testing.assert_close(outputs(model, "small"), outputs(model, "a"), rtol=1e-8, atol=1e-8)
    loaded = LoRAModel.from_pretrained(make(), model.save_adapter(tmp_path, "small")).eval()
    torch.testing.assert_close(outputs(loaded, "default"), outputs(model, "small"), rtol=1e-8, atol=1e-8)


def outputs_now(model: LoRAModel) -> Tensor:
    return outputs(model, model.active_adapters[0])


@cases
def test_extracting_finds_the_update_and_reports_other_changed_rows(
    make: Any, a: dict[str, Any], b: dict[str, Any]
) -> None:
    model = two(make, a, b)
    model.set_adapter("a")
    tuned = model.merge_and_unload()
    found, report = LoRAModel.from_difference(make(), tuned, LoRAConfig(**a), r=4)
    assert report.worst < 1e-9
    assert report.left_over == {}
    expected = computed(tuned, make is attention)
    torch.testing.assert_close(outputs(found.eval(), "default"), expected, rtol=1e-6, atol=1e-6)
    if make is gpt2:
        _, report = LoRAModel.from_difference(make(), tuned, LoRAConfig(target_modules=["c_attn.q"]), r=4)
        name = "transformer.h.0.attn.c_attn.weight"
        before, after = make().state_dict()[name], tuned.state_dict()[name]
        lost = (after - before)[:, 16:].norm() / before.norm()
        assert report.left_over[name] == pytest.approx(float(lost))
