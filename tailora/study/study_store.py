"""The folder of a study: whose it is, and how several processes share it.

search.json    what was asked; a study of other settings is refused
.claim         held while the folder is made, trials are planned, and what died is queued again
seats/3.lock   held by the process on seat 3 as long as it lives; the system lets go of it when the process ends
journal.log    the trials, unless --storage names a database
"""

import hashlib
import json
import shutil
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from itertools import count
from pathlib import Path
from threading import Event, Thread
from typing import Any

import optuna
from filelock import FileLock, Timeout
from optuna.storages import BaseStorage, RDBStorage, fail_stale_trials
from optuna.storages.journal import JournalFileBackend, JournalStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from tailora.errors import ConfigError
from tailora.formats.io import create_output_folder, write_file
from tailora.study.results import Candidate
from tailora.train.config import without_removed

CLAIM, HOME, SEATS, JOURNAL = ".claim", ".home", "seats", "journal.log"
PLAN, PROBE = "plan.json", "probe"
WORKER, OUTCOME, AGAIN = "worker", "outcome", "again"  # what is noted beside a trial
HEARTBEAT, GRACE = 30, 120  # seconds
YOUNG = 60.0  # seconds that a trial may have no worker
TRIES = 3  # of a trial whose process dies: it may be the trial that kills it


def claim(folder: Path, name: str, settings: dict[str, Any], noun: str) -> None:
    """The folder is this study's: new, or its own. Raises ConfigError for another's.

    name: of the file with the settings.    noun: what the study is called in a message.
    """
    known, text = folder / name, json.dumps(settings, indent=1)
    if known.exists() and (folder / PLAN).exists():  # before that nothing was made that is worth keeping
        recorded = json.loads(known.read_text())
        if {**recorded, "train": without_removed(recorded["train"])} != json.loads(text):
            raise ConfigError(f"{folder} holds a {noun} with other settings; give another --output-dir")
        return
    if known.exists():
        shutil.rmtree(folder / PROBE, ignore_errors=True)
    elif folder.exists() and any(entry.name != CLAIM for entry in folder.iterdir()):
        raise ConfigError(f"{folder} is not empty and holds no {noun}; give another --output-dir")
    write_file(known, text.encode())


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """One process at a time."""
    create_output_folder(folder)
    with FileLock(folder / CLAIM):
        yield


def home(folder: Path) -> str:
    """What tells this folder from those of other machines in one database."""
    path = folder / HOME
    if not path.exists():
        write_file(path, uuid.uuid4().hex.encode())
    return path.read_text()


@contextmanager
def seated(folder: Path) -> Iterator[int]:
    """The lowest free seat, held until the end."""
    (folder / SEATS).mkdir(exist_ok=True)
    for seat in count():
        lock = FileLock(_seat(folder, seat))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            continue
        try:
            yield seat
        finally:
            lock.release()
        return


def is_taken(folder: Path, seat: int) -> bool:
    try:
        with FileLock(_seat(folder, seat), timeout=0):
            return False
    except Timeout:
        return True


def _seat(folder: Path, seat: int) -> Path:
    return folder / SEATS / f"{seat}.lock"


def open_study(folder: Path, storage: str | None, settings: dict[str, Any]) -> tuple[optuna.Study, BaseStorage]:
    """The study of these settings, made or joined, and its storage. Raises ConfigError for an unusable database."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # what happens is said by who searches
    text = json.dumps(settings, sort_keys=True)
    name = f"tailora-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    kept = _storage(folder, storage)
    study = optuna.create_study(storage=kept, study_name=name, direction="minimize", load_if_exists=True)
    return study, kept


def _storage(folder: Path, url: str | None) -> BaseStorage:
    if url is None:
        return JournalStorage(JournalFileBackend(str(folder / JOURNAL)))
    try:
        with _experimental():
            return RDBStorage(url, heartbeat_interval=HEARTBEAT, grace_period=GRACE)
    except (SQLAlchemyError, ImportError, ValueError) as error:
        cause = str(error.__cause__ or error).splitlines()[0]
        raise ConfigError(
            f"--storage {url} cannot be used: {cause}. It is the URL of a database as SQLAlchemy has it, such as "
            "sqlite:///study.db or postgresql+psycopg2://user:password@host/name, with its driver installed"
        ) from None


@contextmanager
def _experimental() -> Iterator[None]:
    """Optuna warns of its heartbeat, which it has had since 2.8, and of whoever sends it without `optimize`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        warnings.filterwarnings("ignore", "Heartbeat of storage", UserWarning)
        yield


