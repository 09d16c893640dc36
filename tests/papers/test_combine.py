"""TIES and DARE, on numbers small enough to follow by hand."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from tailora import LoRAConfig, LoRAModel


def updates(*dense: Tensor | Sequence[Sequence[float]]) -> LoRAModel:
    """Adapters a, b, c, ... of one layer, whose updates are these matrices."""
    matrices = [torch.as_tensor(each, dtype=torch.float64) for each in dense]
    out_features, in_features = matrices[0].shape
    r = min(matrices[0].shape)
    net = nn.Sequential(nn.Linear(in_features, out_features, bias=False, dtype=torch.float64))
    model = LoRAModel(net, LoRAConfig(r=r, lora_alpha=r), adapter_name="a")
    for name in "bcdefgh"[: len(matrices) - 1]:
        model.add_adapter(name, LoRAConfig(r=r, lora_alpha=r))
    for name, matrix in zip("abcdefgh", matrices, strict=False):
        layer = model.adapter(name).low_rank["0"]
        U, S, V = torch.linalg.svd(matrix, full_matrices=False)
        layer.lora_B.data, layer.lora_A.data = U * S, V
    return model


def combined(model: LoRAModel, weights: dict[str, float], method: str, **settings: float) -> Tensor:
    model.combine(weights, "mix", method, r=1000, **settings)
    found = model.adapter("mix").low_rank["0"].delta_weight().detach()
    model.delete_adapter("mix")
    return found


def test_ties_trims_elects_a_sign_and_averages_what_agrees() -> None:
    """arXiv:2306.01708, alg. 1, at half the entries kept; in brackets what is trimmed."""
    a = [[4.0, -3, 1], [2, -0.5, 0.25]]  #  4 -3 [1]   2 [-.5] [.25]
    b = [[-1.0, -5, 3], [-6, 0.5, 0.1]]  # [-1] -5 3  -6 [.5]  [.1]
    c = [[2.0, 3, 0.5], [1, 0.25, 0.1]]  #  2  3 [.5]  1 [.25] [.1]
    # signs:  + (6)   - (-5)   + (3)   - (-3)
    expected = [[(4 + 2) / 2, (-3 - 5) / 2, 3], [-6, 0, 0]]
    found = combined(updates(a, b, c), {"a": 1, "b": 1, "c": 1}, "ties", density=0.5)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    half = combined(updates(a, b, c), {"a": 0.5, "b": 0.5, "c": 0.5}, "ties", density=0.5)
    torch.testing.assert_close(half, found / 2)  # lambda of the last line


def test_dare_drops_a_share_and_scales_the_rest_up() -> None:
    """m ~ Bernoulli(p), (1 - m) delta / (1 - p) (arXiv:2311.03099, eq. 2 and 3): its mean is delta."""
    torch.manual_seed(0)
    delta, p = torch.rand(60, 50, dtype=torch.float64) + 1, 0.75
    model = updates(delta)
    found = combined(model, {"a": 1}, "dare", drop=p)
    kept = found.abs() > 1e-6
    torch.testing.assert_close(found[kept], (delta / (1 - p))[kept])
    assert float(kept.double().mean()) == pytest.approx(1 - p, abs=4 * math.sqrt(p * (1 - p) / 3000))
    drawn = [combined(model, {"a": 1}, "dare", drop=p, seed=seed) for seed in range(40)]
    mean = torch.stack(drawn).mean(0)
    error = delta * math.sqrt(p / (1 - p) / 40)  # of one entry's mean
    assert ((mean - delta) / error).abs().max() < 6
    assert abs(float(((mean - delta) / error).mean())) < 5 / math.sqrt(3000)


def test_dare_drops_entries_of_every_adapter_independently() -> None:
    ones = torch.ones(40, 40)
    found = combined(updates(ones, 10 * ones), {"a": 1, "b": 1}, "dare", drop=0.5)
    assert found.round(decimals=6).unique().tolist() == [0, 2, 20, 22]
