"""How many kernels a layer of an adapted model takes."""

from typing import Any

import peft
import pytest
import torch
from pretend_accelerator import counted
from tiny import chat_model
from torch import nn

from tailora import LoRAConfig, LoRAModel

pytestmark = pytest.mark.device

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def kernels_of_a_layer(device: torch.device, wrapped: Any, dtype: torch.dtype) -> int:
    """Returns how many kernels one more decoder layer adds to a forward and a backward."""
    totals = []
    for layers in (1, 3):
        model: nn.Module = wrapped(chat_model(num_hidden_layers=layers).to(dtype)).to(device).train()
        ids = torch.arange(12).view(1, 12).to(device)
        model(input_ids=ids, use_cache=False).logits.sum().backward()  # makes the gradients' memory
        with counted() as counts:
            model(input_ids=ids, use_cache=False).logits.sum().backward()
        totals.append(counts.kernels.total())
    return (totals[1] - totals[0]) // 2


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # that PEFT asks for
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("dora", "fewer"), [(False, 0), (True, 14)], ids=["LoRA", "DoRA"])
def test_a_layer_takes_no_more_kernels_than_peft_s(
    device: torch.device, dora: bool, fewer: int, dtype: torch.dtype
) -> None:
    """With DoRA, each of its 7 projections takes two kernels less."""
    settings = {"r": 4, "use_dora": dora, "target_modules": PROJECTIONS}
    own = kernels_of_a_layer(device, lambda base: LoRAModel(base, LoRAConfig(**settings)), dtype)
    theirs = kernels_of_a_layer(device, lambda base: peft.get_peft_model(base, peft.LoraConfig(**settings)), dtype)
    assert own <= theirs - fewer, (own, theirs)
