"""Combining, shrinking and extracting adapters, over every layer type, against the dense identity in float64."""

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import LAYERS, PAIRS, SLOTS, LayerCase, all_of, config, pairs_of
from tiny import stir, stirred_model
from torch import Tensor

from tailora import LoRAConfig, LoRAModel
from tailora.errors import AdapterError

layer_cases = all_of(LAYERS)
PRODUCTS = [slot for slot, settings in SLOTS.items() if not {"use_dora", "lora_bias", "bias"} & settings.keys()]
product_pairs = pairs_of([(case, slot) for case, slot in PAIRS if slot in PRODUCTS])  # others are refused
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def pair(case: LayerCase, slot: str = "plain", dtype: torch.dtype = torch.float64) -> LoRAModel:
    """Adapters a (as the slot says) and b (another rank and alpha, at a strength of its own) of one layer."""
    model = stirred_model(case.net(dtype), config(case, slot), "a")
    groups = getattr(model.base_model.block["target"], "groups", 1)
    model.add_adapter("b", LoRAConfig(r=groups * (1 if groups > 1 else 3), lora_alpha=5, target_modules=["target"]))
    model.set_adapter("b")
    stir(model, seed=3)
    model.set_scale("b", 0.6)
    return model.eval()


def update(model: LoRAModel, name: str) -> Tensor:
    """What adapter `name` adds to the weight."""
    layer = model.base_model.block["target"]
    return model.adapter(name).low_rank["block.target"].delta_weight(layer).detach()


def matrices(model: LoRAModel, name: str) -> Tensor:
    """The update by group, (groups, m, n): the matrices whose rank counts."""
    layer = model.base_model.block["target"]
    left, right = model.adapter(name).low_rank["block.target"].weight_factors(layer)
    return (left @ right).detach()


@product_pairs
@pytest.mark.parametrize("weights", [{"a": 0.7, "b": 0.3}, {"a": -0.5, "b": 2}])
def test_concatenation_and_svd_of_full_rank_are_the_sum_of_the_updates(
    case: LayerCase, slot: str, weights: dict[str, float]
) -> None:
    model = pair(case, slot)
    expected = sum(weight * update(model, name) for name, weight in weights.items())
    assert model.combine(weights, name="mix").worst == 0
    assert model.combine(weights, "full", "svd", r=1000).worst < 1e-12
    for name in ("mix", "full"):
        torch.testing.assert_close(update(model, name), expected, **EXACT)
    assert model.active_adapters == ("b",)


@product_pairs
def test_one_adapter_with_weight_one_is_itself(case: LayerCase, slot: str) -> None:
    model = pair(case, slot)
    for method, settings in {"cat": {}, "svd": {}, "ties": {"density": 1.0}, "dare": {"drop": 0.0}}.items():
        assert model.combine({"a": 1}, method, method, **settings).worst < 1e-10
        torch.testing.assert_close(update(model, method), update(model, "a"), **EXACT)
        assert model.adapters[method].r == case.r


@layer_cases
def test_a_lower_rank_is_the_nearest_and_its_error_is_reported(case: LayerCase) -> None:
    """Eckart and Young: no matrix of rank k is nearer than the k leading singular values."""
    model, weights = pair(case), {"a": 0.7, "b": 0.3}
    groups = len(matrices(model, "a"))
    report = model.combine(weights, "small", "svd", r=groups)
    exact = 0.7 * matrices(model, "a") + 0.3 * matrices(model, "b")
    tail = torch.linalg.svdvals(exact)[:, 1:].norm()
    torch.testing.assert_close((exact - matrices(model, "small")).norm(), tail, rtol=1e-9, atol=1e-12)
    assert report.error["block.target"] == pytest.approx(float(tail / exact.norm()), rel=1e-9, abs=1e-12)
    assert report.rank == {"block.target": groups}


DORA = [(case, slot) for case, slot in PAIRS if "dora" in slot]
pairs = pairs_of(PAIRS)
dora_pairs = pairs_of(DORA)


def outputs(model: LoRAModel, x: Tensor, *names: str | None) -> list[Tensor]:
    found = []
    for name in names:
        model.set_adapter(name)
        found.append(model(x).detach())
    return found


