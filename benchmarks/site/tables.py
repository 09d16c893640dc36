"""Markdown tables from the JSON files in benchmarks/results.

A number is the median of the repeats, and the range in brackets goes from the lowest to the highest. Each question of a
page has one table; benchmarks/results has all numbers.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

from benchmarks.measure import spread
from benchmarks.speed.grpo import GENERATIONS, TASKS

Cells = list[dict[str, Any]]  # what measure.py wrote: {"cell": settings, "result": numbers, ...} each
Spread = dict[str, float]  # median, low and high
OURS = "tailora"
IN_PLACE = f"{OURS}, in place"  # merging without a copy of the weights


# ---- Formatting


def table(head: Sequence[str], rows: Iterable[Sequence[str]], title: str = "") -> str:
    lines = [[cell.replace("|", "\\|") for cell in line] for line in (head, ["---"] * len(head), *rows)]
    heading = f"**{title}**\n\n" if title else ""
    return heading + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def grouped(cells: Cells, *keys: str) -> dict[tuple[Any, ...], Cells]:
    """Returns the cells by the values of these settings, in the order in which they were measured."""
    groups: dict[tuple[Any, ...], Cells] = {}
    for cell in cells:
        groups.setdefault(tuple(cell["cell"][key] for key in keys), []).append(cell)
    return groups


def ranged(value: Spread, form: str = "{:.2f}") -> str:
    """Returns "median (low to high)"; the median alone if all three look the same."""
    median, low, high = (form.format(value[key]) for key in ("median", "low", "high"))
    return median if low == high else f"{median} ({low} to {high})"


def medians(seconds: dict[str, Spread], arms: Sequence[str], form: str = "{:.0f}") -> list[str]:
    return [form.format(1000 * seconds[arm]["median"]) for arm in arms]


# ---- Training


def demo(summaries: dict[str, dict[str, Any]]) -> str:
    """The demo's run by tailora and by a hand-written loop around PEFT, on each machine."""
    keys = (("tokens_per_second", "{:.0f}"), ("peak_gigabytes", "{:.2f}"), ("loss_after", "{:.3f}"))
    rows = []
    for name, summary in summaries.items():
        pairs = [[form.format(summary[arm][key]["median"]) for arm in ("tailora", "peft")] for key, form in keys]
        speed = summary["tailora"]["tokens_per_second"]["median"] / summary["peft"]["tokens_per_second"]["median"]
        rows.append([name, *(f"{ours} / {peft}" for ours, peft in pairs), f"{speed:.2f}"])
    return table(["machine", "tokens/s", "peak memory, GB", "held-out loss after", "speed ratio"], rows)


def real(cells: Cells) -> str:
    """Time of one pass over real data, and time to the loss that every arm reaches."""
    rows = []
    for (data, name), group in grouped(cells, "data", "machine").items():
        by_arm = {arm: runs for (arm,), runs in grouped(group, "arm").items()}
        arms = sorted(by_arm, key=lambda arm: arm != OURS)
        times = {arm: spread([run["result"]["wall"] for run in by_arm[arm]])["median"] for arm in arms}
        curves = {arm: by_arm[arm][0]["result"]["curve"] for arm in arms}
        target = max(curve[-1]["loss"] for curve in curves.values())
        reached = {arm: seconds_to(curves[arm], target) for arm in arms}
        rows += [
            [
                f"{data}, {name}",
                arm,
                f"{times[arm]:.0f}",
                f"{times[arm] / times[OURS]:.2f}",
                f"{max(run['result']['peak_bytes'] for run in by_arm[arm]) / 1e9:.2f}",
                f"{curves[arm][-1]['loss']:.3f}",
                f"{reached[arm] / reached[OURS]:.2f}",
            ]
            for arm in arms
        ]
    over = f"/ {OURS}"
    return table(["data, machine", "arm", "training, s", over, "peak, GB", "loss after", f"time to loss {over}"], rows)


