"""A whole comparison on a tiny model: each trial in its own process, resumed, judged."""

import json
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from tailora.errors import ConfigError, DataError
from tailora.report import report
from tailora.report.compare import compare_page
from tailora.report.page import html
from tailora.study.compare import compare
from tailora.study.config import CompareConfig, arm_settings
from tailora.study.judging import judged
from tailora.study.lr_search import Rates
from tailora.study.trial import Spec, Told, Trial, choosing_part, halves, try_out
from tailora.train.config import TrainConfig

SMALL = CompareConfig(seeds=2, rate_tries=1, arms={"r4": {"learning_rate": 1e-2}, "full": {"method": "full"}})


@pytest.mark.slow
def test_a_comparison_runs_resumes_and_judges(
    small_run: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = small_run.replaced(output_dir=str(tmp_path / "study"))
    heard: list[str] = []
    found = compare(train, SMALL, say=heard.append)
    assert [arm.name for arm in found.arms] == ["r4", "full"]
    assert found.reference == "full"
    lora, full = found.arms
    assert lora.trainable_parameters is not None
    assert full.trainable_parameters is not None
    assert lora.trainable_parameters < full.trainable_parameters
    for arm in found.arms:
        assert arm.outcome == "done"
        assert arm.eval_loss is not None
        assert arm.interval is not None
        assert arm.eval_loss < found.base_loss
        assert arm.interval[0] < arm.eval_loss < arm.interval[1]
        assert arm.forgetting is not None
        assert arm.forgetting["kl"] > 0
        assert not arm.bracketed  # one try
    assert lora.difference is not None
    assert lora.difference["value"] == pytest.approx(lora.eval_loss - full.eval_loss)
    assert found.verdict
    assert "edge of those tried" in found.verdict
    assert found.judged_examples == 9
    assert json.loads((tmp_path / "study" / "report.json").read_text())["verdict"] == found.verdict
    assert found.verdict in unescape(report(tmp_path / "study").read_text())
    assert lora.eval_loss == pytest.approx(np.mean(lora.seed_losses))
    assert [len(losses) for losses in lora.train_losses] == [found.steps] * 2
    assert len(heard) == 2 + 4

    monkeypatch.setattr("tailora.study.trial.subprocess.Popen", None)  # every trial is there
    again = compare(train, SMALL)
    assert again.arms == found.arms
    wider = compare(train, SMALL.replaced(margin=5.0))
    assert wider.settings["compare"]["margin"] == 5.0
    with pytest.raises(ConfigError, match="other settings"):
        compare(train, SMALL.replaced(forgetting_data="texts.jsonl"))
    with pytest.raises(ConfigError, match="other settings"):
        compare(train.replaced(r=2), SMALL)


@pytest.mark.slow
def test_minutes_are_planned_once_and_a_comparison_may_be_asked_for_more(
    small_run: TrainConfig, tmp_path: Path
) -> None:
    train = small_run.replaced(output_dir=str(tmp_path / "study"), max_steps=3)
    asked, heard = SMALL.replaced(minutes=5.0, seeds=1), []
    first = compare(train, asked, say=heard.append)
    assert "3 steps in each run, planned to fit into the minutes" in heard
    assert json.loads((tmp_path / "study" / "plan.json").read_text())["max_steps"] == 3  # as the settings ask
    runs = tmp_path / "study" / "runs"
    (texts,) = (tmp_path / "study").glob("texts.json")
    assert len(json.loads(texts.read_text())) == 16
    probe, rate, final = (read(next(runs.glob(f"full/{name}*"))) for name in ("probe", "rate", "seed"))
    assert [len(each["evaluation_seconds"]) for each in (probe, rate, final)] == [2, 1, 1]
    assert final["before"] == probe["before"]
    assert read(next(runs.glob("r4/seed*")))["numbers"]["writing_seconds"] < probe["numbers"]["seconds"]
    short = compare(train, asked.replaced(minutes=0.01, seeds=9), say=heard.append)  # no time for more: what is there
    assert short.arms == first.arms
    assert short.notes == ["--minutes left time for 1 of 9 seeds"]
    more = compare(train, asked.replaced(seeds=2))
    assert more.seeds == [1, 2]


def read(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "trial.json").read_text())
    return content


@pytest.mark.slow
def test_a_trial_that_diverges_is_a_result(small_run: TrainConfig, tmp_path: Path) -> None:
    settings = arm_settings(small_run, SMALL, "r4", learning_rate=1e30, max_steps=4)
    trial = try_out(Spec(settings), tmp_path / "trial")
    assert trial.outcome == "diverged"
    assert trial.loss() == np.inf
    assert not (tmp_path / "trial" / "run").exists()


