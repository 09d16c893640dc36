"""report.html out of report.json: one file that needs no network and shows what a run or a study found.

report.json -> its kind's page (train.py, compare.py, ...) -> figures as SVG (svg.py) -> page.html.j2 -> report.html
"""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from tailora.errors import ConfigError, FormatError, listing, require_packages
from tailora.formats.run_folder import PAGE, REPORT

if TYPE_CHECKING:
    from tailora.report.parts import Page

KINDS = ("plan", "train", "eval", "compare", "search", "learning-rates", "inspect")
NEEDS = ("matplotlib", "jinja2")


def report(folder: Path) -> Path:
    """Writes report.html of the report.json in `folder`, and returns its path.

    Raises ConfigError without the extra `study` or a report.json; FormatError for one that is not tailora's.
    """
    require_packages(*NEEDS, extra="study")
    from tailora.formats.io import write_file  # loads torch
    from tailora.report.page import html

    content = read(folder)
    write_file(folder / PAGE, html(page_of(content, folder / REPORT)).encode())
    return folder / PAGE


def report_if_possible(folder: Path) -> Path | None:
    """`report`, or None where the packages for it are not installed."""
    return report(folder) if all(map(find_spec, NEEDS)) else None


def read(folder: Path) -> dict[str, Any]:
    """What report.json holds."""
    path = folder / REPORT
    if not path.is_file():
        raise ConfigError(f"{folder} holds no {REPORT}; give the folder of a {', '.join(KINDS[:-1])} or {KINDS[-1]}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FormatError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict) or content.get("kind") not in KINDS:
        found = content.get("kind") if isinstance(content, dict) else type(content).__name__
        raise FormatError(f"{path} is of kind {found!r}; known are {', '.join(KINDS)}")
    return content


def page_of(content: dict[str, Any], path: Path) -> "Page":
    """Raises FormatError naming `path` where the content lacks what its page shows."""
    from tailora.report.page import PAGES

    try:
        return PAGES[content["kind"]](content)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, each['loc']))}: {each['msg'].lower()}" for each in error.errors()]
        raise FormatError(f"{path} does not fit its kind, {content['kind']}:\n{listing(problems)}") from None
