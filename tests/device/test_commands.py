"""Every command that loads a model runs on the device, and gives what it gives on the CPU."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pretend_accelerator import counted

from tailora.cli.main import main

pytestmark = pytest.mark.device
SETTINGS = (
    "--learning-rate 1e-2 --metric-examples 0 --r 2 --validation-split 0.3 --dtype float32 --max-steps 4 --save-steps 2"
)


def train(top: Path, out: str, *more: str) -> list[str]:
    """Returns a command line that trains the model in the folder."""
    paths = ["--model", str(top / "model"), "--data", str(top / "chats.jsonl"), "--output-dir", str(top / out)]
    return ["train", *paths, *SETTINGS.split(), *more]


def adapter(top: Path, out: str) -> bytes:
    return (top / out / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def folder(
    device: torch.device,  # noqa: ARG001
    model_folder: Path,
    data_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A model, data, a run on the CPU, and the tuned model, in a folder."""
    top = tmp_path_factory.mktemp("commands")
    shutil.copytree(model_folder, top / "model")
    shutil.copy(data_file, top / "chats.jsonl")
    assert main(train(top, "run", "--device", "cpu")) == 0
    assert main(["export", f"{top}/run", "--to", "merged", "--output", f"{top}/merged"]) == 0
    return top


def layers(result: dict[str, Any]) -> object:
    return {path: layer["rank"] for path, layer in result["layers"].items()}


# command -> its arguments, and the part of its JSON that is compared
COMMANDS: dict[str, tuple[str, Callable[[dict[str, Any]], object]]] = {
    "predict": ("{top}/run --prompt 3:red --max-new-tokens 5", lambda result: result["predictions"]),
    "eval": (
        "{top}/run --data {top}/chats.jsonl --dtype float32",
        lambda result: [result[name]["loss"]["value"] for name in ("metrics", "base")],
    ),
    "inspect": (
        "{top}/run --model {top}/model --data {top}/chats.jsonl",
        lambda result: [module["singular_values"][0] for module in result["modules"]],
    ),
    "shrink": ("--adapter {top}/run --energy 0.5 --output-dir {top}/small-{device}", layers),
    "combine": ("--adapter a={top}/run --method svd --output-dir {top}/one-{device}", layers),
    "extract": ("--model {top}/model --tuned {top}/merged --r 2 --output-dir {top}/out-{device}", layers),
    "export": (
        "{top}/run --to merged --output {top}/merged-{device} --dtype float32",
        lambda result: [result["logits"]["effect"]],
    ),
}
EXACT = {"predict", "shrink", "combine", "extract"}  # commands whose results are compared exactly


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_gives_on_the_device_what_it_gives_on_the_cpu(
    command: str, folder: Path, device: torch.device, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, compared = COMMANDS[command]
    results = []
    for name in ("cpu", device.type):
        capsys.readouterr()
        with counted() as counts:
            assert main([command, *arguments.format(top=folder, device=name).split(), "--device", name, "--json"]) == 0
        shown = capsys.readouterr()
        assert f"device: {name}" in shown.err
        assert (counts.kernels.total() > 0) == (name != "cpu")
        results.append(compared(json.loads(shown.out.splitlines()[-1])))
    on_cpu, on_device = results
    assert on_device == (on_cpu if command in EXACT else pytest.approx(on_cpu, rel=1e-3))


def test_a_run_names_its_device(folder: Path, device: torch.device) -> None:
    assert main(train(folder, "whole", "--device", device.type)) == 0
    record = json.loads((folder / "whole" / "run.json").read_text())
    assert (record["device"], record["device_name"]) == (str(device), "pretend accelerator")
    assert record["machine"]["gpus"] == ["pretend accelerator"]


def test_a_run_on_the_cpu_stays_there_whatever_the_default_device(folder: Path, device: torch.device) -> None:
    with torch.device(device):
        assert main(train(folder, "cpu", "--device", "cpu")) == 0
    assert adapter(folder, "cpu") == adapter(folder, "run")
