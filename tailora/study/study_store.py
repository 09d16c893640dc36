"""Shared by all studies: a folder with the settings, a lock, a time limit, and the trials.

NAME.json of STUDIES    the settings; a study with different settings is refused
plan.json               what its trials depend on, measured once
.lock                   locked by a process while it changes shared files

Each of several workers is a thread of this process that runs its trials in separate processes.
"""

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar, cast

from filelock import BaseFileLock, FileLock, Timeout

from tailora.core.setting_names import without_removed
from tailora.errors import ConfigError, FormatError
from tailora.formats.io import TEMPORARY, create_output_folder, read_own_json, write_file
from tailora.study.trial import RESULT, Listen, Progress, RunTrial, Trial, TrialSpec, Worker, get_trial
from tailora.train.config import ACCUMULATION, TrainConfig, batches_per_step
from tailora.train.launch import device_asked_for, threads_per_process

PLAN, LOCK, PROBE, TRIALS = "plan.json", ".lock", "probe", "trials"
TEXTS, CLOCK = "texts.json", "seconds.json"  # of a comparison: what measures forgetting, and the time of all runs
LAUNCH, PROCESSES = "launch", "nproc_per_node"  # section and name of the number of processes in a study's settings
STUDIES = {
    "compare.json": "comparison",
    "search.json": "search",
    "rows.json": "study of rows",
    "curve.json": "learning curve",
}  # file with the settings -> name in messages
RESULT_FOLDERS = (PROBE, "runs")  # deleted when a study without results gets new settings
DAMAGED = "use a different --output-dir, or delete this folder and start again"
PROBE_STEPS, PROBE_RATE = 4, 1e-6  # a rate so low that it cannot diverge
FEWEST_SEEDS = 2  # one seed does not show how much results vary between seeds
VISIBLE = "CUDA_VISIBLE_DEVICES"

Log = Callable[[str], None]
Settings = Mapping[str, Any]
Plan = TypeVar("Plan")


@contextmanager
def locked(folder: Path, name: str, *, wait: bool = True) -> Iterator[BaseFileLock]:
    """Locks the folder, after creating it if necessary. Waits while another process has the lock.

    name: of the file with the settings.
    Raises ConfigError for a folder with other files, without changing it, and for a lock if `wait` is False.
    """
    create_output_folder(folder)
    others = {entry.name for entry in folder.iterdir()} - {LOCK}
    written_now = (TEMPORARY.fullmatch(entry) for entry in others)  # by a worker that starts at the same time
    others -= {match[0] for match in written_now if match and match["name"] == name}
    if others and not (folder / name).exists():
        raise ConfigError(f"{folder} is not empty and contains no {STUDIES[name]}; use a different --output-dir")
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        message = f"another {STUDIES[name]} is writing to {folder}; wait until it ends, or use a different --output-dir"
        raise ConfigError(message) from None
    try:
        yield lock
    finally:
        lock.release()  # no effect if the caller has released it


def open_folder(
    folder: Path,
    name: str,
    settings: Settings,
    *,
    begun: bool,
    identity: Callable[[Settings], Settings] = lambda settings: settings,
) -> None:
    """Writes the settings of a new study, or checks them when it is resumed. The folder must be locked.

    name: of the file with the settings.
    begun: whether there are results; until then new settings replace the old.
    identity: the part of the settings that must not change, in addition to `same_steps`.
    """
    file, content = folder / name, json.loads(json.dumps(settings))  # tuples become lists, as in a file
    if file.exists() and begun:
        stored = read_own_json(file, dict[str, Any], DAMAGED)
        stored = {part: without_removed(v, ()) if isinstance(v, dict) else v for part, v in stored.items()}
        sections = [name for name, value in content.items() if isinstance(value, dict) and name in {"train", *stored}]
        if wrong := [name for name in sections if not isinstance(stored.get(name), dict)]:
            raise FormatError(f"{file} is damaged (expected settings in {' and '.join(wrong)}): {DAMAGED}")
        then, now = same_steps(identity(stored)), same_steps(identity(content))
        if changes := differences(then, now):
            if LAUNCH in {*stored, *content} - {*then, *now}:
                changes.append(f"{ACCUMULATION} is the total over all processes here")
            raise ConfigError(
                f"{folder} contains a {STUDIES[name]} with different settings: {'; '.join(changes)}. To resume it, use "
                "its settings; otherwise use a different --output-dir"
            )
        if stored == content:
            return
    elif file.exists():
        for entry in RESULT_FOLDERS:
            shutil.rmtree(folder / entry, ignore_errors=True)
        for entry in (PLAN, TEXTS, CLOCK):
            (folder / entry).unlink(missing_ok=True)
    write_file(file, json.dumps(settings, indent=1).encode())


