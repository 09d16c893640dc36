"""Ranks and intruder dimensions against dense decompositions; reports of updates. tests/papers has the definitions."""

from pathlib import Path

import pytest
import torch
from cases import LAYERS, PAIRS, SPECIAL_LAYERS, SPECIAL_PAIRS, LayerCase, all_of, trained
from tiny import stir, stirred_model
from torch import Tensor

from tailora import LoRAConfig, LoRAModel
from tailora.core.layer_types import EMBEDDING
from tailora.core.low_rank import EXACT, Factors, product_spectrum
from tailora.evaluation import spectral
from tailora.evaluation.spectral import (
    ModuleReport,
    effective_rank,
    module_report,
    stable_rank,
    updates_of,
    with_energy,
)
from tailora.formats.offline import read_offline


def test_a_product_of_higher_rank_than_it_needs_uses_what_it_needs() -> None:
    B, A = torch.randn(20, 1), torch.randn(1, 30)
    S = product_spectrum(Factors(torch.cat([B, B, B], 1)[None], torch.cat([A, A, -A])[None])).S
    assert effective_rank(S) == pytest.approx(1, abs=1e-4)
    assert stable_rank(S) == pytest.approx(1)
    assert effective_rank(torch.zeros(1, 4)) == stable_rank(torch.zeros(1, 4)) == 0


# ---- A planted intruder is found, what is no intruder is not, and the count is that of the full decomposition


SHAPES = [(60, 40), (40, 60), (EXACT + 44, EXACT + 84), (EXACT + 84, EXACT + 44)]  # exact, and by iteration


def weight(m: int, n: int) -> Tensor:
    """Of a spectrum that falls as slowly as those of trained weights do."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(3)
    U, _, V = torch.linalg.svd(torch.randn(m, n, generator=generator), full_matrices=False)
    return U * torch.arange(1, min(m, n) + 1).float().pow(-0.5) @ V


def spread(length: int) -> Tensor:
    """A direction that is none of anybody's."""
    return torch.nn.functional.normalize(
        torch.randn(length, 1, generator=torch.Generator(torch.get_default_device()).manual_seed(9)), dim=0
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_cosines_are_those_of_the_full_decomposition(shape: tuple[int, int]) -> None:
    W = weight(*shape)
    U = torch.linalg.svd(W.double(), full_matrices=False).U
    u = torch.linalg.qr(torch.randn(shape[0], 5, dtype=torch.float64)).Q
    found = spectral.cosines_with(W)(u.float())
    torch.testing.assert_close(
        found.double().square().sort(0).values, (U.mT @ u).square().sort(0).values, rtol=1e-2, atol=1e-3
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_a_planted_intruder_is_found_and_nothing_else_is_one(shape: tuple[int, int]) -> None:
    W = weight(*shape)
    count = spectral.intruder_counter(W)
    assert count(W) == count(3 * W) == 0
    assert count(W + spectral.random_update(*shape, 8, norm=0.01).dense[0]) == 0
    assert count(W + 2 * spread(shape[0]) @ spread(shape[1]).mT) == 1  # above all of W's singular values


def test_a_weight_without_intruders_is_not_decomposed_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_: Tensor) -> None:
        raise AssertionError("decomposed")

    monkeypatch.setattr(spectral, "cosines_with", refused)
    W = weight(EXACT + 44, EXACT + 84)
    assert (
        spectral.intruder_counter(W, full_size=EXACT)(W + spectral.random_update(*W.shape, 6, norm=0.1).dense[0]) == 0
    )


def test_a_random_update_has_the_shape_rank_and_norm_and_is_the_same_every_time() -> None:
    before = torch.random.get_rng_state()
    first, again, other = (spectral.random_update(30, 20, 4, norm=0.7, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(first.dense, again.dense)
    assert not torch.equal(first.dense, other.dense)
    assert first.dense.shape == (1, 30, 20)
    assert float(first.dense.norm()) == pytest.approx(0.7, rel=1e-5)
    assert int(torch.linalg.matrix_rank(first.dense[0])) == 4


# ---- What is said of an update, over the table of layer types: against the dense update, and from the file alone


CASES = [*LAYERS, *SPECIAL_LAYERS]
DORA = [case for case, slot in (*PAIRS, *SPECIAL_PAIRS) if slot == "dora"]
SLOTS = ["rslora", "learned scale"]


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
    matrices = found.numbers // (found.in_features * found.out_features)
    groups = matrices if layer.layer_type.is_stacked else layer.groups
    assert groups * sum(value**2 for value in found.singular_values) == pytest.approx(found.norm**2, rel=1e-4)


@all_of(LAYERS)
@pytest.mark.parametrize("slot", SLOTS)
def test_the_file_alone_says_the_same(case: LayerCase, slot: str, tmp_path: Path) -> None:
    model = trained(case, slot)
    model.save_adapter(tmp_path)
    (beside,), (alone,) = reports(model).values(), map(module_report, read_offline(tmp_path).updates.values())
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
    assert "intruder dimensions are only counted for single matrices, not for stacks of 4" in found.note
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
    (alone,) = map(module_report, read_offline(tmp_path).updates.values())
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
    assert "trained in full" in left_out["1"]


def test_shares_of_energy_add_up() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Embedding(8, 8), torch.nn.Linear(8, 8))
    model = stirred_model(net, LoRAConfig(r=2, target_modules=["0", "1", "2"]))
    found = with_energy(reports(model).values())
    assert sum(each.energy for each in found) == pytest.approx(1)
    assert found[1].kind == EMBEDDING.name
    assert [each.energy for each in with_energy([])] == []
