"""One trial: in a process of its own and in this one, ended early, failed, and read again."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from tailora.errors import ConfigError, DataError
from tailora.study import trial as trial_module
from tailora.study.compare import compare
from tailora.study.config import trial_settings
from tailora.study.lr_range import find_range
from tailora.study.search import search
from tailora.study.trial import (
    COMMAND,
    Listen,
    Trial,
    TrialEvent,
    TrialSpec,
    choosing_half,
    get_trial,
    judging_half,
    main,
    on_choosing_half,
    run_here,
    run_in_subprocess,
)
from tailora.train.config import TrainConfig


def settings(train: TrainConfig, **changes: Any) -> dict[str, Any]:
    return trial_settings(train, {"learning_rate": 1e-2, "max_steps": 3, **changes})


def not_run(*_: Any) -> Trial:
    raise AssertionError("the trial is there")


@pytest.fixture(scope="module")
def plain(small_run: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Trial:
    """A whole trial, in a process of its own."""
    folder = tmp_path_factory.mktemp("trials") / "plain"
    spec = TrialSpec(settings(small_run), forgetting="")
    trial = get_trial(spec, folder)
    assert (folder / "run" / "adapter").is_dir()
    assert get_trial(spec, folder, run_trial=not_run) == trial
    return trial


@pytest.mark.slow
def test_a_process_of_its_own_gives_the_same_as_this_one(
    plain: Trial, small_run: TrainConfig, tmp_path: Path, progress: Any
) -> None:
    here = get_trial(
        TrialSpec(settings(small_run), forgetting="", keep=False),
        tmp_path / "here",
        progress=progress,
        run_trial=run_here,
    )
    assert (here.outcome, here.sums, here.before, here.losses) == ("done", plain.sums, plain.before, plain.losses)
    assert here.curve == plain.curve
    assert progress.steps == [(1, 3), (2, 3), (3, 3)]
    assert progress.ended == [1]
    assert not (tmp_path / "here" / "run").exists()


@pytest.mark.slow
def test_what_is_known_of_the_base_is_not_computed_again(plain: Trial, small_run: TrainConfig, tmp_path: Path) -> None:
    shared = TrialSpec(settings(small_run), forgetting="", before=plain.base, texts=str(tmp_path / "texts.json"))
    trials = [get_trial(shared, tmp_path / name, run_trial=run_here) for name in ("first", "second")]
    assert len(plain.evaluation_seconds) == 2
    for trial in trials:
        assert len(trial.evaluation_seconds) == 1
        assert (trial.before, trial.sums, trial.losses) == (plain.before, plain.sums, plain.losses)
        assert trial.forgetting == plain.forgetting
        assert np.array(trial.curve) == pytest.approx(np.array(plain.curve))
        assert trial.numbers["eval_loss_before"] == plain.numbers["eval_loss_before"]
    base = on_choosing_half(plain.base)
    half = get_trial(replace(shared, choosing=True, before=base), tmp_path / "half", run_trial=run_here)
    assert base is not None
    assert half.before == base[0]
    assert half.counts == base[1]
    assert half.sums == pytest.approx([plain.sums[index] for index in choosing_half(len(plain.sums))])
    few = replace(shared, held_out=6, before=None)
    judged, chosen = (
        get_trial(
            replace(few, choosing=choosing),
            tmp_path / f"few-{choosing}",
            run_trial=run_here,
        )
        for choosing in (False, True)
    )
    assert len(judged.sums) == 6
    assert chosen.sums == pytest.approx([judged.sums[index] for index in choosing_half(6)])  # not the judging half


def test_a_trial_that_is_stopped_keeps_what_it_reported(small_run: TrainConfig, tmp_path: Path) -> None:
    events: list[TrialEvent] = []

    def stop(event: TrialEvent) -> str | None:
        events.append(event)
        return "bad" if event.held_out and event.step == 2 else None

    spec = TrialSpec(settings(small_run, max_steps=400, eval_steps=2), keep=False, choosing=True)
    trial = get_trial(spec, tmp_path, stop=stop, run_trial=run_here)
    assert (trial.outcome, trial.message) == ("pruned", "bad")
    assert [step for step, _ in trial.curve] == [0, 2]
    assert trial.parameters == events[0].parameters > 0
    assert trial.losses[:2] == [event.loss for event in events if not event.held_out][:2]
    assert not (tmp_path / "run").exists()
    assert get_trial(spec, tmp_path, run_trial=not_run) == trial


def test_a_trial_that_diverges_is_a_result(small_run: TrainConfig, tmp_path: Path) -> None:
    spec = TrialSpec(settings(small_run, learning_rate=1e30, max_steps=4))
    trial = get_trial(spec, tmp_path / "trial", run_trial=run_here)
    assert trial.outcome == "diverged"
    assert trial.loss() == np.inf
    assert not (tmp_path / "trial" / "run").exists()


# ---- The process: what it sends, and how it ends. A script stands for the training.

EVENTS = """
import itertools, json, pathlib, sys, time
pathlib.Path(sys.argv[1], "run").mkdir()
for step in itertools.count():
    event = {"step": step, "steps": 9, "loss": 4.0 - step, "held_out": step % 2 == 0, "parameters": 7, "seconds": 0.1}
    print(json.dumps(event), flush=True)
    time.sleep(0.05)
