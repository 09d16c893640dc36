"""Which form of the loss a model takes, and that each gives the gradients of full logits."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import GROUPED, VOCABULARY
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PreTrainedConfig,
)

from tailora.core.config import LoRAConfig
from tailora.data.dataset import IGNORED
from tailora.kernels.loss import FORMS, FROZEN, OWN, RECOMPUTED, WHOLE, Batch
from tailora.model import LoRAModel
from tailora.train.kernel_choice import choose_form

GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4}
CONFIGS: dict[str, PreTrainedConfig] = {
    "gpt2": GPT2Config(**GPT2, tie_word_embeddings=False),
    "gpt2, tied": GPT2Config(**GPT2),
    "llama": LlamaConfig(**GROUPED),
    "gemma2, soft cap": Gemma2Config(**GROUPED, head_dim=8),
    "cohere, logit scale": CohereConfig(**GROUPED),
    "phi, head with a bias": PhiConfig(**GROUPED),
    "granite, logit scale": GraniteConfig(**GROUPED, logits_scaling=8.0),
}
ADAPTERS = {
    "layers": LoRAConfig(r=4, target_modules="all-linear"),
    "head": LoRAConfig(r=4, target_modules=["lm_head", "c_attn"], learn_scaling=True),
    "head whole": LoRAConfig(r=4, target_modules=["c_attn"], modules_to_save=["lm_head"]),
}


def model_of(name: str, adapter: str = "layers", dtype: torch.dtype = torch.float64) -> LoRAModel:
    torch.manual_seed(0)
    return adapted(AutoModelForCausalLM.from_config(CONFIGS[name]).to(dtype), adapter)


def adapted(base: nn.Module, adapter: str = "layers") -> LoRAModel:
    model = LoRAModel(base, ADAPTERS[adapter]).to(next(base.parameters()).dtype).eval()
    for name, parameter in model.lora_layers.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def batch_of() -> Batch:
    """Two padded rows, of 9 and 12 tokens, some judged."""
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (2, 12), generator=random)
    mask = torch.ones_like(ids)
    mask[0, 9:] = 0
    wanted = mask.roll(-1, 1).bool() & (torch.rand(2, 12, generator=random) < 0.7)
    wanted[:, -1] = False
    next_tokens = ids.roll(-1, 1).masked_fill(~wanted, IGNORED)
    rows = np.arange(2)[:, None].repeat(12, axis=1)
    return Batch.of({"input_ids": ids, "attention_mask": mask}, next_tokens.numpy(), rows)


def form_of(model: nn.Module) -> tuple[str, str | None]:
    base = model.base_model if isinstance(model, LoRAModel) else model
    return choose_form(base, batch_of())


def assert_right(model: LoRAModel, form: str, tolerance: float, temperature: float = 1.0) -> None:
    """Losses and gradients by all that is trained are those of torch on full logits; the losses weigh differently."""
    batch, trained = replace(batch_of(), temperature=temperature), list(model.lora_layers.parameters())
    weights = torch.linspace(-1, 2, len(batch.targets), dtype=torch.float64)
    logits = model(**batch.inputs).logits.flatten(0, 1)[batch.supervised] / temperature
    results = [
        [losses.detach(), *torch.autograd.grad(losses @ weights, trained)]
        for losses in (FORMS[form](model, batch), F.cross_entropy(logits, batch.targets, reduction="none"))
    ]
    for found, expected in zip(*results, strict=True):
        assert (found - expected).norm() <= tolerance * expected.norm()
        assert expected.norm() > 0


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("name", ["gpt2", "gpt2, tied"])
def test_the_head_decides_between_the_chunked_forms(name: str, adapter: str) -> None:
    model, form = model_of(name, adapter), FROZEN if adapter == "layers" else RECOMPUTED
    assert form_of(model) == (form, None)
    assert_right(model, form, 1e-10)
    for dtype in (torch.float32, torch.bfloat16):
        assert form_of(model_of(name, adapter, dtype)) == (form, None)


@pytest.mark.parametrize("form", FORMS)
def test_temperature_divides_the_logits_also_their_bias(form: str) -> None:
    model = model_of("phi, head with a bias")
    nn.init.normal_(model.base_model.get_output_embeddings().bias)
    assert_right(model, form, 1e-6, temperature=0.5)


@pytest.mark.parametrize("name", ["gemma2, soft cap", "cohere, logit scale", "granite, logit scale"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_that_changes_its_logits_keeps_them(name: str, dtype: torch.dtype) -> None:
    form, why = form_of(model_of(name, dtype=dtype))
    assert form == OWN
    assert "scales or caps the logits after its head" in str(why)
    if dtype == torch.float64:
        assert_right(model_of(name), OWN, 1e-6)


class Unusual(LlamaForCausalLM):
    """Takes no logits_to_keep, and computes something that its decoder and its head alone do not."""

    change = ""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool = False) -> Any:
        ids = input_ids.flip(1) if self.change == "inputs" else input_ids
        states = self.model(input_ids=ids, attention_mask=attention_mask, use_cache=use_cache)
        hidden = states[0] * 2 if self.change == "states" else states[0]
        states.logits = F.linear(hidden, self.lm_head.weight) if self.change == "head" else self.lm_head(hidden)
        return states


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("states", "changes the decoder's hidden states before the head"),
        ("head", "does not call both its decoder and its head"),
        ("inputs", "returns different states when its decoder is called alone"),
    ],
)
def test_what_a_model_does_outside_its_decoder_and_head_is_noticed(change: str, why: str) -> None:
    torch.manual_seed(0)
    base = Unusual(LlamaConfig(**GROUPED))
    base.change = change
    model = adapted(base)
    form, reason = form_of(model)
    assert form == WHOLE
    assert str(reason).startswith(f"Unusual {why}")
    assert_right(model.double(), WHOLE, 1e-6)  # transformers casts its norms to float32


@pytest.mark.parametrize(("part", "factor"), [("losses", 1.001), ("gradients", 1.0)])
def test_a_chunked_form_that_is_wrong_on_this_model_is_not_taken(
    monkeypatch: pytest.MonkeyPatch, part: str, factor: float
) -> None:
    right = FORMS[FROZEN]

    def wrong(model: Any, batch: Any) -> Tensor:
        losses = factor * right(model, batch)
        return losses if part == "losses" else losses.detach() + (losses - losses.detach()) * 2

    monkeypatch.setitem(FORMS, FROZEN, wrong)
    form, why = form_of(model_of("llama"))
    assert form == OWN
    assert f"returns different {part} when its decoder is called alone" in str(why)


def test_hooks_on_the_model_or_its_head_are_not_passed_by() -> None:
    base = model_of("llama").base_model
    for module in (base, base.get_output_embeddings()):
        handle = module.register_forward_hook(lambda _module, _inputs, _output: None)
        assert form_of(base) == (OWN, "LlamaForCausalLM or its head has hooks")
        handle.remove()
    assert form_of(base) == (FROZEN, None)


def test_the_choice_leaves_no_hook_and_no_gradient() -> None:
    model = model_of("gpt2", "head")
    form_of(model)
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
