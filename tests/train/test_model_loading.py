from pathlib import Path

import pytest
import torch

from tailora.errors import ConfigError
from tailora.train.model_loading import load_base


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_base_comes_in_the_precision_asked_for(model_folder: Path, dtype: str) -> None:
    model, tokenizer = load_base(str(model_folder), dtype)
    assert model.dtype == getattr(torch, dtype)
    assert tokenizer.eos_token == "<|im_end|>"


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_auto_keeps_the_precision_of_the_files_on_a_cpu(
    model_folder: Path, tmp_path: Path, stored: torch.dtype
) -> None:
    model, tokenizer = load_base(str(model_folder), "float32")
    model.to(stored).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert load_base(str(tmp_path))[0].dtype == stored


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
    with pytest.raises(ConfigError, match=r"is the folder of a run, not of a model; use .*run/model"):
        load_base(str(tmp_path / "run"))


def test_a_model_without_a_tokenizer_says_how_to_add_it(model_folder: Path, tmp_path: Path) -> None:
    model, _ = load_base(str(model_folder), "float32")
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load_base(str(tmp_path))
    path = repr(str(tmp_path))
    assert str(caught.value).startswith(
        f"model {path} has no tokenizer; save the base model's tokenizer there with tokenizer.save_pretrained({path})."
    )
