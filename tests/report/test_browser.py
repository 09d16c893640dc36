"""The pages in a real browser: no errors, every figure drawn, nothing wider than a small screen, nothing fetched."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
from playwright.sync_api import Browser
from report.contents import CONTENTS, FIGURES

pytestmark = pytest.mark.browser
WIDTHS = {"screen": 1100, "small": 400}
SCHEMES: list[Literal["light", "dark"]] = ["light", "dark"]
PAPER = 688  # A4 less the margins, in CSS pixels
TOO_WIDE = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
# a figure is drawn when its marks have a place on the screen, within the figure
DRAWN = """figures => figures.map(figure => {
    const shown = [...figure.querySelectorAll('svg')].filter(svg => svg.getBoundingClientRect().width > 0);
    const [svg] = shown, box = svg.getBoundingClientRect();
    const marks = [...svg.querySelectorAll('path, use, text')].map(mark => mark.getBoundingClientRect());
    const texts = [...svg.querySelectorAll('text')].map(text => text.getBoundingClientRect());
    return {
        shown: shown.length,
        marks: marks.filter(mark => mark.width + mark.height > 0).length,
        outside: texts.filter(each => each.left < box.left - 2 || each.right > box.right + 2).length,
        height: box.height,
        smallest: Math.min(...[...svg.querySelectorAll('text')].map(text =>
            parseFloat(getComputedStyle(text).fontSize) * box.width / svg.viewBox.baseVal.width)),
    };
})"""


@pytest.fixture(scope="module", params=CONTENTS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def page_file(kind: str, written_page: Callable[[str], Path]) -> Path:
    return written_page(kind)


def test_a_page_opens_without_a_message_and_shows_every_figure(browser: Browser, kind: str, page_file: Path) -> None:
    page = browser.new_page()
    messages: list[str] = []
    fetched: list[str] = []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("dialog", lambda dialog: messages.append(f"dialog: {dialog.message}"))
    page.on("request", lambda request: fetched.append(request.url))
    page.goto(page_file.as_uri())
    page.wait_for_load_state("networkidle")
    for scheme, width in itertools.product(SCHEMES, WIDTHS):
        page.set_viewport_size({"width": WIDTHS[width], "height": 800})
        page.emulate_media(color_scheme=scheme)
        figures = page.eval_on_selector_all("figure", DRAWN)
        assert len(figures) == FIGURES[kind]
        for figure in figures:
            assert figure["shown"] == 1, (scheme, width)
            assert figure["marks"] > 5, (scheme, width)
            assert figure["outside"] == 0, (scheme, width)
            assert figure["height"] > 60, (scheme, width)
            assert figure["smallest"] > 9, (scheme, width)  # CSS pixels
        assert page.evaluate(TOO_WIDE) == 0, (scheme, width)
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (background == "rgb(255, 255, 255)") == (scheme == "light"), width
    assert messages == []
    assert [url for url in fetched if not url.startswith("data:")] == [page_file.as_uri()]
    page.close()


@pytest.mark.slow
def test_a_page_prints_light_on_paper_whatever_the_screen(browser: Browser, page_file: Path) -> None:
    page = browser.new_page(color_scheme="dark")
    page.goto(page_file.as_uri())
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(26, 30, 36)"
    assert all(figure["shown"] == 1 for figure in page.eval_on_selector_all("figure", DRAWN))
    page.set_viewport_size({"width": PAPER, "height": 900})
    assert page.evaluate(TOO_WIDE) == 0
    pdf = page.pdf(prefer_css_page_size=True)
    assert pdf.startswith(b"%PDF")
    assert len(pdf) > 20_000
    page.close()
