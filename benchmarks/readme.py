"""Write the measured parts of README.md and docs/ from benchmarks/results.

tailora demo > benchmarks/results/demo.txt && python benchmarks/demo.py run && python benchmarks/readme.py
"""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import experiments
import tables

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TRAINER = "PEFT + Trainer, grouped by length"
BEFORE = "zen4"  # a folder of results: those of a machine without AMX
ROWS = [  # label, key, format
    ("held-out loss after (before: {before})", "loss_after", "{:.3f}"),
    ("training, tokens/s", "tokens_per_second", "{:.0f}"),
    ("training, s", "train_seconds", "{:.0f}"),
    ("peak memory, GB", "peak_gigabytes", "{:.2f}"),
]


def table(results: dict[str, Any]) -> str:
    """The demo's two arms."""
    ours, theirs, start = (results["summary"][arm] for arm in ("tailora", "peft", "startup"))
    before = f"{ours['loss_before']['median']:.3f}"
    lines = ["| the demo's run | tailora | PEFT, hand-written loop | ratio |", "|---|---|---|---|"]
    for label, key, form in ROWS:
        ratio = ours[key]["median"] / theirs[key]["median"]
        lines.append(
            f"| {label.format(before=before)} | {spread(ours[key], form)} | {spread(theirs[key], form)} | {ratio:.2f} |"
        )
    ours_start, peft_start = start["import_tailora_over_torch"], start["import_peft_over_torch"]
    ratio = ours_start["median"] / peft_start["median"]
    cells = f"{spread(ours_start, '{:.2f}')} | {spread(peft_start, '{:.2f}')} | {ratio:.2f}"
    lines.append(f"| CPU time of the import, x that of torch | {cells} |")
    return "\n".join(lines) + "\n\n" + caption(results)


def spread(value: dict[str, float], form: str) -> str:
    median, low, high = (form.format(value[key]) for key in ("median", "low", "high"))
    return median if low == high else f"{median} ({low} to {high})"


def caption(results: dict[str, Any]) -> str:
    machine, repeats = results["machine"], len(results["runs"]["tailora"])
    packages = machine["packages"]
    return (
        f"Median and range of {repeats} interleaved runs, each in a process of its own, on {machine['cores']} cores "
        f"of an {machine['cpu']} ({', '.join(machine['bf16']) or 'no bf16'}); torch {packages['torch']}, transformers "
        f"{packages['transformers']}, PEFT {packages['peft']}. Both arms: the same rows and order, r = 16 on every "
        "linear layer, alpha 32, bf16 base; the PEFT loop groups by length and computes logits at supervised "
        "positions only. Made by [benchmarks/demo.py](benchmarks/demo.py)."
    )


def shown(output: str) -> str:
    """Whether it worked, and the first pair of answers: not the other pairs, the files and the next commands."""
    told = output.split("\nWritten")[0].strip()
    first, border, _ = told.partition("\n├")
    return f"{first}\n{told.splitlines()[-1]}" if border else told


def advice(content: dict[str, Any]) -> str:
    """What benchmarks/advice.py found, a row for each adapter."""
    rows = [
        "| r | rate | loss | 2r would gain | lower half costs | eff. / r | dW/W | new (random) | forgets | rules |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    rate = content["cells"][0]["cell"]["octave"]
    at_rate = {one["cell"]["r"]: one["result"]["loss"] for one in content["cells"] if one["cell"]["octave"] == rate}
    for one in content["cells"]:
        cell, found = one["cell"], one["result"]
        doubled = at_rate.get(2 * cell["r"]) if cell["octave"] == rate else None
        cost = "-" if found["cost"] is None or cell["r"] == 1 else f"{found['cost']:.1%}"
        cells = [
            *(str(cell["r"]), f"2^{cell['octave']}", f"{found['loss']:.3f}"),
            *("" if doubled is None else f"{found['loss'] - doubled:.3f}", cost, f"{found['use']:.2f}"),
            f"{found['relative_norm']:.2f}",
            f"{found['intruders']:.1f} ({found['intruders_random']:.1f})",
            *(f"{found['forgetting']:.3f}", ", ".join(found["rules"])),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def text(name: str) -> str:
    """What a command printed; titles of tables are padded."""
    return "\n".join(line.rstrip() for line in (RESULTS / f"{name}.txt").read_text().strip().splitlines())


def content(name: str, folder: str = ".") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / folder / f"{name}.json").read_text())
    return found


