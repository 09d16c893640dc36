"""Full fine-tuning, the control: all weights, the same loop, float32 masters of 16-bit weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import token_losses
from transformers import AutoModelForCausalLM, AutoTokenizer

from tailora.data.dataset import Example
from tailora.train.config import TrainConfig
from tailora.train.loss import BatchLayout, evaluate
from tailora.train.model_loading import load_base
from tailora.train.trainable import FullModel, trained_module
from tailora.train.trainer import run

Settings = Callable[..., TrainConfig]
PADDED = BatchLayout(False, "from the model's own logits", 0)
FULL: dict[str, Any] = {"method": "full", "learning_rate": 1e-3, "num_train_epochs": 3}


@pytest.fixture
def full(settings: Settings) -> Settings:
    def make(**changes: Any) -> TrainConfig:
        return TrainConfig(**{**settings().model_dump(exclude={"r"}, exclude_unset=True), **FULL, **changes})

    return make


def loaded(folder: Path, dtype: str) -> FullModel:
    base, tokenizer = load_base(str(folder), dtype)
    return FullModel(base, tokenizer, lambda: load_base(str(folder), dtype)[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gradients_are_those_of_the_plain_model(model_folder: Path, dtype: str) -> None:
    model = loaded(model_folder, dtype)
    plain = load_base(str(model_folder), dtype)[0]
    ids = np.arange(20, dtype=np.int32)
    losses, _ = token_losses(model, [Example.of_text(ids)], PADDED)
    losses.sum().backward()
    tokens = torch.arange(20)[None]
    (plain(input_ids=tokens, labels=tokens).loss * 19).backward()
    for name, weight in plain.named_parameters():
        master = model.trained[name.replace(".", "/")]
        assert master.dtype == torch.float32
        rtol, atol = (2e-2, 1e-2) if dtype == "bfloat16" else (1e-4, 1e-5)
        torch.testing.assert_close(master.grad, weight.grad.float(), rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.exhaustive), "bfloat16"])
def test_a_run_improves_the_model_and_leaves_a_folder_that_transformers_reads(
    full: Settings, model_folder: Path, dtype: str
) -> None:
    result = run(full(dtype=dtype))
    assert result.eval_loss_after < result.eval_loss_before - 0.1
    assert result.trainable_parameters == result.total_parameters
    folder = Path(result.output_dir) / "model"
    assert AutoTokenizer.from_pretrained(folder).chat_template
    tuned, base = (AutoModelForCausalLM.from_pretrained(path, dtype="auto") for path in (folder, model_folder))
    ids = torch.arange(12)[None]
    with torch.no_grad():
        trained = result.model.eval()
        torch.testing.assert_close(tuned(ids).logits, trained(ids.to(trained.device)).logits.cpu(), rtol=0, atol=0)
    for name, weight in base.named_parameters():
        assert not torch.equal(weight.to(tuned.dtype), tuned.get_parameter(name))


def test_masters_keep_the_steps_that_16_bits_lose(full: Settings) -> None:
    result = run(full(dtype="bfloat16", learning_rate=1e-6, max_steps=3))
    model = result.model
    assert isinstance(model, FullModel)
    name = "model.layers.0.mlp.up_proj.weight"
    master, weight = trained_module(model).get_parameter(name.replace(".", "/")), model.base_model.get_parameter(name)
    now = weight.detach().clone()
    with model.disable_adapter():
        before = weight.detach().clone()
    assert (now != before).float().mean() < 0.05  # only weights near 0 have bits small enough
    assert (master != before).float().mean() > 0.95


def test_the_base_is_back_within_the_block(full: Settings) -> None:
    result = run(full())
    model = result.model
    assert result.data is not None
    assert result.before is not None
    assert result.after is not None
    judged: dict[str, Any] = {"examples": result.data.eval, "layout": PADDED, "token_budget": 256}
    with model.disable_adapter():
        np.testing.assert_allclose(evaluate(model, **judged).sums, result.before.sums, rtol=1e-4)
    np.testing.assert_allclose(evaluate(model, **judged).sums, result.after.sums, rtol=1e-4)


def test_a_resumed_run_is_the_run_to_the_bit(full: Settings, tmp_path: Path) -> None:
    common = {"dtype": "bfloat16", "max_steps": 6, "save_steps": 3, "eval_steps": 2}
    whole = run(full(output_dir=str(tmp_path / "whole"), **common))
    checkpoint = str(tmp_path / "whole" / "checkpoint-3")
    resumed = run(full(output_dir=str(tmp_path / "again"), resume_from_checkpoint=checkpoint, **common))
    for name, weight in trained_module(whole.model).state_dict().items():
        assert torch.equal(weight, trained_module(resumed.model).state_dict()[name]), name
    assert resumed.eval_loss_after == whole.eval_loss_after


def test_the_gradients_of_several_backwards_add_up_in_the_masters(model_folder: Path) -> None:
    base, tokenizer = load_base(str(model_folder), "bfloat16")
    model = FullModel(base, tokenizer, lambda: base)
    weight = base.get_input_embeddings().weight
    ((master, _),) = [(model.trained[name], name) for name in model.trained if "embed_tokens" in name]
    for factor in (1.0, 2.0):
        (weight * factor).sum().backward()
    assert master.grad is not None
    assert (master.grad == 3.0).all()
    assert weight.grad is None
