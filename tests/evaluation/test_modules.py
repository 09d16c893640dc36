"""What is said of an update, over the table of layer types: against the dense update, and from the file alone."""

from pathlib import Path

import pytest
import torch
from cases import LAYERS, PAIRS, SPECIAL_LAYERS, SPECIAL_PAIRS, LayerCase, all_of, stir, trained

from tailora import LoRAConfig, LoRAModel
from tailora.core.layer_types import EMBEDDING
from tailora.evaluation.spectral import ModuleReport, module_report, updates_in_files, updates_of, with_energy
from tailora.formats.offline import read_offline

CASES = [*LAYERS, *SPECIAL_LAYERS]
DORA = [case for case, slot in (*PAIRS, *SPECIAL_PAIRS) if slot == "dora"]
SLOTS = ["plain", "rslora", "learned scale"]


def reports(model: LoRAModel) -> dict[str, ModuleReport]:
    updates, left_out = updates_of(model.adapter(), model.base_model)
    assert not left_out
    return {path: module_report(update) for path, update in updates.items()}


@all_of(CASES)
@pytest.mark.parametrize("slot", SLOTS)
def test_norms_are_those_of_the_dense_update_and_weight(case: LayerCase, slot: str) -> None:
    model = trained(case, slot)
    ((path, layer),) = model.adapter().low_rank.items()
    (found,) = reports(model).values()
    delta = layer.delta_weight(model.base_model.block["target"]).detach()
    assert found.path == path
    assert found.r == layer.r
    assert found.norm == pytest.approx(float(delta.norm()), rel=1e-4)
    assert found.relative_norm is not None
    if layer.output_slice is None:
        assert found.numbers == delta.numel()
        assert found.relative_norm == pytest.approx(found.norm / float(case.weight(model.base_model).norm()), rel=1e-4)
    assert 0 < found.effective_rank <= found.rank + 1e-6
    assert 0 < found.stable_rank <= found.effective_rank + 1e-6
    assert found.learned_scaling == (slot == "learned scale")
    assert (found.intruders is None) == bool(found.note)
    assert len(found.singular_values) == layer.r // (1 if layer.layer_type.is_stacked else layer.groups)


@all_of(LAYERS)
@pytest.mark.parametrize("slot", SLOTS)
def test_the_file_alone_says_the_same(case: LayerCase, slot: str, tmp_path: Path) -> None:
    model = trained(case, slot)
    model.save_adapter(tmp_path)
    (beside,), (alone,) = reports(model).values(), map(module_report, updates_in_files(read_offline(tmp_path)).values())
    for name in ("path", "r", "rank", "in_features", "out_features", "numbers", "learned_scaling", "rank_99"):
        assert getattr(alone, name) == getattr(beside, name), name
    for name in ("effective_rank", "stable_rank", "norm", "scaling", "configured_scaling", "singular_values"):
        assert getattr(alone, name) == pytest.approx(getattr(beside, name), rel=1e-4), name
    assert alone.kind == beside.kind or case.name == "transformers conv1d"  # which the file cannot tell
    assert alone.relative_norm is alone.intruders is None


def test_experts_are_told_each_and_left_out_where_only_the_model_can_part_them(tmp_path: Path) -> None:
    model = trained(next(case for case in SPECIAL_LAYERS if case.name == "experts up"))
    (found,) = reports(model).values()
    assert found.rank == found.r == 4
    assert found.effective_rank <= 4
    assert "4 matrices, not one" in found.note
    model.save_adapter(tmp_path)
    alone = read_offline(tmp_path)
    assert not alone.updates
    assert list(alone.left_out) == ["block.target"]
    assert "experts" in alone.left_out["block.target"]


def test_a_frozen_start_counts_twice_and_starts_at_nothing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(24, 20))
    model = LoRAModel(net, LoRAConfig(r=4, target_modules=["0"], init_lora_weights="pissa"))
    (found,) = reports(model).values()
    assert found.norm == pytest.approx(0, abs=1e-5)
    stir(model)
    (found,) = reports(model).values()
    assert (found.r, found.rank) == (4, 8)
    model.save_adapter(tmp_path)
    (alone,) = map(module_report, updates_in_files(read_offline(tmp_path)).values())
    assert (alone.r, alone.rank) == (4, 8)
    assert alone.singular_values == pytest.approx(found.singular_values, rel=1e-3)


@all_of(DORA)
def test_dora_s_magnitudes_count_in_the_relative_norm_alone(case: LayerCase) -> None:
    model = trained(case, "dora")
    ((_, layer),) = model.adapter().low_rank.items()
    (found,) = reports(model).values()
    W = case.weight(model.base_model).detach().clone()
    with model.merged():
        change = float((case.weight(model.base_model).detach() - W).norm())
    assert found.use_dora
    assert found.norm == pytest.approx(
        float(layer.delta_weight(model.base_model.block["target"]).detach().norm()), rel=1e-4
    )
    if layer.output_slice is None:
        assert found.relative_norm == pytest.approx(change / float(W.norm()), rel=1e-3)


def test_what_is_trained_whole_is_left_out_with_a_reason() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 8))
    model = LoRAModel(net, LoRAConfig(r=2, target_modules=["0"], modules_to_save=["1"]))
    _, left_out = updates_of(model.adapter(), model.base_model)
    assert list(left_out) == ["1"]
    assert "trained whole" in left_out["1"]


def test_shares_of_energy_add_up() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Embedding(8, 8), torch.nn.Linear(8, 8))
    model = LoRAModel(net, LoRAConfig(r=2, target_modules=["0", "1", "2"]))
    stir(model)
    found = with_energy(reports(model).values())
    assert sum(each.energy for each in found) == pytest.approx(1)
    assert found[1].kind == EMBEDDING.name
    assert [each.energy for each in with_energy([])] == []
