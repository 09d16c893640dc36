"""Markdown tables of what benchmarks/results holds.

    python benchmarks/tables.py                  all of them
    python benchmarks/tables.py steps memory     these
    python benchmarks/tables.py --quick          those of `--quick` runs

Medians; a range in brackets is that of the repeats.
"""

import json
import statistics
import sys
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

from measure import QUICK, RESULTS

Found = list[dict[str, Any]]  # cells: settings and result of each
Rows = Iterable[list[str]]
OURS = "tailora"
IN_PLACE = f"{OURS}, in place"  # merging for good


def table(title: str, head: list[str], rows: Rows) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return f"**{title}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def grouped(cells: Found, *keys: str) -> dict[tuple[Any, ...], Found]:
    """Cells by the values of these settings, in the order that they were measured."""
    groups: dict[tuple[Any, ...], Found] = {}
    for one in cells:
        groups.setdefault(tuple(one["cell"][key] for key in keys), []).append(one)
    return groups


def ranged(value: dict[str, float], form: str = "{:.2f}") -> str:
    median, low, high = (form.format(value[key]) for key in ("median", "low", "high"))
    return median if low == high else f"{median} ({low} to {high})"


def steps(cells: Found) -> list[str]:
    """Step time in ms, over the bound, and over tailora's."""
    head = ["shape", "bound, ms", "frozen products", OURS, "x bound", "fast off, x tailora", "PEFT", "full fine-tuning"]
    tables = []
    for (threads, malloc), group in grouped(cells, "threads", "malloc").items():
        rows = [steps_row(one["cell"], one["result"]) for one in group]
        clock = group[0]["result"]["clock"]
        tables.append(table(f"Step: {threads} thread(s), {clock} time, malloc {malloc}", head, rows))
    return tables


def steps_row(cell: dict[str, Any], result: dict[str, Any]) -> list[str]:
    others = [ranged(result["x_tailora"][arm]) for arm in ("fast off", "PEFT", "full")]
    return [
        f"{cell['shape']} {cell['dtype']}",
        f"{1000 * result['bound_seconds']:.0f} at {result['peak_gflops']:.0f} GFLOP/s",
        milliseconds(result["seconds"]["products"]),
        milliseconds(result["seconds"][OURS]),
        ranged(result["x_bound"][OURS]),
        *others,
    ]


def memory(cells: Found) -> list[str]:
    """MB above the steady state; in brackets what is held in all."""
    arms = list(dict.fromkeys(one["cell"]["arm"] for one in cells))
    head = ["", *arms, "tailora / PEFT"]
    tables = []
    for (malloc,), group in grouped(cells, "malloc").items():
        rows = []
        for (shape, dtype, checkpointing), points in grouped(group, "shape", "dtype", "checkpointing").items():
            by_arm = {one["cell"]["arm"]: one["result"] for one in points}
            if not {OURS, "PEFT"} <= by_arm.keys():  # a run that was cut
                continue
            ratio = by_arm[OURS]["above_bytes"] / by_arm["PEFT"]["above_bytes"]
            label = f"{shape} {dtype}{', checkpointed' if checkpointing else ''}"
            rows.append([label, *(megabytes(by_arm[arm]) if arm in by_arm else "" for arm in arms), f"{ratio:.2f}"])
        tables.append(table(f"Peak memory above the steady state, MB (steady), malloc {malloc}", head, rows))
    return tables


def quantized(cells: Found) -> list[str]:
    """The demo model on bases stored in several ways."""
    ratios = next((one["result"]["x_bf16"] for one in cells if one["cell"]["what"] == "speed"), {})
    head = [
        "base",
        "weights, MB",
        "kept for the backward, MB",
        "peak, GB",
        "step, x bf16",
        "held-out loss before",
        "after",
    ]
    rows = []
    for one in cells:
        if one["cell"]["what"] == "run":
            arm, found = one["cell"]["arm"], one["result"]
            sizes = [f"{found['base_bytes'] / 1e6:.0f}", f"{found['kept_bytes'] / 1e6:.0f}"]
            losses = [f"{found[key]:.3f}" for key in ("loss_before", "loss_after")]
            speed = ranged(ratios[arm]) if arm in ratios else ""
            rows.append([arm, *sizes, f"{found['peak_bytes'] / 1e9:.2f}", speed, *losses])
    return [table("The demo model on quantised bases", head, rows)]


