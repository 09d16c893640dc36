"""Markdown of what gpu.py measured on a device, one section for each file in benchmarks/results/devices."""

from statistics import median
from typing import Any

from benchmarks.site.tables import packages, table

Content = dict[str, Any]  # of one JSON file
NEVER = "`benchmarks/gpu.py` has never run on a GPU, so there are no figures yet."


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


COLUMNS = {  # what an arm reports -> head of its column, factor, form
    "seconds": ("ms", 1e3, "{:.1f}"),
    "first": ("first token, ms", 1e3, "{:.1f}"),
    "next": ("each later one, ms", 1e3, "{:.1f}"),
    "tokens_per_second": ("tokens/s", 1, "{:,.0f}"),
    "allocated": ("allocated, GB", 1e-9, "{:.2f}"),
    "reserved": ("reserved, GB", 1e-9, "{:.2f}"),
    "kernels": ("kernels", 1, "{:,.0f}"),
    "waits": ("waits", 1, "{:,.0f}"),
}


def arms(title: str, result: dict[str, Any]) -> list[str]:
    """A row for each arm with what it reports, medians of repeats; a last column says why an arm ended early."""
    measured = {name: arm for name, arm in result.items() if isinstance(arm, dict)}
    keys = [key for key in COLUMNS if any(key in arm for arm in measured.values())]
    lines = [
        [name, *(number(key, arm.get(key)) for key in keys), str(arm.get("failed", ""))[:60]]
        for name, arm in measured.items()
    ]
    return [table(["arm", *(COLUMNS[key][0] for key in keys), ""], lines, title)] if lines else []


def number(key: str, value: Any) -> str:
    _, factor, form = COLUMNS[key]
    return form.format(factor * (median(value) if isinstance(value, list) else value)) if value else ""


def train(cell: dict[str, Any], result: dict[str, Any]) -> list[str]:
    """A table for each length of the documents."""
    about = f"{cell['model']}, {cell['tokens']:,} tokens a step in documents of"
    return [part for length in result if length.isdigit() for part in arms(f"{about} {int(length):,}", result[length])]


def decode(cell: dict[str, Any], result: dict[str, Any]) -> list[str]:
    return arms(f"{cell['model']}, {cell['rows']} prompts of 64 tokens", result)


def tests(_: dict[str, Any], result: dict[str, Any]) -> list[str]:
    return [f"`pytest -m gpu`: {result['said'][-1].strip()}."] if result.get("said") else []


PARTS = {"train": train, "nf4": train, "decode": decode, "tests": tests}
