"""Runs the code of docs/tutorials and docs/questions on the demo's model, as a reader types it; keeps what it prints.

    python benchmarks/tutorials.py                  all pages of docs/tutorials and docs/questions
    python benchmarks/tutorials.py tutorials/chats  some of them

The blocks of a page run one after the other in a folder of their own, `--work FOLDER/PAGE`. A block of commands that
ran there before, after the same blocks, is not run again; to run all of a page again, delete its folder. What a block
prints is kept if a measured part of its name follows the block; update_docs.py puts it there.
"""

import argparse
import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from measure import RESULTS, log, write

DOCS = Path(__file__).parent.parent / "docs"
FOLDERS = ("tutorials", "questions")
BLOCK = re.compile(  # with the measured part before the next block, if there is one
    r"(?P<mark><!-- not run: [^\n]* -->\n)?^```(?P<language>bash|python)\n(?P<code>.*?)^```$"
    r"(?=((?:(?!^```).)*?<!-- measured:(?P<name>[\w-]+) -->)?)",
    re.DOTALL | re.MULTILINE,
)
SERVE = re.compile(r"(?m)^(tailora serve .+)$")  # in a terminal of its own; here in the background
IN_BACKGROUND = (
    r"\1 > serve.log 2>&1 &\nuntil curl --silent --fail http://127.0.0.1:8000/ready; do sleep 1; done > ready.txt"
)
TERMINAL = {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
Output = dict[str, Any]  # code, output, seconds


def pages() -> list[str]:
    return [f"{folder}/{path.stem}" for folder in FOLDERS for path in sorted((DOCS / folder).glob("*.md"))]


def blocks(page: str) -> Iterator[tuple[str, str, str | None]]:
    """Language, code and the name of the output of each block of a page that can be run."""
    for match in BLOCK.finditer((DOCS / f"{page}.md").read_text()):
        if not match["mark"] and not match["code"].startswith("pip install"):
            yield match["language"], match["code"], match["name"]


def run_page(page: str, folder: Path) -> dict[str, Output]:
    """Returns what the blocks with names printed. Raises SystemExit for a block that fails."""
    folder.mkdir(parents=True, exist_ok=True)
    memory = folder / "done.json"
    done: list[Output] = json.loads(memory.read_text()) if memory.exists() else []
    outputs: dict[str, Output] = {}
    names: dict[str, Any] = {"__name__": "tutorial"}
    sessions: list[int] = []  # of bash, and of the servers that it started
    try:
        for number, (language, code, name) in enumerate(blocks(page)):
            is_done = len(done) > number and done[number]["code"] == code
            if not is_done:
                del done[number:]
            if language == "python":  # also if it is done: later blocks use its names
                result = run_python(code, names, folder)
            elif is_done and not SERVE.search(code):
                result = done[number]
            else:
                result = run_bash(code, folder, sessions)
            done[number : number + 1] = [result]
            memory.write_text(json.dumps(done))
            if name:
                outputs[name] = result
    finally:
        for session in sessions:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(session, signal.SIGTERM)
    return outputs


def run_python(code: str, names: dict[str, Any], folder: Path) -> Output:
    started = time.perf_counter()
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, names)
    return {"code": code, "output": printed.getvalue(), "seconds": time.perf_counter() - started}


def run_bash(code: str, folder: Path, sessions: list[int]) -> Output:
    log(code.strip())
    started = time.perf_counter()
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with (folder / "stdout.txt").open("w+") as stdout:  # a pipe would stay open as long as a server runs
        process = subprocess.Popen(
            ["bash", "-eo", "pipefail", "-c", SERVE.sub(IN_BACKGROUND, code)],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            start_new_session=True,
            env={**os.environ, **TERMINAL, "PATH": programs},
        )
        sessions.append(process.pid)
        if process.wait() != 0:
            raise SystemExit(f"{folder}: exit code {process.returncode}\n{code}\n{stdout.seek(0) or stdout.read()}")
        stdout.seek(0)
        printed = stdout.read().replace(str(Path.home()), "~")
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
