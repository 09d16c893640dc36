"""Evaluates predicted labels: the scores of scikit-learn and seqeval with intervals, confusion matrix and calibration.

    label_scores     accuracy, F1, MCC and AUROC of classes; seqeval's of tags; Pearson's and Spearman's of numbers
    label_changes    the differences of two models on the same rows
    label_details    the confusion matrix, calibration, and the accuracy of the most frequent label
    evaluate_labels  the scores of a model on data;    predict_labels  its labels for unlabelled rows

Intervals are bootstrap percentiles over rows, because words of one row are alike; Wilson's if each row is right or
wrong. seqeval, which finds entities, is in the extra `classify`.
"""

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from tailora.data.chat_template import ChatTokenizer, DataSettings
from tailora.data.dataset import IGNORED, Examples
from tailora.data.labels import Labels
from tailora.data.prepare import check_vocabulary, read_eval_data
from tailora.data.samples import Labelled, Tagged
from tailora.data.schemas import REGRESSION, TOKEN_CLASSIFICATION
from tailora.data.tokenize import encode_samples, first_tokens
from tailora.errors import DataError, require_packages
from tailora.evaluation.scores import BASE, TUNED, Progress, Score, Scores, models_to_score, token_budget
from tailora.evaluation.statistics import mean_interval, wilson_interval
from tailora.model import LoRAModel
from tailora.train.classification import label_task
from tailora.train.config import TrainConfig
from tailora.train.kernel_choice import choose_layout
from tailora.train.loss import Evaluation, evaluate
from tailora.train.significance import Floats, Interval, change_of

Ints = NDArray[np.int64]
DRAWS, DRAWS_AT_ONCE = 2000, 50  # of a bootstrap
SAME = 1e-9  # shares that differ by less
BINS = 10  # of a calibration curve
MOST_CLASSES = 40  # for a confusion matrix and F1 of each class
TAG = re.compile(r"[BIESLU]-.+")  # of a word in an entity; O is outside


@dataclass(frozen=True, eq=False)
class LabelOutputs:
    """A model's outputs for rows, and the targets: the index of a class or tag, a number, or 0 or 1 for each label."""

    labels: Labels
    outputs: Floats  # of the head: (rows or tagged words, outputs)
    targets: Floats  # (rows or tagged words, 1), or (rows, labels)
    counts: Ints  # tagged words of each row, or 1: (rows,)

    @classmethod
    def of(cls, labels: Labels, examples: Examples, evaluation: Evaluation) -> "LabelOutputs":
        assert evaluation.scores is not None
        targets = examples.targets
        if targets is None:
            targets = examples.labels[examples.labels != IGNORED].astype(np.float64)[:, None]
        return cls(labels, evaluation.scores, targets, evaluation.counts)

    @classmethod
    def of_rows(cls, labels: Labels, rows: Sequence[Mapping[str, Any]], when: str) -> "LabelOutputs":
        """Returns the outputs in a run's examples.jsonl. when: "before" or "after" training."""
        words = [row[f"scores_{when}"] for row in rows]
        if labels.task == TOKEN_CLASSIFICATION:
            by_row = ([[*row.values()]] if isinstance(row, dict) else row for row in words)
            outputs = np.array([values for row in by_row for values in row])
            targets = np.array([[float(target)] for row in rows for target in row["target"]])
        else:
            outputs = np.array([[row[name] for name in labels.names] for row in words])
            targets = np.array([row["target"] for row in rows], dtype=np.float64)
        return cls(labels, outputs, targets, np.array([row["tokens"] for row in rows]))

    @property
    def probabilities(self) -> Floats:
        if self.labels.several:
            positive: Floats = 1 / (1 + np.exp(-self.outputs))
            return positive
        exponentials: Floats = np.exp(self.outputs - self.outputs.max(1, keepdims=True))
        return np.asarray(exponentials / exponentials.sum(1, keepdims=True))

    @property
    def truth(self) -> Ints:
        return self.targets[:, 0].astype(np.int64)

    @property
    def predicted(self) -> Ints:
        """Index of the most likely class; with several labels 0 or 1 for each."""
        return (self.outputs > 0).astype(np.int64) if self.labels.several else self.outputs.argmax(1)

    @property
    def has_entities(self) -> bool:
        """Whether the names are tags of words in entities, such as B-PER, and O."""
        names = set(self.labels.names) - {"O"}
        return self.labels.task == TOKEN_CLASSIFICATION and all(map(TAG.fullmatch, names))

    def by_row(self, values: NDArray[Any]) -> Floats:
        """Returns the sums of values of words, (words, ...), over the words of each row: (rows, ...)."""
        sums = np.concatenate([np.zeros((1, *values.shape[1:])), np.cumsum(values, axis=0)])
        ends = np.cumsum(self.counts)
        return np.asarray(sums[ends] - sums[ends - self.counts])

    def tags(self, indices: Ints) -> list[list[str]]:
        names = [self.labels.names[index] for index in indices]
        ends = np.cumsum(self.counts)
        return [names[end - count : end] for end, count in zip(ends, self.counts, strict=True)]


