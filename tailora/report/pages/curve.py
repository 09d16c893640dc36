"""The page of a learning curve."""

from itertools import groupby

from tailora.report.blocks import Column, Figure, Number, Page, Section, Table
from tailora.report.charts import DASHED, SOFT, Canvas, series_colour
from tailora.report.format import count, interval, plural, signed
from tailora.report.pages.shared import numeric, settings_table
from tailora.study.results import LearningCurve


def curve_page(curve: LearningCurve) -> Page:
    largest, doubling = curve.largest, curve.doubling
    more = doubling or -curve.half
    interval_90 = f"90% interval {interval(more.interval, signed)}"
    changes = {f"{2 * largest.examples:,} examples (forecast)": doubling} if doubling else {}
    changes |= {
        f"{largest.examples // 2:,} examples": curve.half,
        f"{largest.examples // 4:,} examples": curve.quarter,
        f"rank {curve.points[-1].r}": curve.high_rank,
    }
    rows = [[name, signed(entry.change), interval(entry.interval, signed)] for name, entry in changes.items()]
    columns = [Column("with"), *numeric("change of the loss", "90% interval")]
    candidates = ", ".join(f"{name} {weight:.0%}" for name, weight in curve.candidates.items() if weight >= 0.005)
    seeds = plural(len(largest.seed_losses), "seed")
    points = [[f"{p.examples:,}", str(p.r), f"{p.steps:,}", f"{p.eval_loss:.4f}"] for p in curve.points]
    sections = [
        Section(
            "Loss by amount of data",
            f"Nested subsets, {seeds}, evaluated on {curve.judged_examples:,} held-out examples. Each subset has its "
            f"best number of steps, up to {curve.steps:,}. All other settings are equal.",
            [_figure(curve), Table(numeric("examples", "rank", "best steps", "held-out loss"), points)],
        ),
        Section(
            "What changes the loss", f"Probability of each shape of the curve: {candidates}.", [Table(columns, rows)]
        ),
        Section("Settings", "", [settings_table("Settings", *curve.settings.items())]),
    ]
    numbers = [
        Number("twice the data" if doubling else "last doubling", signed(more.change), interval_90),
        Number(f"held-out loss, {count(largest.examples)} examples", f"{largest.eval_loss:.3f}"),
        Number("held-out loss, base", f"{curve.base_loss:.3f}", "before training"),
    ]
    return Page("curve", "How much data", curve.verdict, numbers, sections, curve.notes)


def _figure(curve: LearningCurve) -> Figure:
    def draw(canvas: Canvas) -> None:
        axes = canvas.new_axes(340, "training examples", f"held-out loss, {curve.loss_unit}")
        sizes, losses, low, high = zip(*curve.band, strict=True)
        axes.fill_between(sizes, low, high, color=series_colour(0), alpha=0.15, linewidth=0)
        axes.plot(sizes, losses, color=series_colour(0), linewidth=1.6)
        if curve.doubling:
            axes.axvline(curve.largest.examples, color=SOFT, linewidth=1, linestyle=DASHED)
        for number, (rank, group) in enumerate(groupby(curve.points, key=lambda point: point.r)):
            points, colour = list(group), series_colour(number)
            means = [point.eval_loss for point in points]
            axes.plot([point.examples for point in points], means, "o", color=colour, label=f"rank {rank}")
            runs = [(point.examples, loss) for point in points for loss in point.seed_losses]
            axes.plot(*zip(*runs, strict=True), "o", color=colour, markersize=2.5, alpha=0.6)
        canvas.log_axis("x", count)

    measured = "; ".join(f"{p.examples:,} examples at rank {p.r}: {p.eval_loss:.3f}" for p in curve.points)
    alt = f"Held-out loss by number of training examples. {measured}."
    caption = (
        "Large dots: means of the seeds. Small dots: each seed. Band: 90% interval of the curve at the first rank."
    )
    if curve.doubling:
        _, loss, low, high = curve.band[-1]
        alt += f" Forecast: {loss:.3f} ({low:.3f} to {high:.3f})."
        caption += " Right of the dashed line, it is a forecast."
    return Figure("curve", draw, alt, caption, wide=True)
