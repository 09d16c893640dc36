"""`tailora export`."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import stir
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from tailora import LoRAConfig, LoRAModel
from tailora.cli.main import main

IDS = torch.arange(20).view(2, 10)


@pytest.fixture
def run(tiny_model: Path, tmp_path: Path) -> Path:
    """A run's folder, whose adapter names its base."""
    base = LlamaForCausalLM.from_pretrained(tiny_model)
    model = LoRAModel(base, LoRAConfig(r=4, use_rslora=True))
    stir(model)
    model.save_adapter(tmp_path / "run" / "adapter")
    return tmp_path / "run"


@pytest.mark.parametrize("to", ["peft", "portable", "gguf", "mlx", "merged"])
def test_every_format_with_its_figures_and_the_next_command(
    to: str, run: Path, tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(run), "--to", to, "--output", str(tmp_path / "a"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["format"] == to
    assert found["model"] == str(tiny_model)
    assert found["logits"]["difference"] <= found["logits"]["tolerance"] < found["logits"]["effect"]
    assert found["files"] == {path.name: path.stat().st_size for path in (tmp_path / "a").iterdir()}
    assert main(["export", str(run), "--to", to, "--output", str(tmp_path / "b")]) == 0
    shown = capsys.readouterr()
    assert re.search(r"Read back: the logits (are equal to|differ by \S+ of their size from) the live", shown.out)
    programs = {"peft": "tailora", "portable": "vllm", "gguf": "ollama", "mlx": "mlx_lm.generate", "merged": "tailora"}
    assert re.search(rf"^{programs[to]} .*{re.escape(str(tmp_path / 'b'))}", shown.out, re.MULTILINE)
    assert ("llama-cli -m BASE.gguf --lora" in shown.out) == (to == "gguf")
    assert ("convert_hf_to_gguf.py" in shown.out) == (to == "gguf")
    assert ('"rope_theta"' in shown.out) == (to == "mlx")
    what_to_do = shown.out.find("before mlx-lm is used" if to == "mlx" else "To use it:")
    assert shown.out.index("Read back: the logits") < what_to_do <= shown.out.index("To use it:")
    assert "it/s" not in shown.err


def test_a_merged_model_answers_without_tailora(run: Path, tmp_path: Path, tiny_model: Path) -> None:
    assert main(["export", str(run), "--to", "merged", "--output", str(tmp_path / "out")]) == 0
    live = LoRAModel.from_pretrained(LlamaForCausalLM.from_pretrained(tiny_model), run / "adapter").eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(merged(IDS).logits, live(IDS).logits, rtol=1e-4, atol=1e-4)
    chat = [{"role": "user", "content": "hello"}]
    own, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "out", tiny_model))
    assert own.apply_chat_template(chat) == theirs.apply_chat_template(chat)


@pytest.mark.parametrize(
    ("tokens", "code", "hint"),
    [
        (["RUN", "--to", "ggml"], 2, "--to ggml: give one of peft, portable, gguf, mlx, merged; did you mean"),
        (["RUN", "--to", "gguf", "--output", "OUT"], 2, "exists already and holds mine.txt; replaced are only"),
        (["RUN", "--to", "gguf", "--output", "RUN"], 2, "exists already and holds adapter; replaced are only"),
        (["RUN", "--to", "gguf", "--output", "RUN/adapter"], 2, "exists already and holds what this command reads"),
        (["absent", "--to", "gguf"], 2, "absent is not a folder"),
        (["NAMELESS", "--to", "gguf"], 2, "does not name its base model in adapter_config.json: give --model"),
        (["RUN", "--to", "gguf", "--model", "absent"], 2, "no such folder here"),
        (["RUN"], 2, "--to"),
    ],
)
def test_mistakes(
    tokens: list[str], code: int, hint: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "nameless").mkdir()
    places = {"OUT": str(tmp_path / "full"), "NAMELESS": str(tmp_path / "nameless")}
    given = [token.replace("RUN", str(run)) if "RUN" in token else places.get(token, token) for token in tokens]
    given += [] if "--output" in given else ["--output", str(tmp_path / "out")]
    assert main(["export", *given]) == code
    shown = capsys.readouterr().err
    assert hint in shown
    assert "--overwrite" not in shown
    assert not (tmp_path / "out").exists()
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]


