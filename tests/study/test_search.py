"""A whole search on a tiny model, by processes that share it and one that is killed; and its parts."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tailora.cli.main import main
from tailora.train.config import TrainConfig

TRIALS = 5


def worker(train: TrainConfig, folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tailora.cli", "search", "--model", train.model, "--data", train.data]
    command += ["--dtype", "float32", "--validation-split", "0.3", "--per-device-train-batch-size", "4"]
    command += ["--num-train-epochs", "2", "--output-dir", str(folder), "--trials", str(TRIALS), "--seeds", "2"]
    command += ["--margin", "0.5", "--space", "learning_rate=1e-3..3e-2,r=2,8,target_modules=all-linear,attention"]
    return subprocess.Popen([*command, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(there: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 120
    while not there():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.fixture(scope="module")
def shared(small_run: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]], str]:
    """One process begins and is killed in its second trial; then two start at once and finish."""
    folder = tmp_path_factory.mktemp("search") / "study"
    first = worker(small_run, folder)
    wait_for((folder / "trials" / "0001" / "spec.json").exists, first)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    both = [worker(small_run, folder) for _ in range(2)]
    said = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    return folder, [json.loads(out.splitlines()[-1]) for out, _ in said], "".join(err for _, err in said)


@pytest.mark.slow
def test_processes_share_trials_and_those_of_a_killed_one_are_run_again(
    shared: tuple[Path, list[dict[str, Any]], str],
) -> None:
    folder, found, said = shared
    for each in found:
        assert len(each["trials"]) == TRIALS
        assert sum(trial["state"] == "done" for trial in each["trials"]) >= 1
        assert 1 not in [trial["number"] for trial in each["trials"]]  # it was never finished
    assert found[0]["trials"] == found[1]["trials"]
    assert found[0]["best"] == found[1]["best"]
    assert "1 trial of a process that ended early will be run again" in said
    lost = json.loads((folder / "trials" / "0001" / "spec.json").read_text())["settings"]
    again = [json.loads(path.read_text())["settings"] for path in folder.glob("trials/*/spec.json")]
    assert again.count(lost) == 2
    assert said.count("timing 4 steps") == 0  # planned once, by the first


@pytest.mark.slow
def test_a_finished_search_is_read_and_its_yaml_trains(
    shared: tuple[Path, list[dict[str, Any]], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, found, _ = shared
    report = json.loads((folder / "report.json").read_text())
    assert report["kind"] == "search"
    assert report["best"] == found[0]["best"]
    assert {"best", "cheapest", "trials", "importances"} <= report.keys()
    best = report["best"]
    assert best["eval_loss"] < report["base_loss"]
    assert best["interval"][0] < best["eval_loss"] < best["interval"][1]
    assert report["cheapest"]["trainable_parameters"] <= best["trainable_parameters"]
    assert report["seeds"] == [1, 2]
    chosen = yaml.safe_load((folder / "best.yaml").read_text())
    assert chosen["learning_rate"] == best["settings"]["learning_rate"]
    assert chosen["r"] == best["settings"]["r"]
    command = ["train", "--config", str(folder / "best.yaml"), "--max-steps", "2", "--samples", "0", "--json"]
    assert main([*command, "--output-dir", str(tmp_path / "run")]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["trainable_parameters"] == best["trainable_parameters"]
