"""Markdown tables from the JSON files in benchmarks/results.

A number is the median of the repeats, and the range in brackets goes from the lowest to the highest. No table is wider
than about 100 characters: results with more columns are split into several tables.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

from benchmarks.measure import spread

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


def ranged(value: Spread, form: str = "{:.2f}", unit: float = 1.0) -> str:
    """Returns "median (low to high)", every number times `unit`; the median alone if all three look the same."""
    median, low, high = (form.format(unit * value[key]) for key in ("median", "low", "high"))
    return median if low == high else f"{median} ({low} to {high})"


def milliseconds(value: Spread, form: str = "{:.0f}") -> str:
    return ranged(value, form, unit=1000)


def threads_of(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


# ---- Training


def demo(summary: dict[str, Any]) -> str:
    """The demo's run by tailora and by a hand-written loop around PEFT."""
    ours, peft, startup = (summary[arm] for arm in ("tailora", "peft", "startup"))
    before = f"{ours['loss_before']['median']:.3f}"
    rows = [
        demo_row(label, ours[key], peft[key], form)
        for label, key, form in (
            ("training speed, tokens/s", "tokens_per_second", "{:.0f}"),
            ("training time, s", "train_seconds", "{:.0f}"),
            ("peak memory, GB", "peak_gigabytes", "{:.2f}"),
            (f"held-out loss after training (before: {before})", "loss_after", "{:.3f}"),
        )
    ]
    return table(["", OURS, "PEFT, hand-written loop", f"{OURS} / PEFT"], [*rows, import_row(startup)])


def demo_row(label: str, ours: Spread, peft: Spread, form: str) -> list[str]:
    return [label, ranged(ours, form), ranged(peft, form), f"{ours['median'] / peft['median']:.2f}"]


def import_row(startup: dict[str, Spread]) -> list[str]:
    ours, peft = startup["import_tailora_over_torch"], startup["import_peft_over_torch"]
    return demo_row("CPU time of the import, relative to `import torch`", ours, peft, "{:.2f}")


def demo_in_brief(summary: dict[str, Any]) -> str:
    """The same in four lines without ranges, for README.md."""
    ours, peft, startup = (summary[arm] for arm in ("tailora", "peft", "startup"))
    lines = (
        ("training speed, tokens/s", ours["tokens_per_second"], peft["tokens_per_second"], "{:.0f}"),
        ("peak memory, GB", ours["peak_gigabytes"], peft["peak_gigabytes"], "{:.2f}"),
        ("held-out loss after training", ours["loss_after"], peft["loss_after"], "{:.3f}"),
        (
            "CPU time of the import, relative to `import torch`",
            startup["import_tailora_over_torch"],
            startup["import_peft_over_torch"],
            "{:.2f}",
        ),
    )
    rows = [[label, form.format(own["median"]), form.format(other["median"])] for label, own, other, form in lines]
    return table(["", OURS, "PEFT, hand-written loop"], rows)


def real(cells: Cells) -> list[str]:
    """Time of one pass over real data, and time to the loss that every arm reaches."""
    tables = []
    for (data,), group in grouped(cells, "data").items():
        by_arm = {arm: runs for (arm,), runs in grouped(group, "arm").items()}
        if OURS not in by_arm:  # a run that was stopped
            continue
        arms = sorted(by_arm, key=lambda arm: arm != OURS)
        times = {arm: spread([run["result"]["wall"] for run in by_arm[arm]]) for arm in arms}
        curves = {arm: by_arm[arm][0]["result"]["curve"] for arm in arms}
        target = max(curve[-1]["loss"] for curve in curves.values())
        reached = {arm: seconds_to(curves[arm], target) for arm in arms}
        passes = [
            [
                arm,
                ranged(times[arm], "{:.0f}"),
                f"{times[arm]['median'] / times[OURS]['median']:.2f}",
                ranged(spread([run["result"]["whole_wall"] for run in by_arm[arm]]), "{:.0f}"),
                f"{by_arm[arm][0]['result']['tokens'] / times[arm]['median']:.0f}",
                f"{max(run['result']['peak_bytes'] for run in by_arm[arm]) / 1e9:.2f}",
            ]
            for arm in arms
        ]
        losses = [
            [arm, f"{curves[arm][-1]['loss']:.3f}", f"{reached[arm]:.0f}", f"{reached[arm] / reached[OURS]:.2f}"]
            for arm in arms
        ]
        learned = group[0]["result"]["supervised_tokens"]
        head = ["", "training, s", f"/ {OURS}", "with start-up, s", "tokens/s", "peak, GB"]
        tables.append(table(head, passes, f"{data}: one pass, {learned:,} supervised tokens"))
        head = ["", "loss after the pass", f"s to a loss of {target:.3f}", f"/ {OURS}"]
        tables.append(table(head, losses, f"{data}: held-out loss"))
    return tables


