"""An adapter layer by layer: heat maps of what is where, and the spectra of its updates."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tailora.report.charts import label
from tailora.report.inspected import Module
from tailora.report.maps import heat, heat_map, scale
from tailora.report.parts import Drawing, Picture
from tailora.report.paths import short

FEWEST_LAYERS = 3  # for a map
MOST_PANELS = 12
Rows = Mapping[str, Sequence[Module]]


def named(modules: Sequence[Module]) -> Rows:
    """By their short names."""
    names = short(module.path for module in modules)
    rows: dict[str, list[Module]] = {}
    for module in modules:
        rows.setdefault(names[module.path], []).append(module)
    return rows


def maps(modules: Sequence[Module]) -> list[Picture]:
    inside = [module for module in modules if module.layer is not None]
    if len({module.layer for module in inside}) < FEWEST_LAYERS:
        return []
    kinds: list[tuple[str, str, Callable[[Module], float | None], float | None, Callable[[float], str], str]] = [
        ("energy", "Energy", lambda each: each.energy, None, "{:.2%}".format, "Share of the adapter's squared norm."),
        (
            "use",
            "Effective rank / rank",
            lambda each: each.use,
            1.0,
            "{:.2f}".format,
            "Effective rank / rank: 1 uses all directions alike, near 0 all but one are idle.",
        ),
        (
            "norm",
            "Relative norm",
            lambda each: each.relative_norm,
            None,
            "{:.1%}".format,
            "‖ΔW‖ / ‖W‖: how large the update is beside the weight that it changes.",
        ),
        (
            "intruders",
            "Intruder dimensions",
            lambda each: each.intruders,
            10.0,
            "{:.0f}".format,
            "Of the 10 leading directions of the changed weight, those that the base's has nothing like.",
        ),
    ]
    pictures = []
    for name, title, value, top, say, caption in kinds:
        cells = {
            (row, module.layer or 0): float(number)
            for row, own in named(inside).items()
            for module in own
            if (number := value(module)) is not None
        }
        if any(cells.values()):
            pictures.append(_map(name, title, cells, top or max(cells.values()), say, caption))
    return pictures


def _map(
    name: str,
    title: str,
    cells: Mapping[tuple[str, int], float],
    top: float,
    say: Callable[[float], str],
    caption: str,
) -> Picture:
    (row, layer), most = max(cells.items(), key=lambda each: each[1])
    names = {place: f"layer {place[1]}, {place[0]}" for place in cells}
    return Picture(
        f"map-{name}",
        lambda width: heat_map(width, cells, top, say, title.lower(), names),
        f"Heat map of {title.lower()} by layer and matrix. Most: {say(most)} in layer {layer}, {row}.",
        caption,
        wide=True,
    )


# ---- spectra


def spectra(modules: Sequence[Module]) -> list[Picture]:
    rows = {name: own for name, every in named(modules).items() if (own := [each for each in every if _alive(each)])}
    if not rows:
        return []
    energies = {name: sum(module.energy for module in own) for name, own in rows.items()}
    kept = sorted(energies, key=lambda name: -energies[name])[:MOST_PANELS]
    shown = {name: own for name, own in rows.items() if name in kept}
    caption = "Singular values of each update, the largest as 1, by their place; a line for each layer."
    if len(shown) < len(rows):
        caption += f" The {MOST_PANELS} of {len(rows)} matrices with the most energy."
    return [
        Picture(
            "spectra",
            partial(_draw_spectra, shown),
            f"Line charts of the singular values of {sum(map(len, shown.values()))} updates: {', '.join(shown)}.",
            caption,
            wide=True,
        )
    ]


def _alive(module: Module) -> bool:
    return bool(module.singular_values) and module.singular_values[0] > 0


def _draw_spectra(rows: Rows, width: float) -> Drawing:
    columns = min(len(rows), 4 if width > 600 else 2)
    lines = math.ceil(len(rows) / columns)
    figure = Figure(figsize=(width / 72, (56 + 150 * lines) / 72))
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    last = max((module.layer or 0 for own in rows.values() for module in own), default=0)
    flat: list[Axes] = list(panels.flat)
    for axes, (name, own) in zip(flat, rows.items(), strict=False):
        for module in own:
            values = module.singular_values
            colour = heat(2 + (module.layer or 0), 0, last + 3)  # not the palest, which are no lines
            axes.plot(range(1, len(values) + 1), [each / values[0] for each in values], color=colour, linewidth=1.2)
        axes.set_title(label(name, 22), fontsize=11.5)
        axes.set_ylim(0, 1.05)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True, min_n_ticks=1))
        axes.set_yticks([0, 0.5, 1])
    for place in range(len(rows), len(flat)):
        flat[place].set_visible(False)
        flat[place - columns].tick_params(labelbottom=True)
    if last:
        scale(figure, flat, (0, last), "{:.0f}".format, "layer")
    return Drawing(figure)
