"""The page of `search --lr-only`: the held-out loss while the learning rate rises."""

from tailora.report.blocks import Code, Figure, Number, Page, Section, Table
from tailora.report.charts import DASHED, SERIES, SOFT, Canvas
from tailora.report.format import learning_rate
from tailora.report.pages.shared import numeric, settings_table, train_command
from tailora.study.lr_range import RateRange


def lr_range_page(rates: RateRange) -> Page:
    suggestion = learning_rate(rates.suggestion)
    lowest = f"{rates.base_loss - rates.gain:.3f}"
    top = rates.base_loss + 0.6 * rates.gain

    def draw(canvas: Canvas) -> None:
        axes = canvas.new_axes(320, "learning rate", f"held-out loss, {rates.loss_unit}")
        axes.plot(*zip(*rates.curve, strict=True), color=SERIES[0], linewidth=2)
        shown = [(rate, loss) for rate, loss in rates.curve if loss <= top]
        tips = [f"{learning_rate(rate)}: {loss:.4f}" for rate, loss in shown]
        canvas.points(shown, tips, s=26, color=SERIES[0], zorder=3)
        axes.axhline(rates.base_loss, color=SOFT, linewidth=1.2, linestyle=DASHED)
        axes.axvline(rates.suggestion, color=SERIES[1], linewidth=2, label="suggested")
        axes.set_ylim(rates.base_loss - 1.15 * rates.gain, top)
        canvas.log_axis("x")

    figure = Figure(
        "rates",
        draw,
        f"Held-out loss against the learning rate, from {rates.base_loss:.3f} down to {lowest} at {suggestion}.",
        "Dashed line: the base. Losses above the top of the figure are left out.",
        wide=True,
    )
    rows = [[learning_rate(rate), f"{loss:.4f}"] for rate, loss in rates.curve]
    table = Table(numeric("learning rate", "held-out loss"), rows, "All losses", folded=True)
    sections = [
        Section(
            "Loss while the learning rate rises",
            "One run, each step at a higher learning rate; the loss is always that of the same held-out examples.",
            [figure, table],
        ),
        Section("Settings", "", [settings_table("Settings", ("", rates.settings.get("train", {})))]),
    ]
    numbers = [
        Number("suggested learning rate", suggestion),
        Number("lowest loss", lowest, f"at {suggestion}"),
        Number("held-out loss, base", f"{rates.base_loss:.3f}", "before any training"),
        Number("steps", f"{rates.steps:,}"),
    ]
    command = f"{train_command(rates.settings)} --learning-rate {rates.suggestion:.1e}"
    conclusion = Section("To train with it", "", [Code(command)])
    return Page("learning rates", "Learning rates", rates.verdict, numbers, sections, conclusion=conclusion)
