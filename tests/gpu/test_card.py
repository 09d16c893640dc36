"""On a GPU what a CPU gives: training, losses, adapters, quantised bases, memory.

`pytest -m gpu` runs it on a card, `pytest -m device` on the pretend accelerator (conftest.py).
"""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_actions import ACTIONS
from pretend_accelerator import no_float64
from tiny import chat_model
from torch.nn import functional as F
from transformers import AutoTokenizer

from tailora import LoRAConfig, LoRAModel
from tailora.kernels.loss import frozen_head, recomputed_head
from tailora.train import events
from tailora.train.memory import available_bytes, peak_bytes, reset_peak
from tailora.train.run_log import write_settings
from tailora.train.state import SubmittedStep
from tailora.train.trainer import Trainer, run

# ---- Training


@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True}, {"use_dora": True}], ids=str)
def test_a_run_ends_where_it_ends_on_a_cpu(
    device: torch.device, settings: Any, tmp_path: Path, changes: dict[str, Any]
) -> None:
    there = run(settings(num_train_epochs=2, device="cpu", output_dir=str(tmp_path / "cpu"), **changes))
    here = run(settings(num_train_epochs=2, device=str(device), **changes))
    assert here.eval_loss_before == pytest.approx(there.eval_loss_before, abs=1e-4)
    assert here.eval_loss_after == pytest.approx(there.eval_loss_after, abs=1e-3)
    assert 0 < here.peak_memory_bytes < available_bytes(device)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_run_in_16_bits_learns(device: torch.device, settings: Any, dtype: str) -> None:
    """In float16 with a loss scale."""
    result = run(settings(dtype=dtype, num_train_epochs=4, device=str(device)))
    assert result.eval_loss_after < result.eval_loss_before - 0.2


