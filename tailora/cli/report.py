"""`tailora report`: writes the page of a run or a study again."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from tailora.cli.flags import Json
from tailora.cli.main import print_json, stdout
from tailora.errors import ConfigError
from tailora.formats.run_folder import REPORT, RUN
from tailora.report.files import write_page

Folder = Annotated[Path, Parameter(help="output folder of a run, plan, comparison, search, evaluation or inspection")]


def report(folder: Folder, /, *, json: Json = False) -> int:
    """Write the report.html of a run or a study again, from the files in FOLDER."""
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder; give the output folder of a run or a study")
    if (folder / RUN).exists():
        from tailora.report.pages.train import write_train_report  # loads torch

        write_train_report(folder)
    page = write_page(folder)
    if json:
        print_json({"report": str(page), "data": str(folder / REPORT)})
    else:
        stdout().print(str(page), soft_wrap=True)
    return 0
