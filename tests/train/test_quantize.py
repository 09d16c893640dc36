"""`--quantize`: runs on quantised bases, what they refuse, and what is left to the plain path."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import run_and_collect
from tiny_run import save_model
from transformers import AutoModelForCausalLM

from tailora import LoRAModel
from tailora.core.quantization import dense_weight, quantized_layers, stored_bytes
from tailora.errors import ConfigError
from tailora.kernels.loss import FROZEN
from tailora.train.events import Prepared
from tailora.train.model_loading import load_base
from tailora.train.quantize import METHODS, obstacle, settings_for

CPU = torch.device("cpu")
methods = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model whose widths are multiples of 64."""
    return save_model(tmp_path_factory.mktemp("wide"), vocab_size=320, hidden_size=64, intermediate_size=128)


def test_a_weight_that_bitsandbytes_misreads_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path, vocab_size=320, hidden_size=96)
    with pytest.raises(ConfigError, match="96 inputs are not a multiple of its block size 64"):
        load_base(str(tmp_path), "float32", "cpu", "nf4")
    load_base(str(tmp_path), "float32", "cpu", "int8")


@methods
def test_a_run_on_a_quantised_base(settings: Any, model_folder: Path, method: str) -> None:
    config = settings(quantize=method, max_steps=6, eval_steps=3, gradient_checkpointing=method == "nf4")
    result, (prepared,) = run_and_collect(config, Prepared)
    assert result.eval_loss_after < result.eval_loss_before  # type: ignore[operator]
    kernels = prepared.header["kernels"]
    assert "decoder layers: plain" in kernels
    # LLM.int8 finds outliers over all rows of an evaluation, so that packed and padded rows differ
    assert ("with a padding mask" in kernels) == (method == "int8")
    assert f"loss: {FROZEN}" in kernels
    written = json.loads((Path(config.output_dir) / "run.json").read_text())
    assert written["settings"]["quantize"] == method
    plain = AutoModelForCausalLM.from_pretrained(model_folder)
    assert written["total_parameters"] - written["trainable_parameters"] == plain.num_parameters()
    assert written["base_bytes"] < stored_bytes(plain)
    LoRAModel.from_pretrained(plain, Path(config.output_dir) / "adapter")  # recognised


def test_a_method_that_does_not_work_here_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Any) -> Any:
        raise RuntimeError("no kernel image")

    monkeypatch.setitem(METHODS, "nf4", replace(METHODS["nf4"], layer=broken))
    with pytest.raises(ConfigError, match="nf4 does not work here: bitsandbytes cannot run on cpu: no kernel image"):
        settings_for("nf4", torch.float32, CPU)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"bitsandbytes is not installed: pip install 'tailora\[quantize\]'"):
        settings_for("nf4", torch.float32, CPU)
    with pytest.raises(ConfigError, match="did you mean nf4"):
        settings_for("nf8", torch.float32, CPU)


def test_what_works_here_is_found_out_by_trying() -> None:
    assert not any(obstacle(method, CPU) for method in METHODS)


def test_a_quantised_model_keeps_its_own_way(model_folder: Path, tmp_path: Path) -> None:
    model, tokenizer = load_base(str(model_folder), "float32", "cpu", "nf4")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="is already quantized"):
        load_base(str(tmp_path), "float32", "cpu", "int8")
    again, _ = load_base(str(tmp_path), "float32")
    layers, loaded = quantized_layers(model), quantized_layers(again)
    assert layers.keys() == loaded.keys()
    assert all(torch.allclose(dense_weight(layers[path]), dense_weight(loaded[path]), rtol=1e-6) for path in layers)
