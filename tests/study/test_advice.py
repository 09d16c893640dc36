"""Each rule speaks on one side of its threshold, is silent on the other, and gives what can be used."""

import shlex
from dataclasses import replace
from typing import Any

import pytest

from tailora.evaluation.spectral import ModuleReport
from tailora.study import advice as limits
from tailora.study.advice import Advice, HeldOutLosses, Inspection, TruncationCost, advise

JUST = 1e-6


def module(path: str, **changes: Any) -> ModuleReport:
    plain = ModuleReport(
        path=path,
        kind="Linear",
        in_features=64,
        out_features=64,
        numbers=4096,
        r=8,
        rank=8,
        effective_rank=5.6,
        stable_rank=2.0,
        rank_99=7,
        energy=0.1,
        norm=1.0,
        relative_norm=0.05,
        intruders=0,
        intruders_random=0,
        scaling=2.0,
        configured_scaling=2.0,
        learned_scaling=False,
        use_dora=False,
        note="",
        singular_values=[1.0] * 8,
    )
    return replace(plain, **changes)


def inspection(**changes: Any) -> Inspection:
    """Three layers of one attention and one MLP matrix each, of which no rule says anything."""
    paths = [f"model.layers.{layer}.{name}" for layer in range(3) for name in ("self_attn.q_proj", "mlp.up_proj")]
    plain = Inspection(
        adapter="out/adapter",
        model="base",
        base_dtype="bfloat16",
        config={"r": 8, "lora_alpha": 16.0},
        training={"learning_rate": 1e-3},
        layers=3,
        modules=[module(path) for path in paths],
        left_out={},
    )
    return replace(plain, **changes)


def all_with(**changes: Any) -> list[ModuleReport]:
    return [replace(each, **changes) for each in inspection().modules]


def rise(cost: float, *, low: float | None = 0.001) -> TruncationCost:
    return TruncationCost(loss=3.0, rise=cost, low=low, high=1.0, cost=cost)


def held(cost: float, **changes: Any) -> HeldOutLosses:
    """The base loses 4, the adapter 3: a gain of 1."""
    plain = HeldOutLosses("chats", 50, 1000, 4.0, 3.0, 1.0, 0.9, 1.1, half=rise(cost))
    return replace(plain, **changes)


def only(found: Inspection, rule: str) -> Advice:
    (advice,) = (each for each in advise(found) if each.rule == rule)
    assert advice.says
    assert advice.evidence
    return advice


def silent(found: Inspection, rule: str) -> bool:
    return all(each.rule != rule for each in advise(found))


def test_nothing_unusual_is_no_reason_for_advice() -> None:
    assert advise(inspection()) == []
    assert advise(inspection(modules=[])) == []


# ---- rank

FULL = {"effective_rank": 8 * (limits.SATURATED_USE + JUST)}


def test_saturated_needs_the_cost_and_the_use_and_certainty() -> None:
    above = limits.SATURATED_COST + JUST
    full = inspection(modules=all_with(**FULL), held_out=held(above))
    assert only(full, "saturated").setting == {"r": 16}
    assert silent(replace(full, held_out=held(limits.SATURATED_COST)), "saturated")
    assert silent(replace(full, modules=all_with(effective_rank=8 * (limits.SATURATED_USE - JUST))), "saturated")
    assert silent(replace(full, held_out=held(above, half=rise(above, low=-0.001))), "saturated")
    assert silent(replace(full, held_out=held(above, improvement_low=-0.1)), "saturated")
    assert silent(replace(full, held_out=None), "saturated")


def test_a_raised_rank_stays_within_the_matrix() -> None:
    modules = all_with(r=40, rank=40, effective_rank=36.0)
    assert only(inspection(modules=modules, held_out=held(0.05)), "saturated").setting == {"r": 64}


def test_spare_ranks() -> None:
    spare = {"effective_rank": 8 * (limits.SPARE_USE - JUST), "rank_99": 4}
    found = inspection(modules=all_with(**spare))
    advice = only(found, "spare ranks")
    assert advice.setting == {"r": 4}
    assert shlex.split(advice.command)[:4] == ["tailora", "shrink", "--adapter", "out/adapter"]
    first, *others = found.modules
    uneven = replace(found, modules=[replace(first, rank_99=6), *others])
    assert only(uneven, "spare ranks").setting == {"r": 6}  # enough for every module
    assert silent(replace(found, modules=all_with(**spare | {"effective_rank": 8 * limits.SPARE_USE})), "spare ranks")
    assert silent(replace(found, modules=all_with(**spare | {"rank_99": 5})), "spare ranks")
    assert not silent(replace(found, held_out=held(limits.SATURATED_COST)), "spare ranks")
    assert silent(replace(found, held_out=held(limits.SATURATED_COST + JUST)), "spare ranks")


