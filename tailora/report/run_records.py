"""Runs and studies as records for a list. Reading them needs no torch.

run.json, or the settings of a study  -> settings, state
summary.json of a finished one        -> date, verdict, metrics, time
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import TypeAdapter

from tailora.errors import ConfigError, FormatError
from tailora.formats.io import read_json_object
from tailora.formats.run_folder import REPORT, RUN, SUMMARY
from tailora.report.format import setting
from tailora.study.study_store import STUDIES
from tailora.train.config import REWARD
from tailora.train.run_log import HOLDER, LOCK

DEPTH = 3  # of folders that are searched
OWN = frozenset({"output_dir", "resume_from_checkpoint"})  # settings that differ between any two runs


@dataclass(frozen=True)
class Summary:
    """summary.json, or what is known without one."""

    kind: str  # of report.json
    date: str  # in ISO format
    verdict: str = ""
    finding: str | None = None  # None for a study
    loss_before: float | None = None
    loss_after: float | None = None
    seconds: float | None = None
    metrics: list[dict[str, Any]] = field(default_factory=list)  # `report.pages.train.Metric`


SUMMARIES = TypeAdapter(Summary)


@dataclass(frozen=True)
class RunRecord:
    name: str
    state: str  # finished, running, diverged, interrupted, or damaged; unfinished for a study
    summary: Summary
    settings: dict[str, Any] = field(default_factory=dict)
    loss_unit: str = ""

    @property
    def model(self) -> str:
        return str(self.settings.get("model", "")).rstrip("/").rpartition("/")[2]

    @property
    def data(self) -> str:
        sources = self.settings.get("data") or []
        names = [sources] if isinstance(sources, str) else sources
        return ", ".join(str(name).rstrip("/").rpartition("/")[2] for name in names)

    @property
    def result(self) -> str:
        """The first metric or the loss, before and after training."""
        first = next(iter(self.summary.metrics), {"name": "loss"})
        before, after = (first.get(when, getattr(self.summary, f"loss_{when}")) for when in ("before", "after"))
        return "" if before is None or after is None else f"{first['name']} {before:.3g} → {after:.3g}"

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "state": self.state, "model": self.model, "data": self.data, **vars(self.summary)}


def records_in(folder: Path) -> list[RunRecord]:
    """Returns the runs and studies in a folder and its subfolders, the newest first. Raises ConfigError."""
    if not folder.is_dir():
        problem = "is a file" if folder.exists() else "does not exist"
        raise ConfigError(f"{folder} {problem}; expected the folder that contains your runs, such as outputs")
    return sorted(_records_below(folder), key=lambda record: record.summary.date, reverse=True)


def _records_below(folder: Path) -> Iterator[RunRecord]:
    """Yields the records of runs and studies, but not of the runs inside a study."""
    for path, folders, files in os.walk(folder):
        depth = Path(path).relative_to(folder)
        record = (
            record_of(Path(path), str(depth) if depth.parts else folder.resolve().name) if _file_of(files) else None
        )
        if record is not None:
            yield record
        hidden = [name for name in folders if name.startswith(".")]
        for name in folders[:] if record is not None or len(depth.parts) >= DEPTH else hidden:
            folders.remove(name)


def _file_of(names: Sequence[str]) -> str | None:
    """Returns the file with the settings of a run or a study; None if there is none."""
    return next((name for name in (RUN, *STUDIES) if name in names), None)


def record_of(path: Path, name: str) -> RunRecord | None:
    """Returns the record of a run or a study; None if the folder has neither. Damaged files are a state."""
    file = _file_of(os.listdir(path)) if path.is_dir() else None
    if file is None:
        return None
    date = datetime.fromtimestamp((path / file).lstat().st_mtime, UTC).isoformat(timespec="seconds")
    known: dict[str, Any] = {"kind": "train" if file == RUN else file.removesuffix(".json"), "date": date}
    try:
        content = read_json_object(path / file)
        settings = content.get("settings" if file == RUN else "train")
        if not isinstance(settings, dict):  # a file of another program
            return None
        is_finished = bool(content.get("finished")) if file == RUN else (path / REPORT).exists()
        state = "finished" if is_finished else _state_of_unfinished(path, content, is_study=file != RUN)
        result, facts = content.get("result") or {}, dict(known)
        facts["seconds"] = result.get("total_seconds") or result.get("seconds")
        if content.get("loss_unit") != REWARD:  # whose loss is minus the reward
            facts |= {f"loss_{when}": result.get(f"eval_loss_{when}") for when in ("before", "after")}
        if is_finished and (path / SUMMARY).exists():
            file = SUMMARY
            facts = read_json_object(path / file)
        summary = SUMMARIES.validate_python(facts)
        local_time(summary.date)
    except (FormatError, ValueError, OverflowError, AttributeError) as error:
        text = str(error) if isinstance(error, FormatError) else f"{path / file} has unexpected content"
        return RunRecord(name, "damaged", Summary(**known, verdict=text))
    return RunRecord(name, state, summary, settings, str(content.get("loss_unit", "")))


def local_time(date: str) -> str:
    """Returns a date in ISO format in the local time zone, to the minute. Raises ValueError or OverflowError."""
    return datetime.fromisoformat(date).astimezone().strftime("%Y-%m-%d %H:%M")


def _state_of_unfinished(path: Path, content: dict[str, Any], *, is_study: bool) -> str:
    locks = [holder.with_name(LOCK) for holder in path.rglob(HOLDER)] + [path / LOCK] * is_study
    if any(map(_is_held, locks)):
        return "running"
    return "unfinished" if is_study else "diverged" if content.get("diverged") else "interrupted"


def _is_held(lock: Path) -> bool:
    if not os.access(lock, os.W_OK):  # FileLock would create it, or fail
        return False
    try:
        with FileLock(lock, timeout=0):
            return False
    except Timeout:
        return True


def different_settings(records: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """Returns of each run the settings that are not the same in all runs that have them."""
    values = dict[str, set[str]]()
    for record in records:
        for name, value in record.settings.items():
            values.setdefault(name, set()).add(repr(value))
    different = {name for name, texts in values.items() if len(texts) > 1} - OWN
    return [{name: value for name, value in r.settings.items() if name in different} for r in records]


def settings_text(settings: dict[str, Any]) -> str:
    """Returns the settings in a line, without model and data, and without those that are not set."""
    shown = {name: setting(value) for name, value in settings.items() if value not in (None, [], {})}
    return ", ".join(f"{name} {value}" for name, value in shown.items() if name not in ("model", "data"))
