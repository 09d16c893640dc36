"""What can be measured, by name, and gates on it. Needs no torch: names are checked before any work is done."""

import math
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from tailora.errors import ConfigError, listing, nearest

METRICS = {  # name -> meaning
    "loss": "nats per learned token",
    "perplexity": "exp(loss)",
    "exact_match": "share of greedy answers that equal the reply in the data",
    "accuracy": "share of rows whose right choice is the likeliest",
    "accuracy_norm": "the same, log-likelihood per byte of the choice",
}
OTHER_NAMES = {"ppl": "perplexity", "em": "exact_match", "acc": "accuracy", "acc_norm": "accuracy_norm"}
CHANGE = "_change"  # loss_change: tuned - base

OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
GATE = re.compile(r"\s*(?P<metric>[^<>=\s]+)\s*(?P<sign><=|>=|<|>)\s*(?P<bound>[^<>=\s]+)\s*")
SHELL = "in quotes, since the shell takes < and > for itself: --gate 'loss<1.3'"


@dataclass(frozen=True, slots=True)
class Gate:
    """A metric, and what it has to be."""

    metric: str
    sign: str
    bound: float

    def __str__(self) -> str:
        return f"{self.metric}{self.sign}{self.bound:g}"

    def met(self, value: float) -> bool:
        """A value that is not a number meets nothing."""
        return OPERATORS[self.sign](value, self.bound)


def parse_metrics(texts: Iterable[str]) -> list[str]:
    """Names out of "loss,acc", each once. Raises ConfigError with the nearest names for all that are unknown."""
    asked = [_own(part.strip()) for text in texts for part in text.split(",") if part.strip()]
    if unknown := [name for name in dict.fromkeys(asked) if name not in METRICS]:
        raise ConfigError(listing([f"--metrics: {unknown_metric(name, METRICS)}" for name in unknown]))
    return list(dict.fromkeys(asked))


def parse_gates(texts: Sequence[str]) -> list[Gate]:
    """Gates out of "loss<1.3", several with commas. Raises ConfigError for all that cannot be read."""
    gates, problems = [], []
    for text in (part for each in texts for part in each.split(",")):
        found = GATE.fullmatch(text)
        bound = _number(found["bound"]) if found else None
        if found is None or bound is None:
            problems.append(f"--gate {text!r}: write METRIC<NUMBER (or <=, >, >=) {SHELL}")
        else:
            gates.append(Gate(_own(found["metric"]), found["sign"], bound))
    if problems:
        raise ConfigError(listing(problems))
    return gates


def check_gates(gates: Sequence[Gate], known: Sequence[str], *, base: bool) -> None:
    """Raises ConfigError for gates on what will not be measured. base: whether there is one to compare with."""
    changes = {f"{name}{CHANGE}" for name in known if name != "perplexity"}
    names = [*known, *sorted(changes)]
    problems = [f"--gate {gate}: {unknown_metric(gate.metric, names)}" for gate in gates if gate.metric not in names]
    problems += [
        f"--gate {gate}: a change needs an adapter and its base beside it; leave --no-base out"
        for gate in gates
        if gate.metric in changes and not base
    ]
    if problems:
        raise ConfigError(listing(problems))


def of_task(gate: Gate) -> bool:
    """Whether it is on a metric of a task, TASK/METRIC."""
    return "/" in gate.metric


def unknown_metric(name: str, known: Iterable[str]) -> str:
    names = list(known)
    there_are = f"; there are: {', '.join(names)}"
    return f"no metric is called {name!r}{nearest(name, names) or there_are}"


def _own(name: str) -> str:
    """`acc` is accuracy, `acc_change` accuracy_change."""
    stem = name.removesuffix(CHANGE)
    return OTHER_NAMES.get(stem, stem) + name[len(stem) :]


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
