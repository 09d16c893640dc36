"""What the pages of training and of evaluation show of a model that predicts labels: confusions and calibration."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from tailora.report.blocks import Column, Figure, Section, Table
from tailora.report.charts import DASHED, SERIES, SOFT, Canvas
from tailora.report.format import decimals, share
from tailora.report.pages.shared import numeric


def labels_section(details: Mapping[str, Any]) -> Section | None:
    """details: `evaluation.classification.label_details`, {} for numbers."""
    if not details:
        return None
    return Section("Labels", " ".join(_sentences(details)), [_confusion(details), _calibration(details)])


def _sentences(details: Mapping[str, Any]) -> list[str]:
    texts = []
    if majority := details.get("majority"):
        rate = share(majority["share"], 1)
        frequent = "one of the most frequent labels" if majority.get("is_tied") else "the most frequent label"
        texts.append(f"Always answering {majority['label']!r}, {frequent}, gets {rate} right.")
    ece = decimals(details["calibration"]["ece"])
    texts.append(f"Expected calibration error: {ece}, the mean distance between confidence and accuracy.")
    return texts


def _confusion(details: Mapping[str, Any]) -> Table | None:
    if "confusion" not in details:
        return None
    names = details["names"]
    rows = [
        [name, *(f"{count:,}" for count in counts)] for name, counts in zip(names, details["confusion"], strict=True)
    ]
    columns = [Column("right \\ predicted"), *numeric(*names)]
    return Table(columns, rows, "Confusion matrix", "A row for each right label, a column for each predicted one.")


def _calibration(details: Mapping[str, Any]) -> Figure:
    bins = details["calibration"]["bins"]

    def draw(points: list[tuple[float, float]], tips: list[str], canvas: Canvas) -> None:
        axes = canvas.new_axes(330, "confidence", "accuracy")
        axes.plot([0, 1], [0, 1], color=SOFT, linewidth=1.2, linestyle=DASHED)
        axes.plot(*zip(*points, strict=True), color=SERIES[0], linewidth=1.2)
        canvas.points(points, tips, s=40, color=SERIES[0], linewidths=0)
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(-0.02, 1.02)

    points = [(row["confidence"], row["accuracy"]) for row in bins]
    tips = [f"{row['n']:,}: confidence {row['confidence']:.3f}, accuracy {row['accuracy']:.3f}" for row in bins]
    listed = "; ".join(tips)
    return Figure(
        "calibration",
        partial(draw, points, tips),
        f"Line chart of accuracy by confidence: {listed}.",
        "Predictions of about the same confidence: how many of them are right. On the dashed line a confidence of 80% "
        "is right in 80% of the cases.",
    )