def test_a_resumed_run_goes_on_where_it_was(device: torch.device, settings: Any, tmp_path: Path) -> None:
    config = settings(max_steps=6, save_steps=3, output_dir=str(tmp_path / "whole"), device=str(device))
    whole = run(config)
    again = run(config.replaced(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3")))
    assert again.eval_loss_after == pytest.approx(whole.eval_loss_after, abs=1e-4)


def test_a_step_does_not_wait_for_the_device(
    device: torch.device, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a step queues makes no copy to the host that blocks and reads no value; the values are read afterwards."""
    module, step = torch.get_device_module(device), Trainer.step
    read_step, modes = Trainer.read_step, []

    def watched(self: Trainer, *arguments: Any) -> None:
        modes.append(module.set_sync_debug_mode("error"))
        try:
            step(self, *arguments)
        finally:
            module.set_sync_debug_mode("default")

    def reading(self: Trainer, submitted: SubmittedStep) -> None:  # it waits for an event, which is no error on CUDA
        module.set_sync_debug_mode("default")
        read_step(self, submitted)

    monkeypatch.setattr(Trainer, "step", watched)
    monkeypatch.setattr(Trainer, "read_step", reading)
    run(settings(max_steps=4, gradient_accumulation_steps=2, device=str(device)))
    assert len(modes) == 4


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_a_run_on_a_quantised_base_learns(
    cuda_or_cpu: torch.device, settings: Any, method: str, model_folder: Path, tmp_path: Path
) -> None:
    base = chat_model(vocab_size=320, hidden_size=64, intermediate_size=128, initializer_range=0.2)  # blocks of 64
    base.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(tmp_path / "base")
    config = settings(model=str(tmp_path / "base"), quantize=method, max_steps=6, device=str(cuda_or_cpu))
    result = run(config)
    assert result.eval_loss_after < result.eval_loss_before


def test_two_cards_train_the_adapter_that_one_does(
    two_cards: torch.device, settings: Any, make_settings: Any, tmp_path: Path
) -> None:
    """NCCL on cards, gloo on a CPU."""
    name = two_cards.type
    shared = {"num_train_epochs": 2, "per_device_train_batch_size": 3, "device": name}
    two = make_settings(output_dir=str(tmp_path / "two"), **shared)
    write_settings(tmp_path, two)
    ranks = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command = [*ranks, "-m", "tailora.cli", "train", "--config", str(tmp_path / "config.yaml")]
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert ended.returncode == 0, ended.stderr
    one = run(settings(gradient_accumulation_steps=2, **shared))
    record = json.loads((tmp_path / "two" / "run.json").read_text())
    assert record["processes"] == 2
    assert record["result"]["steps"] == one.steps
    assert record["result"]["eval_loss_after"] == pytest.approx(one.eval_loss_after, abs=1e-3)


# ---- Parts of a step


@pytest.mark.parametrize("form", ["frozen", "recomputed"])
def test_losses_and_gradients_are_torchs(device: torch.device, form: str) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(500, 64, device=device, requires_grad=True)
    weight, targets = torch.randn(1000, 64, device=device), torch.randint(1000, (500,), device=device)
    if form == "frozen":
        losses = frozen_head(hidden, targets, weight)
    else:
        losses = recomputed_head(hidden, targets, lambda rows: rows @ weight.T, 1000)
    expected = F.cross_entropy(hidden @ weight.T, targets, reduction="none")
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)
    (own,) = torch.autograd.grad(losses.sum(), hidden)
    (theirs,) = torch.autograd.grad(expected.sum(), hidden)
    torch.testing.assert_close(own, theirs, rtol=1e-3, atol=1e-3)


# ---- Adapters


def adapted(**settings: Any) -> LoRAModel:
    model = LoRAModel(chat_model(initializer_range=0.3), LoRAConfig(r=4, **settings), "a").eval()
    for layer in model.lora_layers.parameters():
        layer.data.normal_(std=0.3)
    return model


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_generates_and_merges_as_on_a_cpu(device: torch.device, dora: bool) -> None:
    model = adapted(use_dora=dora)
    ids = torch.randint(300, (2, 6))
    ask = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    there = model.generate(ids, attention_mask=torch.ones_like(ids), **ask)
    model.to(device)
    here = model.generate(ids.to(device), attention_mask=torch.ones_like(ids).to(device), **ask)
    assert here.tolist() == there.tolist()
    logits = model(input_ids=ids.to(device)).logits
    model.merge()
    torch.testing.assert_close(model(input_ids=ids.to(device)).logits, logits, rtol=1e-4, atol=1e-4)


def test_each_row_of_a_mixed_batch_is_what_its_adapter_alone_makes_of_it(device: torch.device) -> None:
    model = adapted()
    model.add_adapter("b", LoRAConfig(r=2))
    for layer in model.lora_layers.parameters():
        layer.data.normal_(std=0.3)
    model.set_adapter(["a", "b"])
    model.to(device)
    ids = torch.randint(300, (3, 6)).to(device)
    with torch.no_grad():
        with model.adapter_rows(["b", None, "a"]):
            together = model(input_ids=ids).logits
        with model.disable_adapter():
            torch.testing.assert_close(together[1], model(input_ids=ids).logits[1], rtol=1e-4, atol=1e-4)
        for row, name in ((0, "b"), (2, "a")):
            model.set_adapter(name)
            torch.testing.assert_close(together[row], model(input_ids=ids).logits[row], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("float64", [True, pytest.param(False, marks=pytest.mark.device)])
@pytest.mark.parametrize("name", ACTIONS)
def test_an_adapter_becomes_what_it_becomes_on_a_cpu(
    device: torch.device, name: str, float64: bool, tmp_path: Path
) -> None:
    """Starts from weights and from data, combining, shrinking, comparing; also without float64, as on Apple's GPUs."""
    torch.manual_seed(0)
    expected = ACTIONS[name](torch.device("cpu"), tmp_path / "cpu")
    torch.manual_seed(0)
    with nullcontext() if float64 else no_float64():
        actual = {key: value.cpu() for key, value in ACTIONS[name](device, tmp_path / "device").items()}
    assert actual.keys() == expected.keys()
    for key, value in actual.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=1e-4 if float64 else 1e-5)


# ---- Memory


def test_memory_that_torch_keeps_for_later_counts_as_free(device: torch.device) -> None:
    before = available_bytes(device)
    large = torch.empty(1 << 28, dtype=torch.uint8, device=device)
    assert available_bytes(device) <= before - large.numel() / 2
    del large
    assert available_bytes(device) == pytest.approx(before, rel=0.05)
    reset_peak(device)
    assert peak_bytes(device) < 1 << 28


def test_a_header_names_the_card(device: torch.device, settings: Any) -> None:
    seen: list[events.Event] = []
    run(settings(max_steps=1, device=str(device)), seen.append)
    (header,) = (event.header for event in seen if isinstance(event, events.Prepared))
    assert header["device"] == str(device)
