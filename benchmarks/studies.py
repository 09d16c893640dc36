"""`tailora compare --minutes 15` and `tailora search --minutes 10` on the demo's model and data, as a user types them.

    python benchmarks/studies.py                   both, and labels: compare on film reviews with labels
    python benchmarks/studies.py compare           one of them

Writes benchmarks/results/NAME.txt, what the command prints, and NAME.json: its report.json, the machine and the time.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import RESULTS, log, write
from snippets import labelled_folder

MINUTES = {"compare": 15, "search": 10, "labels": 25}
TERMINAL = {"COLUMNS": "118", "NO_COLOR": "1", "TERM": "dumb"}


def command_line(name: str) -> list[str]:
    minutes = ["--minutes", str(MINUTES[name])]
    if name != "labels":
        return [name, "--model", "demo", "--data", "demo", *minutes]
    files = ["--data", "reviews/train.jsonl", "--eval-data", "reviews/eval.jsonl"]
    return ["compare", "--task", "sequence-classification", "--model", "demo", *files, *minutes]


def run_study(name: str) -> Path:
    """Runs the command; returns the path of the JSON file."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        command = [sys.executable, "-m", "tailora.cli", *command_line(name), "--output-dir", folder]
        reviews = str(labelled_folder()) if name == "labels" else ""
        command = [word.replace("reviews/", f"{reviews}/") for word in command]
        process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **TERMINAL})
        seconds = time.perf_counter() - started
        (RESULTS / f"{name}.txt").write_text(process.stdout.replace(folder, f"outputs/{name}"))
        text = (Path(folder) / "report.json").read_text().replace(folder, f"outputs/{name}")
        report = json.loads(text.replace(reviews, "reviews") if reviews else text)
    return write(name, {"command": f"tailora {' '.join(command_line(name))}", "seconds": seconds, "report": report})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *MINUTES], default=list(MINUTES), metavar="NAME")
    for name in parser.parse_args().names:
        log(str(run_study(name)))


if __name__ == "__main__":
    main()
