import math
from contextlib import nullcontext
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from tailora import LoRAConfig, LoRAModel
from tailora.errors import DivergedError
from tailora.kernels.flat_parameters import Group, check_views, flattened
from tailora.train.config import TrainConfig
from tailora.train.optimizer import adamw, clip_gradients, learning_rate, optimizer_step, parameter_groups
from tailora.train.trainer import run


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_the_rate_rises_to_the_peak_and_never_above(kind: str) -> None:
    rates = [learning_rate(step, 100, 1e-3, 0.1, kind) for step in range(100)]
    assert 0 < rates[0] < rates[9] < rates[10] == 1e-3 == max(rates)
    assert all(later <= earlier for earlier, later in pairwise(rates[10:]))


@pytest.mark.parametrize(
    ("kind", "half", "last"),
    [("cosine", 0.5, 0.5 * (1 + math.cos(math.pi * 0.99))), ("linear", 0.5, 0.01), ("constant", 1, 1)],
)
def test_the_rate_follows_its_curve(kind: str, half: float, last: float) -> None:
    assert learning_rate(50, 100, 1.0, 0.0, kind) == pytest.approx(half)
    assert learning_rate(99, 100, 1.0, 0.0, kind) == pytest.approx(last)


@pytest.mark.parametrize("warmup_ratio", [0.0, 0.5, 1.0])
def test_one_step_is_enough_for_every_schedule(warmup_ratio: float) -> None:
    assert 0 < learning_rate(0, 1, 1.0, warmup_ratio, "cosine") <= 1


SHAPES = {"A": (16, 33), "B": (65, 16), "scale": (), "weight": (7, 5, 3)}
NAMES = tuple(SHAPES)
TWO_GROUPS = [(("A", "weight"), 1.0, 0.1), (("B", "scale"), 16.0, 0.0)]  # names, rate factor, weight decay
ROUNDING = {torch.float32: 1e-6, torch.float64: 1e-12}


def pair(dtype: torch.dtype = torch.float32) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """The same parameters twice: to train in a buffer, and one by one with torch's own."""
    torch.manual_seed(0)
    values = {name: torch.randn(shape, dtype=dtype) for name, shape in SHAPES.items()}
    ours, theirs = ({name: nn.Parameter(value.clone()) for name, value in values.items()} for _ in range(2))
    return ours, theirs


def set_gradients(ours: dict[str, nn.Parameter], theirs: dict[str, nn.Parameter], seed: int) -> None:
    torch.manual_seed(seed)
    for name, parameter in theirs.items():
        parameter.grad = torch.randn_like(parameter) * 10.0 ** (seed % 3 - 1)  # clipped in some steps only
        ours[name].grad.copy_(parameter.grad)


def one_by_one(parameters: list[nn.Parameter], rate: float, weight_decay: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=weight_decay, fused=False, foreach=False)


@pytest.mark.parametrize("groups", [[(NAMES, 1.0, 0.0)], [(NAMES, 1.0, 0.1)], TWO_GROUPS], ids=["", "decay", "two"])
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("is_used", [True, False])
def test_steps_are_torchs_adamw_and_clipping_of_each_parameter(
    dtype: torch.dtype, groups: list[tuple[tuple[str, ...], float, float]], is_used: bool
) -> None:
    """is_used: else one parameter is not used after the third step, and moves on with its moments."""
    ours, theirs = pair(dtype)
    close = partial(torch.testing.assert_close, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])
    expected = [one_by_one([theirs[name] for name in names], 0.0, decay) for names, _, decay in groups]
    made = [Group({name: ours[name] for name in names}, factor, decay) for names, factor, decay in groups]
    norms = []
    with flattened(made) as flats:
        optimizer = adamw(flats)
        for step in range(20):
            set_gradients(ours, theirs, step)
            if step > 2 and not is_used:
                ours["B"].grad.zero_()
                theirs["B"].grad.zero_()
            norms.append(clip_gradients(flats, 20.0))
            assert norms[-1] == pytest.approx(
                float(nn.utils.clip_grad_norm_(theirs.values(), 20.0)), rel=ROUNDING[dtype]
            )
            for name, parameter in theirs.items():
                close(ours[name].grad, parameter.grad)
            before, rate = ours["B"].detach().clone(), learning_rate(step, 20, 1e-2, 0.1, "cosine")
            optimizer_step(optimizer, rate)
            assert not torch.equal(ours["B"], before)
            for reference, (_, factor, _) in zip(expected, groups, strict=True):
                reference.param_groups[0]["lr"] = rate * factor
                reference.step()
    assert min(norms) < 20 < max(norms)
    for name, parameter in theirs.items():
        close(ours[name], parameter)


def test_gradients_become_zero_in_the_buffer_and_nothing_is_left_in_its_gaps() -> None:
    ours, theirs = pair()
    with flattened([Group(ours, weight_decay=0.1)]) as (flat,):
        optimizer = adamw([flat])
        for step in range(3):
            set_gradients(ours, theirs, step)
            optimizer_step(optimizer, 0.1)
            optimizer.zero_grad(set_to_none=False)
            check_views([flat])
            assert not flat.gradient.any()
        gaps = torch.ones_like(flat.gradient)
        for name in flat.parameters:
            flat.view(name, gaps).zero_()
        assert gaps.any()
        assert not (flat.parameter * gaps).any()


def test_a_run_has_one_group_with_the_settings_decay() -> None:
    model = LoRAModel(nn.Sequential(nn.Linear(20, 20)), LoRAConfig(r=4))
    (group,) = parameter_groups(model.lora_layers, TrainConfig(weight_decay=0.25))
    named = dict(model.lora_layers.named_parameters())
    assert (dict(group.parameters), group.rate_factor, group.weight_decay) == (named, 1.0, 0.25)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_gradients_that_are_not_finite_stay_as_they_are(broken: float) -> None:
    ours, theirs = pair()
    with flattened([Group(ours)]) as flats:
        set_gradients(ours, theirs, 0)
        ours["B"].grad[3, 4] = broken
        assert not math.isfinite(clip_gradients(flats, 1e-3))
        assert torch.equal(ours["A"].grad, theirs["A"].grad)


@pytest.mark.parametrize("diverging", [False, True])
def test_after_a_run_the_models_parameters_are_ordinary(settings: Any, diverging: bool) -> None:
    seen: list[LoRAModel] = []

    def look(model: LoRAModel, *_: Any) -> None:
        seen.append(model)
        storages = {parameter.untyped_storage().data_ptr() for parameter in model.lora_layers.parameters()}
        assert len(storages) == 1

    config = settings(max_steps=1, learn_scaling=True, learning_rate=1e38 if diverging else 1e-3, validation_split=0)
    with pytest.raises(DivergedError) if diverging else nullcontext():
        run(config, on_ready=look)
    for parameter in seen[0].lora_layers.parameters():
        assert parameter.untyped_storage().nbytes() == 4 * parameter.numel()
        assert parameter.grad is None
        assert parameter.isfinite().all()