"""


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch) -> TrialSpec:
    """A trial whose process reports steps and evaluations without end."""
    monkeypatch.setattr(trial_module, "COMMAND", (sys.executable, "-c", EVENTS))
    return TrialSpec({})


def test_a_process_that_is_stopped_keeps_what_it_reported(endless: TrialSpec, tmp_path: Path) -> None:
    others = psutil.Process().children()  # of other tests
    trial = get_trial(endless, tmp_path, stop=lambda event: "bad" if event.step == 2 else None)
    assert (trial.outcome, trial.message, trial.parameters) == ("pruned", "bad", 7)
    assert trial.curve == [(0, 4.0), (2, 2.0)]
    assert trial.losses == [3.0]
    assert not (tmp_path / "run").exists()
    assert psutil.Process().children() == others
    assert get_trial(endless, tmp_path, run_trial=not_run) == trial


@pytest.mark.slow
def test_a_process_ends_when_the_one_that_started_it_is_killed(small_run: TrainConfig, tmp_path: Path) -> None:
    spec = TrialSpec(settings(small_run, max_steps=1_000_000))
    (tmp_path / "spec.json").write_text(json.dumps(asdict(spec)))
    pipe = subprocess.PIPE
    with (
        (tmp_path / "log.txt").open("w") as log,
        subprocess.Popen([*COMMAND, str(tmp_path)], stdin=pipe, stdout=pipe, stderr=log) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        assert b"loss" in process.stdout.readline()
        process.stdin.close()  # as the system does
        assert process.wait(timeout=60) == 1
    assert not (tmp_path / "log.txt").read_text()  # no warnings of the packages that transformers imports


def test_a_process_that_the_system_kills_is_a_result(endless: TrialSpec, tmp_path: Path) -> None:
    others = psutil.Process().children()  # of other tests

    def kill(_: TrialEvent) -> None:
        (process,) = set(psutil.Process().children()) - set(others)
        process.kill()

    trial = get_trial(endless, tmp_path, stop=kill)
    assert trial.outcome == "out of memory"
    assert "killed by the system" in trial.message
    assert len(trial.curve) == 1  # what was reported before
    assert not (tmp_path / "run").exists()
    assert get_trial(endless, tmp_path, run_trial=not_run) == trial


def test_an_error_of_the_process_is_raised_here(
    small_run: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = TrialSpec(settings(small_run, data=str(tmp_path / "none.jsonl")))

    def fail(spec: TrialSpec, folder: Path, listen: Listen) -> Trial:
        assert main(folder) == 1  # what the process does
        return run_in_subprocess(spec, folder, listen)

    monkeypatch.setattr(trial_module, "COMMAND", (sys.executable, "-c", "raise SystemExit(1)"))
    with pytest.raises(DataError, match=r"none\.jsonl"):
        get_trial(spec, tmp_path / "trial", run_trial=fail)


def test_a_trial_with_other_settings_is_refused(small_run: TrainConfig, tmp_path: Path) -> None:
    def none_done(*_: Any) -> Trial:
        return Trial("diverged", "", {}, [], [], [], None, 0)

    spec = TrialSpec(settings(small_run))
    get_trial(spec, tmp_path, run_trial=none_done)
    get_trial(replace(spec, before=([1.0], [1])), tmp_path, run_trial=not_run)  # no setting
    with pytest.raises(ConfigError, match="a trial with other settings"):
        get_trial(replace(spec, settings=settings(small_run, r=2)), tmp_path, run_trial=not_run)


@pytest.mark.parametrize("study", [compare, search, find_range])
def test_studies_start_a_process_for_each_trial(study: Callable[..., Any]) -> None:
    assert signature(study).parameters["run_trial"].default is run_in_subprocess


def test_the_halves_of_the_held_out_examples_are_all_of_them() -> None:
    assert sorted([*choosing_half(41), *judging_half(41)]) == list(range(41))
    with pytest.raises(ConfigError, match="1 distinct held-out example is too few"):
        judging_half(1)
