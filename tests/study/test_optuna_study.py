"""Optuna's part of a search: its database, the trials of workers that die, and importances."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy import MetaData
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError, ProgrammingError

from tailora.errors import ConfigError
from tailora.study import optuna_study
from tailora.study.optuna_study import finished_trials, importances, open_study, running_trials
from tailora.study.results import Candidate

SETTINGS = {"train": {"r": 1}}


def candidate(number: int, loss: float) -> Candidate:
    return Candidate(number, "done", {"x": 0.5}, loss, 10, 1.0)


class Killed(BaseException):
    """Ends a trial as a killed process does: Optuna does not hear of it."""


def die(study: optuna.Study) -> FrozenTrial:
    """A trial whose worker has suggested its values and sent one heartbeat, and is gone."""

    def objective(trial: optuna.Trial) -> float:
        trial.suggest_float("x", 0, 1)
        raise Killed

    with pytest.raises(Killed):
        study.optimize(objective, n_trials=1)
    return study.get_trials()[-1]


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_trial_of_a_dead_worker_is_run_again_and_given_up_after_a_few_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optuna_study, "HEARTBEAT", 1)
    monkeypatch.setattr(optuna_study, "GRACE", 1)
    study = open_study(tmp_path, None, SETTINGS)
    values = [die(study).params["x"]]
    assert len(running_trials(study)) == 1  # it may be alive
    for retries in range(1, optuna_study.RETRIES + 1):
        time.sleep(2.1)
        assert running_trials(study) == []
        assert running_trials(open_study(tmp_path, None, SETTINGS)) == []  # once, by whoever looks
        waiting = study.get_trials(states=(TrialState.WAITING,))
        assert [trial.params["x"] for trial in waiting] == values
        assert die(study).params["x"] == values[0]
        assert len(study.get_trials()) == retries + 1
    time.sleep(2.1)
    assert running_trials(study) == []
    assert study.get_trials(states=(TrialState.WAITING,)) == []


@pytest.mark.slow
@pytest.mark.ranks
def test_a_worker_that_lives_keeps_its_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optuna_study, "HEARTBEAT", 1)
    monkeypatch.setattr(optuna_study, "GRACE", 3)
    study, other = (open_study(tmp_path, None, SETTINGS) for _ in range(2))
    counts: list[int] = []

    def objective(trial: optuna.Trial) -> float:
        trial.suggest_float("x", 0, 1)
        time.sleep(4.5)
        counts.append(len(running_trials(other)))
        trial.set_user_attr("outcome", candidate(trial.number, 2.0).__dict__)
        return 2.0

    study.optimize(objective, n_trials=1)
    assert counts == [1]
    assert finished_trials(other) == [candidate(0, 2.0)]


def test_a_trial_without_a_heartbeat_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = open_study(tmp_path, None, SETTINGS)
    study.enqueue_trial({"x": 0.25})
    with pytest.warns(UserWarning, match="Heartbeat"):
        study.ask()  # its worker dies at once
    assert len(running_trials(study)) == 1
    monkeypatch.setattr(optuna_study, "GRACE", -1)
    assert running_trials(study) == []
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
    assert study.best_value == 0.25


@pytest.mark.parametrize("error", [IntegrityError, ProgrammingError, OperationalError])
def test_tables_that_another_worker_creates_at_the_same_time_are_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[DBAPIError]
) -> None:
    """What PostgreSQL raises when both create them, by the exceptions that SQLAlchemy makes of it."""
    create_all = MetaData.create_all
    failures = [error("CREATE TABLE", None, Exception("pg_type_typname_nsp_index"))]

    def collide(*args: Any, **kwargs: Any) -> None:
        create_all(*args, **kwargs)  # by the other worker
        if failures:
            raise failures.pop()

    monkeypatch.setattr(MetaData, "create_all", collide)
    assert open_study(tmp_path, None, SETTINGS).get_trials() == []
    assert not failures


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://me:sec/ret@s@host/name", "postgresql://me:***@host/name"),
        ("postgresql://me@home:secret@host/name", "postgresql://me@home:***@host/name"),
        ("postgresql:///name?user=me&password=secret&x=1", "postgresql:///name?user=me&password=***&x=1"),
        ("postgresql://host:5432/name?sslPassword=secret", "postgresql://host:5432/name?sslPassword=***"),
        ("sqlite:///folder/study.db", "sqlite:///folder/study.db"),
    ],
)
def test_passwords_are_hidden(url: str, shown: str) -> None:
    assert optuna_study._without_password(url) == shown


def test_a_database_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot open --storage nonsense: Could not parse"):
        open_study(tmp_path, "nonsense", SETTINGS)
    with pytest.raises(ConfigError) as refusal:
        open_study(tmp_path, "nonsense://me:secret@host/name", SETTINGS)
    assert "cannot open --storage nonsense://me:***@host/name:" in str(refusal.value)
    assert "secret" not in str(refusal.value)
    with pytest.raises(ConfigError, match=r"postgresql://me:\*\*\*@host/name: .* written as %40") as refusal:
        open_study(tmp_path, "postgresql://me:sec@ret:x@host/name", SETTINGS)
    assert "ret:x" not in str(refusal.value)
    with pytest.raises(ConfigError, match=r"cannot open --storage .*: unable to open database file"):
        open_study(tmp_path, f"sqlite:///{tmp_path}/none/study.db", SETTINGS)


def test_the_setting_that_matters_has_the_importance() -> None:
    rng = np.random.default_rng(0)
    rates = FloatDistribution(1e-4, 1e-2, log=True)
    ranks = CategoricalDistribution((2, 4, 8))

    def tried() -> FrozenTrial:
        rate, r = float(10 ** rng.uniform(-4, -2)), int(rng.choice([2, 4, 8]))
        pruned = rate > 5e-3  # ended early: it has no value, and is worse than all
        return create_trial(
            state=TrialState.PRUNED if pruned else TrialState.COMPLETE,
            params={"learning_rate": rate, "r": r},
            distributions={"learning_rate": rates, "r": ranks},
            value=None if pruned else abs(np.log10(rate) + 3),
        )

    trials = [tried() for _ in range(40)]
    found = importances(trials)
    assert sum(found.values()) == pytest.approx(1)
    assert found["learning_rate"] > 0.8
    assert importances(trials[:5]) == {}
