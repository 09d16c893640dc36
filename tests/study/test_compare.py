"""A whole comparison on a tiny model: its runs, resuming, minutes, and what is refused."""

import json
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import check_refused
from runs import not_run

from tailora.data.dataset import evaluation_half
from tailora.errors import ConfigError, TargetError
from tailora.report.files import write_page
from tailora.report.pages.train import write_train_report
from tailora.study.compare import compare
from tailora.study.config import CompareConfig, arm_settings
from tailora.study.study_store import StudySession
from tailora.study.trial import Listen, Trial, TrialSpec, Worker, run_here
from tailora.train.config import TrainConfig

SMALL = CompareConfig(seeds=2, rate_tries=1, arms={"r4": {"learning_rate": 1e-2}, "full": {"method": "full"}})


def test_an_arm_with_targets_that_the_model_lacks_is_named(small_run: TrainConfig, tmp_path: Path) -> None:
    arms = {"mlp": {"target_modules": ["mlp"]}, "full": {"method": "full"}}
    train = small_run.replaced(output_dir=str(tmp_path / "study"))
    with pytest.raises(
        TargetError, match=r"^variant 'mlp': target_modules: 'mlp' is a LlamaMLP, which cannot be adapted itself"
    ):
        compare(train, CompareConfig(seeds=1, rate_tries=1, arms=arms), run_trial=run_here)


@pytest.mark.slow
def test_a_comparison_runs_resumes_and_judges(small_run: TrainConfig, tmp_path: Path) -> None:
    train = small_run.replaced(output_dir=str(tmp_path / "study"), max_steps=8)
    heard: list[str] = []
    found = compare(train, SMALL, log=heard.append, run_trial=run_here)
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
    assert lora.difference.value == pytest.approx(lora.eval_loss - full.eval_loss)
    assert found.verdict
    assert "The best learning rate of r4, 0.01, is at the edge of those tried (0.01)" in found.verdict
    assert found.judged_examples == 9
    assert json.loads((tmp_path / "study" / "report.json").read_text())["verdict"] == found.verdict
    assert found.verdict in unescape(write_page(tmp_path / "study").read_text())
    assert lora.eval_loss == pytest.approx(np.mean(lora.seed_losses))
    assert [len(losses) for losses in lora.train_losses] == [found.steps] * 2
    assert len(heard) == 2 + 4

    again = compare(train, SMALL, run_trial=not_run)
    assert again.arms == found.arms
    wider = compare(train, SMALL.replaced(margin=5.0), run_trial=not_run)
    assert wider.settings["compare"]["margin"] == 5.0
    with pytest.raises(ConfigError, match=r'forgetting_data was null and is now "texts\.jsonl"'):
        compare(train, SMALL.replaced(forgetting_data="texts.jsonl"))
    with pytest.raises(
        ConfigError, match=r"r was 4 and is now 2; .*max_steps was 8 and is now 7.*To resume it, use its settings"
    ):
        compare(train.replaced(r=2, max_steps=7), SMALL)
    assert compare(train, SMALL.replaced(minutes=5.0), run_trial=not_run).arms == found.arms


@pytest.mark.slow
def test_pairs_of_replies_are_compared_in_their_own_unit(small_run: TrainConfig, pairs: Path, tmp_path: Path) -> None:
    train = small_run.replaced(data=str(pairs), output_dir=str(tmp_path), num_train_epochs=1, max_steps=2)
    arms: dict[str, dict[str, Any]] = {"r4": {"learning_rate": 1e-2}, "r2": {"learning_rate": 1e-2, "r": 2}}
    study = CompareConfig(seeds=1, rate_tries=1, arms=arms)
    found = compare(train, study, run_trial=run_here)
    assert found.loss_unit == "per example"
    assert "token" not in found.verdict
    assert found.base_loss == pytest.approx(np.log(2))
    run = tmp_path / "runs" / "r4" / "seed-1-rate-0.01"
    rows = [json.loads(line) for line in (run / "run" / "examples.jsonl").read_text().splitlines()]
    judged = [rows[index]["scores_after"] for index in evaluation_half(len(rows))]
    right = [row["chosen_reward"] > row["rejected_reward"] for row in judged]
    assert found.arms[0].further["accuracy"].value == pytest.approx(np.mean(right))
    assert "Accuracy" in write_page(tmp_path).read_text()
    write_train_report(run / "run")  # the scores before training were not computed again


