"""The optimiser and its precision, step by step as their papers write them."""

import torch
from torch import Tensor, nn

from tailora import LoRAConfig, LoRAModel
from tailora.kernels.flat_parameters import flattened
from tailora.train.config import TrainConfig
from tailora.train.optimizer import adamw, optimizer_step, parameter_groups
from tailora.train.trainable import FullModel


def test_adamw_decays_apart_from_the_gradient() -> None:
    """AdamW (arXiv:1711.05101, alg. 2), lines 6-12: the decay goes past the moments, at the step's rate."""
    torch.manual_seed(0)
    model = LoRAModel(nn.Sequential(nn.Linear(6, 5)).double(), LoRAConfig(r=2))
    x, decay = torch.randn(9, 6, dtype=torch.float64), 0.3
    named = dict(model.lora_layers.named_parameters())
    expected = {name: value.detach().clone() for name, value in named.items()}
    m, v = ({name: torch.zeros_like(value) for name, value in expected.items()} for _ in range(2))
    with flattened(parameter_groups(model.lora_layers, TrainConfig(weight_decay=decay))) as flats:
        optimizer = adamw(flats)
        for t, rate in enumerate((1e-2, 3e-2, 2e-3, 1e-2), start=1):
            optimizer.zero_grad(set_to_none=False)
            (model(x) - 1).square().sum().backward()
            for name, parameter in named.items():
                g = parameter.grad
                m[name] = 0.9 * m[name] + 0.1 * g
                v[name] = 0.999 * v[name] + 0.001 * g.square()
                step = (m[name] / (1 - 0.9**t)) / ((v[name] / (1 - 0.999**t)).sqrt() + 1e-8)
                expected[name] = expected[name] - rate * (step + decay * expected[name])
            optimizer_step(optimizer, rate)
            for name, parameter in named.items():
                torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-10, atol=1e-12)


def test_a_master_in_float32_adds_up_steps_that_16_bits_would_lose() -> None:
    """arXiv:1710.03740, sec. 3.1: a step below half a unit of the weight is lost in it, and kept in its master."""
    base = nn.Sequential(nn.Linear(8, 4, bias=False)).bfloat16()
    nn.init.ones_(base[0].weight)
    model = FullModel(base, None, lambda: base)
    (master,) = model.trained.values()
    assert master.dtype == torch.float32
    optimizer = torch.optim.SGD(model.trained.parameters(), lr=2.0**-12)  # a unit of bfloat16 at 1 is 2^-7
    x = torch.ones(1, 8, dtype=torch.bfloat16)
    alone = base[0].weight.detach().clone()

    def weight() -> Tensor:
        return base[0].weight.detach()

    for step in range(1, 65):
        optimizer.zero_grad()
        (-model(x).sum()).backward()  # the gradient of every weight is -1
        optimizer.step()
        model.sync_parameters()
        alone += torch.tensor(2.0**-12, dtype=torch.bfloat16)
        assert torch.equal(master.detach(), torch.full((4, 8), 1 + step * 2.0**-12))
        assert torch.equal(weight(), master.detach().bfloat16())
    assert (alone == 1).all()
    assert (weight() == 1 + 2.0**-6).all()
