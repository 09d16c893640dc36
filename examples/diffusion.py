"""An adapter for a diffusers UNet, saved in a format that diffusers loads (pip install 'tailora[examples]').

    python examples/diffusion.py --output-dir out

The training loop follows diffusers' scripts: add noise to an image, and predict the noise. The UNet is first trained on
discs, which takes a few seconds; then an adapter learns squares. The UNet is small enough for a CPU. To use one from
the Hub, load it with UNet2DConditionModel.from_pretrained(..., subfolder="unet").
"""

import argparse
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from tailora import LoRAConfig, LoRAModel

SIZE = 12
TEXT = torch.zeros(1, 1, 8)  # placeholder for the states of a text encoder


def small_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=SIZE,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT.shape[-1],
        attention_head_dim=8,
        norm_num_groups=8,
    )


def images(count: int, shape: str) -> Tensor:
    """Returns (count, 1, SIZE, SIZE) images of a disc or a square at a random place, with values from -1 to 1."""
    centre = torch.randint(4, SIZE - 4, (2, count, 1, 1))
    grid = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    down, across = (abs(axis - place) for axis, place in zip(grid, centre, strict=True))
    inside = down**2 + across**2 <= 9 if shape == "disc" else torch.maximum(down, across) <= 3
    return inside[:, None].float() * 2 - 1


def noise_loss(model: nn.Module, scheduler: DDPMScheduler, clean: Tensor) -> Tensor:
    noise = torch.randn_like(clean)
    steps = torch.randint(0, scheduler.config.num_train_timesteps, (len(clean),))
    noisy = scheduler.add_noise(clean, noise, steps)
    return mse_loss(model(noisy, steps, TEXT.expand(len(clean), -1, -1)).sample, noise)


def train(model: nn.Module, parameters: list[nn.Parameter], scheduler: DDPMScheduler, shape: str, steps: int) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=5e-3)
    for _ in range(steps):
        noise_loss(model, scheduler, images(16, shape)).backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def error(model: nn.Module, scheduler: DDPMScheduler) -> float:
    """Returns the loss on squares; squares and noise are the same in every call."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return float(noise_loss(model, scheduler, images(64, "square")))


def main() -> None:
    parser = argparse.ArgumentParser(description="Train an adapter for a diffusers UNet.")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--max-steps", type=int, default=40)
    options = parser.parse_args()

    torch.manual_seed(0)
    scheduler, base_model = DDPMScheduler(), small_unet()
    train(base_model, [*base_model.parameters()], scheduler, "disc", 2 * options.max_steps)
    before = error(base_model, scheduler)
    layers = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"]
    model = LoRAModel(base_model, LoRAConfig(r=8, target_modules=layers))
    train(model, [*model.lora_layers.parameters()], scheduler, "square", options.max_steps)
    after = error(model, scheduler)

    model.export(options.output_dir, "diffusers")  # model.save_adapter(folder) writes a PEFT folder instead
    unet = small_unet()
    unet.load_state_dict(model.unload().state_dict())
    # With a pipeline: pipeline.load_lora_weights(folder)
    unet.load_lora_adapter(options.output_dir, prefix="unet", weight_name="pytorch_lora_weights.safetensors")
    print(f"loss on squares: {before:.3f} before, {after:.3f} after, {error(unet, scheduler):.3f} loaded by diffusers")


if __name__ == "__main__":
    main()
