"""Optuna's part of a search: the database that workers share, what is tried next, and which settings mattered.

    open_study       study.db in the folder, or the database of --storage
    sampler, suggest the values of a trial
    running_trials, finished_trials
    importances

A worker that dies stops sending Optuna its heartbeats. The next worker that looks marks its trial as failed, and
Optuna puts the trial's settings back into the queue, a few times at most.
"""

import hashlib
import json
import re
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.samplers import TPESampler
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback, fail_stale_trials
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError, SQLAlchemyError

from tailora.errors import ConfigError
from tailora.study.results import Candidate
from tailora.study.search_space import Axis, Range

DATABASE = "study.db"
OUTCOME = "outcome"  # user attribute of a trial
HEARTBEAT, GRACE = 10, 60  # seconds between heartbeats, and until a worker without one counts as dead
RETRIES = 2  # of a trial whose worker dies: it may be the trial that kills it
LOCKED = 60  # seconds that a worker waits for another one's write to an SQLite file
CREATIONS = 5  # attempts to create the tables, which fail when two workers do it at once
RANDOM_TRIALS = 6  # before TPE has seen enough to model
BEST_SHARE = 0.25  # of the trials: what importances are about
FEWEST = 8  # trials, for two among the best quarter


@contextmanager
def _experimental() -> Iterator[None]:
    """Without Optuna's warnings of features that may change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


# ---- The database


def open_study(folder: Path, url: str | None, settings: Mapping[str, Any]) -> optuna.Study:
    """Creates or joins the study of these settings. Raises ConfigError for a database that cannot be used.

    url: of the database; None for a file in the folder.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # the search itself logs what happens
    name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    return optuna.create_study(
        storage=_storage(url or f"sqlite:///{folder / DATABASE}"),
        study_name=f"tailora-{name}",
        direction="minimize",
        load_if_exists=True,
    )


def _storage(url: str) -> RDBStorage:
    engine = {"connect_args": {"timeout": LOCKED}} if url.startswith("sqlite") else {}
    for attempt in range(CREATIONS):
        try:
            with _experimental():
                return RDBStorage(
                    url,
                    engine_kwargs=engine,
                    heartbeat_interval=HEARTBEAT,
                    grace_period=GRACE,
                    heartbeat_stale_trial_callback=retry,
                )
        except (IntegrityError, OperationalError, ProgrammingError) as error:
            if attempt == CREATIONS - 1:
                raise _unusable(url, error) from None
            time.sleep(0.1 * 2**attempt)
        except (SQLAlchemyError, ImportError, ValueError) as error:
            raise _unusable(url, error) from None
    raise AssertionError


@contextmanager
def explained_errors(folder: Path, url: str | None) -> Iterator[None]:
    """Within the block, a database that fails in the middle of a search raises ConfigError."""
    try:
        yield
    except (StorageInternalError, SQLAlchemyError) as error:
        raise ConfigError(
            f"the database of the search, {_without_password(url) if url else folder / DATABASE}, cannot be used any "
            f"more: {_first_line(error)}. When it can, the same command continues the search"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error.__cause__ or error).splitlines()[0]


def _without_password(url: str) -> str:
    """Returns the URL with *** for its passwords. One that is not quoted may hold / and @, so it ends at the last @."""
    url = re.sub(r"(://[^:]*:).*@", r"\1***@", url)
    return re.sub(r"(?i)([?&][^=&]*(?:password|passwd|pwd)=)[^&]*", r"\1***", url)


def _unusable(url: str, error: Exception) -> ConfigError:
    cause = _first_line(error)
    if re.match(r"[^?]*://[^:]*:[^?]*@[^?]*@", url):  # then the cause may quote a part of the password
        cause = "its password holds an @, which is written %40 in a URL"
    return ConfigError(
        f"--storage {_without_password(url)} cannot be used: {cause}. Give the URL of a database in the "
        "form of SQLAlchemy, such as sqlite:///study.db or postgresql+psycopg2://user:password@host/name, with its "
        "driver installed"
    )


# ---- Trials


def retry(study: optuna.Study, trial: FrozenTrial) -> None:
    """Puts the settings of a failed trial back into the queue, unless it was retried RETRIES times."""
    with _experimental():
        RetryHeartbeatStaleTrialCallback(max_retry=RETRIES)(study, trial)


def running_trials(study: optuna.Study) -> list[FrozenTrial]:
    """Those whose worker is alive; those of dead workers are marked as failed, and put back into the queue."""
    with _experimental():
        fail_stale_trials(study)
    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    alive = []
    for trial in running:
        started = trial.datetime_start or datetime.now()
        if not trial.params and datetime.now() - started > timedelta(seconds=GRACE):
            study.tell(trial.number, state=TrialState.FAIL)  # its worker died before the first heartbeat
            retry(study, trial)
        else:
            alive.append(trial)
    return alive


def finished_trials(study: optuna.Study) -> list[Candidate]:
    """The finished trials of all workers."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    return [Candidate(**trial.user_attrs[OUTCOME]) for trial in trials if OUTCOME in trial.user_attrs]


# ---- What is tried


def sampler(seed: int, number: int) -> TPESampler:
    """The sampler of one trial: its values depend on seed, number and the earlier trials, not on the process.

    Trials that are running count as bad ones (constant liar), so that no two workers try nearly the same.
    """
    with _experimental():
        return TPESampler(seed=(seed * 1_000_003 + number) % 2**32, n_startup_trials=RANDOM_TRIALS, constant_liar=True)


def suggest(trial: optuna.Trial, axes: Mapping[str, Axis]) -> dict[str, Any]:
    """A value for every axis; an axis with one value is not searched."""
    values: dict[str, Any] = {}
    for name, axis in axes.items():
        if isinstance(axis, Range):
            values[name] = trial.suggest_float(name, axis.low, axis.high, log=axis.log)
        else:
            values[name] = axis[0] if len(axis) == 1 else trial.suggest_categorical(name, axis)
    return values


# ---- Which settings mattered


def importances(trials: Sequence[FrozenTrial]) -> dict[str, float]:
    """Share of each setting in being among the best quarter (PED-ANOVA, arXiv:2304.10255); {} for too few trials.

    Trials that were pruned or diverged count as worse than all others.
    """
    states = (TrialState.COMPLETE, TrialState.PRUNED)
    ended = [trial for trial in trials if trial.state in states and trial.params]
    done = [trial.value for trial in ended if trial.state == TrialState.COMPLETE and trial.value is not None]
    if len(ended) < FEWEST or not done:
        return {}
    worst = max(done) + 1.0
    study = optuna.create_study()
    for trial in ended:
        value = trial.value if trial.state == TrialState.COMPLETE else worst
        study.add_trial(create_trial(params=trial.params, distributions=trial.distributions, value=value))
    with _experimental():
        shares = get_param_importances(study, evaluator=PedAnovaImportanceEvaluator(target_quantile=BEST_SHARE))
    return {name: float(value) for name, value in shares.items()}
