"""An adapter's updates without its base model: what the files say, what is left out, what is refused."""

from pathlib import Path

import pytest
import torch
from cases import LAYERS, trained
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import chat_model, stirred_model
from torch import nn

from tailora import LoRAConfig
from tailora.errors import ConfigError, FormatError
from tailora.formats.offline import read_offline
from tailora.formats.run_folder import ADAPTER_WEIGHTS


def changed(folder: Path, **tensors: torch.Tensor) -> None:
    """The file with other tensors, its metadata gone; keys are ends of those in the file."""
    held = load_file(folder / ADAPTER_WEIGHTS)
    for end, tensor in tensors.items():
        (key,) = (key for key in held if key.endswith(f"{end}.weight"))
        held[key] = tensor
    save_file(held, folder / ADAPTER_WEIGHTS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = stirred_model(nn.ModuleDict({"a": nn.Linear(8, 6)}), LoRAConfig(r=2, lora_alpha=6, target_modules=["a"]))
    return model.save_adapter(tmp_path)


def test_scales_follow_patterns_and_modules_trained_whole_are_left_out(tmp_path: Path) -> None:
    patterns = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 5}}
    config = LoRAConfig(r=4, lora_alpha=8, use_rslora=True, modules_to_save=["model.norm"], **patterns)
    model = stirred_model(chat_model(), config)
    model.save_adapter(tmp_path)
    offline = read_offline(tmp_path)
    for path, layer in model.adapter().low_rank.items():
        update = offline.updates[path]
        assert update.r == layer.r
        assert update.scaling == pytest.approx(layer.scaling.item())
        torch.testing.assert_close(update.factors.dense[0], layer.delta_weight().detach(), rtol=1e-5, atol=1e-6)
    assert offline.left_out == {"model.norm.weight": "trained in full, without a low-rank update"}
    assert offline.base is None


def test_parts_of_a_fused_layer_are_read_as_one_matrix(tmp_path: Path) -> None:
    net = nn.ModuleDict({"qkv": nn.Linear(12, 18)})
    parts = {"qkv": {"q": 6, "k": 6, "v": 6}}
    model = stirred_model(net, LoRAConfig(r=2, target_modules=["qkv.q", "qkv.v"], fused_parts=parts))
    model.save_adapter(tmp_path)
    ((path, offline),) = read_offline(tmp_path).updates.items()
    assert (path, offline.r) == ("qkv", 4)
    whole = sum(layer.delta_weight(net["qkv"]).detach() for layer in model.adapter().low_rank.values())
    torch.testing.assert_close(offline.factors.dense[0], whole, rtol=1e-5, atol=1e-6)


def test_a_factor_that_mixes_groups_is_left_out(tmp_path: Path) -> None:
    case = next(case for case in LAYERS if case.name == "conv2d grouped")
    trained(case).save_adapter(tmp_path)
    (A,) = (tensor for key, tensor in load_file(tmp_path / ADAPTER_WEIGHTS).items() if "lora_A" in key)
    changed(tmp_path, lora_A=torch.randn(A.shape))
    offline = read_offline(tmp_path)
    assert not offline.updates
    assert "all groups" in offline.left_out["block.target"]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"lora_A": torch.randn(3, 8)}, "expected factors of rank 2"),
        ({"lora_B": torch.randn(6, 1)}, "expected factors of rank 2"),
        ({"lora_A": torch.randn(2)}, "expected factors of rank 2"),
        ({"lora_B": torch.full((6, 2), torch.nan)}, "not finite"),
    ],
)
def test_a_damaged_file_is_refused(folder: Path, tensors: dict[str, torch.Tensor], message: str) -> None:
    changed(folder, **tensors)
    with pytest.raises(FormatError, match=message):
        read_offline(folder)


def test_a_missing_factor_and_files_that_need_the_model_are_refused(folder: Path, tmp_path: Path) -> None:
    held = {key: tensor for key, tensor in load_file(folder / ADAPTER_WEIGHTS).items() if "lora_B" not in key}
    save_file(held, folder / ADAPTER_WEIGHTS)
    with pytest.raises(FormatError, match="a: lora_A has no matching factor"):
        read_offline(folder)
    (tmp_path / "loose.safetensors").write_bytes((folder / ADAPTER_WEIGHTS).read_bytes())
    with pytest.raises(ConfigError, match="requires the base model; pass it with --model"):
        read_offline(tmp_path / "loose.safetensors")
    with pytest.raises(FormatError, match="is not a folder"):
        read_offline(tmp_path / "absent")


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    model = stirred_model(chat_model(), LoRAConfig(r=4, target_modules=["q_proj", "k_proj"]))
    file = model.save_adapter(tmp_path) / "adapter_model.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    whole = load_file(file)
    save_file({key: tensor for key, tensor in whole.items() if "layers.0" in key}, file, metadata)
    with pytest.raises(
        FormatError, match=r"(?s)2 problems.*model\.layers\.1\.self_attn\.q_proj: its tensors are missing"
    ):
        read_offline(tmp_path)
    save_file({key: tensor for key, tensor in whole.items() if "q_proj" in key}, file, {"format": "pt"})
    assert read_offline(tmp_path).left_out == {"k_proj": "in target_modules, but the file has no tensors for it"}
    save_file({}, file, {"format": "pt"})
    with pytest.raises(FormatError, match="contains no tensors"):
        read_offline(tmp_path)
