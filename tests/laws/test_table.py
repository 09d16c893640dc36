"""The table that the laws run over is whole: every layer type, slot and storage is a case or has a reason."""

import warnings

import pytest
import torch
from cases import (
    ALL_LAYERS,
    ALL_PAIRS,
    QUANTIZED,
    QUANTIZED_PAIRS,
    SLOTS,
    STORAGES,
    LayerCase,
    StorageCase,
    config,
    why_not,
)
from torch import nn

from tailora import LoRAConfig, LoRAModel
from tailora.core import quantization
from tailora.core.layer_types import LAYER_TYPES, layer_type_of, qualified_name
from tailora.core.parameters import ATTENTION, parameter_layer_type
from tailora.core.quantization import STORAGES as TABLE
from tailora.core.quantization import is_quantized, storage_of
from tailora.core.targets import select
from tailora.errors import TargetError

REFUSED = [(case, slot) for case in ALL_LAYERS for slot in SLOTS if why_not(case, slot)]
UNHELD = [(case, base) for case in ALL_LAYERS for base in STORAGES if case.name not in base.layers]


def test_no_combination_is_missing() -> None:
    cells = len(ALL_LAYERS) * len(SLOTS) * (1 + len(STORAGES))
    run = len(ALL_PAIRS) + len(QUANTIZED_PAIRS)
    without_sense = len(REFUSED) + len([1 for base in STORAGES for case, _ in REFUSED if case.name in base.layers])
    not_stored = len(UNHELD) * len(SLOTS)
    assert run + without_sense + not_stored == cells
    names = [f"{case.name}, {slot}" for case, slot in (*ALL_PAIRS, *QUANTIZED_PAIRS)]
    assert len(set(names)) == len(names) == run
    assert len(QUANTIZED) + len(UNHELD) == len(ALL_LAYERS) * len(STORAGES)


@pytest.mark.parametrize(("case", "slot"), REFUSED, ids=[f"{slot}-{case.name}" for case, slot in REFUSED])
def test_a_pair_without_sense_is_refused_with_the_reason(case: LayerCase, slot: str) -> None:
    net = case.net()
    with pytest.raises(TargetError, match=why_not(case, slot)):
        LoRAModel(net, config(case, slot))
    assert type(net.block["target"]) is type(case.layer())


@pytest.mark.parametrize(("case", "base"), UNHELD, ids=[f"{base.name}-{case.name}" for case, base in UNHELD])
def test_a_layer_type_that_a_storage_does_not_hold_stays_plain_or_is_refused_by_the_package(
    case: LayerCase, base: StorageCase
) -> None:
    """Each has its reason in `StorageCase.others`; bitsandbytes has a class of its own for what it holds."""
    layer = case.layer()
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
    layers = [case.layer() for case in ALL_LAYERS]
    covered = {name for layer in layers for name in map(qualified_name, type(layer).__mro__) if name in LAYER_TYPES}
    assert covered == set(LAYER_TYPES)
    assert layer_type_of(nn.LayerNorm(3)) is None
    selected = {target.layer_type for case in ALL_LAYERS for target in select(case.net(), config(case)).targets}
    attention = {ATTENTION[name] for name in ("in_proj_weight", "out_proj", "v_proj_weight")}  # q and k are as v
    assert selected - {parameter_layer_type(name) for name in ("gate_up_proj", "down_proj")} == {
        *LAYER_TYPES.values(),
        *attention,
    }
    assert {storage_of(case.net().block["target"]) for case in QUANTIZED} == {*TABLE.values()}
    assert storage_of(nn.Linear(2, 2)) is quantization.PLAIN


# What is no slot of the equation, or is one with laws of its own: test_frozen_start.py, test_extras.py, tests/papers.
ELSEWHERE = {"r", "lora_alpha", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
ELSEWHERE |= {"target_parameters", "rank_pattern", "fused_parts", "modules_to_save", "trainable_token_indices"}
ELSEWHERE |= {"adalora", "task_type"}


def test_the_table_has_every_slot_that_a_config_can_fill() -> None:
    assert {name for settings in SLOTS.values() for name in settings} == LoRAConfig.model_fields.keys() - ELSEWHERE


def test_the_layers_of_the_table_are_made_alike_every_time() -> None:
    for case in ALL_LAYERS:
        one, other = case.net().state_dict(), case.net().state_dict()
        assert all(torch.equal(value, other[name]) for name, value in one.items())
