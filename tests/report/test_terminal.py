"""Pages in the terminal: the numbers of the HTML page, within the terminal's width, in whatever it can show."""

import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from report.contents import CONTENTS
from rich.console import Console

from tailora.report.blocks import Answers, Code, Column, Finding, Page, Paragraph, Section, Table
from tailora.report.charts import running_mean
from tailora.report.files import page_of
from tailora.report.format import signed
from tailora.report.terminal import print_page, print_section

NUMBER = re.compile(r"\d[\d,.]*(?:e-?\d+)?")
TAGS = re.compile(r"<(style|svg).*?</\1>|<[^>]*>", re.DOTALL)
OLDER = Path(__file__).parents[2] / "benchmarks" / "results"


def terminal(width: int, *, is_terminal: bool = True, encoding: str = "utf-8") -> Console:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="backslashreplace", write_through=True)
    return Console(file=file, width=width, force_terminal=is_terminal, color_system=None, highlight=False, emoji=False)


def printed(console: Console) -> str:
    console.file.buffer.seek(0)  # type: ignore[attr-defined]
    return str(console.file.buffer.read().decode(console.encoding))  # type: ignore[attr-defined]


def shown(page: Page, width: int, *, everything: bool = False, encoding: str = "utf-8") -> str:
    console = terminal(width, encoding=encoding)
    print_page(console, page, everything=everything)
    return printed(console)


def section_shown(section: Section, width: int) -> str:
    console = terminal(width)
    print_section(console, section)
    return printed(console)


def numbers(text: str) -> set[str]:
    return {number.rstrip(",.") for number in NUMBER.findall(text.replace("−", "-"))}


