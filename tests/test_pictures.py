"""The pictures of README.md and docs/: small, whole without a network, and what the stored results give."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks.site import pictures

ROOT = Path(__file__).parent.parent
PICTURES = sorted((ROOT / "docs" / "pictures").iterdir())
DOCUMENTS = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
LARGEST, ALL = 300_000, 3_000_000  # bytes


def test_they_are_small() -> None:
    sizes = {path.name: path.stat().st_size for path in PICTURES}
    assert {name: size for name, size in sizes.items() if size >= LARGEST} == {}
    assert sum(sizes.values()) < ALL


def test_each_is_shown_light_and_dark() -> None:
    shown = set()
    for document in DOCUMENTS:
        for light, dark in re.findall(r'srcset="(\S+)">\s*<img src="(\S+)"', document.read_text()):
            shown |= {(document.parent / light).resolve(), (document.parent / dark).resolve()}
            assert light.replace("-dark.", "-light.") == dark
    assert shown == set(PICTURES)
    assert {path.stem.rpartition("-")[0] for path in PICTURES} == {*pictures.TERMINALS, *pictures.PAGES}


@pytest.mark.parametrize("path", [path for path in PICTURES if path.suffix == ".svg"], ids=lambda path: path.name)
def test_a_terminal_loads_nothing(path: Path) -> None:
    text = path.read_text()
    assert not re.findall(r"@import|@font-face|url\((?!#)[^)]*\)", text)
    for element in ElementTree.fromstring(text).iter():
        assert not {name for name in element.attrib if name.endswith(("href", "src"))}


@pytest.mark.slow
def test_the_terminal_of_compare_shows_the_stored_results() -> None:
    line, printed = pictures.compare(None)
    for scheme in pictures.SCHEMES:
        stored = (pictures.FOLDER / f"compare-{scheme}.svg").read_text()
        assert stored == pictures.terminal_svg(line, printed, scheme, "compare"), (
            "run benchmarks/site/pictures.py compare"
        )
