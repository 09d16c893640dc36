"""Scores of labels: the values of scikit-learn and seqeval, with intervals, confusions and calibration."""

import math

import numpy as np
import pytest
import seqeval.metrics
from scipy.stats import pearsonr, spearmanr
from sklearn import metrics

from tailora.data.labels import Labels
from tailora.evaluation.classification import (
    LabelOutputs,
    _statistic,
    as_intervals,
    beats_majority,
    describe_labels,
    label_changes,
    label_details,
    label_scores,
    score_names,
)
from tailora.evaluation.statistics import Interval

CLASSES = Labels("sequence-classification", ("a", "b", "c"))
BINARY = Labels("sequence-classification", ("no", "yes"))
SEVERAL = Labels("sequence-classification", ("a", "b", "c"), several=True)
NUMBER = Labels("regression", ("value",))
TAGS = Labels("token-classification", ("O", "B-X", "I-X", "B-Y"))
ROWS = 120


def outputs_of(labels: Labels, skill: float = 1.0, seed: int = 0) -> LabelOutputs:
    """Outputs that are right the more often the larger the skill is."""
    random = np.random.default_rng(seed)
    counts = random.integers(2, 6, ROWS) if labels is TAGS else np.ones(ROWS, dtype=np.int64)
    total = int(counts.sum())
    if labels is NUMBER:
        targets = random.normal(size=(total, 1))
        return LabelOutputs(labels, skill * targets + random.normal(size=(total, 1)), targets, counts)
    size = len(labels.names)
    noise = random.normal(size=(total, size))
    if labels is SEVERAL:
        targets = random.integers(0, 2, (total, size)).astype(np.float64)
        return LabelOutputs(labels, skill * (2 * targets - 1) + noise, targets, counts)
    targets = random.integers(0, size, (total, 1)).astype(np.float64)
    return LabelOutputs(labels, 2 * skill * np.eye(size)[targets[:, 0].astype(int)] + noise, targets, counts)


def value(data: LabelOutputs, name: str) -> float:
    return label_scores(data)[name].value


@pytest.mark.parametrize("labels", [CLASSES, BINARY], ids=["three", "two"])
def test_scores_of_classes_are_those_of_scikit_learn(labels: Labels) -> None:
    data = outputs_of(labels)
    truth, predicted, p = data.truth, data.predicted, data.probabilities
    scores = {name: score.value for name, score in label_scores(data).items()}
    auroc = metrics.roc_auc_score(truth, p[:, 1] if labels is BINARY else p, multi_class="ovr")
    each = metrics.f1_score(truth, predicted, average=None)
    expected = {
        "accuracy": metrics.accuracy_score(truth, predicted),
        "f1_macro": metrics.f1_score(truth, predicted, average="macro"),
        "mcc": metrics.matthews_corrcoef(truth, predicted),
        "auroc": auroc,
        **{f"f1[{name}]": score for name, score in zip(labels.names, each, strict=True)},
    }
    assert scores == pytest.approx(expected)


@pytest.mark.parametrize("labels", [CLASSES, BINARY, SEVERAL, NUMBER, TAGS])
def test_the_names_of_scores_are_known_before_there_is_data(labels: Labels) -> None:
    assert sorted(score_names(labels)) == sorted({"loss", *label_scores(outputs_of(labels))})


def test_scores_of_several_labels_are_those_of_scikit_learn() -> None:
    data = outputs_of(SEVERAL)
    scores = label_scores(data)
    assert scores["accuracy"].value == metrics.accuracy_score(data.targets, data.predicted)
    for average in ("micro", "macro"):
        expected = metrics.f1_score(data.targets, data.predicted, average=average)
        assert scores[f"f1_{average}"].value == pytest.approx(expected)
    assert scores["auroc"].value == pytest.approx(metrics.roc_auc_score(data.targets, data.probabilities))


