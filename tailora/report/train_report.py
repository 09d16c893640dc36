"""The report of a training run, from the files that the run left in its folder. Needs no matplotlib."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tailora.errors import FormatError
from tailora.evaluation.generate import Answer
from tailora.evaluation.statistics import Interval, before_and_after, describe_change
from tailora.formats.run_folder import write_report

RUN, METRICS, SAMPLES, EXAMPLES = "run.json", "metrics.jsonl", "samples.json", "examples.jsonl"


@dataclass(frozen=True)
class Step:
    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens_per_second: float
    memory_bytes: float


@dataclass(frozen=True)
class Evaluation:
    step: int
    loss: float


@dataclass(frozen=True)
class HeldOut:
    """Of each held-out example: its tokens that count, and their loss in nats before and after training."""

    tokens: list[int]
    before: list[float]
    after: list[float]


@dataclass(frozen=True)
class Result:
    """The numbers of a finished run (`train.events.TrainResult`), with 95% intervals."""

    steps: int
    train_tokens: int
    tokens_per_second: float
    eval_loss_before: float | None
    eval_loss_after: float | None
    best_step: int
    trainable_parameters: int
    total_parameters: int
    peak_memory_bytes: int
    seconds: float
    eval_loss_before_95: tuple[float, float] | None = None
    eval_loss_after_95: tuple[float, float] | None = None


@dataclass(frozen=True)
class TrainReport:
    """What report.json of a run holds. run: run.json without settings and result."""

    settings: dict[str, Any]
    run: dict[str, Any]
    steps: list[Step]
    evaluations: list[Evaluation]
    samples: list[Answer]
    result: Result | None  # None where the run was interrupted or diverged
    held_out: HeldOut | None
    verdict: str


def write_train_report(folder: Path) -> dict[str, Any]:
    """Writes report.json and returns its content. Raises FormatError where a file of the run cannot be read."""
    content = train_report(folder)
    write_report(folder, "train", content)
    return content


def train_report(folder: Path) -> dict[str, Any]:
    """The content of report.json."""
    header = _read_json(folder / RUN)
    try:
        result, settings = header.pop("result"), header.pop("settings")
    except KeyError as missing:
        raise FormatError(f"{folder / RUN} lacks {missing}; it was not written by a run") from None
    metrics = _read_lines(folder / METRICS)
    examples = _read_lines(folder / EXAMPLES) if (folder / EXAMPLES).exists() else []
    held_out = {name: [row[name] for row in examples] for name in ("tokens", "before", "after")} if examples else None
    losses = before_and_after(held_out["before"], held_out["after"], held_out["tokens"]) if held_out else {}
    return {
        "verdict": _verdict(result, losses.get("change"), len(examples)),
        "settings": settings,
        "run": header,
        "steps": [line for line in metrics if "loss" in line],
        "evaluations": [{"step": line["step"], "loss": line["eval_loss"]} for line in metrics if "eval_loss" in line],
        "samples": _read_json(folder / SAMPLES) if (folder / SAMPLES).exists() else [],
        "result": None if result is None else {**result, **_with_intervals(losses)},
        "held_out": held_out,
    }


def _with_intervals(losses: dict[str, Interval]) -> dict[str, Any]:
    """The change of the held-out loss, and the 95% intervals of the losses before and after and of the change."""
    intervals = {
        f"eval_loss_{name}_95": None if math.isnan(loss.low) else (loss.low, loss.high) for name, loss in losses.items()
    }
    return {"eval_loss_change": losses["change"].value, **intervals} if losses else {}


def _verdict(result: Any, change: Interval | None, examples: int) -> str:
    if result is None:
        return "The run has not finished: it was interrupted, failed, or is still going on."
    if change is not None:
        return describe_change(change, examples)
    before, after = result["eval_loss_before"], result["eval_loss_after"]
    if after is None:
        return "There was no held-out data, so nothing can be said about whether it worked: give --eval-data FILE."
    return f"Held-out loss went from {before:.3f} to {after:.3f} nats per token; its interval was not recorded."


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FormatError(f"{path} is not JSON: {error}") from None


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Without a last line that has no end: the run is still writing it, or was cut off."""
    whole = path.read_text(encoding="utf-8").split("\n")[:-1]
    try:
        return [json.loads(line) for line in whole]
    except ValueError as error:
        raise FormatError(f"{path} holds a line that is not JSON: {error}") from None
