"""Every paper that the package cites has a test in this folder that cites it, too."""

import re
from pathlib import Path

import tailora

CITED = re.compile(r"arXiv:((?:[a-z-]+/)?\d[\d.]*\d)")


def papers(folder: Path) -> dict[str, list[str]]:
    """Number -> files that cite it."""
    found: dict[str, list[str]] = {}
    for file in sorted(folder.rglob("*.py")):
        for number in CITED.findall(file.read_text()):
            found.setdefault(number, []).append(file.name)
    return found


def test_every_paper_that_is_cited_is_tested() -> None:
    cited = papers(Path(tailora.__file__).parent)
    assert len(cited) > 20
    missing = {number: files for number, files in cited.items() if number not in papers(Path(__file__).parent)}
    assert not missing, f"no test in tests/papers cites {missing}"
