"""`tailora extract`: the adapter between a base and a fully tuned model."""

import re
from collections.abc import Mapping
from math import isfinite
from statistics import median
from typing import Annotated, Any

from cyclopts import Parameter
from cyclopts.types import PositiveInt

from tailora.cli.adapters import OutputDir, check_new, facts, show, told
from tailora.cli.flags import Json, flags_of, settings

EXTRACT_FLAGS: Any = flags_of({}, only=["target_modules", "exclude_modules", "modules_to_save"])
NO_EXTRACT_FLAGS = EXTRACT_FLAGS()
NUMBERED = re.compile(r"\.\d+\.")
SHOWN = 12  # lines of what is left over
POOR = 0.5  # relative error in the middle: most of the difference is missing


def extract(
    *,
    model: Annotated[str, Parameter(help="the base: folder or Hub id, or 'demo'")],
    tuned: Annotated[str, Parameter(help="the same model after full fine-tuning: folder or Hub id")],
    output_dir: OutputDir,
    r: Annotated[PositiveInt | None, Parameter(help="highest rank of a layer")] = None,
    energy: Annotated[float | None, Parameter(help="share of the squared singular values to keep, such as .99")] = None,
    json: Json = False,
    flags: Annotated[EXTRACT_FLAGS, Parameter(name="*")] = NO_EXTRACT_FLAGS,
) -> int:
    """Get the adapter between a base and a tuned model, and what it cannot hold."""
    check_new(output_dir)
    config = settings(flags, None, {}, {"model": model}).config.lora()
    from tailora.core.compress import check

    check(r, energy)  # before a model is loaded
    from tailora.model import LoRAModel
    from tailora.train.load import load_base

    base, other = load_base(model, "stored")[0], load_base(tuned, "stored")[0]
    adapted, report = LoRAModel.from_difference(base, other, config, r=r, energy=energy)
    adapted.save_adapter(output_dir)
    left = {name: change if isfinite(change) else None for name, change in report.left_over.items()}
    payload = {"tuned": tuned, **facts(report), "left_over": left}
    lines = [told(report), *poor(report.error), *rest(report.left_over)]
    show(f"extracted from {tuned}", lines, model, output_dir, payload, json)
    return 0


def poor(error: Mapping[str, float]) -> list[str]:
    """What to do where most of the difference is not in the adapter; [] elsewhere."""
    if median(error.values()) < POOR:
        return []
    return [
        "Most of the difference is of a higher rank than the adapter's: raise --r, or --energy .9 for what it takes"
    ]


def rest(left_over: Mapping[str, float]) -> list[str]:
    """Lines about what else differs, the layers of a model taken together; [] when nothing does."""
    alike: dict[str, list[float]] = {}
    for name, change in left_over.items():
        alike.setdefault(NUMBERED.sub(".*.", name), []).append(change)
    if not alike:
        return []
    ranked = sorted(alike.items(), key=lambda each: -max(each[1]))
    lines = [
        f"  {name}{f' ({len(changes)})' if len(changes) > 1 else ''}: changed by up to {max(changes):.2%}"
        for name, changes in ranked[:SHOWN]
    ]
    more = [f"  and {len(ranked) - SHOWN} others; --json has them all"] if len(ranked) > SHOWN else []
    count = len(left_over)
    return [
        f"NOT in the adapter: {count} tensors that differ, too; --modules-to-save takes modules over:",
        *lines,
        *more,
    ]
