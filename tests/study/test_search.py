"""A whole search on a tiny model, by workers that share it, one of which is killed."""

import json
import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from command_line import check_refused, found
from optuna.exceptions import StorageInternalError
from search_worker import GRACE, HEARTBEAT, work
from sqlalchemy.exc import OperationalError

from tailora.cli.main import main
from tailora.errors import ConfigError
from tailora.report.files import write_page
from tailora.study import optuna_study
from tailora.study.config import SearchConfig
from tailora.study.search import search
from tailora.study.study_store import StudySession
from tailora.study.trial import Listen, Trial, TrialSpec, run_here
from tailora.train.config import TrainConfig
from tailora.train.config_file import read_config_file

STUDY = {
    "trials": 4,
    "seeds": 2,
    "margin": 0.5,
    "finalists": 2,
    "space": {"learning_rate": "1e-3..3e-2", "r": "2,8", "target_modules": "all-linear,attention"},
}


def wait_for(there: Callable[[], bool], process: BaseProcess) -> None:
    while not there():
        assert process.is_alive()
        time.sleep(0.05)


Shared = tuple[Path, list[dict[str, Any]], str]


@pytest.fixture(scope="module")
def shared(small_run: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Shared:
    """One worker begins, and is killed in its second trial; another one goes on, and this process joins it."""
    outputs = tmp_path_factory.mktemp("search")
    folder, log, result = outputs / "study", outputs / "log.txt", outputs / "result.json"
    train = TrainConfig(**{**small_run.model_dump(exclude_unset=True, exclude={"r"}), "output_dir": str(folder)})
    context = multiprocessing.get_context("forkserver")  # which imports once for all workers
    context.set_forkserver_preload(["tailora.study.search", "tailora.train.trainer"])
    settings = train.model_dump(exclude_unset=True), STUDY, log, result
    first, second = (context.Process(target=work, args=settings, kwargs={"stuck_in": name}) for name in ("0001", None))
    first.start()
    wait_for((folder / "trials" / "0001" / "spec.json").exists, first)
    first.kill()
    first.join()
    log.unlink()
    second.start()
    wait_for((folder / "trials" / "0002" / "spec.json").exists, second)
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optuna_study, "HEARTBEAT", HEARTBEAT)
        patch.setattr(optuna_study, "GRACE", GRACE)
        here = search(train, SearchConfig(**STUDY), lines.append, run_trial=run_here)
    second.join()
    assert second.exitcode == 0
    results = [json.loads(result.read_text()), json.loads(json.dumps(here.to_dict()))]
    return folder, results, "\n".join([log.read_text(), *lines])


@pytest.mark.slow
@pytest.mark.ranks
def test_workers_share_trials_and_that_of_a_killed_one_is_run_again(shared: Shared) -> None:
    folder, results, log = shared
    for result in results:
        assert len(result["trials"]) == STUDY["trials"]
        assert sum(trial["state"] == "done" for trial in result["trials"]) >= 1
        assert 1 not in [trial["number"] for trial in result["trials"]]  # it was never finished
    assert results[0]["trials"] == results[1]["trials"]
    assert results[0]["best"] == results[1]["best"]
    lost = json.loads((folder / "trials" / "0001" / "spec.json").read_text())["settings"]
    settings = [json.loads(path.read_text())["settings"] for path in folder.glob("trials/*/spec.json")]
    assert settings.count(lost) == 2
    assert log.count("running 4 steps") == 0  # planned once, by the first


@pytest.mark.slow
@pytest.mark.ranks
def test_a_finished_search_is_read_and_its_yaml_trains(shared: Shared, tmp_path: Path) -> None:
    folder, results, _ = shared
    report = json.loads((folder / "report.json").read_text())
    assert report["kind"] == "search"
    assert report["best"] == results[0]["best"]
    assert {"best", "cheapest", "trials", "importances"} <= report.keys()
    best = report["best"]
    assert best["eval_loss"] < report["base_loss"]
    assert best["interval"][0] < best["eval_loss"] < best["interval"][1]
    assert report["cheapest"]["trainable_parameters"] <= best["trainable_parameters"]
    assert report["seeds"] == [1, 2]
    chosen = read_config_file(folder / "best.yaml")
    assert chosen["learning_rate"] == best["settings"]["learning_rate"]
    assert chosen["r"] == best["settings"]["r"]
    command = ["train", "--config", folder / "best.yaml", "--max-steps", 2, "--metric-examples", 0]
    assert found(*command, "--output-dir", tmp_path / "run")["trainable_parameters"] == best["trainable_parameters"]