def test_overwrite_replaces_an_exported_adapter(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["export", str(run), "--to", "gguf", "--output", str(out)]) == 0
    assert main(["export", str(run), "--to", "mlx", "--output", str(out)]) == 2
    assert "replace it (--overwrite)" in capsys.readouterr().err
    assert main(["export", str(run), "--to", "mlx", "--output", str(out), "--overwrite"]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["adapter_config.json", "adapters.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


def test_overwrite_never_deletes_what_is_no_exported_adapter(
    run: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / "run.json").write_text("{}")
    model, mine = tmp_path / "model", tmp_path / "mine"
    shutil.copytree(tiny_model, model)
    shutil.copytree(run / "adapter", mine)
    (mine / "notes.txt").touch()
    source = tmp_path / "source"
    shutil.copytree(run / "adapter", source)
    for adapter, folder, problem in [
        (run, model, "holds chat_template.jinja, config.json, "),
        (run, mine, "holds notes.txt; replaced are only adapter_model.safetensors, adapter_config.json"),
        (run, copy, "holds adapter, run.json; "),
        (run, copy / "adapter", "is the adapter of a run"),
        (source, source, "holds what this command reads"),
        (source / "adapter_model.safetensors", source, "holds what this command reads"),
    ]:
        before = sorted(folder.rglob("*"))
        assert main(["export", str(adapter), "--to", "peft", "--output", str(folder), "--overwrite"]) == 2
        assert problem in capsys.readouterr().err
        assert sorted(folder.rglob("*")) == before


def test_a_lora_file_of_another_tool_becomes_a_peft_folder_and_answers(
    run: Path, tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    flat = {
        f"lora_te_{key[len('base_model.model.') : -len('.lora_A.weight')].replace('.', '_')}.lora_{slot}.weight": value
        for key, value in tensors.items()
        for slot in [{"A": "down", "B": "up"}[key[-len("A.weight")]]]
    }
    file = tmp_path / "style.safetensors"
    save_file(flat, file)
    said = []
    assert main(["export", str(file), "--model", str(tiny_model), "--to", "peft", "--output", str(tmp_path / "p")]) == 0
    capsys.readouterr()
    for adapter in (file, tmp_path / "p"):
        tokens = ["--model", str(tiny_model), "--adapter", str(adapter), "--prompt", "a", "--max-new-tokens", "4"]
        assert main(["generate", *tokens, "--json"]) == 0
        said.append(json.loads(capsys.readouterr().out))
    assert [each["adapters"] for each in said] == [["style"], ["p"]]
    assert [each["text"] for each in said[0]["answers"]] == [each["text"] for each in said[1]["answers"]]


def test_what_a_format_cannot_hold_exits_with_2(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = LlamaForCausalLM.from_pretrained(tiny_model)
    model = LoRAModel(base, LoRAConfig(r=4, modules_to_save=["lm_head"]))
    stir(model)
    model.save_adapter(tmp_path / "adapter")
    tokens = ["export", str(tmp_path / "adapter"), "--to", "gguf", "--output", str(tmp_path / "out"), "--json"]
    assert main(tokens) == 2
    said = json.loads(capsys.readouterr().out)["error"]
    assert said["type"] == "FormatError"
    assert 'modules_to_save: lm_head were trained in full; export to "merged"' in said["message"]
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    assert main(["export", str(run), "--to", "gguf", "--output", str(tmp_path / "file" / "out")]) == 1
    assert "is a file, not a folder" in capsys.readouterr().err
