"""Comparisons and searches with --metric choose settings by answers, and evaluate them by other answers."""

import json
from pathlib import Path

import numpy as np
import pytest

from tailora.data.dataset import evaluation_half, selection_half
from tailora.errors import ConfigError
from tailora.evaluation.statistics import difference_over_seeds
from tailora.report.files import page_of
from tailora.study.answer_scores import AnswerScores, GroupedScores
from tailora.study.compare import compare
from tailora.study.config import CompareConfig, SearchConfig
from tailora.study.search import search
from tailora.study.trial import run_here
from tailora.train.config import TrainConfig

METRICS = """
def texts(completions):
    return [reply if isinstance(reply, str) else reply[-1]["content"] for reply in completions]

def lengths(completions, **columns):
    return [float(len(text)) for text in texts(completions)]

lengths.higher_is_better = False

def letters(completions, **columns):
    return [float(len(set(text))) for text in texts(completions)]
"""


@pytest.fixture
def train(small_run: TrainConfig, tmp_path: Path) -> TrainConfig:
    (tmp_path / "metrics.py").write_text(METRICS)
    metrics = [f"{tmp_path}/metrics.py:{name}" for name in ("lengths", "letters")]
    return small_run.replaced(
        metric=metrics, max_completion_length=6, max_steps=6, output_dir=str(tmp_path / "study"), num_train_epochs=1
    )


@pytest.mark.slow
def test_a_comparison_chooses_rates_and_evaluates_arms_by_the_first_metric(train: TrainConfig) -> None:
    arms = {"r1": {"r": 1, "learning_rate": 3e-2}, "none": {"r": 2, "learning_rate": 1e-9}}
    lines: list[str] = []
    study = CompareConfig(seeds=2, rate_tries=2, arms=arms, margin=0.1)
    result = compare(train, study, log=lines.append, run_trial=run_here)
    folder = Path(train.output_dir)
    report = json.loads((folder / "report.json").read_text())
    assert (result.metric, result.higher_is_better) == ("lengths", False)
    trials = {
        path.parent.relative_to(folder / "runs"): json.loads(path.read_text())
        for path in folder.glob("runs/*/*/trial.json")
    }
    for arm in result.arms:
        tried = {
            name: np.mean(trial["answers"]["tuned"]["lengths"])
            for name, trial in trials.items()
            if name.parts[0] == arm.name and name.parts[1].startswith("rate-")
        }
        assert sorted(loss for loss in arm.rates.values() if loss is not None) == pytest.approx(sorted(tried.values()))
        finals = [
            trial
            for name, trial in sorted(trials.items())
            if name.parts[0] == arm.name and name.parts[1].startswith("seed-")
        ]
        scores = [np.mean(trial["answers"]["tuned"]["lengths"]) for trial in finals]
        assert arm.seed_losses == pytest.approx(scores)
        assert arm.eval_loss == pytest.approx(np.mean(scores))
        letters = [np.mean(trial["answers"]["tuned"]["letters"]) for trial in finals]
        assert arm.further["letters"].value == pytest.approx(np.mean(letters))
        half = evaluation_half(18)
        losses = [np.sum(np.array(t["sums"])[half]) / np.sum(np.array(t["counts"])[half]) for t in finals]
        assert arm.further["loss"].value == pytest.approx(np.mean(losses))
        assert [bool(trial["answers"]["base"]) for trial in finals] == [True, False]  # the base answers once
        assert result.base_loss == pytest.approx(np.mean(finals[0]["answers"]["base"]["lengths"]))
        assert all(len(trial["answers"]["clusters"]) == len(half) for trial in finals)
    shown = {arm["name"]: arm for arm in report["arms"]}
    assert shown["none"]["eval_score"] == result.arms[1].eval_loss
    assert "lengths" in result.verdict
    assert "nats" not in result.verdict
    assert any(f"held-out lengths {result.arms[0].seed_losses[0]:.4f}" in line for line in lines)
    page = page_of(report, "report.json")
    labels = {number.label: number.value for number in page.numbers}
    assert labels["held-out lengths, r1"] == f"{result.arms[0].eval_loss:.3f}"


