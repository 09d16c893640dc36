"""The base model of an adapter: which one it is, and how it is quantized."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import check_refused, found, output
from tiny import stirred_model
from transformers import LlamaForCausalLM

from tailora import LoRAConfig, LoRAModel
from tailora.cli.flags import merge_settings
from tailora.cli.main import main
from tailora.cli.models import base_model_name, load_model, parse_adapters, quantize_method
from tailora.core.device import device_name
from tailora.core.quantization import quantized_layers
from tailora.errors import ConfigError


def run_folder(folder: Path, content: Any) -> Path:
    (folder / "adapter").mkdir(parents=True)
    (folder / "run.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder / "adapter"


def test_the_base_is_quantised_as_the_run_did(tmp_path: Path) -> None:
    nf4 = run_folder(tmp_path / "one", {"settings": {"quantize": "nf4"}})
    plain = run_folder(tmp_path / "two", {"settings": {}})
    broken = [run_folder(tmp_path / str(i), content) for i, content in enumerate(["{", "[]", {"settings": 3}])]
    assert quantize_method([nf4], None) == "nf4"
    assert quantize_method([nf4], "none") is None
    assert quantize_method([nf4, plain], "int8") == "int8"
    assert quantize_method([], None) is None
    assert all(quantize_method([folder], None) is None for folder in [plain, *broken])
    with pytest.raises(ConfigError, match="set --quantize to a method or none"):
        quantize_method([nf4, plain], None)


def test_a_run_that_has_not_finished_is_named_as_the_reason(tmp_path: Path) -> None:
    shutil.move(run_folder(tmp_path / "demo", {"settings": {}}), tmp_path / "elsewhere")
    for command in (["predict", "--prompt", "hi", "--adapter"], ["eval", "--data", "demo"], ["inspect"]):
        message = check_refused(
            "contains no adapter, because its run has not finished. no ch", *command, tmp_path / "demo"
        )
        assert "base model" not in message
    (tmp_path / "demo" / "checkpoint-3").mkdir()
    with pytest.raises(ConfigError, match=r"(?s)the last checkpoint is .*--resume-from-checkpoint \S+checkpoint-3"):
        parse_adapters([str(tmp_path / "demo")])


@pytest.mark.slow
def test_predict_and_export_take_the_quantization_of_the_run(
    tiny_model: Path, chats: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    data = ["--data", str(chats), "--validation-split", "0.2", "--max-steps", "2", "--metric-examples", "0"]
    assert main(["train", "--model", str(tiny_model), *data, "--quantize", "int8", "--output-dir", str(out)]) == 0
    shown = capfd.readouterr().err
    assert "linear layers in int8" in " ".join(shown.split())
    assert "MatMul8bitLt" not in shown
    assert "Failed to load" not in shown
    assert quantized_layers(load_model(str(tiny_model), parse_adapters([str(out)])).model)
    assert not quantized_layers(load_model(str(tiny_model), parse_adapters([str(out)]), quantize="none").model)

    asked = ["predict", "--model", str(tiny_model), "--adapter", str(out), "--prompt", "hello", "--json"]
    assert main([*asked, "--max-new-tokens", "3"]) == 0
    assert json.loads(capfd.readouterr().out)["adapters"] == ["run"]
    assert main([*asked, "--quantize", "nf5"]) == 2
    assert "did you mean nf4" in capfd.readouterr().err

    changes = []  # a merge is into the base that the run had
    for quantize in ([], ["--quantize", "none"]):
        folder = str(tmp_path / f"merged{len(changes)}")
        merge = ["export", str(out), "--to", "merged", "--output", folder, "--no-verification-file", "--json"]
        assert main([*merge, *quantize]) == 0
        changes.append(json.loads(capfd.readouterr().out)["changes"])
    assert list(map(len, changes)) == [2, 1]


def test_the_demo_is_called_demo_where_tailora_takes_the_name_and_has_its_path_elsewhere(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TAILORA_HOME", str(tmp_path / "home"))
    folder = tmp_path / "home" / "demo-1" / "SmolLM2-135M-Instruct"
    shutil.copytree(tiny_model, folder)
    model = stirred_model(LlamaForCausalLM.from_pretrained(folder), LoRAConfig(r=2))
    model.save_adapter(tmp_path / "run" / "adapter")
    run = str(tmp_path / "run")
    shown = {}
    for name, command in {
        "inspect": ["inspect", run],
        "peft": ["export", run, "--to", "peft", "--output", str(tmp_path / "peft")],
        "mlx": ["export", run, "--to", "mlx", "--output", str(tmp_path / "mlx")],
    }.items():
        shown[name] = output(*command)
    assert "made for demo. " in shown["inspect"]
    assert "Add --model demo to see" in shown["inspect"]
    assert "tailora chat --model demo --adapter" in shown["peft"]
    assert "With the exported files, the logits are equal to the live model's (" in shown["peft"]
    assert f"mlx_lm.server --model {folder} --adapter-path" in shown["mlx"]


@pytest.fixture
def project(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with `models/base` and `run/adapter`, which names its base by this relative path."""
    project = tmp_path / "project"
    shutil.copytree(tiny_model, project / "models" / "base")
    monkeypatch.chdir(project)
    model = LoRAModel(LlamaForCausalLM.from_pretrained("models/base"), LoRAConfig(r=2))
    model.save_adapter("run/adapter")
    return project


