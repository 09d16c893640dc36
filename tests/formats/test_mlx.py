"""Adapters that mlx-lm trained mean here what they mean there."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import chat_model
from torch import Tensor

from tailora import LoRAModel
from tailora.errors import FormatError

Tensors = dict[str, Tensor]


Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


def mlx_folder(folder: Path, tensors: Tensors, settings: dict[str, Any]) -> Path:
    folder.mkdir()
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "adapters.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def mlx_settings(**changes: Any) -> dict[str, Any]:
    parameters = {"rank": 4, "scale": 20.0, "dropout": 0.0}
    return {"fine_tune_type": "lora", "num_layers": 16, "lora_parameters": parameters, **changes}


def mlx_tensors() -> Tensors:
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    shapes = {f"{Q}.lora_a": (32, 4), f"{Q}.lora_b": (4, 32), f"{DOWN}.lora_a": (64, 4), f"{DOWN}.lora_b": (4, 32)}
    return {key: torch.randn(shape, generator=generator) * 0.1 for key, shape in shapes.items()}


def test_the_scale_of_mlx_lm_is_not_divided_by_the_rank(tmp_path: Path) -> None:
    """Its scale is not divided by the rank."""
    tensors = mlx_tensors()
    model = LoRAModel.from_pretrained(chat_model(), mlx_folder(tmp_path / "mlx", tensors, mlx_settings()))
    delta = 20 * tensors[f"{Q}.lora_b"].T @ tensors[f"{Q}.lora_a"].T
    torch.testing.assert_close(model.lora_layers[Q.replace(".", "/")].delta_weight(), delta)
    assert model.adapters["default"].lora_alpha == 80
    model.export(tmp_path / "peft", "peft")
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert f"base_model.model.{DOWN}.lora_A.weight" in tensors


def test_dora_of_mlx_lm(tmp_path: Path) -> None:
    tensors = mlx_tensors()
    base = chat_model()
    m = {path: torch.rand(32) + 0.5 for path in (Q, DOWN)}
    tensors |= {f"{path}.m": value for path, value in m.items()}
    model = LoRAModel.from_pretrained(base, mlx_folder(tmp_path / "mlx", tensors, mlx_settings(fine_tune_type="dora")))
    W = base.get_submodule(Q).weight + 20 * tensors[f"{Q}.lora_b"].T @ tensors[f"{Q}.lora_a"].T
    with model.merged():
        merged = base.get_submodule(Q).weight
        torch.testing.assert_close(merged, (m[Q] / W.norm(dim=1))[:, None] * W, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("tensors", "settings", "message"),
    [
        ({}, {"fine_tune_type": "full"}, "is not LoRA; merge it"),
        ({}, {"lora_parameters": {"rank": 4}}, r"lora_parameters\.scale above 0, got None"),
        ({}, {"lora_parameters": {"scale": float("nan")}}, r"lora_parameters\.scale above 0, got nan"),
        ({}, {"lora_parameters": 3}, r"lora_parameters\.scale above 0, got None"),
        ({f"{Q}.lora_b": None}, {}, f"{Q}: expected lora_a, lora_b for lora, got lora_a"),
        ({f"{Q}.m": torch.ones(32)}, {}, f"{Q}: expected lora_a, lora_b for lora, got lora_a, lora_b, m"),
        ({f"{Q}.lora_a": torch.ones(2, 4, 4)}, {}, "one per expert, are not supported"),
        ({f"{Q}.lora_a": torch.ones(31, 4)}, {}, "wrong shape of .*lora_A"),
        ({"model.layers.9.x.lora_a": torch.ones(2, 4), "model.layers.9.x.lora_b": torch.ones(4, 2)}, {}, "no module"),
    ],
)
def test_mlx_folders_that_are_not_lora_are_refused(
    tmp_path: Path, tensors: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    there = {key: value for key, value in (mlx_tensors() | tensors).items() if value is not None}
    folder = mlx_folder(tmp_path / "mlx", there, mlx_settings(**settings))
    with pytest.raises(FormatError, match=message):
        LoRAModel.from_pretrained(chat_model(), folder)
