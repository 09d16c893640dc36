"""A figure as SVG that belongs into a page: colours are the page's variables, text is text in the page's font.

matplotlib knows no variables, so figures are drawn in colours that stand for them and are exchanged afterwards. What
would leak out of the figure or clash with another one is taken out: ids are renamed, style sheets and metadata dropped.
"""

import io
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import matplotlib as mpl
from cycler import cycler

from tailora.report.parts import Drawing

INK, SOFT, GRID, PAPER = "#010101", "#020202", "#030303", "#040404"
SERIES = [f"#0a0a0{i}" for i in range(8)]
HEAT = [f"#0b0b{i:02x}" for i in range(16)]  # from little to much
VARIABLES = {INK: "ink", SOFT: "soft", GRID: "grid", PAPER: "paper"}
VARIABLES |= {colour: f"series-{i}" for i, colour in enumerate(SERIES)}
VARIABLES |= {colour: f"heat-{i}" for i, colour in enumerate(HEAT)}

LOOK: dict[str, Any] = {
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
    "axes.formatter.limits": (-8, 9),  # no power beside the axis
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
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelsize": 11.5,
    "ytick.labelsize": 11.5,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
}
NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
FONT = re.compile(r"font: (?:normal )*((?:bold|[1-9]00) )?([\d.]+)px [^;]*")
COLOUR = re.compile(r"#0[0-9a-f]{5}")
REFERENCE = re.compile(r"#([\w-]+)")


@contextmanager
def look() -> Iterator[None]:
    """How figures look, within the block."""
    with mpl.rc_context({**mpl.rcParamsDefault, **LOOK}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the page's fonts draw the text, not matplotlib's
        yield


def svg(draw: Callable[[float], Drawing], width: float, name: str, alt: str) -> str:
    """An <svg> element. name: unique on the page.    alt: what is read aloud."""
    with look():
        drawing = draw(width)
        written = io.StringIO()
        with mpl.rc_context({"svg.hashsalt": name}):  # ids that are the same every time
            drawing.figure.savefig(written, format="svg", metadata=NO_METADATA)
    root = ElementTree.fromstring(written.getvalue())
    _bare(root)
    _own_ids(root, name, drawing.tips)
    _themed(root)
    del root.attrib["width"], root.attrib["height"], root.attrib["version"]
    root.attrib |= {"role": "img", "aria-label": "".join(letter if letter.isprintable() else " " for letter in alt)}
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=True)


def _bare(root: Element) -> None:
    """Without namespaces, which HTML needs none of, metadata, and style sheets, which would apply to the page."""
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in ("metadata", "style"):
                parent.remove(child)


def _own_ids(root: Element, name: str, tips: Mapping[str, Sequence[str]]) -> None:
    """Ids that something refers to get the figure's name in front; the others go. Tips become titles."""
    used = {found for each in root.iter() for value in each.attrib.values() for found in REFERENCE.findall(value)}
    for element in root.iter():
        identity = element.attrib.pop("id", None)
        if identity is not None and identity in tips:
            _told(element, tips[identity])
        if identity in used:
            element.set("id", f"{name}-{identity}")
        for key in ("href", "clip-path"):
            if key in element.attrib:
                element.set(key, REFERENCE.sub(rf"#{name}-\1", element.attrib[key]))


def _told(group: Element, texts: Sequence[str]) -> None:
    marks = [each for each in group.iter() if each.tag == "use" or (each.tag == "path" and "id" not in each.attrib)]
    for mark, text in zip(marks, texts, strict=True):
        ElementTree.SubElement(mark, "title").text = text


def _themed(root: Element) -> None:
    for element in root.iter():
        style = element.attrib.get("style")
        if style is None:
            continue
        style = FONT.sub(lambda found: f"font-size: {found[2]}px" + ("; font-weight: 600" if found[1] else ""), style)
        element.set("style", COLOUR.sub(lambda found: f"var(--{VARIABLES[found[0]]})", style))
