"""What README.md shows is what there is."""

import re
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tailora.cli.main import COMMANDS

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_eight_lines_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert sum(bool(line.strip()) for line in code.splitlines()) == 8
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 1}
    base_model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=40))
    before = {name: value.clone() for name, value in base_model.state_dict().items()}
    ids = torch.arange(12).view(2, 6)
    exec(code, {"base_model": base_model, "batches": [{"input_ids": ids, "labels": ids}] * 2})
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").exists()
    assert all(torch.equal(value, before[name]) for name, value in base_model.state_dict().items())


def test_the_figures_are_the_script_s() -> None:
    for name in ("demo-output", "table"):
        (content,) = re.findall(f"<!-- measured:{name} -->(.*?)<!-- /measured:{name} -->", README, re.DOTALL)
        assert content.strip(), f"run benchmarks/readme.py: {name} is empty"


def test_every_command_is_in_the_table() -> None:
    assert set(re.findall(r"^\| `tailora (\w+)", README, re.MULTILINE)) == set(COMMANDS)
