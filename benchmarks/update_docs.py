"""Writes the measured parts of README.md and docs/*.md, from the files in benchmarks/results.

    python benchmarks/update_docs.py

A measured part is between `<!-- measured:NAME -->` and `<!-- /measured:NAME -->`. PARTS lists the parts of each file
and the functions that create them. tests/test_documents.py fails if a part differs from what this script would write.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # this file can be run by its path
from benchmarks.measure import RESULTS, ROOT
from benchmarks.site import device_tables, evidence_tables, tables, tiny_lm_tables
from benchmarks.site.page_blocks import blocks, with_parts
from benchmarks.site.tables import ranged
from tailora.core.config import LoRAConfig
from tailora.core.setting_names import OTHER_UNITS
from tailora.train.config import TrainConfig
from tailora.train.defaults import NAMES

MACHINES = {"AMX": ".", "Zen 4": "zen4", "Zen 5": "zen5"}  # name -> folder of results
TRAINER = "PEFT + Trainer, grouped by length"

Content = dict[str, Any]  # of one JSON file


def read(name: str, folder: str = ".") -> Content:
    content: Content = json.loads((RESULTS / folder / f"{name}.json").read_text())
    return content


def fenced(output: str) -> str:
    return f"```\n{output}\n```"


# ---- README.md


def speed_in_brief() -> str:
    """The demo's run compared with PEFT, and the result on another machine."""
    demo = read("demo")
    ours, peft = demo["summary"]["tailora"], demo["summary"]["peft"]
    speeds, memory, losses = (
        [form.format(arm[key]["median"]) for arm in (ours, peft)]
        for key, form in (("tokens_per_second", "{:.0f}"), ("peak_gigabytes", "{:.2f}"), ("loss_after", "{:.3f}"))
    )
    return (
        f"On {tables.machine(demo)}, tailora trains the demo at {speeds[0]} tokens/s in {memory[0]} GB, and a "
        f"hand-written PEFT loop at {speeds[1]} tokens/s in {memory[1]} GB, to held-out losses of {losses[0]} and "
        f"{losses[1]}. Without AMX, tailora is {speed_ratio(read('demo', 'zen4')):.2f} times as fast as the loop. PEFT "
        f"with the transformers `Trainer` takes {trainer_ratio(read('real')):.2f} times as long. "
        "[All measurements](docs/performance.md)."
    )


def speed_ratio(demo: Content) -> float:
    """Returns tailora's tokens per second, divided by the hand-written loop's."""
    ours, peft = (demo["summary"][arm]["tokens_per_second"]["median"] for arm in ("tailora", "peft"))
    return float(ours / peft)


def trainer_ratio(real: Content) -> float:
    """Returns the training time of PEFT in transformers' Trainer over tailora's, on the demo's conversations."""
    seconds = {cell["cell"]["arm"]: cell["result"]["wall"] for cell in real["cells"] if cell["cell"]["data"] == "chat"}
    return float(seconds[TRAINER] / seconds["tailora"])


# ---- docs/performance.md


def machines() -> str:
    """The machines, and the packages on them. Raises SystemExit if a result was measured with others."""
    rows = [
        [title, str(cpu["cores"]), cpu["cpu"], ", ".join(cpu["bf16"])]
        for title, folder in MACHINES.items()
        for cpu in [read("demo", folder)["machine"]]
    ]
    packages, measured = tables.packages(read("demo")), ("demo", "processors", *tables.SPEED)
    for folder in MACHINES.values():
        for path in sorted((RESULTS / folder).glob("*.json")):
            if path.stem in measured and tables.packages(read(path.stem, folder)) != packages:
                raise SystemExit(f"{path} was measured with {tables.packages(read(path.stem, folder))}, not {packages}")
    return f"{tables.table(['', 'cores', 'CPU', 'bf16'], rows)}\n\nPackages: {packages}."


def demo() -> str:
    contents = {name: read("demo", folder) for name, folder in MACHINES.items()}
    runs = ", ".join(f"{len(content['runs']['tailora'])} on {name}" for name, content in contents.items())
    before = contents["AMX"]["summary"]["tailora"]["loss_before"]["median"]
    rows = tables.demo({name: content["summary"] for name, content in contents.items()})
    return f"{rows}\n\nEach cell is tailora / PEFT. The loss before is {before:.3f}. Runs of each arm: {runs}."


