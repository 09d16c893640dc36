"""Gradient checkpointing: which layers compute again in the backward."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from tailora.train import events
from tailora.train.trainer import run

LAYERS = 4


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """Without dropout, so that all layers could be skipped or repeated unnoticed by the losses."""
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 320, "n_embd": 32, "n_layer": LAYERS, "n_head": 4}
    dropout: dict[str, Any] = {"attn_pdrop": 0, "resid_pdrop": 0, "embd_pdrop": 0}
    GPT2LMHeadModel(GPT2Config(**sizes, **dropout, bos_token_id=0, eos_token_id=0)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("fast", ["auto", "off"])
def test_layers_below_the_first_adapted_one_compute_once_and_the_others_twice(
    settings: Any, gpt2: Path, fast: str
) -> None:
    calls = [0] * LAYERS
    calls_after_step: list[list[int]] = []

    def count(place: int) -> None:
        calls[place] += 1

    def add_hooks(model: Any, *_: Any) -> None:
        layers = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
        for place, layer in enumerate(layers):
            layer.ln_1.register_forward_pre_hook(lambda *_, place=place: count(place))

    def note(event: events.Event) -> None:
        if isinstance(event, events.Stepped):
            calls_after_step.append(list(calls))

    adapted = {"layers_to_transform": [2, 3], "gradient_checkpointing": True, "max_steps": 4}
    run(settings(model=str(gpt2), fast=fast, **adapted), on_event=note, on_ready=add_hooks)
    per_step = [[after - before for before, after in zip(*pair, strict=True)] for pair in pairwise(calls_after_step)]
    assert per_step == [[1, 1, 2, 2]] * 3
