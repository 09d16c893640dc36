"""A vision transformer and a small convolutional network, on scikit-learn's digits (pip install 'tailora[examples]').

    python examples/image_classification.py --output-dir out

Both are first trained on upright digits, which takes a few seconds. Then an adapter learns digits rotated by 90
degrees, while the base model stays frozen: with the adapter off, it classifies upright digits exactly as before.
"""

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from transformers import ViTConfig, ViTForImageClassification

from tailora import LoRAConfig, LoRAModel


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)),
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        logits: Tensor = self.layers(pixel_values)
        return logits


def vision_transformer() -> ViTForImageClassification:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=2, num_channels=1, num_labels=10))


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    output = model(images)
    return output if isinstance(output, Tensor) else output.logits


def train(model: nn.Module, parameters: list[nn.Parameter], images: Tensor, labels: Tensor, epochs: int) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=5e-3)
    model.train()
    for _ in range(epochs):
        for batch, targets in DataLoader(TensorDataset(images, labels), batch_size=64, shuffle=True):
            cross_entropy(logits_of(model, batch), targets).backward()
            optimizer.step()
            optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return float((logits_of(model, images).argmax(1) == labels).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description="Train adapters for a vision transformer and a small CNN.")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=12)
    options = parser.parse_args()

    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16  # (1797, 1, 8, 8)
    labels = torch.tensor(digits.target)
    turned = images.rot90(dims=(2, 3))
    held_out = slice(0, 400)
    rest = slice(400, None)
    bases = {"vit": (vision_transformer(), "all-linear"), "cnn": (ConvNet(), ["layers.0", "layers.3", "layers.7"])}
    for name, (base_model, layers) in bases.items():
        train(base_model, [*base_model.parameters()], images[rest], labels[rest], options.epochs)
        upright = accuracy(base_model, images[held_out], labels[held_out])
        before = accuracy(base_model, turned[held_out], labels[held_out])

        model = LoRAModel(base_model, LoRAConfig(r=8, target_modules=layers))
        train(model, [*model.lora_layers.parameters()], turned[rest], labels[rest], options.epochs)
        after = accuracy(model, turned[held_out], labels[held_out])
        model.save_adapter(options.output_dir / name)
        with model.disable_adapter():
            kept = accuracy(model, images[held_out], labels[held_out])
        print(f"{name}, turned digits: {before:.0%} before, {after:.0%} after")
        print(f"{name}, upright digits: {upright:.0%}, and with the adapter off {kept:.0%}")


if __name__ == "__main__":
    main()
