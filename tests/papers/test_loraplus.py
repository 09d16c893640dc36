"""LoRA+ (arXiv:2402.12354): B has a rate of its own, in the plain loop and in a run's buffers."""

import copy

import pytest
import torch
from torch import nn

from tailora import LoRAConfig, LoRAModel, loraplus_groups
from tailora.errors import ConfigError
from tailora.train.config import TrainConfig
from tailora.train.optimizer import parameter_groups

CONFIG = LoRAConfig(r=2, target_modules=["0", "1"], modules_to_save=["2"], learn_scaling=True)


def model() -> LoRAModel:
    torch.manual_seed(0)
    return LoRAModel(nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 5), nn.LayerNorm(5)).double(), CONFIG)


def loss(model: LoRAModel) -> torch.Tensor:
    y: torch.Tensor = model(torch.arange(9))
    return (y - 1).square().sum()


def test_b_learns_at_ratio_times_the_rate_and_nothing_else_does() -> None:
    """eta_B = lambda eta_A (sec. 4): one step of SGD moves B by lambda eta times its gradient."""
    ours = model()
    ours.lora_layers["0"].lora_A.data.normal_()
    before = copy.deepcopy(dict(ours.lora_layers.named_parameters()))
    optimizer = torch.optim.SGD(loraplus_groups(ours.lora_layers, lr=0.01, loraplus_lr_ratio=16))
    loss(ours).backward()
    optimizer.step()
    for name, parameter in ours.lora_layers.named_parameters():
        rate = 0.16 if name == "1.lora_B" else 0.01  # of the embedding's factors neither
        torch.testing.assert_close(parameter, before[name] - rate * parameter.grad)


def test_a_run_has_a_group_for_b_and_a_ratio_below_one_is_refused() -> None:
    rest, factors = parameter_groups(model().lora_layers, TrainConfig(loraplus_lr_ratio=8))
    assert (rest.rate_factor, factors.rate_factor, list(factors.parameters)) == (1, 8, ["1.lora_B"])
    (only,) = parameter_groups(model().lora_layers, TrainConfig(loraplus_lr_ratio=1))
    assert only.rate_factor == 1
    with pytest.raises(ConfigError, match="loraplus_lr_ratio"):
        TrainConfig(loraplus_lr_ratio=0.5)
    with pytest.raises(ConfigError, match="expected loraplus_lr_ratio >= 1"):
        loraplus_groups(model().lora_layers, 1e-3, 0.5)
    with pytest.raises(ConfigError, match="requires --method lora, got full"):
        TrainConfig(loraplus_lr_ratio=2, method="full", learning_rate=1e-5)
