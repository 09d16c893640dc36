"""Several workers in one search or comparison. The processes of their trials are real, and train nothing."""

import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
import torch
from runs import not_run

from tailora.core import device
from tailora.errors import ConfigError
from tailora.evaluation import forgetting
from tailora.evaluation.forgetting import Forgetting
from tailora.study import search as search_module
from tailora.study import trial as trial_module
from tailora.study.compare import compare
from tailora.study.config import CompareConfig, SearchConfig, trial_settings
from tailora.study.search import search
from tailora.study.study_store import StudySession, make_workers, same_steps
from tailora.study.trial import TrialSpec, run_here
from tailora.train.config import TrainConfig

SCRIPT = Path(__file__).with_name("made_up_trial.py")
WORKERS, TRIALS = 3, 6
SEVERAL = "up to 3 workers ran in parallel, so a run may have taken longer than it would alone"
STUDY = SearchConfig(
    trials=TRIALS, seeds=2, finalists=2, workers=WORKERS, space={"learning_rate": "1e-4..1e-1", "r": "2,4"}
)


@pytest.fixture(scope="module")
def template(small_run: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("template")
    settings = trial_settings(small_run, {}, max_steps=1, save_steps=0, eval_steps=0)
    trial = run_here(TrialSpec(settings, describe=True), folder, lambda _: None)
    forgotten = {"kl": 0.1, "loss_before": 2.0, "loss_after": 2.1, "tokens": 100}
    file = folder / "template.json"
    file.write_text(json.dumps({**asdict(trial), "forgetting": forgotten}))
    return file


@pytest.fixture
def train(small_run: TrainConfig, tmp_path: Path) -> TrainConfig:
    settings = small_run.model_dump(exclude_unset=True, exclude={"r", "output_dir"})
    return TrainConfig(**settings, output_dir=str(tmp_path / "study"))


def use_made_up_trials(patch: pytest.MonkeyPatch, template: Path, seconds: float = 0.2, crashes: str = "none") -> None:
    patch.setattr(search_module, "POLL_SECONDS", 0.05)
    command = [sys.executable, "-I", str(SCRIPT), str(template), str(seconds), crashes]
    patch.setattr(trial_module, "command_of", lambda _: command)


def facts_of(folder: Path, pattern: str) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob(f"{pattern}/facts.json"))]


def most_at_a_time(facts: list[dict[str, Any]]) -> int:
    starts = [fact["from"] for fact in facts]
    return max(sum(fact["from"] <= moment < fact["to"] for fact in facts) for moment in starts)


