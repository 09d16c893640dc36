"""Runs the code of docs/tutorials and docs/questions on the demo's model, as a reader would, and records its output.

    python -m benchmarks.site.tutorials                  all pages of docs/tutorials and docs/questions
    python -m benchmarks.site.tutorials tutorials/chats  some of them

The blocks of a page run one after the other in the page's folder, `--work FOLDER/PAGE`. A block of commands that
ran there before, after the same blocks, is not run again; to repeat a page, delete its folder. The output of a block
is kept if a measured part follows the block; update_docs.py writes it there.
"""

import argparse
import contextlib
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.measure import RESULTS, ROOT, log, write
from benchmarks.site.page_blocks import Block, Shell, blocks, run_python

DOCS = ROOT / "docs"
FOLDERS = ("tutorials", "questions")
SERVE = re.compile(r"(?m)^(tailora serve .+)$")  # in a terminal of its own; here in the background
IN_BACKGROUND = (
    r"\1 > serve.log 2>&1 &\nuntil curl --silent --fail http://127.0.0.1:8000/ready; do sleep 1; done > ready.txt"
)
TERMINAL = {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
Output = dict[str, Any]  # code, output, seconds


def pages() -> list[str]:
    return [f"{folder}/{path.stem}" for folder in FOLDERS for path in sorted((DOCS / folder).glob("*.md"))]


def blocks_of(page: str) -> list[Block]:
    """Returns those that can be run here."""
    return [block for block in blocks(DOCS / f"{page}.md") if block.is_run and not block.text.startswith("pip install")]


def run_page(page: str, folder: Path) -> dict[str, Output]:
    """Returns what the blocks with names printed. Raises SystemExit for a block that fails."""
    folder.mkdir(parents=True, exist_ok=True)
    memory = folder / "done.json"
    done: list[Output] = json.loads(memory.read_text()) if memory.exists() else []
    outputs: dict[str, Output] = {}
    names: dict[str, Any] = {"__name__": "tutorial"}
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with contextlib.closing(Shell(folder, {**os.environ, **TERMINAL, "PATH": programs})) as shell:
        for number, block in enumerate(blocks_of(page)):
            is_done = len(done) > number and done[number]["code"] == block.text
            if not is_done:
                del done[number:]
            if block.language == "python":  # also if it is done: later blocks use its names
                with contextlib.chdir(folder):
                    result = timed(block.text, lambda code: run_python(code, names))
            elif is_done and not SERVE.search(block.text):
                result = done[number]
            else:
                log(block.text.strip())
                result = timed(block.text, lambda code: shell.run(SERVE.sub(IN_BACKGROUND, code)))
            done[number : number + 1] = [result]
            memory.write_text(json.dumps(done))
            if block.output:
                outputs[block.output] = result
    return outputs


def timed(code: str, run: Callable[[str], str]) -> Output:
    started = time.perf_counter()
    printed = run(code).replace(str(Path.home()), "~")
    return {"code": code, "output": printed, "seconds": time.perf_counter() - started}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", choices=[[], *pages()], default=pages(), metavar="PAGE")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "tailora-tutorials")
    options = parser.parse_args()
    for page in options.pages:
        outputs = run_page(page, options.work / page)
        path = RESULTS / "tutorials.json"
        kept = json.loads(path.read_text())["pages"] if path.exists() else {}
        log(str(write("tutorials", {"pages": {**kept, page: outputs}})))


if __name__ == "__main__":
    main()
