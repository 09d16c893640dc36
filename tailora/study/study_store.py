"""What all studies share: a folder with the settings, a lock, a time limit, and the trials.

compare.json or search.json    the settings; a study with other settings is refused
plan.json                      how long its trials are, measured once
.lock                          held by a process while it changes shared files

With several workers, each is a thread of this process that runs its trials in processes of their own.
"""

import copy
import json
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar, cast

from filelock import BaseFileLock, FileLock, Timeout

from tailora.errors import ConfigError, FormatError
from tailora.formats.io import TEMPORARY, create_output_folder, read_own_json, write_file
from tailora.study.trial import RESULT, Listen, Progress, RunTrial, Trial, TrialSpec, Worker, get_trial
from tailora.train.config import ACCUMULATION, batches_per_step
from tailora.train.launch import device_asked_for, threads_per_process

PLAN, LOCK, TIMING = "plan.json", ".lock", "probe"
LAUNCH, PROCESSES = "launch", "nproc_per_node"  # in a study's settings: section and name of the number of processes
STUDIES = {"compare.json": "comparison", "search.json": "search"}  # file with the settings -> what messages call it
OF_RESULTS = (TIMING, "runs", "rising")  # what is deleted in a study without results that gets other settings
DAMAGED = "give another --output-dir, or delete this folder and start again"
VISIBLE = "CUDA_VISIBLE_DEVICES"

Log = Callable[[str], None]
Settings = Mapping[str, Any]
Plan = TypeVar("Plan")


@contextmanager
def locked(folder: Path, name: str, busy: str | None = None) -> Iterator[BaseFileLock]:
    """Holds the lock of the folder, which is created if missing. Waits while another process holds it; with `busy`
    raises ConfigError with this message instead.

    name: of the file with the settings.    Raises ConfigError for a folder with other files, and leaves nothing in it.
    """
    create_output_folder(folder)
    others = {entry.name for entry in folder.iterdir()} - {LOCK}
    written_now = (TEMPORARY.fullmatch(entry) for entry in others)  # by a worker that begins at the same time
    others -= {match[0] for match in written_now if match and match["name"] == name}
    if others and not (folder / name).exists():
        raise ConfigError(f"{folder} is not empty and holds no {STUDIES[name]}; give another --output-dir")
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=-1 if busy is None else 0)
    except Timeout:
        raise ConfigError(str(busy)) from None
    try:
        yield lock
    finally:
        lock.release()  # has no effect where the caller has released it


def open_folder(
    folder: Path,
    name: str,
    settings: Settings,
    *,
    begun: bool,
    identity: Callable[[Settings], Settings] = lambda settings: settings,
) -> None:
    """Writes the settings of a new study, or checks those of one that is continued. The folder is locked.

    name: of the file with the settings.    begun: whether there are results; until then other settings replace them.
    identity: the part of the settings that must be the same, beside `same_steps`.
    """
    file, content = folder / name, json.loads(json.dumps(settings))  # with lists for tuples, as in a file
    if file.exists() and begun:
        stored = read_own_json(file, dict[str, Any], DAMAGED)
        sections = [name for name, value in content.items() if isinstance(value, dict) and name in {"train", *stored}]
        if wrong := [name for name in sections if not isinstance(stored.get(name), dict)]:
            raise FormatError(f"{file} is damaged ({' and '.join(wrong)} should hold settings): {DAMAGED}")
        then, now = same_steps(identity(stored)), same_steps(identity(content))
        if changes := differences(then, now):
            if LAUNCH in {*stored, *content} - {*then, *now}:
                changes.append(f"{ACCUMULATION} is counted here for all processes together")
            raise ConfigError(
                f"{folder} holds a {STUDIES[name]} with other settings: {'; '.join(changes)}. Give the former "
                "settings to continue it, or another --output-dir"
            )
        if stored == content:
            return
    elif file.exists():
        for entry in OF_RESULTS:
            shutil.rmtree(folder / entry, ignore_errors=True)
        (folder / PLAN).unlink(missing_ok=True)
    write_file(file, json.dumps(settings, indent=1).encode())


def launch_settings(processes: int) -> dict[str, Any]:
    """Returns the section of a study's settings that says of how many processes a run has; none for one."""
    return {LAUNCH: {PROCESSES: processes}} if processes > 1 else {}


def same_steps(settings: Settings) -> Settings:
    """Returns the settings with the number of batches in a step in place of what it is the product of.

    So a study goes on with another number of processes if --gradient-accumulation-steps makes up for it, unless the
    arms or trials themselves differ in that setting.
    """
    processes = settings.get(LAUNCH, {}).get(PROCESSES, 1)
    changes = [settings.get("space", {}), *settings.get("compare", {}).get("arms", {}).values()]
    if any(ACCUMULATION in changed for changed in changes):
        return settings
    rest = {name: value for name, value in settings.items() if name != LAUNCH}
    return {**rest, "train": {**settings["train"], ACCUMULATION: batches_per_step(settings["train"], processes)}}


def differences(stored: Settings, asked: Settings) -> list[str]:
    """Returns a line for each setting that differs; settings stand in sections."""
    lines = []
    for name in dict.fromkeys([*stored, *asked]):
        before, now = stored.get(name), asked.get(name)
        if isinstance(before, Mapping) or isinstance(now, Mapping):
            lines += differences(before or {}, now or {})
        elif before != now:
            lines.append(f"{name} was {json.dumps(before)}, and is now {json.dumps(now)}")
    return lines


# ---- Workers


