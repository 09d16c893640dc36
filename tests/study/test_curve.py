"""A learning curve on a tiny model: its subsets, runs, resuming, minutes, page and verdict, and what is refused."""

import json
from dataclasses import replace
from functools import partial
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate import Accelerator
from pydantic import TypeAdapter
from report.contents import CONTENTS
from transformers import AutoTokenizer

from tailora.cli.main import main
from tailora.errors import ConfigError
from tailora.report.files import write_page
from tailora.study import data_scaling
from tailora.study.config import CurveConfig
from tailora.study.curve import curve, curve_verdict
from tailora.study.results import Change, LearningCurve
from tailora.study.trial import DONE, OUT_OF_MEMORY, Listen, Trial, TrialEvent, TrialSpec, get_trial, run_here
from tailora.train.config import TrainConfig
from tailora.train.dataloader import TrainingData, read_data, read_subset

SMALL = CurveConfig(seeds=2)
EXAMPLES = 200  # of made-up data
TOKENS = 5  # of a held-out example


class MadeUp:
    """Runs trials whose loss follows from the subset, the rank and the number of steps.

    Each size has a best number of steps, above which it overfits: 6 for each quarter of the data.
    """

    def __init__(self, gain: float = 0.2, of_rank: float = 0.0) -> None:
        self.gain, self.of_rank = gain, of_rank
        self.ran: list[TrialSpec] = []

    def loss(self, spec: TrialSpec, step: int) -> float:
        size = spec.subset or EXAMPLES
        loss = 1 + self.gain * (EXAMPLES / size) ** 0.5 - self.of_rank * (spec.settings["r"] > 4)
        return loss + self.gain / 20 * abs(np.log2(step / (24 * size / EXAMPLES)))

    def __call__(self, spec: TrialSpec, folder: Path, listen: Listen, **_: Any) -> Trial:
        self.ran.append(spec)
        steps, every = spec.settings["max_steps"], spec.settings.get("eval_steps") or spec.settings["max_steps"]
        curve, outcome = [], DONE
        for step in range(1, steps + 1):
            if step % every == 0 or step == steps:
                event = TrialEvent(step, steps, self.loss(spec, step), held_out=True, parameters=1, seconds=0.01)
                curve.append((step, event.loss))
                if (reason := listen(event)) is not None:
                    return Trial("pruned", reason, curve=curve)
        random = np.random.default_rng([spec.settings.get("seed", 0), spec.subset or 0])
        count = 20 if spec.choosing else 40
        losses = self.loss(spec, steps) + 0.005 * random.normal() + 0.01 * random.normal(size=count)
        numbers = {"train_examples": EXAMPLES, "held_out": 40, "all_steps": 100, "seconds": 1.0, "data_warnings": {}}
        numbers |= {"seed": spec.settings.get("seed", 0), "output_dir": str(folder)}
        return Trial(
            outcome,
            "",
            numbers=numbers,
            sums=(TOKENS * losses).tolist(),
            before=[2.0 * TOKENS] * count,
            counts=[TOKENS] * count,
            curve=curve,
            step_seconds=[0.1] * steps,
            evaluation_seconds=[0.1],
        )


@pytest.fixture
def train(small_run: TrainConfig, tmp_path: Path) -> TrainConfig:
    return small_run.replaced(output_dir=str(tmp_path / "out"))


@pytest.fixture
def with_forecasts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_scaling, "FORECASTS", True)


def test_a_larger_subset_contains_the_smaller_ones(small_run: TrainConfig) -> None:
    tokenizer, accelerator = AutoTokenizer.from_pretrained(small_run.model), Accelerator(cpu=True)

    def rows(count: int | None, seed: int = 0) -> set[int]:
        config = small_run.replaced(seed=seed, max_steps=3, split_seed=0)
        read = read_data if count is None else partial(read_subset, count)
        data: TrainingData = read(config, 10**6, tokenizer, accelerator, None)
        assert data.held_out is not None
        assert len(data.held_out) == 18
        of_steps = {example.source_index for step in [next(data.steps(0))] for b in step.micro_batches for example in b}
        indices = set(data.known.source_indices.tolist())
        assert of_steps <= indices
        return indices

    everything = rows(None)
    assert [len(rows(count)) for count in (5, 21, 42)] == [5, 21, 42] == [5, 21, len(everything)]
    assert rows(5) < rows(21) < everything
    assert rows(5) != rows(5, seed=1)