@pytest.mark.slow
def test_no_run_starts_after_the_minutes(
    small_run: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the first learning rate, then after the first seed; a comparison may be given more."""
    ran: list[Path] = []

    def counted(spec: TrialSpec, folder: Path, listen: Listen) -> Trial:
        ran.append(folder)
        return run_here(spec, folder, listen)

    most = 1
    monkeypatch.setattr(StudySession, "is_over", property(lambda _: len(ran) >= most))
    train = small_run.replaced(output_dir=str(tmp_path / "study"), max_steps=3)
    with pytest.raises(ConfigError, match=r"--minutes 5 were over after the search for learning rates \(best so far: "):
        compare(train, SMALL.replaced(minutes=5), run_trial=counted)
    most = 2
    with pytest.raises(ConfigError, match=r"\(best so far: r4 0\.01, full 5e-05\)\. The same command with a higher"):
        compare(train, SMALL.replaced(minutes=5), run_trial=counted)
    most = 5  # three of the four final runs
    short = compare(train, SMALL.replaced(minutes=5), run_trial=counted)
    assert short.seeds == [1]
    assert short.notes == [
        "--minutes 5 left time for 1 of 2 seeds; the same command with a higher --minutes adds the others"
    ]
    (texts,) = (tmp_path / "study").glob("texts.json")
    assert len(json.loads(texts.read_text())) == 16
    most = 99
    assert compare(train, SMALL, run_trial=counted).seeds == [1, 2]
    assert len(ran) == len(set(ran)) == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": {"one": {}}}, "expected at least two variants"),
        ({"arms": {"a": {"method": "full"}, "b": {"method": "full"}}}, "several variants have method=full"),
        ({"arms": {"a": {"data": "x"}, "b": {"seed": 1}}}, "'a' changes data.*'b' changes seed"),
        ({"arms": {"a": {"loss": "dpo"}, "b": {"loss": "orpo"}}}, "'a' changes loss.*'b' changes loss"),
        ({"arms": {"a": {}, "b": {"max_length": 64}}}, "'b' changes max_length, which must be the same"),
        ({"arms": {"a": {"r": 4}, "b": {"r": 8}, "c": {"r": 4}}}, "variants 'a' and 'c' have the same settings"),
        ({"seeds": 0}, "seeds"),
        ({"minuts": 3}, "did you mean"),
    ],
)
def test_a_study_that_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        CompareConfig(**changes)


def test_settings_of_an_arm_that_contradict_each_other_are_found_before_any_run(
    small_run: TrainConfig, tmp_path: Path
) -> None:
    study = CompareConfig(arms={"r4": {}, "full": {"method": "full", "r": 3}})
    with pytest.raises(ConfigError, match="remove r"):
        compare(small_run.replaced(output_dir=str(tmp_path / "study")), study)
    assert not (tmp_path / "study").exists()


def test_full_fine_tuning_takes_nothing_of_the_adapters_and_their_frozen_base(small_run: TrainConfig) -> None:
    asked = {"quantize": "int8", "loraplus_lr_ratio": 4, "use_dora": False, "lora_alpha": 3}
    train = small_run.replaced(**asked)
    of_full = arm_settings(train, SMALL, "full", learning_rate=1e-4)
    assert not {"r", *asked} & of_full.keys()
    assert TrainConfig(**of_full).quantize is None
    of_lora = TrainConfig(**arm_settings(train, SMALL, "r4"))
    assert {name: getattr(of_lora, name) for name in asked} == asked


def test_a_step_chosen_by_the_examples_that_judge_is_refused(small_run: TrainConfig, tmp_path: Path) -> None:
    train = small_run.replaced(eval_steps=5, early_stopping_patience=2, output_dir=str(tmp_path / "study"))
    with pytest.raises(ConfigError, match="remove early_stopping_patience and eval_steps"):
        compare(train, SMALL)
    assert not (tmp_path / "study").exists()


def test_a_second_comparison_leaves_the_runs_of_the_first_alone(small_run: TrainConfig, tmp_path: Path) -> None:
    """Also before the first result, when other settings would replace those of the folder."""
    train = small_run.replaced(output_dir=str(tmp_path))
    heard: list[int] = []

    def second(_: TrialSpec, folder: Path, __: Listen) -> Trial:
        with pytest.raises(ConfigError, match="another comparison is writing to"):
            compare(train.replaced(r=2), SMALL, run_trial=not_run)
        assert (folder / "spec.json").exists()
        heard.append(json.loads((tmp_path / "compare.json").read_text())["train"]["r"])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(train, SMALL, run_trial=second)
    assert heard == [4]


def test_too_few_held_out_examples_are_found_before_any_step(
    small_run: TrainConfig, tmp_path: Path, progress: Any
) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text("".join(Path(small_run.data).read_text().splitlines(keepends=True)[:3]))
    train = small_run.replaced(eval_data=str(few), output_dir=str(tmp_path / "study"))
    with pytest.raises(ConfigError, match="3 distinct held-out examples are too few"):
        compare(train, SMALL, progress=progress, run_trial=run_here)
    assert (progress.steps, progress.ended) == ([], [1])


def test_the_command_passes_on_how_many_processes_a_run_has(
    small_run: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, processes: int, **__: object) -> None:
        raise ConfigError(f"each run has {processes}")

    words = ["--model", small_run.model, "--data", small_run.data, "--device", "cpu", "--output-dir", str(tmp_path)]
    for command in ("compare", "search"):
        monkeypatch.setattr(f"tailora.study.{command}.{command}", refuse)
        check_refused("each run has 2", command, *words, "--nproc-per-node", "2")
        check_refused("each run has 1", command, *words)
        check_refused("--nproc-per-node 'two': use a number", command, *words, "--nproc-per-node", "two")
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_refused("each process of a launcher would run the whole study", "compare", *words)


@pytest.mark.slow
def test_arms_for_labels_are_judged_by_accuracy_too(labels_run: TrainConfig, tmp_path: Path) -> None:
    train = labels_run.replaced(output_dir=str(tmp_path / "out"))

    def here(spec: TrialSpec, folder: Path, listen: Listen, worker: Worker | None = None) -> Trial:
        assert worker is None
        assert spec.before is None  # each seed has another head
        return run_here(spec, folder, listen)

    study = CompareConfig(arms={"lora": {}, "low": {"r": 2}}, seeds=2, rate_tries=1)
    comparison = compare(train, study, run_trial=here)
    low = next(arm for arm in comparison.arms if arm.name == "low")
    assert comparison.loss_unit == "nats per row"
    assert "nats per row" in comparison.verdict
    assert low.further["accuracy"].value > 0
    assert low.further["accuracy"].difference is not None
    assert low.forgetting is None
    page = write_page(tmp_path / "out").read_text()
    assert "loss, nats per row" in page
    assert "KL from base" not in page
    with pytest.raises(ConfigError, match="does not train a language model, so forgetting cannot be measured"):
        compare(train, study.replaced(forgetting_data="texts.jsonl"), run_trial=not_run)