def seconds_to(curve: Cells, target: float) -> float:
    """Returns when the held-out loss first fell to the target, by straight lines between snapshots."""
    if curve[0]["loss"] <= target:
        return float(curve[0]["wall"])
    for before, after in pairwise(curve):
        if after["loss"] <= target:
            share = (before["loss"] - target) / (before["loss"] - after["loss"])
            return float(before["wall"] + share * (after["wall"] - before["wall"]))
    raise ValueError(f"the curve ends at {curve[-1]['loss']}, above {target}")


def steps(cells: Cells) -> list[str]:
    """Time of a step beside the machine's bound, then the other arms' time relative to tailora's."""
    tables = []
    for (threads, malloc), group in grouped(cells, "threads", "malloc").items():
        title = f"{threads_of(threads)}, {group[0]['result']['clock']} time, malloc {malloc}"
        bounds, ratios = [], []
        for cell in group:
            shape, result = f"{cell['cell']['shape']} {cell['cell']['dtype']}", cell["result"]
            bounds.append(
                [
                    shape,
                    f"{1000 * result['bound_seconds']:.0f} ({result['peak_gflops']:.0f})",
                    milliseconds(result["seconds"]["products"]),
                    milliseconds(result["seconds"][OURS]),
                    ranged(result["x_bound"][OURS]),
                ]
            )
            ratios.append([shape, *(ranged(result["x_tailora"][arm]) for arm in ("fast off", "PEFT", "full"))])
        head = ["shape", "bound (GFLOP/s)", "frozen products", OURS, f"{OURS} / bound"]
        tables.append(table(head, bounds, f"A step, ms: {title}"))
        head = ["shape", "fast off", "PEFT", "full fine-tuning"]
        tables.append(table(head, ratios, f"Time of a step / {OURS}'s: {title}"))
    return tables


def memory(cells: Cells) -> list[str]:
    """MB above the steady state; the steady state in brackets."""
    arms = list(dict.fromkeys(cell["cell"]["arm"] for cell in cells))
    tables = []
    for (malloc,), group in grouped(cells, "malloc").items():
        rows = []
        for (shape, dtype, checkpointing), points in grouped(group, "shape", "dtype", "checkpointing").items():
            by_arm = {point["cell"]["arm"]: point["result"] for point in points}
            if not {OURS, "PEFT"} <= by_arm.keys():  # a run that was stopped
                continue
            ratio = by_arm[OURS]["above_bytes"] / by_arm["PEFT"]["above_bytes"]
            label = f"{shape} {dtype}{', checkpointed' if checkpointing else ''}"
            rows.append([label, *(megabytes(by_arm[arm]) if arm in by_arm else "" for arm in arms), f"{ratio:.2f}"])
        title = f"Peak memory of a step above the steady state, MB (steady state): malloc {malloc}"
        tables.append(table(["", *arms, f"{OURS} / PEFT"], rows, title))
    return tables


def megabytes(result: dict[str, Any]) -> str:
    return f"{result['above_bytes'] / 1e6:.0f} ({result['steady_bytes'] / 1e6:.0f})"


def growth(cells: Cells) -> list[str]:
    """Time of a step along one axis at a time."""
    tables = []
    for (axis,), group in grouped(cells, "axis").items():
        rows = [
            [
                str(cell["cell"]["value"]),
                milliseconds(cell["result"]["seconds"][OURS]),
                milliseconds(cell["result"]["seconds"]["PEFT"]),
                ranged(cell["result"]["x_tailora"]["PEFT"]),
            ]
            for cell in group
        ]
        tables.append(table([axis, OURS, "PEFT", f"PEFT / {OURS}"], rows, f"Time of a step by {axis}, ms"))
    return tables


