"""A learning curve on a tiny model: its subsets, runs, resuming, minutes, page and verdict, and what is refused."""

import json
from dataclasses import asdict, replace
from functools import partial
from html import unescape
from pathlib import Path
from typing import Any

import command_line
import numpy as np
import pytest
from accelerate import Accelerator
from pydantic import TypeAdapter
from report.contents import CONTENTS
from transformers import AutoTokenizer

from tailora.errors import ConfigError
from tailora.evaluation.statistics import Difference
from tailora.report.files import write_page
from tailora.study.config import CurveConfig
from tailora.study.curve import curve, curve_verdict
from tailora.study.results import LearningCurve
from tailora.study.study_store import StudySession
from tailora.study.trial import DONE, OUT_OF_MEMORY, Listen, Trial, TrialEvent, TrialSpec, get_trial
from tailora.train.config import TrainConfig
from tailora.train.dataloader import TrainingData, read_data, read_subset

SMALL = CurveConfig(seeds=2)
EXAMPLES = 200  # of made-up data
TOKENS = 5  # of a held-out example


class MadeUp:
    """Runs trials whose loss follows from the subset, the rank and the number of steps.

    Each size has a best number of steps, above which it overfits: 6 for each quarter of the data.
    """

    def __init__(self, gain: float = 0.2, of_rank: float = 0.0, highest_r: int = 64) -> None:
        self.gain, self.of_rank, self.highest_r = gain, of_rank, highest_r
        self.ran: list[TrialSpec] = []

    def loss(self, spec: TrialSpec, step: int) -> float:
        size = spec.subset or EXAMPLES
        loss = 1 + self.gain * (EXAMPLES / size) ** 0.5 - self.of_rank * (spec.settings["r"] > 4)
        return loss + abs(self.gain) / 20 * abs(np.log2(step / (24 * size / EXAMPLES)))

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
        numbers = {"train_examples": EXAMPLES, "examples_per_step": 4, "held_out": 40, "all_steps": 100}
        numbers |= {"seconds": 1.0, "data_warnings": {}}
        numbers |= {
            "parts": {"highest_r": self.highest_r},
            "seed": spec.settings.get("seed", 0),
            "output_dir": str(folder),
        }
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


def test_a_larger_subset_contains_the_smaller_ones(small_run: TrainConfig) -> None:
    tokenizer, accelerator = AutoTokenizer.from_pretrained(small_run.model), Accelerator(cpu=True)

    def rows(count: int | None, seed: int = 0) -> set[int]:
        config = small_run.replaced(seed=seed, max_steps=3, split_seed=0)
        read = read_data if count is None else partial(read_subset, count)
        data: TrainingData = read(config, tokenizer, accelerator, None)
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


def test_each_subset_has_its_best_number_of_steps(train: TrainConfig) -> None:
    runs = MadeUp()
    found = curve(train, CurveConfig(), run_trial=runs)
    assert [(point.examples, point.r) for point in found.points] == [
        (size, rank) for rank in (4, 16) for size in (25, 50, 100, 200)
    ]
    assert [point.steps for point in found.points[:4]] == [5, 7, 9, 26]  # evaluated every 5, 7, 9 and 13 steps
    finals = [spec for spec in runs.ran if not spec.choosing and "seed" in spec.settings]
    assert {spec.settings["max_steps"] for spec in finals} == {5, 7, 9, 26}
    assert {spec.settings["seed"] for spec in finals} == {1, 2, 3}
    assert all("eval_steps" not in spec.settings for spec in finals)
    assert {spec.subset for spec in finals} == {25, 50, 100, None}
    assert "more steps may help" not in found.verdict
    losses = [point.eval_loss for point in found.points[:4]]
    assert losses == pytest.approx([1 + 0.2 * (EXAMPLES / size) ** 0.5 for size in (25, 50, 100, 200)], abs=0.02)
    assert [change.value for change in found.doublings] == pytest.approx(np.diff(losses))
    assert found.doublings[-1].high < 0
    assert found.trend.value == pytest.approx(np.polyfit(range(4), losses, 1)[0])
    assert found.trend.high < 0
    assert "The data is the bottleneck, not the rank" in found.verdict
    assert "Over all sizes, the loss falls with more data: -0." in found.verdict
    assert found.quarter.value == pytest.approx(losses[1] - losses[3])


