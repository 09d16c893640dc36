"""The metrics by name, and gates on them such as `loss<1.3`. Needs no torch: names are checked before any work."""

import math
import operator
import re
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass

from tailora.errors import ConfigError, listing, nearest

METRICS = {  # name -> meaning
    "loss": "nats per trained token",
    "perplexity": "exp(loss)",
    "accuracy": "share of questions whose correct choice is the most likely one",
    "accuracy_norm": "the same, with the log-likelihood of each choice divided by its length in bytes",
}
LABEL_METRICS = {  # for classification and regression; f1[NAME] is F1 of one class or type of entity
    "loss": "nats per row or word; for regression, the mean squared error",
    "accuracy": "share of rows or words whose labels are all correct",
    "f1": "F1 of entities, as seqeval counts them",
    "precision": "share of the predicted entities that are correct",
    "recall": "share of the true entities that are found",
    "f1_macro": "mean F1 of the classes or entity types",
    "f1_micro": "F1 of all labels together",
    "mcc": "Matthews correlation coefficient",
    "auroc": "area under the ROC curve; with more than two classes, the mean over each class against the rest",
    "mse": "mean squared error",
    "mae": "mean absolute error",
    "pearson": "Pearson correlation",
    "spearman": "Spearman rank correlation",
}
PREFERENCE_METRICS = {  # of a run on preferences
    "accuracy": "share of pairs with rewards in the right order, or of single replies with rewards of the right sign",
    "margin": "mean reward of chosen replies minus mean reward of rejected ones",
    "likelier": "share of pairs whose chosen reply is more likely than the rejected one",
    "chosen": "mean log-probability of chosen replies, in nats",
    "rejected": "the same for rejected replies",
}
METRIC_ALIASES = {"ppl": "perplexity", "choice": "accuracy", "acc": "accuracy", "acc_norm": "accuracy_norm"}
OF_CLASS = re.compile(r"f1\[.+\]")
COMMA = re.compile(r",(?![^\[]*\])")  # not within f1[NAME]
CHANGE = "_change"  # loss_change: tuned - base

OPERATORS = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
# The metric may contain anything, as in regex:<b>,.+ or exact_match:ignore=case; a comma ends the gate after its bound
GATE = re.compile(r"\s*(?P<metric>\S.*?)\s*(?P<operator><=|>=|<|>)\s*(?P<bound>[^<>=,\s]+)\s*(,|$)", re.DOTALL)
QUOTES_HINT = "put it in quotes, because the shell interprets < and >: --gate 'loss<1.3'"


@dataclass(frozen=True, slots=True)
class Gate:
    """A condition on a metric; `metric` may be TASK/METRIC of an lm-evaluation-harness task."""

    metric: str
    operator: str
    bound: float
    is_on_task: bool = False

    def __str__(self) -> str:
        return f"{self.metric}{self.operator}{self.bound:g}"

    def is_met(self, value: float) -> bool:
        """False if the value is not a number."""
        return bool(OPERATORS[self.operator](value, self.bound))


def parse_metrics(texts: Sequence[str], built_in: Collection[str]) -> tuple[list[str], list[str]]:
    """Returns the names of scores of the model, such as loss, and the metrics of its answers, each once.

    built_in: the kinds of the latter that are no functions of a file.
    Raises ConfigError for all unknown names.
    """
    known, scores, others = [*METRICS, *LABEL_METRICS], dict[str, None](), dict[str, None]()
    problems = []
    for text in texts:
        names = [_full_name(part.strip()) for part in COMMA.split(text)]
        if all(name in known or OF_CLASS.fullmatch(name) for name in names):
            scores |= dict.fromkeys(names)
        elif text.partition(":")[0] in built_in or ".py:" in text:
            others[text] = None
        else:
            problems.append(f"--metric: {_unknown_metric(text, [*built_in, *known])}; or use FILE.py:FUNCTION")
    if problems:
        raise ConfigError(listing(problems))
    return [*scores], [*others]


def parse_gates(texts: Sequence[str], answer_metrics: Collection[str] = ()) -> list[Gate]:
    """Returns the gates in texts such as "loss<1.3,acc>.5". Raises ConfigError for all invalid ones.

    answer_metrics: names that may contain a slash. Others with one are TASK/METRIC.
    """
    gates, problems = [], []
    for text in texts:
        rest = text
        while rest or not text:
            match, bound = GATE.match(rest), math.nan
            with suppress(ValueError):
                bound = float(match["bound"]) if match else math.nan
            if match is None or not math.isfinite(bound):
                problems.append(f"--gate {rest!r}: expected METRIC<NUMBER (or <=, >, >=); {QUOTES_HINT}")
                break
            name = _full_name(match["metric"])
            is_on_task = "/" in name and name.removesuffix(CHANGE) not in answer_metrics
            gates.append(Gate(name, match["operator"], bound, is_on_task))
            rest = rest[match.end() :]
    if problems:
        raise ConfigError(listing(problems))
    return gates


def check_gates(gates: Sequence[Gate], metrics: Sequence[str], *, base: bool) -> None:
    """Raises ConfigError for gates on metrics that are not measured. base: True if the base is measured as well."""
    changes = {f"{name}{CHANGE}" for name in metrics if name != "perplexity"}
    names = [*metrics, *sorted(changes)]
    problems = [f"--gate {gate}: {_unknown_metric(gate.metric, names)}" for gate in gates if gate.metric not in names]
    problems += [
        f"--gate {gate}: a change requires an adapter and its base model; remove --no-base"
        for gate in gates
        if gate.metric in changes and not base
    ]
    if problems:
        raise ConfigError(listing(problems))


def _unknown_metric(name: str, names: Collection[str]) -> str:
    all_names = f"; available: {', '.join(names)}"
    return f"unknown metric {name!r}{nearest(name, names) or all_names}"


def _full_name(name: str) -> str:
    """Returns accuracy for `acc`, and accuracy_change for `acc_change`."""
    stem = name.removesuffix(CHANGE)
    return METRIC_ALIASES.get(stem, stem) + name[len(stem) :]
