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
pytestmark = pytest.mark.trainers


@pytest.fixture
def run_example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a file as a program, in this process, and returns what it prints."""
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")

    def run(name: str, *tokens: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, tokens)])
        with warnings.catch_warnings(action="ignore"):
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


NUMBERS = re.compile(r"(\d+\.?\d*)%? before, (\d+\.?\d*)%? after(?:, (\d+\.?\d*))?")

# settings, and by how much what the example prints rises at least: a mean reward, otherwise percent
RISES: dict[str, tuple[str, float]] = {
    "grpo.py": ("--max-steps 50", 0.4),
    "vision_language.py": ("--max-steps 25", 50),
    "embedding.py": ("--max-steps 40", 50),
    "image_classification.py": ("--epochs 5", 30),
    "speech.py": ("--max-steps 60", 40),
}
# settings, and the share of the error before training that is left at most
FALLS: dict[str, tuple[str, float]] = {
    "diffusion.py": ("--max-steps 20", 0.8),
    "custom_module.py": ("--max-steps 150", 0.1),
}


def before_and_after(output: str) -> list[tuple[float, float]]:
    return [(float(before), float(after)) for before, after, _ in NUMBERS.findall(output)]


@pytest.mark.parametrize("name", RISES)
def test_an_example_gets_better_at_its_task(run_example: Callable[..., str], name: str, tmp_path: Path) -> None:
    settings, rise = RISES[name]
    output = run_example(name, "--output-dir", tmp_path, *settings.split())
    results = before_and_after(output)
    assert len(results) == (2 if name == "image_classification.py" else 1), output
    assert all(after > before + rise for before, after in results), output
    assert any(tmp_path.rglob("adapter_model.safetensors"))


@pytest.mark.parametrize("name", FALLS)
def test_an_example_lowers_its_error_and_others_compute_the_same(
    run_example: Callable[..., str], name: str, tmp_path: Path
) -> None:
    settings, share = FALLS[name]
    output = run_example(name, "--output-dir", tmp_path / "out", *settings.split())
    ((before, after),) = before_and_after(output)
    assert after < before * share, output
    elsewhere = float(NUMBERS.findall(output)[0][2])  # loaded by diffusers, or merged
    assert elsewhere == pytest.approx(after, abs=1e-3)


def test_many_adapters_trained_in_the_same_batches_end_like_each_alone(
    run_example: Callable[..., str], tmp_path: Path
) -> None:
    output = run_example("many_adapters.py", "--output-dir", tmp_path, "--adapters", 4, "--max-steps", 40)
    ((before, after),) = before_and_after(output)
    assert after > before + 50
    (difference,) = re.findall(r"largest difference (\S+)", output)
    assert float(difference) < 1e-3
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2", "3", "4"}


def test_the_example_of_transformers_runs(run_example: Callable[..., str], model_folder: Path, tmp_path: Path) -> None:
    given = ["--model", model_folder, "--output-dir", tmp_path, "--max-steps"]
    assert "\nheld-out loss " in run_example("transformers_trainer.py", *given, 4)
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_the_example_of_trl_runs(
    run_example: Callable[..., str], model_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    given = ["--model", model_folder, "--data", data_file, "--output-dir", tmp_path / "out", "--max-steps", 3]
    assert "\nloss " in run_example("trl_sft.py", *given)
    ids = torch.arange(12).view(2, 6)
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    expected = base(ids).logits
    loaded = LoRAModel.from_pretrained(base, tmp_path / "out")
    assert (loaded(ids).logits - expected).abs().max() > 1e-4
