"""report.json in the folder of a run or a study: reading it, and writing report.html, which shows it."""

import json
import shlex
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from tailora.errors import ConfigError, FormatError, listing, require_packages
from tailora.formats.io import write_file
from tailora.formats.run_folder import PAGE, REPORT
from tailora.report.blocks import Page
from tailora.study.results import converted, measure_of

KINDS = ("plan", "train", "eval", "compare", "search", "data", "inspect", "rows", "curve")
PACKAGES = ("matplotlib", "jinja2")


def write_page(folder: Path) -> Path:
    """Writes report.html from the report.json in `folder`, and returns its path.

    Raises ConfigError without the extra `study` or a report.json, FormatError if tailora did not write it.
    """
    require_packages(*PACKAGES, extra="study")
    from tailora.report.html import html

    write_file(folder / PAGE, html(read_page(folder)).encode())
    return folder / PAGE


def write_page_if_possible(folder: Path) -> str:
    """Writes report.html if its packages are installed. Returns a line with its path, or how to create it."""
    if all(map(find_spec, PACKAGES)):
        return f"full report: {write_page(folder)}"
    return f"for the full report: pip install 'tailora[study]' && tailora report {shlex.quote(str(folder))}"


def read_page(folder: Path) -> Page:
    """Returns the page of the report.json in `folder`. Raises ConfigError without one, FormatError as `page_of`."""
    path = folder / REPORT
    if not path.is_file():
        raise ConfigError(f"{folder} contains no {REPORT}; use the output of {', '.join(KINDS[:-1])} or {KINDS[-1]}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FormatError(f"{path} is not JSON: {error}") from None
    return page_of(content, path)


def page_of(content: Any, path: Path | str) -> Page:
    """Returns the page for the content of a report.json. Raises FormatError, which names `path`, if it is no report."""
    if not isinstance(content, dict) or content.get("kind") not in KINDS:
        kind = content.get("kind") if isinstance(content, dict) else type(content).__name__
        raise FormatError(f"{path}: expected one of the kinds {', '.join(KINDS)}, got {kind!r}")
    kind = content["kind"]
    if keys := measure_of(str(content.get("loss_unit")), str(content.get("metric", ""))).keys:
        content = converted(content, {new: old for old, new in keys.items()}, 1)
    # Imported late, since most results come with torch: pages/FILE.py has NAME_page, from a result to its page
    make_page = getattr(import_module(f"tailora.report.pages.{kind}"), f"{kind}_page")
    result_type = next(iter(get_type_hints(make_page).values()))  # of the function's one parameter
    try:
        page: Page = make_page(TypeAdapter(result_type).validate_python(content))
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, item['loc']))}: {item['msg'].lower()}" for item in error.errors()]
        raise FormatError(f"{path} is not a valid report of {content['kind']}:\n{listing(problems)}") from None
    return page
