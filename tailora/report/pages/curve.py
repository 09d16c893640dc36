"""The page of a learning curve."""

from itertools import groupby, pairwise

from tailora.report.blocks import Column, Figure, Number, Page, Section, Table
from tailora.report.charts import Canvas, series_colour
from tailora.report.format import count, interval, plural, signed
from tailora.report.pages.shared import INTERVAL, difference_cells, numeric, settings_table
from tailora.study.results import LearningCurve


def curve_page(curve: LearningCurve) -> Page:
    largest, last = curve.largest, curve.doublings[-1]
    sizes = [point.examples for point in curve.points if point.r == curve.points[0].r]
    changes = {f"from {a:,} to {b:,} examples": d for (a, b), d in zip(pairwise(sizes), curve.doublings, strict=True)}
    changes |= {"each doubling, over all sizes": curve.trend}
    changes |= {f"from {sizes[-1]:,} to {sizes[-3]:,} examples": curve.quarter}
    if curve.high_rank is not None:
        changes[f"rank {curve.points[-1].r} instead of {largest.r}"] = curve.high_rank
    rows = [[name, *difference_cells(change, change.p_value)] for name, change in changes.items()]
    columns = [Column("what changes"), *numeric("change of the loss"), INTERVAL, *numeric("p")]
    points = [[f"{p.examples:,}", str(p.r), f"{p.steps:,}", f"{p.eval_loss:.4f}"] for p in curve.points]
    sections = [
        Section(
            "Loss by amount of data",
            f"Nested subsets, {plural(len(largest.seed_losses), 'seed')}, evaluated on {curve.judged_examples:,} "
            f"held-out examples. Each subset has its best number of steps, up to {curve.steps:,}. All other settings "
            "are equal.",
            [_figure(curve), Table(numeric("examples", "rank", "best steps", "held-out loss"), points)],
        ),
        Section("What changes the loss", "", [Table(columns, rows)]),
        Section("Settings", "", [settings_table("Settings", *curve.settings.items())]),
    ]
    numbers = [
        Number("last doubling", signed(last.value), f"95% interval {interval((last.low, last.high), signed)}"),
        Number(f"held-out loss, {count(largest.examples)} examples", f"{largest.eval_loss:.3f}"),
        Number("held-out loss, base", f"{curve.base_loss:.3f}", "before training"),
    ]
    return Page("curve", "How much data", curve.verdict, numbers, sections, curve.notes)


def _figure(curve: LearningCurve) -> Figure:
    def draw(canvas: Canvas) -> None:
        axes = canvas.new_axes(340, "training examples", f"held-out loss, {curve.loss_unit}")
        for number, (rank, group) in enumerate(groupby(curve.points, key=lambda point: point.r)):
            points, colour = list(group), series_colour(number)
            means = [point.eval_loss for point in points]
            axes.plot([point.examples for point in points], means, "o-", color=colour, label=f"rank {rank}")
            runs = [(point.examples, loss) for point in points for loss in point.seed_losses]
            axes.plot(*zip(*runs, strict=True), "o", color=colour, markersize=2.5, alpha=0.6)
        canvas.log_axis("x", count)

    measured = "; ".join(f"{p.examples:,} examples at rank {p.r}: {p.eval_loss:.3f}" for p in curve.points)
    alt = f"Held-out loss by number of training examples. {measured}."
    return Figure("curve", draw, alt, "Large dots: means of the seeds. Small dots: each seed.", wide=True)
