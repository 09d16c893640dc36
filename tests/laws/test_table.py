"""The table that the laws run over is whole: kind x slot x base, each a case or a reason that the product gives."""

import warnings

import pytest
import torch
from cases import BASES, EVERY, EVERY_PAIR, QUANTIZED, QUANTIZED_PAIRS, SLOTS, BaseCase, KindCase, config, why_not
from torch import nn

from tailora import LoRAConfig, LoRAModel
from tailora.core import layer_types, quantization
from tailora.core.layer_types import ATTENTION, LAYER_TYPES, layer_type_of, qualified
from tailora.core.quantization import BASES as ROWS
from tailora.core.quantization import base_of, is_quantized
from tailora.core.targets import select
from tailora.errors import TargetError

REFUSED = [(kind, slot) for kind in EVERY for slot in SLOTS if why_not(kind, slot)]
UNHELD = [(kind, base) for kind in EVERY for base in BASES if kind.name not in base.kinds]


def test_no_combination_is_missing() -> None:
    cells = len(EVERY) * len(SLOTS) * (1 + len(BASES))
    run = len(EVERY_PAIR) + len(QUANTIZED_PAIRS)
    without_sense = len(REFUSED) + len([1 for base in BASES for kind, _ in REFUSED if kind.name in base.kinds])
    not_stored = len(UNHELD) * len(SLOTS)
    assert run + without_sense + not_stored == cells
    names = [f"{kind.name}, {slot}" for kind, slot in (*EVERY_PAIR, *QUANTIZED_PAIRS)]
    assert len(set(names)) == len(names) == run
    assert len(QUANTIZED) + len(UNHELD) == len(EVERY) * len(BASES)


@pytest.mark.parametrize(("kind", "slot"), REFUSED, ids=[f"{slot}-{kind.name}" for kind, slot in REFUSED])
def test_a_pair_without_sense_is_refused_with_the_reason(kind: KindCase, slot: str) -> None:
    net = kind.net()
    with pytest.raises(TargetError, match=why_not(kind, slot)):
        LoRAModel(net, config(kind, slot))
    assert type(net.block["target"]) is type(kind.layer())


@pytest.mark.parametrize(("kind", "base"), UNHELD, ids=[f"{base.name}-{kind.name}" for kind, base in UNHELD])
def test_a_kind_that_a_base_does_not_hold_stays_plain_or_is_refused_by_the_package(
    kind: KindCase, base: BaseCase
) -> None:
    """Each has its reason in `BaseCase.others`; bitsandbytes has a class of its own for what it holds."""
    layer = kind.layer()
    if base.name.startswith("torchao"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            layer = base.store(layer)
        assert not any(is_quantized(module) for module in layer.modules())
    else:
        assert not isinstance(layer, nn.Linear)
        assert type(layer).__name__ != "Conv1D"  # transformers puts bitsandbytes' layers in the place of these two
    assert base.others


def test_the_table_has_every_row_of_the_core() -> None:
    layers = [case.layer() for case in EVERY]
    covered = {qualified(cls) for layer in layers for cls in type(layer).__mro__ if qualified(cls) in LAYER_TYPES}
    assert covered == set(LAYER_TYPES)
    assert layer_type_of(nn.LayerNorm(3)) is None
    selected = {target.layer_type for case in EVERY for target in select(case.net(), config(case)).targets}
    attention = {ATTENTION[name] for name in ("in_proj_weight", "out_proj", "v_proj_weight")}  # q and k are as v
    assert selected - {layer_types.parameter_layer_type(name) for name in ("gate_up_proj", "down_proj")} == {
        *LAYER_TYPES.values(),
        *attention,
    }
    assert {base_of(case.net().block["target"]) for case in QUANTIZED} == {*ROWS.values()}
    assert base_of(nn.Linear(2, 2)) is quantization.PLAIN


# What is no slot of the equation, or is one with laws of its own: tests/laws/test_start.py, test_extras.py, papers.
ELSEWHERE = {"r", "lora_alpha", "target_modules", "exclude_modules", "layers_to_transform", "target_parameters"}
ELSEWHERE |= {"rank_pattern", "fused_parts", "modules_to_save", "trainable_token_indices", "adalora"}


def test_the_table_has_every_slot_that_a_config_can_fill() -> None:
    assert {name for settings in SLOTS.values() for name in settings} == LoRAConfig.model_fields.keys() - ELSEWHERE


def test_the_layers_of_the_table_are_made_alike_every_time() -> None:
    for case in EVERY:
        one, other = case.net().state_dict(), case.net().state_dict()
        assert all(torch.equal(value, other[name]) for name, value in one.items())
