"""Labels: the names of classes and tags, and the targets of rows.

    task                       a row's label becomes
    sequence-classification    the index of its class; with several labels per row, a 0 or 1 for every class
    regression                 a number
    token-classification       the index of each word's tag, at the word's first token

`read_labels` collects the names from all training rows before the model is loaded, because the head needs their number.
`tokenize.py` creates the examples.
"""

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from tailora.data.dataset import IGNORED, Example, Examples, Float64
from tailora.data.messages import listed, number_of, short_repr, text_value
from tailora.data.readers import Row, RowProblem, data_error, read_rows
from tailora.data.samples import Labelled, LabelValue, Tagged
from tailora.data.schemas import REGRESSION, SEQUENCE_CLASSIFICATION, TOKEN_CLASSIFICATION, convert_row, detect_schema
from tailora.errors import DataError, nearest

LABEL_TASKS = (SEQUENCE_CLASSIFICATION, REGRESSION, TOKEN_CLASSIFICATION)
SINGLE, MULTI = "single_label_classification", "multi_label_classification"  # problem_type of transformers' configs
MOST_LABELS = 1000  # more than this are probably not classes
MOST = 1e15  # limit for regression targets, so that sums of squared errors stay finite in float32


@dataclass(frozen=True)
class Labels:
    """The labels that the head of a model predicts."""

    task: str
    names: tuple[str, ...]  # of the classes or tags, in the order of the head's outputs; for regression only "value"
    several: bool = False  # whether a row may have several labels

    @property
    def problem_type(self) -> str:
        """The name in transformers' configs."""
        if self.task == REGRESSION:
            return REGRESSION
        return MULTI if self.several else SINGLE

    @property
    def targets(self) -> int:
        """Number of targets per row."""
        return len(self.names) if self.several else 1

    def to_dict(self) -> dict[str, Any]:
        return {"task": self.task, "names": list(self.names), "several": self.several}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Labels":
        return cls(content["task"], tuple(content["names"]), content["several"])

    @classmethod
    def of_config(cls, task: str, names: Sequence[str], problem_type: str | None) -> "Labels":
        return cls(REGRESSION if problem_type == REGRESSION else task, tuple(names), problem_type == MULTI)

    def target(self, value: LabelValue) -> Float64:
        """Returns the target of a row with this label. Raises DataError for an unknown label."""
        if self.task == REGRESSION:
            return np.array([_number(value)])
        if not self.several:
            return np.array([float(self.index(value))])
        target = np.zeros(len(self.names))
        target[[self.index(item) for item in (value if isinstance(value, list) else [value])]] = 1
        return target

    def index(self, value: Any) -> int:
        """Returns the index of a class or tag. Raises DataError for an unknown one."""
        name = _name(value)
        if name in self.names:
            return self.names.index(name)
        kind = "tag" if self.task == TOKEN_CLASSIFICATION else "label"
        known = f"the model's {kind}s are {listed(self.names)}"
        raise DataError(f"unknown {kind} {name!r}; {known}{nearest(name, self.names)}")

    def preview(self, example: Example, tokenizer: Any) -> list[tuple[str, bool]]:
        """Returns pieces of text, and whether they are trained: tags in brackets after their words, or the label."""
        if self.task == TOKEN_CLASSIFICATION:
            pieces = []
            for token, tag in zip(example.input_ids.tolist(), example.labels.tolist(), strict=True):
                pieces.append((tokenizer.decode([token]), False))
                pieces += [(f"[{self.names[tag]}]", True)] if tag != IGNORED else []
            return pieces
        assert example.target is not None
        if self.task == REGRESSION:
            label = f"{example.target[0]:g}"
        else:
            indices = np.nonzero(example.target)[0] if self.several else example.target.astype(np.int64)
            label = ", ".join(self.names[index] for index in indices)
        return [(tokenizer.decode(example.input_ids.tolist()), False), (f" -> {label}", True)]

    def classes(self, examples: Examples) -> list[int]:
        """Returns the index of each example's class; [] if examples do not have exactly one."""
        if self.problem_type != SINGLE or examples.targets is None:
            return []
        return [int(index) for index in examples.targets[:, 0]]

    def counts(self, examples: Examples) -> dict[str, int]:
        """Returns the number of examples or words with each label; {} for regression."""
        if self.task == REGRESSION:
            return {}
        if examples.targets is None:
            indices = examples.labels[examples.labels != IGNORED].astype(np.int64)
        elif self.several:
            indices = np.nonzero(examples.targets)[1]
        else:
            indices = examples.targets[:, 0].astype(np.int64)
        return dict(zip(self.names, np.bincount(indices, minlength=len(self.names)).tolist(), strict=True))


