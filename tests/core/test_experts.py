"""Stacked experts: the adapted module computes what the merged one does, in each implementation of transformers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import stir
from torch import nn
from transformers import GptOssConfig, GptOssForCausalLM, MixtralConfig, MixtralForCausalLM

from tailora import LoRAConfig, LoRAModel


def stirred(base: nn.Module, **settings: Any) -> LoRAModel:
    model = LoRAModel(base, LoRAConfig(**{"r": 2, "lora_alpha": 6, **settings}))
    stir(model)
    return model


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
