"""Tables of docs/experiments.md and docs/studies.md, from what tiny_lm.py and studies.py wrote."""

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


def _label(arm: str) -> str:
    return ARM.get(arm, f"r = {arm[1:]}")


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
        rows.append([_label(arm), f"{runs[0]['trainable_parameters']:,}", *marked, f"{spread:.3f}"])
    head = ["arm", "trained", *(f"2^{octave}" for octave in octaves), "seeds apart"]
    some = cells[0]["result"]
    note = f"The base has {some['base_loss']:.3f}, one who knows the table {some['floor']:.3f}. {machine(content)}"
    return f"{table(head, rows)}\n\n{note}"


# ---- of what the commands report


def compared(content: Content) -> str:
    """The arms of a comparison and its verdict, then what is stated."""
    report = content["report"]
    rows = [
        [
            _label(arm["name"]),
            f"{arm['trainable_parameters']:,}",
            f"{arm['learning_rate']:.2g} of {_rates(arm)}",
            f"{arm['eval_loss']:.3f} ({arm['interval'][0]:.3f} to {arm['interval'][1]:.3f})",
            "" if arm["difference"] is None else f"{arm['difference']['value']:+.3f}",
            f"{arm['forgetting']['kl']:.2f}",
        ]
        for arm in report["arms"]
        if arm["outcome"] == "done"
    ]
    head = ["arm", "trained", "rate, of those tried", "loss (95%)", f"beside {report['reference']}", "forgets, KL"]
    return _told(content, table(head, rows))


def found(content: Content) -> str:
    """The finalists of a search and its verdict, then what is stated."""
    report = content["report"]
    rows = [
        [
            f"{each['number']}",
            ", ".join(f"{name} {_value(value)}" for name, value in each["settings"].items()),
            f"{each['trainable_parameters']:,}",
            f"{each['eval_loss']:.3f}",
        ]
        for each in report["finalists"]
    ]
    shares = ", ".join(f"{name} {share:.0%}" for name, share in (report["importances"] or {}).items())
    note = f"{len(report['trials'])} trials. Importance: {shares}." if shares else f"{len(report['trials'])} trials."
    shown = table(["finalist", "settings", "trained", "loss"], rows)
    return _told(content, f"{shown}\n\n{note}")


def _told(content: Content, shown: str) -> str:
    busy = f"{content['machine']['cores']} cores of an {content['machine']['cpu']} that did other things, too"
    took = f"{content['seconds'] / 60:.0f} minutes on {busy}, torch {content['machine']['packages']['torch']}."
    return f"{shown}\n\n> {content['report']['verdict']}\n\n{stated(content)}\n\n{took}"


def rates(content: Content) -> str:
    """Held-out loss of every arm at every rate that was tried, on the half that chooses."""
    rows = [
        [arm["name"], _value(float(rate)), "failed" if loss is None else f"{loss:.3f}"]
        for arm in content["report"]["arms"]
        for rate, loss in sorted(arm["rates"].items(), key=lambda pair: float(pair[0]))
    ]
    return table(["arm", "learning rate", "loss on the half that chooses"], rows)


def _rates(arm: Content) -> str:
    return ", ".join(_value(rate) for rate in sorted(map(float, arm["rates"])))


def _value(value: Any) -> str:
    return f"{value:.2g}" if isinstance(value, float) else str(value)


def machine(content: Content) -> str:
    found = content["machine"]
    return f"One core of an {found['cpu']}, torch {found['packages']['torch']}."
