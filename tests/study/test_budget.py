"""Steps of a trial, from what a few steps cost and the time there is."""

import json
from dataclasses import asdict

import numpy as np
import pytest
from pydantic import TypeAdapter

from tailora.errors import ConfigError
from tailora.study.budget import Budget, Costs, budget_for

COSTS = Costs(fixed=12, step=2, evaluation=2)


def test_the_steps_of_a_trial_fill_the_time() -> None:
    budget = budget_for(COSTS, longest=500, seconds=1800, trials=10, judging_runs=6)
    expected = 10 * COSTS.trial(budget.steps, 7 / 12) + 6 * COSTS.judging_run(budget.steps)
    assert 0.85 * 1800 < expected <= 0.9 * 1800
    assert budget_for(COSTS, longest=20, seconds=1800, trials=10, judging_runs=6).steps == 20
    assert budget_for(COSTS, longest=500, seconds=np.inf, trials=10, judging_runs=6).steps == 500
    assert TypeAdapter(Budget).validate_json(json.dumps(asdict(budget))) == budget
    fewer = budget_for(COSTS, longest=500, seconds=520, trials=None, judging_runs=6)
    assert fewer.steps >= 9


def test_too_little_time_is_refused_with_what_it_needs() -> None:
    with pytest.raises(
        ConfigError, match=r"10 trials of 9 steps and 6 runs that judge take about 9 minutes.*--minutes"
    ):
        budget_for(COSTS, longest=500, seconds=60, trials=10, judging_runs=6)
