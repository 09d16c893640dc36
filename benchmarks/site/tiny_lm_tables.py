"""Tables of docs/experiments.md and docs/studies.md, from what tiny_lm.py and studies.py wrote."""

from statistics import mean
from typing import Any

from benchmarks.site.tables import table

Content = dict[str, Any]  # of one JSON file
LABELS = {
    "attention": "attention only, r = 15",
    "mlp": "MLP only, r = 8",
    "dora": "DoRA, r = 8",
    "pissa": "PiSSA, r = 8",
    "full": "full fine-tuning",
}


def label_of(arm: str) -> str:
    return LABELS.get(arm, f"r = {arm[1:]}")


def stated(content: Content) -> str:
    """Each statement, next to what was measured."""
    rows = [
        [
            claim["statement"],
            claim["found"],
            "yes" if claim["holds"] else "no",
            f"{claim['seeds_alone']} of {claim['seeds']}",
        ]
        for claim in content["claims"]
    ]
    return table(["statement", "measured", "holds", "with one seed"], rows)


def losses(content: Content) -> str:
    """Mean over the seeds by arm and learning rate, the best in bold; and the range over the seeds at the best."""
    cells = content["cells"]
    octaves = cells[0]["cell"]["octaves"]
    rows = []
    for arm in dict.fromkeys(cell["cell"]["arm"] for cell in cells):
        runs = [cell["result"] for cell in cells if cell["cell"]["arm"] == arm]
        by_octave = {octave: [run["losses"][str(octave)] for run in runs] for octave in octaves}
        best = min(octaves, key=lambda octave, values=by_octave: mean(values[octave]))
        shown = [f"{mean(by_octave[octave]):.3f}" for octave in octaves]
        marked = [f"**{text}**" if octave == best else text for octave, text in zip(octaves, shown, strict=True)]
        spread = max(by_octave[best]) - min(by_octave[best])
        rows.append([label_of(arm), f"{runs[0]['trainable_parameters']:,}", *marked, f"{spread:.3f}"])
    head = ["variant", "trained", *(f"2^{octave}" for octave in octaves), "seeds"]
    result, machine = cells[0]["result"], content["machine"]
    note = (
        f"The base model's loss is {result['base_loss']:.3f}; the true distribution would score {result['floor']:.3f}. "
        f"One core of an {machine['cpu']}, torch {machine['packages']['torch']}."
    )
    return f"{table(head, rows)}\n\n{note}"


def rates(content: Content) -> str:
    """Held-out loss of every arm at every rate that it tried, on the half that chooses."""
    rows = [
        [arm["name"], shown(float(rate)), "failed" if loss is None else f"{loss:.3f}"]
        for arm in content["report"]["arms"]
        for rate, loss in sorted(arm["rates"].items(), key=lambda pair: float(pair[0]))
    ]
    return table(["variant", "learning rate", "loss on the selection half"], rows)


def shown(value: Any) -> str:
    return f"{value:.2g}" if isinstance(value, float) else str(value)