def seconds_to(curve: Cells, target: float) -> float:
    """Returns when the held-out loss first fell to the target, by straight lines between snapshots."""
    if curve[0]["loss"] <= target:
        return float(curve[0]["wall"])
    for before, after in pairwise(curve):
        if after["loss"] <= target:
            share = (before["loss"] - target) / (before["loss"] - after["loss"])
            return float(before["wall"] + share * (after["wall"] - before["wall"]))
    raise ValueError(f"the curve ends at {curve[-1]['loss']}, above {target}")


RATIOS = (  # of docs/performance.md: what, cell, its number
    ("bfloat16, speed / PEFT's", ("training", "bfloat16"), "x_peft"),
    ("float32, speed / PEFT's", ("training", "float32"), "x_peft"),
    ("bfloat16, memory / PEFT's", ("training", "bfloat16"), "memory_x_peft"),
    ("float32, memory / PEFT's", ("training", "float32"), "memory_x_peft"),
    ("8 requests, speed / `generate`", ("serving", None), "x_generate"),
)


def processors(content: dict[str, Any]) -> str:
    """What is gained on smaller processors, and the losses."""
    keys = ("what", "dtype", "instructions", "threads")
    results = {tuple(cell["cell"].get(key) for key in keys): cell["result"] for cell in content["cells"]}
    columns = {"AVX2": "AVX2", "AVX512": "AVX512", "all": ", ".join(content["machine"]["bf16"]).upper() or "all"}
    rows = []
    for title, (what, dtype), key in RATIOS:
        for threads in (1, 2) if what == "training" else (1,):
            values = [results.get((what, dtype, name, threads)) for name in columns]
            rows.append([title, str(threads), *(f"{r[key]['median']:.2f}" if r else "" for r in values)])
    parts = [table(["", "threads", *columns.values()], rows)]
    parts += [losses(result) for (what, *_), result in results.items() if what == "losses"]
    return "\n\n".join([*parts, f"On {machine(content)}. {load(content)}"])


def losses(curves: dict[str, list[float]]) -> str:
    """How far the losses of bfloat16 models are from those in float32, in a sentence."""
    exact = curves["float32"]
    wide, stored = (
        sum(abs(a - b) for a, b in zip(curves[name], exact, strict=True)) / len(exact)
        for name in ("float32 products", "bfloat16 products")
    )
    return (
        f"Over {len(exact)} steps, losses of a bfloat16 model differ from a float32 model's by {wide:.4f} on average "
        f"if its products are computed in float32, and by {stored:.4f} if in bfloat16."
    )


def memory(cells: Cells) -> str:
    """MB above the steady state."""
    arms = (OURS, "fast off", "PEFT", "full")
    rows = []
    for (name, shape, dtype, checkpointing), points in grouped(
        cells, "machine", "shape", "dtype", "checkpointing"
    ).items():
        above = {point["cell"]["arm"]: point["result"]["above_bytes"] for point in points}
        if above.keys() >= set(arms):  # a run that was stopped lacks some
            label = f"{name}, {shape} {dtype}{', checkpointed' if checkpointing else ''}"
            rows.append([label, *(f"{above[arm] / 1e6:.0f}" for arm in arms), f"{above[OURS] / above['PEFT']:.2f}"])
    return table(["machine, shape", *arms, f"{OURS} / PEFT"], rows)


def growth(cells: Cells) -> str:
    """Time of a step along one axis at a time."""
    rows = [
        [
            f"{cell['cell']['axis']} {cell['cell']['value']}",
            *medians(cell["result"]["seconds"], [OURS, "PEFT"]),
            ranged(cell["result"]["x_tailora"]["PEFT"]),
        ]
        for cell in cells
    ]
    return table(["", f"{OURS}, ms", "PEFT, ms", f"PEFT / {OURS}"], rows)


def startup(cells: Cells) -> str:
    """CPU seconds of `tailora train` until its first step."""
    rows = []
    for (name,), group in grouped(cells, "machine").items():
        watched = [cell["result"] for cell in group if cell["cell"]["what"] == "watched"]
        rows.append([name, *(ranged(spread([run[key] for run in watched])) for key in ("ready", "first_step_done"))])
    return table(["machine", "everything is loaded and checked, s", "the first step is done, s"], rows)