def make_workers(count: int, device: str, minutes: float | None = None, processes: int = 1) -> list[Worker]:
    """Returns workers for the devices of the kind that `device` names; none for a count of 1, which needs no worker.

    minutes: of the study. They are planned by what a run takes alone, so each worker needs devices of its own.
    processes: of a run, each of which takes a device.
    Raises ConfigError for more workers than devices, and for minutes on a CPU.
    """
    if count == 1:
        return []
    from tailora.core.device import choose_device, devices  # torch from here on

    name = device_asked_for(device)
    kind = choose_device(name).type
    if kind == "cpu":
        if minutes is not None:
            raise ConfigError(
                f"--minutes {minutes:g} plans runs by what one takes alone, and --workers {count} on a CPU share its "
                "cores: leave one of the two out; --max-steps and --seeds limit a study too"
            )
        return [Worker(number, count, None, threads_per_process(count * processes)) for number in range(1, count + 1)]
    if ":" in name:
        raise ConfigError(f"--workers {count} take a device each, and --device {name} is one: give --device {kind}")
    there = [str(device) for device in devices() if device.type == kind]
    if count * processes > len(there):
        share = "a device" if processes == 1 else f"{processes} devices"
        raise ConfigError(
            f"--workers {count} take {share} each, and there {'are' if len(there) > 1 else 'is'} {', '.join(there)}: "
            f"give --workers {max(len(there) // processes, 1)}"
        )
    if processes == 1:
        return [Worker(number, count, name) for number, name in enumerate(there[:count], start=1)]
    if kind != "cuda":
        raise ConfigError(
            f"--workers {count} with --nproc-per-node {processes}: only CUDA devices can be shared out to runs of "
            f"several processes, and the device is {kind}; leave --workers out"
        )
    visible = os.environ.get(VISIBLE) or ",".join(map(str, range(len(there))))
    names = visible.split(",")
    return [
        Worker(number, count, None, variables={VISIBLE: ",".join(names[(number - 1) * processes : number * processes])})
        for number in range(1, count + 1)
    ]


@contextmanager
def threads_of(workers: Sequence[Worker]) -> Iterator[ThreadPoolExecutor]:
    """Yields a pool with a thread for each worker. An exception within the block, such as a Ctrl-C, stops them all."""
    with ThreadPoolExecutor(len(workers)) as pool:
        try:
            yield pool
        except BaseException:
            for worker in workers:
                worker.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


class StudySession:
    """One process's work on a study: the time left, its notes, and the trials that it runs."""

    def __init__(
        self,
        folder: Path,
        minutes: float | None,
        log: Log,
        progress: Progress | None,
        run_trial: RunTrial,
        processes: int = 1,
    ) -> None:
        """processes: of each trial."""
        self.folder, self.minutes, self.log, self.processes = folder, minutes, log, processes
        self.notes: list[str] = []
        self._notes_lock = threading.Lock()
        self._started, self._progress, self._run_trial = time.monotonic(), progress, run_trial
        self.worker: Worker | None = None  # that runs the trials, if there are several

    def of_worker(self, worker: Worker) -> "StudySession":
        """Returns the same session, with the same clock and notes, whose trials this worker runs."""
        session = copy.copy(self)
        session.worker = worker
        return session

    def check_stopped(self) -> None:
        """Raises KeyboardInterrupt if the worker was stopped."""
        if self.worker is not None:
            self.worker.check()

    @property
    def seconds(self) -> float:
        """Since the start of this process's work."""
        return time.monotonic() - self._started

    @property
    def seconds_left(self) -> float:
        """Until the minutes are over; infinite without --minutes."""
        return math.inf if self.minutes is None else self.minutes * 60 - self.seconds

    def note(self, text: str) -> None:
        """Logs a text and keeps it for the report, once. Several workers may note the same at the same time."""
        with self._notes_lock:
            if text not in self.notes:
                self.notes.append(text)
                self.log(text)

    def note_data(self, trial: Trial) -> None:
        """Notes what of the data was cut, left out or found twice."""
        for name, text in trial.numbers["data_warnings"].items():
            self.note(f"{name}: {text}")

    def note_workers(self, trials: Iterable[Trial]) -> None:
        """Notes how many workers and processes made the trials, if several; it may have been in an earlier call."""
        trials = list(trials)
        if (most := max((trial.workers for trial in trials), default=1)) > 1:
            self.note(f"the runs were made by up to {most} workers, so a run may have taken longer than it takes alone")
        counts = sorted({trial.processes for trial in trials})
        if len(counts) > 1:
            numbers = " and ".join(map(str, counts))
            self.note(f"the runs had {numbers} processes, so their times and memory cannot be compared")
        elif counts and counts[0] > 1:
            self.note(f"each run had {counts[0]} processes; the memory is that of the first of them")

    def plan(self, find: Callable[[], Plan], kind: type[Plan]) -> Plan:
        """The content of plan.json, a dataclass, which `find` returns when there is none yet."""
        file = self.folder / PLAN
        if not file.exists():
            write_file(file, json.dumps(asdict(cast(Any, find()))).encode())
        return read_own_json(file, kind, DAMAGED)

    def check_processes(self, planned: int) -> None:
        """Raises ConfigError if the minutes were planned by the time of runs in another number of processes."""
        if self.minutes is not None and planned != self.processes:
            raise ConfigError(
                f"--minutes {self.minutes:g} with --nproc-per-node {self.processes}: {self.folder} holds the time that "
                f"runs of {planned} processes take; give --nproc-per-node {planned}, or another --output-dir"
            )

    def has_trial(self, path: Path) -> bool:
        return (path / RESULT).exists()

    def trial(self, spec: TrialSpec, path: Path, stop: Listen | None = None) -> Trial:
        self.check_stopped()
        spec = replace(spec, processes=self.processes)
        return get_trial(spec, path, progress=self._progress, stop=stop, run_trial=self._run_trial, worker=self.worker)
