"""Chromium as it is installed on this machine, without a window."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Browser

NAMES = ("chromium", "chromium-browser", "google-chrome")


def program() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def launched() -> Iterator["Browser"]:
    """Raises SystemExit if there is none."""
    from playwright.sync_api import sync_playwright

    if program() is None:
        raise SystemExit("pages need Chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        sandbox = [] if os.geteuid() else ["--no-sandbox"]  # Chromium refuses root with one
        browser = playwright.chromium.launch(executable_path=program(), args=sandbox)
        yield browser
        browser.close()
