"""On a GPU what a CPU gives. Run by `pytest -m gpu`; elsewhere skipped."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PretrainedConfig

from tailora import LoRAConfig, LoRAModel
from tailora.kernels.attention import packed_rows
from tailora.kernels.loss import frozen_head, recomputed_head
from tailora.train.config import TrainConfig
from tailora.train.memory import available_bytes, peak_bytes, reset_peak
from tailora.train.trainer import run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]
DEVICE = torch.device("cuda")
SIZES = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2}
LENGTHS = [7, 1, 12, 3]


def result_on_cpu(config: TrainConfig, folder: Path) -> dict[str, Any]:
    """The same run in a process that is kept off the GPU."""
    settings = config.replaced(output_dir=str(folder)).model_dump_json()
    code = "import sys; from tailora.train.config import TrainConfig; from tailora.train.trainer import run; "
    code += "run(TrainConfig.model_validate_json(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, settings], env={**os.environ, "ACCELERATE_USE_CPU": "1"}, check=True)
    record: dict[str, Any] = json.loads((folder / "run.json").read_text())["result"]
    return record


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_run_ends_where_it_ends_on_a_cpu(settings: Any, tmp_path: Path, checkpointed: bool) -> None:
    config = settings(num_train_epochs=2, gradient_checkpointing=checkpointed)
    there = result_on_cpu(config, tmp_path / "cpu")
    here = run(config)
    assert here.eval_loss_before == pytest.approx(there["eval_loss_before"], abs=1e-4)
    assert here.eval_loss_after == pytest.approx(there["eval_loss_after"], abs=1e-3)
    assert 0 < here.peak_memory_bytes < available_bytes(DEVICE)


def test_a_run_in_bfloat16_learns(settings: Any) -> None:
    result = run(settings(dtype="bfloat16", num_train_epochs=4))
    assert result.eval_loss_after < result.eval_loss_before - 0.2


def test_a_resumed_run_goes_on_where_it_was(settings: Any, tmp_path: Path) -> None:
    config = settings(max_steps=6, save_steps=3, output_dir=str(tmp_path / "whole"))
    whole = run(config)
    again = run(config.replaced(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3")))
    assert again.eval_loss_after == pytest.approx(whole.eval_loss_after, abs=1e-4)


@pytest.mark.parametrize(
    "config", [LlamaConfig(**GROUPED), MistralConfig(**GROUPED, sliding_window=5)], ids=["grouped", "sliding window"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_documents_have_the_logits_that_they_have_alone(config: PretrainedConfig, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().to(DEVICE, dtype)
    documents = [torch.randint(300, (length,), device=DEVICE) for length in LENGTHS]
    alone = torch.cat([model(document[None], use_cache=False).logits[0] for document in documents])
    ends = torch.tensor([0, *LENGTHS]).cumsum(0)
    positions = torch.cat([torch.arange(length, device=DEVICE) for length in LENGTHS])
    with packed_rows(model):
        together = model(torch.cat(documents)[None], position_ids=positions[None], cu_seq_lens_q=ends, use_cache=False)
    apart = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(together.logits[0], alone, rtol=apart, atol=apart)


@pytest.mark.parametrize("form", ["frozen", "recomputed"])
def test_losses_and_gradients_are_torchs(form: str) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(500, 64, device=DEVICE, requires_grad=True)
    weight, targets = torch.randn(1000, 64, device=DEVICE), torch.randint(1000, (500,), device=DEVICE)
    if form == "frozen":
        losses = frozen_head(hidden, targets, weight)
    else:
        losses = recomputed_head(hidden, targets, lambda rows: rows @ weight.T, 1000)
    expected = F.cross_entropy(hidden @ weight.T, targets, reduction="none")
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)
    (own,) = torch.autograd.grad(losses.sum(), hidden)
    (theirs,) = torch.autograd.grad(expected.sum(), hidden)
    torch.testing.assert_close(own, theirs, rtol=1e-3, atol=1e-3)


def test_an_adapter_generates_and_merges_as_on_a_cpu() -> None:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(LlamaConfig(**GROUPED)).eval()
    model = LoRAModel(base, LoRAConfig(r=4)).eval()
    for layer in model.lora_layers.parameters():
        layer.data.normal_(std=0.1)
    ids = torch.randint(300, (2, 6))
    ask = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    there = model.generate(ids, attention_mask=torch.ones_like(ids), **ask)
    model.to(DEVICE)
    here = model.generate(ids.to(DEVICE), attention_mask=torch.ones_like(ids).to(DEVICE), **ask)
    assert here.tolist() == there.tolist()
    logits = model(input_ids=ids.to(DEVICE)).logits
    model.merge()
    torch.testing.assert_close(model(input_ids=ids.to(DEVICE)).logits, logits, rtol=1e-4, atol=1e-4)


def test_memory_that_torch_keeps_for_later_counts_as_free() -> None:
    before = available_bytes(DEVICE)
    large = torch.empty(1 << 28, dtype=torch.uint8, device=DEVICE)
    assert available_bytes(DEVICE) <= before - large.numel() / 2
    del large
    assert available_bytes(DEVICE) == pytest.approx(before, rel=0.05)
    reset_peak(DEVICE)
    assert peak_bytes(DEVICE) < 1 << 28