# ---- Adapters in use


def inference(cells: Cells) -> str:
    """Time of one more token of an answer on one thread, in milliseconds."""
    rows = []
    for cell in cells:
        setting = cell["cell"]
        runs = cell["result"]["runs"]
        times = {arm.removesuffix(": next"): values for arm, values in runs.items() if arm.endswith(": next")}
        shown = [
            f"{1000 * spread(times[arm])['median']:.1f}"
            for arm in ("base", OURS, f"{OURS}, merged", "PEFT", "PEFT, merged")
        ]
        slower = ranged(spread([peft / ours for peft, ours in zip(times["PEFT"], times[OURS], strict=True)]))
        rows.append([f"{setting['machine']}, {setting['dtype']}, {setting['value']}", *shown, slower])
    head = ["machine, precision, cache", "base", OURS, "merged", "PEFT", "PEFT, merged", f"PEFT / {OURS}"]
    return table(head, rows)


def adapter_rows(cells: Cells) -> str:
    """1, 8 and 64 adapters in a batch of 64 rows, 6 layers."""
    tokens = {"decode": 1, "prefill": 16}
    rows = [
        [
            f"{setting['machine']}, {setting['dtype']}, {tokens[setting['what']]}",
            str(setting["value"]),
            *medians(cell["result"]["seconds"], [OURS], "{:.1f}"),
            ratio(cell, OURS, "base"),
            ratio(cell, "PEFT", OURS),
        ]
        for cell in cells
        if (setting := cell["cell"])["what"] in tokens and setting["value"] in (1, 8, 64)
    ]
    head = ["machine, precision, tokens", "adapters", f"{OURS}, ms", f"{OURS} / base", f"PEFT / {OURS}"]
    return table(head, rows)


def adapter_switches(cells: Cells) -> str:
    """Switching among the fewest and most adapters, merging the deeper model, and loading, in milliseconds."""
    operations = {  # what was measured: name, tailora's arm, PEFT's arm
        "switch": [("switch among {} adapters", OURS, "PEFT")],
        "merge": [
            ("merge, per linear layer of {} layers", OURS, "PEFT"),
            ("merge in place, per linear layer of {} layers", IN_PLACE, "PEFT"),
            ("unmerge, per linear layer of {} layers", f"{OURS}, unmerge", "PEFT, unmerge"),
        ],
        "load": [("attach and load on {} linear layers", OURS, "PEFT")],
    }
    rows = [
        [
            f"{name.format(cell['cell']['value'])}, {cell['cell']['dtype']}",
            *medians(cell["result"]["seconds"], [ours, peft], "{:.3f}"),
            ratio(cell, peft, ours),
        ]
        for cell in cells
        if cell["cell"]["value"] in (2, 64, 30, 1000)
        for name, ours, peft in operations.get(cell["cell"]["what"], [])
    ]
    return table(["operation", OURS, "PEFT", f"PEFT / {OURS}"], rows)


def ratio(cell: dict[str, Any], arm: str, over: str) -> str:
    seconds = cell["result"]["seconds"]
    return f"{seconds[arm]['median'] / seconds[over]['median']:.2f}"


# ---- Plans


def plan(cells: Cells) -> str:
    """What `tailora plan` found of memory and time, relative to the peak of the run's process and to its steps."""
    rows = [
        [
            cell["cell"]["name"],
            f"{cell['result']['largest_forward']['tokens']:,}",
            f"{cell['result']['true_bytes'] / 1e9:.2f}",
            f"{cell['result']['estimated_ratio']:.2f}",
            f"{cell['result']['measured_ratio']:.2f}",
            f"{cell['result']['true_seconds_per_token'] / cell['result']['measured_seconds_per_token']:.1f}",
        ]
        for cell in cells
    ]
    head = ["configuration", "tokens of the largest forward", "peak, GB", "plan / peak", "plan --measure / peak"]
    head += ["step / plan --measure"]
    return table(head, rows, "Memory and time of a step, estimated and measured")