def on_all_machines(name: str, make: Callable[[tables.Cells], str]) -> str:
    """The table of a benchmark, over all machines on which it was run."""
    cells, loads = [], []
    for title, folder in MACHINES.items():
        if (RESULTS / folder / f"{name}.json").exists():
            content = read(name, folder)
            cells += [{**cell, "cell": {**cell["cell"], "machine": title}} for cell in content["cells"]]
            loads += [cell["load_before"] for cell in content["cells"]]
    return (
        f"{make(cells)}\n\nLoad average of the machines before each measurement: {min(loads):.1f} to {max(loads):.1f}."
    )


# ---- docs/studies.md and docs/plan.md


def typed(name: str) -> str:
    content = read(name)
    one = content["machine"]["environment"].get("OMP_NUM_THREADS") == "1"
    where = f"{'one thread' if one else str(content['machine']['cores']) + ' cores'} of an {content['machine']['cpu']}"
    return f"`{content['command']}` took {content['seconds'] / 60:.1f} minutes on {where}"


def ended(name: str) -> str:
    """A command of benchmarks/studies/studies.py, and its verdict."""
    return f"{typed(name)}. Its verdict:\n\n> {read(name)['report']['verdict']}"


def compared() -> str:
    """What comes before the picture of `tailora compare` (benchmarks/site/pictures.py)."""
    return f"{typed('compare')}. Its result, with the verdict in the current wording, from the same numbers:"


def plan() -> str:
    content = read("plan")
    source = f"{tables.machine(content)}; {tables.packages(content)}. {tables.load(content)}"
    return f"{tables.plan(content['cells'])}\n\n{source}"


# ---- docs/compatibility.md

COLUMNS = ("attach", "train", "merge", "unmerge", "checkpointing", "rows", "generate", "serve", "compile")
COLUMNS += ("PEFT reads", "reads PEFT")
FEW_WORDS = (  # what a reason says -> what the table says
    ("PEFT does not read its own file either", "misses layers, also in its own files"),
    ("does not generate: ", "-"),
    ("does not take tokens", "-"),
    ("itself depends on", "-"),
    ("the compiled base differs too", "also wrong without an adapter"),
    ("does not require grad and does not have", "no gradient in transformers"),
    ("does not support activation checkpointing", "not supported by transformers"),
    ("weight that another layer shares", "refused: shared weights"),
    ("overrides forward", "refused: not W x + b"),
    ("which process all rows together", "refused: experts or attention"),
    ("whose first dimension must be the rows", "refused: rows not first"),
    ("as in adapter_rows, in the first dimension", "refused: rows not first"),
    ("is incompatible with Mamba", "PEFT refuses"),
    ("get_input_embeddings", "PEFT refuses"),
    ("Target module", "PEFT refuses"),
    ("instead of {", "different answers"),
    ("ended without the answer", "no answer from transformers' own generate"),
    ("attention implementation through", "no SDPA attention"),
    ("no layer left to adapt", "no linear layers"),
    ("No modules were targeted", "no linear layers"),
)


def architectures() -> str:
    """The number of classes with yes in each column, the classes that differ in something, and all others."""
    tried = {name: cells for name, cells in read("architectures")["architectures"].items() if "base" not in cells}
    lines = {name: [few_words(cells[column]) for column in COLUMNS] for name, cells in sorted(tried.items())}
    counts = [sum(line[i].startswith("yes") for line in lines.values()) for i in range(len(COLUMNS))]
    differ: dict[tuple[str, str], list[str]] = {}
    for name, line in lines.items():
        for reason in sorted({*line} - {"yes", "-"}):
            columns = [column for column, cell in zip(COLUMNS, line, strict=True) if cell == reason]
            where = "all" if len(columns) == len(COLUMNS) else ", ".join(columns)
            differ.setdefault((reason, where), []).append(f"`{name}`")
    rows = [[reason, where, ", ".join(names)] for (reason, where), names in sorted(differ.items())]
    works = ", ".join(f"`{name}`" for name, line in lines.items() if {*line} <= {"yes", "-"})
    total = tables.table(["", *COLUMNS], [[f"of {len(lines)}", *map(str, counts)]])
    exceptions = tables.table(["result", "columns", "classes"], rows)
    return f"{total}\n\n{exceptions}\n\nThese classes have no exception: {works}."


def few_words(reason: str) -> str:
    words = next((words for part, words in FEW_WORDS if part in reason), reason)
    return words if len(words) < 50 else f"{words[:47].strip()}..."


def untried() -> str:
    """The classes whose small base model does not run, and those that were not run."""
    content = read("architectures")
    failed = [name for name, cells in sorted(content["architectures"].items()) if "base" in cells]
    return ", ".join(f"`{name}`" for name in [*failed, *content["not_run"]])