@pytest.mark.slow
def test_a_trial_that_the_system_kills_is_a_result(small_run: TrainConfig, tmp_path: Path) -> None:
    def killing(_: Told) -> None:
        for child in psutil.Process().children():
            child.kill()

    settings = arm_settings(small_run, SMALL, "r4", learning_rate=1e-3, max_steps=4)
    trial = try_out(Spec(settings), tmp_path / "trial", judge=killing)
    assert trial.outcome == "out of memory"
    assert "killed by the system" in trial.message
    assert len(trial.curve) == 1  # what was heard before
    assert not (tmp_path / "trial" / "run").exists()
    assert try_out(Spec(settings), tmp_path / "trial") == trial  # not run again


@pytest.mark.slow
def test_what_is_known_of_the_base_is_not_computed_again(small_run: TrainConfig, tmp_path: Path) -> None:
    settings = arm_settings(small_run, SMALL, "r4", learning_rate=1e-2, max_steps=3)
    plain = try_out(Spec(settings, forgetting=""), tmp_path / "plain")
    told = Spec(settings, forgetting="", before=plain.base, texts=str(tmp_path / "texts.json"))
    first, second = (try_out(told, tmp_path / name) for name in ("first", "second"))
    assert len(plain.evaluation_seconds) == 2
    for trial in (first, second):
        assert len(trial.evaluation_seconds) == 1
        assert (trial.before, trial.sums, trial.losses) == (plain.before, plain.sums, plain.losses)
        assert trial.forgetting == plain.forgetting
        assert np.array(trial.curve) == pytest.approx(np.array(plain.curve))
        assert trial.numbers["eval_loss_before"] == plain.numbers["eval_loss_before"]
    chosen = choosing_part(plain.base)
    half = try_out(Spec(settings, choosing=True, before=chosen), tmp_path / "half")
    assert chosen is not None
    assert half.before == chosen[0]
    assert half.counts == chosen[1]
    assert half.sums == pytest.approx([plain.sums[place] for place in halves(len(plain.sums))[0]])


@pytest.mark.slow
def test_what_is_wrong_with_the_data_is_raised_here(small_run: TrainConfig, tmp_path: Path) -> None:
    settings = arm_settings(small_run.replaced(data=str(tmp_path / "none.jsonl")), SMALL, "r4", learning_rate=1e-3)
    with pytest.raises(DataError, match=r"none\.jsonl"):
        try_out(Spec(settings), tmp_path / "trial")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"arms": {"one": {}}}, "needs two arms"),
        ({"arms": {"a": {"method": "full"}, "b": {"method": "full"}}}, "one full fine-tuning"),
        ({"arms": {"a": {"data": "x"}, "b": {"seed": 1}}}, "'a' changes data.*'b' changes seed"),
        ({"seeds": 0}, "seeds"),
        ({"minuts": 3}, "did you mean"),
    ],
)
def test_a_study_that_makes_no_sense_is_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){told}"):
        CompareConfig(**changes)


def test_settings_of_an_arm_that_contradict_each_other_are_found_before_any_run(
    small_run: TrainConfig, tmp_path: Path
) -> None:
    study = CompareConfig(arms={"r4": {}, "full": {"method": "full", "r": 3}})
    with pytest.raises(ConfigError, match="leave out r"):
        compare(small_run.replaced(output_dir=str(tmp_path / "study")), study)
    assert not (tmp_path / "study").exists()


def test_full_fine_tuning_takes_nothing_of_the_adapters_and_their_frozen_base(small_run: TrainConfig) -> None:
    asked = {"quantize": "int8", "loraplus_lr_ratio": 4, "target_r": 2, "tinit": 1, "use_dora": False, "lora_alpha": 3}
    train = small_run.replaced(**asked)
    of_full = arm_settings(train, SMALL, "full", learning_rate=1e-4)
    assert not {"r", *asked} & of_full.keys()
    assert TrainConfig(**of_full).quantize is None
    of_lora = TrainConfig(**arm_settings(train, SMALL, "r4"))
    assert {name: getattr(of_lora, name) for name in asked} == asked


def test_a_step_chosen_by_the_examples_that_judge_is_refused(small_run: TrainConfig, tmp_path: Path) -> None:
    train = small_run.replaced(eval_steps=5, early_stopping_patience=2, output_dir=str(tmp_path / "study"))
    with pytest.raises(ConfigError, match="leave early_stopping_patience and eval_steps out"):
        compare(train, SMALL)
    assert not (tmp_path / "study").exists()


