"""Combining, shrinking and extracting adapters, over every layer type, against the dense identity in float64."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import ALL_LAYERS, ALL_PAIRS, LAYERS, SLOTS, LayerCase, all_of, config, pairs_of
from tiny import stir, stirred_model
from torch import Tensor

from tailora import LoRAConfig, LoRAModel
from tailora.errors import AdapterError

layer_cases = all_of(ALL_LAYERS)
COMBINED = [
    slot for slot, settings in SLOTS.items() if not {"lora_bias", "bias"} & settings.keys()
]  # others are refused
PRODUCTS = [slot for slot in COMBINED if "use_dora" not in SLOTS[slot]]
product_pairs = pairs_of([(case, slot) for case, slot in ALL_PAIRS if slot in PRODUCTS])
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def pair(case: LayerCase, slot: str = "plain", dtype: torch.dtype = torch.float64) -> LoRAModel:
    """Adapters a (as the slot says) and b (another rank and alpha, at a strength of its own) of one layer."""
    model = stirred_model(case.net(dtype), config(case, slot), "a")
    groups = getattr(model.base_model.block["target"], "groups", 1)
    model.add_adapter("b", LoRAConfig(r=groups * (1 if groups > 1 else 3), lora_alpha=5, **case.names))
    model.set_adapter("b")
    stir(model, seed=3)
    model.set_scale("b", 0.6)
    return model.eval()


def update(model: LoRAModel, name: str) -> Tensor:
    """What adapter `name` adds to the weight."""
    (part,) = model.adapter(name).low_rank.values()
    return part.delta_weight(model.base_model.block["target"]).detach()


def matrices(model: LoRAModel, name: str) -> Tensor:
    """The update by group, (groups, m, n): the matrices whose rank counts."""
    (part,) = model.adapter(name).low_rank.values()
    left, right = part.weight_factors(model.base_model.block["target"])
    return (left @ right).detach()


def one_each(model: LoRAModel, name: str) -> int:
    """The rank that leaves one singular value to every matrix; each expert of a stack has the whole rank."""
    (part,) = model.adapter(name).low_rank.values()
    return 1 if part.layer_type.is_stacked else len(matrices(model, name))


def only(values: dict[str, Any]) -> Any:
    (value,) = values.values()
    return value


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
    rank = one_each(model, "a")
    report = model.combine(weights, "small", "svd", r=rank)
    exact = 0.7 * matrices(model, "a") + 0.3 * matrices(model, "b")
    tail = torch.linalg.svdvals(exact)[:, 1:].norm()
    torch.testing.assert_close((exact - matrices(model, "small")).norm(), tail, rtol=1e-9, atol=1e-12)
    assert only(report.error) == pytest.approx(float(tail / exact.norm()), rel=1e-9, abs=1e-12)
    assert only(report.rank) == rank


DORA = [(case, slot) for case, slot in ALL_PAIRS if slot in COMBINED and "dora" in slot]
pairs = pairs_of(ALL_PAIRS)
combined_pairs = pairs_of([(case, slot) for case, slot in ALL_PAIRS if slot in COMBINED])
dora_pairs = pairs_of(DORA)


def weights_with(model: LoRAModel, case: LayerCase, *names: str | None) -> list[Tensor]:
    found = []
    for name in names:
        model.set_adapter(name)
        with nullcontext() if name is None else model.merged():
            found.append(case.weight(model.base_model).detach().clone())
    return found


def outputs(model: LoRAModel, x: Tensor, *names: str | None) -> list[Tensor]:
    found = []
    for name in names:
        model.set_adapter(name)
        found.append(model(x).detach())
    return found


@combined_pairs
def test_in_every_slot_the_changes_add_up(case: LayerCase, slot: str) -> None:
    """DoRA by way of the dense update: at full rank nothing is lost. Outputs of attention and experts do not add up."""
    model, x = pair(case, slot), case.batch(torch.float64)
    model.set_scale("a", 1.3)
    method: dict[str, Any] = {"method": "svd", "r": 1000} if "dora" in slot else {}
    report = model.combine({"a": 0.7, "b": -0.4}, "mix", **method)
    assert report.worst < 1e-10
    names = (None, "a", "b", "mix")
    base, a, b, mix = outputs(model, x, *names) if case in LAYERS else weights_with(model, case, *names)
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
@pytest.mark.filterwarnings("ignore:.*only tailora can load this adapter, not PEFT:UserWarning")
def test_in_every_slot_what_was_combined_and_shrunk_survives_its_file(
    case: LayerCase, slot: str, tmp_path: Path
) -> None:
    model, x = pair(case, slot, torch.float32), case.batch()
    names = ["small"]
    model.shrink("a", "small", energy=0.9)
    if slot in COMBINED:
        model.combine({"a": 0.7, "b": -0.4}, "mix", "svd", r=1000)
        names.append("mix")
    for name in names:
        expected = outputs(model, x, name)[0]
        loaded = LoRAModel.from_pretrained(case.net(), model.save_adapter(tmp_path, name)).eval()
        torch.testing.assert_close(loaded(x), expected, rtol=1e-5, atol=1e-5)
        assert loaded.adapters["default"] == model.adapters[name]


@pytest.mark.parametrize("slot", sorted(SLOTS.keys() - COMBINED))
def test_trained_biases_are_not_combined(slot: str) -> None:
    with pytest.raises(AdapterError, match=r"block\.target of 'a': trains a bias, which is not supported"):
        pair(LAYERS[0], slot).combine({"a": 1, "b": 1}, "mix", "svd")


@dora_pairs
def test_dora_is_no_product(case: LayerCase, slot: str) -> None:
    model = pair(case, slot)
    with pytest.raises(AdapterError, match=r"block\.target\S* of 'a': DoRA scales the rows of W"):
        model.combine({"a": 1, "b": 1}, "mix")


@dora_pairs
def test_the_error_of_dora_at_a_low_rank_is_that_of_the_weight(case: LayerCase, slot: str) -> None:
    model = pair(case, slot)
    report = model.combine({"a": 1}, "plain", "svd", r=one_each(model, "b"))
    base, a, plain = weights_with(model, case, None, "a", "plain")
    lost = float((a - plain).norm() / (a - base).norm())
    assert only(report.error) == pytest.approx(lost, rel=1e-6, abs=1e-9)


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
    layer_type, (groups, m, n) = layer.layer_type, matrices(model, "default").shape
    n_out = len(layer.lora_B) // (1 if layer_type.is_stacked else groups)
    most = min(m, n, n_out) * (1 if layer_type.is_stacked else groups)
    assert only(report.rank) == min(2 * case.r, most)
    model.set_adapter("plain")
    torch.testing.assert_close(model(x), expected, **EXACT)
    model.shrink("default", "small", energy=1.0)
    model.set_adapter("small")
    torch.testing.assert_close(model(x), expected, **EXACT)


@all_of([case for case in ALL_LAYERS if not case.name.startswith("part")])  # of a part, TIES trims its own rows
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
    assert only(report.error) == pytest.approx(lost, rel=1e-6, abs=1e-12)


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
    exact, rank = matrices(model, "a"), one_each(model, "a")
    values = torch.linalg.svdvals(exact)
    report = model.shrink("a", "small", r=rank)
    torch.testing.assert_close((exact - matrices(model, "small")).norm(), values[:, 1:].norm(), **EXACT)
    assert only(report.rank) == rank
    assert model.active_adapters == ("b",)
    model.shrink("a", "same", r=1000)
    torch.testing.assert_close(update(model, "same"), update(model, "a"), **EXACT)
    for energy in (0.5, 0.9, 1.0):
        report = model.shrink("a", f"energy {energy}", energy=energy)
        k = only(report.rank) // rank
        share = values.square().sum(0).cumsum(0) / values.square().sum()
        assert share[k - 1] >= energy - 1e-12
        assert k == 1 or share[k - 2] < energy


@layer_cases
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_an_adapter_is_recovered_from_the_merged_model(case: LayerCase, dtype: torch.dtype) -> None:
    model = stirred_model(case.net(dtype), config(case))
    x, config_of_case = case.batch(dtype), LoRAConfig(**case.names)
    tuned = model.merge_and_unload()
    found, report = LoRAModel.from_difference(case.net(dtype), tuned, config_of_case, r=case.r)
    assert only(report.rank) == case.r
    assert report.left_over == {}
    if dtype == torch.float64:
        assert report.worst < 1e-10
        torch.testing.assert_close(found.eval()(x), tuned(x), rtol=1e-9, atol=1e-9)
    whole, report = LoRAModel.from_difference(case.net(dtype), tuned, config_of_case, energy=1.0)
    change = (case.weight(tuned).float() - case.weight(case.net(dtype)).float()).detach()
    torch.testing.assert_close(update(whole, "default").float(), change, rtol=1e-4, atol=1e-5)