def study_settings(train: TrainConfig, processes: int, **sections: Any) -> dict[str, Any]:
    """Returns the settings of a study for its file. processes: per run; stored if there are several."""
    launch = {LAUNCH: {PROCESSES: processes}} if processes > 1 else {}
    return {"train": train.model_dump(mode="json", exclude={"output_dir"}), **sections, **launch}


def same_steps(settings: Settings) -> Settings:
    """Returns the settings with the number of batches per step instead of its factors.

    This lets a study resume with a different number of processes if --gradient-accumulation-steps compensates for it,
    unless the arms or trials themselves differ in that setting.
    """
    processes = settings.get(LAUNCH, {}).get(PROCESSES, 1)
    changes = [settings.get("space", {}), *settings.get("compare", {}).get("arms", {}).values()]
    if any(ACCUMULATION in changed for changed in changes):
        return settings
    rest = {name: value for name, value in settings.items() if name != LAUNCH}
    return {**rest, "train": {**settings["train"], ACCUMULATION: batches_per_step(settings["train"], processes)}}


def differences(stored: Settings, current: Settings) -> list[str]:
    """Returns a line for each setting that differs, also within sections."""
    lines = []
    for name in dict.fromkeys([*stored, *current]):
        before, now = stored.get(name), current.get(name)
        if isinstance(before, Mapping) or isinstance(now, Mapping):
            lines += differences(before or {}, now or {})
        elif before != now:
            lines.append(f"{name} was {json.dumps(before)} and is now {json.dumps(now)}")
    return lines


# ---- Workers


def make_workers(count: int, device: str, processes: int = 1) -> list[Worker]:
    """Returns workers for devices of the type of `device`; none for a count of 1, which needs no workers.

    processes: per run, each with its own device.    Raises ConfigError for more workers than devices.
    """
    if count == 1:
        return []
    from tailora.core.device import choose_device, devices  # torch from here on

    name = device_asked_for(device)
    kind = choose_device(name).type
    if kind == "cpu":
        return [Worker(number, count, None, threads_per_process(count * processes)) for number in range(1, count + 1)]
    if ":" in name:
        raise ConfigError(f"--workers {count} needs one device per worker, got --device {name}; use --device {kind}")
    available = [str(device) for device in devices() if device.type == kind]
    if count * processes > len(available):
        share = "one device" if processes == 1 else f"{processes} devices"
        raise ConfigError(
            f"--workers {count} needs {share} per worker, but this machine has only {', '.join(available)}; "
            f"use --workers {max(len(available) // processes, 1)}"
        )
    if processes == 1:
        return [Worker(number, count, name) for number, name in enumerate(available[:count], start=1)]
    if kind != "cuda":
        raise ConfigError(
            f"--workers {count} with --nproc-per-node {processes} needs CUDA devices, but the device is {kind}; remove "
            "--workers"
        )
    visible = (os.environ.get(VISIBLE) or ",".join(map(str, range(len(available))))).split(",")
    groups = [",".join(visible[start : start + processes]) for start in range(0, count * processes, processes)]
    return [Worker(number, count, None, variables={VISIBLE: group}) for number, group in enumerate(groups, start=1)]


@contextmanager
def threads_of(workers: Sequence[Worker]) -> Iterator[ThreadPoolExecutor]:
    """Yields a pool with one thread per worker. An exception in the block, such as Ctrl-C, stops all workers."""
    with ThreadPoolExecutor(len(workers)) as pool:
        try:
            yield pool
        except BaseException:
            for worker in workers:
                worker.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@dataclass(eq=False)