def test_scores_of_numbers_are_those_of_scipy() -> None:
    data = outputs_of(NUMBER)
    truth, predicted = data.targets[:, 0], data.outputs[:, 0]
    scores = label_scores(data)
    assert scores["mse"].value == pytest.approx(metrics.mean_squared_error(truth, predicted))
    assert scores["mae"].value == pytest.approx(metrics.mean_absolute_error(truth, predicted))
    assert scores["pearson"].value == pytest.approx(pearsonr(truth, predicted).statistic)
    assert scores["spearman"].value == pytest.approx(spearmanr(truth, predicted).statistic)


def test_scores_of_entities_are_those_of_seqeval() -> None:
    data = outputs_of(TAGS)
    right, predicted = data.tags(data.truth), data.tags(data.predicted)
    assert [len(tags) for tags in right] == data.counts.tolist()
    scores = label_scores(data)
    for name in ("precision", "recall", "f1", "accuracy"):
        assert scores[name].value == pytest.approx(getattr(seqeval.metrics, f"{name}_score")(right, predicted)), name
    report = seqeval.metrics.classification_report(right, predicted, output_dict=True)
    for entity in ("X", "Y"):
        assert scores[f"f1[{entity}]"].value == pytest.approx(report[entity]["f1-score"])
    assert scores["f1_macro"].value == pytest.approx(report["macro avg"]["f1-score"])


def test_the_f1_of_entities_is_told_before_the_accuracy_of_words() -> None:
    scores = as_intervals(label_scores(outputs_of(TAGS)))
    assert list(scores)[:2] == ["accuracy", "f1"]
    text = describe_labels(scores, scores, {}, new_head=False)
    assert text.startswith(f"F1 of entities is {scores['f1'].value:.3f} (95% interval {scores['f1'].low:.3f} to ")
    assert text.endswith(f"; before training {scores['accuracy'].value:.1%}.")


def test_tags_that_are_no_entities_are_classes() -> None:
    data = outputs_of(TAGS)
    named = LabelOutputs(Labels(TAGS.task, ("NOUN", "VERB", "ADJ", "DET")), data.outputs, data.targets, data.counts)
    scores = label_scores(named)
    assert scores["f1_macro"].value == pytest.approx(metrics.f1_score(named.truth, named.predicted, average="macro"))
    assert "precision" not in scores


@pytest.mark.parametrize("labels", [CLASSES, SEVERAL, NUMBER, TAGS], ids=["classes", "several", "number", "tags"])
def test_intervals_hold_the_value_and_are_the_same_each_time(labels: Labels) -> None:
    scores = label_scores(outputs_of(labels))
    for name, score in scores.items():
        assert score.low < score.value < score.high, name
        assert score.n == ROWS
    assert scores == label_scores(outputs_of(labels))


def test_a_class_that_is_missing_in_a_draw_does_not_lower_its_mean_f1() -> None:
    truth = np.repeat(np.arange(3), [90, 8, 2])[:, None]
    perfect = label_scores(LabelOutputs(CLASSES, 9.0 * (truth == np.arange(3)), truth, np.ones(100, dtype=np.int64)))
    assert (perfect["f1_macro"].low, perfect["f1_macro"].high) == (1, 1)


def test_intervals_have_the_width_of_95_percent() -> None:
    """That of a mean over rows, or of a ratio of two, in the limit of many rows."""
    numbers, tags = outputs_of(NUMBER), outputs_of(TAGS)
    errors = (numbers.targets - numbers.outputs)[:, 0] ** 2
    right = tags.by_row(tags.predicted == tags.truth)
    share = right.sum() / tags.counts.sum()
    for data, name, residual in (
        (numbers, "mse", errors),
        (tags, "accuracy", (right - share * tags.counts) / tags.counts.mean()),
    ):
        score = label_scores(data)[name]
        assert score.high - score.low == pytest.approx(2 * 1.96 * residual.std() / math.sqrt(ROWS), rel=0.08)