# ---- docs/coming_from


def pages_of_tools() -> dict[str, str]:
    """Returns the page of each tool in docs/coming_from -> the tool."""
    return {tool.lower().replace("-", "_"): tool for tool in read("peers")["tools"]}


def settings_of(tool: str) -> str:
    """The settings of another tool that tailora has too, with both defaults; those there are in results/peers.json."""
    there = read("peers")["tools"][tool]
    fields = TrainConfig.model_fields | (LoRAConfig.model_fields if tool == "PEFT" else {})
    here = {name: "auto" if name in NAMES else str(field.default) for name, field in fields.items()}
    rows = []
    order = list(here)
    for name, setting in sorted(there["settings"].items(), key=lambda item: order.index(item[1]["ours"].split()[0])):
        ours, _, value = setting["ours"].partition(" ")
        unit = OTHER_UNITS.get(name, "")
        shown = f"`{ours}{value and f': {value}'}`{unit}"
        rows.append([f"`{name}`", f"`{setting['default']}`", shown, f"`{here[ours]}`"])
    head = [f"{tool} {there['version']}", "default", "tailora", "default"]
    return tables.table(head, rows)


def compatibility_source() -> str:
    content = read("compatibility")
    return f"Run on {tables.machine(content)}; {tables.packages(content)}."


def works_on_architectures() -> str:
    """One row for each language model, with the columns that are not the same for all of them, and the total."""
    rows = read("compatibility")["architectures"]
    cells = {name: {column: one_word(text) for column, text in row.items()} for name, row in rows.items()}
    columns = [c for c in next(iter(rows.values())) if len({row[c] for row in cells.values()}) > 1]
    counts = [sum(row[c] in ("yes", "adapter", "padded") for row in cells.values()) for c in columns]
    total = [f"**of {len(rows)}**", *(f"**{count}**" for count in counts)]
    lines = [[f"`{name}`", *(row[c] for c in columns)] for name, row in cells.items()]
    return tables.table(["", *columns], [total, *lines])


def works_with(part: str) -> str:
    """One row for each feature, one column for each server or format of weights."""
    columns = read("compatibility")[part]
    features = next(iter(columns.values()))
    rows = [[feature, *(one_word(cells[feature]) for cells in columns.values())] for feature in features]
    return tables.table(["", *(f"`{name}`" for name in columns)], rows)


def one_word(text: str) -> str:
    """What a cell of the results says, for a narrow table; compatibility.json has the reason."""
    return next((word for part, word in WORDS if part in text), text)


WORDS = (  # what a result has in it -> what the table says
    ("yes, padded", "padded"),
    ("padded: ", "no"),
    ("not tried: ", "not tried"),
    ("merged: ", "merged"),
    ("yes, ", "yes"),
    ("padded batches instead", "no"),
    ("Error: ", "refused"),
)


# ---- docs/devices.md


def devices() -> str:
    """What gpu.py measured on each card; without any file, that there was none."""
    paths = sorted((RESULTS / "devices").glob("*.json"))
    return device_tables.devices([json.loads(path.read_text()) for path in paths])


# ---- docs/serving.md


def serving() -> str:
    content = read("serve")
    rows = [
        [
            name,
            str(arm["tokens_per_second"]["n"]),
            ranged(arm["tokens_per_second"], "{:.0f}"),
            *(f"{arm[f'first_token_{share}']['median']:.2f}" for share in ("p50", "p95")),
        ]
        for name, arm in content["arms"].items()
    ]
    arms = tables.table(["32 requests at once", "rounds", "useful tokens/s", "first token, p50 s", "p95 s"], rows)
    ratios = tables.table(
        ["ratio of tokens/s, round by round", "rounds", "median and range"],
        [[name, str(ratio["n"]), ranged(ratio, "{:.2f}")] for name, ratio in content["ratios"].items()],
    )
    loading = content["loading"]
    seconds = ", ".join(
        f"{name} {ranged(spread, '{:.3f}')} s ({spread['n']} times)" for name, spread in loading["seconds"].items()
    )
    source = (
        f"Medians and ranges over the rounds, in {content['dtype']} on {tables.machine(content)}, "
        f"{content['threads']} thread{'s' if content['threads'] > 1 else ''}; load of the machine before: "
        f"{content['load_before']:.1f}. {tables.packages(content)}."
    )
    load = (
        f"Time to load an adapter of {loading['bytes'] / 1e6:.0f} MB, until it answers: {seconds}; "
        f"load of the machine before: {loading.get('load_before', content['load_before']):.1f}."
    )
    return "\n\n".join([arms, ratios, load, source])