def check_packages() -> None:
    require_packages("seqeval", extra="classify")


# ---- Values in many draws of a bootstrap at once, from counts
#
# The values equal scikit-learn's, scipy's and seqeval's, which would take seconds for this many draws.
# times: how often each row is in a draw, (draws, rows) -> name -> value in each draw, (draws,); NaN if it has none.

Statistic = Callable[[Floats], dict[str, Floats]]


def _statistic(data: LabelOutputs) -> Statistic:
    return _of_numbers(data) if data.labels.task == REGRESSION else _of_counts(data)


def _ratio(part: Floats, whole: Floats, otherwise: float = 0.0) -> Floats:
    ratio: Floats = np.divide(part, whole, out=np.full(np.shape(part), otherwise), where=whole != 0)
    return ratio


def _f1(hits: Floats, predicted: Floats, there: Floats) -> Floats:
    return _ratio(2 * hits, predicted + there)


def _of_numbers(data: LabelOutputs) -> Statistic:
    truth, predicted = data.targets[:, 0], data.outputs[:, 0]
    return lambda times: {
        "mse": times @ (truth - predicted) ** 2 / times.sum(1),
        "mae": times @ np.abs(truth - predicted) / times.sum(1),
        "pearson": _correlation(truth[None], predicted[None], times),
        "spearman": _correlation(_ranks(truth, times), _ranks(predicted, times), times),
    }


def _correlation(first: Floats, second: Floats, times: Floats) -> Floats:
    """first, second: (1 or draws, rows)."""
    size = times.sum(1, keepdims=True)
    first = first - (times * first).sum(1, keepdims=True) / size
    second = second - (times * second).sum(1, keepdims=True) / size
    product = (times * first * second).sum(1)
    return _ratio(product, np.sqrt((times * first**2).sum(1) * (times * second**2).sum(1)), math.nan)


def _ranks(values: Floats, times: Floats) -> Floats:
    """Returns the rank of each row within each draw, where equal values share their mean rank: (draws, rows)."""
    _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)
    in_order = times[:, np.argsort(values, kind="stable")]
    weights = np.add.reduceat(in_order, np.cumsum(sizes) - sizes, axis=1)  # of equal values, (draws, groups)
    ranks: Floats = (np.cumsum(weights, axis=1) - weights / 2)[:, group]
    return ranks


def _auroc(scores: Floats, positive: NDArray[np.bool_], weights: Floats) -> Floats:
    """Returns the share of pairs of a positive and a negative row in which the positive has the higher score."""
    right, all_rows = (weights * positive).sum(1), weights.sum(1)
    below = (weights * positive * _ranks(scores, weights)).sum(1) - right**2 / 2  # without pairs of two positives
    return _ratio(below, right * (all_rows - right), math.nan)


