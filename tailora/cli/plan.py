"""`tailora plan`: estimates the memory of a run and shows what it would train."""

import re
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from cyclopts.types import PositiveInt

from tailora.cli.flags import SWITCH, ConfigFile, Json, merge_settings, train_flags
from tailora.cli.main import log, print_json, stdout
from tailora.cli.models import DEVICE_NAME, check_sources, fetch_sources
from tailora.data.readers import source_names
from tailora.errors import GATE_NOT_MET, ConfigError
from tailora.formats.run_folder import check_report_kind
from tailora.report.files import write_page_if_possible
from tailora.report.terminal import print_page
from tailora.study.cards import find_cards

EXCLUDED = {"output_dir", "resume_from_checkpoint", "samples", "report_to"}
Flags: Any = train_flags(without=EXCLUDED)
UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
SIZE = re.compile(rf"([\d.]+(?:e\d+)?) ?({'|'.join(filter(None, UNITS))})?B?", re.IGNORECASE)

Measure = Annotated[bool, SWITCH, Parameter(help="also run and measure a few steps")]
Memory = Annotated[str | None, Parameter(help="memory limit, such as 8GB; default: the free memory")]
Nproc = Annotated[
    PositiveInt, Parameter(help="number of training processes, with one device each; memory and time are per process")
]
OutputDir = Annotated[Path | None, Parameter(help="folder for a report with all numbers")]


def plan(
    *,
    config: ConfigFile = None,
    measure: Measure = False,
    memory: Memory = None,
    nproc: Nproc = 1,
    output_dir: OutputDir = None,
    json: Json = False,
    flags: Flags = None,
) -> int:
    """Estimate the memory of a run, and show what would be trained.

    Accepts the flags of `train`. Weights are loaded only with --measure, which also shows the time. Without --data, all
    examples are assumed to have --max-length tokens. The exit code is 4 if the run does not fit. --device also accepts
    a GPU that this machine lacks, such as "H100 80GB".
    """
    check_report_kind(output_dir, "plan")
    available = None if memory is None else bytes_of(memory)
    settings = merge_settings(flags, config)
    with_data = "data" in settings.model_fields_set
    sources = (*source_names(settings.data), settings.eval_data) if with_data else ()
    check_sources(model=settings.model, data=sources, adapter=settings.adapter)
    if DEVICE_NAME.fullmatch(settings.device) is None:
        find_cards(settings.device)
    fetch_sources(settings.model)
    log("loading the model and data")
    from tailora.report.pages.plan import plan_page
    from tailora.study.plan import plan as run

    report = run(settings, measure, full=True, memory=available, nproc=nproc, output_dir=output_dir, log=log)
    if json:
        print_json(report.to_dict())
    else:
        print_page(stdout(), plan_page(report))
    if output_dir is not None:
        log(write_page_if_possible(output_dir))
    return 0 if report.fits else GATE_NOT_MET


def bytes_of(text: str) -> int:
    """Returns the bytes of a size such as 8GB, 512 MiB or 8e9. Raises ConfigError."""
    if (match := SIZE.fullmatch(text.strip())) is not None:
        number, unit = match.groups()
        scale = next(size for name, size in UNITS.items() if name.lower() == (unit or "").lower())
        try:
            return int(float(number) * scale)
        except ValueError:
            pass
    raise ConfigError(f"--memory {text}: expected a number with a unit, such as 8GB or 512MiB")