@pytest.mark.usefixtures("with_forecasts")
def test_each_subset_has_its_best_number_of_steps(train: TrainConfig) -> None:
    runs = MadeUp()
    found = curve(train, CurveConfig(), run_trial=runs)
    assert [(point.examples, point.r) for point in found.points] == [
        (size, rank) for rank in (4, 16) for size in (25, 50, 100, 200)
    ]
    assert [point.steps for point in found.points[:4]] == [5, 7, 9, 26]  # evaluated every 5, 7, 9 and 13 steps
    finals = [spec for spec in runs.ran if not spec.choosing and spec.held_out is None]
    assert {spec.settings["max_steps"] for spec in finals} == {5, 7, 9, 26}
    assert {spec.settings["seed"] for spec in finals} == {1, 2, 3}
    assert all("eval_steps" not in spec.settings for spec in finals)
    assert {spec.subset for spec in finals} == {25, 50, 100, None}
    assert "more steps may help" not in found.verdict
    assert found.doubling.change == pytest.approx(0.2 * (2**-0.5 - 1), abs=0.03)
    assert found.doubling.interval[1] < 0
    assert "The data is the bottleneck, not the rank" in found.verdict
    assert found.quarter.change == pytest.approx(0.2, abs=0.03)
    assert found.band[-1][0] == pytest.approx(400)


def test_a_resumed_curve_reads_its_runs_and_adds_seeds(train: TrainConfig) -> None:
    first = curve(train, SMALL, run_trial=MadeUp())
    again = curve(train, SMALL, run_trial=(runs := MadeUp()))
    assert not runs.ran
    assert again.points == first.points
    more = curve(train, CurveConfig(seeds=3, margin=0.5), run_trial=runs)
    assert len(runs.ran) == 8
    assert [point.seed_losses[:2] for point in more.points] == [point.seed_losses for point in first.points]
    with pytest.raises(ConfigError, match="contains a learning curve with different settings: r was 4 and is now 2"):
        curve(train.replaced(r=2), SMALL, run_trial=runs)


def test_a_loss_that_rises_at_first_ends_no_run(train: TrainConfig) -> None:
    class Rising(MadeUp):
        def loss(self, spec: TrialSpec, step: int) -> float:
            return super().loss(spec, step) + (step / 10 if step <= 15 else 0)

    found = curve(train, SMALL, run_trial=Rising())
    assert [point.steps for point in found.points[:4]] == [20, 21, 18, 26]


def test_an_interrupted_curve_resumes_and_its_folder_is_locked(train: TrainConfig) -> None:
    runs = MadeUp()

    def interrupted(spec: TrialSpec, folder: Path, listen: Listen) -> Trial:
        if len(runs.ran) == 12:
            with pytest.raises(ConfigError, match="another learning curve is writing to"):
                curve(train, SMALL, run_trial=runs)
            raise KeyboardInterrupt
        return runs(spec, folder, listen)

    with pytest.raises(KeyboardInterrupt):
        curve(train, SMALL, run_trial=interrupted)
    found = curve(train, SMALL, run_trial=runs)
    assert len(runs.ran) == 1 + 8 + 16  # the timing run, the best steps, final runs: each once
    assert len({spec.settings.get("seed") for spec in runs.ran if spec.held_out is None and not spec.choosing}) == 2
    assert found.points[0].seed_losses[0] != found.points[0].seed_losses[1]


def test_minutes_limit_the_steps_and_the_largest_subset(train: TrainConfig) -> None:
    logged: list[str] = []
    found = curve(train, CurveConfig(minutes=1, margin=0.001), log=logged.append, run_trial=(runs := MadeUp(gain=0.0)))
    assert found.steps == 28
    largest = found.points[3].examples
    assert largest == found.steps * 4 < EXAMPLES  # batches of 4, each example once
    assert len(found.points) == 5
    assert found.points[-1].r == 16
    assert f"Only {largest} of 200 examples were used, so this does not show whether 200 are enough" in found.verdict
    assert "Cannot tell the curve from a flat one" in found.verdict
    assert [spec.subset for spec in runs.ran[1:6]] == [
        largest,
        *(point.examples for point in reversed(found.points[:4])),
    ]
    with pytest.raises(ConfigError, match=r"--minutes 0.01 is too short: 5 subsets with 2 seeds each, 9 steps per run"):
        curve(train.replaced(output_dir=f"{train.output_dir}-2"), CurveConfig(minutes=0.01), run_trial=MadeUp())