def test_a_folder_with_other_things_is_left_alone(small_run: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        compare(small_run.replaced(output_dir=str(tmp_path)), SMALL)


@pytest.mark.slow
def test_too_few_held_out_examples_are_found_before_any_step(small_run: TrainConfig, tmp_path: Path) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text("".join(Path(small_run.data).read_text().splitlines(keepends=True)[:3]))
    train = small_run.replaced(eval_data=str(few), output_dir=str(tmp_path / "study"))
    heard: list[int] = []
    with pytest.raises(ConfigError, match="3 held-out examples are too few"):
        compare(train, SMALL, progress=lambda step, *_: heard.append(step))
    assert not heard


@pytest.mark.slow
def test_too_little_time_is_refused_with_what_it_needs(small_run: TrainConfig, tmp_path: Path) -> None:
    train = small_run.replaced(output_dir=str(tmp_path / "study"))
    with pytest.raises(ConfigError, match=r"--minutes 0\.01 were over when r4 had been timed: give more"):
        compare(train, SMALL.replaced(minutes=0.01))
    with pytest.raises(ConfigError, match=r"--minutes 1 is too short for 120 runs of 2 arms: .* give more"):
        compare(train, SMALL.replaced(minutes=1.0, seeds=100, rate_tries=20))


def trial(losses: np.ndarray, counts: np.ndarray, seed: int, parameters: int) -> Trial:
    numbers = {"train_tokens": 100, "tokens_per_second": 10.0, "peak_memory_bytes": 9, "steps": 5, "seed": seed}
    numbers |= {"trainable_parameters": parameters, "output_dir": "there"}
    forgotten = {"kl": 0.1, "loss_before": 1.0, "loss_after": 1.1, "tokens": 7}
    before = (counts * 4).tolist()
    return Trial("done", "", numbers, (losses * counts).tolist(), before, counts.tolist(), forgotten, 12)


def rates(best: float) -> Rates:
    found = Rates(best, 3)
    for factor, loss in ((1, 2.0), (4, 3.0), (0.25, 3.0)):
        found.tell(best * factor, loss)
    return found


def test_arms_are_judged_on_the_half_that_did_not_choose() -> None:
    rng = np.random.default_rng(0)
    counts = rng.integers(5, 50, size=40)
    losses = rng.normal(3, 0.5, size=40)
    first = trial(losses, counts, 1, 1000)
    for_rates, for_arms = halves(len(first.counts))
    assert sorted([*for_rates, *for_arms]) == list(range(40))
    better = losses.copy()
    better[for_rates] -= 1  # on the other half there is no difference
    study = CompareConfig(arms={"lora": {}, "full": {"method": "full"}})
    finals = {
        "lora": [trial(better + rng.normal(0, 0.001, 40), counts, seed, 10) for seed in (1, 2, 3)],
        "full": [trial(losses + rng.normal(0, 0.001, 40), counts, seed, 1000) for seed in (1, 2, 3)],
    }
    found = judged(study, {arm: rates(1e-3) for arm in finals}, finals, notes=[], settings={}, seconds=1.0)
    assert "No difference that matters" in found.verdict
    assert "100x fewer" in found.verdict
    assert found.base_loss == pytest.approx(4)
    assert found.seeds == [1, 2, 3]


def test_an_arm_that_failed_keeps_its_reason() -> None:
    counts = np.full(10, 5)
    failed = Rates(1e-3, 1)
    failed.tell(1e-3, np.inf)
    study = CompareConfig(arms={"lora": {}, "full": {"method": "full"}})
    finals = {"lora": [trial(np.linspace(1, 2, 10), counts, seed, 10) for seed in (1, 2)]}
    found = judged(study, {"lora": rates(1e-3), "full": failed}, finals, notes=[], settings={}, seconds=1.0)
    assert found.arms[1].outcome == "failed at every rate tried, 0.001"
    large = Rates(1e-3, 5)
    large.tell(1e-3, np.inf, fits=False)
    assert large.ask() is None  # another rate needs as much
    found_large = judged(study, {"lora": rates(1e-3), "full": large}, finals, notes=[], settings={}, seconds=1.0)
    assert "full ran out of memory." in found_large.verdict
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert plain["arms"][1]["rates"] == {"0.001": None}
    assert "failed" in html(compare_page(plain))
    assert "full failed at every rate tried" in found.verdict
    assert found.p_value is None