def fenced(output: str) -> str:
    return f"```\n{output}\n```"


def everywhere(name: str) -> str:
    """The tables of a benchmark, of every machine that it was run on."""
    folders = [folder for folder in (".", BEFORE) if (RESULTS / folder / f"{name}.json").exists()]
    found = [content(name, folder) for folder in folders]
    return "\n\n".join(text for one in found for text in (*tables.TABLES[name](one["cells"]), tables.caption(one)))


def trainers(found: dict[str, Any]) -> str:
    return "\n\n".join([*tables.real(found["cells"]), tables.caption(found)])


def elsewhere() -> str:
    """The two headline ratios, of the machine without AMX."""
    demo, real = content("demo", BEFORE), content("real", BEFORE)
    speed = {arm: demo["summary"][arm]["tokens_per_second"]["median"] for arm in ("tailora", "peft")}
    walls = {one["cell"]["arm"]: one["result"]["wall"] for one in real["cells"] if one["cell"]["data"] == "chat"}
    return (
        f"Without AMX, on 2 cores of an {demo['machine']['cpu']}: {speed['tailora'] / speed['peft']:.2f} times the "
        f"hand-written loop's tokens/s, {walls[TRAINER] / walls['tailora']:.2f} times those of {TRAINER}. Both "
        "machines, step times, memory, answering, many adapters, start-up: [how fast, how large](docs/performance.md)."
    )


def studied(name: str) -> str:
    """What the command of benchmarks/studies.py took and printed."""
    found = content(name)
    where = f"{found['machine']['cores']} cores of an {found['machine']['cpu']}"
    took = f"`{found['command']}` took {found['seconds'] / 60:.1f} minutes on {where} and ended with"
    return f"{took}\n\n{fenced(text(name))}"


SPEED = (
    *("real", "steps", "memory", "curves", "growth"),
    *("inference", "adapters", "startup"),
)
PARTS: dict[str, dict[str, Callable[[], str]]] = {  # file -> name of the part -> what stands there
    "README.md": {
        "demo-output": lambda: fenced(shown(text("demo"))),
        "table": lambda: table(content("demo")),
        "real": lambda: trainers(content("real")),
        "elsewhere": elsewhere,
        "compare": lambda: studied("compare"),
        "search": lambda: studied("search"),
    },
    "docs/experiments.md": {
        "tiny-lm-stated": lambda: experiments.stated(content("tiny_lm")),
        "tiny-lm-losses": lambda: experiments.losses(content("tiny_lm")),
        "tiny-lm-compare": lambda: experiments.compared(content("tiny_lm_compare")),
        "tiny-lm-search": lambda: experiments.found(content("tiny_lm_search")),
    },
    "docs/performance.md": {
        "demo": lambda: "\n\n".join(table(content("demo", folder)) for folder in (".", BEFORE)),
        **{name: partial(everywhere, name) for name in SPEED},
    },
    "docs/studies.md": {"compare-rates": lambda: experiments.rates(content("compare"))},
    "docs/plan.md": {
        "memory": lambda: "\n\n".join([*tables.plan(content("plan")["cells"]), tables.caption(content("plan"))])
    },
}


def put(document: str, name: str, part: str) -> str:
    """Replace what stands between the two markers of this name."""
    start, end = f"<!-- measured:{name} -->", f"<!-- /measured:{name} -->"
    pattern = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.DOTALL)
    if len(pattern.findall(document)) != 1:
        raise SystemExit(f"one pair of markers {start} {end} is needed")
    return pattern.sub(lambda _: f"{start}\n{part.strip()}\n{end}", document)


def main() -> None:
    for file, parts in PARTS.items():
        path = ROOT / file
        document = path.read_text()
        for name, part in parts.items():
            document = put(document, name, part())
        path.write_text(document)


if __name__ == "__main__":
    main()
