"""A page of each kind: well-formed, whole, with nothing from outside, and taking no text as HTML."""

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from report.contents import CONTENTS, EVIL, FIGURES

from tailora.errors import ConfigError, FormatError
from tailora.formats.run_folder import write_report
from tailora.report.files import write_page

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Outline(HTMLParser):
    """Tags that open and close in order, attributes, and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def made(content: dict[str, Any], folder: Path) -> str:
    (folder / "report.json").write_text(json.dumps(content))
    return write_page(folder).read_text(encoding="utf-8")


@pytest.fixture(scope="module", params=CONTENTS)
def page(request: pytest.FixtureRequest, written_page: Callable[[str], Path]) -> tuple[str, str]:
    """Kind and HTML."""
    return request.param, written_page(request.param).read_text(encoding="utf-8")


def test_every_tag_closes_and_every_figure_is_there(page: tuple[str, str]) -> None:
    kind, text = page
    outline = Outline(text)
    assert outline.open == []
    assert len(outline.all("figure")) == FIGURES[kind]
    assert len(outline.all("figcaption")) == FIGURES[kind]
    drawn = outline.all("svg")
    assert len(drawn) == FIGURES[kind] + sum(each.get("class") == "wide" for each in outline.all("figure"))
    assert all(each["aria-label"] and each["viewbox"] for each in drawn)


def test_nothing_comes_from_outside(page: tuple[str, str]) -> None:
    _, text = page
    outline = Outline(text)
    assert "http:" not in text
    assert "https:" not in text
    assert "@import" not in text
    assert not outline.all("script")
    for _, attributes in outline.tags:
        for name in ("src", "href", "clip-path"):
            assert re.fullmatch(r"#[\w-]+|url\(#[\w-]+\)|data:,", attributes.get(name) or "#none")
    ids = [each["id"] for _, each in outline.tags if "id" in each]
    assert len(ids) == len(set(ids))
    targets = set(re.findall(r'(?:href="#|url\(#)([\w-]+)', text))
    assert targets <= set(ids)


def test_colours_are_the_page_s_variables(page: tuple[str, str]) -> None:
    kind, text = page
    body = text[text.index("<body>") :]
    assert ("var(--soft)" in body) == (FIGURES[kind] > 0)
    assert ("var(--series-0)" in body) == (FIGURES[kind] > 0)
    assert not re.search(r"#[0-9a-f]{6}\b", body)
    for name in set(re.findall(r"var\((--[\w-]+)\)", body)):
        assert text.count(f"{name}:") == 2, f"{name} needs a light and a dark colour"


def test_text_is_never_taken_as_html_or_as_mathematics(page: tuple[str, str]) -> None:
    _, text = page
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; $x^2$ 日本" in text
    assert "$x^2$" in Outline(text).text


REPEATED = ("train", "inspect")  # lines, dots, and tables


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in REPEATED else pytest.mark.exhaustive) for kind in CONTENTS]
)
def test_the_same_numbers_give_the_same_page(kind: str, written_page: Callable[[str], Path], tmp_path: Path) -> None:
    assert made(CONTENTS[kind](), tmp_path) == written_page(kind).read_text(encoding="utf-8")


def test_the_command_that_trains_has_the_processes_of_the_study(tmp_path: Path) -> None:
    content = CONTENTS["search"]()
    content["settings"]["launch"] = {"nproc_per_node": 2}
    text = Outline(made(content, tmp_path)).text
    assert "tailora train --nproc-per-node 2 --" in text
    assert "tailora train --config" not in text


def test_a_folder_without_a_report_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"contains no report\.json; use the output of plan, train"):
        write_page(tmp_path)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "is not JSON"),
        ("[]", "expected one of the kinds plan, .* got 'list'"),
        ('{"kind": "recipe"}', "expected one of the kinds plan, .* got 'recipe'"),
        ('{"kind": "compare", "arms": [{"name": 3}]}', r"(?s)not a valid report of compare:.*arms\.0\.name.*verdict"),
    ],
)
def test_what_is_no_report_is_refused_and_nothing_written(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(FormatError, match=told):
        write_page(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_an_unfinished_run_has_a_page(tmp_path: Path) -> None:
    unfinished = {**CONTENTS["train"](), "result": None, "held_out": None, "samples": [], "verdict": "not finished"}
    text = made(unfinished, tmp_path)
    assert "not finished" in text
    assert "Answers" not in Outline(text).text
    assert EVIL not in text


def test_the_answer_within_a_longer_conversation_says_how_much_precedes_its_prompt(
    written_page: Callable[[str], Path],
) -> None:
    text = Outline(written_page("train").read_text(encoding="utf-8")).text
    assert "[after 2 earlier messages] Hi!" in text
    assert text.count("earlier message") == 1  # the other prompt has none before it


def test_only_reports_of_runs_that_may_diverge_hold_nan(tmp_path: Path) -> None:
    write_report(tmp_path, "train", {"steps": [{"loss": float("nan")}]})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_report(tmp_path, "eval", {"seconds": float("inf")}, allow_nan=False)
    assert "NaN" in (tmp_path / "report.json").read_text()  # the earlier report is still there
