"""The examples run, on tiny settings, and what they print shows that they work."""

import re
import runpy
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tailora import LoRAModel

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
pytestmark = pytest.mark.slow


@pytest.fixture
def run_example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a file as a program, in this process, and returns the last line that it prints."""
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")

    def run(name: str, *tokens: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, tokens)])
        with warnings.catch_warnings(action="ignore"):
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out.splitlines()[-1]

    return run


# what the example prints: a number before training and one after, and by how much it rises at least
RISING = {
    "grpo.py": 0.4,  # share of prompts
    "vision_language.py": 50,  # percent, as all below
    "embedding.py": 50,
}


@pytest.mark.parametrize("name", RISING)
def test_an_example_gets_better_at_its_task(run_example: Callable[..., str], name: str, tmp_path: Path) -> None:
    line = run_example(name, "--output-dir", tmp_path)
    before, after = re.findall(r"(\d+(?:\.\d+)?)%? before.* (\d+(?:\.\d+)?)%? after", line)[0]
    assert float(after) > float(before) + RISING[name], line
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_examples_are_short() -> None:
    assert all(len(file.read_text().splitlines()) <= 100 for file in EXAMPLES.glob("*.py"))


def test_the_example_of_transformers_runs(run_example: Callable[..., str], model_folder: Path, tmp_path: Path) -> None:
    given = ["--model", model_folder, "--output-dir", tmp_path, "--max-steps"]
    assert run_example("transformers_trainer.py", *given, 4).startswith("held-out loss ")
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_the_example_of_trl_runs(
    run_example: Callable[..., str], model_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    pytest.importorskip("trl", exc_type=ImportError)
    given = ["--model", model_folder, "--data", data_file, "--output-dir", tmp_path / "out", "--max-steps", 3]
    assert run_example("trl_sft.py", *given).startswith("loss ")
    ids = torch.arange(12).view(2, 6)
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    expected = base(ids).logits
    loaded = LoRAModel.from_pretrained(base, tmp_path / "out")
    assert (loaded(ids).logits - expected).abs().max() > 1e-4
