"""Commands that take minutes, as a user types them: studies on the demo's data, and film reviews with labels.

    python -m benchmarks.studies.studies                   all of LINES
    python -m benchmarks.studies.studies compare           one of them

Writes benchmarks/results/NAME.txt, the output of the command, and NAME.json: its report.json, the machine and the time.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.measure import RESULTS, log, write
from benchmarks.studies.capitals import capitals_folder
from benchmarks.studies.snippets import labelled_folder, preferences_folder, tags_folder

DEMO = ["--model", "demo", "--data", "demo"]
REVIEWS = ["--model", "demo", "--data", "reviews/train.jsonl", "--eval-data", "reviews/eval.jsonl"]
PAIRS = ["--model", "demo", "--data", "pairs/train.jsonl", "--eval-data", "pairs/eval.jsonl"]
NAMES = ["--model", "demo", "--data", "names/train.jsonl", "--eval-data", "names/eval.jsonl"]
CHATS = ["--model", "capitals/base", "--data", "capitals/train.jsonl", "--eval-data", "capitals/eval.jsonl"]
FOLDERS = {"reviews": labelled_folder, "pairs": preferences_folder, "names": tags_folder, "capitals": capitals_folder}
LONGER = ["--num-train-epochs", "3"]
RATING = ["--field", "label=rating"]
LINES = {
    "compare": ["compare", *DEMO, "--max-steps", "16"],
    "search": ["search", *DEMO, "--max-steps", "16", "--trials", "14"],
    "labels": ["compare", "--task", "sequence-classification", *REVIEWS, "--max-steps", "60"],
    "classification": ["train", "--task", "sequence-classification", *REVIEWS, "--learning-rate", "1e-3"],
    "regression": ["train", "--task", "regression", *REVIEWS, *RATING, "--learning-rate", "1e-3"],
    "dpo": ["train", *PAIRS, "--loss", "dpo", "--learning-rate", "2e-4"],
    "tags": ["train", "--task", "token-classification", *NAMES, "--learning-rate", "1e-3"],
    "seq2seq": ["train", "--task", "seq2seq", *CHATS, "--learning-rate", "2e-3", *LONGER, "--samples", "6"],
}
TERMINAL = {"COLUMNS": "118", "NO_COLOR": "1", "TERM": "dumb"}


def run_study(name: str) -> Path:
    """Runs the command; returns the path of the JSON file."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        command = [sys.executable, "-m", "tailora.cli", *LINES[name], "--output-dir", folder]
        data = next((name for name in FOLDERS if f"{name}/train.jsonl" in command), "")
        data_folder = str(FOLDERS[data]()) if data else ""
        command = [word.replace(f"{data}/", f"{data_folder}/") if data else word for word in command]
        process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **TERMINAL})
        seconds = time.perf_counter() - started

        def without_paths(text: str) -> str:
            text = text.replace(folder, f"outputs/{name}")
            return text.replace(data_folder, data) if data else text

        (RESULTS / f"{name}.txt").write_text(without_paths(process.stdout))
        report = json.loads(without_paths((Path(folder) / "report.json").read_text()))
        if LINES[name][0] == "train":  # the rest is about every step and this machine
            parts = ("verdict", "result", "metrics", "labels")
            report = {part: report[part] for part in parts if part in report}
    return write(name, {"command": f"tailora {' '.join(LINES[name])}", "seconds": seconds, "report": report})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *LINES], default=list(LINES), metavar="NAME")
    for name in parser.parse_args().names:
        log(str(run_study(name)))


if __name__ == "__main__":
    main()
