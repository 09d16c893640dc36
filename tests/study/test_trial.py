"""One trial: in a process of its own, in several and in this one, ended early, failed, and read again."""

import json
import os
import signal
import sys
import warnings
from dataclasses import asdict, replace
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
from runs import not_run
from transformers import AutoModelForCausalLM

from tailora.core.config import LoRAConfig
from tailora.data.dataset import evaluation_half, selection_half
from tailora.errors import ConfigError, TailoraWarning, TargetError
from tailora.model import LoRAModel
from tailora.report.pages.train import write_train_report
from tailora.study import trial as trial_module
from tailora.study.config import trial_settings
from tailora.study.trial import (
    Trial,
    TrialEvent,
    TrialSpec,
    get_trial,
    main,
    on_selection_half,
    run_here,
)
from tailora.train.child_process import ChildProcess, command_of
from tailora.train.config import TrainConfig


def settings(train: TrainConfig, **changes: Any) -> dict[str, Any]:
    return trial_settings(train, {"learning_rate": 1e-2, "max_steps": 3, **changes})


def diverged(*_: Any) -> Trial:
    return Trial("diverged", "")


def test_all_seeds_of_a_study_hold_out_the_same_examples() -> None:
    train = TrainConfig(learning_rate=1e-3, seed=3)
    assert trial_settings(train, {}, seed=9)["split_seed"] == 3
    assert trial_settings(train.replaced(split_seed=7), {}, seed=9)["split_seed"] == 7


@pytest.fixture(scope="module")
def plain(small_run: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Trial:
    """A whole trial, in a process of its own, where sets of strings have a different order."""
    folder = tmp_path_factory.mktemp("trials") / "plain"
    spec = TrialSpec(settings(small_run), forgetting="")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONHASHSEED", "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1")
        trial = get_trial(spec, folder)
    assert get_trial(spec, folder, run_trial=not_run) == trial
    return trial


def test_a_kept_trial_on_preferences_has_its_metrics_in_the_report(
    small_run: TrainConfig, pairs: Path, tmp_path: Path
) -> None:
    first = get_trial(TrialSpec(settings(small_run, data=str(pairs))), tmp_path / "first", run_trial=run_here)
    second = TrialSpec(settings(small_run, seed=1, data=str(pairs)), before=first.base)
    get_trial(second, tmp_path / "second", run_trial=run_here)
    metrics = write_train_report(tmp_path / "second" / "run")["metrics"]
    assert metrics[0]["before"] == 0.5


@pytest.mark.slow
def test_a_process_of_its_own_gives_the_same_as_this_one(
    plain: Trial, small_run: TrainConfig, tmp_path: Path, progress: Any
) -> None:
    spec = TrialSpec(settings(small_run), forgetting="")
    here = get_trial(spec, tmp_path / "here", progress=progress, run_trial=run_here)
    assert (here.outcome, here.sums, here.before, here.losses) == ("done", plain.sums, plain.before, plain.losses)
    assert here.curve == plain.curve
    assert progress.steps == [(1, 3), (2, 3), (3, 3)]
    assert progress.ended == [1]
    adapters = [Path(trial.numbers["output_dir"]) / "adapter" for trial in (here, plain)]
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert len({(folder / name).read_bytes() for folder in adapters}) == 1


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
    base = on_selection_half(plain.base)
    half = get_trial(replace(shared, choosing=True, before=base), tmp_path / "half", run_trial=run_here)
    assert base is not None
    assert half.before == base[0]
    assert half.counts == base[1]
    assert half.sums == pytest.approx([plain.sums[index] for index in selection_half(len(plain.sums))])


@pytest.mark.parametrize("targets", ["all-linear", ["k_proj", "down_proj"]])
def test_a_trial_knows_the_highest_rank_that_fits(small_run: TrainConfig, tmp_path: Path, targets: Any) -> None:
    spec = TrialSpec(settings(small_run, target_modules=targets, max_steps=1), describe=True, keep=False)
    highest = get_trial(spec, tmp_path, run_trial=run_here).numbers["parts"]["highest_r"]

    def adapt(r: int) -> None:
        LoRAModel(AutoModelForCausalLM.from_pretrained(small_run.model), LoRAConfig(r=r, target_modules=targets))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TailoraWarning)  # about smaller layers
        adapt(highest)
    with pytest.raises(TargetError, match="is too large"):
        adapt(highest + 1)


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
import itertools, pathlib, sys, time
from multiprocessing.connection import Connection
parent = Connection(1, readable=False)
pathlib.Path(sys.argv[1], "run").mkdir()
for step in itertools.count():
    event = {"step": step, "steps": 9, "loss": 4.0 - step, "held_out": step % 2 == 0, "parameters": 7, "seconds": 0.1}
    parent.send(event)
    time.sleep(0.05)
