"""One page of each kind, made once for all tests."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from report.contents import CONTENTS

from tailora.report.files import write_page


@pytest.fixture(scope="session")
def written_page(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Kind -> the path of its report.html."""

    @cache
    def write(kind: str) -> Path:
        folder = tmp_path_factory.mktemp(kind)
        (folder / "report.json").write_text(json.dumps(CONTENTS[kind]()))
        return write_page(folder)

    return write
