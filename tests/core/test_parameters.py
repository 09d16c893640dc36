"""Parameters that a module uses without calling a layer: stacked experts, and nn.MultiheadAttention.

The adapted module computes what it does with merged weights.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import stirred_model
from torch import Tensor, nn
from transformers import GptOssConfig, GptOssForCausalLM, MixtralConfig, MixtralForCausalLM

from tailora import LoRAConfig, LoRAModel


def stirred(base: nn.Module, **settings: Any) -> LoRAModel:
    return stirred_model(base, LoRAConfig(**{"r": 2, "lora_alpha": 6, **settings}))


def mixtral(**settings: Any) -> MixtralForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=4, vocab_size=40, **settings)
    return MixtralForCausalLM(config).eval()


def gpt_oss() -> GptOssForCausalLM:
    """Holds its experts as (E, in, out)."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 4, "num_key_value_heads": 2}
    return GptOssForCausalLM(GptOssConfig(**sizes, **experts, vocab_size=40)).eval()


EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("make", [mixtral, gpt_oss])
def test_experts_compute_what_the_merged_ones_do_in_each_implementation(
    make: Callable[[], Any], implementation: str, use_dora: bool
) -> None:
    base, ids = make(), torch.arange(24).view(2, 12)
    base.set_experts_implementation(implementation)
    plain = base(ids).logits
    model = stirred(base, target_modules=[], target_parameters=EXPERTS, use_dora=use_dora)
    y = model(ids).logits
    with model.merged() as report:
        torch.testing.assert_close(model(ids).logits, y, rtol=1e-4, atol=1e-5)
    assert len(report.rounding_error) == 4
    assert (y - plain).abs().max() > 0.01


# ---- nn.MultiheadAttention

LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False},
    "learned key and value": {"add_bias_kv": True},
    "zero attention": {"add_zero_attn": True, "add_bias_kv": True},
    "separate": {"kdim": 6, "vdim": 10},
    "dropout": {"dropout": 0.4},
}
BOOL = torch.arange(35).view(5, 7) % 4 == 1
CALLS: dict[str, dict[str, Any]] = {
    "weights": {},
    "no weights": {"need_weights": False},
    "weights of each head": {"average_attn_weights": False},
    "bool mask": {"attn_mask": BOOL, "need_weights": False},
    "float mask": {"attn_mask": torch.linspace(-1, 1, 35).view(5, 7)},
    "mask of each head": {"attn_mask": torch.linspace(-1, 1, 12 * 35).view(12, 5, 7)},
    "padding": {"key_padding_mask": torch.arange(21).view(3, 7) % 7 > 4, "need_weights": False},
    "padding and mask": {"key_padding_mask": torch.arange(21).view(3, 7) % 7 > 4, "attn_mask": BOOL},
}


def attention(seed: int = 0, **settings: Any) -> nn.MultiheadAttention:
    torch.manual_seed(seed)
    layer = nn.MultiheadAttention(12, 4, **settings)
    nn.init.normal_(layer.out_proj.bias) if layer.out_proj.bias is not None else None
    return layer


def inputs(layer: nn.MultiheadAttention, case: str) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(torch.get_default_device()).manual_seed(1)
    draw = [
        torch.randn(3, length, width, generator=generator)
        for length, width in ((5, 12), (7, layer.kdim), (7, layer.vdim))
    ]
    if case == "self":
        draw = [draw[0]] * 3
    if case == "shared":
        draw[2] = draw[1]
    if not layer.batch_first:
        swapped = {id(x): x.transpose(0, 1).contiguous() for x in draw}
        draw = [swapped[id(x)] for x in draw]
    return draw[0], draw[1], draw[2]


def same_as_merged(
    layer: nn.MultiheadAttention, given: tuple[Tensor, ...], call: dict[str, Any], **settings: Any
) -> None:
    """What the adapted layer gives, and its gradients, against torch's own code on the merged weights."""
    model = stirred(layer, target_modules=r".+", **settings)
    torch.manual_seed(5)
    y, weights = model(*given, **call)
    with model.merged():
        torch.manual_seed(5)
        expected, expected_weights = model(*given, **call)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    assert (weights is None) == (expected_weights is None)
    if weights is not None:
        torch.testing.assert_close(weights, expected_weights, rtol=1e-4, atol=1e-5)
    assert (y - model.unload()(*given, **call)[0]).abs().max() > 0.01


@pytest.mark.parametrize("settings", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.slow
def test_adapted_attention_is_torch_s_on_the_merged_weights(
    settings: dict[str, Any], call: dict[str, Any], training: bool
) -> None:
    layer = attention(**settings).train(training)
    same_as_merged(layer, inputs(layer, "all different"), call, use_dora=not training)


@pytest.mark.parametrize("case", ["self", "memory"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_attention_to_itself_and_to_a_memory(case: str, batch_first: bool, grad: bool) -> None:
    layer = attention(batch_first=batch_first).eval()
    with torch.set_grad_enabled(grad):  # without, in evaluation, torch reads the weights in a kernel of its own
        same_as_merged(layer, inputs(layer, case), {"need_weights": False})