def test_runs_that_learn_to_the_end_fit_into_the_minutes(train: TrainConfig) -> None:
    """Also with evaluations that would need all of the time: they get fewer examples."""

    class Falling(MadeUp):
        seconds = 0.0

        def loss(self, spec: TrialSpec, step: int) -> float:
            return super().loss(spec, step) - 0.001 * step

        def __call__(self, spec: TrialSpec, folder: Path, listen: Listen, **_: Any) -> Trial:
            run = super().__call__(spec, folder, listen)
            numbers = {**run.numbers, "held_out": 400}
            evaluation = 0.01 * (spec.held_out or 400) / (1 + spec.choosing)
            self.seconds += 0.5 + sum(run.step_seconds) + evaluation * len(run.curve)
            return replace(run, numbers=numbers, evaluation_seconds=[evaluation])

    found = curve(train, CurveConfig(minutes=2, seeds=2), run_trial=(runs := Falling(gain=0.0)))
    assert 40 < found.steps < 100
    assert 60 < runs.seconds < 120
    note = "of 400 held-out examples fit into --minutes"
    assert any(note in text for text in found.notes)


def test_the_verdict_names_the_flag_that_limited_the_steps(train: TrainConfig) -> None:
    class Falling(MadeUp):
        def loss(self, spec: TrialSpec, step: int) -> float:
            return super().loss(spec, step) - step

    for name, max_steps, minutes in (("epochs", None, None), ("max-steps", 60, 99), ("minutes", 60, 1)):
        limited = train.replaced(output_dir=f"{train.output_dir}-{name}", max_steps=max_steps)
        study = CurveConfig(seeds=2, minutes=minutes)
        found = curve(limited, study, run_trial=Falling())
        flag = name.replace("epochs", "num-train-epochs")
        assert f"after {found.steps} of at most {found.steps} steps" in found.verdict
        assert found.verdict.endswith(f"Use a higher --{flag} and a different --output-dir.")
    assert 9 < found.steps < 60
    note = f"runs have at most {found.steps} steps, as planned for --minutes 1; for longer runs, use a different --outp"
    again = [curve(limited, study.replaced(minutes=more), run_trial=Falling()).notes for more in (1, 2)]
    with pytest.raises(ConfigError, match=r"--minutes 0.5 is too short: the curve in .* was planned with --minutes 1;"):
        curve(limited, study.replaced(minutes=0.5), run_trial=Falling())
    assert [any(text.startswith(note) for text in notes) for notes in again] == [False, True]


@pytest.mark.usefixtures("with_forecasts")
def test_the_report_and_its_page(train: TrainConfig) -> None:
    found = curve(train, SMALL, run_trial=MadeUp(of_rank=0.3))
    report = json.loads((Path(train.output_dir) / "report.json").read_text())
    assert report["kind"] == "curve"
    assert report["doubling"] == {"change": found.doubling.change, "interval": [*found.doubling.interval]}
    assert "Both the data and the rank limit the result" in found.verdict
    page = unescape(write_page(Path(train.output_dir)).read_text())
    for text in (found.verdict, "400 examples (forecast)", "rank 16", f"{found.points[3].eval_loss:.4f}"):
        assert text in page


def test_what_cannot_be_measured_is_refused(train: TrainConfig) -> None:
    for changes, text in (
        ({"eval_steps": 5}, "eval_steps"),
        ({"data": [f"{train.data}=2"]}, "--data .*=2"),
    ):
        with pytest.raises(ConfigError, match=f"a learning curve does not support {text}; remove it"):
            curve(train.replaced(**changes), SMALL)
    with pytest.raises(ConfigError, match="a learning curve does not support --adapter; remove it"):
        curve(TrainConfig(model=train.model, data=train.data, adapter="outputs/chats"), SMALL)
    with pytest.raises(ConfigError, match=r"needs at least 32 training examples, got 8 of 200"):
        curve(train.replaced(max_steps=2), SMALL, run_trial=MadeUp())

    def full(*args: Any, **_: Any) -> Trial:
        run = MadeUp()(*args)
        return run if args[0].held_out else replace(run, outcome=OUT_OF_MEMORY, message="no memory")

    with pytest.raises(ConfigError, match=r"run with 200 examples at rank 16 failed \(out of memory: no memory\)"):
        curve(train.replaced(output_dir=f"{train.output_dir}-2"), SMALL, run_trial=full)