SPEED: dict[str, Callable[[Cells], str]] = {  # name of a result -> its table in docs/performance.md
    "real": real,
    "memory": memory,
    "growth": growth,
    "inference": inference,
    "adapters": adapter_rows,
    "startup": startup,
}


def grpo(content: dict[str, Any]) -> str:
    """Whole steps of reinforcement learning, and what they consist of."""
    rows = []
    for arm, runs in content["runs"].items():
        task, dtype, name = arm.split("/")
        steps, sampling = ([seconds for run in runs for seconds in run[key]] for key in ("steps", "sampling"))
        training = [whole - part for whole, part in zip(steps, sampling, strict=True)]
        spreads = [
            spread([TASKS[task][2] * GENERATIONS / seconds for seconds in steps]),
            spread(sampling),
            spread(training),
        ]
        peak = max(run["peak_bytes"] for run in runs) / 1e9
        of_arm = [ranged(value, form) for value, form in zip(spreads, ("{:.2f}", "{:.1f}", "{:.1f}"), strict=True)]
        rows.append([f"{task}, {dtype}", name, *of_arm, f"{peak:.2f}", f"{len(runs)} x {len(runs[0]['steps'])}"])
    head = ["completions", "trainer", "completions/s", "sampling s", "training s", "peak GB", "runs x steps"]
    rows.sort(key=lambda row: row[0], reverse=True)
    return f"{table(head, rows)}\n\n{machine(content)}, one thread, CPU time. {packages(content)}."


def answers(content: dict[str, Any]) -> str:
    """The first metric of each run, before and after training, and how long answering took."""
    rows, shares = [], dict[int, list[float]]()
    for cell in content["cells"]:
        of_cell, result = cell["cell"], cell["result"]
        if of_cell["run"] == "demo":
            shares.setdefault(of_cell["threads"], []).append(100 * result["answering_share"])
            continue
        name, metric = next(iter(result["metrics"].items()))
        is_share = metric["flips"] is not None
        show, unit, points, digits = ("{:.0%}", 100, " points", 0) if is_share else ("{:.1f}", 1, "", 1)
        ends = " to ".join(f"{unit * metric['change'][end]:+.{digits}f}" for end in ("low", "high")) + points
        scores = f"{show.format(metric['before'])} to {show.format(metric['after'])}"
        minutes = f"{result['seconds']['all'] / 60:.1f}"
        answering = f"{result['answering_share']:.0%}"
        rows.append(
            [of_cell["run"], name, scores, ends, str(metric["examples"]), metric["finding"], minutes, answering]
        )
    head = [
        "data",
        "first metric",
        "before and after",
        "change, 95%",
        "prompts",
        "finding",
        "minutes",
        "of it answering",
    ]
    of_demo = "; ".join(
        f"{ranged(spread(values), '{:.0f}')}% with {threads} thread{'s' if threads > 1 else ''}"
        for threads, values in sorted(shares.items())
    )
    return (
        f"{table(head, rows)}\n\nOne thread; {machine(content)}; {packages(content)}. {load(content)}\n\n"
        f"Without `--metric`, the demo spends this share of its time on answers: {of_demo} "
        f"({len(shares[1])} runs each)."
    )


def machine(content: dict[str, Any]) -> str:
    """Returns "2 cores of an AMD EPYC (avx512_bf16)"."""
    cpu = content["machine"]
    return f"{cpu['cores']} cores of an {cpu['cpu']} ({', '.join(cpu['bf16']) or 'no bf16'})"


def packages(content: dict[str, Any]) -> str:
    return ", ".join(f"{name} {number}" for name, number in content["machine"]["packages"].items())


def load(content: dict[str, Any]) -> str:
    """Returns how busy the machine was before each cell: its load average, lowest and highest."""
    loads = [cell["load_before"] for cell in content["cells"]]
    return f"Load average of the machine before each measurement: {min(loads):.1f} to {max(loads):.1f}."