class StudySession:
    """One process's work on a study: the remaining time, its notes, and its trials.

    worker: runs the trials, if there are several. `replace(session, worker=...)` shares the clock and the notes.
    """

    folder: Path
    minutes: float | None
    log: Log
    progress: Progress | None
    run_trial: RunTrial
    processes: int = 1  # per trial
    worker: Worker | None = None
    notes: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)  # of the notes
    started: float = field(default_factory=time.monotonic)

    def check_stopped(self) -> None:
        """Raises KeyboardInterrupt if the worker was stopped."""
        if self.worker is not None:
            self.worker.check()

    @property
    def seconds(self) -> float:
        """Seconds since the start of the session."""
        return time.monotonic() - self.started

    @property
    def is_over(self) -> bool:
        """True after --minutes, when no further trial starts."""
        return self.minutes is not None and self.seconds >= 60 * self.minutes

    def note(self, text: str) -> None:
        """Logs a text and adds it to the report, once. Several workers may do so at the same time."""
        with self.lock:
            if text not in self.notes:
                self.notes.append(text)
                self.log(text)

    def note_missing(self, done: int, wanted: int, what: str) -> None:
        """Adds a note if --minutes ended the study before everything was done."""
        if done < wanted:
            text = f"--minutes {self.minutes:g} left time for {done} of {wanted} {what}"
            self.note(f"{text}; the same command with a higher --minutes adds the others")

    def no_verdict(self, done: str) -> ConfigError:
        """done: what was finished before the time was up, in words."""
        text = f"no verdict yet: --minutes {self.minutes:g} were over after {done}"
        return ConfigError(f"{text}. The same command with a higher --minutes, or without it, continues")

    def note_data(self, trial: Trial) -> None:
        for name, text in trial.numbers["data_warnings"].items():
            self.note(f"{name}: {text}")

    def note_workers(self, trials: Iterable[Trial]) -> None:
        """Adds a note if several workers or processes ran the trials, possibly in an earlier call."""
        trials = list(trials)
        if (most := max((trial.workers for trial in trials), default=1)) > 1:
            self.note(f"up to {most} workers ran in parallel, so a run may have taken longer than it would alone")
        counts = sorted({trial.processes for trial in trials})
        if len(counts) > 1:
            numbers = " and ".join(map(str, counts))
            self.note(f"runs had {numbers} processes, so their times and memory are not comparable")
        elif counts and counts[0] > 1:
            self.note(f"each run had {counts[0]} processes; memory was measured in the first one")

    def plan(self, find: Callable[[], Plan], kind: type[Plan]) -> Plan:
        """Returns the content of plan.json, a dataclass; calls `find` for it if there is none yet."""
        file = self.folder / PLAN
        if not file.exists():
            write_file(file, json.dumps(asdict(cast(Any, find()))).encode())
        return read_own_json(file, kind, DAMAGED)

    def has_trial(self, path: Path) -> bool:
        return (path / RESULT).exists()

    def may_run(self, path: Path) -> bool:
        """Returns whether the trial of this folder is finished, or may start."""
        return self.has_trial(path) or not self.is_over

    def probe(self, train: TrainConfig, spec: TrialSpec) -> tuple[Trial, int]:
        """Runs a few steps with the settings of `spec`, whose facts do not depend on its length.

        Returns the trial, and the number of steps that the settings of the study have. Raises ConfigError if it failed.
        """
        self.log(f"running {PROBE_STEPS} steps to measure the data and the model")
        steps = {"learning_rate": PROBE_RATE, "max_steps": PROBE_STEPS}
        trial = self.trial(replace(spec, settings={**spec.settings, **steps}), self.folder / PROBE)
        if not trial.done:
            failed = f"the first {PROBE_STEPS} steps failed, at a learning rate of {PROBE_RATE:g}: {trial.message}"
            raise ConfigError(failed)
        return trial, train.max_steps or trial.numbers["all_steps"] or 1

    def trial(self, spec: TrialSpec, path: Path, stop: Listen | None = None) -> Trial:
        self.check_stopped()
        spec = replace(spec, processes=self.processes)
        return get_trial(spec, path, progress=self.progress, stop=stop, run_trial=self.run_trial, worker=self.worker)
