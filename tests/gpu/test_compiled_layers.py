"""Compiled layers on a GPU: the gradients of the plain layers, by two graphs for every depth and length.

torch's compiler makes no code for the pretend accelerator: there the graphs run as they are (aot_eager).
"""

from typing import Any

import numpy as np
import pytest
import torch
from tiny import GROUPED
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, LlamaConfig

from tailora import LoRAConfig, LoRAModel
from tailora.data.collate import collate_packed
from tailora.data.dataset import Example
from tailora.kernels.attention import packed_rows
from tailora.kernels.compiled_layers import CompiledLayers, decoder_layers
from tailora.train.kernel_choice import choose_packing

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # relative to the norm of the gradients
LENGTHS = [(100, 90), (150, 7, 80), (130, 4)]  # of more than one block of flex_attention's mask


def adapted(device: torch.device, dtype: torch.dtype, **settings: Any) -> LoRAModel:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(LlamaConfig(**{**GROUPED, "hidden_size": 64, "num_hidden_layers": 3}))
    model = LoRAModel(base.to(device, dtype), LoRAConfig(r=4, **settings)).train()
    for parameter in model.lora_layers.parameters():
        parameter.data.normal_(0, 0.02)
    return model


def gradients(model: LoRAModel, lengths: tuple[int, ...]) -> Tensor:
    ids = np.random.default_rng(len(lengths)).integers(300, size=sum(lengths)).astype(np.int32)
    row = collate_packed([Example.of_text(part) for part in np.split(ids, np.cumsum(lengths)[:-1])])
    row.pop("labels")
    inputs = {name: value.to(model.device) if isinstance(value, Tensor) else value for name, value in row.items()}
    model.zero_grad()
    logits = model(**inputs, use_cache=False).logits
    (logits * torch.linspace(-1, 1, logits.shape[-1], device=model.device)).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.lora_layers.parameters() if p.grad is not None])


@pytest.mark.parametrize(
    ("dtype", "slot"), [(torch.float32, {}), (torch.bfloat16, {"use_dora": True})], ids=["LoRA", "DoRA, bfloat16"]
)
def test_compiled_layers_give_the_gradients_of_plain_ones_by_one_graph(
    device: torch.device, dtype: torch.dtype, slot: dict[str, Any]
) -> None:
    model = adapted(device, dtype, **slot)
    attention, _ = choose_packing(model.base_model, "on")  # type: ignore[arg-type]
    layers = CompiledLayers(backend="aot_eager" if device.type == "pretend" else "inductor")
    counters.clear()
    with packed_rows(model.base_model, attention):  # type: ignore[arg-type]
        plain = [gradients(model, lengths) for lengths in LENGTHS]
        with layers.used_by(decoder_layers(model.base_model)):
            compiled = [gradients(model, lengths) for lengths in LENGTHS]
    for actual, expected in zip(compiled, plain, strict=True):
        assert (actual - expected).norm() <= TOLERANCE[dtype] * expected.norm()
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
