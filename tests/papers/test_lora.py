"""One test per cited equation, with the numbers that the papers' mathematics demands."""

import math

import pytest
import torch
from torch import Tensor, nn

from tailora import LoRAConfig, LoRAModel


def orthogonal(rows: int, columns: int) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, dtype=torch.float64))[0]


@pytest.mark.parametrize(("r", "tail"), [(1, 140.0), (2, 91.0), (4, 30.0), (8, 0.0)])
def test_eckart_young_bounds_what_rank_r_can_learn(r: int, tail: float) -> None:
    """A linear teacher with spectrum 8..1: the loss is the tail of the squared spectrum (Eckart, Young 1936)."""
    torch.manual_seed(0)
    spectrum = torch.arange(8, 0, -1, dtype=torch.float64)
    teacher = orthogonal(32, 8) @ torch.diag(spectrum) @ orthogonal(48, 8).T  # (out, in)
    x = torch.eye(48, dtype=torch.float64)  # orthogonal inputs
    base = nn.Linear(48, 32, bias=False, dtype=torch.float64)
    target = x @ (base.weight + teacher).T.detach()
    model = LoRAModel(nn.Sequential(base), LoRAConfig(r=r, lora_alpha=r))
    optimizer = torch.optim.LBFGS(model.lora_layers.parameters(), max_iter=2000, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (model(x) - target).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert closure().item() == pytest.approx(tail, abs=1e-4)


@pytest.mark.parametrize(("use_rslora", "slope"), [(False, -0.5), (True, 0.0)])
@pytest.mark.slow
def test_rslora_keeps_the_gradient_norm_flat_in_the_rank(use_rslora: bool, slope: float) -> None:
    """Slope of log ||grad B|| over log r at the start (rsLoRA, arXiv:2312.03732, thm. 3.2)."""
    ranks = [2**k for k in range(9)]
    norms = []
    for r in ranks:
        torch.manual_seed(0)
        config = LoRAConfig(r=r, lora_alpha=16, use_rslora=use_rslora)
        model = LoRAModel(nn.Sequential(nn.Linear(256, 256, bias=False)), config)
        squares = []
        for _ in range(8):
            model.lora_layers["0"].reset_parameters()
            model.zero_grad()
            model(torch.randn(64, 256)).square().sum().backward()
            squares.append(model.lora_layers["0"].lora_B.grad.square().sum().item())
        norms.append(math.sqrt(sum(squares) / len(squares)))
    x, y = (torch.tensor(values, dtype=torch.float64).log() for values in (ranks, norms))
    measured = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    assert measured.item() == pytest.approx(slope, abs=0.03)


def test_the_update_is_the_product_times_alpha_over_r() -> None:
    """h = W0 x + alpha/r B A x (arXiv:2106.09685, eq. 3 and sec. 4.1)."""
    torch.manual_seed(0)
    base = nn.Linear(12, 10, dtype=torch.float64)
    x = torch.randn(5, 12, dtype=torch.float64)
    before = base(x)
    model = LoRAModel(nn.Sequential(base), LoRAConfig(r=4, lora_alpha=6))
    layer = model.lora_layers["0"]
    assert torch.equal(model(x), before)  # B = 0
    layer.lora_B.data.normal_()
    expected = x @ (base.weight + 6 / 4 * layer.lora_B @ layer.lora_A).T + base.bias
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


def test_the_first_gradients_of_a_and_of_a_learned_scale_are_exactly_zero() -> None:
    """B = 0 at the start (arXiv:2106.09685, sec. 4.1), so only B can move first."""
    model = LoRAModel(nn.Sequential(nn.Linear(16, 16)), LoRAConfig(r=4, learn_scaling=True))
    model(torch.randn(8, 16)).square().sum().backward()
    layer = model.lora_layers["0"]
    assert torch.count_nonzero(layer.lora_A.grad) == 0
    assert torch.count_nonzero(layer.scaling.grad) == 0
    assert torch.count_nonzero(layer.lora_B.grad) > 0


def test_a_starts_uniform_within_one_over_root_in_or_gaussian_with_std_one_over_r() -> None:
    """The reference implementation of arXiv:2106.09685; PEFT's "gaussian"."""
    torch.manual_seed(0)
    for config in (LoRAConfig(r=100), LoRAConfig(r=100, init_lora_weights=True)):  # type: ignore[arg-type]
        uniform = LoRAModel(nn.Sequential(nn.Linear(400, 300)), config).lora_layers["0"].lora_A
        assert uniform.abs().max() <= 1 / math.sqrt(400)
        assert uniform.std().item() == pytest.approx(1 / math.sqrt(3 * 400), rel=0.02)
    gaussian = LoRAModel(nn.Sequential(nn.Linear(400, 300)), LoRAConfig(r=100, init_lora_weights="gaussian"))
    assert gaussian.lora_layers["0"].lora_A.std().item() == pytest.approx(1 / 100, rel=0.02)
