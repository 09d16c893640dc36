"""Optuna's part of a search: the shared database, the next values to try, and the importance of each setting.

    open_study       study.db in the folder, or the database of --storage
    sampler, suggest the values of a trial
    running_trials, finished_trials
    importances

A worker that dies stops sending heartbeats to Optuna. The next worker that checks marks its trial as failed, and Optuna
puts the trial's settings back into the queue, up to RETRIES times.
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
HEARTBEAT, GRACE = 10, 60  # seconds between heartbeats, and without one until a worker counts as dead
RETRIES = 2  # of a trial whose worker dies, because the trial may be the cause
LOCKED = 60  # seconds to wait for another worker's write to an SQLite file
CREATIONS = 5  # attempts to create the tables, which fails if two workers do it at once
RANDOM_TRIALS = 6  # before TPE has enough data to model
BEST_SHARE = 0.25  # importances explain which trials are in the best quarter
FEWEST = 8  # trials, so that at least two are in the best quarter


@contextmanager
def _experimental() -> Iterator[None]:
    """Suppresses Optuna's warnings about experimental features."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


# ---- The database


def open_study(folder: Path, url: str | None, settings: Mapping[str, Any]) -> optuna.Study:
    """Creates or joins the study of these settings. Raises ConfigError for an unusable database.

    url: of the database; None for a file in the folder.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # the search has its own log
    name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    storage = _storage(url or f"sqlite:///{folder / DATABASE}")
    return optuna.create_study(storage=storage, study_name=f"tailora-{name}", load_if_exists=True)  # minimizes


def _storage(url: str) -> RDBStorage:
    engine = {"connect_args": {"timeout": LOCKED}} if url.startswith("sqlite") else {}
    heartbeat: dict[str, Any] = {"heartbeat_interval": HEARTBEAT, "grace_period": GRACE}
    for attempt in range(CREATIONS):
        try:
            with _experimental():
                return RDBStorage(url, engine, **heartbeat, heartbeat_stale_trial_callback=retry)
        except (IntegrityError, OperationalError, ProgrammingError) as error:
            if attempt == CREATIONS - 1:
                raise _unusable(url, error) from None
            time.sleep(0.1 * 2**attempt)
        except (SQLAlchemyError, ImportError, ValueError) as error:
            raise _unusable(url, error) from None
    raise AssertionError


@contextmanager
def explained_errors(folder: Path, url: str | None) -> Iterator[None]:
    """Converts database errors during a search into ConfigError."""
    try:
        yield
    except (StorageInternalError, SQLAlchemyError, UnboundLocalError) as error:  # the last one hides Optuna's own
        cause: BaseException = error
        while not isinstance(cause, StorageInternalError | SQLAlchemyError):
            if cause.__context__ is None:
                raise
            cause = cause.__context__
        raise ConfigError(
            f"the search lost access to its database {_without_password(url) if url else folder / DATABASE}: "
            f"{_first_line(cause)}. Once it is available again, run the same command to resume the search"
        ) from error


def _first_line(error: BaseException) -> str:
    return str(error.__cause__ or error).splitlines()[0]


def _without_password(url: str) -> str:
    """Replaces passwords in the URL by ***. An unquoted one may contain / and @, so it ends at the last @."""
    url = re.sub(r"(://[^:]*:).*@", r"\1***@", url)
    return re.sub(r"(?i)([?&][^=&]*(?:password|passwd|pwd)=)[^&]*", r"\1***", url)


def _unusable(url: str, error: Exception) -> ConfigError:
    cause = _first_line(error)
    if re.match(r"[^?]*://[^:]*:[^?]*@[^?]*@", url):  # then the cause may quote a part of the password
        cause = "its password contains an @, which must be written as %40"
    return ConfigError(
        f"cannot open --storage {_without_password(url)}: {cause}. Use an SQLAlchemy URL such as sqlite:///study.db or "
        "postgresql+psycopg2://user:password@host/name, and install the database's driver"
    )


# ---- Trials


def retry(study: optuna.Study, trial: FrozenTrial) -> None:
    """Puts the settings of a failed trial back into the queue, unless it was retried RETRIES times."""
    with _experimental():
        RetryHeartbeatStaleTrialCallback(max_retry=RETRIES)(study, trial)


def running_trials(study: optuna.Study) -> list[FrozenTrial]:
    """Returns the trials of live workers. Trials of dead workers are marked as failed and put back into the queue."""
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
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    return [Candidate(**trial.user_attrs[OUTCOME]) for trial in trials if OUTCOME in trial.user_attrs]


# ---- The values of a trial


def sampler(seed: int, number: int) -> TPESampler:
    """Returns the sampler of one trial. Its values depend on seed, number and earlier trials, not on the process.

    Running trials count as bad ones (constant liar), so that two workers do not try almost the same values.
    """
    with _experimental():
        return TPESampler(seed=(seed * 1_000_003 + number) % 2**32, n_startup_trials=RANDOM_TRIALS, constant_liar=True)


def suggest(trial: optuna.Trial, axes: Mapping[str, Axis]) -> dict[str, Any]:
    """Returns a value for every axis. An axis with one value is not searched."""
    values: dict[str, Any] = {}
    for name, axis in axes.items():
        if isinstance(axis, Range):
            values[name] = trial.suggest_float(name, axis.low, axis.high, log=axis.log)
        else:
            values[name] = axis[0] if len(axis) == 1 else trial.suggest_categorical(name, axis)
    return values


# ---- Importances


def importances(trials: Sequence[FrozenTrial]) -> dict[str, float]:
    """Returns each setting's contribution to being in the best quarter (PED-ANOVA, arXiv:2304.10255).

    Pruned and diverged trials count as worse than all others. With too few trials the result is {}.
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
