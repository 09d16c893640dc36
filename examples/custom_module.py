"""LoRA on any nn.Module: a regression with your own network and your own training loop.

    python examples/custom_module.py --output-dir out

The network has convolutions, an embedding and linear layers. It is trained on the sensor of one machine. An adapter
then fits it to a second machine, whose sensor reads differently. The adapter is saved, loaded and merged.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from tailora import LoRAConfig, LoRAModel


class Forecaster(nn.Module):
    """Predicts the next value from the last 12 values and the hour of the day."""

    def __init__(self) -> None:
        super().__init__()
        self.hour = nn.Embedding(24, 8)
        self.encoder = nn.Sequential(nn.Conv1d(1, 16, 5), nn.ReLU(), nn.Conv1d(16, 8, 3), nn.ReLU(), nn.Flatten())
        self.hidden = nn.Linear(56, 32)
        self.head = nn.Linear(32, 1)

    def forward(self, values: Tensor, hour: Tensor) -> Tensor:
        features = torch.cat([self.encoder(values[:, None]), self.hour(hour)], dim=-1)
        prediction: Tensor = self.head(torch.relu(self.hidden(features)))[:, 0]
        return prediction


def sensor(rows: int, phase: float, gain: float) -> tuple[Tensor, Tensor, Tensor]:
    """Returns values (rows, 12), hours (rows,) and the next values (rows,)."""
    hours = torch.randint(0, 24, (rows,))
    time = hours[:, None] + torch.arange(-12, 1)  # the last one is the target
    series = gain * torch.sin(2 * torch.pi * time / 24 + phase) + 0.3 * torch.cos(2 * torch.pi * time / 8)
    series += 0.02 * torch.randn(series.shape)
    return series[:, :-1], hours, series[:, -1]


def train(model: nn.Module, parameters: list[nn.Parameter], data: tuple[Tensor, Tensor, Tensor], steps: int) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    values, hours, targets = data
    for _ in range(steps):
        rows = torch.randint(0, len(values), (64,))
        mse_loss(model(values[rows], hours[rows]), targets[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def error(model: nn.Module, data: tuple[Tensor, Tensor, Tensor]) -> float:
    values, hours, targets = data
    return float(mse_loss(model(values, hours), targets))


def main() -> None:
    parser = argparse.ArgumentParser(description="Train an adapter for your own module.")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--max-steps", type=int, default=300)
    options = parser.parse_args()

    torch.manual_seed(0)
    first, second, held_out = sensor(2000, 0.0, 1.0), sensor(500, 1.0, 2.0), sensor(500, 1.0, 2.0)
    base_model = Forecaster()
    train(base_model, [*base_model.parameters()], first, options.max_steps)
    before = error(base_model, held_out)

    # The head has one output, so a copy of it is trained in full
    config = LoRAConfig(r=4, target_modules=["hour", "encoder.0", "encoder.2", "hidden"], modules_to_save=["head"])
    model = LoRAModel(base_model, config)
    print(model.summary())
    train(model, [*model.lora_layers.parameters()], second, options.max_steps)
    after = error(model, held_out)
    model.save_adapter(options.output_dir)
    base_model = model.unload()  # restores the base model, bit for bit
    merged = LoRAModel.from_pretrained(base_model, options.output_dir).merge_and_unload()  # a plain Forecaster
    assert type(merged) is Forecaster
    print(f"mean squared error: {before:.4f} before, {after:.4f} after, {error(merged, held_out):.4f} merged")


if __name__ == "__main__":
    main()