def test_more_data_can_make_it_worse(train: TrainConfig) -> None:
    found = curve(train, CurveConfig(), run_trial=MadeUp(gain=-0.2))
    assert found.verdict.startswith("More data made it worse: the last doubling, to 200 examples, changed")
    assert "Over all sizes, the loss rises with more data: +0.1" in found.verdict
    assert "A quarter of the data does better: -0.2" in found.verdict
    assert all(change.high - change.low < 0.1 for change in (*found.doublings, found.trend, found.quarter))


@pytest.mark.parametrize(("highest", "ranks"), [(64, {4, 16}), (16, {4, 16}), (11, {4, 11}), (4, {4})])
def test_the_second_rank_is_at_most_the_model_s_highest(train: TrainConfig, highest: int, ranks: set[int]) -> None:
    found = curve(train, SMALL, run_trial=MadeUp(of_rank=0.3, highest_r=highest))
    assert {point.r for point in found.points} == ranks
    assert found.notes == [f"the model supports ranks up to {highest}, so no run has 4 times the rank"] * (highest < 16)
    words = f"rank {max(ranks)} instead of 4 changes the loss by -0.3"
    assert (words in found.verdict) == (max(ranks) > 4) == (found.high_rank is not None)
    write_page(Path(train.output_dir))


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
    assert len(runs.ran) == 1 + 8 + 16  # the probe, the best steps, final runs: each once
    assert len({spec.settings.get("seed") for spec in runs.ran if "seed" in spec.settings and not spec.choosing}) == 2
    assert found.points[0].seed_losses[0] != found.points[0].seed_losses[1]


