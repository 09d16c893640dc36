"""Tables of docs/experiments.md, from what benchmarks/tiny_lm.py wrote."""

from collections.abc import Iterable, Sequence
from statistics import mean
from typing import Any

Content = dict[str, Any]
ARM = {
    "attention": "attention only, r = 15",
    "mlp": "MLP only, r = 8",
    "dora": "DoRA, r = 8",
    "pissa": "PiSSA, r = 8",
    "full": "full fine-tuning",
}


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [[cell.replace("|", "\\|") for cell in line] for line in (head, ["---"] * len(head), *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def stated(content: Content) -> str:
    """What is stated beside what came out."""
    head = ["stated", "found", "holds"]
    rows = [[each["statement"], each["found"], "yes" if each["holds"] else "no"] for each in content["claims"]]
    if "seeds" in content["claims"][0]:
        head.append("seeds that show it alone")
        for row, each in zip(rows, content["claims"], strict=True):
            row.append(f"{each['seeds_alone']} of {each['seeds']}")
    return table(head, rows)


def losses(content: Content) -> str:
    """Mean over seeds by arm and learning rate, the best in bold; and how far seeds are apart there."""
    cells = content["cells"]
    octaves = cells[0]["cell"]["octaves"]
    rows = []
    for arm in dict.fromkeys(one["cell"]["arm"] for one in cells):
        runs = [one["result"] for one in cells if one["cell"]["arm"] == arm]
        by_octave = {octave: [run["losses"][str(octave)] for run in runs] for octave in octaves}
        best = min(octaves, key=lambda octave, own=by_octave: mean(own[octave]))
        shown = [f"{mean(by_octave[octave]):.3f}" for octave in octaves]
        marked = [f"**{text}**" if octave == best else text for octave, text in zip(octaves, shown, strict=True)]
        spread = max(by_octave[best]) - min(by_octave[best])
        label = ARM.get(arm, f"r = {arm[1:]}")
        rows.append([label, f"{runs[0]['trainable_parameters']:,}", *marked, f"{spread:.3f}"])
    head = ["arm", "trained", *(f"2^{octave}" for octave in octaves), "seeds apart"]
    some = cells[0]["result"]
    note = f"The base has {some['base_loss']:.3f}, one who knows the table {some['floor']:.3f}. {machine(content)}"
    return f"{table(head, rows)}\n\n{note}"


def machine(content: Content) -> str:
    found = content["machine"]
    return f"One core of an {found['cpu']}, torch {found['packages']['torch']}."
