"""A page as HTML."""

import re
from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from tailora import __version__
from tailora.report.compare import compare_page
from tailora.report.eval import eval_page
from tailora.report.inspect import inspect_page
from tailora.report.parts import Page, Picture
from tailora.report.plan import plan_page
from tailora.report.rates import rates_page
from tailora.report.search import search_page
from tailora.report.svg import svg
from tailora.report.train import train_page

UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
PAGES: Mapping[str, Callable[[dict[str, Any]], Page]] = {
    "compare": compare_page,
    "eval": eval_page,
    "inspect": inspect_page,
    "learning-rates": rates_page,
    "plan": plan_page,
    "search": search_page,
    "train": train_page,
}


def html(page: Page) -> str:
    """The whole document."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, finalize=_printable)
    return environment.from_string(_packaged("page.html.j2")).render(
        page=page, version=__version__, style=Markup(_packaged("style.css").strip()), svg=_drawn
    )


def _drawn(picture: Picture, width: float) -> Markup:
    name = f"{picture.name}-{width:.0f}"
    return Markup(svg(picture.draw, width, name, picture.alt))


def _printable(value: Any) -> Any:
    """Text without what no document may hold: surrogates and control characters."""
    return UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", value) if type(value) is str else value


def _packaged(name: str) -> str:
    return files("tailora.report").joinpath(name).read_text(encoding="utf-8")