@pytest.fixture(scope="module", params=CONTENTS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def page(kind: str) -> Page:
    return page_of(CONTENTS[kind](), "report.json")


def always_shown(page: Page) -> str:
    """All text that a terminal shows, too."""
    texts = [page.title, page.lead, *page.notes]
    texts += [text for number in page.numbers if number.detail == "always" for text in (number.value, number.note)]
    for section in [*page.sections, *([page.conclusion] if page.conclusion else [])]:
        for block in section.blocks:
            if block is None or block.detail != "always":
                continue
            match block:
                case Table():
                    texts += [cell for row in block.rows[: block.first] for cell in row]
                case Answers():
                    texts += [cell for row in block.rows for cell in row]
                case Finding():
                    texts += [block.text, block.code]
                case Paragraph() | Code():
                    texts.append(block.text)
    return "\n".join(texts)


def test_the_terminal_shows_the_numbers_of_the_page(kind: str, page: Page, written_page: Callable[[str], Path]) -> None:
    in_browser = numbers(TAGS.sub(" ", written_page(kind).read_text(encoding="utf-8")))
    in_terminal = numbers(shown(page, 120, everything=True))
    assert in_terminal <= in_browser
    expected = numbers(always_shown(page))
    assert len(expected) > 5
    assert expected <= in_terminal
    assert expected <= numbers(shown(page, 80))


@pytest.mark.parametrize("width", [60, 80, 100])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_nothing_is_wider_than_the_terminal_and_nothing_is_cut_off(page: Page, width: int, encoding: str) -> None:
    text = shown(page, width, everything=True, encoding=encoding)
    copied = {line.strip() for line in _to_copy(page)}
    lines = [line for line in text.splitlines() if line.strip() not in copied]
    if encoding == "utf-8":  # elsewhere escapes, such as \u65e5, take the place of letters
        assert max(map(len, lines)) <= width
    assert "…" not in text
    assert "\x01" not in text
    assert not re.search("[\x00-\x09\x0b-\x1f]", text)


def _to_copy(page: Page) -> list[str]:
    blocks = [block for section in [page.conclusion, *page.sections] if section for block in section.blocks]
    codes = [block.text for block in blocks if isinstance(block, Code)]
    codes += [block.code for block in blocks if isinstance(block, Finding)]
    return [line for code in codes for line in code.splitlines()]


def test_a_pipe_gets_whole_sentences_and_a_terminal_broken_ones() -> None:
    page = page_of(CONTENTS["compare"](), "x")
    pipe = terminal(80, is_terminal=False)
    print_page(pipe, page)
    assert page.sections[0].text in printed(pipe)
    assert page.sections[0].text not in shown(page, 80)


WIDE = Table(
    [Column("name"), Column("loss", numeric=True), Column("95% interval", numeric=True, interval=True)]
    + [Column(f"setting_{index}", priority=index) for index in range(1, 5)],
    [["first", "3.123", "3.000 to 3.200", "alpha", "beta", "gamma", "delta"], ["second", "3.2", "", "", "b", "–", "d"]],
    rest="settings",
)


def test_a_narrow_terminal_has_the_least_important_columns_in_one_and_a_wide_one_keeps_them() -> None:
    text = section_shown(Section("", "", [WIDE]), 100)
    assert "setting_4" in text.splitlines()[2]
    assert "settings" not in text
    text = section_shown(Section("", "", [WIDE]), 60)
    head = text.splitlines()[2]
    assert "setting_1" in head
    assert "setting_4" not in head
    assert "settings" in head
    assert "setting_4 delta" in " ".join(text.split())
    assert "setting_3 –" not in text


def test_an_interval_stands_below_its_value() -> None:
    lines = section_shown(Section("", "", [WIDE]), 100).splitlines()
    value = next(index for index, line in enumerate(lines) if "3.123" in line)
    assert "3.000 to 3.200" in lines[value + 1]
    assert lines[value].index("3.123") + 5 == lines[value + 1].index("3.200") + 5  # aligned to the right


@pytest.mark.parametrize("width", [24, 40, 60, 80])
def test_no_word_of_a_table_is_broken(width: int) -> None:
    first = "incomprehensibilities of self_attention"
    second = "in model.layers.{0-29}.self_attn.q_proj are shown"
    table = Table([Column("first"), Column("second")], [[first, second]])
    text = section_shown(Section("", "", [table]), width)
    for word in ("incomprehensibilities", "self_attention", "shown", "self_attn.", "model."):
        assert word in text, text


def test_a_table_that_fits_by_no_means_is_shown_row_by_row() -> None:
    table = Table([Column(name, numeric=True) for name in "abcde"], [["1" * 9] * 5])
    text = section_shown(Section("", "", [table]), 30)
    assert text.count("1" * 9) == 5
    assert "e: 111111111" in text


@pytest.mark.parametrize("name", ["compare", "search", "tiny_lm_compare", "tiny_lm_search"])
def test_reports_of_earlier_versions_have_pages(name: str) -> None:
    content = json.loads((OLDER / f"{name}.json").read_text())["report"]
    page = page_of(content, name)
    assert page.lead == content["verdict"]
    assert f"{content['base_loss']:.3f}" in shown(page, 80)


def test_answers_stand_next_to_the_reply_in_the_data_and_after_what_the_demo_teaches() -> None:
    content = CONTENTS["train"]()
    text = " ".join(shown(page_of(content, "x"), 300).split())
    assert "prompts. The arrow marks the reply in the data." in text
    assert "→ Hey   you" in shown(page_of(content, "x"), 300)
    assert "small talk" not in text
    content["settings"]["data"] = "demo"
    assert "The demo's data is small talk between strangers" in shown(page_of(content, "x"), 300)
    for sample in content["samples"]:  # of an earlier version
        sample.pop("reference", None)
    assert "→" not in shown(page_of(content, "x"), 300)


@pytest.mark.parametrize(("task_type", "proposes_data"), [(None, True), ("SEQ_2_SEQ_LM", True), ("SEQ_CLS", False)])
def test_an_inspection_proposes_only_data_that_it_can_read(task_type: str | None, proposes_data: bool) -> None:
    content = CONTENTS["inspect"]()
    content |= {
        "config": content["config"] | {"task_type": task_type},
        "held_out": None,
        "forgetting": None,
    }
    notes = " ".join(page_of(content, "x").notes)
    assert ("--data HELD_OUT" in notes) == proposes_data
    assert ("--data" in " ".join(page_of(content | {"model": None}, "x").notes)) == proposes_data
    text = shown(page_of(content | {"advice": []}, "x"), 300)
    of_which = "None of the applicable rules" if proposes_data else "No rule"
    assert text.count(f"{of_which} advises a change.") == 2  # on top, and as the advice


def test_a_number_that_would_be_rounded_to_zero_has_an_exponent_and_no_other() -> None:
    texts = [signed(number) for number in (0.0007, -0.0006, 0.0004, -2.1e-5, 0.0)]
    assert texts == ["+0.001", "-0.001", "+4.0e-04", "-2.1e-05", "+0.000"]


def test_changes_alone_have_a_sign_and_improvements_are_counted() -> None:
    text = shown(page_of(CONTENTS["eval"](), "x"), 200)
    assert all(part in text for part in (" 4.470 ", " 3.660 ", " -0.810 ", " +0.200 "))
    assert "+3.660" not in text
    content = CONTENTS["train"]()
    content["held_out"] = {"tokens": [2, 2, 4, 0], "before": [4.0, 4.0, 4.0, 0.0], "after": [2.0, 4.0, 3.0, 0.0]}
    sections = {section.title: section for section in page_of(content, "x").sections}
    assert sections["Loss"].text.endswith(" 2 of 3 held-out examples have a lower loss after training.")


def test_a_running_mean_is_centred() -> None:
    means = running_mean(np.arange(60.0) ** 2)  # over three steps to either side
    assert means[10] == np.mean(np.arange(7, 14) ** 2)
    assert (means[0], means[-1]) == (np.mean(np.arange(4) ** 2), np.mean(np.arange(56, 60) ** 2))
    assert running_mean(np.arange(8.0) ** 2).tolist() == (np.arange(8.0) ** 2).tolist()  # short runs as they are
