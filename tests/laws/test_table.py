"""The table that the laws run over is whole: every layer type, slot and storage is a case or has a reason."""

import pytest
from cases import ALL_LAYERS, QUANTIZED, SLOTS, LayerCase, config, why_not
from torch import nn

from tailora import LoRAConfig, LoRAModel
from tailora.core import quantization
from tailora.core.layer_types import LAYER_TYPES, layer_type_of, qualified_name
from tailora.core.parameters import ATTENTION, parameter_layer_type
from tailora.core.quantization import STORAGES as TABLE
from tailora.core.quantization import storage_of
from tailora.core.targets import select
from tailora.errors import TargetError

REFUSED = [(case, slot) for case in ALL_LAYERS for slot in SLOTS if why_not(case, slot)]


@pytest.mark.parametrize(("case", "slot"), REFUSED, ids=[f"{slot}-{case.name}" for case, slot in REFUSED])
def test_a_pair_without_sense_is_refused_with_the_reason(case: LayerCase, slot: str) -> None:
    net = case.net()
    with pytest.raises(TargetError, match=why_not(case, slot)):
        LoRAModel(net, config(case, slot))
    assert type(net.block["target"]) is type(case.layer())


def test_the_table_has_every_row_of_the_core() -> None:
    layers = [*(case.layer() for case in ALL_LAYERS), *(case.net().block["target"] for case in QUANTIZED)]
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
ELSEWHERE |= {"task_type"}


def test_the_table_has_every_slot_that_a_config_can_fill() -> None:
    assert {name for settings in SLOTS.values() for name in settings} == LoRAConfig.model_fields.keys() - ELSEWHERE