"""


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch) -> TrialSpec:
    """A trial whose process reports steps and evaluations without end."""
    monkeypatch.setattr(trial_module, "command_of", lambda _: [sys.executable, "-c", EVENTS])
    return TrialSpec({})


@pytest.mark.parametrize(
    "processes", [pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.exhaustive)]
)
def test_a_trial_ends_when_the_study_that_started_it_is_killed(
    processes: int, small_run: TrainConfig, tmp_path: Path
) -> None:
    spec = TrialSpec(settings(small_run, max_steps=1_000_000), processes=processes)
    (tmp_path / "spec.json").write_text(json.dumps(asdict(spec)))
    with ChildProcess([*command_of(main), str(tmp_path)], log=tmp_path / "log.txt") as child:
        assert "loss" in child.receive()
        started = psutil.Process(child.process.pid).children(recursive=True)
        ranks = [child for child in started if child.environ().get("RANK") and "guard" not in child.cmdline()[4]]
        assert len(ranks) == (processes if processes > 1 else 0)
        child._output.close()  # as the system does
        assert child.process.wait(timeout=60) == -signal.SIGKILL
        assert not [child for child in psutil.wait_procs(started, timeout=10)[1] if child.status() != "zombie"]
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


# ---- Several processes


def of_two(train: TrainConfig, **changes: Any) -> TrialSpec:
    return TrialSpec(settings(train, device="cpu", **changes), processes=2)


def losses_of_examples(trial: Trial) -> Any:
    return np.array([trial.before, trial.sums]) / trial.counts


TOGETHER: dict[str, dict[str, Any]] = {
    "copied": {},
    "sharded": {"fsdp": True},
    "full": {"method": "full", "r": 16},
    "full, sharded": {"method": "full", "r": 16, "fsdp": True},
}


@pytest.mark.ranks
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.slow if case == "full, sharded" else pytest.mark.exhaustive)
        for case in TOGETHER
    ],
)
def test_two_processes_give_the_trial_of_one(
    case: str, small_run: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batches of a step are the same. What is forgotten is measured, by all ranks together if it is sharded."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    train, texts = small_run.replaced(device="cpu"), str(tmp_path / "texts.json")
    asked = settings(train, **TOGETHER[case])
    of_one = TrialSpec({**asked, "fsdp": False, "gradient_accumulation_steps": 2}, forgetting="", texts=texts)
    one = get_trial(of_one, tmp_path / "one", run_trial=run_here)
    spec = replace(of_one, settings=asked, processes=2, texts=str(tmp_path / "others.json"))
    two = get_trial(spec, tmp_path / "two")
    assert (two.outcome, two.processes, one.processes) == ("done", 2, 1)
    assert json.loads((tmp_path / "two" / "run" / "run.json").read_text())["processes"] == 2
    for trial_losses in (attrgetter("losses"), attrgetter("curve"), losses_of_examples):  # nats per token
        assert np.array(trial_losses(two)) == pytest.approx(np.array(trial_losses(one)), rel=1e-5)
    assert two.forgetting == pytest.approx(one.forgetting, abs=1e-5)
    assert two.numbers["all_steps"] == one.numbers["all_steps"]
    assert (two.counts, two.bytes, two.parameters) == (one.counts, one.bytes, one.parameters)
    assert (tmp_path / "others.json").read_text() == (tmp_path / "texts.json").read_text()
    assert not (tmp_path / "two" / "ranks").exists()
    assert not (tmp_path / "two" / "log.txt").read_text()


RANKS = """
import subprocess, sys
rank = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"  # it does not look at stdin
for number in range(2):
    process = subprocess.Popen([sys.executable, "-c", rank], stdout=subprocess.PIPE, start_new_session=True)
    with open(sys.argv[1] + "/ranks.txt", "a") as file:
        file.write(process.stdout.readline().decode())