def curves(cells: Cells) -> list[str]:
    """How far the losses of each setting are from those of `--fast off`."""
    by_setting = {cell["cell"]["way"]: cell["result"] for cell in cells}
    plain = by_setting.pop("fast off")
    rows = [
        [
            setting,
            f"{largest_difference(result['losses'], plain['losses']):.1e}",
            f"{largest_difference(result['held_out'], plain['held_out']):.1e}",
        ]
        for setting, result in by_setting.items()
    ]
    head = ["setting", "largest difference of a step's loss", "of the held-out loss"]
    title = f"{len(plain['losses'])} steps in float32 against `--fast off`, nats per token"
    return [table(head, rows, title)]


def largest_difference(values: list[float], others: list[float]) -> float:
    return max(abs(value - other) for value, other in zip(values, others, strict=True))


def startup(cells: Cells) -> list[str]:
    """CPU seconds of `tailora train` until its first step."""
    watched = [cell["result"] for cell in cells if cell["cell"]["what"] == "watched"]
    milestones = [
        [label, ranged(spread([run[key] for run in watched]))]
        for label, key in [("everything is loaded and checked", "ready"), ("the first step is done", "first_step_done")]
    ]
    return [table(["until", "CPU s"], milestones, "`tailora train` on the cached demo model")]


# ---- Adapters in use


def inference(cells: Cells) -> list[str]:
    """Time of the first token of an answer and of each later one; then switching among adapters."""
    tables = []
    answers = [cell for cell in cells if cell["cell"]["what"] == "decode"]
    for (threads,), group in grouped(answers, "threads").items():
        for key, name, form in (
            ("next", "One more token", "{:.1f}"),
            ("first", "The first token, prompt of 64", "{:.0f}"),
        ):
            separate, merged = [], []
            for cell in group:
                runs, label = cell["result"]["runs"], f"{cell['cell']['dtype']}, {cell['cell']['value']}"
                times = {arm.removesuffix(f": {key}"): runs[arm] for arm in runs if arm.endswith(f": {key}")}
                shown = {arm: milliseconds(spread(values), form) for arm, values in times.items()}
                beside = [shown[arm] for arm in ("base", OURS, "PEFT")]
                separate.append([label, *beside, round_ratio(times, "PEFT", OURS)])
                inside = [shown[f"{arm}, merged"] for arm in (OURS, "PEFT")]
                over = [round_ratio(times, arm, f"{arm}, merged") for arm in (OURS, "PEFT")]
                merged.append([label, *inside, *over])
            head = ["cache", "base", OURS, "PEFT", f"PEFT / {OURS}"]
            tables.append(table(head, separate, f"{name}, ms, {threads_of(threads)}"))
            head = ["cache", f"{OURS}, merged", "PEFT, merged", f"{OURS} / merged", "PEFT / merged"]
            tables.append(table(head, merged, f"{name}, adapter merged, ms, {threads_of(threads)}"))
    switches = [
        [
            str(cell["cell"]["value"]),
            *(milliseconds(cell["result"]["seconds"][arm], "{:.2f}") for arm in (OURS, "PEFT")),
        ]
        for cell in cells
        if cell["cell"]["what"] == "switch"
    ]
    if switches:
        tables.append(table(["loaded", OURS, "PEFT"], switches, "Switching adapters on 210 linear layers, ms"))
    return tables


def round_ratio(times: dict[str, list[float]], arm: str, over: str) -> str:
    """Returns the ratio of two arms' times, round by round."""
    return ranged(spread([time / other for time, other in zip(times[arm], times[over], strict=True)]))