def _of_counts(data: LabelOutputs) -> Statistic:
    """Returns the statistic of classes, labels or types of entities. Raises ConfigError if seqeval is missing."""
    names, counts = _entity_counts(data) if data.has_entities else _class_counts(data)
    right, of_labels = data.by_row(_hits(data)), _scores_and_truth(data)
    exists = counts[..., 1:].sum((0, 2)) > 0  # (names,), in the data; perhaps not in a draw

    def statistic(times: Floats) -> dict[str, Floats]:
        of_names = np.moveaxis(np.tensordot(times, counts, 1), 2, 0)  # (3, draws, names)
        f1, (hits, guessed, there) = _f1(*of_names), of_names.sum(2)
        f1 = np.where(exists & (of_names[1] + of_names[2] == 0), math.nan, f1)
        known = ~np.isnan(f1)
        values = {"accuracy": times @ right / (times @ data.counts)}
        if data.has_entities:
            values |= {"f1": _f1(hits, guessed, there)}
            values |= {"precision": _ratio(hits, guessed), "recall": _ratio(hits, there)}
        macro = _ratio(np.where(known, f1, 0).sum(1), known.sum(1), math.nan)
        values["f1_macro"] = macro if names else np.zeros(len(times))
        if data.labels.several:
            values["f1_micro"] = _f1(hits, guessed, there)
        elif not data.has_entities:
            _, of_guesses, of_truth = of_names
            spread = (there**2 - (of_guesses**2).sum(1)) * (there**2 - (of_truth**2).sum(1))
            values["mcc"] = _ratio(hits * there - (of_guesses * of_truth).sum(1), np.sqrt(spread))
        if of_labels:
            weights = np.repeat(times, data.counts, axis=1)
            values["auroc"] = np.mean([_auroc(*of_label, weights) for of_label in of_labels], axis=0)
        shown = names if len(names) <= MOST_CLASSES else []
        return values | {f"f1[{name}]": f1[:, column] for column, name in enumerate(shown)}

    return statistic


def _scores_and_truth(data: LabelOutputs) -> list[tuple[Floats, NDArray[np.bool_]]]:
    """Returns, for AUROC, the probabilities of each label and the rows with it; none if a class has no row."""
    truth = data.targets > 0 if data.labels.several else data.truth[:, None] == np.arange(len(data.labels.names))
    of_labels = [*zip(data.probabilities.T, truth.T, strict=True)]
    if data.labels.several:
        return [(scores, is_right) for scores, is_right in of_labels if is_right.any() and not is_right.all()]
    if data.has_entities or not truth.any(0).all():
        return []
    return of_labels if len(of_labels) > 2 else of_labels[1:]


def _class_counts(data: LabelOutputs) -> tuple[list[str], Floats]:
    """Returns the classes or labels that occur, and counts for each row: right, predicted, true; (rows, classes, 3)."""
    truth, predicted = data.targets > 0, data.predicted > 0
    if not data.labels.several:
        truth, predicted = (np.eye(len(data.labels.names), dtype=bool)[index] for index in (data.truth, data.predicted))
        used = np.flatnonzero(truth.any(0) | predicted.any(0))
    else:
        used = np.arange(len(data.labels.names))
    counts = data.by_row(np.stack([truth & predicted, predicted, truth], axis=2)[:, used])
    return [data.labels.names[index] for index in used], counts


def _entity_counts(data: LabelOutputs) -> tuple[list[str], Floats]:
    """Returns the same for types of entities."""
    check_packages()
    from seqeval.metrics.sequence_labeling import get_entities

    right, predicted = (
        [set(get_entities(tags)) for tags in data.tags(indices)] for indices in (data.truth, data.predicted)
    )
    types = sorted({entity[0] for entities in (*right, *predicted) for entity in entities})
    counts = np.zeros((len(right), len(types), 3))
    for row, (there, guessed) in enumerate(zip(right, predicted, strict=True)):
        for column, entities in enumerate((there & guessed, guessed, there)):
            for entity in entities:
                counts[row, types.index(entity[0]), column] += 1
    return types, counts