def soak() -> str:
    content = read("soak")
    memory = content["memory"]
    rows = [[name, f"{count:,}"] for name, count in content["outcomes"].items()]
    last = [sample for sample in memory["samples"] if sample[0] > memory["samples"][-1][0] - 15 * 60]
    slope = 3600 * statistics.linear_regression(*zip(*last, strict=True)).slope
    text = (
        f"{content['minutes']:.0f} minutes of mixed load by {content['clients']} clients on {tables.machine(content)}, "
        f"including loads and unloads of adapters. Unexpected outcomes: {len(content['unexpected'])}. After the "
        f"warm-up, resident memory grew from {memory['first_mb']:.0f} MB to {memory['last_mb']:.0f} MB: by "
        f"{memory['slope_mb_per_hour']:.0f} MB per hour, with a standard error of {memory['standard_error']:.1f}, "
        f"and by {slope:.0f} MB per hour in the last 15 minutes. "
        "503 means that all adapter memory was in use; it is deliberately too small here."
    )
    return f"{text}\n\n{tables.table(['request, and its outcome', 'count'], rows)}"


# ---- docs/experiments.md


def evidence(name: str) -> str:
    return evidence_tables.PARTS[name](read("evidence"))


# ---- docs/verify.md


def verify_faults() -> str:
    """One row per server, one column per fault: the verdict, in bold where it is not the one to expect."""
    rows = read("verify")["faults"]
    servers = list(dict.fromkeys((row["server"], row["base"]) for row in rows))
    verdicts = {(row["fault"], row["server"], row["base"]): _verdict(row) for row in rows}
    faults = dict.fromkeys(row["fault"] for row in rows)
    cells = [[", ".join(server), *(verdicts.get((fault, *server), "") for fault in faults)] for server in servers]
    missed = sum(not row["is_right"] for row in rows)
    text = f"{len(rows)} servers. `verify` was wrong about whether the adapter is in use as trained {missed} times."
    return f"{tables.table(['server', *faults], cells)}\n\n{text}"


def _verdict(row: Content) -> str:
    finer = ("partial", "template", "other-base", "other-adapter")  # in results of earlier versions
    verdict = "other" if row["verdict"] in finer else row["verdict"]
    scale = f" {row['scale']:.2f}" if verdict == "scaled" else ""
    return f"{verdict}{scale}" if row["is_named"] else f"**{verdict}**{scale}"


def verify_trials() -> str:
    content = read("verify")
    servers = dict.fromkeys((row["server"], row["base"]) for row in content["trials"])
    cells = []
    for server, base in servers:
        verdicts = [row["verdict"] for row in content["trials"] if (row["server"], row["base"]) == (server, base)]
        wrong = [verdict for verdict in verdicts if verdict != "adapter"]
        cells.append([server, base, str(len(verdicts)), str(len(wrong)), ", ".join(sorted(set(wrong)))])
    text = (
        f"Adapters trained for {content['steps']} steps on the demo's model, using {tables.machine(content)}. "
        f"{tables.packages(content)}."
    )
    return f"{tables.table(['server', 'base', 'trials', 'false alarms', 'their verdicts'], cells)}\n\n{text}"


# ---- docs/from_scratch.md


def page_output(name: str) -> str:
    """What one block of the page printed."""
    return fenced(read("from_scratch")["outputs"][name])


# ---- docs/tutorials and docs/questions


def tutorial(page: str, name: str) -> str:
    """What a block printed: all of it, or the lines that EXCERPTS names. Raises SystemExit if the block is another."""
    results = read("tutorials")["pages"] if (RESULTS / "tutorials.json").exists() else {}
    block = results.get(page, {}).get(name)
    if block is None:
        return f"Not run yet: `python -m benchmarks.site.tutorials {page}`."
    if block["code"] not in {each.text for each in blocks(ROOT / "docs" / f"{page}.md") if each.output == name}:
        raise SystemExit(f"run benchmarks/site/tutorials.py {page}: the code above {name} has changed")
    lines = [line.rstrip() for line in block["output"].strip().splitlines()]
    first, end = EXCERPTS.get((page, name), ("", ""))
    start = next(number for number, line in enumerate(lines) if line.startswith(first))
    stop = next((n for n, line in enumerate(lines) if n > start and end and line.startswith(end)), len(lines))
    return f"```text\n{chr(10).join(lines[start:stop]).strip()}\n```"


