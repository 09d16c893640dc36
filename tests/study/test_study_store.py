"""The folder of a study: whose it is, and one process at a time."""

import math
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from filelock import BaseFileLock

from tailora.errors import ConfigError, FormatError
from tailora.study.config import SearchConfig
from tailora.study.search import SearchPlan, search
from tailora.study.study_store import PLAN, StudySession, locked, open_folder
from tailora.study.trial import Trial, TrialSpec, get_trial, run_here
from tailora.train.config import TrainConfig


def opened(folder: Path, r: int, **removed: object) -> None:
    begun = (folder / PLAN).exists()
    folder.mkdir(exist_ok=True)
    open_folder(folder, "search.json", {"train": {"r": r, **removed}}, begun=begun)


def test_a_study_with_other_settings_is_refused(small_run: TrainConfig, tmp_path: Path) -> None:
    opened(tmp_path / "study", 0)
    (tmp_path / "study" / "probe").mkdir()
    opened(tmp_path / "study", 1, deltaT=1, lora_bias=False)  # there are no results of the first
    assert not (tmp_path / "study" / "probe").exists()
    (tmp_path / "study" / PLAN).write_text("{}")
    opened(tmp_path / "study", 1)
    with pytest.raises(ConfigError, match="contains a search with different settings"):
        search(small_run.replaced(output_dir=str(tmp_path / "study")), SearchConfig(trials=2))
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty and contains no search"):
        search(small_run.replaced(output_dir=str(tmp_path)), SearchConfig(trials=2))
    assert not (tmp_path / ".lock").exists()


def test_a_damaged_file_of_a_study_is_named(tmp_path: Path) -> None:
    opened(tmp_path, 1)
    session = StudySession(tmp_path, None, print, None, run_here)
    for content in ("{", "[" * 100_000, "[]", "null", '{"parts": {}}', '{"plan": 1, "parts": {}}'):
        (tmp_path / PLAN).write_text(content)
        with pytest.raises(
            FormatError, match=r"plan\.json is (not JSON|damaged) *.*delete this folder and start again"
        ):
            session.plan(pytest.fail, SearchPlan)
    for content in ("{", "[]", "{}", '{"train": []}'):
        (tmp_path / "search.json").write_text(content)
        with pytest.raises(FormatError, match=r"search\.json is (not JSON|damaged)"):
            opened(tmp_path, 1)


@pytest.mark.parametrize("name", ["spec.json", "trial.json"])
@pytest.mark.parametrize("content", ["{", "[]", '{"outcome": "done", "settings": 1}', None])
def test_a_damaged_trial_is_named(tmp_path: Path, name: str, content: str | None) -> None:
    spec, trial = TrialSpec({}, left_out=[3]), Trial("diverged", "", curve=[(1, math.nan)])
    get_trial(spec, tmp_path, run_trial=lambda *_: trial)
    assert repr(get_trial(spec, tmp_path, run_trial=run_here)) == repr(trial)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_text(content)
    if content is None and name == "trial.json":  # then it is run
        return
    with pytest.raises(FormatError, match=rf"{name} .*; delete {tmp_path} and run the same command again"):
        get_trial(spec, tmp_path, run_trial=run_here)


def test_workers_begin_at_the_same_time(tmp_path: Path) -> None:
    (tmp_path / ".search.json.abcdefgh").touch()  # the first worker is writing it
    with locked(tmp_path, "search.json"):
        pass
    with pytest.raises(ConfigError, match="contains no comparison"), locked(tmp_path, "compare.json"):
        pass


def test_one_process_at_a_time(tmp_path: Path) -> None:
    def lock(*, wait: bool = True) -> AbstractContextManager[BaseFileLock]:
        return locked(tmp_path, "search.json", wait=wait)

    with lock(), pytest.raises(ConfigError, match="another search is writing to"), lock(wait=False):
        pass
    with lock(wait=False):
        pass
