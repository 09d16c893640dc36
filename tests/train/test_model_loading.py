from pathlib import Path

import pytest
import torch

from tailora.errors import ConfigError
from tailora.train.model_loading import has_bfloat16, load_base


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("flags\t\t: fpu sse2 avx512_bf16 amx_tile", True),
        ("flags\t\t: fpu sse2 amx_bf16", True),
        ("Features\t: fp asimd bf16 i8mm", True),
        ("flags\t\t: fpu sse2 avx2 avx512f", False),
        ("model name\t: Some CPU with bf16 in its name", False),
    ],
)
def test_bfloat16_is_read_off_the_processors_flags(tmp_path: Path, line: str, expected: bool) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{line}\n")
    assert has_bfloat16("cpu", tmp_path / "cpuinfo") == expected
    assert not has_bfloat16("cpu", tmp_path / "missing")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_base_comes_in_the_precision_asked_for(model_folder: Path, dtype: str) -> None:
    model, tokenizer = load_base(str(model_folder), dtype)
    assert model.dtype == getattr(torch, dtype)
    assert tokenizer.eos_token == "<|im_end|>"


def test_auto_follows_the_machine(model_folder: Path) -> None:
    model, _ = load_base(str(model_folder), "auto")
    assert model.dtype == (torch.bfloat16 if has_bfloat16() else torch.float32)


def test_pickled_weights_are_not_read(model_folder: Path, tmp_path: Path) -> None:
    model, tokenizer = load_base(str(model_folder), "float32")
    model.config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="safetensors"):
        load_base(str(tmp_path))


def test_the_folder_of_a_run_is_not_its_model(tmp_path: Path) -> None:
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"is the folder of a run, not of a model: give .*run/model"):
        load_base(str(tmp_path / "run"))