SHORT = ["--max-new-tokens", "2", "--prompt", "hello"]


@pytest.mark.usefixtures("project")
def test_predict_loads_the_base_that_the_adapter_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "--adapter", "run", *SHORT, "--device", "cpu", "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["model"] == "models/base"
    assert "note: the base model is models/base, as recorded in run/adapter; use --model to change it" in shown.err
    assert f"device: cpu, {device_name(torch.device('cpu'))}" in shown.err


def test_a_relative_base_is_found_from_any_folder(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert found("predict", "--adapter", project / "run", *SHORT)["model"] == str(project / "models" / "base")
    moved = project.rename(tmp_path / "moved")
    monkeypatch.chdir(moved)
    assert base_model_name(None, [moved / "run" / "adapter"]) == "models/base"


@pytest.mark.parametrize("command", ["predict", "eval", "train"])
def test_every_command_says_where_the_name_of_a_missing_base_is_from(
    command: str, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree("models")
    out = ["--output-dir", "out"]
    tokens = {
        "predict": ["--adapter", "run", *SHORT],
        "eval": ["run", "--data", "demo"],
        "train": ["--adapter", "run/adapter", *out],
    }
    assert main([command, *tokens[command]]) == 2
    told = capsys.readouterr().err
    assert f"run/adapter names the base model models/base ({project / 'models' / 'base'}); set --model" in told
    assert not Path("out").exists()


@pytest.mark.usefixtures("project")
def test_training_an_adapter_further_takes_its_base(tmp_path: Path) -> None:
    assert merge_settings({"adapter": "run/adapter"}, None).model == "models/base"
    assert merge_settings({"adapter": "run/adapter", "model": "other"}, None).model == "other"
    (tmp_path / "run.yaml").write_text("adapter: run/adapter\nmodel: third")
    assert merge_settings(None, tmp_path / "run.yaml").model == "third"
    assert merge_settings({"adapter": "run/adapter"}, None, defaults={"model": "demo"}).model == "demo"
    assert base_model_name(None, []) == "demo"  # without an adapter


COMMANDS_WITH_A_DEVICE = {
    "train": ["--model", "{model}", "--data", "{data}", "--output-dir", "{out}"],
    "plan": ["--model", "{model}"],
    "predict": ["--adapter", "{adapter}", "--prompt", "hello"],
    "inspect": ["{adapter}", "--model", "{model}"],
    "extract": ["--model", "{model}", "--tuned", "{model}", "--r", "1", "--output-dir", "{out}"],
    "export": ["{adapter}", "--to", "peft", "--output", "{out}"],
}


def test_a_device_that_is_not_here_is_refused_before_anything_is_written(
    tiny_model: Path, chats: Path, tmp_path: Path
) -> None:
    adapter, out = tmp_path / "adapter", tmp_path / "out"
    LoRAModel(LlamaForCausalLM.from_pretrained(tiny_model), LoRAConfig(r=2)).save_adapter(adapter)
    paths = {"model": tiny_model, "data": chats, "adapter": adapter, "out": out}
    for command, words in COMMANDS_WITH_A_DEVICE.items():
        arguments = [word.format(**paths) for word in words]
        check_refused("no device 'xpu:7' on this machine; torch", command, *arguments, "--device", "xpu:7")
        assert not out.exists() or not list(out.rglob("*.*"))
