import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from tailora.train.optim import adamw, clip, learning_rate, take_step


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


def test_clipping_returns_the_norm_that_was() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    assert float(clip([parameter], 1.0)) == pytest.approx(5.0)
    assert float(parameter.grad.norm()) == pytest.approx(1.0, abs=1e-5)


def test_a_step_is_torchs_adamw_without_decay() -> None:
    values = torch.randn(5)
    ours, theirs = nn.Parameter(values.clone()), nn.Parameter(values.clone())
    optimizer = adamw([ours], 0.0)
    expected = torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.0, fused=False, foreach=False)
    for _ in range(3):
        ours.grad = torch.ones(5)
        theirs.grad = torch.ones(5)
        take_step(optimizer, 0.1)
        expected.step()
    torch.testing.assert_close(ours, theirs)
    assert ours.grad is None
