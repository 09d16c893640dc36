"""The site of docs/ (mkdocs.yml): no warning, every command and public name, no network."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import tailora
from tailora import errors
from tailora.cli.main import COMMANDS, app

if TYPE_CHECKING:
    from playwright.sync_api import Browser

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.pages


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site. A broken link or anchor, and a page that is not in the navigation, end the build."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return folder


@pytest.mark.parametrize("name", COMMANDS)
def test_the_page_of_a_command_names_all_its_flags_and_says_what_they_mean(site: Path, name: str) -> None:
    page = (site / "commands" / f"{name}.html").read_text()
    items = re.findall(r"<li><code>([^<]*)</code>(.*?)</li>", page, re.DOTALL)
    flags = {flag.strip(" ,") for names, _ in items for flag in re.findall(r"--[\w-]+", names)}
    arguments = app([name])[name].assemble_argument_collection()
    assert flags >= {argument.name for argument in arguments if argument.show and argument.name.startswith("--")}
    assert not [names for names, meaning in items if not re.match(r": \w", meaning)]


def test_every_public_name_has_its_docstring_on_the_page(site: Path) -> None:
    page = (site / "api.html").read_text()
    for name in tailora.__all__:
        assert f'id="tailora.{name}"' in page or name.startswith("_"), name


def test_every_error_is_on_the_page_with_its_exit_code(site: Path) -> None:
    rows = re.findall(r"<tr>(.*?)</tr>", (site / "errors.html").read_text().partition("</table>")[0], re.DOTALL)
    shown = {tuple(re.findall(r"<td>(?:<code>)?(.*?)(?:</code>)?</td>", row))[:3:2] for row in rows[1:]}
    classes = [value for value in vars(errors).values() if isinstance(value, type)]
    made = {(error.__name__, str(error.exit_code)) for error in classes if issubclass(error, errors.TailoraError)}
    assert shown == made - {("TailoraError", "1")}


def test_llms_txt_lists_the_pages_with_a_sentence(site: Path) -> None:
    lines = re.findall(r"^- \[(.+)\]\((.+?)\): (.+)$", (site / "llms.txt").read_text(), re.MULTILINE)
    pages = {path.relative_to(site).as_posix() for path in site.rglob("*.html")} - {"404.html"}
    assert {page for _, page, _ in lines} == {page for page in pages if not page.startswith("source/")} | {
        "source/examples.html"
    }


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    for path in site.rglob("*.html"):
        text = path.read_text()
        loaded = re.findall(r'<(?:script|link|img|iframe)\b[^>]*?(?:src|href)="((?:https?:)?//[^"]+)"', text)
        assert not loaded, (path.name, loaded)
    for path in site.rglob("*.css"):
        assert not re.findall(r"url\([\"']?https?:", path.read_text()), path.name


def test_the_search_knows_the_flags(site: Path) -> None:
    index = json.loads((site / "search" / "search_index.json").read_text())["docs"]
    assert any(
        entry["location"].startswith("commands/train.html") and "--lora-dropout" in entry["text"] for entry in index
    )
    assert not any(entry["location"].startswith("source/") for entry in index)


@pytest.mark.browser
def test_search_works_in_a_page_that_is_opened_as_a_file(site: Path, browser: "Browser") -> None:
    page = browser.new_page(viewport={"width": 390, "height": 844})
    requested: list[str] = []
    page.on("request", lambda request: requested.append(request.url))
    page.goto((site / "commands" / "train.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.locator("label[for=__search]").first.click()
    page.get_by_role("textbox", name="Search").press_sequentially("adapter_rows")
    page.locator(".md-search-result__item a").first.click()
    page.wait_for_url("**/*.html*")
    assert "adapter_rows" in page.locator("article").inner_text()
    assert not [address for address in requested if address.startswith("http")]
    page.close()