# ---- Scores with intervals


def label_scores(data: LabelOutputs) -> dict[str, Score]:
    """Returns the scores of a model. Raises ConfigError if a package is missing."""
    scores = _with_intervals(_statistic(data), len(data.counts))
    if data.labels.task not in (REGRESSION, TOKEN_CLASSIFICATION):
        scores["accuracy"] = Score(*wilson_interval(_hits(data)), len(data.counts))
    return scores


def score_names(labels: Labels) -> list[str]:
    """Returns the names of all scores that data with these labels may have, from one row for each label."""
    every = np.eye(len(labels.names))
    targets = every if labels.several else np.arange(len(labels.names), dtype=np.float64)[:, None]
    data = LabelOutputs(labels, every, targets, np.ones(len(every), dtype=np.int64))
    return ["loss", *_statistic(data)(np.ones((1, len(every))))]


def label_changes(before: LabelOutputs, after: LabelOutputs) -> dict[str, Score]:
    """Returns the scores of `after` minus the scores of `before`, on the same rows."""
    first, second = _statistic(before), _statistic(after)

    def statistic(times: Floats) -> dict[str, Floats]:
        old, new = first(times), second(times)
        return {name: new[name] - old[name] for name in new if name in old}

    changes = _with_intervals(statistic, len(after.counts))
    if after.labels.task not in (REGRESSION, TOKEN_CLASSIFICATION):
        changes["accuracy"] = Score(*change_of(_hits(before), _hits(after)).interval, len(after.counts))
    return changes


def _hits(data: LabelOutputs) -> NDArray[np.bool_]:
    """Returns whether all labels of each row are right."""
    right = data.predicted == (data.targets if data.labels.several else data.truth)
    return cast(NDArray[np.bool_], right.all(1) if right.ndim > 1 else right)


