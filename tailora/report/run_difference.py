"""What a second run changed compared with a first, on the held-out examples and prompts that both were evaluated on.

An example or prompt that occurs more than once in a run is left out: its results could be assigned to the wrong one.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from tailora.errors import FormatError
from tailora.evaluation.answers import MetricChange, metric_changes
from tailora.evaluation.statistics import mean_interval
from tailora.formats.run_folder import RUN, SAMPLES
from tailora.report.pages.train import read_run_file
from tailora.report.run_records import RunRecord
from tailora.study.results import measure_of
from tailora.train.answers import ComparedAnswer
from tailora.train.config import JUDGE, PER_EXAMPLE
from tailora.train.run_log import EXAMPLES, METRICS
from tailora.train.significance import change_of

OF_THE_LOSS = ("loss", "beta", "label_smoothing", "simpo_gamma", "sft_weight", "class_weights", "reward")
OF_PREFERENCES = ("model", "adapter")  # their loss compares with the base


@dataclass(frozen=True)
class RunDifference:
    """The second run compared with the first."""

    measure: str  # "loss" or "reward"
    loss: MetricChange | None  # None if the runs share no examples, or if their losses are not comparable
    metrics: dict[str, MetricChange]  # of answers to the same prompts
    flipped: list[tuple[ComparedAnswer, float, float]]  # answers and scores that differ by the first metric
    curves: list[dict[int, float]]  # of each run: step -> held-out loss or reward, on its own examples

    def to_dict(self) -> dict[str, Any]:
        names = ("prompt", "first", "second", "first_score", "second_score")
        flipped = [(answer.prompt, answer.base, answer.tuned, *scores) for answer, *scores in self.flipped]
        return {
            self.measure: None if self.loss is None else self.loss.to_dict(),
            "metrics": {name: change.to_dict() for name, change in self.metrics.items()},
            "flipped": [dict(zip(names, row, strict=True)) for row in flipped],
            "curves": [[*curve.items()] for curve in self.curves],
        }


def compare_runs(folders: Sequence[Path], records: Sequence[RunRecord]) -> RunDifference:
    """Raises FormatError if a file of a run cannot be read. For a study, there are no examples to compare."""
    try:
        return _compare(folders, records)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        text = f"a file in {' or '.join(map(str, folders))} has unexpected content ({type(error).__name__}: {error})"
        raise FormatError(f"{text}; compare runs of this version") from None


def _compare(folders: Sequence[Path], records: Sequence[RunRecord]) -> RunDifference:
    measure = measure_of(records[0].loss_unit)
    answers = _joined_answers(_read(folders[0] / SAMPLES), _read(folders[1] / SAMPLES))
    results = [(_read(folder / RUN) or {}).get("result") or {} for folder in folders]
    directions = [result.get("higher_is_better", {}) for result in results]
    shared = dict(item for item in directions[0].items() if item in directions[1].items())
    if _judge(records[0]) != _judge(records[1]):
        shared.pop(JUDGE, None)
    metrics = metric_changes(answers, shared)
    flipped = []
    for answer in answers if metrics else ():
        old, new = (facts.scores.get(next(iter(metrics))) for _, facts in answer.pairs)
        if old is not None and new is not None and old != new:
            flipped.append((answer, old, new))
    lines = [[row for row in _read(folder / METRICS) or [] if "eval_loss" in row] for folder in folders]
    return RunDifference(
        measure.name,
        _loss_change(records, *(_read(folder / EXAMPLES) for folder in folders)),
        metrics,
        flipped,
        [{row["step"]: measure.sign * row["eval_loss"] for row in rows} for rows in lines],
    )


def _judge(record: RunRecord) -> list[Any]:
    """Returns what identifies the judge of a run: its address, its model and its prompt."""
    addresses = [metric for metric in record.settings.get("metric") or [] if metric.startswith(f"{JUDGE}:")]
    return [addresses, record.settings.get("judge_model"), record.settings.get("judge_prompt")]


def _read(path: Path) -> Any:
    """Returns the content of a file of a run; None if it does not have this file."""
    return read_run_file(path) if path.exists() else None


def _shared(first: Sequence[Any], second: Sequence[Any], key: Callable[[Any], Any]) -> list[tuple[Any, Any]]:
    """Returns the items with the same key, which must be unique in both runs."""
    by_key = []
    for items in (first, second):
        counts = Counter(map(key, items))
        by_key.append({key(item): item for item in items if counts[key(item)] == 1})
    return [(item, by_key[1][name]) for name, item in by_key[0].items() if name in by_key[1]]


def _loss_change(records: Sequence[RunRecord], first: Any, second: Any) -> MetricChange | None:
    unit, other = (record.loss_unit for record in records)
    names = (*OF_THE_LOSS, *OF_PREFERENCES) if unit == PER_EXAMPLE else OF_THE_LOSS
    if unit != other or any(records[0].settings.get(name) != records[1].settings.get(name) for name in names):
        return None
    pairs = _shared(first or [], second or [], lambda row: row["text"])
    if not any(a["tokens"] for a, _ in pairs) or any(a["tokens"] != b["tokens"] for a, b in pairs):  # other tokens
        return None
    sign, counts = measure_of(unit).sign, [a["tokens"] for a, _ in pairs]
    before, after = ([sign * row["after"] for row in side] for side in zip(*pairs, strict=True))
    change = change_of(before, after, counts, higher_is_better=sign < 0)
    intervals = mean_interval(before, counts), mean_interval(after, counts)
    return MetricChange(*intervals, change, len(pairs), None, None, False, change.p_value)


def _joined_answers(first: Any, second: Any) -> list[ComparedAnswer]:
    """Returns the answers of both tuned models to the same prompts: `base` of the first run, `tuned` of the second."""
    read = TypeAdapter(list[ComparedAnswer]).validate_python
    runs = [[a for a in read(rows or []) if not a.is_training and a.after] for rows in (first, second)]
    pairs = _shared(runs[0], runs[1], _prompt_key)
    return [replace(b, base=a.tuned, before=a.after, cluster=a.cluster) for a, b in pairs]


def _prompt_key(answer: ComparedAnswer) -> tuple[Any, ...]:
    images = tuple(image.sha256 for image in answer.images)
    return answer.prompt, answer.earlier_messages, answer.reference, images