@pytest.mark.slow
def test_a_search_chooses_by_the_first_metric(train: TrainConfig) -> None:
    train = train.replaced(metric=train.metric[::-1])  # higher is better
    study = SearchConfig(trials=3, seeds=1, finalists=2, space={"learning_rate": "1e-3,3e-2"}, margin=0.1)
    result = search(train, study, run_trial=run_here)
    folder = Path(train.output_dir)
    done = [trial for trial in result.trials if trial.state == "done"]
    for trial in done:
        stored = json.loads((folder / f"trials/{trial.number:04d}/trial.json").read_text())
        assert trial.eval_loss == pytest.approx(-np.mean(stored["answers"]["tuned"]["letters"]))
        assert len(stored["answers"]["clusters"]) == len(selection_half(18))
        assert not stored["answers"]["base"]
        assert trial.curve[-1][1] > 0  # of losses
    assert all(trial.eval_loss is None for trial in result.trials if trial.state != "done")
    assert result.best.choosing_loss == min(trial.eval_loss for trial in done if trial.eval_loss is not None)
    final = json.loads(next(folder.glob(f"finals/{result.best.number:04d}/*/trial.json")).read_text())
    assert result.best.eval_loss == pytest.approx(-np.mean(final["answers"]["tuned"]["letters"]))
    assert result.base_loss == pytest.approx(-np.mean(final["answers"]["base"]["letters"]))
    report = json.loads((folder / "report.json").read_text())
    assert report["best"]["eval_score"] == -result.best.eval_loss
    assert report["trials"][0]["curve"] == [list(point) for point in result.trials[0].curve]
    page = page_of(report, "report.json")
    assert page.numbers[0].value == f"{-result.best.eval_loss:.3f}"
    assert f"held-out letters {-result.best.eval_loss:.3f}" in result.verdict


@pytest.mark.parametrize(
    ("metric", "margin", "message"),
    [
        (["chrf"], {}, "--metric chrf: its unit is not known; add --margin"),
        (["metrics.py:lengths"], {}, "its unit is not known; add --margin"),
        (["judge:http://localhost:1"], {"margin": 0.1}, "a judge never chooses settings"),
    ],
)
def test_a_metric_that_cannot_choose_is_refused(
    train: TrainConfig, metric: list[str], margin: dict[str, float], message: str
) -> None:
    judge = {"judge_model": "m"} if "judge" in metric[0] else {}
    train = train.replaced(metric=metric, **judge)
    for run, study in ((compare, CompareConfig(**margin)), (search, SearchConfig(**margin))):
        with pytest.raises(ConfigError, match=message):
            run(train, study, run_trial=run_here)  # type: ignore[operator]


def test_answers_must_be_asked_for(train: TrainConfig) -> None:
    train = train.replaced(metric=["exact_match"], metric_examples=0)
    with pytest.raises(ConfigError, match="remove --metric-examples 0"):
        compare(train, CompareConfig(), run_trial=run_here)


def scores(values: list[float | None], clusters: list[int]) -> AnswerScores:
    return AnswerScores({"m": values}, {"m": True}, clusters)


def test_scores_are_summed_over_prompts_that_are_alike() -> None:
    rng, clusters = np.random.default_rng(0), [0, 0, 2, 3, 3, 3, 6, 7]
    values = {name: rng.normal(size=(2, 8)) for name in "ab"}
    runs = {name: [scores(row.tolist(), clusters) for row in rows] for name, rows in values.items()}
    runs["a"][1] = scores([*values["a"][1][:7], None], clusters)  # the last prompt is left out
    grouped = GroupedScores.of(runs, "m")
    assert grouped.counts.tolist() == [2, 1, 3, 1]
    by_hand = np.stack([rows[:, :2].sum(1) for rows in values.values()])
    assert np.array([sums[:, 0] for sums in grouped.sums.values()]) == pytest.approx(by_hand)
    difference = difference_over_seeds(grouped.sums["a"], grouped.sums["b"], grouped.counts)
    assert difference.value == pytest.approx((values["b"][:, :7] - values["a"][:, :7]).mean())
    assert difference.examples == 4
    assert grouped.problem("m") == "Cannot tell: 12% of the prompts have an answer without a score by m."


def test_scores_that_cannot_compare_runs() -> None:
    equal = {name: [scores([1.0] * 8, [*range(8)])] for name in "ab"}
    assert GroupedScores.of(equal, "m").problem("m").startswith("Cannot tell: every answer of every run got 1 from m")
    differing = {"a": [scores([0.0] * 8, [*range(8)])], "b": equal["b"]}
    assert not GroupedScores.of(differing, "m").problem("m")
    alike = {name: [scores([0.0, 1.0], [0, 0])] for name in "ab"}
    with pytest.raises(ConfigError, match="only 1 of the held-out prompts"):
        GroupedScores.of(alike, "m")


@pytest.mark.slow
def test_equal_scores_are_no_equality_of_the_arms(train: TrainConfig) -> None:
    arms = {"r1": {"r": 1}, "r2": {"r": 2}}
    train = train.replaced(metric=["max_length:1000"], max_steps=1)  # a share, so that the margin is known
    result = compare(train, CompareConfig(seeds=1, rate_tries=1, arms=arms), run_trial=run_here)
    assert result.verdict.startswith("Cannot tell: every answer of every run got 1 from max_length:1000")
    assert result.p_value is None