def test_dead_modules_are_left_out_and_dead_training_is_said() -> None:
    modules = inspection().modules
    dead = [replace(modules[0], norm=limits.DEAD), *modules[1:]]
    advice = only(inspection(modules=dead), "dead")
    assert advice.setting == {"exclude_modules": ["model.layers.0.self_attn.q_proj"]}
    assert silent(inspection(modules=[replace(modules[0], norm=limits.DEAD + JUST), *modules[1:]]), "dead")
    larger = [replace(modules[0], norm=2 * limits.DEAD, numbers=4 * 4096), *modules[1:]]  # of four times the numbers
    assert not silent(inspection(modules=larger), "dead")
    advice = only(inspection(modules=all_with(norm=0.0, effective_rank=0.0)), "dead")
    assert "All 6 updates are zero" in advice.says
    assert advice.setting == {}


def test_no_gain() -> None:
    assert silent(inspection(held_out=held(0.0, improvement_low=JUST)), "no gain")
    assert (
        "does not lower the loss on chats" in only(inspection(held_out=held(0.0, improvement_low=0.0)), "no gain").says
    )
    alone = held(0.0, improvement=-0.1, improvement_low=None, improvement_high=None)
    assert "one example" in only(inspection(held_out=alone), "no gain").says


# ---- strength


def test_intruders_above_those_of_a_random_update() -> None:
    modules = all_with(intruders=3, intruders_random=1)
    advice = only(inspection(modules=modules), "intruders")
    assert advice.setting == {"learning_rate": 5e-4}
    assert advice.evidence["relative_norm"] == 0.05
    assert only(inspection(modules=modules, training={}), "intruders").setting == {}
    assert silent(inspection(modules=all_with(intruders=2, intruders_random=1)), "intruders")
    assert silent(inspection(modules=all_with(intruders=None, intruders_random=None)), "intruders")


def test_learned_scales_that_left_their_start() -> None:
    at = limits.MOVED
    assert silent(inspection(modules=all_with(learned_scaling=True, scaling=2 * at)), "scales moved")
    assert silent(inspection(modules=all_with(learned_scaling=True, scaling=2 / at)), "scales moved")
    assert silent(inspection(modules=all_with(scaling=9.0)), "scales moved")  # given, not learned
    advice = only(inspection(modules=all_with(learned_scaling=True, scaling=6.0)), "scales moved")
    assert advice.setting == {"lora_alpha": 48.0}
    assert only(inspection(modules=all_with(learned_scaling=True, scaling=-2.0)), "scales moved").setting == {}


def test_an_update_larger_than_the_weight_is_too_strong() -> None:
    at = limits.TOO_STRONG
    assert silent(inspection(modules=all_with(relative_norm=at)), "too strong")
    assert only(inspection(modules=all_with(relative_norm=at + JUST)), "too strong").setting == {
        "learning_rate": 2.5e-4
    }
    assert silent(inspection(modules=all_with(relative_norm=None)), "too strong")


def forgot(rise: float) -> dict[str, Any]:
    return {
        "kl": 0.3,
        "loss_before": 2.0,
        "loss_after": 2.0 + rise,
        "tokens": 100,
        "text": "text generated by the base",
    }


def test_forgetting_above_its_share_of_the_gain_asks_for_a_lower_strength() -> None:
    limit = limits.FORGETTING
    assert silent(inspection(held_out=held(0.0), forgetting=forgot(limit)), "forgetting")
    assert silent(inspection(held_out=held(0.0, improvement_low=-0.1), forgetting=forgot(1.0)), "forgetting")
    advice = only(inspection(held_out=held(0.0), forgetting=forgot(limit + 1e-3)), "forgetting")
    assert advice.evidence == pytest.approx({"rise": limit + 1e-3, "kl": 0.3, "improvement": 1.0, "limit": limit})


def test_small_updates_are_lost_in_a_merge_into_16_bits() -> None:
    small = all_with(relative_norm=limits.ROUNDED - JUST)
    advice = only(inspection(modules=small), "rounding")
    assert "--dtype float32" in advice.command
    assert silent(inspection(modules=small, base_dtype="float32"), "rounding")
    assert silent(inspection(modules=all_with(relative_norm=limits.ROUNDED)), "rounding")
