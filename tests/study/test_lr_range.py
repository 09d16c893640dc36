"""The learning-rate range finder: landmarks of a curve, and a run whose suggestion trains well."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tailora.cli.main import main
from tailora.errors import ConfigError
from tailora.study.config import SearchConfig
from tailora.study.lr_range import (
    HIGHEST,
    LOWEST,
    STEPS,
    LearningRateSearch,
    RateRange,
    find_range,
    landmarks,
    read_range,
)
from tailora.study.search import search
from tailora.study.trial import Trial, TrialSpec, run_here
from tailora.train.config import TrainConfig
from tailora.train.optimizer import lr_range_test
from tailora.train.trainer import run


def test_a_rate_rises_by_one_factor_from_end_to_end() -> None:
    rates = [lr_range_test(step, 5, 1e-4, 1.0) for step in range(5)]
    assert rates == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1, 1.0])


def curve(noise: float, seed: int = 0) -> list[tuple[float, float]]:
    """Falls by 1 around 1e-3, lowest at 1e-2, and is lost above 3e-2."""
    rates = np.geomspace(LOWEST, HIGHEST, 40)
    place = np.log10(rates)
    losses = 4 - 1 / (1 + np.exp(-(place + 3) * 4)) + 3 / (1 + np.exp(-(place + 1.2) * 6))
    losses += np.random.default_rng(seed).normal(0, noise, len(rates))
    return list(zip(rates.tolist(), losses.tolist(), strict=True))


@pytest.mark.parametrize("noise", [0.0, 0.02])
@pytest.mark.parametrize("seed", range(5))
def test_the_useful_rates_are_found_under_noise(noise: float, seed: int) -> None:
    low, lowest, high, gain = landmarks(curve(noise, seed), 4.0)
    assert 8e-5 < low < 5e-4
    assert 3e-3 < lowest < 2.1e-2
    assert lowest < high < 6e-2
    assert gain == pytest.approx(1, abs=0.06)


def test_the_lowest_loss_counts_where_evaluations_are_far_apart() -> None:
    found = landmarks([(2.2e-4, 4.6), (7e-4, 3.9), (2.2e-3, 2.124), (6.8e-3, 1.318), (2.2e-2, 6.57)], 4.896)
    assert found == (pytest.approx(2.2e-4), pytest.approx(6.8e-3), pytest.approx(2.2e-2), pytest.approx(3.578))


def rising_run(losses: list[float]) -> Trial:
    steps = range(3, 3 * len(losses) + 1, 3)
    told = [(0, 4.0), *zip(steps, losses, strict=True)]
    return Trial("pruned", "diverging", {}, [], [], [], None, 0, losses=[4.0] * steps[-1], curve=told)


def test_rates_that_teach_nothing_are_no_range() -> None:
    with pytest.raises(ConfigError, match=r"no learning rate from 1e-06 to 1 lowered the held-out loss from 4\.000"):
        read_range(rising_run([4.0, 4.001, 4.2, 5.0]), STEPS, {})


def test_a_loss_belongs_to_the_rate_of_the_step_before_it() -> None:
    found = read_range(rising_run([3.5, 3.0, 5.0]), STEPS, {})
    rates = [lr_range_test(step - 1, STEPS, LOWEST, HIGHEST) for step in (3, 6, 9)]  # steps count from 0 there
    assert [rate for rate, _ in found.curve] == pytest.approx(rates)
    assert found.suggestion == pytest.approx(rates[1])


def test_the_gain_is_in_the_unit_of_the_losses() -> None:
    rising = replace(rising_run([4.0, 3.0, 5.0]), loss_unit="per example")
    assert "(1.000 per example below the base's 4.000)" in read_range(rising, STEPS, {}).verdict


def test_a_rate_that_was_given_is_not_looked_for(small_run: TrainConfig, tmp_path: Path) -> None:
    given = small_run.replaced(learning_rate=1e-3, output_dir=str(tmp_path / "rates"))
    with pytest.raises(ConfigError, match="remove learning_rate"):
        find_range(given, SearchConfig(lr_only=True))
    with pytest.raises(ConfigError, match="find_range"):
        search(given, SearchConfig(lr_only=True))
    assert not (tmp_path / "rates").exists()


@pytest.fixture(scope="module")
def found(small_run: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[RateRange, TrainConfig]:
    train = small_run.replaced(output_dir=str(tmp_path_factory.mktemp("rates") / "study"))
    return find_range(train, SearchConfig(lr_only=True), run_trial=run_here), train


@pytest.mark.exhaustive
def test_the_suggested_rate_trains_as_well_as_the_best_of_a_grid(
    found: tuple[RateRange, TrainConfig], tmp_path: Path
) -> None:
    rates, train = found
    assert rates.low < rates.suggestion <= rates.high
    assert rates.diverged == (rates.steps < STEPS)

    def loss_at(rate: float) -> float:
        folder = str(tmp_path / f"{rate:.2g}")
        after = run(train.replaced(learning_rate=rate, samples=0, max_steps=60, output_dir=folder)).eval_loss_after
        assert after is not None
        return after

    grid = {rate: loss_at(rate) for rate in 10 ** np.arange(-4.5, -0.9, 0.5)}
    assert rates.base_loss - min(grid.values()) > 1  # there is something to learn, and rates that do not
    assert loss_at(rates.suggestion) < min(grid.values()) + 0.1 * (rates.base_loss - min(grid.values()))


def test_settings_may_change_until_the_run_has_ended(small_run: TrainConfig, tmp_path: Path) -> None:
    def fail(*_: Any) -> Trial:
        raise ConfigError("no such data")

    for r in (2, 4):
        with pytest.raises(ConfigError, match="no such data"):
            find_range(small_run.replaced(r=r, output_dir=str(tmp_path)), SearchConfig(lr_only=True), run_trial=fail)


def test_max_steps_is_the_length_of_the_run(small_run: TrainConfig, tmp_path: Path) -> None:
    asked: list[int] = []

    def stop(spec: TrialSpec, *_: Any) -> Trial:
        asked.append(spec.settings["max_steps"])
        raise ConfigError("no such data")

    for steps, told in (
        (40, "no such data"),
        (29, "--max-steps 29 is too low to cover the learning rates; use 30 or more"),
    ):
        train = small_run.replaced(max_steps=steps, output_dir=str(tmp_path / str(steps)))
        with pytest.raises(ConfigError, match=told):
            find_range(train, SearchConfig(lr_only=True), run_trial=stop)
    assert asked == [40]


@pytest.mark.slow
def test_the_command_shows_what_was_found_before(
    found: tuple[RateRange, TrainConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    rates, train = found
    command = ["search", "--lr-only", "--model", train.model, "--data", train.data, "--dtype", "float32", "--r", "4"]
    command += ["--validation-split", "0.3", "--per-device-train-batch-size", "4", "--num-train-epochs", "2"]
    assert main([*command, "--output-dir", train.output_dir]) == 0
    assert f"--learning-rate {rates.suggestion:.1e}" in capsys.readouterr().out
    assert main([*command, "--output-dir", train.output_dir, "--json"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert math.isclose(said["suggestion"], rates.suggestion)
    assert json.loads((Path(train.output_dir) / "report.json").read_text())["curve"] == said["curve"]


# ---- The best rate of an arm


def searched(first: float, tries: int, best: float, cliff: float = math.inf) -> LearningRateSearch:
    """On a loss that is a parabola in log rate and diverges from `cliff` on."""
    rates = LearningRateSearch(first, tries)
    while (rate := rates.next_rate()) is not None:
        assert rate not in rates.tried
        rates.record(rate, math.inf if rate >= cliff else 3 + 0.1 * math.log(rate / best) ** 2)
    return rates


@pytest.mark.parametrize(
    ("best", "tries"), [(1e-6, 20), (4e-5, 20), (5e-4, 20), (8e-4, 5), (9e-4, 20), (3e-3, 20), (0.5, 20)]
)
def test_it_ends_within_a_factor_of_two_and_knows_that(best: float, tries: int) -> None:
    rates = searched(5e-4, tries, best)
    assert rates.best is not None
    assert max(rates.best / best, best / rates.best) <= 2
    assert rates.bracketed
    assert len(rates.tried) <= tries


def test_a_rate_that_diverges_bounds_the_search() -> None:
    rates = searched(5e-4, 20, 1e-2, cliff=4e-3)
    assert rates.best is not None
    assert rates.best < 4e-3
    assert rates.bracketed
    assert math.inf in rates.tried.values()


def test_when_all_diverge_it_goes_far_down_and_says_so() -> None:
    rates = searched(1.0, 2, 1e-9, cliff=1e-8)
    assert rates.best is None
    assert not rates.bracketed
    assert min(rates.tried) < 0.1


def test_out_of_tries_at_an_edge_is_not_bracketed() -> None:
    rates = searched(5e-4, 3, 1.0)
    assert not rates.bracketed


@pytest.mark.parametrize(("above", "below", "following"), [(1.1, 2.0, 2e-3), (2.0, 1.1, 5e-4)])
def test_the_finer_step_is_towards_the_better_neighbour(above: float, below: float, following: float) -> None:
    rates = LearningRateSearch(1e-3, 9)
    for rate, loss in ((1e-3, 1.0), (4e-3, above), (2.5e-4, below)):
        rates.record(rate, loss)
    assert rates.next_rate() == pytest.approx(following)
