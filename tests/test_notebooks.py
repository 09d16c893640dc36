"""The notebooks: with a tiny model all their cells run; what is stored was made by the code that is stored."""

import os
from pathlib import Path

import nbformat
import pytest
import tiny_run

from benchmarks.site import notebooks

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
home = tiny_run.home  # the fixture
by_name = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.mark.notebooks
@by_name
def test_all_cells_run(path: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"TAILORA_HOME": str(home), "STEPS": "2", "OMP_NUM_THREADS": "1"}
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
    again = f"run benchmarks/site/notebooks.py {path.stem}: its code was changed since its outputs were made"
    assert notebook.metadata[notebooks.CODE] == notebooks.code_hash(notebook), again
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert len([output for output in outputs if "image/png" in output.get("data", {})]) >= 2
    assert 10 <= len(notebook.cells) <= 20