def begin(study: optuna.Study, home: str, seat: int) -> optuna.Trial:
    """A new trial, or one that was queued, of this worker."""
    with _experimental():
        trial = study.ask()
    trial.set_user_attr(WORKER, [home, seat])
    return trial


@contextmanager
def beating(storage: BaseStorage, trial: int) -> Iterator[None]:
    """Tells a database all the while that the trial of this id is alive; in a folder the seat tells it."""
    if not isinstance(storage, RDBStorage):
        yield
        return
    ended = Event()

    def beat() -> None:
        storage.record_heartbeat(trial)
        while not ended.wait(HEARTBEAT):
            storage.record_heartbeat(trial)

    thread = Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def outcome(trial: FrozenTrial) -> Candidate:
    """Of a finished trial."""
    return Candidate(**trial.user_attrs[OUTCOME])


def finish(study: optuna.Study, trial: optuna.Trial, candidate: Candidate) -> bool:
    """Notes how a trial ended. False when it was taken for dead meanwhile, and is another's now."""
    try:
        trial.set_user_attr(OUTCOME, asdict(candidate))
    except optuna.exceptions.UpdateFinishedTrialError:
        return False
    close(study, candidate)
    return True


def close(study: optuna.Study, candidate: Candidate) -> None:
    """Tells Optuna how a trial ended; those without a final loss are the worst to it."""
    if candidate.state == "done":
        study.tell(candidate.number, candidate.eval_loss)
    else:
        study.tell(candidate.number, state=TrialState.PRUNED)


def bury(study: optuna.Study, folder: Path, seat: int) -> int:
    """Ends trials whose process is gone and queues their settings again; returns how many. Under the claim.

    seat: ours, whose earlier trials are dead, too. Of other machines the database's heartbeat tells.
    """
    with _experimental():
        fail_stale_trials(study)
    own = home(folder)
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if not _is_dead(trial, folder, own, seat):
            continue
        if OUTCOME in trial.user_attrs:
            close(study, outcome(trial))
        else:
            study.tell(trial.number, state=TrialState.FAIL)
    trials = study.get_trials(deepcopy=False)
    again = {trial.user_attrs[AGAIN] for trial in trials if AGAIN in trial.user_attrs}
    lost = [trial for trial in trials if trial.state == TrialState.FAIL and OUTCOME not in trial.user_attrs]
    lost = [trial for trial in lost if trial.number not in again and _tries(trial, trials) < TRIES]
    for trial in lost:
        study.enqueue_trial(trial.params or trial.system_attrs.get("fixed_params", {}), {AGAIN: trial.number})
    return len(lost)


def _is_dead(trial: FrozenTrial, folder: Path, own: str, seat: int) -> bool:
    if WORKER not in trial.user_attrs:  # it died, or is about to say
        started = trial.datetime_start
        return started is not None and (datetime.now() - started).total_seconds() > YOUNG
    where, its = trial.user_attrs[WORKER]
    return where == own and (its == seat or not is_taken(folder, its))


def _tries(trial: FrozenTrial, trials: list[FrozenTrial]) -> int:
    """Which try of its settings this was."""
    tries = 1
    while AGAIN in trial.user_attrs:
        trial, tries = trials[trial.user_attrs[AGAIN]], tries + 1
    return tries