@pairs
def test_in_every_slot_the_outputs_add_up(case: LayerCase, slot: str) -> None:
    """DoRA by way of the dense update: at full rank nothing is lost."""
    model, x = pair(case, slot), case.batch(torch.float64)
    model.set_scale("a", 1.3)
    method: dict[str, Any] = {"method": "svd", "r": 1000} if "dora" in slot else {}
    report = model.combine({"a": 0.7, "b": -0.4}, "mix", **method)
    assert report.worst < 1e-10
    base, a, b, mix = outputs(model, x, None, "a", "b", "mix")
    torch.testing.assert_close(mix - base, 0.7 * (a - base) - 0.4 * (b - base), rtol=1e-8, atol=1e-8)
    plain = next(iter(model.lora_layers.values()))
    assert plain.lora_magnitude_vector is None


@pairs
def test_in_every_slot_shrinking_to_the_full_rank_changes_nothing(case: LayerCase, slot: str) -> None:
    model, x = pair(case, slot), case.batch(torch.float64)
    model.set_scale("a", 1.3)
    model.shrink("a", "same", energy=1.0)
    a, same = outputs(model, x, "a", "same")
    torch.testing.assert_close(same, a, rtol=1e-8, atol=1e-8)


@pairs
@pytest.mark.slow
def test_in_every_slot_what_was_combined_and_shrunk_survives_its_file(
    case: LayerCase, slot: str, tmp_path: Path
) -> None:
    model, x = pair(case, slot, torch.float32), case.batch()
    model.combine({"a": 0.7, "b": -0.4}, "mix", "svd", r=1000)
    model.shrink("a", "small", energy=0.9)
    for name in ("mix", "small"):
        expected = outputs(model, x, name)[0]
        loaded = LoRAModel.from_pretrained(case.net(), model.save_adapter(tmp_path, name)).eval()
        torch.testing.assert_close(loaded(x), expected, rtol=1e-5, atol=1e-5)
        assert loaded.adapters["default"] == model.adapters[name]


@dora_pairs
def test_dora_is_no_product(case: LayerCase, slot: str) -> None:
    model = pair(case, slot)
    with pytest.raises(AdapterError, match=r"block\.target of 'a': DoRA scales the rows of W"):
        model.combine({"a": 1, "b": 1}, "mix")


@dora_pairs
def test_the_error_of_dora_at_a_low_rank_is_that_of_the_weight(case: LayerCase, slot: str) -> None:
    model = pair(case, slot)
    groups = len(matrices(model, "b"))
    report = model.combine({"a": 1}, "plain", "svd", r=groups)
    changes = []
    for name in ("a", "plain"):
        model.set_adapter(name)
        before = model.base_model.block["target"].weight.detach().clone()
        with model.merged():
            changes.append(model.base_model.block["target"].weight.detach() - before)
    lost = float((changes[0] - changes[1]).norm() / changes[0].norm())
    assert report.error["block.target"] == pytest.approx(lost, rel=1e-6, abs=1e-9)


@layer_cases
def test_a_frozen_start_becomes_plain_of_twice_the_rank(case: LayerCase) -> None:
    model, x = LoRAModel(case.net(torch.float64), config(case)), case.batch(torch.float64)
    layer: Any = next(iter(model.lora_layers.values()))
    generator = torch.Generator(torch.get_default_device()).manual_seed(4)
    start = [torch.randn(each.shape, generator=generator).double() * 0.3 for each in (layer.lora_A, layer.lora_B)]
    layer.start_from(*start)
    stir(model)
    expected = model(x)
    report = model.combine({"default": 1}, "plain")
    groups, m, n = matrices(model, "default").shape
    assert report.rank == {"block.target": min(2 * case.r, groups * min(m, n))}
    model.set_adapter("plain")
    torch.testing.assert_close(model(x), expected, **EXACT)
    model.shrink("default", "small", energy=1.0)
    model.set_adapter("small")
    torch.testing.assert_close(model(x), expected, **EXACT)