def adapters(cells: Found) -> list[str]:
    titles = {
        "switch": ("Switching adapters, ms", "loaded", 1000.0),
        "decode": ("One forward of 64 rows of one token, 6 layers, ms", "adapters among the rows", 1000.0),
        "prefill": ("One forward of 64 rows of 16 tokens, 6 layers, ms", "adapters among the rows", 1000.0),
        "merge": ("Merging, ms per linear layer", "layers of the model", 1000.0),
        "load": ("Attaching and loading an adapter, CPU s", "linear layers", 1.0),
    }
    tables = []
    for (what,), group in grouped(cells, "what").items():
        title, label, unit = titles[what]
        arms = list(group[0]["result"]["seconds"])
        own = [arm for arm in arms if arm in (OURS, IN_PLACE)]
        rows = [
            [
                f"{one['cell']['value']}, {one['cell']['dtype']}",
                *(ranged(scaled(one["result"]["seconds"][arm], unit), "{:.3f}") for arm in arms),
                *(ratio_of(one["result"]["seconds"], "PEFT", arm) for arm in own),
            ]
            for one in group
        ]
        tables.append(table(title, [label, *arms, *(f"PEFT / {arm}" for arm in own)], rows))
    return tables


def inference(cells: Found) -> list[str]:
    """Milliseconds a token, and what the adapter beside the weights costs."""
    tables = []
    answers = [one for one in cells if one["cell"]["what"] == "decode"]
    for kind, title in (("next", "One more token"), ("first", "The first token, after 64 of a prompt")):
        rows = []
        for one in answers:
            cell, runs = one["cell"], one["result"]["runs"]
            times = {name.removesuffix(f": {kind}"): runs[name] for name in runs if name.endswith(f": {kind}")}
            over = measured_ratios(times, OURS, f"{OURS}, merged"), measured_ratios(times, "PEFT", "PEFT, merged")
            last = measured_ratios(times, "PEFT", OURS)
            label = f"{cell['dtype']}, {cell['value']} cache, {cell['threads']} thread(s)"
            rows.append(
                [label, *(ranged(scaled(spread_of(each), 1000), "{:.1f}") for each in times.values()), *over, last]
            )
        arms = [name.removesuffix(": next") for name in answers[0]["result"]["runs"] if name.endswith("next")]
        head = ["", *arms, "tailora / merged", "PEFT / merged", "PEFT / tailora"]
        tables.append(table(f"{title}, ms", head, rows))
    switches = [one for one in cells if one["cell"]["what"] == "switch"]
    rows = [
        [
            str(one["cell"]["value"]),
            *(ranged(scaled(one["result"]["seconds"][arm], 1000.0), "{:.2f}") for arm in (OURS, "PEFT")),
        ]
        for one in switches
    ]
    return [*tables, table("Switching on 210 linear layers, ms", ["loaded", OURS, "PEFT"], rows)]


def measured_ratios(times: dict[str, list[float]], arm: str, over: str) -> str:
    """Of two arms, round by round."""
    return ranged(spread_of([own / other for own, other in zip(times[arm], times[over], strict=True)]))


def growth(cells: Found) -> list[str]:
    tables = []
    for (axis,), group in grouped(cells, "axis").items():
        rows = [
            [
                str(one["cell"]["value"]),
                milliseconds(one["result"]["seconds"][OURS]),
                milliseconds(one["result"]["seconds"]["PEFT"]),
                ranged(one["result"]["x_tailora"]["PEFT"]),
            ]
            for one in group
        ]
        tables.append(table(f"Step time by {axis}, ms", [axis, OURS, "PEFT", "PEFT / tailora"], rows))
    return tables


def real(cells: Found) -> list[str]:
    """Time to one pass, and to the loss that every arm reached."""
    first = ["", "training, s", "x tailora", "with start-up, s", "tokens/s"]
    head = [*first, "loss after", "s to that loss", "x tailora", "peak, GB"]
    tables = []
    for (data,), group in grouped(cells, "data").items():
        arms = grouped(group, "arm")
        if (OURS,) not in arms:  # a run that was cut
            continue
        walls = {arm: statistics.median(one["result"]["wall"] for one in runs) for (arm,), runs in arms.items()}
        curves = {arm: runs[0]["result"]["curve"] for (arm,), runs in arms.items()}
        target = max(curve[-1]["loss"] for curve in curves.values())
        reached = {arm: seconds_to(curve, target) for arm, curve in curves.items()}
        rows = [
            real_row(arm, [one["result"] for one in runs], walls, curves[arm][-1]["loss"], reached)
            for (arm,), runs in sorted(arms.items(), key=lambda each: each[0] != (OURS,))
        ]
        learned = group[0]["result"]["supervised_tokens"]
        tables.append(table(f"{data}: one pass, {learned:,} supervised tokens; that loss: {target:.3f}", head, rows))
    return tables


def real_row(arm: str, results: Found, walls: dict[str, float], loss: float, reached: dict[str, float]) -> list[str]:
    seconds = spread_of([result["wall"] for result in results])
    return [
        arm,
        ranged(seconds, "{:.0f}"),
        f"{walls[arm] / walls[OURS]:.2f}",
        ranged(spread_of([result["whole_wall"] for result in results]), "{:.0f}"),
        f"{results[0]['tokens'] / seconds['median']:.0f}",
        f"{loss:.3f}",
        f"{reached[arm]:.0f}",
        f"{reached[arm] / reached[OURS]:.2f}",
        f"{max(result['peak_bytes'] for result in results) / 1e9:.2f}",
    ]


