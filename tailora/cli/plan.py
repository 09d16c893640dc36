"""`tailora plan`: what would be trained, what it takes and how long, before any training."""

import re
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from tailora.cli.flags import FIELDS, ConfigFile, Json, flags_of, merge_settings
from tailora.cli.main import log, note, print_json, stdout
from tailora.errors import ConfigError
from tailora.report.files import write_page_if_possible
from tailora.report.terminal import print_page
from tailora.train.config import TrainConfig

LEFT_OUT = {"output_dir", "resume_from_checkpoint", "samples", "report_to"}
Flags: Any = flags_of(TrainConfig, only=FIELDS.keys() - LEFT_OUT)
UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
SIZE = re.compile(rf"([\d.]+(?:e\d+)?) ?({'|'.join(filter(None, UNITS))})?B?", re.IGNORECASE)

Measure = Annotated[bool, Parameter(negative=(), help="take a few real steps, too, and go by them", show_default=False)]
Room = Annotated[str | None, Parameter(name="--memory", help="memory to fit into, 8GB say; without it, what is free")]
OutputDir = Annotated[Path | None, Parameter(name="--output-dir", help="folder for a report with all numbers")]


def plan(
    *,
    config: ConfigFile = None,
    measure: Measure = False,
    memory: Room = None,
    output_dir: OutputDir = None,
    json: Json = False,
    flags: Flags = None,
) -> int:
    """Show what a run would train, whether it fits, and how long it takes; no weights are read unless --measure.

    The flags are those of `tailora train`. Without --data every example is taken to have --max-length tokens.
    """
    room = None if memory is None else bytes_of(memory)
    chosen = merge_settings(flags, config)
    for text in chosen.notes:
        note(text)
    from tailora.report.pages.plan import plan_page  # torch from here on
    from tailora.study.plan import plan as run

    found = run(chosen.config, measure, memory=room, output_dir=output_dir, log=log)
    if json:
        print_json(found.to_dict())
    else:
        print_page(stdout(), plan_page(found))
    if output_dir is not None:
        log(write_page_if_possible(output_dir))
    return 0


def bytes_of(text: str) -> int:
    """'8GB', '512 MiB', '8e9'. Raises ConfigError."""
    if (found := SIZE.fullmatch(text.strip())) is not None:
        number, unit = found.groups()
        scale = next(size for name, size in UNITS.items() if name.lower() == (unit or "").lower())
        try:
            return int(float(number) * scale)
        except ValueError:
            pass
    raise ConfigError(f"--memory {text}: expected a number and a unit, such as 8GB or 512MiB")
