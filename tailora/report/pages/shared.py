"""Columns, tables and figures that several pages use."""

from collections.abc import Mapping, Sequence
from typing import Any

from tailora.evaluation.statistics import Difference
from tailora.report.blocks import Column, Figure, Section, Table
from tailora.report.charts import DASHED, GRID, SERIES, SOFT, Canvas, Estimate
from tailora.report.format import decimals, interval, p_value, setting, share, signed
from tailora.study.results import FurtherResult, Measure
from tailora.study.study_store import LAUNCH, PROCESSES

INTERVAL = Column("95% interval", numeric=True, interval=True)


def numeric(*names: str) -> list[Column]:
    return [Column(name, numeric=True) for name in names]


def settings_table(title: str, *groups: tuple[str, Mapping[str, object]]) -> Table | None:
    """A folded table of settings. groups: name of a group ("" for none) -> its settings."""
    rows = [[group, name, setting(value)] for group, settings in groups for name, value in settings.items()]
    if not rows:
        return None
    columns = [Column("part"), Column("setting"), Column("value")]
    if not any(group for group, *_ in rows):
        columns, rows = columns[1:], [row[1:] for row in rows]
    return Table(columns, rows, title, folded=True, detail="page")


def train_command(settings: Mapping[str, Any]) -> str:
    """Returns the start of a training command, with as many processes as the runs of a study with these settings."""
    processes = settings.get(LAUNCH, {}).get(PROCESSES)
    return "tailora train" if processes is None else f"tailora train --nproc-per-node {processes}"


# ---- Losses and their differences, of a comparison's arms or a search's finalists


def loss_figures(
    losses: Sequence[Estimate],
    base_loss: float,
    differences: Mapping[str, Difference | None],
    reference: str,
    margin: float | None,
    measure: Measure,
) -> list[Figure | None]:
    """differences: name of a loss -> its difference from the reference's loss.
    margin: differences below this do not matter to the user.
    measure: what takes the place of the loss.
    """
    measured = {name: difference for name, difference in differences.items() if difference}
    listed = "; ".join(f"{loss.name} {loss.value:.3f} ({interval(loss.ends)})" for loss in losses)
    seeds = "; small dots: each seed" if any(loss.runs for loss in losses) else ""
    alt = f"Held-out {measure.name} of each with its 95% interval: {listed}."
    caption = (
        f"Held-out {measure.name} with 95% intervals over examples and seeds{seeds}. The base model's is "
        f"{base_loss:.3f}. All are evaluated on the same examples, so compare the differences: overlapping intervals "
        "say little."
    )
    losses_figure = Figure("losses", lambda canvas: canvas.estimates(losses, f"held-out {measure.label}"), alt, caption)

    def draw_differences(canvas: Canvas) -> None:
        rows = [Estimate(name, value.value, (value.low, value.high)) for name, value in measured.items()]
        colours = [number for number, loss in enumerate(losses) if loss.name in measured]  # as in the figure of losses
        label = f"difference in {measure.label}"
        canvas.estimates(rows, label, reference=0.0, form="+.3f", colours=colours)
        if margin is not None:
            canvas.axes.axvspan(-margin, margin, color=GRID, alpha=0.6, linewidth=0, zorder=0)

    listed = "; ".join(f"{name} {d.value:+.3f} ({d.low:+.3f} to {d.high:+.3f})" for name, d in measured.items())
    are_several = any(difference.comparisons > 1 for difference in measured.values())
    ends = f"its 95% interval{' (all intervals hold at the same time)' if are_several else ''}"
    side = "left" if measure.sign > 0 else "right"
    alt = f"Difference of each from {reference} with its 95% interval: {listed}."
    caption = f"Difference from {reference} on the same examples and seeds, with {ends}; {side} is better."
    if margin is not None:
        caption += f" Shaded: differences within the margin of {margin:g}, which do not matter."
    differences_figure = Figure("differences", draw_differences, alt, caption)
    return [losses_figure if losses else None, differences_figure if measured else None]


def difference_cells(difference: Difference | None, p: float | None, missing: str = "") -> list[str]:
    """Returns the difference, its interval and its p-value. missing: shown if there is no difference."""
    value = signed(difference.value) if difference else missing
    ends = f"{signed(difference.low)} to {signed(difference.high)}" if difference else ""
    return [value, ends, "" if p is None else p_value(p)]


def further_tables(results: Mapping[str, Mapping[str, FurtherResult]], reference: str) -> list[Table]:
    """Returns a table of each further number. results: by run, then by number."""
    tables = []
    for number in next(iter(results.values()), {}):
        rows = []
        for name, of_run in results.items():
            change, ends, _ = difference_cells(of_run[number].difference, None)
            rows.append([name, f"{of_run[number].value:.3f}", interval(of_run[number].interval), change, ends])
        columns = [Column("name"), *numeric(number), INTERVAL, *numeric(f"- {reference}"), INTERVAL]
        tables.append(Table(columns, rows, f"{number[:1].upper()}{number[1:]}"))
    return tables


# ---- Classification: confusion matrix and calibration


def labels_section(details: Mapping[str, Any]) -> Section | None:
    """details: `evaluation.classification.label_details`, {} for regression."""
    if not details:
        return None
    texts = []
    if majority := details.get("majority"):
        rate = share(majority["share"], 1)
        frequent = "one of the most frequent labels" if majority.get("is_tied") else "the most frequent label"
        texts.append(f"Always predicting {majority['label']!r}, {frequent}, has an accuracy of {rate}.")
    ece = decimals(details["calibration"]["ece"])
    texts.append(f"Expected calibration error: {ece}, the mean distance between confidence and accuracy.")
    return Section("Labels", " ".join(texts), [_confusion(details), _calibration(details)])


def _confusion(details: Mapping[str, Any]) -> Table | None:
    if "confusion" not in details:
        return None
    rows = [[name, *map("{:,}".format, row)] for name, row in zip(details["names"], details["confusion"], strict=True)]
    columns = [Column("true \\ predicted"), *numeric(*details["names"])]
    return Table(columns, rows, "Confusion matrix", "Rows: true labels. Columns: predicted labels.")


def _calibration(details: Mapping[str, Any]) -> Figure:
    bins = details["calibration"]["bins"]

    def draw(canvas: Canvas) -> None:
        axes = canvas.new_axes(330, "confidence", "accuracy")
        axes.plot([0, 1], [0, 1], color=SOFT, linewidth=1.2, linestyle=DASHED)
        points = [(row["confidence"], row["accuracy"]) for row in bins]
        axes.plot(*zip(*points, strict=True), "o-", color=SERIES[0], markersize=6, linewidth=1.2)
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(-0.02, 1.02)

    listed = [f"{row['n']:,}: confidence {row['confidence']:.3f}, accuracy {row['accuracy']:.3f}" for row in bins]
    alt = f"Line chart of accuracy by confidence: {'; '.join(listed)}."
    caption = (
        "Accuracy of predictions with about the same confidence. On the dashed line, predictions with a confidence of "
        "80% are right in 80% of the cases."
    )
    return Figure("calibration", draw, alt, caption)
