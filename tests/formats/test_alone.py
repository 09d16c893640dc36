"""An adapter's updates without its model: what can be said, what is left out, and what is refused."""

from pathlib import Path

import pytest
import torch
from cases import LAYERS, stir, trained
from safetensors.torch import load_file, save_file
from tiny import chat_model
from torch import nn

from tailora import LoRAConfig, LoRAModel
from tailora.errors import ConfigError, FormatError
from tailora.formats.offline import read_offline
from tailora.formats.peft import WEIGHTS


def changed(folder: Path, **tensors: torch.Tensor) -> None:
    """The file with other tensors, its metadata gone; keys are ends of those in the file."""
    held = load_file(folder / WEIGHTS)
    for end, tensor in tensors.items():
        (key,) = (key for key in held if key.endswith(f"{end}.weight"))
        held[key] = tensor
    save_file(held, folder / WEIGHTS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = LoRAModel(nn.ModuleDict({"a": nn.Linear(8, 6)}), LoRAConfig(r=2, lora_alpha=6, target_modules=["a"]))
    stir(model)
    return model.save_adapter(tmp_path)


def test_scales_follow_patterns_and_what_is_trained_whole_is_left_out(tmp_path: Path) -> None:
    patterns = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 5}}
    config = LoRAConfig(r=4, lora_alpha=8, use_rslora=True, modules_to_save=["norm"], **patterns)
    model = LoRAModel(chat_model(), config)
    stir(model)
    model.save_adapter(tmp_path)
    found = read_offline(tmp_path)
    for path, layer in model.adapter().low_rank.items():
        each = found.updates[path]
        assert each.r == layer.r
        assert each.scaling == pytest.approx(layer.scaling.item())
        torch.testing.assert_close(each.factors.dense[0], layer.delta().detach(), rtol=1e-5, atol=1e-6)
    assert found.left_out == {"model.norm.weight": "trained whole, without a low-rank update"}
    assert found.base is None


def test_parts_are_read_as_one_matrix_of_the_whole_layer(tmp_path: Path) -> None:
    net = nn.ModuleDict({"qkv": nn.Linear(12, 18)})
    parts = {"qkv": {"q": 6, "k": 6, "v": 6}}
    model = LoRAModel(net, LoRAConfig(r=2, target_modules=["qkv.q", "qkv.v"], fused_parts=parts))
    stir(model)
    model.save_adapter(tmp_path)
    ((path, found),) = read_offline(tmp_path).updates.items()
    assert (path, found.r) == ("qkv", 4)
    whole = sum(layer.delta(net["qkv"]).detach() for layer in model.adapter().low_rank.values())
    torch.testing.assert_close(found.factors.dense[0], whole, rtol=1e-5, atol=1e-6)


def test_an_a_that_mixes_groups_is_no_matrix_of_the_layer(tmp_path: Path) -> None:
    case = next(case for case in LAYERS if case.name == "conv2d grouped")
    trained(case).save_adapter(tmp_path)
    (A,) = (tensor for key, tensor in load_file(tmp_path / WEIGHTS).items() if "lora_A" in key)
    changed(tmp_path, lora_A=torch.randn(A.shape))
    found = read_offline(tmp_path)
    assert not found.updates
    assert "all groups" in found.left_out["block.target"]


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({"lora_A": torch.randn(3, 8)}, "for a rank of 2"),
        ({"lora_B": torch.randn(6, 1)}, "for a rank of 2"),
        ({"lora_A": torch.randn(2)}, "for a rank of 2"),
        ({"lora_B": torch.full((6, 2), torch.nan)}, "not finite"),
    ],
)
def test_a_damaged_file_is_refused(folder: Path, tensors: dict[str, torch.Tensor], told: str) -> None:
    changed(folder, **tensors)
    with pytest.raises(FormatError, match=told):
        read_offline(folder)


def test_a_lost_factor_and_what_needs_the_model_are_refused(folder: Path, tmp_path: Path) -> None:
    held = {key: tensor for key, tensor in load_file(folder / WEIGHTS).items() if "lora_B" not in key}
    save_file(held, folder / WEIGHTS)
    with pytest.raises(FormatError, match="a: there is a lora_A without the other factor"):
        read_offline(folder)
    (tmp_path / "loose.safetensors").write_bytes((folder / WEIGHTS).read_bytes())
    with pytest.raises(ConfigError, match="give --model"):
        read_offline(tmp_path / "loose.safetensors")
    with pytest.raises(FormatError, match="is not a folder"):
        read_offline(tmp_path / "absent")
