"""A page as one HTML file that needs no network."""

import re
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from tailora import __version__
from tailora.formats.run_folder import REPORT
from tailora.report.blocks import Figure, HeatMap, Page, Section
from tailora.report.format import printable
from tailora.report.svg import svg

MINUS = re.compile(r"(^|(?<=[ (]))-(?=[\d.])")  # of a number


def html(page: Page) -> str:
    """The whole document."""
    sections = [page.conclusion, *page.sections] if page.conclusion else page.sections
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, finalize=_printable)
    environment.filters["minus"] = lambda text: MINUS.sub("\N{MINUS SIGN}", text)
    return environment.from_string(_packaged("page.html.j2")).render(
        page=page,
        sections=[shown for section in sections if (shown := _shown(section)).blocks],
        block_type=lambda block: type(block).__name__,
        version=__version__,
        report=REPORT,
        style=Markup(_packaged("style.css").strip()),
        svg=_svg,
    )


def _shown(section: Section) -> Section:
    """Without blocks of None; heat maps become figures."""
    blocks = [_figure_of(block) if isinstance(block, HeatMap) else block for block in section.blocks if block]
    return Section(section.title, section.text, blocks)


def _figure_of(heat: HeatMap) -> Figure:
    (row, layer), most = max(heat.cells.items(), key=lambda item: item[1])
    alt = f"Heat map of {heat.title} by layer and matrix. Highest: {heat.show(most)} in layer {layer}, {row}."
    return Figure(heat.name, lambda canvas: canvas.heat_map(heat), alt, heat.caption, wide=True)


def _svg(figure: Figure, width: float) -> Markup:
    return Markup(svg(figure.draw, width, f"{figure.name}-{width:.0f}", figure.alt))


def _printable(value: Any) -> Any:
    return printable(value) if type(value) is str else value


def _packaged(name: str) -> str:
    return files("tailora.report").joinpath(name).read_text(encoding="utf-8")