def seconds_to(curve: Found, target: float) -> float:
    """When the held-out loss first came down to the target, along straight lines between snapshots."""
    if curve[0]["loss"] <= target:
        return float(curve[0]["wall"])
    for before, after in pairwise(curve):
        if after["loss"] <= target:
            share = (before["loss"] - target) / (before["loss"] - after["loss"])
            return float(before["wall"] + share * (after["wall"] - before["wall"]))
    raise ValueError(f"the curve ends at {curve[-1]['loss']}, above {target}")


def startup(cells: Found) -> list[str]:
    watched = [one["result"] for one in cells if one["cell"]["what"] == "watched"]
    profiled = [one["result"] for one in cells if one["cell"]["what"] == "profiled"]
    whole = [
        [label, ranged(spread_of([run[key] for run in watched]))]
        for label, key in [("everything loaded and checked", "ready"), ("first step done", "first_step_done")]
    ]
    parts = [(name, s) for one in profiled for name, s in {"imports": one["imports"], **one["parts"]}.items()]
    return [
        table("`tailora train` on the cached demo model, CPU s until", ["", "s"], whole),
        table("Where they go (under a profiler)", ["", "s"], [[name, f"{s:.2f}"] for name, s in parts]),
    ]


def curves(cells: Found) -> list[str]:
    """How far each way's losses go from those of the plain path."""
    by_way = {one["cell"]["way"]: one["result"] for one in cells}
    plain = by_way.pop("fast off")
    rows = [
        [way, *(f"{apart(result[what], plain[what]):.1e}" for what in ("losses", "held_out")), result["kernels"]]
        for way, result in by_way.items()
    ]
    steps = len(plain["losses"])
    head = ["way", "largest difference of a step's loss", "of the held-out loss", "what the header says"]
    return [table(f"{steps} steps in float32 against --fast off, nats per token", head, rows)]


def apart(values: list[float], others: list[float]) -> float:
    return max(abs(value - other) for value, other in zip(values, others, strict=True))


def milliseconds(value: dict[str, float]) -> str:
    return ranged(scaled(value, 1000), "{:.0f}")


def megabytes(result: dict[str, Any]) -> str:
    return f"{result['above_bytes'] / 1e6:.0f} ({result['steady_bytes'] / 1e6:.0f})"


def scaled(value: dict[str, float], unit: float) -> dict[str, float]:
    return {key: unit * number for key, number in value.items()}


def spread_of(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def ratio_of(seconds: dict[str, dict[str, float]], arm: str, over: str) -> str:
    return f"{seconds[arm]['median'] / seconds[over]['median']:.2f}"


def plan(cells: Found) -> list[str]:
    """Peak of the run's process, and what was foreseen over it."""
    head = [
        "configuration",
        "largest forward, tokens",
        "peak of the run, GB",
        "estimated / peak",
        "with --measure / peak",
    ]
    rows = [
        [
            one["cell"]["name"],
            f"{one['result']['largest_forward']['tokens']:,}",
            f"{one['result']['true_bytes'] / 1e9:.2f}",
            f"{one['result']['estimated_ratio']:.2f}",
            f"{one['result']['measured_ratio']:.2f}",
        ]
        for one in cells
    ]
    return [table("Memory, foreseen and true", head, rows)]


TABLES: dict[str, Callable[[Found], list[str]]] = {
    "steps": steps,
    "memory": memory,
    "quantized": quantized,
    "real": real,
    "growth": growth,
    "adapters": adapters,
    "inference": inference,
    "startup": startup,
    "curves": curves,
    "plan": plan,
}


def caption(content: dict[str, Any]) -> str:
    machine, loads = content["machine"], [one["load_before"] for one in content["cells"]]
    packages = ", ".join(f"{name} {number}" for name, number in machine["packages"].items())
    return (
        f"{machine['cores']} cores of an {machine['cpu']} ({', '.join(machine['bf16']) or 'no bf16'}); {packages}. "
        f"Load of the machine before the cells: {min(loads):.1f} to {max(loads):.1f}."
    )


def main() -> None:
    folder = QUICK if "--quick" in sys.argv else RESULTS
    wanted = [name for name in sys.argv[1:] if name != "--quick"]
    for name in wanted or [name for name in TABLES if (folder / f"{name}.json").exists()]:
        content = json.loads((folder / f"{name}.json").read_text())
        print("\n\n".join([f"## {name}", *TABLES[name](content["cells"]), caption(content)]) + "\n")


if __name__ == "__main__":
    main()
