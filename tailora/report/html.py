"""A page as one HTML file that needs no network."""

import re
from importlib.resources import files

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from tailora import __version__
from tailora.formats.run_folder import REPORT
from tailora.report.blocks import Figure, HeatMap, Page, Section
from tailora.report.charts import Canvas
from tailora.report.format import printable
from tailora.report.svg import svg

MINUS = re.compile(r"(^|(?<=[ (]))-(?=[\d.])")  # of a number


def html(page: Page) -> str:
    """The whole document."""
    sections = []  # without blocks of None; heat maps become figures
    for section in [page.conclusion, *page.sections] if page.conclusion else page.sections:
        blocks = [_figure_of(block) if isinstance(block, HeatMap) else block for block in section.blocks if block]
        if blocks:
            sections.append(Section(section.title, section.text, blocks))
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    environment.filters["minus"] = lambda text: MINUS.sub("\N{MINUS SIGN}", text)
    return environment.from_string(_packaged("page.html.j2")).render(
        page=page,
        sections=sections,
        block_type=lambda block: type(block).__name__,
        version=__version__,
        report=REPORT,
        style=Markup(_packaged("style.css").strip()),
        svg=lambda figure, width: Markup(svg(figure.draw, width, f"{figure.name}-{width:.0f}", figure.alt)),
    )


def _figure_of(heat: HeatMap) -> Figure:
    (row, layer), most = max(heat.cells.items(), key=lambda item: item[1])
    alt = f"Heat map of {heat.title} by layer and matrix. Highest: {heat.show(most)} in layer {layer}, {row}."

    def draw(canvas: Canvas) -> None:
        canvas.heat_map(heat.cells, heat.top, heat.show, heat.title)

    return Figure(heat.name, draw, alt, heat.caption, wide=True)


def _packaged(name: str) -> str:
    return files("tailora.report").joinpath(name).read_text(encoding="utf-8")
