"""Runs the notebooks in notebooks/ on the demo's model and stores their output and pictures.

    python -m benchmarks.site.notebooks              all of them, about a quarter of an hour on two idle cores
    python -m benchmarks.site.notebooks start        one of them

Progress (stderr) is not stored, because it contains the times of one machine. tests/test_notebooks.py fails if the code
of a notebook differs from the code that this script ran.
"""

import argparse
import asyncio
import hashlib
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from nbclient import NotebookClient
from nbconvert.filters import strip_ansi
from nbformat import NotebookNode

from benchmarks.measure import ROOT, log

FOLDER = ROOT / "notebooks"
CODE = "code_sha256"  # key of the notebook's metadata


def execute(notebook: NotebookNode, folder: Path) -> NotebookNode:
    """Runs all cells in a new kernel with `folder` as its current folder. Raises CellExecutionError for a cell."""
    programs = Path(sys.executable).parent  # where `tailora` is, which cells of %%bash call
    python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": python_path}
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, timeout=None, kernel_name="python3", coalesce_streams=True, resources=resources)
    return asyncio.run(client.async_execute(env=environment))


def code_hash(notebook: NotebookNode) -> str:
    """Returns a hash of the code; the text between may change without another run."""
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\0".join(cells).encode()).hexdigest()[:16]


def without_traces(notebook: NotebookNode) -> NotebookNode:
    """Removes what belongs to one run on one machine: progress, times, the version of Python."""
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                if output.output_type == "stream":  # a kernel asks programs for colours
                    output.text = strip_ansi(output.text)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        CODE: code_hash(notebook),
    }
    return notebook


def run(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    with TemporaryDirectory() as folder:
        notebook = without_traces(execute(notebook, Path(folder)))
        text = nbformat.writes(notebook)
        for private in (folder, str(ROOT), str(Path.home())):
            if private in text:
                raise SystemExit(f"{path.name} shows {private}, which is a path of this machine: print less")
    path.write_text(text + "\n")


def main() -> None:
    names = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *names], default=names, metavar="NAME")
    for name in parser.parse_args().names:
        run(FOLDER / f"{name}.ipynb")
        log(f"wrote notebooks/{name}.ipynb")


if __name__ == "__main__":
    main()
