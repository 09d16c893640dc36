import json
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING

from tailora.data.schemas import CAUSAL_LM
from tailora.errors import ConfigError
from tailora.train.model_loading import load_base, load_tokenizer, new_model, read_config


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


def test_a_broken_config_is_refused_before_anything_is_built(model_folder: Path, tmp_path: Path) -> None:
    config = json.loads((model_folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_size": 16.5}))
    for read in (read_config, load_tokenizer, load_base):
        with pytest.raises(ConfigError) as caught:
            read(str(tmp_path))
        assert str(caught.value).startswith(f"config.json of model {str(tmp_path)!r} is invalid: ")
        assert "'hidden_size' expected int, got float (value: 16.5)" in str(caught.value)
        assert str(caught.value).endswith("; use the file of the original model")


@pytest.mark.parametrize("model_type", ["gemma4_text", "xlnet"])  # heads of different sizes; no limit of positions
def test_configs_of_unusual_models_are_accepted(model_type: str, tmp_path: Path) -> None:
    config = CONFIG_MAPPING[model_type]()
    config.save_pretrained(tmp_path)
    assert type(read_config(str(tmp_path))) is type(config)


def test_a_config_that_no_model_can_be_built_from_is_named(model_folder: Path) -> None:
    config = read_config(str(model_folder))
    config.hidden_act = "zzz"
    with pytest.raises(
        ConfigError, match=r"config.json of model 'M' \(KeyError: 'zzz'\); use the file of the original"
    ):
        new_model(config, "M", CAUSAL_LM)
