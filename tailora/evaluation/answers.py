"""What training did to the answers: metrics before and after, and faults that need no reference.

    the answers in samples.json -> metric_changes: of each metric         -> answers_verdict
                                -> fault_changes: empty, repeating, cut   -> describe_faults

The rule for better and worse is in train/significance.py. The first metric decides; the p-values of the others are
adjusted for their number (Holm, Scand. J. Stat. 6, 1979).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tailora.evaluation.answer_faults import FAULTS, Fault, faults_of
from tailora.evaluation.judge import JudgeFacts, judge_facts
from tailora.evaluation.statistics import mean_interval, wilson_interval
from tailora.train.answers import AnswerFacts, ComparedAnswer
from tailora.train.config import JUDGE
from tailora.train.significance import LEVEL, MOST_MISSING, Change, Finding, Floats, Interval, change_of

MOST_FAULTY = 0.2  # share of answers with a fault after training, above which the verdict names their faults
LARGE_RISE = 0.1  # of that share; smaller ones only count if they are significant
DOES = {"empty": "are empty", "loop": "repeat themselves", "cut": "do not end"}  # fault -> what such answers do
REMEDIES = {
    "empty": "check that no reply in the data is empty",
    "loop": "train for more steps, or use a lower --learning-rate if the training loss is low",
    "cut": "check that the replies in the data are complete, or train for more steps",
}


# ---- Metrics


@dataclass(frozen=True)
class MetricChange:
    """A metric of the answers before and after training, with 95% intervals.

    gained, lost: answers that became right or wrong; None unless all scores are 0 or 1.
    p_value: of the change, adjusted unless this is the first metric.
    judge: what influenced the verdicts of a judge; its score after training is the win rate, and .5 before.
    """

    before: Interval
    after: Interval
    change: Change
    answers: int  # with scores before and after
    gained: int | None
    lost: int | None
    is_constant: bool  # all answers have the same score
    p_value: float
    judge: JudgeFacts | None = None

    @property
    def finding(self) -> Finding:
        return self.change.finding if self.p_value < LEVEL else "cannot tell"

    def to_dict(self) -> dict[str, Any]:
        value, low, high = (None if math.isnan(number) else number for number in self.change.interval)
        return {
            "before": self.before.value,
            "after": self.after.value,
            "change": {"value": value, "low": low, "high": high},
            "flips": None if self.gained is None else {"became_right": self.gained, "became_wrong": self.lost},
            "p": self.p_value,
            "examples": self.answers,
            "finding": self.finding,
            **(self.judge.to_dict() if self.judge else {}),
        }


def metric_changes(answers: Sequence[ComparedAnswer], higher_is_better: Mapping[str, bool]) -> dict[str, MetricChange]:
    """Returns the change of each metric that has scores, on held-out prompts.

    higher_is_better: of each metric, the deciding one first.
    """
    answers, changes = [answer for answer in answers if not answer.is_training], dict[str, MetricChange]()
    for name, is_higher in higher_is_better.items():
        pairs = [[facts.scores.get(name) for _, facts in answer.pairs] for answer in answers]
        scores = np.array(pairs, dtype=np.float64).reshape(-1, 2)  # (answers, 2); NaN: not scored
        known = ~np.isnan(scores).any(1)
        if not known.any():
            continue
        (before, after), counts = _cluster_sums(answers, scores, known)
        change = change_of(before, after, counts, missing=int((~known).sum()), higher_is_better=is_higher)
        is_share = bool(np.isin(scores[known], (0, 1)).all())
        first, second = (
            wilson_interval(sums) if is_share and counts.max() == 1 else mean_interval(sums, counts)
            for sums in (before, after)
        )
        moved = np.diff(scores[known])
        changes[name] = MetricChange(
            before=first,
            after=second,
            change=change,
            answers=int(known.sum()),
            gained=int((moved > 0).sum()) if is_share else None,
            lost=int((moved < 0).sum()) if is_share else None,
            is_constant=bool(np.ptp(scores[known]) == 0),
            p_value=change.p_value,
            judge=judge_facts(answers) if name == JUDGE else None,
        )
    return _adjusted(changes)


def _cluster_sums(answers: Sequence[ComparedAnswer], values: Floats, known: Any) -> tuple[Floats, Floats]:
    """Returns the sums of each cluster, (columns, clusters), and its number of answers. values: (answers, columns)."""
    clusters = np.array([answer.cluster for answer in answers])[known]
    _, owners = np.unique(clusters, return_inverse=True)
    sums = np.array([np.bincount(owners, weights=column) for column in values[known].T])
    return sums, np.bincount(owners).astype(np.float64)


def _adjusted(changes: Mapping[str, MetricChange]) -> dict[str, MetricChange]:
    further = sorted([*changes][1:], key=lambda name: changes[name].p_value)
    adjusted, largest = dict(changes), 0.0
    for place, name in enumerate(further):
        largest = max(largest, min(1.0, changes[name].p_value * (len(further) - place)))
        adjusted[name] = replace(changes[name], p_value=largest)
    return adjusted


def describe_metric(name: str, metric: MetricChange, prompts: str) -> str:
    """Returns a sentence. prompts: number and name, such as "200 held-out prompts"."""
    if metric.judge is not None:
        return _describe_judge(metric, metric.judge, prompts)
    is_share, (value, low, high) = metric.gained is not None, metric.change.interval
    before, after = (f"{part.value:.0%}" if is_share else f"{part.value:.3f}" for part in (metric.before, metric.after))
    if metric.is_constant:
        score = f"{metric.before.value:g}"
        return f"Every answer got {score} from {name}, before and after; does the metric read the column `answer`?"
    scale, unit, digits = (100, " points", 0) if is_share else (1, "", 3)
    ends = "" if math.isnan(low) else f"{scale * low:+.{digits}f} to {scale * high:+.{digits}f}{unit}, "
    moved = f"from {before} to {after} ({ends}{prompts})"
    unscored = f"{metric.change.missing:.1%} of the answers have no score" if metric.change.missing else ""
    if metric.finding == "cannot tell":
        reason = f", because {unscored}" if metric.change.missing > MOST_MISSING else ""
        return f"Whether {name} changed cannot be told{reason}: it went {moved}."
    flips = f"; {metric.gained:,} answers became right and {metric.lost:,} wrong" if is_share else ""
    left_out = f"; {unscored}" if unscored else ""
    return f"{name} {'rose' if value > 0 else 'fell'} {moved}{flips}{left_out}."


def _describe_judge(metric: MetricChange, judge: JudgeFacts, prompts: str) -> str:
    rate, low, high = metric.after
    ends = "" if math.isnan(low) else f"{max(low, 0):.0%} to {min(high, 1):.0%}"
    order, equal = judge.order_changed, judge.at_equal_length
    facts = [ends] if ends else []
    facts += [] if order is None else [f"{order:.0%} of its verdicts changed with the order"]
    at_equal = "unknown" if equal is None else f"{equal.value:.0%} ({equal.low:.0%} to {equal.high:.0%})"
    facts += [f"{at_equal} at equal length"]
    preferred = f"the judge preferred the tuned answers to {rate:.0%} of {prompts} ({'; '.join(facts)})"
    if metric.finding != "cannot tell":
        return f"{preferred}."
    missing = metric.change.missing
    reason = f" because {missing:.0%} of the prompts have no verdict" if missing > MOST_MISSING else ""
    return f"{preferred}, from which no preference can be told{reason}."


# ---- Faults


@dataclass(frozen=True)
class FaultChange:
    """Shares of answers with a fault, before and after training."""

    before: float
    after: float
    answers: int
    is_training: bool  # of training prompts
    has_risen: bool  # and with it the share of answers with any fault, by much or significantly
    is_frequent: bool  # one of the faults that many answers have after training

    @property
    def prompts(self) -> str:
        return "training prompts" if self.is_training else "held-out prompts"

    @property
    def is_named(self) -> bool:
        return self.has_risen or self.is_frequent


def fault_changes(answers: Sequence[ComparedAnswer]) -> dict[str, FaultChange]:
    """Returns fault -> its shares, of held-out prompts, or of training prompts if these have more of it."""
    changes = dict[str, FaultChange]()
    for is_training in (False, True):
        asked = [answer for answer in answers if answer.is_training == is_training and answer.pairs]
        if not asked:
            continue
        faults = [[_faults(text, facts, a.reference_tokens) for text, facts in a.pairs] for a in asked]
        # One test of all faults together: three would find a rise by chance more often
        any_fault = np.array([[bool(of_answer) for of_answer in pair] for pair in faults], dtype=np.float64)
        (before, after), counts = _cluster_sums(asked, any_fault, np.ones(len(asked), bool))
        p_value, (old, new) = change_of(before, after, counts).p_value, any_fault.mean(0)
        has_risen = bool(new - old > LARGE_RISE or (new > old and p_value / 2 < LEVEL))  # one-sided
        shares = np.array([[[fault in of for of in pair] for pair in faults] for fault in FAULTS]).mean(1)
        frequent = min(MOST_FAULTY, shares[:, 1].max()) if new > MOST_FAULTY else math.inf
        for fault, (first, last) in zip(FAULTS, shares.tolist(), strict=True):
            of_fault = FaultChange(
                first, last, len(asked), is_training, has_risen and last > first, bool(last >= frequent)
            )
            if fault not in changes or (of_fault.is_named and not changes[fault].is_named):
                changes[fault] = of_fault
    return changes


def _faults(text: str, facts: AnswerFacts, reference_tokens: int) -> list[Fault]:
    return faults_of(text, tokens=facts.tokens, is_cut=facts.is_cut, reference_tokens=reference_tokens)


def describe_faults(faults: Mapping[str, FaultChange]) -> str:
    """Returns sentences about the faults that matter, with what to do about them; "" without any."""
    texts = []
    for fault, change in faults.items():
        if change.is_named:
            of_all = f"{change.after:.0%} of the answers to {change.answers:,} {change.prompts}"
            texts.append(f"{of_all} {DOES[fault]} ({change.before:.0%} before): {REMEDIES[fault]}.")
    return " ".join(texts)


def answers_verdict(
    metrics: Mapping[str, MetricChange], faults: Mapping[str, FaultChange], loss: Finding, prompts: str
) -> tuple[Finding, str]:
    """Returns whether training made the answers better, and sentences, which may be "".

    The first metric decides, or the loss if there is none. Better is withheld if faults have become more frequent.
    loss: the finding for the held-out loss.
    prompts: as in `describe_metric`.
    """
    texts = [describe_metric(name, metric, prompts) for name, metric in metrics.items()]
    name, first = next(iter(metrics.items()), ("", None))
    finding = loss if first is None else first.finding
    worse_faults = [DOES[fault] for fault, change in faults.items() if change.has_risen]
    if finding == "better" and worse_faults:
        gain = "The loss fell" if first is None else f"{name} became better"
        gain = "The judge prefers the tuned answers" if first is not None and first.judge else gain
        return "cannot tell", " ".join([f"{gain}, but the answers {' and '.join(worse_faults)}.", *texts])
    if first is None:
        return finding, ""
    if "cannot tell" not in (loss, finding) and loss != finding:
        texts.append(f"The loss says the opposite, but {'the judge' if first.judge else name} decides.")
    elif finding == "cannot tell" and loss == "better":
        texts.append("A lower loss alone does not show that the answers are better.")
    return finding, f"{finding.capitalize()}: {' '.join(texts)}"
