"""An adapter on data: what the lower half of its singular values is worth, and what lower strengths would do."""

from functools import partial

from tailora.report import words
from tailora.report.charts import Estimate, canvas, estimates, legend
from tailora.report.inspected import HeldOut, Inspection, Rise
from tailora.report.parts import Drawing, Picture, Table
from tailora.report.svg import SERIES


def half_losses(held: HeldOut) -> Picture:
    rises = _rises(held)
    rows = [Estimate(name, each.rise, each.low, each.high) for name, each in rises.items()]
    said = "; ".join(f"{row.name} {row.value:+.4f} ({words.between(row.low, row.high, '+.4f')})" for row in rows)
    unit = "rise of held-out loss, nats per token"
    return Picture(
        "half",
        lambda width: Drawing(estimates(width, rows, unit, reference=0.0, form="+.4f", one_colour=True)[0]),
        f"Rise of held-out loss without the lower half of the singular values: {said}.",
        f"Rise of held-out loss without the lower half of the singular values of these matrices, with 95% intervals. "
        f"The base has {held.base_loss:.3f}, the adapter {held.loss:.3f}.",
        wide=True,
    )


def half_table(held: HeldOut) -> Table:
    rows = [
        [
            name,
            f"{each.loss:.4f}",
            words.signed(each.rise, 4),
            "–" if each.cost is None else f"{each.cost:.1%}",
            "–" if each.values is None else f"{each.values:.0%}",
        ]
        for name, each in _rises(held).items()
    ]
    return Table(("without the lower half of", "loss", "rise", "of the gain", "of the values"), rows)


def _rises(held: HeldOut) -> dict[str, Rise]:
    return {"all": held.half, **held.groups}


def forgotten(found: Inspection) -> str:
    """In a sentence."""
    lost = found.forgetting
    if lost is None:
        return ""
    rise = lost["loss_after"] - lost["loss_before"]
    where = lost.get("text", "other text")
    return f"On {where}: KL {lost['kl']:.4f} nats per token from the base, loss {words.signed(rise, 4)}."


def dial(found: Inspection) -> Picture | Table | None:
    lost, held = found.forgetting, found.held_out
    if lost is None:
        return None
    rise = lost["loss_after"] - lost["loss_before"]
    if not found.dial or held is None:
        rows = [[f"{lost['loss_before']:.4f}", f"{lost['loss_after']:.4f}", words.signed(rise, 4), f"{lost['kl']:.4f}"]]
        return Table(("loss of the base", "with the adapter", "rise", "KL"), rows, words=0)
    points = [(0.0, held.base_loss, 0.0), (1.0, held.loss, lost["kl"])]
    points += [(each.strength, each.loss, each.kl) for each in found.dial if each.loss is not None]
    return Picture(
        "dial",
        partial(_draw_dial, sorted(points)),
        f"Held-out loss and KL from the base at {len(points)} strengths of the adapter.",
        "What a lower strength keeps: held-out loss, and KL from the base on other text; nats per token.",
        wide=True,
    )


def _draw_dial(points: list[tuple[float, float, float]], width: float) -> Drawing:
    figure, axes = canvas(width, 280)
    strengths, losses, kls = zip(*points, strict=True)
    axes.plot(strengths, losses, "o-", color=SERIES[0], label="held-out loss")
    axes.set_ylabel("held-out loss")
    axes.set_xlabel("strength")
    other = axes.twinx()
    other.plot(strengths, kls, "s--", color=SERIES[1])
    axes.plot([], [], "s--", color=SERIES[1], label="KL from the base (right)")
    other.set_ylabel("KL")
    other.set_ylim(bottom=0)
    other.grid(visible=False)
    legend(figure, axes, 2)
    return Drawing(figure)