def _name(value: Any) -> str:
    """Returns the name of a class: unchanged text, true or false, or an integer without a decimal point."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return str(int(value))
    if isinstance(value, str) and value.strip():
        return text_value(value, "label")
    if isinstance(value, list):
        raise DataError("expected a single label as in the other rows, got a list")
    if value is None or isinstance(value, str):
        raise DataError("label is empty")
    raise DataError(f"label: expected a name or an integer, got {value!r:.60}; for other numbers use --task regression")


def _number(value: Any) -> float:
    number = number_of(value)
    if not math.isfinite(number):
        raise DataError(f"label: expected a number, got {short_repr(value)}")
    if abs(number) > MOST:
        raise DataError(f"label {number:g} is too large: its squared error overflows. Divide all labels by a constant")
    return number


def _in_order(names: Collection[str]) -> tuple[str, ...]:
    """Sorts the tag O first, then numbers by size, then other names alphabetically."""
    numbers = {name: int(name) for name in names if re.fullmatch(r"-?[0-9]{1,4000}", name)}
    return tuple(sorted(names, key=lambda name: (name != "O", name not in numbers, numbers.get(name, 0), name)))


# ---- Reading the names


def read_labels(
    sources: Sequence[str], field: Mapping[str, str] | None, task: str, *, skip_bad_rows: bool = False
) -> Labels:
    """Returns the labels of all rows. Raises DataError with the file, row and cause of every problem.

    skip_bad_rows: ignore them here; `prepare` reports them.
    """
    problems: list[RowProblem] = []
    samples: list[tuple[Row, Labelled | Tagged]] = []
    for name in sources:
        items = list(read_rows(name))
        mapping = detect_schema(name, items, field, task)
        for item in items:
            if isinstance(item, RowProblem):
                problems.append(item)
                continue
            try:
                samples.append((item, cast(Labelled | Tagged, convert_row(item, mapping))))
            except DataError as error:
                problems.append(item.problem(error))
    lists = sum(isinstance(sample, Labelled) and isinstance(sample.label, list) for _, sample in samples)
    several = 2 * lists > len(samples)  # a single wrong row must not decide
    counts, source = Counter[str](), ", ".join(sources)
    for row, sample in samples if task != REGRESSION else ():
        try:
            names: list[Any] = [sample.label] if isinstance(sample, Labelled) else sample.tags or []
            if several and isinstance(sample, Labelled) and isinstance(sample.label, list):
                names = sample.label
            counts.update(set(map(_name, names)))
        except DataError as error:
            problems.append(row.problem(error))
    if problems and not skip_bad_rows:
        raise data_error(problems)
    if task == REGRESSION:
        return Labels(task, ("value",))
    what = "tags" if task == TOKEN_CLASSIFICATION else "labels"
    if len(counts) > MOST_LABELS:
        raise DataError(
            f"data {source}: {len(counts):,} different {what}, such as {listed(list(counts)[:3])}; expected at most "
            f"{MOST_LABELS:,}. Check the label column, or use --task regression for numbers"
        )
    if len(counts) < 2:
        raise DataError(
            f"data {source}: expected at least two different {what}, got {listed(list(counts)) or 'none'}; add rows "
            f"with other {what}"
        )
    return Labels(task, _in_order(counts), several)
