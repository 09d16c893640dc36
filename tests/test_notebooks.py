"""The notebooks: with a tiny model all their cells run; what is stored was made by the code that is stored."""

import json
import os
from pathlib import Path

import nbformat
import pytest
from tiny import chat_model, chat_tokenizer
from tiny_run import WORDS

import notebooks

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
by_name = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def tiny_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for TAILORA_HOME in which the demo is a tiny model with conversations of a few words."""
    home = tmp_path_factory.mktemp("home")
    demo = home / "demo-1"
    chat_model(vocab_size=320, hidden_size=64, intermediate_size=128, initializer_range=0.2).save_pretrained(
        demo / "SmolLM2-135M-Instruct"
    )
    tokenizer = chat_tokenizer([" ".join(WORDS)], eos_token="<|im_end|>", pad_token="<|im_end|>")
    tokenizer.save_pretrained(demo / "SmolLM2-135M-Instruct")
    (demo / "chitchat").mkdir()
    for name, count in {"train": 200, "eval": 40}.items():
        rows = []
        for number in range(count):
            words = [WORDS[(number + place) % len(WORDS)] for place in range(1 + number % 5)]
            question = {"role": "user", "content": f"{name} {number}: {' '.join(words)}"}
            rows.append({"messages": [question, {"role": "assistant", "content": " ".join(reversed(words))}]})
        (demo / "chitchat" / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return home


@pytest.mark.notebooks
@by_name
def test_all_cells_run(path: Path, tiny_demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"TAILORA_HOME": str(tiny_demo), "STEPS": "2", "OMP_NUM_THREADS": "1"}
    for name, value in {**settings, "PATH": os.environ["PATH"], "PYTHONPATH": ""}.items():
        monkeypatch.setenv(name, value)
    notebook = notebooks.execute(nbformat.read(path, as_version=4), tmp_path)
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")


@by_name
def test_the_stored_notebook_is_one_whole_run_of_its_code(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]
    again = f"run benchmarks/notebooks.py {path.stem}: its code was changed since its outputs were made"
    assert notebook.metadata[notebooks.CODE] == notebooks.code_hash(notebook), again
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert len([output for output in outputs if "image/png" in output.get("data", {})]) >= 2
    assert 10 <= len(notebook.cells) <= 20
