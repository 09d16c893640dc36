"""A whole search on a tiny model, by processes that share it and one that is killed; and its parts."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from tailora.cli.main import main
from tailora.errors import ConfigError
from tailora.study import study_store as folders
from tailora.study.budget import Costs, planned, read_plan
from tailora.study.config import SearchConfig
from tailora.study.judging import finalists, judge
from tailora.study.results import Candidate
from tailora.study.search import axes, importances, search
from tailora.study.search_space import DEFAULT, Range, at_edge, read_space, searched, settings, start
from tailora.study.trial import Spec, Told, Trial, choosing_half, halves, try_out
from tailora.train.config import TrainConfig
from tailora.train.config_file import read_config_file

TRIALS = 4


def worker(train: TrainConfig, folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tailora.cli", "search", "--model", train.model, "--data", train.data]
    command += ["--dtype", "float32", "--validation-split", "0.3", "--per-device-train-batch-size", "4"]
    command += ["--num-train-epochs", "2", "--output-dir", str(folder), "--trials", str(TRIALS), "--seeds", "2"]
    command += [
        "--margin",
        "0.5",
        "--finalists",
        "2",
        "--space",
        "learning_rate=1e-3..3e-2,r=2,8,target_modules=all-linear,attention",
    ]
    return subprocess.Popen([*command, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(there: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while not there():
        assert process.poll() is None, process.communicate()
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
    said = [process.communicate() for process in both]
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
    chosen = read_config_file(folder / "best.yaml")
    assert chosen["learning_rate"] == best["settings"]["learning_rate"]
    assert chosen["r"] == best["settings"]["r"]
    command = ["train", "--config", str(folder / "best.yaml"), "--max-steps", "2", "--samples", "0", "--json"]
    assert main([*command, "--output-dir", str(tmp_path / "run")]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["trainable_parameters"] == best["trainable_parameters"]


def test_a_trial_is_ended_by_who_listens_and_keeps_what_it_said(small_run: TrainConfig, tmp_path: Path) -> None:
    heard: list[Told] = []

    def judged(told: Told) -> str | None:
        heard.append(told)
        return "bad" if told.held_out and told.step == 2 else None

    given = small_run.model_dump(exclude_unset=True) | {"max_steps": 400, "eval_steps": 2, "samples": 0}
    trial = try_out(Spec(given, keep=False, choosing=True), tmp_path, judge=judged)
    assert (trial.outcome, trial.message) == ("pruned", "bad")
    assert [step for step, _ in trial.curve] == [0, 2]
    assert trial.parameters == heard[0].parameters > 0
    assert trial.losses[:2] == [told.loss for told in heard if not told.held_out][:2]
    assert not (tmp_path / "run").exists()
    assert try_out(Spec(given, keep=False, choosing=True), tmp_path) == trial  # read, not made again


# ---- what is searched


def test_a_space_is_read_from_text_lists_and_ranges() -> None:
    space = read_space(
        {"rank": "4..48", "lr": "1e-4..1e-2", "targets": ["attention", "q_proj+v_proj"], "dropout": "0..0.2"}
    )
    assert space == {
        "r": (4, 8, 16, 32, 48),
        "learning_rate": Range(1e-4, 1e-2),
        "target_modules": ("attention", "q_proj+v_proj"),
        "lora_dropout": Range(0.0, 0.2, log=False),
    }
    assert read_space({"use_dora": "true,false", "init_lora_weights": "pissa"}) == {
        "use_dora": (True, False),
        "init_lora_weights": ("pissa",),
    }


@pytest.mark.parametrize(
    ("space", "told"),
    [
        ({"ranks": "4"}, "unknown setting 'ranks'; did you mean rank"),
        ({"model": "x"}, "model is the same in all trials"),
        ({"r": "0,4"}, "greater than or equal to 1"),
        ({"learning_rate": "1e-2..1e-4"}, "0.01 is not below 0.0001"),
        ({"orth_reg_weight": "0..1"}, "no logarithm"),
        ({"scale": "1,2", "alpha": "8"}, "give one of scale and lora_alpha"),
        ({"r": "4", "rank": "8"}, "r is given twice"),
        ({"r": []}, "no value"),
        ({"rank_pattern": "x"}, "patterns"),
        ({"use_dora": "1..3"}, "boolean"),
        ({"ranks": "4", "r": "x"}, "ranks.*valid integer"),
    ],
)
def test_a_space_that_makes_no_sense_is_refused(space: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){told}"):
        SearchConfig(space=space)


def test_settings_that_have_a_value_are_not_searched() -> None:
    assert "r" not in searched({}, TrainConfig(r=8))
    assert searched({}, TrainConfig()) == DEFAULT
    assert list(searched({}, TrainConfig(adapter="there"))) == ["learning_rate"]
    assert "lora_alpha" not in searched(read_space({"scale": "1,2"}), TrainConfig())
    with pytest.raises(ConfigError, match="given a value and a space"):
        searched(read_space({"r": "4,8"}), TrainConfig(r=8))
    with pytest.raises(ConfigError, match="compare"):
        searched({}, TrainConfig(method="full", learning_rate=1e-5))
    one = {"learning_rate": 1e-4, "r": 4, "lora_alpha": 8, "target_modules": "all-linear", "lora_dropout": 0.1}
    with pytest.raises(ConfigError, match="nothing to search"):
        searched({}, TrainConfig(**one, loraplus_lr_ratio=2))


def test_a_trial_has_the_settings_that_its_words_mean() -> None:
    groups = {"attention": ["q_proj", "o_proj"], "mlp": ["up_proj"], "largest_r": 16}
    train = TrainConfig(r=8)
    assert settings({"scale": 2.0, "target_modules": "attention"}, groups, train) == {
        "lora_alpha": 16.0,
        "target_modules": ["q_proj", "o_proj"],
    }
    assert settings({"scale": 2.0, "r": 4}, groups, train)["lora_alpha"] == 8.0
    assert settings({"target_modules": "q_proj+v_proj"}, groups, train)["target_modules"] == ["q_proj", "v_proj"]
    assert settings({"target_modules": "all-linear"}, groups, train)["target_modules"] == "all-linear"
    assert settings({"scale": 2.0, "r": 4}, groups, TrainConfig(use_rslora=True))["lora_alpha"] == 4.0


def test_a_search_begins_with_the_settings_of_the_run_or_the_nearest() -> None:
    space = read_space({"r": "2,4", "lr": "1e-3..1e-2", "targets": "mlp,attention", "dropout": "0,0.1"})
    begins = {"r": 4, "learning_rate": 1e-3, "target_modules": "mlp", "lora_dropout": 0.0}
    assert start(space, TrainConfig()) == begins


def test_ranks_that_the_model_has_no_room_for_are_left_out_or_refused() -> None:
    parts = {"attention": ["q"], "mlp": ["up"], "largest_r": 8}
    noted: list[str] = []
    assert axes(DEFAULT, parts, {}, noted.append)["r"] == (2, 4, 8)
    assert "ranks up to 8" in noted[0]
    given = read_space({"r": "4,64"})
    with pytest.raises(ConfigError, match=r"r = 64.*up to 8"):
        axes({**DEFAULT, **given}, parts, given, noted.append)
    assert axes(DEFAULT, {"largest_r": 99}, {}, noted.append)["target_modules"] == ("all-linear",)


def test_the_edge_of_a_range_is_told() -> None:
    assert at_edge(Range(1e-4, 1e-2), 9e-3)
    assert at_edge(Range(1e-4, 1e-2), 1.1e-4)
    assert not at_edge(Range(1e-4, 1e-2), 1e-3)
    assert not at_edge((2, 4), 2)


# ---- how long

COSTS = Costs(fixed=12, step=2, evaluation=2)


def test_the_steps_of_a_trial_fill_the_time() -> None:
    plan = planned(COSTS, longest=500, seconds=1800, trials=10, finals=6)
    expected = 10 * COSTS.trial(plan.steps, 7 / 12) + 6 * COSTS.final(plan.steps)
    assert 0.85 * 1800 < expected <= 0.9 * 1800
    assert planned(COSTS, longest=20, seconds=1800, trials=10, finals=6).steps == 20
    assert planned(COSTS, longest=500, seconds=np.inf, trials=10, finals=6).steps == 500
    assert read_plan(json.loads(json.dumps(plan.to_dict()))) == plan
    fewer = planned(COSTS, longest=500, seconds=520, trials=None, finals=6)
    assert fewer.steps >= 9


def test_too_little_time_is_refused_with_what_it_needs() -> None:
    with pytest.raises(
        ConfigError, match=r"10 trials of 9 steps and 6 runs that judge take about 9 minutes.*--minutes"
    ):
        planned(COSTS, longest=500, seconds=60, trials=10, finals=6)


# ---- which are chosen


def candidate(number: int, loss: float, parameters: int, state: str = "done") -> Candidate:
    return Candidate(number, state, {"r": parameters}, loss, parameters, 1.0)


def test_finalists_are_the_best_and_what_is_cheaper_within_reach() -> None:
    tried = [
        candidate(0, 2.00, 100),
        candidate(1, 2.01, 40),
        candidate(2, 2.02, 50),  # worse than 1 and dearer
        candidate(3, 2.03, 10),
        candidate(4, 2.50, 1),  # out of reach
        candidate(5, 1.90, 1, "pruned"),
    ]
    assert [each.number for each in finalists(tried, 0.02, 3)] == [0, 3, 1]
    assert [each.number for each in finalists(tried, 0.02, 2)] == [0, 3]
    assert [each.number for each in finalists(tried, 0.02, 1)] == [0]
    assert finalists([tried[5]], 0.02, 3) == []


def run_of(losses: np.ndarray, counts: np.ndarray, seed: int) -> Trial:
    numbers = {"train_tokens": 100, "tokens_per_second": 10.0, "peak_memory_bytes": 9, "seed": seed}
    before = (counts * 4).tolist()
    return Trial(
        "done", "", numbers | {"output_dir": "there"}, (losses * counts).tolist(), before, counts.tolist(), None, 1
    )


def runs_with(apart: dict[int, float], spread: float = 0.001, seeds: int = 3) -> dict[int, list[Trial]]:
    rng = np.random.default_rng(0)
    counts = rng.integers(5, 50, size=80)
    losses = rng.normal(3, 0.5, size=80)
    shifted = {number: losses + shift for number, shift in apart.items()}
    shifted[1][choosing_half(80)] -= 9  # says nothing: that half has chosen
    return {
        number: [run_of(values + rng.normal(0, spread, 80), counts, seed) for seed in range(1, seeds + 1)]
        for number, values in shifted.items()
    }


@pytest.mark.parametrize(
    ("apart", "spread", "seeds", "cheapest", "said"),
    [
        (
            {0: 0.0, 1: 0.005},
            0.001,
            3,
            1,
            "Take trial 1: 10x fewer trained parameters than trial 0.*at most 0.00. worse",
        ),
        ({0: 0.0, 1: -0.1}, 0.001, 3, 1, "Take trial 1.*and better"),
        ({0: 0.0, 1: 0.1}, 0.001, 3, 0, "Take trial 0.*worth its size: trial 1.*is worse: .0.100"),
        ({0: 0.0, 1: 0.0}, 0.9, 3, 1, "Cannot tell trial 1.*Most of the uncertainty"),
        ({0: 0.0, 1: 0.0}, 0.001, 1, 1, "Cannot tell.*--seeds 3"),
    ],
)
def test_the_cheapest_is_not_shown_to_be_worse(
    apart: dict[int, float], spread: float, seeds: int, cheapest: int, said: str
) -> None:
    chosen = [candidate(0, 2.0, 1000), candidate(1, 2.01, 100)]
    found = judge(chosen, runs_with(apart, spread, seeds), 0.02)
    assert (found.best.number, found.cheapest.number) == (0, cheapest)
    assert found.judged_examples == len(halves(80)[1]) == 40
    assert found.base_loss == pytest.approx(4)
    assert re.search(f"(?s){said}", found.verdict), found.verdict


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


# ---- who shares it


def test_a_study_of_other_settings_is_refused(small_run: TrainConfig, tmp_path: Path) -> None:
    folders.claim(tmp_path / "study", "search.json", {"train": {"r": 1}}, "search")
    folders.claim(tmp_path / "study", "search.json", {"train": {"r": 2}}, "search")  # nothing was made of the first
    (tmp_path / "study" / folders.PLAN).write_text("{}")
    folders.claim(tmp_path / "study", "search.json", {"train": {"r": 2}}, "search")
    with pytest.raises(ConfigError, match="holds a search with other settings"):
        search(small_run.replaced(output_dir=str(tmp_path / "study")), SearchConfig(trials=2))
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty and holds no search"):
        search(small_run.replaced(output_dir=str(tmp_path)), SearchConfig(trials=2))


def test_seats_are_taken_in_order_and_given_back(tmp_path: Path) -> None:
    with folders.seated(tmp_path) as first:
        assert first == 0
        assert folders.is_taken(tmp_path, 0)
        with folders.seated(tmp_path) as second:
            assert second == 1
    assert not folders.is_taken(tmp_path, 0)


def opened(folder: Path, storage: str | None = None) -> Any:
    return folders.open_study(folder, storage, {"train": 1})[0]


@pytest.mark.parametrize("database", [False, True])
def test_trials_of_the_dead_are_queued_again_and_those_of_the_living_are_not(tmp_path: Path, database: bool) -> None:
    storage = f"sqlite:///{tmp_path}/study.db" if database else None
    study = opened(tmp_path, storage)
    own = folders.home(tmp_path)
    with folders.seated(tmp_path):  # seat 0 lives
        workers = [(own, 0), (own, 1), (own, 2), ("another machine", 1)]
        begun = [folders.begin(study, *each) for each in workers]
        for trial in begun:
            trial.suggest_float("x", 0, 1)
        assert folders.bury(study, tmp_path, 2) == 2  # seat 1 is free; seat 2 is ours, from before
        assert [trial.state for trial in study.trials[:4]] == [
            TrialState.RUNNING,
            TrialState.FAIL,
            TrialState.FAIL,
            TrialState.RUNNING,
        ]
        assert folders.bury(opened(tmp_path, storage), tmp_path, 2) == 0  # once
        again = [folders.begin(study, own, 0) for _ in range(2)]
        assert [trial.suggest_float("x", 0, 1) for trial in again] == [trial.params["x"] for trial in begun[1:3]]


def test_a_trial_that_was_taken_for_dead_is_left_to_others(tmp_path: Path) -> None:
    study = opened(tmp_path)
    trial = folders.begin(study, folders.home(tmp_path), 0)
    assert folders.bury(study, tmp_path, 0) == 1
    assert not folders.finish(study, trial, candidate(0, 2.0, 10))
    again = folders.begin(study, folders.home(tmp_path), 1)
    assert folders.finish(study, again, candidate(again.number, 2.0, 10))
    assert folders.outcome(study.trials[again.number]) == candidate(again.number, 2.0, 10)


def test_a_database_hears_that_a_trial_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study, storage = folders.open_study(tmp_path, f"sqlite:///{tmp_path}/study.db", {})
    monkeypatch.setattr(folders, "HEARTBEAT", 0.01)
    beats: list[int] = []
    monkeypatch.setattr(storage, "record_heartbeat", beats.append)
    trial = folders.begin(study, "another machine", 0)
    with folders.beating(storage, trial._trial_id):
        while len(beats) < 3:
            time.sleep(0.01)
    told = len(beats)
    time.sleep(0.05)
    assert beats == [trial._trial_id] * told


def test_settings_that_kill_their_process_are_given_up(tmp_path: Path) -> None:
    study = opened(tmp_path)
    for tries in range(folders.TRIES):
        trial = folders.begin(study, folders.home(tmp_path), 0)
        trial.suggest_float("x", 0, 1)
        assert folders.bury(study, tmp_path, 0) == (tries + 1 < folders.TRIES)


def test_a_database_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--storage nonsense cannot be used: Could not parse"):
        opened(tmp_path, "nonsense")
    with pytest.raises(ConfigError, match="cannot be used: unable to open database file"):
        opened(tmp_path, f"sqlite:///{tmp_path}/none/study.db")


def test_the_command_says_what_is_wrong_with_a_search(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text("trials: 3\nspace: {r: [4, 8], lr: 1e-4..1e-3}\nr: 4\n")
    assert main(["search", "--config", str(tmp_path / "run.yaml"), "--output-dir", str(tmp_path / "out")]) == 2
    assert "r: given a value and a space" in capsys.readouterr().err
    assert main(["search", "--trials", "1"]) == 2
    assert main(["search", "--space", "ranks=4"]) == 2