@pytest.mark.slow
def test_an_interrupted_trial_is_tried_again_when_the_search_goes_on(small_run: TrainConfig, tmp_path: Path) -> None:
    train = small_run.replaced(output_dir=str(tmp_path / "study"), max_steps=3)
    study = SearchConfig(trials=2, seeds=1, finalists=1, space={"learning_rate": "1e-3..3e-2"})

    def interrupted(spec: Any, folder: Path, listen: Any) -> Any:
        if folder.name == "0000":
            raise KeyboardInterrupt
        return run_here(spec, folder, listen)

    with pytest.raises(KeyboardInterrupt):
        search(train, study, run_trial=interrupted)
    result = search(train, study, run_trial=run_here)
    assert [trial.number for trial in result.trials] == [1, 2]
    first, again = (
        json.loads((tmp_path / "study" / "trials" / name / "spec.json").read_text())["settings"]
        for name in ("0000", "0001")
    )
    assert first == again


@pytest.mark.slow
@pytest.mark.parametrize("task", ["labels", pytest.param("seq2seq", marks=pytest.mark.exhaustive)])
def test_labels_and_sequence_to_sequence_are_searched(
    task: str, labels_run: TrainConfig, seq2seq_run: TrainConfig, tmp_path: Path
) -> None:
    train = {"labels": labels_run, "seq2seq": seq2seq_run}[task]
    train = TrainConfig(**train.model_dump(exclude_unset=True, exclude={"learning_rate"}))
    train = train.replaced(output_dir=str(tmp_path / "study"))
    space = {"learning_rate": "1e-3..3e-2", "target_modules": "all-linear,attention"}
    result = search(train, SearchConfig(trials=2, seeds=1, finalists=1, space=space), run_trial=run_here)
    assert [trial.state for trial in result.trials if trial.number == result.best.number] == ["done"]
    assert result.loss_unit == {"labels": "nats per row", "seq2seq": "nats per token"}[task]
    assert result.best.eval_loss < result.base_loss
    page = write_page(tmp_path / "study").read_text()
    assert result.loss_unit in page
    chosen = read_config_file(tmp_path / "study" / "best.yaml")
    assert chosen["task"] == train.task
    command = ["train", "--config", tmp_path / "study" / "best.yaml", "--metric-examples", 0]
    assert "eval_loss_after" in found(*command, "--output-dir", tmp_path / "run")


@pytest.mark.slow
def test_no_trial_starts_after_the_minutes(
    small_run: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After two trials, then after one final run; the same search later has all of them."""
    ran: list[str] = []

    def counted(spec: TrialSpec, folder: Path, listen: Listen) -> Trial:
        ran.append(folder.parent.name)
        return run_here(spec, folder, listen)

    most = 3  # with the probe
    monkeypatch.setattr(StudySession, "is_over", property(lambda _: len(ran) >= most))
    train = small_run.replaced(output_dir=str(tmp_path / "study"), max_steps=3)
    study = SearchConfig(minutes=60, trials=3, seeds=2, finalists=1, space={"learning_rate": "1e-3..3e-2"})
    with pytest.raises(ConfigError, match=r"no verdict yet: --minutes 60 were over after the trials, .*; trial \d"):
        search(train, study, run_trial=counted)
    assert ran == ["study", "trials", "trials"]
    most = 5
    result = search(train, study, run_trial=counted)
    assert ran[3:] == ["trials", *ran[4:]]
    assert result.seeds == [1]
    assert "--minutes 60 left time for 1 of 2 final runs; the same command with a higher --minutes" in result.notes[0]
    most = 99
    assert search(train, study, run_trial=counted).seeds == [1, 2]
    assert len(ran) == 6


@pytest.mark.parametrize("is_hidden", [False, True])
def test_a_database_that_fails_in_the_middle_of_a_search_is_named(
    is_hidden: bool, small_run: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(*_: Any) -> None:
        try:
            raise StorageInternalError("lost") from OperationalError("SELECT", None, Exception("server closed"))
        finally:
            if is_hidden:  # as in Optuna, if the database stops during a trial
                raise UnboundLocalError("cannot access local variable 'updated_state'")

    monkeypatch.setattr(optuna_study, "open_study", lose)
    train = small_run.replaced(output_dir=str(tmp_path / "study"))
    with pytest.raises(
        ConfigError,
        match=r"lost access to its database postgresql://me:\*\*\*@host/name: .*server closed.*same command",
    ):
        search(train, SearchConfig(storage="postgresql://me:secret@host/name"))
    with pytest.raises(UnboundLocalError, match="a bug"), optuna_study.explained_errors(tmp_path, None):
        raise UnboundLocalError("a bug")


def test_the_command_says_what_is_wrong_with_a_search(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("trials: 3\nspace: {r: [4, 8], lr: 1e-4..1e-3}\nr: 4\n")
    hint = "r: set to a fixed value and also listed in --space"
    check_refused(hint, "search", "--config", tmp_path / "run.yaml", "--output-dir", tmp_path / "out")
    assert main(["search", "--trials", "1"]) == 2
    assert main(["search", "--space", "ranks=4"]) == 2