def _with_intervals(statistic: Statistic, rows: int) -> dict[str, Score]:
    """Ignores draws in which a value does not exist, such as AUROC without one of the classes."""
    generator, parts = np.random.default_rng(0), []
    for _ in range(DRAWS // DRAWS_AT_ONCE if rows > 1 else 0):
        drawn = generator.integers(rows, size=(DRAWS_AT_ONCE, rows))
        parts.append(statistic(np.stack([np.bincount(draw, minlength=rows) for draw in drawn]).astype(np.float64)))
    scores = {}
    for name, (value,) in statistic(np.ones((1, rows))).items():
        draws = np.concatenate([part[name] for part in parts]) if parts else np.zeros(0)
        draws = draws[~np.isnan(draws)]
        low, high = np.quantile(draws, [0.025, 0.975]) if len(draws) > DRAWS // 2 else (math.nan, math.nan)
        scores[name] = Score(float(value), float(low), float(high), rows)
    return scores


def as_intervals(scores: Mapping[str, Score]) -> dict[str, Interval]:
    return {name: Interval(score.value, score.low, score.high) for name, score in scores.items()}


def describe_labels(
    before: Mapping[str, Interval], after: Mapping[str, Interval], details: Mapping[str, Any], *, new_head: bool
) -> str:
    """Describes the effect of training in a sentence. details: `label_details` of the rows."""
    start = "before training, with a new, randomly initialized head," if new_head else "before training"
    text = ""
    for name, meaning in (("pearson", "The correlation of predictions with labels"), ("f1", "F1 of entities")):
        if name in after:
            old, new = before[name], after[name]
            ends = f" (95% interval {new.low:.3f} to {new.high:.3f})" if not math.isnan(new.low) else ""
            text = f"{meaning} is {new.value:.3f}{ends}; {start} {old.value:.3f}."
    if "accuracy" not in after:
        return text
    if text:
        text, start = f"{text} ", "before training"
    accuracy = after["accuracy"]
    ends = "" if math.isnan(accuracy.low) else f" (95% interval {accuracy.low:.1%} to {accuracy.high:.1%})"
    text += f"Accuracy is {accuracy.value:.1%}{ends}"
    earlier, majority = f"; {start} {before['accuracy'].value:.1%}", details.get("majority")
    if majority is None:
        return f"{text}{earlier}."
    of_majority = f"{majority['share']:.1%} for always predicting {majority['label']!r}"
    if beats_majority(accuracy.value, details):
        return f"{text}{earlier}, and {of_majority}."
    return f"{text}, no better than the {of_majority}{earlier}."


def beats_majority(accuracy: float, details: Mapping[str, Any]) -> bool:
    """Returns False if always answering the most frequent label is as good. details: `label_details`."""
    majority = details.get("majority")
    return majority is None or accuracy > majority["share"] + SAME


# ---- Confusion matrix, calibration, and the most frequent label


def label_details(data: LabelOutputs) -> dict[str, Any]:
    """Returns, for the page: names, confusion (right class -> predicted class -> count), calibration, majority.

    calibration: for rows, or words, of about the same confidence: their number, mean confidence and accuracy; ece is
        the mean distance between the two (expected calibration error, arXiv:1706.04599).
    majority: the most frequent label and its share, which is the accuracy of always predicting it; is_tied: a second
        label is as frequent.
    """
    if data.labels.task == REGRESSION:
        return {}
    names, details = data.labels.names, dict[str, Any](names=list(data.labels.names))
    if data.labels.several:
        confidence = np.where(data.predicted == 1, data.probabilities, 1 - data.probabilities).ravel()
        return {**details, "calibration": _calibration(confidence, (data.predicted == data.targets).ravel())}
    if len(names) <= MOST_CLASSES:
        pairs = np.bincount(data.truth * len(names) + data.predicted, minlength=len(names) ** 2)
        details["confusion"] = pairs.reshape(len(names), len(names)).tolist()
    counts = np.bincount(data.truth, minlength=len(names))
    details["majority"] = {
        "label": names[counts.argmax()],
        "share": float(counts.max() / counts.sum()),
        "is_tied": bool((counts == counts.max()).sum() > 1),
    }
    details["calibration"] = _calibration(data.probabilities.max(1), data.predicted == data.truth)
    return details


def _calibration(confidence: Floats, is_right: NDArray[np.bool_]) -> dict[str, Any]:
    edges = np.linspace(0, 1, BINS + 1)
    bin_of_row = np.minimum(np.digitize(confidence, edges[1:]), BINS - 1)
    bins = []
    for number in np.unique(bin_of_row):
        confidences, hits = confidence[bin_of_row == number], is_right[bin_of_row == number]
        bins.append({"n": len(hits), "confidence": float(confidences.mean()), "accuracy": float(hits.mean())})
    ece = sum(row["n"] * abs(row["confidence"] - row["accuracy"]) for row in bins) / len(confidence)
    return {"ece": ece, "bins": bins}


# ---- A model on data


def evaluate_labels(
    model: LoRAModel,
    tokenizer: Any,
    labels: Labels,
    data: str,
    *,
    field: Mapping[str, str] | None = None,
    max_length: int = 1024,
    limit: int | None = None,
    base: bool = True,
    progress: Progress = lambda *_: None,
    trained_rows: Collection[bytes] | None = None,
) -> Scores:
    """Evaluates the active adapters on `data`, and with `base` also the model without them, on the same rows.

    Duplicate rows are evaluated once.
    data: as for training, or 'demo'.
    limit: number of rows to evaluate, from the first.
    trained_rows: as in `read_eval_data`.
    Raises DataError for labels that the model does not have, ConfigError if a package is missing.
    """
    check_packages()
    check_vocabulary(tokenizer, model.get_input_embeddings().weight.shape[0])
    settings = DataSettings(field, labels=labels, max_length=max_length, for_evaluation=True)
    facts, rows = read_eval_data(data, ChatTokenizer.of(tokenizer, settings), limit, trained_rows)
    examples = Examples.of(row.example for row in rows)
    models = models_to_score(model, base)
    outputs = {}
    for name, activated in models.items():
        with activated():
            evaluation = _evaluate(model, tokenizer, labels, examples, progress)
        outputs[name] = LabelOutputs.of(labels, examples, evaluation), evaluation
    scores = {}
    for name, (outputs_of_model, evaluation) in outputs.items():
        loss = Score(*mean_interval(evaluation.sums, evaluation.counts), len(evaluation.counts))
        scores[name] = {"loss": loss, **label_scores(outputs_of_model)}
    change = None
    if BASE in outputs:
        (before, old), (after, new) = outputs[BASE], outputs[TUNED]
        loss = Score(*change_of(old.sums, new.sums, new.counts).interval, len(new.counts))
        change = {"loss": loss, **label_changes(before, after)}
    return Scores(scores[TUNED], scores.get(BASE), change, data=facts, labels=label_details(outputs[TUNED][0]))


def _evaluate(model: LoRAModel, tokenizer: Any, labels: Labels, examples: Examples, progress: Progress) -> Evaluation:
    task = label_task(labels)
    layout = choose_layout(TrainConfig(), model, tokenizer, lambda _: None, trains=False, task=task)
    return evaluate(model, examples, layout=layout, token_budget=token_budget(model), task=task, progress=progress)


# ---- Labels for unlabelled rows


def predict_labels(
    model: LoRAModel,
    tokenizer: Any,
    labels: Labels,
    samples: Sequence[Labelled | Tagged],
    *,
    max_length: int = 1024,
    progress: Progress = lambda *_: None,
) -> list[dict[str, Any] | DataError]:
    """Returns the prediction for every sample, or the error that prevents it.

    For a text: label, and probabilities by label; with several labels, label is a list. For regression: label, a
    number. For words: tags and probabilities of each word, which are None for words beyond `max_length`.
    """
    chat_tokenizer = ChatTokenizer.of(tokenizer, DataSettings(labels=labels, max_length=max_length))
    encoded = encode_samples(samples, chat_tokenizer)
    usable = [row for rows in encoded if not isinstance(rows, DataError) for row in rows]
    if not usable:
        return [row for row in encoded if isinstance(row, DataError)]
    examples = Examples.of(row.example for row in usable)
    outputs = LabelOutputs.of(labels, examples, _evaluate(model, tokenizer, labels, examples, progress))
    ends = np.cumsum(outputs.counts)
    parts = map(slice, ends - outputs.counts, ends)
    predictions: list[dict[str, Any] | DataError] = []
    for sample, row in zip(samples, encoded, strict=True):
        if isinstance(row, DataError):
            predictions.append(row)
        elif isinstance(sample, Tagged):
            predictions.append(_tags(sample, outputs, next(parts), chat_tokenizer))
        else:
            predictions.append(_prediction(outputs, next(parts).start))
    return predictions


def _prediction(outputs: LabelOutputs, row: int) -> dict[str, Any]:
    labels = outputs.labels
    if labels.task == REGRESSION:
        return {"label": float(outputs.outputs[row, 0])}
    probabilities = dict(zip(labels.names, outputs.probabilities[row].tolist(), strict=True))
    chosen = outputs.predicted[row]
    if labels.several:
        return {"label": [labels.names[i] for i in np.nonzero(chosen)[0]], "probabilities": probabilities}
    return {"label": labels.names[chosen], "probabilities": probabilities}


def _tags(sample: Tagged, outputs: LabelOutputs, part: slice, tokenizer: ChatTokenizer) -> dict[str, Any]:
    """Words without a token get no tag."""
    _, firsts, _ = first_tokens(sample.tokens, tokenizer)
    tags, probabilities = iter(outputs.predicted[part]), iter(outputs.probabilities[part])
    names = outputs.labels.names
    return {
        "tags": [names[next(tags)] if first >= 0 else None for first in firsts],
        "probabilities": [
            dict(zip(names, next(probabilities).tolist(), strict=True)) if first >= 0 else None for first in firsts
        ],
    }
