"""report.json of a training run, put together from what the run left in its folder. Needs no matplotlib."""

import json
import math
from pathlib import Path
from typing import Any

from tailora.errors import FormatError
from tailora.evaluation.statistics import Interval, before_and_after, describe_change
from tailora.formats.run_folder import write_report

RUN, METRICS, SAMPLES, EXAMPLES = "run.json", "metrics.jsonl", "samples.json", "examples.jsonl"


def gather(folder: Path) -> Path:
    """Writes report.json. Raises FormatError where a file of the run is not what it should be."""
    return write_report(folder, "train", gathered(folder))


def gathered(folder: Path) -> dict[str, Any]:
    header = _json(folder / RUN)
    try:
        result, settings = header.pop("result"), header.pop("settings")
    except KeyError as missing:
        raise FormatError(f"{folder / RUN} lacks {missing}; it was not written by a run") from None
    lines = _lines(folder / METRICS)
    rows = _lines(folder / EXAMPLES) if (folder / EXAMPLES).exists() else []
    held = {name: [row[name] for row in rows] for name in ("tokens", "before", "after")} if rows else None
    found = before_and_after(held["before"], held["after"], held["tokens"]) if held else {}
    spread = {f"eval_loss_{name}_95": None if math.isnan(each.low) else each[1:] for name, each in found.items()}
    return {
        "verdict": _said(result, found.get("change"), len(rows)),
        "settings": settings,
        "run": header,
        "steps": [line for line in lines if "loss" in line],
        "evaluations": [{"step": each["step"], "loss": each["eval_loss"]} for each in lines if "eval_loss" in each],
        "samples": _json(folder / SAMPLES) if (folder / SAMPLES).exists() else [],
        "result": None if result is None else {**result, **spread},
        "held_out": held,
    }


def _said(result: Any, change: Interval | None, examples: int) -> str:
    if result is None:
        return "The run has not finished: it was interrupted, failed, or is still going on."
    if change is None and result["eval_loss_after"] is None:
        return "There was no held-out data, so nothing can be said about whether it worked."
    if change is None:  # of a run that left no examples.jsonl
        before, after = result["eval_loss_before"], result["eval_loss_after"]
        return f"Held-out loss went from {before:.3f} to {after:.3f} nats per token; how sure that is was not recorded."
    return describe_change(change, examples)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FormatError(f"{path} is not JSON: {error}") from None


def _lines(path: Path) -> list[dict[str, Any]]:
    """A last line without its end is of a run that is writing, or was cut off."""
    whole = path.read_text(encoding="utf-8").split("\n")[:-1]
    try:
        return [json.loads(line) for line in whole]
    except ValueError as error:
        raise FormatError(f"{path} holds a line that is not JSON: {error}") from None
