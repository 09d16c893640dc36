"""benchmarks/gpu.py with tiny shapes: every cell gives figures, one that fails leaves its reason, tables are made."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu
from benchmarks.site import device_tables
from benchmarks.speed import gpu_cells as cells

# of PEFT, with transformers 5.24
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    cells.model(torch.device("cpu"), tmp_path, "tiny")
    return tmp_path


def reported(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for line in capsys.readouterr().out.splitlines():
        if line.startswith("{"):
            gpu.merge(result, json.loads(line))
    return result


def as_text(cell: dict[str, Any], result: dict[str, Any]) -> str:
    device = {"type": "cpu", "name": "a card", "memory_bytes": 2**34, "cuda": "12.8", "hip": None, "dtype": "bfloat16"}
    contents = {"machine": {"packages": {"torch": "2.13"}}, "device": device, "shape": "tiny"}
    return str(device_tables.devices([{**contents, "cells": [{"cell": cell, "result": result}]}]))


@pytest.mark.trainers
def test_decoding(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells.decode(torch.device("cpu"), folder, "tiny", rows=2, new_tokens=3)
    result = reported(capsys)
    arms = ["base", "tailora", "tailora, DoRA", "tailora, merged", "PEFT", "PEFT, DoRA"]
    assert [name for name, arm in result.items() if isinstance(arm, dict)] == arms
    assert all(len(result[arm]["first"]) == len(result[arm]["next"]) == 3 for arm in arms)
    assert "| tailora, DoRA | " in as_text({"what": "decode", "model": "tiny", "rows": 2}, result)


@pytest.mark.trainers
def test_training_in_turn(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    arms = {"PEFT + Trainer": ("trainer", {}), "wrong": ("tailora", {"lora_alpha": -1})}
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    task = cells.task_of(folder, "tiny", 64, 16)
    cells.train_in_turn(torch.device("cpu"), folder, [task], arms, steps=1, rounds=2)
    result = reported(capsys)
    trained, wrong = result["16"]["PEFT + Trainer"], result["16"]["wrong"]
    assert len(trained["seconds"]) == 2
    assert trained["tokens_per_second"] > 0
    assert "lora_alpha" in wrong["failed"]
    text = as_text({"what": "train", "model": "tiny", "tokens": 64}, result)
    assert "tiny, 64 tokens a step in documents of 16" in text
    assert "lora_alpha" in text


def test_without_results_the_page_says_so() -> None:
    assert "has never run on a GPU" in device_tables.devices([])
    assert cells.SHAPES["8B"].hidden == 4096