@layer_cases
def test_ties_computed_entry_by_entry(case: LayerCase) -> None:
    model, weights, density = pair(case), {"a": 0.7, "b": 0.3}, 0.4
    trimmed = []
    for name, weight in weights.items():
        flat = matrices(model, name).flatten() * weight
        keep = flat.abs().argsort(descending=True)[: round(density * len(flat))]
        trimmed.append(torch.zeros_like(flat).index_put((keep,), flat[keep]).tolist())
    merged = []
    for entries in zip(*trimmed, strict=True):
        total = sum(entries)
        agreeing = [entry for entry in entries if entry * total > 0]
        merged.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
    expected = torch.tensor(merged, dtype=torch.float64).view_as(matrices(model, "a"))

    model.combine(weights, "whole", "ties", r=1000, density=density)
    torch.testing.assert_close(matrices(model, "whole"), expected, **EXACT)
    report = model.combine(weights, "cut", "ties", density=density)
    lost = float((matrices(model, "cut") - expected).norm() / expected.norm())
    assert report.error["block.target"] == pytest.approx(lost, rel=1e-6, abs=1e-12)


@layer_cases
def test_dare_keeps_and_rescales_and_its_seed_decides(case: LayerCase) -> None:
    model = pair(case)
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        model.combine({"a": 1, "b": 1}, name, "dare", r=1000, drop=0.25, seed=seed)
    model.combine({"b": 1, "a": 1}, "reordered", "dare", r=1000, drop=0.25, seed=1)
    assert torch.equal(update(model, "one"), update(model, "again"))
    torch.testing.assert_close(update(model, "one"), update(model, "reordered"), **EXACT)
    assert not torch.allclose(update(model, "one"), update(model, "other"))
    a, b, found = (matrices(model, name).flatten() / 0.75 for name in ("a", "b", "one"))
    found = found * 0.75
    choices = torch.stack([torch.zeros_like(a), a, b, a + b])
    assert ((choices - found).abs().min(0).values < 1e-9).all()


@layer_cases
def test_shrinking_keeps_the_leading_singular_values(case: LayerCase) -> None:
    model = pair(case)
    exact, groups = matrices(model, "a"), len(matrices(model, "a"))
    values = torch.linalg.svdvals(exact)
    report = model.shrink("a", "small", r=groups)
    torch.testing.assert_close((exact - matrices(model, "small")).norm(), values[:, 1:].norm(), **EXACT)
    assert report.rank == {"block.target": groups}
    assert model.active_adapters == ("b",)
    model.shrink("a", "same", r=1000)
    torch.testing.assert_close(update(model, "same"), update(model, "a"), **EXACT)
    for energy in (0.5, 0.9, 1.0):
        report = model.shrink("a", f"energy {energy}", energy=energy)
        k = report.rank["block.target"] // groups
        share = values.square().sum(0).cumsum(0) / values.square().sum()
        assert share[k - 1] >= energy - 1e-12
        assert k == 1 or share[k - 2] < energy


@layer_cases
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_an_adapter_is_recovered_from_the_merged_model(case: LayerCase, dtype: torch.dtype) -> None:
    model = stirred_model(case.net(dtype), config(case))
    expected = model.base_model.block["target"].weight + update(model, "default").to(dtype)
    x = case.batch(dtype)
    tuned = model.merge_and_unload()
    found, report = LoRAModel.from_difference(case.net(dtype), tuned, only_target(), r=case.r)
    assert report.rank == {"block.target": case.r}
    assert report.left_over == {}
    if dtype == torch.float64:
        assert report.worst < 1e-10
        torch.testing.assert_close(found.eval()(x), tuned(x), rtol=1e-9, atol=1e-9)
    whole, report = LoRAModel.from_difference(case.net(dtype), tuned, only_target(), energy=1.0)
    change = tuned.block["target"].weight.float() - case.net(dtype).block["target"].weight.float()
    torch.testing.assert_close(update(whole, "default").float(), change.detach(), rtol=1e-4, atol=1e-5)
    assert expected.shape == change.shape


def only_target() -> Any:
    return LoRAConfig(target_modules=["target"])
