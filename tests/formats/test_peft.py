"""The PEFT folder is written whole or not at all, with the same bytes for the same adapter."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import chat_model, stir, stirred_model, tiny_model
from tiny_adapters import adapted
from torch import nn

from tailora import LoRAConfig, LoRAModel
from tailora.core.config import scaling_divisor
from tailora.errors import DivergedError, FormatError, WriteError
from tailora.formats.peft import read_peft_folder
from tailora.formats.peft_config import with_double_rank
from tailora.report.model_card import run_card


def test_adapters_of_a_bfloat16_base_are_saved_in_float32(tmp_path: Path) -> None:
    model = LoRAModel(chat_model().to(torch.bfloat16), LoRAConfig(r=4))
    tensors = load_file(model.save_adapter(tmp_path) / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_a_learned_scale_stays_learned_and_an_assigned_one_gives_the_same_outputs(tmp_path: Path) -> None:
    ids = torch.arange(10)[None]
    model = stirred_model(chat_model(), LoRAConfig(r=4, learn_scaling=True, lora_bias=True))
    back = LoRAModel.from_pretrained(chat_model(), model.save_adapter(tmp_path / "learned"))
    for key, layer in model.lora_layers.items():
        assert isinstance(back.lora_layers[key].scaling, nn.Parameter)
        assert back.lora_layers[key].scaling.item() == pytest.approx(layer.scaling.item(), rel=1e-6)
    torch.testing.assert_close(back(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)

    fixed = LoRAModel(chat_model(), LoRAConfig(r=4))
    stir(fixed)
    for number, layer in enumerate(fixed.lora_layers.values()):
        layer.scaling = 0.1 * number  # the first one is 0
    again = LoRAModel.from_pretrained(chat_model(), fixed.save_adapter(tmp_path / "fixed"))
    torch.testing.assert_close(again(ids).logits, fixed(ids).logits, rtol=1e-5, atol=1e-5)


def test_a_scale_that_was_made_a_parameter_by_hand_stays_learned(tmp_path: Path) -> None:
    model = stirred_model(chat_model(), LoRAConfig(r=4, target_modules=["q_proj"]))
    first = next(iter(model.lora_layers.values()))
    first.scaling = nn.Parameter(torch.full((1,), 3.0))
    back = LoRAModel.from_pretrained(chat_model(), model.save_adapter(tmp_path))
    assert [layer.learns_scaling for layer in back.lora_layers.values()] == [True, False]
    ids = torch.arange(9)[None]
    torch.testing.assert_close(back(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"rank_pattern": {"q_proj": 3}, "use_rslora": True}, {"use_dora": True}])
def test_an_adapter_that_was_read_is_saved_with_the_same_bytes(tmp_path: Path, settings: dict[str, Any]) -> None:
    """So that the SHA-256 of a run's adapter is that of its export."""
    folder = adapted(settings).save_adapter(tmp_path / "first")
    LoRAModel.from_pretrained(chat_model(), folder).save_adapter(tmp_path / "again")
    first, again = ([path.read_bytes() for path in sorted((tmp_path / name).iterdir())] for name in ("first", "again"))
    assert first == again


def test_saving_again_replaces_the_files_and_leaves_others(tmp_path: Path) -> None:
    folder = adapted({"target_modules": ["q_proj", "down_proj"]}).save_adapter(tmp_path / "adapter")
    model = LoRAModel(chat_model(), LoRAConfig(r=2, target_modules=["q_proj"]))
    (folder / "notes.txt").write_text("mine")
    model.save_adapter(folder)
    assert (folder / "notes.txt").read_text() == "mine"
    assert LoRAModel.from_pretrained(chat_model(), folder).adapters["default"].r == 2
    assert sorted(path.name for path in folder.parent.iterdir()) == ["adapter"]


