"""How much of a study fits into its time, from what a few steps cost."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from pydantic import TypeAdapter

from tailora.errors import ConfigError
from tailora.study.budget import Budget, Costs, Extent, extents, fit, measure_costs, seconds_of_workers, too_short
from tailora.study.study_store import StudySession
from tailora.study.trial import Listen, Trial, TrialEvent, run_in_subprocess

COSTS = Costs(fixed=12, step=2, evaluation=2)
WANTED, FEWEST = Extent(tries=5, seeds=3), Extent(tries=3, seeds=2, part=0.4)


def session(folder: Path, minutes: float) -> StudySession:
    return StudySession(folder, minutes, lambda _: None, None, run_in_subprocess)


def needed(extent: Extent, steps: int) -> float:
    costs = COSTS.on_part(extent.part)
    return extent.tries * costs.trial(steps, 7 / 12) + extent.seeds * costs.final_run(steps)


def test_the_steps_of_a_trial_fill_the_time() -> None:
    assert fit(WANTED, FEWEST, 500, 1800, needed) == (WANTED, 126)
    assert 0.89 * 1800 < needed(WANTED, 126) <= 0.9 * 1800
    assert fit(WANTED, FEWEST, 20, 1800, needed) == (WANTED, 20)  # no more than the settings ask for
    assert fit(WANTED, FEWEST, 500, np.inf, needed) == (WANTED, 500)
    budget = Budget(steps=126, longest=500, costs=COSTS, held_out=40)
    assert TypeAdapter(Budget).validate_json(json.dumps(asdict(budget))) == budget


def test_a_run_costs_its_steps_and_its_evaluations() -> None:
    costs = Costs(fixed=10, step=2, evaluation=3, forgetting=5)  # seconds; an evaluation is of half of the examples
    assert costs.final_run(4) == 10 + 4 * 2 + 2 * 3 + 5
    assert costs.trial(4) == 10 + 4 * 2 + 3 * 3
    assert costs.trial(4, share=0.5, evaluations=1) == 10 + (4 * 2 + 3) / 2
    assert costs.on_part(0.5).final_run(4) == 10 + 4 * 2 + 3 + 5


def test_workers_take_no_longer_than_planned() -> None:
    """However the runs are shared out; and the time grows evenly with the steps, which `fit` relies on."""
    costs = [Costs(fixed=30, step=1, evaluation=2), COSTS, Costs(fixed=1, step=5, evaluation=1)] * 3

    def planned(steps: int, workers: int) -> float:
        return seconds_of_workers(costs, lambda arm: arm.final_run(steps), workers)

    for workers in (1, 2, 4, 20):
        for steps in (0, 7, 70):
            free_at = [0.0] * workers
            for cost in costs:
                free_at[free_at.index(min(free_at))] += cost.final_run(steps)
            assert max(free_at) <= planned(steps, workers) + 1e-6
        assert planned(70, workers) - planned(0, workers) == pytest.approx(
            10 * (planned(7, workers) - planned(0, workers))
        )
    assert planned(7, 1) == pytest.approx(sum(cost.final_run(7) for cost in costs))
    assert seconds_of_workers([], lambda arm: arm.fixed, 2) == 0


def test_less_is_done_before_the_time_is_refused() -> None:
    order = [(extent.tries, extent.seeds, extent.part) for extent in extents(WANTED, FEWEST)]
    assert order == [(5, 3, 1), (4, 3, 1), (3, 3, 1), (3, 2, 1), (3, 2, 0.5), (3, 2, 0.4)]
    assert list(extents(WANTED, WANTED)) == [WANTED]  # what the user gave
    least = needed(FEWEST, 9) / 0.9
    for extent in extents(WANTED, FEWEST):
        assert fit(WANTED, FEWEST, 500, needed(extent, 9) / 0.9 + 1e-6, needed) == (extent, 9)
    assert fit(WANTED, FEWEST, 500, least - 1, needed) is None


def test_too_little_time_is_refused_with_what_it_needs(tmp_path: Path) -> None:
    assert str(too_short(session(tmp_path, 3), 500, "6 runs")) == (
        "--minutes 3 is too short: 6 runs take at least 10 min according to the timings so far. Use --minutes 13 "
        "or more, fewer steps or runs, or a smaller --max-length"
    )


def test_timing_ends_with_the_first_event_that_shows_that_the_time_is_too_short(tmp_path: Path) -> None:
    seen: list[Costs] = []

    def run(listen: Listen) -> Trial:
        for step, seconds in enumerate((6.0, 9.0, 4.0, 5.0)):
            listen(TrialEvent(step, 4, 2.0, held_out=step == 0, parameters=1, seconds=seconds))
        raise AssertionError("it goes on")

    def check(costs: Costs) -> None:
        seen.append(costs)
        if costs.step > 3:
            raise ConfigError("too short")

    with pytest.raises(ConfigError, match="too short"):
        measure_costs(session(tmp_path, 1), run, check, choosing=False)
    assert [(costs.step, costs.evaluation) for costs in seen] == [(0, 3), (0, 3), (4, 3)]  # not the first step