@pytest.mark.slow
@pytest.mark.ranks
def test_workers_share_a_search_and_what_one_leaves_is_run_by_another(
    train: TrainConfig, template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, progress: Any
) -> None:
    use_made_up_trials(monkeypatch, template, seconds=0.6, crashes="0002")
    found = search(train, STUDY, progress=progress)
    trials, finals = facts_of(tmp_path / "study", "trials/*"), facts_of(tmp_path / "study", "finals/*/*")
    assert len(found.trials) == TRIALS == len(trials)
    assert [trial.number for trial in found.trials] == [number for number in range(TRIALS + 1) if number != 2]
    assert 1 < most_at_a_time(trials) <= WORKERS
    assert 1 < most_at_a_time(finals) <= WORKERS
    assert progress.workers == {1, 2, 3}
    assert len(progress.ended) > len(trials) + len(finals)  # with the trial that measures, and the one that failed
    share = str(max(len(os.sched_getaffinity(0)) // WORKERS, 1))
    assert {fact["threads"] for fact in trials} == {os.environ.get("OMP_NUM_THREADS", share)}
    specs = [json.loads(path.read_text())["settings"] for path in (tmp_path / "study" / "trials").glob("*/spec.json")]
    several = [rate for rate, count in Counter(spec["learning_rate"] for spec in specs).items() if count > 1]
    lost = json.loads((tmp_path / "study" / "trials" / "0002" / "spec.json").read_text())["settings"]
    assert several == [lost["learning_rate"]]  # above all, not the settings as they are
    (note,) = [note for note in found.notes if "stopped: " in note]
    assert "the card has fallen off the bus" in note
    assert found.best.number == min(found.trials, key=lambda trial: trial.eval_loss or 9).number
    assert found.seeds == [1, 2]
    again = search(train, STUDY.replaced(workers=1), run_trial=not_run)
    assert again.best == found.best
    assert SEVERAL in again.notes  # as was true when the runs were made


def test_a_search_whose_workers_all_fail_says_why(
    train: TrainConfig, template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_made_up_trials(monkeypatch, template, seconds=0)
    search(train, STUDY.replaced(trials=2))
    failing = [sys.executable, "-I", "-c", "raise SystemExit('no card')"]
    monkeypatch.setattr(trial_module, "command_of", lambda _: failing)
    with pytest.raises(RuntimeError, match="no card"):
        search(train, STUDY.replaced(trials=4))


@pytest.mark.slow
@pytest.mark.ranks
def test_an_interrupt_ends_all_workers_and_the_search_goes_on(
    train: TrainConfig, template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_made_up_trials(monkeypatch, template, seconds=0)
    search(train, STUDY.replaced(trials=2))
    use_made_up_trials(monkeypatch, template, seconds=60)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    children = []
    start = trial_module.Worker.start

    def started(*args: Any, **options: Any) -> Any:
        children.append(start(*args, **options))
        if len(children) == WORKERS:
            assert threading.main_thread().ident is not None
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        return children[-1]

    monkeypatch.setattr(trial_module.Worker, "start", started)
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        search(train, STUDY)
    assert time.monotonic() - begun < 30
    assert [child.process.poll() for child in children] == [-signal.SIGKILL] * WORKERS
    use_made_up_trials(monkeypatch, template, seconds=0)
    found = search(train, STUDY)
    assert len(found.trials) == TRIALS
    specs = [json.loads(path.read_text())["settings"] for path in (tmp_path / "study" / "trials").glob("*/spec.json")]
    assert len(specs) == TRIALS + WORKERS  # the interrupted ones are run again, with the same settings
    assert sum(count == 2 for count in Counter(spec["learning_rate"] for spec in specs).values()) == WORKERS


def test_workers_share_the_runs_of_a_comparison(
    train: TrainConfig, template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_made_up_trials(monkeypatch, template)
    arms = {"a": {"r": 2}, "b": {"r": 4}}
    study = CompareConfig(arms=arms, seeds=3, rate_tries=3, workers=WORKERS)
    found = compare(train, study)
    rates, runs = (facts_of(tmp_path / "study", f"runs/*/{name}-*") for name in ("rate", "seed"))
    assert (len(rates), most_at_a_time(rates)) == (2 * 3, 2)  # the next rate of an arm follows from its last
    assert (len(runs), most_at_a_time(runs)) == (2 * 3, WORKERS)
    assert SEVERAL in found.notes
    alone = compare(train, study.replaced(workers=1), run_trial=not_run)
    assert alone.arms == found.arms
    assert SEVERAL in alone.notes  # as was true when the runs were made


def test_runs_that_were_made_alone_stay_so(train: TrainConfig, template: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_made_up_trials(monkeypatch, template, seconds=0)
    study = CompareConfig(arms={"a": {"r": 2}, "b": {"r": 4}}, seeds=2, rate_tries=3)
    assert compare(train, study).notes == []
    assert compare(train, study.replaced(workers=WORKERS), run_trial=not_run).notes == []


@pytest.fixture
def four_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = [torch.device("cuda", index) for index in range(4)]
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(device, "devices", lambda: [*cards, torch.device("cpu")])
    monkeypatch.setattr(device, "obstacle_to_start", lambda _: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)


@pytest.mark.usefixtures("four_cards")
def test_each_worker_has_a_device_of_its_own() -> None:
    assert [worker.device for worker in make_workers(3, "auto")] == ["cuda:0", "cuda:1", "cuda:2"]
    with pytest.raises(ConfigError, match=r"has only cuda:0, cuda:1, cuda:2, cuda:3; use --workers 4"):
        make_workers(5, "cuda")
    with pytest.raises(ConfigError, match="got --device cuda:1; use --device cuda"):
        make_workers(2, "cuda:1")


@pytest.mark.usefixtures("four_cards")
def test_each_worker_has_as_many_devices_as_its_runs_have_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    def cards(count: int, processes: int) -> list[dict[str, str]]:
        return [dict(worker.variables) for worker in make_workers(count, "auto", processes=processes)]

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert cards(2, 2) == [{"CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "2,3"}]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,5,GPU-8932f937,4")
    assert cards(2, 2) == [{"CUDA_VISIBLE_DEVICES": "7,5"}, {"CUDA_VISIBLE_DEVICES": "GPU-8932f937,4"}]
    with pytest.raises(
        ConfigError, match=r"--workers 3 needs 2 devices per worker, but this machine has only .*; use --workers 2"
    ):
        cards(3, 2)


def test_devices_that_no_variable_hides_are_not_shared_out_to_several_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cards = [torch.device("xpu", index) for index in range(4)]
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(device, "devices", lambda: cards)
    monkeypatch.setattr(device, "choose_device", lambda _: cards[0])
    with pytest.raises(ConfigError, match=r"--workers 2 with --nproc-per-node 2 .* the device is xpu; remove"):
        make_workers(2, "auto", processes=2)


def test_the_processes_of_all_workers_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tailora.study.study_store.threads_per_process", lambda count: 24 // count)
    assert [worker.threads for worker in make_workers(3, "cpu")] == [8] * 3
    assert [worker.threads for worker in make_workers(3, "cpu", processes=2)] == [4] * 3
    assert make_workers(1, "cpu", processes=2) == []


# ---- Several processes in each run, of which only the one that would start them is real


TWO_ARMS = CompareConfig(arms={"a": {"r": 2}, "b": {"r": 4}}, seeds=2, rate_tries=3)


@pytest.mark.usefixtures("four_cards")
def test_workers_show_each_run_its_own_devices(
    train: TrainConfig, template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_made_up_trials(monkeypatch, template, seconds=0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,5,3,1")
    compare(train, TWO_ARMS.replaced(workers=2), processes=2)
    facts = facts_of(tmp_path / "study", "runs/*/*")
    assert {fact["cards"] for fact in facts} == {"7,5", "3,1"}
    assert [fact["device"] for fact in facts] == [[]] * len(facts)  # each process takes that of its rank


def test_a_comparison_goes_on_in_another_number_of_processes_with_the_same_steps(
    train: TrainConfig, template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_made_up_trials(monkeypatch, template, seconds=0)
    found = compare(train, TWO_ARMS, processes=2)
    specs = [json.loads(path.read_text()) for path in (tmp_path / "study").glob("runs/*/*/spec.json")]
    assert [spec["processes"] for spec in specs] == [2] * len(specs)
    assert found.settings["launch"] == {"nproc_per_node": 2}
    assert found.notes == ["each run had 2 processes; memory was measured in the first one"]
    with pytest.raises(
        ConfigError,
        match="gradient_accumulation_steps was 2 and is now 1; gradient_accumulation_steps is the total over all",
    ):
        compare(train, TWO_ARMS, run_trial=not_run)
    alone = train.replaced(gradient_accumulation_steps=2)
    assert compare(alone, TWO_ARMS, run_trial=not_run).arms == found.arms
    more = compare(alone, TWO_ARMS.replaced(seeds=3))
    assert "runs had 1 and 2 processes, so their times and memory are not comparable" in more.notes


def test_a_search_goes_on_in_another_number_of_processes_with_the_same_steps(
    train: TrainConfig, template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_made_up_trials(monkeypatch, template, seconds=0)
    study = STUDY.replaced(workers=1, trials=2)
    found = search(train, study, processes=2)
    assert "each run had 2 processes; memory was measured in the first one" in found.notes
    alone = train.replaced(gradient_accumulation_steps=2)
    assert search(alone, study, run_trial=not_run).best == found.best
    assert len(optuna.get_all_study_names(f"sqlite:///{train.output_dir}/study.db")) == 1
    with pytest.raises(ConfigError, match="gradient_accumulation_steps was 2 and is now 1"):
        search(train, study, run_trial=not_run)


def test_settings_of_one_process_or_with_steps_of_their_own_stay_as_they_were_stored(train: TrainConfig) -> None:
    """By them a search finds its trials in a database."""
    of_two = {"train": {"gradient_accumulation_steps": 1}, "launch": {"nproc_per_node": 2}}
    arms = {"a": {"gradient_accumulation_steps": 2}, "b": {}}
    for settings in (
        {"train": train.model_dump(mode="json"), "space": {"r": [2, 4]}},
        {**of_two, "compare": {"arms": arms}},
        {**of_two, "space": {"gradient_accumulation_steps": [1, 2]}},
    ):
        assert same_steps(settings) == settings


def test_workers_note_the_same_once(tmp_path: Path) -> None:
    """Each looks whether it was noted before any of them has noted it."""
    begun = threading.Barrier(2)

    class Notes(list[str]):
        def __contains__(self, text: object) -> bool:
            there = super().__contains__(text)
            with suppress(threading.BrokenBarrierError):
                begun.wait(timeout=0.2)
            return there

    session = StudySession(tmp_path, None, lambda _: None, None, not_run)
    session.notes = Notes()
    threads = [threading.Thread(target=session.note, args=["the same"]) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert session.notes == ["the same"]


def test_one_of_several_trials_writes_the_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[list[str]] = []

    def sample_texts(*_: Any) -> list[str]:
        written.append([f"text {len(written)}"])
        time.sleep(0.2)
        return written[-1]

    read: list[Any] = []
    monkeypatch.setattr(forgetting, "sample_texts", sample_texts)
    monkeypatch.setattr(forgetting, "forgetting", lambda _, texts: read.append(texts) or Forgetting(0.0, 0.0, 0.0, 1))
    spec = TrialSpec({}, forgetting="", texts=str(tmp_path / "texts.json"))
    result = SimpleNamespace(model=None, tokenizer=None)
    measure = partial(trial_module._forgetting, result, spec, together=False)
    threads = [threading.Thread(target=measure) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(written) == 1
    assert read == written * 3
