"""Runs and studies as records for a list, and the difference of two runs on what both were evaluated on.

`tailora runs` reads only summary.json of each folder, which `write_report` writes, and run.json where a run has none.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import TypeAdapter, ValidationError

from tailora.errors import ConfigError, FormatError
from tailora.formats.io import read_json_object, read_own_json
from tailora.formats.run_folder import RUN, SAMPLES, SUMMARY
from tailora.report.format import setting
from tailora.train.run_log import EXAMPLES, LOCK, METRICS
from tailora.train.significance import Change, change_of

DEPTH = 3  # of folders that are searched
NOT_SHOWN = frozenset({"output_dir", "resume_from_checkpoint", "model", "data"})


@dataclass(frozen=True)
class RunRecord:
    """One line of `tailora runs`."""

    name: str  # path below the folder that is listed
    kind: str  # of report.json; "train" for a run
    date: str
    state: str  # finished, running, interrupted, diverged or damaged
    settings: dict[str, Any] = field(default_factory=dict)
    verdict: str = ""
    metrics: dict[str, Any] = field(default_factory=dict)  # `MetricChange.to_dict` by name
    eval_loss_before: float | None = None
    eval_loss_after: float | None = None
    seconds: float | None = None

    @property
    def model(self) -> str:
        return str(self.settings.get("model", "")).rstrip("/").rpartition("/")[2]

    @property
    def data(self) -> str:
        names = self.settings.get("data", [])
        return ", ".join(str(name).rpartition("/")[2] for name in ([names] if isinstance(names, str) else names))

    @property
    def result(self) -> str:
        """The first metric or the loss, before and after."""
        for name, metric in self.metrics.items():
            return f"{name} {metric['before']:.3g} → {metric['after']:.3g}"
        if self.eval_loss_before is None or self.eval_loss_after is None:
            return ""
        return f"loss {self.eval_loss_before:.3f} → {self.eval_loss_after:.3f}"


def records_in(folder: Path) -> list[RunRecord]:
    """Returns the runs and studies in a folder and its subfolders, the newest first. Raises ConfigError."""
    if not folder.is_dir():
        raise ConfigError(f"no such folder: {folder}; pass the folder that contains your runs, such as outputs")
    records = [record_of(path, str(path.relative_to(folder))) for path in _run_folders(folder)]
    return sorted(records, key=lambda record: record.date, reverse=True)


def _run_folders(folder: Path) -> Iterator[Path]:
    """Yields the folders of runs and studies; a study's own runs are left out."""
    for path, folders, files in os.walk(folder):
        if {RUN, SUMMARY} & {*files}:
            yield Path(path)
            folders.clear()
        elif len(Path(path).relative_to(folder).parts) >= DEPTH:
            folders.clear()


def record_of(path: Path, name: str) -> RunRecord:
    """Returns the record of a run or a study; of a damaged file, only its state."""
    try:
        if (path / SUMMARY).exists():
            content = read_json_object(path / SUMMARY)
            return TypeAdapter(RunRecord).validate_python({**content, "name": name})
        run = read_json_object(path / RUN)
    except (FormatError, ValidationError):
        return RunRecord(name, "", "", "damaged")
    date = datetime.fromtimestamp((path / RUN).stat().st_mtime).isoformat(" ", "minutes")
    result, settings = run.get("result") or {}, run.get("settings") or {}
    state = "diverged" if run.get("diverged") else "finished" if result else "interrupted"
    return RunRecord(
        name,
        "train",
        date,
        "running" if _is_locked(path) else state,
        settings,
        eval_loss_before=result.get("eval_loss_before"),
        eval_loss_after=result.get("eval_loss_after"),
        seconds=result.get("total_seconds"),
    )


def _is_locked(path: Path) -> bool:
    if not os.access(path / LOCK, os.W_OK):
        return False
    try:
        with FileLock(path / LOCK, timeout=0):
            return False
    except Timeout:
        return True


def different_settings(records: Sequence[RunRecord]) -> list[dict[str, str]]:
    """Returns of each run the settings that are not the same in all, as text."""
    names = {name for record in records for name in record.settings} - NOT_SHOWN
    different = [n for n in sorted(names) if len({json.dumps(r.settings.get(n)) for r in records if r.settings}) > 1]
    return [{n: setting(record.settings.get(n)) for n in different if n in record.settings} for record in records]


# ---- Two runs


@dataclass(frozen=True)
class FlippedAnswer:
    """A prompt whose answers got different scores by the first metric."""

    prompt: str
    first: str
    second: str
    first_score: float
    second_score: float


@dataclass(frozen=True)
class RunDifference:
    """The second run compared with the first, on the held-out examples and prompts that both were evaluated on."""

    loss: Change | None  # None if they share no examples
    metrics: dict[str, Change]
    flipped: list[FlippedAnswer]
    curves: list[dict[int, float]]  # of each run: step -> held-out loss


def compare_runs(first: Path, second: Path) -> RunDifference:
    """Raises FormatError for files that cannot be read."""
    folders = (first, second)
    return RunDifference(
        _loss_difference([{row["text"]: row for row in read_lines(folder / EXAMPLES)} for folder in folders]),
        *_metric_differences([_scored_answers(folder) for folder in folders]),
        [{r["step"]: r["eval_loss"] for r in read_lines(folder / METRICS) if "eval_loss" in r} for folder in folders],
    )


def _loss_difference(examples: Sequence[Mapping[str, Mapping[str, Any]]]) -> Change | None:
    """examples: of each run, the lines of examples.jsonl by their text."""
    first, second = examples
    pairs = [(row, second[text]) for text, row in first.items() if text in second]
    pairs = [(a, b) for a, b in pairs if a["tokens"] == b["tokens"] and isinstance(a["after"], float)]
    if not pairs:
        return None
    before, after = ([row["after"] for row in side] for side in zip(*pairs, strict=True))
    return change_of(before, after, [row["tokens"] for row, _ in pairs], higher_is_better=False)


def _metric_differences(
    answers: Sequence[Mapping[Any, Mapping[str, Any]]],
) -> tuple[dict[str, Change], list[FlippedAnswer]]:
    """answers: of each run, those in samples.json that have scores, by their prompt and reference."""
    first, second = answers
    pairs = [(answer, second[key]) for key, answer in first.items() if key in second]
    names = [n for n in (pairs[0][0]["after"]["scores"] if pairs else {}) if n in pairs[0][1]["after"]["scores"]]
    changes, flipped = dict[str, Change](), list[FlippedAnswer]()
    for name in names:
        scores = [tuple(answer["after"]["scores"][name] for answer in pair) for pair in pairs]
        known = [pair for pair in scores if None not in pair]
        if known:
            before, after = zip(*known, strict=True)
            changes[name] = change_of(before, after, missing=len(scores) - len(known))
        if name == names[0]:
            flipped = [
                FlippedAnswer(a["prompt"], a["tuned"], b["tuned"], *of_pair)
                for (a, b), of_pair in zip(pairs, scores, strict=True)
                if None not in of_pair and of_pair[0] != of_pair[1]
            ]
    return changes, flipped


def _scored_answers(folder: Path) -> dict[Any, dict[str, Any]]:
    path = folder / SAMPLES
    content = read_own_json(path, list[dict[str, Any]], "train again") if path.exists() else []
    return {(a["prompt"], a["reference"]): a for a in content if (a.get("after") or {}).get("scores")}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a log; [] without it. Raises FormatError."""
    if not path.exists():
        return []
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    except ValueError as error:
        raise FormatError(f"a line of {path} is not JSON: {error}; delete the file, or train again") from None