def test_after_the_minutes_the_verdict_covers_what_is_there(
    train: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, study = MadeUp(), CurveConfig(minutes=5)
    most = 12
    monkeypatch.setattr(StudySession, "is_over", property(lambda _: len(runs.ran) >= most))
    with pytest.raises(
        ConfigError,
        match=r"no verdict yet: --minutes 5 were over after 7 final runs, before any with 25 examples\.",
    ):
        curve(train, study, run_trial=runs)
    most = 13
    found = curve(train, study, run_trial=runs)
    assert found.high_rank is None
    assert "Runs at a higher rank are missing." in found.verdict
    write_page(Path(train.output_dir))
    most = 18
    found = curve(train, study, run_trial=runs)
    assert [(point.r, point.examples) for point in found.points] == [(4, 25), (4, 50), (4, 100), (4, 200), (16, 200)]
    assert found.notes == [
        "--minutes 5 left time for 5 of 8 combinations of subset and rank; the same command with a higher --minutes "
        "adds the others",
        "--minutes 5 left time for 2 of 3 seeds; the same command with a higher --minutes adds the others",
    ]
    assert found.high_rank is not None
    most = 99
    found = curve(train, CurveConfig(), run_trial=runs)
    assert len(runs.ran) == 1 + 8 + 24
    assert len(found.points) == 8
    assert found.notes == []


def test_the_verdict_names_the_flag_that_limited_the_steps(train: TrainConfig) -> None:
    class Falling(MadeUp):
        def loss(self, spec: TrialSpec, step: int) -> float:
            return super().loss(spec, step) - step

    for name, max_steps in (("num-train-epochs", None), ("max-steps", 60)):
        limited = train.replaced(output_dir=f"{train.output_dir}-{name}", max_steps=max_steps)
        found = curve(limited, SMALL, run_trial=Falling())
        assert f"after {found.steps} of at most {found.steps} steps" in found.verdict
        assert found.verdict.endswith(f"Use a higher --{name} and a different --output-dir.")


def test_the_report_and_its_page(train: TrainConfig) -> None:
    found = curve(train, SMALL, run_trial=MadeUp(of_rank=0.3))
    report = json.loads((Path(train.output_dir) / "report.json").read_text())
    assert report["kind"] == "curve"
    assert report["trend"] == asdict(found.trend)
    assert "Both the data and the rank limit the result" in found.verdict
    page = unescape(write_page(Path(train.output_dir)).read_text())
    for text in (found.verdict, "from 100 to 200 examples", "rank 16 instead of 4", f"{found.points[3].eval_loss:.4f}"):
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
        return run if args[0].settings["max_steps"] == 4 else replace(run, outcome=OUT_OF_MEMORY, message="no memory")

    with pytest.raises(ConfigError, match=r"run with 200 examples at rank 4 failed \(out of memory: no memory\)"):
        curve(train.replaced(output_dir=f"{train.output_dir}-2"), SMALL, run_trial=full)


def changed(value: float, low: float, high: float) -> Difference:
    return Difference(value, low, high, p_value=0.05, examples=50, seeds=3, from_examples=0.4)


WORSE, FLAT, BETTER, UNCLEAR = (0.2, 0.1, 0.3), (0.0, -0.01, 0.01), (-0.1, -0.2, -0.05), (0.1, -0.1, 0.3)


@pytest.mark.parametrize(
    ("doubling", "quarter", "rank", "sentences"),
    [
        (BETTER, WORSE, FLAT, ["More data helped: ", "is worse", "data is the bottle"]),
        (FLAT, (-0.005, -0.015, 0.005), BETTER, ["More data hardly helped", "as well", "rank is the bottle"]),
        (UNCLEAR, UNCLEAR, UNCLEAR, ["Cannot tell whether more", "from the seeds", "may be worse", "whether the data"]),
        (FLAT, FLAT, FLAT, ["hardly helped", "as well", "Neither the data nor"]),
        ((-0.015, -0.03, -0.005), WORSE, FLAT, ["helped, perhaps by less than the margin", "whether the data"]),
        ((-0.02, -0.03, -0.01), WORSE, (-0.02, -0.03, -0.01), ["More data helped: ", "Both the data and the rank"]),
        (WORSE, WORSE, BETTER, ["More data made it worse", "rank is the bottle"]),
        (WORSE, BETTER, FLAT, ["More data made it worse", "A quarter of the data does better", "Neither the data nor"]),
    ],
)
def test_the_verdict(
    doubling: tuple[float, ...], quarter: tuple[float, ...], rank: tuple[float, ...], sentences: list[str]
) -> None:
    last, few, high_rank = (changed(*numbers) for numbers in (doubling, quarter, rank))
    read = TypeAdapter(LearningCurve).validate_python(CONTENTS["curve"]())
    result = replace(read, doublings=[last], quarter=few, high_rank=high_rank)
    text = curve_verdict(result, 0.02, "--max-steps", 200)
    assert all(sentence in text for sentence in sentences)
    assert f"the last doubling, to 200 examples, changed the held-out loss by {doubling[0]:+.3f} (95% interval" in text
    for low, high, sign in ((-0.02, -0.01, "falls"), (0.01, 0.02, "rises"), (-0.01, 0.01, "may fall or rise")):
        text = curve_verdict(replace(result, trend=changed(0.0, low, high)), 0.02, "--max-steps", 200)
        assert f"Over all sizes, the loss {sign} with more data" in text
    for steps, examples, has_limits in ((80, 200, (True, False)), (81, 200, (False, False)), (81, 201, (False, True))):
        best_after_70 = replace(result, steps=steps, points=[replace(point, steps=70) for point in result.points])
        text = curve_verdict(best_after_70, 0.02, "--max-steps", examples)  # evaluated EVALUATIONS = 8 times
        assert has_limits == ("more steps may help" in text, "examples were used" in text)


def test_the_command(small_run: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def get_made_up(spec: TrialSpec, path: Path, **options: Any) -> Trial:
        return get_trial(spec, path, **{**options, "run_trial": MadeUp()})

    monkeypatch.setattr("tailora.study.study_store.get_trial", get_made_up)
    words = ["--model", small_run.model, "--data", small_run.data, "--r", 4, "--seeds", 2]
    result = command_line.found("curve", *words, "--output-dir", tmp_path / "out")
    assert [change["value"] < 0 for change in result["doublings"]] == [True] * 3
    assert result["settings"]["train"]["num_train_epochs"] == 2
    command_line.output("report", tmp_path / "out")
