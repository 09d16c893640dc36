"""A page as one HTML file that needs no network.

Figures are matplotlib's SVG, fitted into the page: its colours are the page's variables and its text is real text.
matplotlib knows no CSS variables, so figures are drawn in placeholder colours, which are replaced afterwards. Ids are
renamed so that two figures of a page do not clash; style sheets and metadata, which would affect the page, are removed.
"""

import io
import re
import warnings
from collections.abc import Callable
from importlib.resources import files
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import matplotlib as mpl
from cycler import cycler
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from tailora import __version__
from tailora.formats.run_folder import REPORT
from tailora.report.blocks import Page, Section
from tailora.report.charts import GRID, INK, SERIES, SOFT, VARIABLES, Canvas
from tailora.report.format import printable

MINUS = re.compile(r"(^|(?<=[ (]))-(?=[\d.])")  # of a number
STYLE: dict[str, Any] = {
    "figure.dpi": 72,  # a unit is a CSS pixel
    "figure.facecolor": "none",
    "figure.constrained_layout.use": True,
    "axes.facecolor": "none",
    "axes.edgecolor": SOFT,
    "axes.labelcolor": SOFT,
    "axes.labelsize": 12,
    "axes.titlesize": 12.5,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": cycler(color=SERIES),
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-8, 9),  # no power of ten next to the axis
    "font.size": 12,
    "grid.color": GRID,
    "grid.linewidth": 1,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "legend.handlelength": 1.4,
    "legend.columnspacing": 1.2,
    "lines.linewidth": 2,
    "lines.solid_capstyle": "round",
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    "text.color": INK,
    "text.parse_math": False,  # names are untrusted, and a $ is a $
}
for axis in "xy":
    STYLE |= {f"{axis}tick.color": SOFT, f"{axis}tick.labelsize": 11.5}
    STYLE |= {f"{axis}tick.major.size": 0, f"{axis}tick.minor.size": 0}
FONT = re.compile(r"font: (?:normal )*((?:bold|[1-9]00) )?([\d.]+)px [^;]*")
COLOUR = re.compile(r"#0[0-9a-f]{5}")
REFERENCE = re.compile(r"#([\w-]+)")


def html(page: Page) -> str:
    sections = []  # without blocks of None
    for section in [page.conclusion, *page.sections] if page.conclusion else page.sections:
        blocks = [block for block in section.blocks if block]
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


def _packaged(name: str) -> str:
    return files("tailora.report").joinpath(name).read_text(encoding="utf-8")


# ---- Figures


def svg(draw: Callable[[Canvas], None], width: float, name: str, alt: str) -> str:
    """Returns an <svg> element, whose name is unique on the page. alt: text for screen readers."""
    same_ids = {"svg.hashsalt": name}  # every time
    with mpl.rc_context({**mpl.rcParamsDefault, **STYLE, **same_ids}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the page's fonts draw the text, not matplotlib's
        canvas = Canvas(width)
        draw(canvas)
        canvas.add_legend()
        file = io.StringIO()
        canvas.figure.savefig(file, format="svg")
    root = ElementTree.fromstring(file.getvalue())
    _remove_namespaces_and_styles(root)
    _rename_ids(root, name)
    _use_variables(root)
    del root.attrib["width"], root.attrib["height"], root.attrib["version"]
    root.attrib |= {"role": "img", "aria-label": "".join(letter if letter.isprintable() else " " for letter in alt)}
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=True)


def _remove_namespaces_and_styles(root: Element) -> None:
    """HTML needs no namespaces and no metadata, and a style sheet would apply to the entire page."""
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in ("metadata", "style"):
                parent.remove(child)


def _rename_ids(root: Element, name: str) -> None:
    """Prefixes ids that are referred to with the figure's name; removes the others."""
    used = {id_ for element in root.iter() for value in element.attrib.values() for id_ in REFERENCE.findall(value)}
    for element in root.iter():
        id_ = element.attrib.pop("id", None)
        if id_ in used:
            element.set("id", f"{name}-{id_}")
        for key in ("href", "clip-path"):
            if key in element.attrib:
                element.set(key, REFERENCE.sub(rf"#{name}-\1", element.attrib[key]))


def _use_variables(root: Element) -> None:
    """Replaces the placeholder colours with the page's variables, and the font with the page's."""
    for element in root.iter():
        if (css := element.attrib.get("style")) is not None:
            css = FONT.sub(lambda font: f"font-size: {font[2]}px" + ("; font-weight: 600" if font[1] else ""), css)
            element.set("style", COLOUR.sub(lambda colour: f"var(--{VARIABLES[colour[0]]})", css))
