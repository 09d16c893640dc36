"""Which step is kept: the metric that chooses it, on which rows, and what that must not change."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from runs import adapter, changed, losses, run_and_collect
from tiny_run import WORDS, words, write_rows

from tailora.cli.train import answer_prompts
from tailora.errors import ConfigError
from tailora.train import events
from tailora.train.best_step import ChoosingMetric, choosing_steps, curve_steps
from tailora.train.config import TrainConfig
from tailora.train.trainer import run

METRICS = """
def length(prompts, completions, **columns):
    with open(__file__ + ".calls", "a") as file:
        file.write(f"{len(prompts)}\\n")
    return [float(len(completion)) for completion in completions]

def shortness(completions, **columns):
    return [float(len(completion)) for completion in completions]

shortness.higher_is_better = False

def same(completions, **columns):
    return [1.0] * len(completions)
"""
CHOICE = {"eval_steps": 1, "max_steps": 4, "max_completion_length": 8, "metric_examples": 9, "validation_split": 0.5}


@pytest.fixture
def choosing(settings: Any, tmp_path: Path) -> Any:
    """Makes settings of a run whose step is chosen by one of METRICS, on 40 held-out rows."""
    rows = [{"prompt": f"{i} {i * 7919 % 9973} {WORDS[i % 10]}", "completion": " ".join(words(i))} for i in range(80)]
    write_rows(tmp_path / "rows.jsonl", rows)
    (tmp_path / "m.py").write_text(METRICS)

    def make(name: str, **changes: Any) -> TrainConfig:
        metric = {"metric": [f"{tmp_path}/m.py:{name}"], "metric_for_best_model": name}
        return settings(data=str(tmp_path / "rows.jsonl"), **{**CHOICE, **metric, **changes})  # type: ignore[no-any-return]

    return make


@pytest.mark.parametrize("name", ["length", "shortness", "same"])
def test_the_metric_chooses_the_step_and_the_loss_decides_between_equal_scores(choosing: Any, name: str) -> None:
    result, reports = run_and_collect(choosing(name), events.Evaluated)
    evaluated = {event.step: (event.metric[name], event.loss) for event in reports if event.step}
    assert reports[0].metric == {}
    scores = {step: score for step, (score, _) in evaluated.items()}
    if name == "same":
        folder = Path(result.output_dir)
        assert set(scores.values()) == {1.0}
        assert result.best_step == run(choosing(name, metric_for_best_model=None), overwrite=True).best_step
        assert "eval_same" not in (folder / "metrics.jsonl").read_text()
        return
    best = (max if name == "length" else min)(scores, key=scores.__getitem__)
    assert len(set(scores.values())) > 2
    assert result.best_step == best
    lines = [json.loads(line) for line in (Path(result.output_dir) / "metrics.jsonl").read_text().splitlines()]
    assert {line["step"]: line[f"eval_{name}"] for line in lines if f"eval_{name}" in line} == scores


def test_prompts_that_choose_the_step_are_not_judged(choosing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[ChoosingMetric] = []
    evaluate = ChoosingMetric.evaluate
    monkeypatch.setattr(ChoosingMetric, "evaluate", lambda self, *args: asked.append(self) or evaluate(self, *args))
    config = choosing("length", metric_examples=None, max_steps=1)
    result = run(config)
    answers, _ = answer_prompts(result, config)
    judge, choose = {answer.prompt for answer in answers}, {question.prompt.text for question in asked[0].questions}
    assert (len(choose), len(judge)) == (20, 20)
    assert not choose & judge
    by_loss = changed(config, metric_for_best_model=None, output_dir=f"{config.output_dir}-2")
    assert {answer.prompt for answer in answer_prompts(run(by_loss), by_loss)[0]} == judge


def test_losses_are_equal_to_the_bit_with_a_metric_and_a_killed_run_judges_once(choosing: Any, tmp_path: Path) -> None:
    shared = {"lora_dropout": 0.1, "save_steps": 1, "save_total_limit": 9}
    whole = choosing("length", output_dir=str(tmp_path / "whole"), **shared)
    without = changed(whole, metric_for_best_model=None, metric=[], output_dir=str(tmp_path / "without"))
    killed = changed(whole, output_dir=str(tmp_path / "killed"), resume_from_checkpoint="latest")

    def copy(event: events.Event) -> None:
        if isinstance(event, events.Stepped) and event.step == 3:
            shutil.copytree(whole.output_dir, killed.output_dir)

    run(without)
    result = run(whole, on_event=copy)
    assert losses(whole) == losses(without)
    for step in range(1, 5):
        adapters = [Path(c.output_dir) / f"checkpoint-{step}" / "adapter.safetensors" for c in (whole, without)]
        assert adapters[0].read_bytes() == adapters[1].read_bytes()
    calls = tmp_path / "m.py.calls"
    assert calls.read_text().split() == ["2", *["9"] * 4]  # a dry run, and each evaluation
    calls.unlink()
    resumed = run(killed)
    assert calls.read_text().split() == ["2", *["9"] * 2]
    assert (adapter(killed), losses(killed)) == (adapter(whole), losses(whole))
    assert resumed.best_step == result.best_step


def test_early_stopping_follows_the_metric(choosing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([1.0, 3.0, 2.0, 2.9])
    monkeypatch.setattr(ChoosingMetric, "evaluate", lambda *_: next(scores))
    result, reports = run_and_collect(choosing("length", early_stopping_patience=2, max_steps=8), events.Evaluated)
    assert (result.steps, result.best_step) == (4, 2)
    assert reports[-1].loss < reports[2].loss, "the loss would have gone on"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation_split": 0.4}, r"needs at least 40 held-out rows, got 32: .*--eval-data"),
        ({"metric_for_best_model": "loss"}, r"--metric-for-best-model loss: expected a metric of --metric \(length\)"),
        ({"metric_for_best_model": "judge:http://x"}, "a judge never chooses checkpoints"),
        ({"metric_examples": 0}, "needs answers; remove --metric-examples 0"),
        ({"eval_steps": None}, "metric_for_best_model: requires --eval-steps"),
        ({"metric": []}, "metric_for_best_model: requires --metric"),
    ],
)
def test_a_metric_that_cannot_choose_is_refused_before_the_model_is_loaded(
    choosing: Any, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr("tailora.train.setup.load_base", None)
    with pytest.raises(ConfigError, match=message):
        run(choosing("length", **changes))


@pytest.mark.parametrize(
    ("eval_steps", "max_steps", "choosing_ones", "others"),
    [
        (None, 9, [], [3, 6]),
        (0, 9, [], []),
        (4, 9, [4, 8, 9], []),
        (5, 9, [5, 9], [3, 6]),
        (None, 1, [], []),
        (None, 2, [], [1]),
    ],
)
def test_a_curve_has_four_points(
    settings: Any, eval_steps: int | None, max_steps: int, choosing_ones: list[int], others: list[int]
) -> None:
    config = settings(eval_steps=eval_steps)
    assert sorted(choosing_steps(config, max_steps)) == choosing_ones
    assert sorted(curve_steps(config, max_steps)) == others


def test_points_of_the_curve_choose_nothing(settings: Any) -> None:
    config = settings(eval_steps=None, max_steps=6)
    result, reports = run_and_collect(config, events.Evaluated)
    assert [event.step for event in reports] == [0, 2, 4, 6]
    assert not any(event.best for event in reports)
    assert (result.best_step, result.eval_loss_after) == (6, reports[-1].loss)
    without = changed(config, eval_steps=0, output_dir=f"{config.output_dir}-2")
    run(without)
    assert adapter(without) == adapter(config)