EXCERPTS = {  # page and name of an output -> beginnings of its first line, and of the first line after it
    ("tutorials/chats", "data"): ("example 1", "example 2"),
    ("tutorials/chats", "plan"): ("It fits", "Note"),
    ("tutorials/chats", "first"): ("", "Written to"),
    ("tutorials/chats", "second"): ("", "Answers before"),
    ("tutorials/chats", "inspect"): ("Where the update is", "--all shows"),
    ("tutorials/classify", "train"): ("demo, fine-tuned", "Metrics"),
    ("tutorials/classify", "eval"): ("Labels", ""),
    ("tutorials/images", "train"): ("smol-vlm, fine-tuned", "Written to"),
    ("tutorials/images", "eval"): ("What was measured", "outputs/"),
    ("questions/merge", "export"): ("With the exported files", "To use it"),
    ("tutorials/preferences", "train"): ("demo, fine-tuned", "Answers before"),
    ("tutorials/preferences", "better"): ("demo, fine-tuned", "Written to"),
    ("tutorials/rewards", "letter"): ("demo, fine-tuned", "Written to"),
    ("tutorials/rewards", "begins"): ("demo, fine-tuned", "Metrics"),
    ("tutorials/pretraining", "train"): ("demo, fine-tuned", "Answers before"),
    ("tutorials/pretraining", "eval"): ("What was measured", "outputs/"),
    ("tutorials/pretraining", "mixed"): ("What was measured", "outputs/"),
}


def tutorials() -> dict[str, dict[str, Callable[[], str]]]:
    """The parts of all these pages, by the marks in them."""
    return {
        f"docs/{page}.md": {
            block.output: partial(tutorial, page, block.output) for block in blocks(path) if block.output
        }
        for folder in ("tutorials", "questions")
        for path in sorted((ROOT / "docs" / folder).glob("*.md"))
        for page in [f"{folder}/{path.stem}"]
    }


PARTS: dict[str, dict[str, Callable[[], str]]] = {  # file -> name of the part -> what makes it
    "README.md": {"speed": speed_in_brief},
    "docs/performance.md": {
        "machines": machines,
        "demo": demo,
        "processors": lambda: tables.processors(read("processors")),
        **{name: partial(on_all_machines, name, make) for name, make in tables.SPEED.items()},
        "switches": partial(on_all_machines, "adapters", tables.adapter_switches),
    },
    "docs/studies.md": {
        "compare": compared,
        "compare-rates": lambda: tiny_lm_tables.rates(read("compare")),
    },
    "docs/experiments.md": {
        **{name: partial(evidence, name) for name in evidence_tables.PARTS},
        "evidence-arms": lambda: evidence_tables.rewards(read("evidence_rewards")),
        "advice": lambda: evidence_tables.advice(read("advice")),
        "defaults": lambda: evidence_tables.defaults(read("defaults")),
        "tiny-lm-stated": lambda: tiny_lm_tables.stated(read("tiny_lm")),
        "tiny-lm-losses": lambda: tiny_lm_tables.losses(read("tiny_lm")),
    },
    "docs/labels.md": {
        name: partial(ended, name) for name in ("classification", "regression", "tags", "seq2seq", "labels")
    },
    "docs/plan.md": {"memory": plan},
    "docs/from_scratch.md": {name: partial(page_output, name) for name in read("from_scratch")["outputs"]},
    "docs/preferences.md": {"dpo": partial(ended, "dpo")},
    "docs/eval.md": {"answers": lambda: tables.answers(read("answers"))},
    "docs/rewards.md": {"grpo": lambda: tables.grpo(read("grpo"))},
    "docs/devices.md": {"devices": devices},
    "docs/serving.md": {"serving": serving, "soak": soak},
    **{
        f"docs/coming_from/{page}.md": {"settings": partial(settings_of, tool)}
        for page, tool in pages_of_tools().items()
    },
    "docs/compatibility.md": {
        "languages": works_on_architectures,
        "architectures": architectures,
        "untried": untried,
        "servers": partial(works_with, "servers"),
        "quantization": partial(works_with, "quantization"),
        "source": compatibility_source,
    },
    "docs/verify.md": {"faults": verify_faults, "trials": verify_trials},
    **tutorials(),
}


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for file, parts in PARTS.items():
        path = ROOT / file
        path.write_text(with_parts(path.read_text(), {name: make() for name, make in parts.items()}))


if __name__ == "__main__":
    main()
