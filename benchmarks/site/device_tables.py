"""Markdown of what gpu.py measured on a device, one section for each file in benchmarks/results/devices."""

from statistics import median
from typing import Any

from benchmarks.site.tables import packages, table

Content = dict[str, Any]  # of one JSON file
NEVER = "`benchmarks/gpu.py` was never run on a card: there are no figures of any."


def devices(contents: list[Content]) -> str:
    return "\n\n".join(device(content) for content in contents) or NEVER


def device(content: Content) -> str:
    card = content["device"]
    memory = f", {card['memory_bytes'] / 2**30:.0f} GiB" if card["memory_bytes"] else ""
    versions = ", ".join(f"{name} {card[name]}" for name in ("cuda", "hip", "dtype") if card[name])
    shapes = "" if content["shape"] == "real" else " Tiny shapes: to try the script, not to read the figures."
    about = f"{packages(content)}{f'; {versions}' if versions else ''}.{shapes}"
    parts = [f"### {card['name']}{memory}", about]
    for cell in content["cells"]:
        make = PARTS.get(cell["cell"]["what"])
        parts += make(cell["cell"], cell["result"]) if make else []
    failed = {
        name_of(cell["cell"]): cell["result"]["failed"] for cell in content["cells"] if "failed" in cell["result"]
    }
    parts += [f"Not finished: {'; '.join(f'{name}: {why}' for name, why in failed.items())}."] if failed else []
    return "\n\n".join(parts)


def name_of(cell: dict[str, Any]) -> str:
    return " ".join([cell["what"], *(str(cell[key]) for key in ("model", "tokens", "rows") if key in cell)])


# ---- Cells


def ceilings(_: dict[str, Any], result: dict[str, Any]) -> list[str]:
    products = [f"{flops / 1e12:,.1f} TFLOP/s in {dtype}" for dtype, flops in result.get("flops", {}).items()]
    copies = [f"copies {result['bytes_per_second'] / 1e9:,.0f} GB/s"] if "bytes_per_second" in result else []
    launches = [f"a kernel of one number {1e6 * result['launch_seconds']:.1f} us"] if "launch_seconds" in result else []
    return [f"At best: {', '.join([*products, *copies, *launches])}."] if products else []


def train(cell: dict[str, Any], result: dict[str, Any]) -> list[str]:
    """A table for each length of the documents."""
    parts = []
    for length, arms in result.items():
        if not length.isdigit():
            continue
        base = arms.get("PEFT + Trainer", {}).get("tokens_per_second")
        rows = [[name, *step_of(arm, base)] for name, arm in arms.items()]
        head = ["arm", "ms a step", "tokens/s", "x PEFT + Trainer", "allocated", "reserved", "kernels", "waits"]
        title = f"{cell['model']}, {cell['tokens']:,} tokens a step in documents of {int(length):,}"
        parts.append(table(head, rows, title))
    return parts


def step_of(arm: dict[str, Any], base: float | None) -> list[str]:
    if not arm["seconds"]:
        return [arm.get("failed", "no time was left")[:60], *[""] * 6]
    return [
        f"{1000 * median(arm['seconds']):.1f}",
        f"{arm['tokens_per_second']:,.0f}",
        f"{arm['tokens_per_second'] / base:.2f}" if base else "",
        *(f"{arm[key] / 1e9:.2f} GB" if key in arm else "" for key in ("allocated", "reserved")),
        *counts_of(arm),
    ]


def counts_of(arm: dict[str, Any]) -> list[str]:
    return [f"{arm[key]:,.0f}" if key in arm else "" for key in ("kernels", "waits")]


def nf4(cell: dict[str, Any], result: dict[str, Any]) -> list[str]:
    parts = train(cell, result)
    if "gradient_error" in result:
        parts.append(
            f"The gradient on the NF4 base is {result['gradient_error']:.1%} from that on its dequantised base."
        )
    return parts


def decode(cell: dict[str, Any], result: dict[str, Any]) -> list[str]:
    arms = {name: arm for name, arm in result.items() if isinstance(arm, dict)}
    rows = [
        [name, *(f"{1000 * median(arm[key]):.1f}" for key in ("first", "next")), *counts_of(arm)[:1]]
        for name, arm in arms.items()
    ]
    title = f"{cell['model']}, {cell['rows']} prompts of 64 tokens"
    return [table(["arm", "first token, ms", "each later one, ms", "its kernels"], rows, title)] if rows else []


def rows(cell: dict[str, Any], result: dict[str, Any]) -> list[str]:
    counts = [count for count in result if count.isdigit()]
    arms = list(dict.fromkeys(arm for count in counts for arm in result[count]))
    lines = [
        [arm, *(milliseconds_and_kernels(result[count][arm]) if arm in result[count] else "" for count in counts)]
        for arm in arms
    ]
    title = f"{cell['model']}, {cell['rows']} rows of one token: ms and kernels by the number of adapters"
    return [table(["arm", *counts], lines, title)] if lines else []


def milliseconds_and_kernels(arm: dict[str, Any]) -> str:
    kernels = f", {arm['kernels']:,}" if "kernels" in arm else ""
    return f"{1000 * median(arm['seconds']):.1f}{kernels}"


def curves(cell: dict[str, Any], result: dict[str, Any]) -> list[str]:
    losses = result.get("losses", {})
    if len(losses) < 2:
        return []
    apart = max(abs(here - there) for here, there in zip(losses["device"], losses["cpu"], strict=True))
    last = f"{losses['device'][-1]:.4f} and {losses['cpu'][-1]:.4f}"
    return [f"{cell['steps']} steps here and on the CPU end at a loss of {last}; at most {apart:.4f} apart on the way."]


def tests(_: dict[str, Any], result: dict[str, Any]) -> list[str]:
    return [f"`pytest -m gpu`: {result['said'][-1].strip()}."] if result.get("said") else []


PARTS = {
    "ceilings": ceilings,
    "train": train,
    "nf4": nf4,
    "decode": decode,
    "rows": rows,
    "curves": curves,
    "tests": tests,
}