@pytest.mark.parametrize(
    ("doubling", "quarter", "rank", "sentences"),
    [
        (
            (-0.1, -0.15, -0.05),
            (0.2, 0.1, 0.3),
            (0.0, -0.01, 0.01),
            ["would help", "is worse", "data is the bottle"],
        ),
        ((0.0, -0.01, 0.0), (0.0, -0.01, 0.01), (-0.1, -0.2, -0.05), ["hardly help", "as well", "rank is the bottle"]),
        (
            (-0.03, -0.2, 0.0),
            (0.1, -0.1, 0.3),
            (0.0, -0.5, 0.5),
            ["from a flat", "may be worse", "whether the data"],
        ),
        ((0.0, -0.01, 0.0), (0.0, -0.01, 0.01), (0.0, -0.01, 0.01), ["hardly help", "as well", "Neither the data nor"]),
        ((-0.015, -0.03, -0.005), (0.2, 0.1, 0.3), (0.0, -0.01, 0.01), ["data may help", "whether the data"]),
    ],
)
def test_the_verdict(
    doubling: tuple[float, ...], quarter: tuple[float, ...], rank: tuple[float, ...], sentences: list[str]
) -> None:
    more, few, high_rank = (Change(value, (low, high)) for value, low, high in (doubling, quarter, rank))
    read = TypeAdapter(LearningCurve).validate_python(CONTENTS["curve"]())
    result = replace(read, doubling=more, half=Change(0.5, (0.4, 0.6)), quarter=few, high_rank=high_rank)
    text = curve_verdict(result, 0.02, "--minutes", 200)
    assert all(sentence in text for sentence in sentences)
    assert f"twice the 200 examples would change the held-out loss by {doubling[0]:+.3f} (90% interval" in text
    measured = curve_verdict(replace(result, doubling=None, half=-more), 0.02, "--minutes", 200)
    for forecast, measurement in (
        ("would help", "helped"),
        ("may help:", "helped, but perhaps by less than the margin:"),
        ("would hardly help", "hardly helped"),
        ("twice the 200 examples would change", "the last doubling, to 200 examples, changed"),
    ):
        text = text.replace(forecast, measurement)
    assert measured == text


def test_a_last_doubling_that_raised_the_loss_did_not_help() -> None:
    read = TypeAdapter(LearningCurve).validate_python(CONTENTS["curve"]())
    result = replace(read, doubling=None, half=Change(-0.05, (-0.07, -0.03)))
    assert curve_verdict(result, 0.02, "--minutes", 200).startswith("More data did not help: the last doubling, to 200")


def test_without_forecasts_the_page_shows_the_measured_points(train: TrainConfig) -> None:
    assert not data_scaling.FORECASTS
    found = curve(train, SMALL, run_trial=MadeUp())
    assert found.doubling is None
    assert found.half.change == pytest.approx(0.2 * (2**0.5 - 1), abs=0.03)
    assert found.band[-1][0] == pytest.approx(200)
    assert "More data helped: the last doubling, to 200 examples, changed the held-out loss by -0.0" in found.verdict
    page = unescape(write_page(Path(train.output_dir)).read_text())
    assert "forecast" not in page


def test_the_command(
    small_run: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def get_made_up(spec: TrialSpec, path: Path, **options: Any) -> Trial:
        return get_trial(spec, path, **{**options, "run_trial": MadeUp()})

    monkeypatch.setattr("tailora.study.study_store.get_trial", get_made_up)
    words = ["--model", small_run.model, "--data", str(small_run.data), "--r", "4", "--seeds", "2"]
    assert main(["curve", *words, "--output-dir", str(tmp_path / "out"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["doubling"] is None
    low, high = result["half"]["interval"]
    assert 0 < low <= result["half"]["change"] <= high
    assert result["settings"]["train"]["num_train_epochs"] == 2
    assert main(["report", str(tmp_path / "out")]) == 0


@pytest.mark.exhaustive  # by default, the page tests run the command
def test_a_curve_of_a_tiny_model(small_run: TrainConfig, tmp_path: Path) -> None:
    train = small_run.replaced(output_dir=str(tmp_path / "out"), learning_rate=1e-2)
    real = curve(train, SMALL, run_trial=run_here)
    assert [point.examples for point in real.points] == [5, 10, 21, 42] * 2
    assert real.steps == 22
    assert real.judged_examples == 9
    for point in real.points:
        assert point.eval_loss < real.base_loss
        assert point.seed_losses[0] != point.seed_losses[1]
    assert len({point.eval_loss for point in real.points}) == 8