@pytest.mark.parametrize("name", ["..", ".", "a/b", "/tmp", "a\0b"])
def test_an_adapter_name_cannot_leave_the_folder(tmp_path: Path, name: str) -> None:
    model = LoRAModel(nn.Sequential(nn.Linear(8, 8)), LoRAConfig(r=2), adapter_name=name)
    with pytest.raises(FormatError, match="is not a valid folder name"):
        model.save_adapter(tmp_path / "out", name)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_layers_that_were_not_trained_are_named_in_the_files(tmp_path: Path, init: Any) -> None:
    model = LoRAModel(tiny_model("BartForCausalLM"), LoRAConfig(r=2, init_lora_weights=init))
    optimizer = torch.optim.AdamW(model.lora_layers.parameters(), lr=1e-2)
    model(torch.tensor([[3, 4]])).logits.square().sum().backward()
    optimizer.step()
    model.save_adapter(tmp_path)
    stored = read_peft_folder(tmp_path)
    expected = sorted(path for path in model.adapter().low_rank if ".encoder_attn." in path)
    assert stored.metadata.zero_updates == expected
    names = f"{', '.join(expected[:5])}, ..."
    sentence = f"8 of its layers ({names}) have an update of zero, because they were not trained, or pruned."
    assert sentence in (tmp_path / "README.md").read_text()
    assert sentence in run_card("user/adapter", tmp_path, stored.settings or {}, None, samples=False)
    again = LoRAModel.from_pretrained(tiny_model("BartForCausalLM"), tmp_path)
    assert sorted(path for path, layer in again.adapter().low_rank.items() if layer.is_zero) == expected


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    model = LoRAModel(nn.Sequential(nn.Linear(8, 8)), LoRAConfig(r=2))
    model.lora_layers["0"].lora_A.data[0, 0] = torch.nan
    with pytest.raises(DivergedError, match="lora_A"):
        model.save_adapter(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_saving_into_an_empty_folder_and_through_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = LoRAModel(nn.Sequential(nn.Linear(8, 8)), LoRAConfig(r=2))
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    model.save_adapter(".")
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    model.save_adapter(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert len(list((tmp_path / "empty").iterdir())) == 3


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("file", "HERE/file is a file, not a folder; use a different path, or move that file away"),
        ("file/deep/out", "HERE/file is a file, not a folder; use a different path, or move that file away"),
        ("x" * 300, "File name too long; use a different path"),
        ("/sys/tailora/out", "use a folder that you may write to"),
    ],
)
def test_a_path_that_cannot_be_written_is_named_with_cause_and_remedy(
    tmp_path: Path, folder: str, message: str
) -> None:
    (tmp_path / "file").write_text("mine")
    model = LoRAModel(nn.Sequential(nn.Linear(8, 8)), LoRAConfig(r=2))
    with pytest.raises(WriteError) as caught:
        model.save_adapter(tmp_path / folder)
    assert isinstance(caught.value, OSError)
    assert str(caught.value).startswith(f"cannot write {tmp_path / folder}")
    assert str(caught.value).endswith(message.replace("HERE", str(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("use_rslora", [False, True])
def test_factors_of_twice_the_rank_have_the_same_scale(use_rslora: bool) -> None:
    patterns = {"rank_pattern": {"q": 3}, "alpha_pattern": {"q": 5.0}}
    config = LoRAConfig(r=4, lora_alpha=6, use_rslora=use_rslora, **patterns)
    doubled = with_double_rank(config)
    pairs = [(config.r, config.lora_alpha), (config.rank_pattern["q"], config.alpha_pattern["q"])]
    twice = [(doubled.r, doubled.lora_alpha), (doubled.rank_pattern["q"], doubled.alpha_pattern["q"])]
    for (r, alpha), (twice_r, twice_alpha) in zip(pairs, twice, strict=True):
        assert twice_r == 2 * r
        scale = alpha / scaling_divisor(r, use_rslora)
        assert twice_alpha / scaling_divisor(twice_r, use_rslora) == pytest.approx(scale)