@pytest.mark.parametrize("least", [0, 1], ids=["that is predicted", "that is not predicted either"])
def test_a_class_that_no_row_has_counts_only_if_it_is_predicted(least: int) -> None:
    data = outputs_of(CLASSES)
    outputs = data.outputs.copy()
    outputs[:, 0] -= 99 * least
    truth = np.maximum(data.targets, 1)
    changed = LabelOutputs(CLASSES, outputs, truth, data.counts)
    assert (changed.predicted == 0).any() != bool(least)
    expected = metrics.f1_score(changed.truth, changed.predicted, average="macro", zero_division=0)
    assert value(changed, "f1_macro") == pytest.approx(expected)
    assert ("f1[a]" in label_scores(changed)) != bool(least)


@pytest.mark.parametrize(
    "labels", [CLASSES, BINARY, SEVERAL, NUMBER, TAGS], ids=["classes", "two", "several", "number", "tags"]
)
def test_a_draw_has_the_values_of_its_rows(labels: Labels) -> None:
    data = outputs_of(labels)
    data = LabelOutputs(labels, data.outputs.round(1), data.targets, data.counts)  # some are equal
    times = np.random.default_rng(1).integers(0, 3, ROWS)
    rows = np.repeat(np.arange(ROWS), times)
    words = np.split(np.arange(data.counts.sum()), np.cumsum(data.counts)[:-1])
    chosen = np.concatenate([words[row] for row in rows])
    drawn = LabelOutputs(labels, data.outputs[chosen], data.targets[chosen], data.counts[rows])
    values = {name: value for name, (value,) in _statistic(data)(times[None].astype(np.float64)).items()}
    assert values == pytest.approx({name: score.value for name, score in label_scores(drawn).items()})


def test_differences_are_paired() -> None:
    weak, strong = outputs_of(CLASSES, 0.3, seed=1), outputs_of(CLASSES, 1.5, seed=1)
    change = label_changes(weak, strong)
    for name in ("accuracy", "f1_macro", "mcc"):
        assert change[name].value == pytest.approx(value(strong, name) - value(weak, name))
        assert change[name].low > 0
    same = label_changes(strong, strong)["f1_macro"]
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_what_does_not_exist_is_no_number() -> None:
    data = outputs_of(NUMBER)
    constant = LabelOutputs(NUMBER, np.ones_like(data.outputs), data.targets, data.counts)
    assert math.isnan(value(constant, "pearson"))
    data = outputs_of(CLASSES)
    two = LabelOutputs(CLASSES, data.outputs, np.minimum(data.targets, 1), data.counts)
    assert "auroc" not in label_scores(two)  # a class that no row has


def test_confusions_calibration_and_the_most_frequent_label() -> None:
    data = outputs_of(CLASSES)
    details = label_details(data)
    np.testing.assert_array_equal(details["confusion"], metrics.confusion_matrix(data.truth, data.predicted))
    counts = np.bincount(data.truth)
    share = counts.max() / ROWS
    assert details["majority"] == {"label": CLASSES.names[counts.argmax()], "share": share, "is_tied": False}
    tied = LabelOutputs(CLASSES, data.outputs[:3], np.arange(3.0)[:, None], data.counts[:3])
    assert label_details(tied)["majority"] == {"label": CLASSES.names[0], "share": 1 / 3, "is_tied": True}
    bins = details["calibration"]["bins"]
    assert sum(row["n"] for row in bins) == ROWS
    mean = sum(row["n"] * row["accuracy"] for row in bins) / ROWS
    assert mean == pytest.approx(value(data, "accuracy"))


@pytest.mark.parametrize(
    ("accuracy", "beats", "text"),
    [
        (0.5, False, "Accuracy is 50.0%, no better than the 50.0% for always predicting 'x'; before training 20.0%."),
        (0.75, True, "Accuracy is 75.0%; before training 20.0%, and 50.0% for always predicting 'x'."),
    ],
)
def test_the_accuracy_is_compared_with_that_of_the_most_frequent_label(accuracy: float, beats: bool, text: str) -> None:
    before, after = ({"accuracy": Interval(value, math.nan, math.nan)} for value in (0.2, accuracy))
    details = {"majority": {"label": "x", "share": 0.5, "is_tied": False}}
    assert describe_labels(before, after, details, new_head=False) == text
    assert beats_majority(accuracy, details) == beats
    assert beats_majority(accuracy, {})
