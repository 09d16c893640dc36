"""Runs that are judged by their answers, one for each kind of data, and how long the demo takes to answer.

    python -m benchmarks.studies.answers                   writes benchmarks/results/answers.json; continues
    python -m benchmarks.studies.answers --only run=tools  one of LINES

A run is a command that a user types, in a folder with its data. Sums and calls of functions are made up here, with a
fixed seed. The seconds are wall time; of the demo, the share of the answers counts.
"""

import json
import random
import tempfile
import time
from collections.abc import Sequence
from contextlib import chdir
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks import measure
from benchmarks.site.page_blocks import blocks, run_python
from benchmarks.studies.capitals import capitals_folder
from benchmarks.studies.snippets import write_rows

FILES, SHORT = "--data train.jsonl --eval-data eval.jsonl", "--max-completion-length 64"
DEMO, DIGITS = "--data demo --eval-data demo", "--data digits/train.jsonl --eval-data digits/test.jsonl"
SEEING = "--modules-to-save vision_tower,multi_modal_projector --r 8 --learning-rate 1e-3 "
SEEING += "--num-train-epochs 3 --per-device-train-batch-size 16"
SEQ2SEQ = "--task seq2seq --learning-rate 2e-3 --num-train-epochs 3 --metric chrf --metric exact_match"
LINES = {
    "arithmetic": f"train --model demo {FILES} --metric math --metric exact_match {SHORT}",
    "chats": f"train --model demo {DEMO} --metric chrf --metric max_length:100 {SHORT}",
    "seq2seq": f"train --model base {FILES} {SEQ2SEQ} {SHORT}",
    "images": f"train --model smol-vlm {DIGITS} {SEEING} --metric exact_match --max-completion-length 16",
    "tools": f"train --model demo {FILES} --metric checks.py:right_call --metric checks.py:right_function {SHORT}",
    "demo": "demo",
}
REPEATS = 3  # of the demo, with one thread and with two
QUICK = " --max-steps 2 --metric-examples 4 --max-completion-length 4"


def cells(quick: bool) -> list[measure.Cell]:
    runs = [(name, 1, 0) for name in LINES if name != "demo"]
    runs += [("demo", threads, repeat) for repeat in range(1 if quick else REPEATS) for threads in (1, 2)]
    keys = ("run", "threads", "repeat")
    return [{**dict(zip(keys, of, strict=True)), "quick": quick, "malloc": "default"} for of in runs]


def measure_run(run: str, quick: bool, **_: Any) -> dict[str, Any]:
    from tailora.cli import train
    from tailora.cli.main import main

    answer, seconds, line = train.answer_prompts, dict[str, float](), LINES[run]

    def timed_answers(*arguments: Any) -> Any:
        started = time.perf_counter()
        answers = answer(*arguments)
        seconds["answering"] = time.perf_counter() - started
        return answers

    with tempfile.TemporaryDirectory() as folder, chdir(folder), patch.object(train, "answer_prompts", timed_answers):
        if run in DATA:
            DATA[run]()
        started = time.perf_counter()
        code = main([*(line + QUICK * quick).split(), "--output-dir", "outputs"])
        seconds["all"] = time.perf_counter() - started
        report = json.loads(Path("outputs", "report.json").read_text())
    result = report | report["result"]
    seconds["training"] = result["train_tokens"] / result["tokens_per_second"]
    kept = ("verdict", "finding", "metrics", "answers", "eval_loss_before", "eval_loss_after")
    return {name: result[name] for name in kept} | {
        "command": f"tailora {line}",
        "exit_code": code,
        "seconds": seconds,
        "answering_share": seconds["answering"] / seconds["all"],
    }


# ---- Data


def write_split(rows: list[dict[str, Any]], train: int, held_out: int) -> None:
    random.Random(0).shuffle(rows)
    write_rows(Path("train.jsonl"), rows[:train])
    write_rows(Path("eval.jsonl"), rows[train : train + held_out])


def write_sums() -> None:
    """Writes sums of two numbers of two digits. No pair of numbers is in both files."""
    pairs = product(range(10, 100), repeat=2)
    write_split([{"prompt": f"What is {a} + {b}?", "completion": str(a + b)} for a, b in pairs], 1200, 200)


def link_capitals() -> None:
    for path in capitals_folder().iterdir():
        Path(path.name).symlink_to(path)


def make_digits() -> None:
    """Runs the code of the tutorial that makes a model, and images of handwritten digits."""
    page = blocks(measure.ROOT / "docs" / "tutorials" / "images.md")
    for text in [block.text for block in page if block.language == "python"][:2]:
        run_python(text, {})


CITIES = ["Rome", "Oslo", "Lima", "Paris", "Tokyo", "Cairo", "Delhi", "Berlin", "Madrid", "Vienna", "Boston", "Dublin"]
STYLES = ["jazz", "rock", "blues", "soul", "folk", "opera", "techno", "reggae", "swing", "disco", "country", "ambient"]
REQUESTS: dict[str, tuple[str, list[str], Sequence[str | int]]] = {  # function -> its argument, wordings, values
    "weather": ("city", ["What is the weather in {}?", "Is it raining in {}?"], CITIES),
    "timer": ("minutes", ["Set a timer for {} minutes.", "Tell me when {} minutes are over."], range(1, 61)),
    "music": ("style", ["Play some {}.", "I would like to hear {}."], STYLES),
    "convert": ("euros", ["How much are {} euros in dollars?", "Convert {} euros to dollars."], range(5, 300, 7)),
}
CHECKS = '''
import json, re

def call(text):
    try:
        return dict(json.loads(re.search("<tool_call>(.*?)</tool_call>", text, re.DOTALL)[1]))
    except (TypeError, ValueError):
        return {}

def right_call(completions, answer, **columns):
    """Whether the answer calls the function that the data calls, with the same arguments."""
    return [call(chat[0]["content"]) == call(right) for chat, right in zip(completions, answer)]

def right_function(completions, answer, **columns):
    return [call(chat[0]["content"]).get("name") == call(right)["name"] for chat, right in zip(completions, answer)]
'''


def write_calls() -> None:
    """Writes requests and calls of four functions. No request is in both files."""
    Path("checks.py").write_text(CHECKS)
    keys = {name: {"type": "object", "properties": {key: {}}} for name, (key, _, _) in REQUESTS.items()}
    tools, rows = [{"name": name, "parameters": of} for name, of in keys.items()], list[dict[str, Any]]()
    for name, (key, wordings, values) in REQUESTS.items():
        for wording, value in product(wordings, values):
            call = {"type": "function", "function": {"name": name, "arguments": {key: value}}}
            request = {"role": "user", "content": wording.format(value)}
            rows.append({"messages": [request, {"role": "assistant", "tool_calls": [call]}], "tools": tools})
    write_split(rows, 144, 100)


DATA = {"arithmetic": write_sums, "seq2seq": link_capitals, "images": make_digits, "tools": write_calls}


if __name__ == "__main__":
    measure.main("answers", str(__doc__), cells, measure_run)
