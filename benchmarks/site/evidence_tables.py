"""Tables of docs/experiments.md, from recorded results."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import mean
from typing import Any

from benchmarks.site.tables import table
from benchmarks.studies.evidence_data import FULL, MODEL_OF, PLAIN
from benchmarks.studies.evidence_rules import LESS, MARGIN, MORE_INTRUDERS, STATEMENTS, Finding, better, overall

Content = Mapping[str, Any]  # of evidence.json
HOLDS, FAILS, UNCLEAR, NO_GAIN, FALSE, EQUAL = "holds", "does not hold", "cannot tell", "no gain", "false", "equal"
ORDER = (FALSE, NO_GAIN, EQUAL, UNCLEAR, HOLDS)  # of a statement with several parts, the first one counts
SETTINGS = {
    "markov": "tiny model, changed language",
    "reviews": "SmolLM2-135M, film reviews",
    "chats": "SmolLM2-135M, chats",
    "letters": "SmolLM2-135M, first letters",
    "tiny_lm": "tiny model, experiment 6",
}
VARIANTS = ("dora", "pissa", "loraplus", "rslora")
ARMS = {
    PLAIN: "LoRA, r = 8",
    FULL: "full fine-tuning",
    "dora": "DoRA",
    "pissa": "PiSSA",
    "loraplus": "LoRA+",
    "rslora": "rsLoRA, r = 64",
    "attention": "attention only",
    "mlp": "MLP only",
    "alpha-r": "alpha = r",
    "alpha-16r": "alpha = 16r",
    "r64": "r = 64",
    "r16": "r = 16",
    "r8": "LoRA, r = 8",
    "r4": "LoRA, r = 4",
    "r1": "r = 1",
}


def findings_of(content: Content, statement: str) -> list[Finding]:
    return [Finding(**entry) for entry in content["findings"] if entry["statement"] == statement]


def verdicts(content: Content) -> str:
    """One row for each statement: the verdict, and what the settings of each model say."""
    models = list(dict.fromkeys(MODEL_OF.values()))
    rows = []
    for name, (text, _) in STATEMENTS.items():
        found = findings_of(content, name)
        failed = {word(finding) for finding in found} & {FALSE, NO_GAIN, EQUAL}
        verdict = overall(found)
        if verdict == FAILS:
            verdict = failed.pop() if len(failed) == 1 else NO_GAIN  # which the other two include
        of_models = [counted([each for each in found if MODEL_OF[each.setting] == model]) for model in models]
        rows.append([text, f"**{verdict}**", *of_models])
    return table(["statement", "verdict", *models], rows)


def word(finding: Finding) -> str:
    """Returns the verdict; what does not hold is "equal" (within the margin), "false" (the opposite) or "no gain"."""
    value, low, high = finding.value, finding.low, finding.high
    verdict = better(value, low, high) if finding.statement == "alpha" else finding.verdict  # not of all parts
    if verdict != FAILS or finding.statement in ("rank", "rate", "rewards"):
        return FALSE if verdict == FAILS else verdict
    centre, margin = {"forgetting": (1, 1 - LESS), "intruders": (0, MORE_INTRUDERS)}.get(finding.statement, (0, MARGIN))
    if centre - margin < low and high < centre + margin:
        return EQUAL
    return FALSE if low > centre else NO_GAIN


def counted(found: Sequence[Finding]) -> str:
    """Returns what the settings say, and how many of them: "holds (2), cannot tell (1)"."""
    words = {each.setting: [word(part) for part in found if part.setting == each.setting] for each in found}
    given = [min(of_setting, key=ORDER.index) for of_setting in words.values()]
    return ", ".join(f"{verdict} ({given.count(verdict)})" for verdict in ORDER if verdict in given)


def statement_of(content: Content, names: Sequence[str]) -> str:
    """What every setting shows of these statements."""
    found = [each for name in names for each in findings_of(content, name)]
    rows = [[SETTINGS[each.setting], named(each.quantity), number(each), word(each)] for each in found]
    return table(["where", "what", "value (95% interval)", "verdict"], rows)


def named(quantity: str) -> str:
    """Returns "dora - lora, nats per token" with the arms in words, without the unit."""
    arms = quantity.removesuffix(", nats per token").removesuffix(", reward").split(" - ")
    return " - ".join(ARMS.get(arm, arm) for arm in arms)


def number(finding: Finding) -> str:
    form = "{:.1f}" if finding.statement == "rate" else "{:.2f}" if finding.statement == "forgetting" else "{:+.3f}"
    value, low, high = (form.format(end) for end in (finding.value, finding.low, finding.high))
    return f"{value} ({low} to {high})"


def source(content: Content) -> str:
    """On how many examples, and on which machine."""
    machine = content["machine"]
    judged = {}
    for cell in content["cells"]:
        if cell["cell"]["study"] != "intruders":
            report = cell["result"]["report"]
            is_reward, base = cell["cell"]["study"] == "rewards", abs(report["base_loss"])  # minus the reward
            judged[cell["cell"]["setting"]] = (
                f"{cell['cell']['setting']} has {report['judged_examples']} held-out examples "
                f"({'reward' if is_reward else 'loss'} of the base model {base:.3f})"
            )
    minutes = sum(cell["seconds"] for cell in content["cells"]) / 60
    return (
        f"{'; '.join(judged.values())}. All runs took {minutes:.0f} minutes on one thread of a busy {machine['cpu']}; "
        f"torch {machine['packages']['torch']}."
    )


def intruders(content: Content) -> str:
    """The means over the matrices, also of a random update of the same norm."""
    rows = []
    for cell in content["cells"]:
        if cell["cell"]["study"] == "intruders":
            matrices = list(cell["result"]["matrices"].values())
            names = ("lora", "full", "random", "relative_norm_lora", "relative_norm_full")
            means = {name: sum(entry[name] for entry in matrices) / len(matrices) for name in names}
            counts = [f"{means[name]:.2f}" for name in names[:3]]
            norms = [f"{means[name]:.3f}" for name in names[3:]]
            rows.append([SETTINGS[cell["cell"]["setting"]], str(len(matrices)), *counts, *norms])
    head = ["where", "matrices", "LoRA, of 10", "full, of 10", "random, of 10", "LoRA, dW/W", "full, dW/W"]
    return table(head, rows)


def rewards(content: Content) -> str:
    """The arms of the study "rewards" at their best learning rates; losses are minus the rewards."""
    rows = []
    for cell in content["cells"]:
        report = cell["result"]["report"]
        for arm in report["arms"]:
            low, high = (-end for end in reversed(arm["interval"]))
            value = f"{-arm['eval_loss']:.3f} ({low:.3f} to {high:.3f})"
            kl = f"{arm['forgetting']['kl']:.3f}"
            names = [SETTINGS[cell["cell"]["setting"]], ARMS[arm["name"]]]
            rates = f"{arm['learning_rate']:.1e} ({len(arm['rates'])})"
            rows.append([*names, f"{arm['trainable_parameters']:,}", rates, value, kl])
    head = ["where", "variant", "trained", "best learning rate (tried)", "reward (95% interval)", "forgetting, KL"]
    return f"{table(head, rows)}\n\n{source(content)}"


PARTS: dict[str, Callable[[Content], str]] = {  # name of a part of the page -> what makes it
    "evidence-verdicts": verdicts,
    **{f"evidence-{name}": partial(statement_of, names=[name]) for name in STATEMENTS if name not in VARIANTS},
    "evidence-variants": partial(statement_of, names=VARIANTS),
    "evidence-matrices": intruders,
    "evidence-source": source,
}


def advice(results: dict[str, Any]) -> str:
    """Returns how often following each kind of advice lowered the held-out loss (benchmarks/studies/advice.py)."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for case in results["cases"]:
        flag = case["flags"][0] if case["flags"] else "more rows" if case["advice"] else None
        if flag == "--max-steps":
            flag = "fewer steps" if "rose" in case["advice"] else "more steps"
        if flag is not None:
            kinds.setdefault(flag, []).append(case)
    cells = []
    for kind, cases in kinds.items():
        changes = [f"{case['kind']} {case['loss']:.3f} → {case['followed']:.3f}" for case in cases]
        helped = sum(case["followed"] < case["loss"] for case in cases)
        cells.append([kind, f"{helped} of {len(cases)}", "; ".join(changes)])
    return table(["advice", "helped", "held-out loss"], cells)


def defaults(results: dict[str, Any]) -> str:
    """Returns the regrets of every setting of benchmarks/studies/defaults.py, for each size from the best on."""
    rows = []
    for size in sorted({run["size"] for run in results["runs"]}):
        runs = [run for run in results["runs"] if run["size"] == size]
        best: dict[str, float] = {}
        for run in runs:
            best[run["kind"]] = min(run["after"], best.get(run["kind"], run["after"]))
        of_setting: dict[tuple[float, int, int], list[dict[str, Any]]] = {}
        for run in runs:
            of_setting.setdefault((run["rate"], run["batch"], run["passes"]), []).append(run)
        for (rate, batch, passes), own in of_setting.items():
            regrets = [run["after"] - best[run["kind"]] for run in own]
            seconds = f"{mean(run['cpu_seconds'] for run in own):.0f}"
            cells = [f"{rate:g}", batch, passes, len(own), f"{mean(regrets):.3f}", f"{max(regrets):.3f}", seconds]
            rows.append((size, mean(regrets), cells))
    head = ["rows", "learning rate", "batch", "passes", "cases", "mean regret", "worst regret", "CPU seconds"]
    return table(head, [[str(size), *map(str, cells)] for size, _, cells in sorted(rows)])