"""


def test_a_trial_that_is_stopped_ends_all_its_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them leads a session of its own, as those that torch's launcher starts."""
    monkeypatch.setattr(trial_module, "command_of", lambda _: [sys.executable, "-c", f"{RANKS}\n{EVENTS}"])
    spec = TrialSpec({}, processes=2)
    trial = get_trial(spec, tmp_path, stop=lambda event: "bad" if event.step == 2 else None)
    assert (trial.outcome, trial.message, trial.parameters) == ("pruned", "bad", 7)
    assert (trial.curve, trial.losses) == ([(0, 4.0), (2, 2.0)], [3.0])  # what it had reported
    assert not (tmp_path / "run").exists()
    assert get_trial(spec, tmp_path, run_trial=not_run) == trial
    ranks = [int(line) for line in (tmp_path / "ranks.txt").read_text().split()]
    remaining = [pid for pid in ranks if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]
    for pid in remaining:
        psutil.Process(pid).kill()
    assert (len(ranks), remaining) == (2, [])


def test_the_number_of_processes_may_change_if_the_batches_of_a_step_stay_the_same(
    small_run: TrainConfig, tmp_path: Path
) -> None:
    made = get_trial(of_two(small_run, gradient_accumulation_steps=2), tmp_path, run_trial=diverged)
    assert made.processes == 2
    for processes, accumulation in ((1, 4), (4, 1)):
        asked = settings(small_run, device="cpu", gradient_accumulation_steps=accumulation)
        assert get_trial(TrialSpec(asked, processes=processes), tmp_path, run_trial=not_run) == made
    with pytest.raises(ConfigError, match="a trial with different settings"):
        get_trial(of_two(small_run), tmp_path, run_trial=not_run)


def test_an_error_of_the_process_is_sent_to_the_study(
    small_run: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[Any] = []
    monkeypatch.setattr(trial_module, "messages_of_parent", lambda: None)
    monkeypatch.setattr(trial_module, "connection_to_parent", lambda: SimpleNamespace(send=sent.append))
    spec = TrialSpec(settings(small_run, data=str(tmp_path / "none.jsonl")))
    (tmp_path / "spec.json").write_text(json.dumps(asdict(spec)))
    assert main(str(tmp_path)) == 1
    assert (sent[0].type, "none.jsonl" in sent[0].message) == ("DataError", True)


def test_a_trial_with_other_settings_is_refused(small_run: TrainConfig, tmp_path: Path) -> None:
    spec = TrialSpec(settings(small_run))
    get_trial(spec, tmp_path, run_trial=diverged)
    get_trial(replace(spec, before=([1.0], [1])), tmp_path, run_trial=not_run)  # no setting
    default = {"lr_scheduler_type": TrainConfig(model="x", data="x").lr_scheduler_type}
    get_trial(replace(spec, settings=settings(small_run, **default)), tmp_path, run_trial=not_run)
    with pytest.raises(ConfigError, match="a trial with different settings"):
        get_trial(replace(spec, settings=settings(small_run, r=2)), tmp_path, run_trial=not_run)


def test_the_halves_of_the_held_out_examples_are_all_of_them() -> None:
    assert sorted([*selection_half(41), *evaluation_half(41)]) == list(range(41))
    with pytest.raises(ConfigError, match="1 distinct held-out example is too few"):
        evaluation_half(1)
