"""`--quantize` of `train`, and what `generate` makes of an adapter that was trained so."""

import json
from pathlib import Path
from typing import Any

import pytest

from tailora.cli.main import main
from tailora.cli.models import load_model, parse_adapters, quantize_method
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
    with pytest.raises(ConfigError, match="give --quantize METHOD or none"):
        quantize_method([nf4, plain], None)


@pytest.mark.slow
def test_generate_and_export_take_the_quantization_of_the_run(
    tiny_model: Path, chats: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    data = ["--data", str(chats), "--validation-split", "0.2", "--max-steps", "2", "--samples", "0"]
    assert main(["train", "--model", str(tiny_model), *data, "--quantize", "int8", "--output-dir", str(out)]) == 0
    shown = capfd.readouterr().err
    assert "linear layers in int8" in shown
    assert "MatMul8bitLt" not in shown
    assert "Failed to load" not in shown
    assert quantized_layers(load_model(str(tiny_model), parse_adapters([str(out)])).model)
    assert not quantized_layers(load_model(str(tiny_model), parse_adapters([str(out)]), quantize="none").model)

    asked = ["generate", "--model", str(tiny_model), "--adapter", str(out), "--prompt", "hello", "--json"]
    assert main([*asked, "--max-new-tokens", "3"]) == 0
    assert json.loads(capfd.readouterr().out)["adapters"] == ["run"]
    assert main([*asked, "--quantize", "nf5"]) == 2
    assert "did you mean nf4" in capfd.readouterr().err

    changes = []  # a merge is into the base that the run had; other exports leave the base out
    for quantize in ([], ["--quantize", "none"], ["--quantize", "torchao-int8"]):
        folder = str(tmp_path / f"merged{len(changes)}")
        assert main(["export", str(out), "--to", "merged", "--output", folder, "--json", *quantize]) == 0
        changes.append(json.loads(capfd.readouterr().out)["changes"])
    assert list(map(len, changes)) == [2, 1, 2]
    assert main(["export", str(out), "--to", "portable", "--output", str(tmp_path / "p"), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["logits"]["tolerance"] == 1e-4
