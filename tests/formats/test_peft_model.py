"""A PEFT model in memory becomes a LoRAModel, or is refused and not changed. tests/laws compare the outputs."""

from typing import Any

import peft
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny import chat_model
from tiny_adapters import token_ids
from torch import nn

import tailora
from tailora.errors import FormatError, TargetError

pytestmark = pytest.mark.filterwarnings("ignore")  # those of PEFT

TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}


ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "up_proj"]},
    "patterns": {"target_modules": "all-linear", "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1": 3}},
    "rslora": {"target_modules": ["v_proj"], "use_rslora": True},
    "dora": {"target_modules": ["o_proj", "down_proj"], "use_dora": True},
    "head trained in full": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "rows of new tokens": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [1, 2]}},
}


def stir(model: nn.Module) -> None:
    generator = torch.Generator(torch.get_default_device()).manual_seed(5)
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("lora_", "modules_to_save", "trainable_tokens")):
            noise = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.data = parameter.data + noise if "lora_" not in name or "magnitude" in name else noise


def peft_model_of(*names: str) -> Any:
    """PEFT's model with these adapters, all of which do something; the first is active."""
    first, *others = names
    model = peft.get_peft_model(
        chat_model().eval(), peft.LoraConfig(r=4, lora_alpha=6, **ADAPTERS[first]), adapter_name=first
    )
    for name in others:
        model.add_adapter(name, peft.LoraConfig(r=3, lora_alpha=5, **ADAPTERS[name]))
    stir(model)
    return model.eval()


def is_free_of_peft(base: nn.Module) -> bool:
    modules = [type(module).__module__ for module in base.modules()]
    return not any(name.startswith("peft") for name in modules) and not hasattr(base, "peft_config")


def test_all_adapters_are_converted_with_their_scales_and_the_active_one() -> None:
    names = ("plain", "patterns", "rslora", "dora")
    peft_model = peft_model_of(*names)
    for module in peft_model.modules():
        if isinstance(module, BaseTunerLayer) and "rslora" in module.scaling:
            module.set_scale("rslora", 0.3)
    expected = {}
    for name in names:
        peft_model.set_adapter(name)
        expected[name] = peft_model(token_ids()).logits.detach()
    peft_model.set_adapter("rslora")
    model = tailora.from_peft(peft_model)
    assert tuple(model.adapters) == names
    assert model.active_adapters == ("rslora",)
    assert model.adapters["patterns"].rank_pattern == {"q_proj": 2}
    for name in names:
        model.set_adapter(name)
        torch.testing.assert_close(model(token_ids()).logits, expected[name], **TOLERANCE)


@pytest.mark.parametrize("name", ["plain", "head trained in full", "rows of new tokens"])
def test_a_converted_model_unloads_to_the_base(name: str) -> None:
    model = tailora.from_peft(peft_model_of(name))
    base = model.unload()
    assert is_free_of_peft(base)
    assert base.state_dict().keys() == chat_model().state_dict().keys()
    torch.testing.assert_close(base(token_ids()).logits, chat_model().eval()(token_ids()).logits, rtol=0, atol=0)


def test_a_converted_model_trains_and_keeps_its_mode() -> None:
    peft_model = peft_model_of("plain").train()
    model = tailora.from_peft(peft_model)
    assert {module.training for module in model.modules()} == {True}
    model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    assert all(parameter.grad is not None for parameter in model.lora_layers.parameters())
    assert {module.training for module in tailora.from_peft(peft_model_of("plain")).modules()} == {False}


def test_adapters_that_are_switched_off_stay_off() -> None:
    peft_model = peft_model_of("plain")
    peft_model.base_model.disable_adapter_layers()
    model = tailora.from_peft(peft_model)
    assert model.active_adapters == ()
    torch.testing.assert_close(model(token_ids()).logits, chat_model().eval()(token_ids()).logits)


def test_a_base_that_pissa_changed_stays_changed() -> None:
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], init_lora_weights="pissa")
    peft_model = peft.get_peft_model(chat_model(), config).eval()
    stir(peft_model)
    expected = peft_model(token_ids()).logits.detach()
    torch.testing.assert_close(tailora.from_peft(peft_model)(token_ids()).logits, expected, **TOLERANCE)


def _merged_model() -> Any:
    peft_model = peft_model_of("plain")
    peft_model.merge_adapter()
    return peft_model


def _not_finite() -> Any:
    peft_model = peft_model_of("plain")
    next(value for name, value in peft_model.named_parameters() if "lora_B" in name).data[0, 0] = torch.nan
    return peft_model


def _with(**settings: Any) -> Any:
    return peft.get_peft_model(chat_model().eval(), peft.LoraConfig(target_modules=["q_proj"], **settings))


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "merged": (_merged_model, TargetError, r"adapters are merged at .*q_proj.* \(4 in total\); call unmerge_adapter"),
    "another method": (
        lambda: peft.get_peft_model(chat_model(), peft.IA3Config(task_type="CAUSAL_LM")),
        FormatError,
        "expected peft_type = 'LORA', got 'IA3'; delete this adapter first",
    ),
    "a setting": (lambda: _with(layer_replication=[(0, 2), (1, 2)]), FormatError, "layer_replication"),
    "an init that keeps B": (lambda: _with(r=4, init_lora_weights="mica"), FormatError, "'mica' only trains A"),
    "not finite": (_not_finite, FormatError, "not finite"),
}


@pytest.mark.parametrize(("make", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_a_refusal_changes_nothing(make: Any, error: type[Exception], message: str) -> None:
    peft_model = make().eval()
    modules, expected = list(peft_model.modules()), peft_model(token_ids()).logits.detach()
    grads = [parameter.requires_grad for parameter in peft_model.parameters()]
    with pytest.raises(error, match=message):
        tailora.from_peft(peft_model)
    assert list(peft_model.modules()) == modules
    assert [parameter.requires_grad for parameter in peft_model.parameters()] == grads
    torch.testing.assert_close(peft_model(token_ids()).logits, expected, rtol=0, atol=0, equal_nan=True)


def test_a_model_without_peft_is_refused() -> None:
    with pytest.raises(TargetError, match=r"expected a PeftModel .*, got LlamaForCausalLM"):
        tailora.from_peft(chat_model().eval())
