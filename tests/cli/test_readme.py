"""What README.md promises, run."""

import re
import shutil
from pathlib import Path

import pytest
import torch

from tailora.cli.main import COMMANDS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_eight_lines_of_python_train_and_save(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    shutil.copytree(tiny_model, tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)
    ids = torch.arange(8).reshape(2, 4)
    found = {"batches": [{"input_ids": ids, "labels": ids}] * 2}
    exec(code, found)
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").exists()
    assert sum(bool(line) for line in code.splitlines()) == 8


def test_every_command_is_in_the_table() -> None:
    assert set(re.findall(r"^\| `tailora (\w+)", README, flags=re.MULTILINE)) == set(COMMANDS)
