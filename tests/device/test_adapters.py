"""What adapters cost on a device: kernels of layers, evaluations and mixed batches, and how often the host waits.

tests/core/test_inference.py counts those of a decoded token, here too.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import peft
import pytest
import torch
from pretend_accelerator import counted, no_synchronisation
from tiny import chat_model
from torch import nn

from tailora import LoRAConfig, LoRAModel
from tailora.core.attach import Adapted
from tailora.core.layer import LoRALayer
from tailora.data.dataset import Example, Examples
from tailora.evaluation.forgetting import forgetting
from tailora.kernels.loss import FROZEN
from tailora.train.loss import BatchLayout, evaluate

pytestmark = pytest.mark.device

PROJECTIONS = 14  # of the chat model's two layers
DORA = LoRAConfig(r=4, use_dora=True)


def stirred(device: torch.device, config: LoRAConfig, dtype: torch.dtype = torch.float32) -> LoRAModel:
    model = LoRAModel(chat_model(initializer_range=0.3, attention_bias=True).to(device, dtype), config).eval()
    for parameter in model.lora_layers.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


# ---- Evaluation

LAYOUT = BatchLayout(packed=True, loss=FROZEN, pad_id=0, attention="sdpa")


def example(length: int) -> Example:
    ids = np.arange(1, length + 1, dtype=np.int32)
    return Example.of_text(ids, ids > length - 4)


def held_out(model: LoRAModel, count: int) -> Any:
    return evaluate(model, Examples.of([example(40)] * count), layout=LAYOUT, token_budget=40).sums


def other_text(model: LoRAModel, count: int) -> Any:
    return forgetting(model, [list(range(40))] * count).loss_after


@pytest.mark.parametrize("evaluation", [held_out, other_text])
@pytest.mark.parametrize(("config", "most"), [(LoRAConfig(r=4), 2), (DORA, 3)], ids=["LoRA", "DoRA"])
def test_an_evaluation_computes_norms_once_and_adds_as_few_kernels_as_decoding(
    device: torch.device, config: LoRAConfig, most: int, evaluation: Callable[[LoRAModel, int], Any]
) -> None:
    model = stirred(device, config, torch.bfloat16)

    def kernels_of_a_batch() -> int:
        totals = []
        for batches in (1, 2):
            with counted() as counts:
                evaluation(model, batches)
            totals.append(counts.kernels.total())
        return totals[1] - totals[0]

    adapted = kernels_of_a_batch()
    layers = [module for module in model.base_model.modules() if isinstance(module, Adapted)]
    assert {type(part) for layer in layers for part in layer.adapter_parts} == {LoRALayer}
    model.set_adapter(None)
    assert adapted - kernels_of_a_batch() == most * PROJECTIONS


# ---- DoRA's norms


def test_the_norms_wait_for_nothing_and_widen_no_weight(device: torch.device) -> None:
    layer = nn.Linear(512, 256).to(device, torch.bfloat16)
    model = LoRAModel(nn.Sequential(layer), DORA)
    (adapter,) = model.lora_layers.values()
    adapter.lora_B.data.normal_(std=0.05)
    x, module = torch.randn(3, 512, device=device, dtype=torch.bfloat16), torch.get_device_module(device)
    model(x)
    before = module.memory_allocated()
    module.reset_peak_memory_stats()
    with no_synchronisation(), counted() as counts:
        adapter.gain(layer)
    assert module.max_memory_allocated() - before < layer.weight.numel()  # half of the weight's 16 bits
    assert counts.kernels.total() <= 16
    with no_synchronisation():
        model(x).float().sum().backward()


# ---- A layer beside that of PEFT

NAMES_OF_PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


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
    settings = {"r": 4, "use_dora": dora, "target_modules": NAMES_OF_PROJECTIONS}
    own = kernels_of_a_layer(device, lambda base: LoRAModel(base, LoRAConfig(**settings)), dtype)
    theirs = kernels_of_a_layer(device, lambda base: peft.get_peft_model(base, peft.LoraConfig(**settings)), dtype)
    assert own <= theirs - fewer, (own, theirs)


# ---- Mixed batches: no wait of the host after the first forward of a block

SLOTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "DoRA": {"use_dora": True},
    "dropout": {"lora_dropout": 0.5},
    "trained biases": {"bias": "all"},
    "embedding": {"target_modules": ["embed_tokens", "v_proj"]},
    "token rows": {"trainable_token_indices": [3, 5]},
    "module trained whole": {"modules_to_save": ["norm"]},
}
NAMES = ["b", None, "a", "b"]


def mixed(device: torch.device, **settings: Any) -> LoRAModel:
    model = LoRAModel(chat_model(initializer_range=0.3, attention_bias=True), LoRAConfig(r=4, **settings), "a").eval()
    model.add_adapter("b", LoRAConfig(r=2, **settings))
    model.set_adapter(["a", "b"] if "modules_to_save" not in settings else "a")
    for parameter in model.lora_layers.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.to(device)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("slot", SLOTS)
def test_the_host_waits_for_the_first_forward_alone(device: torch.device, slot: str, training: bool) -> None:
    """Afterwards no more than the base makes it wait, for transformers' mask."""
    model, ids = mixed(device, **SLOTS[slot]).train(training), torch.full((4, 5), 7, device=device)

    def waits() -> int:
        with counted() as counts, torch.set_grad_enabled(training):
            logits = model(input_ids=ids, use_cache=False).logits
            if training and logits.requires_grad:
                logits.sum().backward()
        return counts.synchronisations.total()

    with model.adapter_rows(NAMES):
        first, *later = waits(), waits(), waits()
    model.set_adapter(None)
    assert later == [waits()] * 2
    assert first > later[0]


def kernels_of_a_token(model: Any, prompt: torch.Tensor) -> int:
    totals = []
    for tokens in (3, 4):
        with counted() as counts:
            model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
        totals.append(counts.kernels.total())
    return totals[1] - totals[0]


@pytest.mark.parametrize("names", [["a"] * 4, ["a", "b", "a", "b"], ["a", None, "b", "b"]])
@pytest.mark.parametrize(("slot", "most"), [("plain", 2), ("DoRA", 4)])
def test_a_decoded_token_takes_few_kernels_whatever_the_number_of_adapters(
    device: torch.device, slot: str, most: int, names: list[str | None]
) -> None:
    model, prompt = mixed(device, **SLOTS[slot]), torch.full((4, 3), 7, device=device)
    with model.adapter_rows(names):
        adapted = kernels_of_a_token(model, prompt)
    model.set_adapter(None)
    assert adapted - kernels_of_a_token(model, prompt) <= most * PROJECTIONS