def adapters(cells: Cells) -> list[str]:
    """One adapter per batch row, switching, merging and loading."""
    by_what = {what: group for (what,), group in grouped(cells, "what").items()}
    tables = []
    for what, name, form in (("decode", "one token", "{:.1f}"), ("prefill", "16 tokens", "{:.0f}")):
        for (dtype,), group in grouped(by_what.get(what, []), "dtype").items():
            title = f"A forward of 64 batch rows of {name}, 6 layers, {dtype}, ms"
            arms, first = ["base", OURS, "PEFT"], "tailora, first call"
            rows = [time_row(cell, [*arms, first], form, "PEFT", OURS) for cell in group]
            tables.append(table(["adapters", *arms, "first call", f"PEFT / {OURS}"], rows, title))
    if group := by_what.get("switch"):
        arms = [OURS, f"{OURS}, between two", "PEFT"]
        rows = [time_row(cell, arms, "{:.3f}", "PEFT", OURS) for cell in group]
        tables.append(table(["loaded", *arms, f"PEFT / {OURS}"], rows, "Switching adapters, bfloat16, ms"))
    for (dtype,), group in grouped(by_what.get("merge", []), "dtype").items():
        rows = [
            [*time_row(cell, [OURS, IN_PLACE, "PEFT"], "{:.3f}", "PEFT", OURS), ratio(cell, "PEFT", IN_PLACE)]
            for cell in group
        ]
        head = ["layers", OURS, "in place", "PEFT", f"PEFT / {OURS}", "PEFT / in place"]
        tables.append(table(head, rows, f"Merging, {dtype}, ms per linear layer"))
        arms = [f"{OURS}, unmerge", "PEFT, unmerge"]
        rows = [time_row(cell, arms, "{:.3f}", "PEFT, unmerge", f"{OURS}, unmerge") for cell in group]
        tables.append(table(["layers", OURS, "PEFT", f"PEFT / {OURS}"], rows, f"Unmerging, {dtype}, ms per layer"))
    if group := by_what.get("load"):
        rows = [time_row(cell, [OURS, "PEFT"], "{:.0f}", "PEFT", OURS) for cell in group]
        title = "Attaching and loading an adapter, float32, CPU ms"
        tables.append(table(["linear layers", OURS, "PEFT", f"PEFT / {OURS}"], rows, title))
    return tables


def time_row(cell: dict[str, Any], arms: list[str], form: str, arm: str, over: str) -> list[str]:
    seconds = cell["result"]["seconds"]
    return [str(cell["cell"]["value"]), *(milliseconds(seconds[name], form) for name in arms), ratio(cell, arm, over)]


def ratio(cell: dict[str, Any], arm: str, over: str) -> str:
    seconds = cell["result"]["seconds"]
    return f"{seconds[arm]['median'] / seconds[over]['median']:.2f}"


# ---- Plans


def plan(cells: Cells) -> list[str]:
    """What `tailora plan` estimated of memory, relative to the peak of the run's process."""
    rows = [
        [
            cell["cell"]["name"],
            f"{cell['result']['largest_forward']['tokens']:,}",
            f"{cell['result']['true_bytes'] / 1e9:.2f}",
            f"{cell['result']['estimated_ratio']:.2f}",
            f"{cell['result']['measured_ratio']:.2f}",
        ]
        for cell in cells
    ]
    head = ["configuration", "tokens of the largest forward", "peak, GB", "plan / peak", "plan --measure / peak"]
    return [table(head, rows, "Memory, estimated and measured")]


# ---- All of them


def preferences(cells: Cells) -> list[str]:
    """Six steps on pairs of replies beside TRL."""
    by_arm = {arm: [run["result"] for run in runs] for (arm,), runs in grouped(cells, "arm").items()}
    ours = spread([run["cpu"] for run in by_arm[OURS]])["median"]
    rows = []
    for arm, runs in by_arm.items():
        cpu = spread([run["cpu"] for run in runs])
        rows.append(
            [
                arm,
                ranged(cpu, "{:.0f}"),
                f"{cpu['median'] / ours:.2f}",
                f"{max(run['peak_bytes'] for run in runs) / 1e9:.2f}",
            ]
        )
    head = ["arm", "CPU seconds", "relative", "peak GB"]
    return [table(head, rows)]


TABLES: dict[str, Callable[[Cells], list[str]]] = {
    "real": real,
    "steps": steps,
    "memory": memory,
    "curves": curves,
    "growth": growth,
    "inference": inference,
    "adapters": adapters,
    "startup": startup,
    "plan": plan,
    "preferences": preferences,
}


def machine(content: dict[str, Any]) -> str:
    """Returns "2 cores of an AMD EPYC (avx512_bf16)"."""
    cpu = content["machine"]
    return f"{cpu['cores']} cores of an {cpu['cpu']} ({', '.join(cpu['bf16']) or 'no bf16'})"


def packages(content: dict[str, Any]) -> str:
    return ", ".join(f"{name} {number}" for name, number in content["machine"]["packages"].items())


def load(content: dict[str, Any]) -> str:
    """Returns how busy the machine was before each cell: its load average, lowest and highest."""
    loads = [cell["load_before"] for cell in content["cells"]]
    return f"Load of the machine before the cells: {min(loads):.1f} to {max(loads):.1f}."
